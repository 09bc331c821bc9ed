"""What the line of the magic means."""

from __future__ import annotations

from typing import Any

import pytest
from IPython.core.error import UsageError

from mistral_nb.types import FIELDS, GenerationRequest
from mistral_nb_magics.cell import Mistral
from mistral_nb_magics.commands import find_command
from mistral_nb_magics.options import OPTION_FIELDS, Call, flag, read_call

MAGIC: Any = vars(Mistral)["mistral"]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
NAMES = {
    "persona": [{"role": "system", "content": "Be long."}],
    "topic": "tides",
    "turns": TURNS,
    "tools": [{"name": "f", "code": "def f(): ..."}],
    "number": 3,
}


def read(line: str, cell: str | None = None, **defaults: Any) -> Call:
    return read_call(MAGIC.parser, line, cell, defaults, NAMES)


def refusal(line: str, cell: str | None = None) -> str:
    with pytest.raises(UsageError) as failure:
        read(line, cell)
    assert type(failure.value) is UsageError
    return str(failure.value)


def test_every_request_field_has_an_option_and_a_help_text() -> None:
    assert {field.name for field in OPTION_FIELDS} == {field.name for field in FIELDS} - {"prompt"}
    for field in OPTION_FIELDS:
        assert flag(field) in MAGIC.__doc__, field.name


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("Why's the sky blue?", "Why's the sky blue?"),
        ("--temperature 0 Why's the sky blue?", "Why's the sky blue?"),
        ("Why's the sky blue? --temperature 0", "Why's the sky blue?"),
        ("Why's --temperature=0   the  sky blue?", "Why's   the  sky blue?"),
        ('"Why is it?" --temperature 0', "Why is it?"),
        ('Say "yes" or "no"', 'Say "yes" or "no"'),
        ("--temperature 0 -- --raw means what? --top-k 3", "--raw means what? --top-k 3"),
        ("-- stop", "stop"),
        ("it is -5 degrees -- cold --temperature 0", "it is -5 degrees -- cold"),
        ("About {{topic}} and {x} and $y --temperature 0", "About tides and {x} and $y"),
    ],
)
def test_the_prompt_of_a_line_is_what_is_no_option(line: str, prompt: str) -> None:
    call = read(line)
    assert call.request.prompt == prompt
    if "--temperature" in line:
        assert call.request.temperature == 0


def test_options_become_fields() -> None:
    line = (
        "--max-tokens 5 --temperature=0.5 --top-p .9 --top-k 3 --seed 7 --repetition-penalty 1.1 "
        "--frequency-penalty 0.1 --presence-penalty 0.2 --lora tuned --lora-scale 2 "
        "--stop '\\n\\n' --stop END --no-stream --functions tools "
        "--backend local --model 'my model' -o out --format text --dry-run --raw"
    )
    call = read(line, "Hello\n")
    assert call.request == GenerationRequest.from_dict(
        {
            "prompt": "Hello",
            "max_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "seed": 7,
            "repetition_penalty": 1.1,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.2,
            "lora": "tuned",
            "lora_scale": 2,
            "stop": ["\n\n", "END"],
            "stream": False,
            "raw": True,
            "functions": NAMES["tools"],
        }
    )
    assert (call.backend, call.model, call.out, call.format, call.dry_run) == ("local", "my model", "out", "text", True)


def test_the_line_comes_before_the_defaults() -> None:
    assert read("Hi", temperature=0.1, seed=4).request.temperature == 0.1
    call = read("Hi --temperature 0.2", temperature=0.1, seed=4)
    assert (call.request.temperature, call.request.seed) == (0.2, 4)


