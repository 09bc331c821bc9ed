"""The meeting point of notebooks and engine processes: records, locks, logs."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from mistral_nb import runtime
from mistral_nb.errors import ConfigurationError
from mistral_nb.runtime import EngineRecord, StartLock

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
POSIX = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MISTRAL_NB_LOG_DIR", str(tmp_path / "log"))
    return tmp_path


def record(model: str = MODEL, *, pid: int = 0, port: int = 1, token: str = "a-token") -> EngineRecord:
    return EngineRecord(
        pid=pid or os.getpid(),
        port=port,
        token=token,
        model=model,
        version="0.1.0",
        protocol=runtime.PROTOCOL,
        log="engine.log",
        started=1_700_000_000.5,
        serve_as=("@hf/a/b", "c"),
    )


def ended_process() -> int:
    """The number of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_record_comes_back_as_it_was_written() -> None:
    runtime.write_record(record())
    assert runtime.read_record(MODEL) == record()
    assert [path.name for path in runtime.runtime_dir().iterdir()] == [f"engine-{MODEL}.json"]


def test_without_a_record_there_is_none() -> None:
    assert runtime.read_record(MODEL) is None
    assert runtime.all_records() == []


def test_the_token_is_not_shown() -> None:
    assert "a-token" not in repr(record())


def test_the_proof_is_not_shown_and_a_record_of_before_has_none() -> None:
    with_proof = dataclasses.replace(record(), proof="a-proof")
    assert "a-proof" not in repr(with_proof)
    runtime.write_record(with_proof)
    assert runtime.read_record(MODEL) == with_proof
    path = runtime.record_path(MODEL)
    data = json.loads(path.read_text())
    assert data.pop("proof") == "a-proof"
    path.write_text(json.dumps(data))
    assert runtime.read_record(MODEL) == record()


def test_the_url_of_an_ipv6_address_has_brackets() -> None:
    assert record(port=80).base_url == "http://127.0.0.1:80"
    assert dataclasses.replace(record(port=80), host="::1").base_url == "http://[::1]:80"


@POSIX
def test_only_the_user_can_read_it() -> None:
    old = os.umask(0)
    try:
        runtime.write_record(record())
    finally:
        os.umask(old)
    assert stat.S_IMODE(runtime.runtime_dir().stat().st_mode) == 0o700
    assert stat.S_IMODE(runtime.record_path(MODEL).stat().st_mode) == 0o600


@POSIX
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_that_is_there_keeps_its_mode(folders: Path, mode: int) -> None:
    (folders / "run").mkdir()
    (folders / "run").chmod(mode)
    runtime.write_record(record())
    assert stat.S_IMODE((folders / "run").stat().st_mode) == mode
    assert stat.S_IMODE(runtime.record_path(MODEL).stat().st_mode) == 0o600


@POSIX
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused_and_left_as_it_is(folders: Path, mode: int) -> None:
    (folders / "run").mkdir()
    (folders / "run").chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"chmod 700 {folders}/run.*MISTRAL_NB_RUNTIME_DIR"):
        runtime.runtime_dir()
    assert stat.S_IMODE((folders / "run").stat().st_mode) == mode


