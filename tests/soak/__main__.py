"""Many at once, for minutes: requests of mixed length and adapters, which join, leave and are cancelled at random.

Each answer has to be what the same request gets alone, every page and slot has to come back, and memory may not grow.

    python -m tests.soak --seconds 180 --seeds 5
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.soak.asking import Kind, kinds_of
from tests.soak.engines import Pausing, embedded, reserves
from tests.soak.memory import Memory
from tests.soak.rounds import AT_ONCE, Soak

KINDS = 16
LONGEST = 400


def soak(folder: Path, seconds: float, first: int, seeds: int) -> str:
    """Round after round until each seed's time is over, at least one of each engine; what was seen."""
    seen: Counter[str] = Counter()
    began = time.monotonic()
    with embedded(folder) as (engines, tokenizer, adapters):
        memory = Memory(lambda: reserves(engines))
        memory.start()
        for number in range(seeds):
            seed = first + number
            kinds = kinds_of(seed, KINDS, engines[0].info.vocab_size, adapters, LONGEST, engines[0]._runner.chunk)
            alone: dict[Kind, list[int]] = {}
            soaks = [Soak(engine, kinds, tokenizer.stream, seed, alone) for engine in engines]
            while not soaks[0].seen["rounds"] or time.monotonic() - began < seconds * (number + 1):
                for one in soaks:
                    one.round()
                memory.all_ran()
                told = f"{soaks[0].seen['rounds']} rounds of each engine, seed {seed}"
                print(f"{time.monotonic() - began:.0f} s: {told}", file=sys.stderr)
            seen += sum((one.seen for one in soaks), Counter())
        memory.stop()
        few = engines[1]._runner
        assert isinstance(few, Pausing)
        seen["pauses"] = few.pauses
    for what in ("whole", "stop text", "stop id", "cancelled", "reused", "pauses"):
        assert seen[what], f"nothing was seen of: {what}"
    return (
        f"{seen['rounds']} rounds of {AT_ONCE} in {time.monotonic() - began:.0f} s: {seen['whole']} whole answers, "
        f"{seen['stop text'] + seen['stop id']} stopped and {seen['cancelled']} cancelled, all as alone; "
        f"{seen['pauses']} pauses, {seen['reused']} tokens of prompts reused; all pages and slots back; "
        f"memory {memory.told()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="for each seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), asked.seconds, asked.first, asked.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
