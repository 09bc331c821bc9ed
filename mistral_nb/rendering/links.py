"""Which targets a link may have, and what is said beside one whose text names another address."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from mistral_nb.safe_markdown import SCHEMES

__all__ = ["MAX_LINK", "allowed", "bare_links", "other_host"]

MAX_LINK = 2_000  # characters

_SCHEME = re.compile(r"([a-z]+):(//)?[^\s/\\?#\x00-\x20]", re.IGNORECASE)
_BARE = re.compile(r"""(?<!\]\()\bhttps?://[^\s<>"'`|\\^{}\[\]]{3,300}""", re.IGNORECASE)
# `os.path` and `README.md` are no addresses, though .path and .md are names at the top of the net.
_NAMED = re.compile(
    r"(?:https?://(?:[^\s/@]*@)?|(?=www\.)|(?=\S+\.(?:com|org|net|edu|gov|info|io|ai|dev|app|bank|example|eu|uk|de)(?![\w.-])))"
    r"([\w-]+(?:\.[\w-]+)+)",
    re.IGNORECASE,
)


def allowed(target: str) -> bool:
    """Whether a link may lead there: an absolute address of an allowed scheme, without a user's name in it."""
    match = _SCHEME.match(target)
    if not match or match[1].lower() not in SCHEMES or len(target) > MAX_LINK:
        return False
    if match[1].lower() == "mailto":
        return not match[2]
    try:
        parts = urlsplit(target)
    except ValueError:
        return False
    return bool(match[2] and parts.hostname) and "@" not in parts.netloc and "\\" not in target


def bare_links(text: str) -> list[tuple[int, int]]:
    """Where in a text addresses stand that may be links, without the sentence's signs after them."""
    found = []
    for match in _BARE.finditer(text):
        address = match[0].rstrip(".,;:!?*_~'\"")
        while address.endswith(")") and address.count(")") > address.count("("):
            address = address[:-1].rstrip(".,;:!?")
        if address.isascii() and allowed(address):
            found.append((match.start(), match.start() + len(address)))
    return found


def other_host(text: str, target: str) -> str:
    """The host that a link leads to where its text reads like the address of another one, else ""."""
    named = _NAMED.match(text.strip())
    host = (urlsplit(target).hostname or "") if "://" in target else target.rpartition("@")[2].partition("?")[0]
    if not named or not host or named[1].lower().removeprefix("www.") == host.lower().removeprefix("www."):
        return ""
    return host
