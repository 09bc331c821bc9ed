"""What somebody else said, fit to be shown: cleaned of control characters, links, logins and tokens, and cut short."""

from __future__ import annotations

import re

from mistral_nb.secret import Secret

__all__ = ["clean", "plain", "plain_lines"]


def clean(said: object, token: Secret | None = None, limit: int = 200) -> str:
    """A foreign text on one line of `limit` characters, without links, logins, control characters and the token."""
    text = _begun(str(said), token, limit)
    text = re.sub(r"\bhf_\w+", "[token]", re.sub(r"\w{1,20}://\S+", "[link]", text))
    return _cut(" ".join(map(_without_login, _printable(text).split())), limit)


def plain(said: str, limit: int = 200) -> str:
    """A foreign name on one line of `limit` characters, without control characters."""
    return _cut(" ".join(_printable(_begun(said, None, limit)).split()), limit)


def plain_lines(said: str, token: Secret | None = None, limit: int = 4000) -> str:
    """A foreign text in its own lines, `limit` characters, without control characters and the token."""
    lines = _begun(said, token, limit).splitlines()
    return _cut("\n".join(_printable(line).rstrip() for line in lines), limit)


def _begun(said: str, token: Secret | None, limit: int) -> str:
    """As much of a text as may be shown of it. The token goes first: a part of it would not be known for one."""
    text = said.replace(token.reveal(), "[token]") if token else said
    return text.strip()[: 20 * limit]


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _without_login(word: str) -> str:
    """Without USER:PASSWORD before an @."""
    login, _, rest = word.rpartition("@")
    return f"[login]@{rest}" if ":" in login else word
