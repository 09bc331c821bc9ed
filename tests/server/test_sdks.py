"""Clients that others wrote, against the engine: curl as on the model page, and the SDKs of Cloudflare and OpenAI."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import cloudflare
import openai
import pytest

from tests.server.engines import DEADLINE, MODEL, STAND_IN, Engines, EngineUnderTest, eventually

ACCOUNT = "0123456789abcdef0123456789abcdef"
QUESTION = [
    {"role": "system", "content": "You are a friendly assistant"},
    {"role": "user", "content": "What is the origin of the phrase Hello, World"},
]
SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 12}

PAGE_STREAM = """curl $HOST/client/v4/accounts/$CLOUDFLARE_ACCOUNT_ID/ai/run/@hf/mistral/mistral-7b-instruct-v0.2 \\
  -X POST \\
  -H "Authorization: Bearer $CLOUDFLARE_AUTH_TOKEN" \\
  -d '{ "messages": [{ "role": "system", "content": "You are a friendly assistant" }, \
{ "role": "user", "content": "Why is pizza so good" }], "stream": true }'
"""
PAGE_PROMPT = """curl $HOST/client/v4/accounts/$CLOUDFLARE_ACCOUNT_ID/ai/run/@hf/mistral/mistral-7b-instruct-v0.2 \\
  -X POST \\
  -H "Authorization: Bearer $CLOUDFLARE_AUTH_TOKEN" \\
  -d '{ "prompt": "tell me a story", "raw": "true" }'
"""
PAGE_LORA = """curl $HOST/client/v4/accounts/$CLOUDFLARE_ACCOUNT_ID/ai/run/@hf/mistral/mistral-7b-instruct-v0.2 \\
  -X POST \\
  -H "Authorization: Bearer $CLOUDFLARE_AUTH_TOKEN" \\
  -d '{
    "prompt": "tell me a story",
    "raw": "true",
    "lora": "00000000-0000-0000-0000-000000000"
  }'
"""


def curl(engine: EngineUnderTest, command: str) -> str:
    """What a command of the model page prints; only the host and the token are another."""
    if shutil.which("curl") is None:
        pytest.skip("no curl on the PATH")
    variables = {
        "HOST": engine.record.base_url,
        "CLOUDFLARE_ACCOUNT_ID": ACCOUNT,
        "CLOUDFLARE_AUTH_TOKEN": engine.record.token,
        "no_proxy": "*",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
    }
    done = subprocess.run(["sh", "-c", command], env=variables, capture_output=True, timeout=DEADLINE, check=True)
    return done.stdout.decode()


def test_the_pages_curl_with_a_stream(engine: EngineUnderTest) -> None:
    lengths = []
    for _ in range(3):
        lines = [line for line in curl(engine, PAGE_STREAM).splitlines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        frames = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert frames[-1]["usage"]["total_tokens"] > frames[-1]["usage"]["completion_tokens"] > 0
        lengths.append(len("".join(frame["response"] for frame in frames)))
        if lengths[-1] > 20:  # it is drawn by chance
            break
    assert lengths[-1] > 20


def test_the_pages_curl_with_a_raw_prompt(engine: EngineUnderTest) -> None:
    lengths = []
    for _ in range(3):
        body = json.loads(curl(engine, PAGE_PROMPT))
        assert body["success"] is True
        lengths.append(len(body["result"]["response"]))
        if lengths[-1] > 20:  # it is drawn by chance
            break
    assert lengths[-1] > 20


def test_the_pages_curl_with_its_placeholder_for_an_adapter(engine: EngineUnderTest) -> None:
    body = json.loads(curl(engine, PAGE_LORA))
    assert (body["success"], body["result"], body["errors"][0]["code"]) == (False, {}, 3037)


# The SDK of Cloudflare


@pytest.fixture
def workers(engine: EngineUnderTest) -> Iterator[cloudflare.Cloudflare]:
    client = cloudflare.Cloudflare(
        api_token=engine.record.token,
        base_url=f"{engine.record.base_url}/client/v4",
        max_retries=0,
        http_client=cloudflare.DefaultHttpxClient(trust_env=False),
    )
    with client:
        yield client


def test_cloudflare_runs_a_model(workers: cloudflare.Cloudflare) -> None:
    """This SDK escapes the slashes of a model's id."""
    answer: Any = workers.ai.run(STAND_IN, account_id=ACCOUNT, messages=QUESTION, **SHORT)
    assert len(answer["response"]) > 10
    assert answer["usage"]["completion_tokens"] == 12


