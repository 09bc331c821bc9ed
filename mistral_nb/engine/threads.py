"""How many threads a step takes on the CPU: few or many, whichever is quicker now.

A layer waits for all of its threads four times, so other processes that want their cores hold it up. On 2 cores a token
took 7 ms with two threads and 9 ms with one; with three busy processes on one of the cores 1.2 s and 11 ms. Who else
wants a core, such as the notebook that shows the text, comes and goes. So it is measured, on the steps themselves.
"""

from __future__ import annotations

import math
import statistics

__all__ = ["DecodeThreads", "PromptThreads"]

WINDOW = 5
"""Steps of which the median counts: a lone one is held up now and then whatever the number."""
SOONEST, LATEST = 8, 512
"""Windows until the other number is tried again: at first, and after it has lost again and again."""
SLOWER = 1.25
"""How much slower than the other number ever was makes it be tried at once."""
LOST = 2
"""So many steps of a trial that are slower than the other number's end it: of eight sequences one takes half as long
again on one core.
"""
HELD_UP = 3
"""How much slower than usual a step is that waits for others: the first one ends a trial, two in a row begin one."""


class PromptThreads:
    """Of one chunk of a prompt: many for its first layer, few for the second, then many until a layer of theirs is
    slower than that of few was.

    `before_layer` gets the time, in seconds, and gives the number of threads.
    """

    def __init__(self, few: int, most: int) -> None:
        self._counts = most, few
        self._times: list[float] = []
        self._lost = False

    def before_layer(self, now: float) -> int:
        layer = len(self._times)
        self._times.append(now)
        if layer < 2:
            return self._counts[layer]
        first, second, third = self._times[:3]
        many = second - first if layer == 2 else now - self._times[-2]
        self._lost = self._lost or many > SLOWER * (third - second)
        return self._counts[self._lost]


class DecodeThreads:
    """For steps of one number of sequences: `count` is for the next one, and `took` is told how long it was. What is
    left of a step after `limit` seconds is to take `few`.
    """

    def __init__(self, few: int, most: int) -> None:
        self.few = few
        self._counts = few, most
        self._now = 0
        self._trying = False
        self._times = [math.inf, math.inf]
        self._window: list[float] = []
        self._held_up = 0
        self._patience, self._left = SOONEST, 1

    @property
    def count(self) -> int:
        return self._counts[self._now]

    @property
    def limit(self) -> float:
        return HELD_UP * self._times[0]

    def took(self, seconds: float) -> None:
        if len(set(self._counts)) == 1:
            return
        self._held_up = self._held_up + 1 if seconds > HELD_UP * min(self._times) else 0
        if self._held_up and self._trying:
            self._end_trial(won=False)
            return
        if self._held_up == 2:
            self._times[self._now] = seconds
            self._begin_trial()
            return
        self._window.append(seconds)
        other = self._times[1 - self._now]
        lost = self._trying and sum(step > other for step in self._window) == LOST
        if len(self._window) < WINDOW and not lost:
            return
        mine = self._times[self._now] = statistics.median(self._window)
        self._window.clear()
        if self._trying:
            self._end_trial(won=not lost and mine < other)
            return
        self._left -= 1
        if self._left <= 0 or mine > SLOWER * other:
            self._begin_trial()

    def _begin_trial(self) -> None:
        self._now, self._trying, self._held_up = 1 - self._now, True, 0
        self._window.clear()

    def _end_trial(self, won: bool) -> None:
        self._trying, self._held_up = False, 0
        self._window.clear()
        self._patience = SOONEST if won else min(2 * self._patience, LATEST)
        self._left = self._patience
        if not won:
            self._now = 1 - self._now
