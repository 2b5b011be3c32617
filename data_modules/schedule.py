"""Which data set iteration i trains on, as a pure function of i."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping

from lit_matting.checks import InputError

logger = logging.getLogger(__name__)

_MAX_PERIOD = 1_000_000
_MAX_WEIGHT = 1000


class InterleavedSchedule:
    """The order in which data sets take their turns, one data set per optimizer step.

    Why a pure function: every rank and every worker computes it for itself and agrees without a word, and a resumed run
    needs nothing but the iteration. The paper's default is `R C R C S`: RefMatte and RefCOCO in turn, and after every
    four iterations one on P3M-10k, AM-2k or RM-1k, in rotation.

    Args:
        cycle: Data sets that take turns; name one twice to give it two turns of each round.
        insert_every: After this many iterations of the cycle, one iteration is inserted; 0 inserts none.
        insert: Data sets that take turns at the inserted iterations; empty inserts none.
        weights: Turns per round of a data set, instead of 1, in the cycle and among the inserted: `{p3m10k: 3}` gives
            it three turns where others get one, spread evenly.

    Example:
        >>> schedule = InterleavedSchedule()
        >>> [schedule.dataset(i) for i in range(10)]
        ['refmatte', 'refcoco', 'refmatte', 'refcoco', 'p3m10k', 'refmatte', 'refcoco', 'refmatte', 'refcoco', 'am2k']
    """

    def __init__(
        self,
        cycle: list[str] | None = None,
        insert_every: int = 4,
        insert: list[str] | None = None,
        weights: dict[str, int] | None = None,
    ) -> None:
        paper = cycle is None
        self.cycle = ["refmatte", "refcoco"] if cycle is None else list(cycle)
        self.insert = list(insert if insert is not None else (["p3m10k", "am2k", "rm1k"] if paper else []))
        self.weights = dict(weights or {})
        self.insert_every = insert_every
        if not self.cycle:
            raise InputError("`data.schedule.cycle` is empty; name at least one data set.")
        if insert_every < 0:
            raise InputError(f"`data.schedule.insert_every` must be 0 or more, got {insert_every}.")
        unknown = sorted(set(self.weights) - {*self.cycle, *self.insert})
        if unknown or not all(1 <= weight <= _MAX_WEIGHT for weight in self.weights.values()):
            rule = f"every weight must lie in [1, {_MAX_WEIGHT}], got {self.weights}"
            what = f"{unknown[0]!r} is not in the schedule" if unknown else rule
            raise InputError(f"`data.schedule.weights`: {what}; leave a data set out of `cycle` to switch it off.")
        self._period = self._write_out()
        self._turns: dict[str, list[int]] = {}
        for position, dataset in enumerate(self._period):
            self._turns.setdefault(dataset, []).append(position)

    def _write_out(self) -> list[str]:
        cycle = _spread(self.cycle, self.weights)
        insert = _spread(self.insert, self.weights)
        if not insert or not self.insert_every:
            return cycle
        # after this many blocks of `insert_every + 1` both rotations are back where they began
        blocks = math.lcm(len(cycle) // math.gcd(len(cycle), self.insert_every), len(insert))
        length = blocks * (self.insert_every + 1)
        if length > _MAX_PERIOD:
            raise InputError(f"`data.schedule` repeats only after {length} iterations; use smaller weights.")
        period: list[str] = []
        for block in range(blocks):
            period += [cycle[(block * self.insert_every + step) % len(cycle)] for step in range(self.insert_every)]
            period.append(insert[block % len(insert)])
        return period

    @property
    def datasets(self) -> tuple[str, ...]:
        """Every data set that gets a turn, in order of its first."""
        return tuple(self._turns)

    @property
    def period(self) -> int:
        """Number of iterations after which the schedule repeats."""
        return len(self._period)

    def dataset(self, iteration: int) -> str:
        """Return the data set of an iteration (counted from 0)."""
        return self._period[iteration % len(self._period)]

    def visits(self, dataset: str, iteration: int) -> int:
        """Return how many iterations before ``iteration`` were the data set's, in closed form.

        Example:
            >>> InterleavedSchedule().visits("refmatte", 6)
            3
        """
        turns = self._turns.get(dataset, [])
        rounds, position = divmod(iteration, len(self._period))
        return rounds * len(turns) + bisect_left(turns, position)

    def shares(self) -> dict[str, float]:
        """Return the fraction of iterations each data set gets."""
        return {dataset: len(turns) / len(self._period) for dataset, turns in self._turns.items()}

    def restricted(self, available: Iterable[str]) -> InterleavedSchedule:
        """Return the schedule without the data sets that are not available, and warn how the shares change.

        Raises:
            InputError: If none is left.
        """
        available = set(available)
        missing = [dataset for dataset in self.datasets if dataset not in available]
        if not missing:
            return self
        cycle = [dataset for dataset in self.cycle if dataset in available]
        insert = [dataset for dataset in self.insert if dataset in available]
        if not cycle and not insert:
            raise InputError(
                f"none of the schedule's data sets ({', '.join(self.datasets)}) is in `data.train`"
                f" ({', '.join(sorted(available)) or 'empty'}); name the same data sets in both."
            )
        kept = {dataset: weight for dataset, weight in self.weights.items() if dataset in available}
        if not cycle:
            cycle, insert = insert, []
        left = InterleavedSchedule(cycle, self.insert_every, insert, kept)
        logger.warning(
            "The schedule goes on without %s; shares of the iterations: %s.",
            ", ".join(missing),
            _changes(self.shares(), left.shares()),
        )
        return left


def _changes(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%} -> {after.get(name, 0.0):.1%}" for name, share in before.items())


def _spread(names: list[str], weights: Mapping[str, int]) -> list[str]:
    """Write weighted turns out as evenly as they go (smooth weighted round robin); weights of 1 keep the order."""
    turns = [weights.get(name, 1) for name in names]
    credit = [0] * len(names)
    written: list[str] = []
    for _ in range(sum(turns)):
        credit = [have + turn for have, turn in zip(credit, turns)]
        chosen = max(range(len(names)), key=lambda number: (credit[number], -number))
        credit[chosen] -= sum(turns)
        written.append(names[chosen])
    return written