def test_system_and_history_come_before_the_prompt() -> None:
    call = read("--system 'About {{topic}}.' --messages turns", "Go on.")
    roles = [(message.role, message.content) for message in call.request.messages or ()]
    assert roles == [("system", "About tides."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Go on.")]
    kept = read("--messages persona Hi", system="Be brief.")
    assert [turn.content for turn in kept.request.messages] == ["Be long.", "Hi"]  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="--system = 'x': the messages hold a system turn"):
        read("--messages persona --system x Hi")
    assert read("Hi", system="Be brief.").request.messages[0].content == "Be brief."  # type: ignore[index]
    assert read("--raw Hi", system="Be brief.").request.prompt == "Hi"


def test_no_interpolate_leaves_braces() -> None:
    assert read("--no-interpolate {{nobody}}").request.prompt == "{{nobody}}"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Hi --max-tokns 3", "unknown option --max-tokns; did you mean --max-tokens?"),
        ("Hi --maxtokens=3", "did you mean --max-tokens?"),
        ("Hi --xyzzy", "%mistral?"),
        ("Hi --temp 0", "unknown option --temp"),
        ("Hi --temperature 9", "--temperature = 9.0: must be a number from 0 to 5"),
        ("Hi --temperature warm", "--temperature = 'warm': must be a number from 0 to 5"),
        ("Hi --max-tokens 0", "--max-tokens = 0: must be a whole number from 1 to 131072"),
        ("Hi --max-tokens 1.5", "--max-tokens = '1.5': must be a whole number"),
        ("Hi --top-k 51", "1 to 50"),
        ("Hi --temperature", "--temperature needs a value"),
        ("Hi --system 'be brief", "has no end"),
        ("Hi --raw=yes", "--raw takes no value"),
        ("Hi --raw --system x", "--raw"),
        ("Hi -o 2x", "--out 2x"),
        ("Hi -o class", "--out class"),
        ("Hi --format pdf", "pdf"),
        ("Hi --functions toolz", "no variable of that name; did you mean 'tools'?"),
        ("Hi --messages number", "must be a list, not of type int"),
        ("--temperature 0", "the prompt is empty"),
        ("Hi {{topik}}", "no variable 'topik'"),
        ("Hi --stop a --stop b --stop c --stop d --stop e", "--stop"),
    ],
)
def test_bad_usage_is_named(line: str, told: str) -> None:
    assert told in refusal(line)


def test_bad_usage_of_a_cell() -> None:
    assert "the prompt is empty" in refusal("", " \n\n")
    assert "only options stand there" in refusal("hello", "Hi")


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("", ""),
        ("status", "status"),
        (" last ", "last"),
        ("stop --force", "stop"),
        ("stop --model embedded --force", "stop"),
        ("pull embedded", "pull"),
        ("pull org/name --revision v1", "pull"),
        ("pull --name mine './a folder'", "pull"),
        ("models", "models"),
        ("models embedded", "models"),
        ("help", "help"),
        ("status of the project", None),
        ("stop talking --temperature 0", None),
        ("pull the door open", None),
        ("models are wrong but useful", None),
        ("last year's news", None),
        ("-- stop", None),
        ("Status", None),
    ],
)
def test_a_command_is_its_word_with_nothing_but_options(line: str, command: str | None) -> None:
    found = find_command(line)
    assert (found and found[0]) == command


def test_what_a_pull_is_told() -> None:
    found = find_command("pull './a folder' --name mine")
    assert found
    assert vars(found[1]) == {"model": "./a folder", "revision": None, "name": "mine"}


def test_an_unknown_option_of_a_command() -> None:
    with pytest.raises(UsageError, match=r"--frce of %mistral stop; did you mean '--force'\?"):
        find_command("stop --frce")
    with pytest.raises(UsageError, match="--format of %mistral last; it takes none"):
        find_command("last --format code")
    with pytest.raises(UsageError, match=r"--revison=v1 of %mistral pull; did you mean '--revision'\?"):
        find_command("pull org/name --revison=v1")
    with pytest.raises(UsageError, match="expected one argument"):
        find_command("pull org/name --revision")
    with pytest.raises(UsageError, match="--max-tokens of %mistral stop"):
        find_command("stop --max-tokens 3")
    with pytest.raises(UsageError, match="it takes none"):
        find_command("status --loud")
