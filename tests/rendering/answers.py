"""Answers of about 8,000 tokens, made of what models write, and the pieces in which they come."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

SIGNS_PER_TOKEN = 4.4
SIZE = int(8_000 * SIGNS_PER_TOKEN)

WORDS = re.findall(
    "[a-z]+",
    "the model reads a prompt and writes one token after another while memory holds keys values from earlier steps "
    "so that attention costs little however long this context grows which means throughput depends mostly upon how "
    "many requests share weights during each forward pass through every layer of network",
)
CODE = '''import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A point in the plane; {word} and {other}."""

    x: float = {number}.5
    y: float = 0.0

    def distance(self, other: "Point") -> float:
        # The straight line between both, never negative.
        if self is other:
            return 0
        return math.hypot(self.x - other.x, self.y - other.y)


def {word}_{other}(points: list[Point], limit: int = {number}) -> dict[str, float]:
    found = {{f"{word}-{{index}}": p.distance(points[0]) for index, p in enumerate(points)}}
    return {{name: value for name, value in found.items() if value < limit and name != '{other}'}}

'''


def sentence(chance: random.Random) -> str:
    words = [chance.choice(WORDS) for _ in range(chance.randint(7, 18))]
    if chance.random() < 0.3:
        words[3] = f"**{words[3]}**"
    if chance.random() < 0.3:
        words[5] = f"`{words[5]}_{chance.randint(1, 99)}`"
    if chance.random() < 0.05:
        words[4] = f"[{words[4]}](https://example.org/{words[4]})"
    return " ".join(words).capitalize() + chance.choice("." * 8 + "?:")


def paragraph(chance: random.Random) -> str:
    return " ".join(sentence(chance) for _ in range(chance.randint(2, 6)))


def prose(chance: random.Random) -> Iterator[str]:
    while True:
        if chance.random() < 0.15:
            yield f"## {' '.join(chance.sample(WORDS, 4)).title()}"
        if chance.random() < 0.1:
            yield "Inline \\(x_i^2 < y\\) and then\n\n$$\\sum_{i=1}^{n} x_i = \\frac{n(n+1)}{2}$$"
        yield paragraph(chance)


def code(chance: random.Random) -> Iterator[str]:
    while True:
        yield sentence(chance)
        body = "".join(
            CODE.format(word=chance.choice(WORDS), other=chance.choice(WORDS), number=chance.randint(1, 99))
            for _ in range(chance.randint(1, 5))
        )
        yield f"```python\n{body.strip()}\n```"


def one_code(chance: random.Random) -> Iterator[str]:
    yield "```python"
    while True:
        yield CODE.format(word=chance.choice(WORDS), other=chance.choice(WORDS), number=chance.randint(1, 99)).strip()


def lists(chance: random.Random) -> Iterator[str]:
    while True:
        yield f"### {' '.join(chance.sample(WORDS, 3)).title()}\n\n{sentence(chance)}"
        if chance.random() < 0.5:
            items = []
            for number in range(1, chance.randint(4, 20)):
                items.append(f"{number}. **{chance.choice(WORDS)}**: {sentence(chance)}")
                items += [f"   - {sentence(chance)}" for _ in range(chance.choice((0, 0, 2)))]
            yield "\n".join(items)
        else:
            rows = [
                f"| {chance.choice(WORDS)} | `{chance.choice(WORDS)}` | {' '.join(chance.sample(WORDS, 5))} | {n} |"
                for n in range(chance.randint(4, 20))
            ]
            yield "\n".join(["| Name | Code | What it does | Count |", "|------|:-----|--------------|------:|", *rows])


def one_list(chance: random.Random) -> Iterator[str]:
    while True:
        yield "\n".join(f"- **{chance.choice(WORDS)}**: {sentence(chance)}" for _ in range(20))


def maths(chance: random.Random) -> Iterator[str]:
    for step in range(1, 1_000):
        f, a = f"f_{{{step}}}", f"\\alpha_{{{step}}}"
        yield (
            f"**Step {step}.** Let ${f}(x) = \\frac{{1}}{{2}} x^2 + {a} x$ where ${a} \\in \\mathbb{{R}}$. "
            f"{sentence(chance)} Taking the derivative with respect to $x$ gives"
        )
        yield f"$$\n{f}'(x) = x + {a}, \\qquad \\int_0^1 {f}(x)\\,dx = \\frac{{1}}{{6}} + \\frac{{{a}}}{{2}}\n$$"
        yield f"so that \\(x^* = -{a}\\) is the minimum."


KINDS = {"prose": prose, "code": code, "lists": lists, "one code": one_code, "one list": one_list, "math": maths}


def answer(kind: str, size: int = SIZE, seed: int = 0) -> str:
    """An answer of `size` characters."""
    between = "\n" if kind == "one list" else "\n\n"
    text = ""
    for part in KINDS[kind](random.Random(seed)):
        text += part + between
        if len(text) >= size:
            return text[:size]
    raise AssertionError


def pieces(text: str, seed: int = 0, tokens: float = 6) -> Iterator[str]:
    """The text as it comes at 12 Hz from a model that writes 70 tokens/s."""
    chance = random.Random(seed)
    at = 0
    while at < len(text):
        size = max(1, round(chance.gauss(tokens, 1) * SIGNS_PER_TOKEN))
        yield text[at : at + size]
        at += size
