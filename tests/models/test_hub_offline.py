"""Being offline, behind a proxy, or set up wrongly: nothing is reached, and the message says how to go on."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mistral_nb import models
from mistral_nb.cli import main
from mistral_nb.errors import ConfigurationError, ModelError, PullError
from mistral_nb.foreign import clean
from mistral_nb.models.hub import endpoint_of_environment
from mistral_nb.models.hub_failures import Hub
from tests.models.hub_server import LISTING, Fault, HubServer, Repo, use_hub
from tests.models.tiny_repos import sharded

CLI = r"`hf download org/sharded --local-dir org--sharded --exclude \"\*.bin\"`"
ELSEWHERE = rf"on a machine with a connection run {CLI}, copy that folder here and run: mistral-nb pull ./org--sharded"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_choice(hub: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    told = f"^{variable} is set, so org/sharded is not asked for; unset it, or {ELSEWHERE}$"
    with pytest.raises(PullError, match=told):
        models.pull("org/sharded")
    assert not hub.seen


def test_weights_that_are_there_in_both_layouts_are_fetched_once(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that is told has one pattern, which the `hf` of any version reads alike."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PullError) as caught:
        models.pull("mistral-7b-instruct-v0.3", revision="refs/pr/1")
    name = "mistral-7b-instruct-v0.3"
    command = (
        "hf download mistralai/Mistral-7B-Instruct-v0.3 --revision refs/pr/1 "
        f'--local-dir {name} --exclude "consolidated*"'
    )
    assert f"run `{command}`, copy that folder here and run: mistral-nb pull ./{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "name"), [("mistral-7b", "mistral-7b-instruct-v0.2"), ("org/sharded", "org--sharded")]
)
def test_the_command_that_is_told_brings_the_folder_into_the_store(
    hub: HubServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, name: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PullError) as caught:
        models.pull(model)
    folder = re.search(r"--local-dir (\S+)", str(caught.value))
    command = re.search(r"copy that folder here and run: mistral-nb (.+)$", str(caught.value))
    assert folder
    assert command
    monkeypatch.chdir(tmp_path)
    Path(folder[1]).mkdir()
    for file, content in sharded().items():
        Path(folder[1], file).write_bytes(content)
    assert main(shlex.split(command[1])) == 0
    assert models.locate(model) == store / name


def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str, message: str) -> None:
    use_hub(monkeypatch, endpoint, tmp_path)
    with pytest.raises(PullError, match=rf"^{message}$"):
        models.pull("org/sharded")


def test_nobody_there(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    port = closed_port
    told = (
        rf"127.0.0.1:{port} cannot be reached \(connection refused\); check the network and pull again, or {ELSEWHERE}"
    )
    unreachable(monkeypatch, tmp_path, f"http://127.0.0.1:{port}", told)


def test_a_name_that_is_not_found(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = rf"no-such-hub.invalid cannot be reached \(its name is not found\); check the network .+, or {ELSEWHERE}"
    unreachable(monkeypatch, tmp_path, "https://no-such-hub.invalid", told)


def test_the_connection_goes_in_the_middle(hub: HubServer, store: Path) -> None:
    """Another try is made there: the hub has been seen."""

    def stop(progress: models.Progress) -> None:
        if progress.step == "Downloading tokenizer.json" and hub.is_up:
            hub.stop()

    told = r"127.0.0.1:\d+ (cannot be reached|broke off).+, 6 times in a row; (check the network and|later) pull again"
    with pytest.raises(PullError, match=told):
        models.pull("org/sharded", stop)


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A port where every connection gets that answer to what it sends first."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("endpoint", "host", "site"),
    [
        ("https://Hub.Example:443/", "hub.example", "https://hub.example"),
        ("HTTP://user:hunter2@HUB:80/a/", "hub", "http://hub/a"),
        ("http://[::1]:8000", "[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_endpoint_in_another_spelling(
    store: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, host: str, site: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    hub = Hub(endpoint_of_environment(), "org/x", None, "org--x")
    assert (hub.host, hub.site) == (host, site)


def test_a_refusal_of_an_endpoint_in_another_spelling(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, f"http://LOCALHOST:{hub.port}/", tmp_path)
    with pytest.raises(PullError, match=r"^localhost:\d+ shows no org/none \(HTTP 401: .+\); check its name"):
        models.pull("org/none")
    assert len(hub.seen) == 1


@pytest.mark.parametrize("code", ["RepoNotFound", ""])
def test_a_refusal_of_a_hub_that_the_endpoint_redirects_to(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    hub.repos["org/none"] = Repo({})
    hub.fail(LISTING, Fault("status", status=401, headers={"X-Error-Code": code}), always=True)
    head = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {hub.endpoint}/api/models/org/none?blobs=true\r\n"
    with answering(f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode()) as port:
        use_hub(monkeypatch, f"http://127.0.0.1:{port}", tmp_path)
        with pytest.raises(PullError, match=rf"^127.0.0.1:{port} shows no org/none \(HTTP 401\); check its name"):
            models.pull("org/none")
    assert len(hub.seen) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_login(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with answering(answer) as port:
        use_hub(monkeypatch, f"{scheme}://hub.invalid", tmp_path)
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://user:hunter2@127.0.0.1:{port}")
        told = rf"^the proxy 127.0.0.1:{port} does not let hub.invalid through \(.*407.*\); correct {scheme.upper()}_"
        with pytest.raises(PullError, match=told) as caught:
            models.pull("org/sharded")
    assert "hunter2" not in str(caught.value)


def test_a_proxy_that_is_not_there(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    use_hub(monkeypatch, "https://hub.invalid", tmp_path)
    port = closed_port
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:hunter2@127.0.0.1:{port}")
    told = rf"^hub.invalid cannot be reached through the proxy 127.0.0.1:{port} \(connection refused\); check .+"
    with pytest.raises(PullError, match=told) as caught:
        models.pull("org/sharded")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"), [("HTTPS_PROXY", "nonsense://user:hunter2@x:1"), ("SSL_CERT_FILE", __file__)]
)
def test_settings_that_make_no_client(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        PullError, match=r"^no HTTP client can be made .+; correct .*HTTPS_PROXY, .*SSL_CERT_FILE"
    ) as caught:
        models.pull("org/single")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    "address", ["http://me:hun/ter2@proxy.example:3128", "me:hun/ter2@proxy.example:3128", "http://me:hunter2@x:port"]
)
def test_a_proxy_that_is_no_address(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str, address: str
) -> None:
    monkeypatch.setenv(variable, address)
    told = rf"^{variable} cannot be read as an address; correct it .+ password .+ percent-encoded$"
    with pytest.raises(PullError, match=told) as caught:
        models.pull("org/single")
    assert "hun" not in "".join(traceback.format_exception(caught.value))


def test_a_login_is_not_shown() -> None:
    assert clean("at me:hunter2@proxy.example:3128/x, said me@home") == "at [login]@proxy.example:3128/x, said me@home"
    assert clean("x" * 1_000_000) == "x" * 197 + "..."
    assert len(clean(":" * 1_000_000 + "x:y " * 1_000_000)) == 200


def test_a_certificate_that_is_not_trusted(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl command here: a certificate cannot be made")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hub"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    repo = Repo({name: content for name, content in sharded(1).items() if name != "tokenizer.json"})
    with HubServer({"org/sharded": repo}, lambda plain: context.wrap_socket(plain, server_side=True)) as hub:
        endpoint = hub.endpoint.replace("http:", "https:")
        told = r"the certificate of 127.0.0.1:\d+ is not trusted here \(.+\): .+; set SSL_CERT_FILE to .+"
        unreachable(monkeypatch, tmp_path, endpoint, told)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(ModelError, match="has no tokenizer"):
            models.pull("org/sharded")


@pytest.mark.parametrize(
    "endpoint",
    [
        "huggingface.co",
        "ftp://x",
        "http://",
        "http://user:hunter2@",
        "http://[",
        "http://x:y",
        "http://u:a/b@x",
        "http://-ü.de",
        "user:hunter2@mirror.example",
        "https//user:hunter2@mirror.example",
        "user:x hunter2@mirror.example",
    ],
)
def test_an_endpoint_that_is_none(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    use_hub(monkeypatch, endpoint, tmp_path)
    with pytest.raises(ConfigurationError, match=r"HF_ENDPOINT is .+; set it to an .+ https://") as caught:
        models.pull("org/single")
    assert "hunter2" not in str(caught.value)