def test_cloudflare_streams(workers: cloudflare.Cloudflare) -> None:
    whole: Any = workers.ai.run(STAND_IN, account_id=ACCOUNT, prompt="Name a colour.", **SHORT)
    streaming = workers.ai.with_streaming_response.run
    with streaming(STAND_IN, account_id=ACCOUNT, prompt="Name a colour.", stream=True, **SHORT) as response:
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data[-1] == "[DONE]"
    assert "".join(json.loads(frame)["response"] for frame in data[:-1]) == whole["response"]


def test_cloudflare_raises_its_own_errors(workers: cloudflare.Cloudflare) -> None:
    with pytest.raises(cloudflare.BadRequestError) as refused:
        workers.ai.run(STAND_IN, account_id=ACCOUNT, prompt="x", temperature=9)
    assert [error.code for error in refused.value.errors] == [5006]
    with pytest.raises(cloudflare.NotFoundError) as unknown:
        workers.ai.run(STAND_IN, account_id=ACCOUNT, prompt="x", lora="nobodys")
    assert [error.code for error in unknown.value.errors] == [3037]


def test_cloudflare_lists_models(workers: cloudflare.Cloudflare) -> None:
    listed: list[Any] = list(workers.ai.models.list(account_id=ACCOUNT, per_page=1))
    assert [model["name"] for model in listed] == [MODEL, STAND_IN]
    assert {model["task"]["name"] for model in listed} == {"Text Generation"}


def test_cloudflare_makes_a_finetune(workers: cloudflare.Cloudflare) -> None:
    finetunes = workers.ai.finetunes
    made = finetunes.create(account_id=ACCOUNT, model=STAND_IN, name="by-sdk", description="of a test")
    assert made is not None
    assert (made.name, made.model, made.public) == ("by-sdk", STAND_IN, False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        done = finetunes.assets.create(made.id, account_id=ACCOUNT, file=(name, b"{}"), file_name=name)
        assert done.success
    listed: Any = finetunes.list(account_id=ACCOUNT)
    assert made.id in [each.id for each in listed]
    assert list(finetunes.public.list(account_id=ACCOUNT)) == []
    with pytest.raises(cloudflare.APIStatusError) as refused:
        workers.ai.run(STAND_IN, account_id=ACCOUNT, prompt="x", lora="by-sdk")
    assert (refused.value.status_code, refused.value.errors[0].code) == (400, 5006)


# The SDK of OpenAI


@pytest.fixture(params=["/v1", f"/client/v4/accounts/{ACCOUNT}/ai/v1"], ids=["root", "account"])
def chat(engine: EngineUnderTest, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    client = openai.OpenAI(
        api_key=engine.record.token,
        base_url=engine.record.base_url + request.param,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    with client:
        yield client


def test_openai_chats(chat: openai.OpenAI) -> None:
    whole = chat.chat.completions.create(model=STAND_IN, messages=QUESTION, **SHORT)  # type: ignore[arg-type]
    (choice,) = whole.choices
    assert whole.object == "chat.completion"
    assert whole.model == MODEL, "the model that really answers"
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    stream = chat.chat.completions.create(
        model=STAND_IN, messages=QUESTION, stream=True, stream_options={"include_usage": True}, **SHORT
    )
    first, *pieces, ended, last = list(stream)
    assert (first.choices[0].delta.role, first.object) == ("assistant", "chat.completion.chunk")
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content
    assert ended.choices[0].finish_reason == "length"
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in (first, *pieces, ended, last)}) == 1


def test_openai_completes(chat: openai.OpenAI) -> None:
    whole = chat.completions.create(model=MODEL, prompt="one two three", **SHORT)
    assert whole.object == "text_completion"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens < 6, "there is no template around a bare prompt"
    stream = list(chat.completions.create(model=MODEL, prompt="one two three", stream=True, **SHORT))
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert stream[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in stream)


def test_openai_lists_models(chat: openai.OpenAI) -> None:
    assert [model.id for model in chat.models.list()][:2] == [MODEL, STAND_IN], "adapters come after them"
    assert chat.models.retrieve("embedded").id == "embedded"
    assert chat.models.retrieve(STAND_IN).owned_by == "mistral-nb"
    with pytest.raises(openai.NotFoundError):
        chat.models.retrieve("gpt-4o")


def test_openai_raises_its_own_errors(chat: openai.OpenAI) -> None:
    ask = chat.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="gpt-4o", messages=QUESTION)  # type: ignore[arg-type]
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(model=MODEL, messages=QUESTION, temperature=9)  # type: ignore[arg-type]
    assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(model=MODEL, messages=[{"role": "user", "content": "word " * 9000}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError) as stranger:
        chat.with_options(api_key="another").models.list()
    assert stranger.value.code == "invalid_api_key"


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}


