"""Where settings come from: arguments, `%config Mistral`, the environment, the configuration file; first match wins.

`SETTINGS` is the one table of settings with their help texts, environment variables and bounds. The folders are not in
it: an engine process and every client of it must agree on them, so they come from the environment alone
(`MISTRAL_NB_HOME`, `MISTRAL_NB_RUNTIME_DIR`, `MISTRAL_NB_LOG_DIR`), and `MISTRAL_NB_CONFIG` names another file than
`config.toml` in the user's configuration folder.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mistral_nb.errors import ConfigurationError
from mistral_nb.secret import Secret
from mistral_nb.types import MOST_RANK

__all__ = [
    "BACKENDS",
    "SETTINGS",
    "USE_LOCAL",
    "Setting",
    "Settings",
    "config_path",
    "environment_with_packages",
    "environment_without_secrets",
    "load_settings",
]

BACKENDS = ("auto", "cloudflare", "local", "openai")
AskedPrecision = Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"]
PRECISIONS: tuple[AskedPrecision, ...] = get_args(AskedPrecision)
AskedDevice = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[AskedDevice, ...] = get_args(AskedDevice)
MAX_REQUESTS = 64
"""That an engine answers at once, unless it is told otherwise."""

FALLBACK_MODEL = "@cf/mistral/mistral-7b-instruct-v0.2-lora"
CLOUDFLARE_URL = "https://api.cloudflare.com/client/v4"
USE_LOCAL = 'use the local engine: --backend local, in Python backend="local"'

_FOLDERS = {"home": "MISTRAL_NB_HOME", "runtime_dir": "MISTRAL_NB_RUNTIME_DIR", "log_dir": "MISTRAL_NB_LOG_DIR"}

Kind = Literal["backend", "device", "precision", "text", "tokens", "rank", "secret", "url", "bool", "seconds"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `variables` are read in this order; numbers are bounded by `minimum` and `maximum`.

    An empty text means unset, except where `may_be_empty`: there it is a value.
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    variables: tuple[str, ...] = ()
    minimum: float = 0.1
    maximum: float = 604_800
    may_be_empty: bool = False


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "backend",
        "backend",
        f"Who answers: {', '.join(BACKENDS)}, or the https:// address of a `mistral-nb serve`.",
        "auto",
        ("MISTRAL_NB_BACKEND",),
    ),
    Setting("model", "text", "The model; unset is the backend's own choice.", None, ("MISTRAL_NB_MODEL",)),
    Setting(
        "device",
        "device",
        f"Where the local engine runs: {', '.join(DEVICES)}. Takes effect when an engine starts.",
        "auto",
        ("MISTRAL_NB_DEVICE",),
    ),
    Setting(
        "precision",
        "precision",
        f"What the local engine computes in: {', '.join(PRECISIONS)}. Takes effect when an engine starts.",
        "auto",
        ("MISTRAL_NB_PRECISION",),
    ),
    Setting(
        "context",
        "tokens",
        "Tokens of context in the local engine; unset is all that the model has. Takes effect when an engine starts.",
        None,
        ("MISTRAL_NB_CONTEXT",),
        minimum=1,
        maximum=1 << 24,
    ),
    Setting(
        "lora_rank",
        "rank",
        "The largest rank of LoRA adapters in the local engine; unset is 64 on a CPU and 16 on a GPU, where every "
        "adapter takes the memory and the time of it. Takes effect when an engine starts.",
        None,
        ("MISTRAL_NB_LORA_RANK",),
        minimum=1,
        maximum=MOST_RANK,
    ),
    Setting(
        "idle_timeout",
        "seconds",
        "Seconds without a request after which the engine process ends itself; 0 is never.",
        1800.0,
        ("MISTRAL_NB_IDLE_TIMEOUT",),
        minimum=0,
    ),
    Setting(
        "connect_timeout",
        "seconds",
        "Seconds to wait for a connection.",
        10.0,
        ("MISTRAL_NB_CONNECT_TIMEOUT",),
    ),
    Setting(
        "first_token_timeout",
        "seconds",
        "Seconds to wait for the first text.",
        300.0,
        ("MISTRAL_NB_FIRST_TOKEN_TIMEOUT",),
    ),
    Setting(
        "stall_timeout",
        "seconds",
        "Seconds of silence after which an answer that has begun is given up.",
        60.0,
        ("MISTRAL_NB_STALL_TIMEOUT",),
    ),
    Setting(
        "retry_deadline",
        "seconds",
        "Seconds within which a request that failed before its first text is tried again; 0 is never.",
        30.0,
        ("MISTRAL_NB_RETRY_DEADLINE",),
        minimum=0,
    ),
    Setting("cloudflare_account_id", "text", "Cloudflare account id.", None, ("CLOUDFLARE_ACCOUNT_ID",)),
    Setting(
        "cloudflare_api_token",
        "secret",
        "Cloudflare API token with the Workers AI permission.",
        None,
        ("CLOUDFLARE_API_TOKEN", "CLOUDFLARE_AUTH_TOKEN"),
    ),
    Setting(
        "cloudflare_base_url",
        "url",
        "Where the Workers AI API is.",
        CLOUDFLARE_URL,
        ("MISTRAL_NB_CLOUDFLARE_BASE_URL",),
    ),
    Setting(
        "cloudflare_trust_base_url",
        "bool",
        "Send the token to a cloudflare_base_url that is not Cloudflare's own.",
        False,
        ("MISTRAL_NB_CLOUDFLARE_TRUST_BASE_URL",),
    ),
    Setting(
        "cloudflare_fallback_model",
        "text",
        "The model to ask once when Cloudflare has withdrawn the one that was asked for; empty for none.",
        FALLBACK_MODEL,
        ("MISTRAL_NB_CLOUDFLARE_FALLBACK_MODEL",),
        may_be_empty=True,
    ),
    Setting(
        "openai_base_url",
        "url",
        "Where an OpenAI-compatible server is, with its version: https://host:port/v1.",
        None,
        ("MISTRAL_NB_OPENAI_BASE_URL",),
    ),
    Setting(
        "openai_api_key",
        "secret",
        "The key of the OpenAI-compatible server, where it wants one.",
        None,
        ("MISTRAL_NB_OPENAI_API_KEY",),
    ),
    Setting(
        "server_token",
        "secret",
        "The token of a `mistral-nb serve`: which it asks for, and which is sent to one on another machine.",
        None,
        ("MISTRAL_NB_SERVER_TOKEN",),
    ),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, checked. `sources` tells for each one that was set where it was set. Times are in seconds."""

    backend: str = "auto"
    model: str | None = None
    device: AskedDevice = "auto"
    precision: AskedPrecision = "auto"
    context: int | None = None
    lora_rank: int | None = None
    idle_timeout: float = 1800.0
    connect_timeout: float = 10.0
    first_token_timeout: float = 300.0
    stall_timeout: float = 60.0
    retry_deadline: float = 30.0
    cloudflare_account_id: str | None = None
    cloudflare_api_token: Secret | None = None
    cloudflare_base_url: str = CLOUDFLARE_URL
    cloudflare_trust_base_url: bool = False
    cloudflare_fallback_model: str = FALLBACK_MODEL
    openai_base_url: str | None = None
    openai_api_key: Secret | None = None
    server_token: Secret | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def source(self, name: str) -> str:
        """Where a setting was set, such as `MISTRAL_NB_BACKEND`; `the default` where it was not."""
        return self.sources.get(name, "the default")


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """The configuration file, which need not exist."""
    named = (os.environ if environ is None else environ).get("MISTRAL_NB_CONFIG")
    if named:
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_config_path("mistral-nb", appauthor=False)) / "config.toml"


