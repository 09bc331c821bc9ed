"""A model of the Hugging Face hub, or of a mirror that HF_ENDPOINT names: the files of its checkpoint, each checked.

The package huggingface_hub finds the token, names the addresses and reads the listing. It fetches nothing: its
downloads start again in each process, and its requests write into the user's HF_HOME.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote, urlsplit

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.untrusted import AGAIN
from mistral_nb.errors import ConfigurationError, MissingDependency, ModelError, PullError
from mistral_nb.foreign import clean
from mistral_nb.models.download import Downloader, Meter, RemoteFile
from mistral_nb.models.hub_failures import LISTING, Hub
from mistral_nb.models.hub_listing import Choice, Listing, choose, read_listing, shards
from mistral_nb.models.manifest import MANIFEST
from mistral_nb.models.staging import Fetched, Staging
from mistral_nb.progress import Report
from mistral_nb.secret import Secret

__all__ = ["HubSource", "endpoint_of_environment"]

_ENDPOINT = "https://huggingface.co"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_LONGEST_LISTING = 64_000_000
_FIRST = 65_536
"""Bytes of a weight file that are read for its header: that of a shard is smaller, as a rule."""
_LONGEST_HEADER = 16_000_000
"""A longer one is not read: such a file is refused by its length."""


class HubSource:
    """`hub_id` at `revision`, a branch, tag or commit (None: main), which gets `name` in the store."""

    def __init__(self, name: str, hub_id: str, revision: str | None) -> None:
        self.name = name
        self._hub_id = hub_id
        self._revision = revision

    def identity(self) -> dict[str, Any]:
        """Without the revision: a file that two of them have in common is fetched once."""
        return {"hub": self._hub_id}

    def check(self, report: Report) -> None:
        """By the listing and the configuration."""
        with self._asked(report) as (downloader, listing):
            config = choose(listing).config
            with TemporaryDirectory() as made:
                folder = Path(made)
                (folder / config.name).write_bytes(downloader.read(config.url, config.name, config.size))
                with _named(listing.hub_id, folder):
                    ModelArgs.from_folder(folder)

    def fetch(self, staging: Staging, report: Report) -> Fetched:
        """Small files first, so that a model that cannot be run is refused before its weights are fetched.

        The listing pins the commit. Files that an earlier pull left are taken if they have the sums of this listing.
        """
        with self._asked(report) as (downloader, listing):
            files = _fetch_all(downloader, staging, listing)
        return Fetched(
            {"hub": self._hub_id, "revision": self._revision or "main", "commit": listing.commit},
            listing.licence,
            {file.name: file.sum for file in files if not file.git},
        )

    @contextmanager
    def _asked(self, report: Report) -> Iterator[tuple[Downloader, Listing]]:
        """What the files are fetched with, and the listing that the hub has sent."""
        hub = self._hub()
        meter = Meter(report)
        meter.step(f"Asking {hub.host}")
        with closing(Downloader(hub, meter, _user_agent())) as downloader:
            yield downloader, _list(downloader, hub)

    def _hub(self) -> Hub:
        """The hub as the environment sets it, read now: huggingface_hub reads it when it is imported."""
        try:
            from huggingface_hub import hf_hub_url
        except ImportError as error:
            raise MissingDependency(
                'a model of the hub needs the package huggingface_hub; run: pip install "mistral-nb[local]"'
            ) from error
        endpoint = endpoint_of_environment()
        try:
            hf_hub_url(self._hub_id, "config.json")
        except ValueError as error:
            raise PullError(f"{self._hub_id} is no id of the hub ({clean(error)}); check its name") from error
        hub = Hub(endpoint, self._hub_id, self._revision, self.name)
        forbidden = next((name for name in _OFFLINE if _is_on(name)), None)
        if forbidden:
            raise hub.offline(forbidden)
        return replace(hub, token=_token())


def endpoint_of_environment() -> str:
    """In the spelling that the HTTP client gives the addresses of answers: lower case, no port that is the usual."""
    import httpx

    named = os.environ.get("HF_ENDPOINT")
    if not named:
        return _ENDPOINT
    shown = f"[login]@{named.rpartition('@')[2]}" if "@" in named else named
    with suppress(ValueError, httpx.InvalidURL):
        parts = urlsplit(named)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.path:
            return str(httpx.URL(parts.geturl())).rstrip("/")
    raise ConfigurationError(f"HF_ENDPOINT is {clean(shown)!r}; set it to an address such as {_ENDPOINT}, or unset it")


def _token() -> Secret | None:
    from huggingface_hub import get_token

    if _is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    try:
        token = get_token()
    except Exception as error:  # a token may come from a file, a keyless login or a notebook's host, each with its own
        raise PullError(
            f"the hub's token cannot be read ({clean(error)}); run `hf auth login` or set HF_TOKEN"
        ) from error
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise PullError("the hub's token holds characters that no token has; run `hf auth login` or set HF_TOKEN again")
    return Secret(token) if token else None


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def _user_agent() -> str:
    from mistral_nb import __version__

    return f"mistral-nb/{__version__}"


def _list(downloader: Downloader, hub: Hub) -> Listing:
    from huggingface_hub import hf_hub_url

    revision = f"/revision/{quote(hub.revision, safe='')}" if hub.revision else ""
    address = f"{hub.endpoint}/api/models/{quote(hub.hub_id)}{revision}?blobs=true"
    answer = downloader.read(address, LISTING, _LONGEST_LISTING)
    try:
        return read_listing(
            answer,
            hub.hub_id,
            lambda name, commit: hf_hub_url(hub.hub_id, name, revision=commit, endpoint=hub.endpoint),
        )
    except ValueError as error:
        raise PullError(
            f"{hub.host} answers with something that is no listing of {hub.hub_id} ({hub.clean(error)}): a network "
            f"that wants a login first does that, and a wrong HF_ENDPOINT; open {hub.site} in a browser, and pull again"
        ) from error


def _fetch_all(downloader: Downloader, staging: Staging, listing: Listing) -> tuple[RemoteFile, ...]:
    """The checkpoint's files. `ModelError` for what this engine cannot run; what another commit left then stays."""
    choice = choose(listing)
    small = choice.before_weights
    brought: list[RemoteFile] = []
    try:
        weights = _fetch_small(downloader, staging, listing, choice, brought)
    except PullError:
        raise
    except ModelError:  # it would not get better
        for file in brought if _others(small, staging) else small:
            for path in _places(file, staging):
                path.unlink(missing_ok=True)
        raise
    for path in _others((*small, *weights), staging):
        path.unlink()
    for file in weights:
        downloader.fetch(file, staging)
    return (*small, *weights)