@pytest.mark.parametrize("chat", ["/v1"], indirect=True)
def test_openai_calls_a_tool(chat: openai.OpenAI) -> None:
    """A call, whole and streamed, and the turn that answers it."""
    turns: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    ask: dict[str, Any] = {"model": STAND_IN, "messages": turns, "tools": [TOOL], "tool_choice": "required"}
    choice = chat.chat.completions.create(**ask, temperature=0, max_tokens=100).choices[0]
    (call,) = choice.message.tool_calls or ()
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", None, "function")
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments).keys() == {"city", "unit"}
    with chat.chat.completions.stream(**ask, temperature=0, max_tokens=100) as stream:
        streamed = stream.get_final_completion().choices[0]
    (same,) = streamed.message.tool_calls or ()
    assert (streamed.finish_reason, same.function.arguments) == ("tool_calls", call.function.arguments)
    turns += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    answer = chat.chat.completions.create(model=STAND_IN, messages=turns, tools=[TOOL], tool_choice="none", **SHORT)
    assert answer.choices[0].message.content


def test_leaving_a_stream_ends_it(engine: EngineUnderTest, chat: openai.OpenAI) -> None:
    story: list[Any] = [{"role": "user", "content": "Write a very long story about a lighthouse."}]

    def cancelled() -> dict[str, Any] | None:
        told: dict[str, Any] | None = engine.client.get("/health").json()["last_cancelled"]
        return told

    before = cancelled()
    with chat.chat.completions.create(model=MODEL, messages=story, max_tokens=4000, stream=True) as stream:
        next(iter(stream))
    eventually(lambda: cancelled() != before, "the engine saw that the client had left")
    left = cancelled()
    assert left is not None
    assert left["tokens_generated"] <= left["tokens_when_seen"] + 1


def test_openai_tells_of_a_stream_that_fails(engines: Engines) -> None:
    ended = engines.start("--managed")
    ended.ready()
    story: list[Any] = [{"role": "user", "content": "Write a very long story about a lighthouse."}]
    http = openai.DefaultHttpxClient(trust_env=False)
    url = f"{ended.record.base_url}/v1"
    with openai.OpenAI(api_key=ended.record.token, base_url=url, max_retries=0, http_client=http) as client:
        stream = client.chat.completions.create(model=MODEL, messages=story, max_tokens=4000, stream=True)
        next(iter(stream))
        ended.client.post("/engine/stop", json={"force": True})
        with pytest.raises(openai.APIError, match="the engine was stopped"):
            list(stream)