AS_SOMEBODY = """
import os, sys
os.setgid(65534); os.setuid(65534)
from mistral_nb import runtime
from mistral_nb.errors import ConfigurationError
record = runtime.EngineRecord(1, 1, "t", "m", "0", 1, "x.log", 0.0)
for use in (lambda: runtime.write_record(record), lambda: runtime.start_lock("m")):
    try:
        use()
    except ConfigurationError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_cannot_be_written_is_named_with_its_variable(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as top:  # others may not enter the folders of pytest
        folder = Path(top) / "run"
        folder.mkdir()
        os.chown(folder, 65534, 65534)
        folder.chmod(0o500)
        Path(top).chmod(0o755)
        script = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport mistral_nb.runtime, platformdirs\n{AS_SOMEBODY}"
        )
        env = {**os.environ, "MISTRAL_NB_RUNTIME_DIR": str(folder)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert str(folder) in line
        assert "MISTRAL_NB_RUNTIME_DIR" in line


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(folders: Path) -> None:
    (folders / "run").mkdir()
    os.chown(folders / "run", 12345, -1)
    with pytest.raises(ConfigurationError, match=r"another user.*MISTRAL_NB_RUNTIME_DIR"):
        runtime.runtime_dir()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1, "port": 2}', "\x00\xff"])
def test_what_is_no_record_counts_as_none(text: str) -> None:
    runtime.record_path(MODEL).write_text(text, encoding="latin-1")
    assert runtime.read_record(MODEL) is None


def test_a_later_version_may_add_keys() -> None:
    data = dataclasses.asdict(record()) | {"protocol": 99, "added_later": True}
    runtime.record_path(MODEL).write_text(json.dumps(data))
    found = runtime.read_record(MODEL)
    assert found is not None
    assert found.protocol == 99


def test_only_the_own_record_is_removed() -> None:
    runtime.write_record(record(token="of another process"))
    assert not runtime.remove_record(record())
    assert runtime.read_record(MODEL) is not None
    assert runtime.remove_record(record(token="of another process"))
    assert runtime.read_record(MODEL) is None
    assert not runtime.remove_record(record())


def test_models_do_not_share_files(tmp_path: Path) -> None:
    """Names that differ only in case, or in characters that a file name cannot hold, and long paths."""
    deep = tmp_path / ("x" * 200)
    models = [
        MODEL,
        MODEL.upper(),
        "a/b",
        "a-b",
        "a b",
        "@hf/mistral/mistral-7b-instruct-v0.2",
        f"{deep}/1",
        f"{deep}/2",
    ]
    for model in models:
        runtime.write_record(record(model))
    assert {found.model for found in runtime.all_records()} == set(models)
    assert len({path.name.lower() for path in runtime.runtime_dir().iterdir()}) == len(models)


def test_running_means_a_process_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert runtime.is_running(record(port=port))
        assert not runtime.is_running(record(port=port, pid=ended_process()))
    assert not runtime.is_running(record(port=port))


def test_processes() -> None:
    assert runtime.process_alive(os.getpid())
    assert runtime.process_alive(1)
    assert not runtime.process_alive(ended_process())
    assert not runtime.process_alive(0)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    end = time.monotonic() + 30
    while runtime.process_alive(process.pid):
        assert time.monotonic() < end
    assert process.returncode is None, "nobody has waited for it"
    os.kill(process.pid, 0)
    process.wait()


@LINUX
@pytest.mark.parametrize(
    ("words", "engine"),
    [
        (["mistral_nb", "serve", "--managed"], True),
        (["/opt/bin/mistral-nb", "serve"], True),
        (["mistral_nb", "status"], False),
        (["serve", "mistral_nb"], False),
        (["my-mistral_nb", "serve"], False),
    ],
)
def test_an_engine_is_known_by_its_command_line(words: list[str], engine: bool) -> None:
    script = "import sys; print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert runtime.is_engine(record(pid=process.pid)) == engine
        process.communicate()
    assert not runtime.is_engine(record(pid=process.pid))


@pytest.mark.parametrize(
    ("host", "here"),
    [
        (("127.0.0.1", "127.8.8.8", "::1", "localhost"), True),
        (("0.0.0.0", "::", "10.0.0.1", "example.com", "127.0.0.1.example.com", ""), False),
    ],
)
def test_loopback(host: tuple[str, ...], here: bool) -> None:
    assert {runtime.is_loopback(name) for name in host} == {here}


HOLDER = """
import sys
from mistral_nb import runtime
with runtime.start_lock("m"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_holds_the_start_lock() -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    with other, other.stdout:
        assert other.stdout.readline() == "held\n"
        lock = runtime.start_lock("m")
        assert not lock.try_acquire()
        assert runtime.start_lock("another model").try_acquire()
        asked = iter([False, False, True])
        assert not lock.acquire(cancelled=lambda: next(asked))
        other.kill()
        assert lock.acquire(), "the lock of a killed process is free"
        lock.release()


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    first, second = StartLock(tmp_path / "lock"), StartLock(tmp_path / "lock")
    with first:
        assert not second.try_acquire()
        assert not first.try_acquire()
    assert second.try_acquire()
    second.release()
    second.release()


def test_the_log_can_be_written_and_is_kept() -> None:
    path = runtime.log_path(MODEL)
    path.write_text("old lines\n")
    assert runtime.log_path(MODEL).read_text() == "old lines\n"


@pytest.mark.parametrize(("variable", "use"), [("LOG", runtime.log_path), ("RUNTIME", runtime.read_record)])
def test_a_folder_that_cannot_be_used_is_named(
    variable: str, use: object, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the folder should be stops root too."""
    (folders / "file").write_text("")
    name = f"MISTRAL_NB_{variable}_DIR"
    monkeypatch.setenv(name, str(folders / "file" / "sub"))
    assert callable(use)
    with pytest.raises(ConfigurationError, match=rf"{folders}/file/sub.*{name}"):
        use(MODEL)


def test_without_settings_the_users_own_folders_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MISTRAL_NB_RUNTIME_DIR", "MISTRAL_NB_LOG_DIR"):
        monkeypatch.delenv(name)
    (tmp_path / "xdg").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert runtime.runtime_dir().name == "mistral-nb"
    if sys.platform == "linux":
        assert runtime.log_path(MODEL).is_relative_to(tmp_path / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        assert runtime.runtime_dir().is_dir(), "a session without XDG_RUNTIME_DIR gets a folder and no warning"