def load_settings(
    overrides: Mapping[str, Any] | None = None,
    *,
    source: str = "%config Mistral",
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings in force. `overrides` come before the environment and the file; None and "" in it mean unset ("" is
    a value where the setting may be empty).

    Raises `ConfigurationError` naming the setting, its source, its value and what is allowed.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    path = config_path(environ)
    layers = (_from_mapping(overrides or {}, source), _from_environment(environ), _from_file(path))
    for layer in layers:
        for name, value, origin in layer:
            given = value is not None and (value != "" or _BY_NAME[name].may_be_empty)
            if given and name not in values:
                values[name] = _checked(_BY_NAME[name], value, origin)
                sources[name] = origin
    return Settings(**values, sources=sources)


def environment_without_secrets() -> dict[str, str]:
    """This process's environment for a child that needs no account: without the variables that hold tokens."""
    secrets = {variable for setting in SETTINGS if setting.kind == "secret" for variable in setting.variables}
    return {name: value for name, value in os.environ.items() if name not in secrets}


def environment_with_packages() -> dict[str, str]:
    """The same for a child that runs a package of ours.

    A source root that is no site-packages folder was put on the path by hand, so the child is told of it.
    """
    env = environment_without_secrets()
    roots = [env.get("PYTHONPATH", "")]
    for package in ("mistral_nb_kernels", "mistral_nb"):
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if root and root.name not in ("site-packages", "dist-packages"):
            roots.insert(0, str(root))
    env["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)
    return env


_Layer = Iterable[tuple[str, Any, str]]


def _from_mapping(values: Mapping[str, Any], source: str) -> _Layer:
    for name, value in values.items():
        if name not in _BY_NAME:
            raise _unknown(name, source)
        yield name, value, f"{source}.{name}"


def _from_environment(environ: Mapping[str, str]) -> _Layer:
    for setting in SETTINGS:
        for variable in setting.variables:
            value = environ.get(variable)
            yield setting.name, value if value is None else value.strip(), variable


def _from_file(path: Path) -> _Layer:
    for name, value in _read_file(path).items():
        if name not in _BY_NAME:
            raise _unknown(name, str(path))
        yield name, value, f"{name} in {path}"


def _read_file(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = str(error)
    raise ConfigurationError(f"{path} cannot be read: {problem}. Correct it, or set MISTRAL_NB_CONFIG to another file")


def _unknown(name: str, source: str) -> ConfigurationError:
    if name in _FOLDERS:
        return ConfigurationError(f"{name} cannot be set in {source}: set the environment variable {_FOLDERS[name]}")
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    wanted = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(_BY_NAME)}"
    return ConfigurationError(f"{name!r} in {source} is not a setting; {wanted}")


def _checked(setting: Setting, value: Any, origin: str) -> Any:
    match setting.kind:
        case "backend":
            return check_backend(value, origin)
        case "device":
            return _choice(value, origin, "device", DEVICES)
        case "precision":
            return _choice(value, origin, "precision", PRECISIONS)
        case "tokens":
            return _whole(setting, value, origin, "of tokens ")
        case "rank":
            return _whole(setting, value, origin)
        case "bool":
            return _switch(value, origin)
        case "seconds":
            return _seconds(setting, value, origin)
        case "secret":
            return _secret(value, origin)
    if not isinstance(value, str):
        raise ConfigurationError(f"{origin} = {value!r}: must be a text")
    return value.strip().rstrip("/") if setting.kind == "url" else value.strip()


def _secret(value: Any, origin: str) -> Secret:
    """A token as HTTP can carry it. The message of a failure does not show it."""
    text = value.reveal() if isinstance(value, Secret) else value
    if not isinstance(text, str) or not re.fullmatch(r"[!-~]+", text.strip()):
        raise ConfigurationError(f"{origin}: a token is one word of ASCII letters, digits and signs; copy it again")
    return Secret(text.strip())


def check_backend(name: Any, origin: str) -> str:
    """`name` if it is a backend's or an address, else `ConfigurationError` listing them."""
    if isinstance(name, str) and re.match(r"https?://", name):
        return name.rstrip("/")
    return _choice(name, origin, "backend", BACKENDS)


def _choice(name: Any, origin: str, what: str, choices: Sequence[str]) -> str:
    if name in choices:
        return str(name)
    near = difflib.get_close_matches(str(name).lower(), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigurationError(f"{origin} = {name!r}: no such {what}. {hint}There are {', '.join(choices)}")


def _whole(setting: Setting, value: Any, origin: str, of: str = "") -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = value if whole else int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else 0
    if not setting.minimum <= number <= setting.maximum:
        raise ConfigurationError(
            f"{origin} = {value!r}: must be a whole number {of}from {setting.minimum:g} to {int(setting.maximum)}"
        )
    return int(number)


def _switch(value: Any, origin: str) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if word in (True, "1", "true", "yes", "on"):
        return True
    if word in (False, "0", "false", "no", "off"):
        return False
    raise ConfigurationError(f"{origin} = {value!r}: must be true or false")


def _seconds(setting: Setting, value: Any, origin: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not setting.minimum <= number <= setting.maximum:
        raise ConfigurationError(
            f"{origin} = {value!r}: must be seconds from {setting.minimum:g} to {setting.maximum:g}"
        )
    return number