def _fetch_small(
    downloader: Downloader,
    staging: Staging,
    listing: Listing,
    choice: Choice,
    brought: list[RemoteFile],
) -> tuple[RemoteFile, ...]:
    """Fetch the small files, in the order of what may refuse the checkpoint: the configuration, the index, the rest.

    The weights by what those and the headers tell. `brought` gets the files that were not there before.
    """
    (staging.checkpoint / MANIFEST).unlink(missing_ok=True)
    small = choice.before_weights
    downloader.meter.total = sum(file.size for file in (*small, *choice.weights))
    staging.need(_missing(small, staging))
    for file in small:
        if downloader.fetch(file, staging):
            brought.append(file)
        if file is choice.config:
            with _named(listing.hub_id, staging.checkpoint):
                ModelArgs.from_file(staging.checkpoint / file.name)
    weights = choice.weights
    if choice.index:
        with _named(listing.hub_id, staging.checkpoint):
            weights = shards(listing, staging.checkpoint / choice.index.name)
    files = (*small, *weights)
    downloader.meter.total = sum(file.size for file in files)
    staging.need(_missing(weights, staging) - sum(path.stat().st_size for path in _others(files, staging)))
    _check_before(downloader, staging, listing.hub_id, small, weights)
    return weights


def _check_before(
    downloader: Downloader,
    staging: Staging,
    hub_id: str,
    small: Iterable[RemoteFile],
    weights: Iterable[RemoteFile],
) -> None:
    """Describe the checkpoint as it will be, from the small files and the headers alone.

    Files with holes stand for the weights. Where the disk has neither those nor the room, only the check of the whole
    checkpoint remains.
    """
    from mistral_nb.checkpoints import describe

    folder = staging.work / "headers"
    folder.mkdir()
    try:
        for file in small:
            shutil.copyfile(staging.checkpoint / file.name, folder / file.name)
        for file in weights:
            begin = _header(downloader, file)
            with (folder / file.name).open("wb") as stand_in:
                stand_in.write(begin)
                try:
                    stand_in.truncate(file.size)
                except OSError:
                    return
            os.utime(folder / file.name, (0, 0))  # a fresh one might be taken for one that is still being written
        with _named(hub_id, folder):
            describe(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _header(downloader: Downloader, file: RemoteFile) -> bytes:
    """The beginning of a weight file with all of its header, if it has one."""
    if not file.size:
        return b""
    begin = downloader.head(file, min(_FIRST, file.size))
    end = 8 + int.from_bytes(begin[:8], "little")
    if begin[8:9] == b"{" and len(begin) < end <= min(_LONGEST_HEADER, file.size):
        return downloader.head(file, end)
    return begin


@contextmanager
def _named(hub_id: str, folder: Path) -> Iterator[None]:
    """What is refused is the repository, not a folder that nobody knows; what the disk refuses is an `OSError`."""
    try:
        yield
    except PullError:
        raise
    except ModelError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        told = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), hub_id)
        told = told.replace(AGAIN, "choose another model or revision")
        raise ModelError(f"{hub_id} cannot be run, so its weights are not fetched: {told}") from error


def _missing(files: Iterable[RemoteFile], staging: Staging) -> int:
    """Bytes that are still to be fetched."""
    missing = 0
    for file in files:
        here = [path.stat().st_size for path in _places(file, staging) if path.is_file()]
        missing += max(0, file.size - max(here, default=0))
    return missing


def _others(files: Iterable[RemoteFile], staging: Staging) -> list[Path]:
    """What is there of other files, which another commit left."""
    own = {path for file in files for path in _places(file, staging)}
    return [path for path in (*staging.checkpoint.iterdir(), *staging.work.iterdir()) if path not in own]


def _places(file: RemoteFile, staging: Staging) -> tuple[Path, Path]:
    return staging.checkpoint / file.name, staging.work / file.part_name
