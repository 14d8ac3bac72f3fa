"""What of a validation fits into its share of the time: arithmetic alone. Rank 0 computes it for all, see `validation.py`.

A share p of all time is p / (1 − p) of the time of training. What validations took so far is taken off; what is left may be spent now.
Costs are those measured last, so a validation goes past the bound by what its estimates were off, and the next ones make up for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Costs:
    """Seconds of each unit of a validation, on the slowest rank, when it was last carried out; None: it never was.

    Attributes:
        overhead: What belongs to none of the others: the mean weights put in and out, pictures written.
        losses: All held-out losses.
        clips: One round of clips: one on every rank, made whole.
        fvd: One measurement of FVD.
        preparing: Encoding the clips of the losses, once in each start of a run.
    """

    overhead: float | None = None
    losses: float | None = None
    clips: float | None = None
    fvd: float | None = None
    preparing: float | None = None

    def measured(self, **seconds: float | None) -> Costs:
        """With these instead; None leaves what was known."""
        return replace(self, **{name: value for name, value in seconds.items() if value is not None})

    def to_json(self) -> dict[str, float | None]:
        """Seconds by name, null for what was never carried out."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, float | None]) -> Costs:
        """Undo `to_json`; what the row lacks was never carried out, what only it knows is passed over."""
        return cls(**{name: row.get(name) for name in asdict(cls())})


class Fit(NamedTuple):
    """What is carried out now; ``fvd_trial``: one clip of FVD on every rank, to see what all of them cost."""

    losses: bool
    rounds: int
    fvd: bool
    fvd_trial: bool = False


def allowance(max_share: float, trained_s: float, validated_s: float) -> float:
    """Seconds that validation may take now, so that it has at most ``max_share`` of all time; infinite for a share of 1.

    Args:
        trained_s: Of all training steps so far.
        validated_s: Of all validations so far.
    """
    if max_share >= 1:
        return math.inf
    return max_share * trained_s / (1 - max_share) - validated_s


def share(trained_s: float, validated_s: float) -> float:
    """Validation's part of the time; 0 before there is any."""
    total = trained_s + validated_s
    return validated_s / total if total > 0 else 0.0


def fit(left: float, costs: Costs, losses: bool, rounds: int, fvd: bool) -> Fit:
    """What of the wanted units fits into ``left`` seconds: the losses first, then rounds of clips, then FVD.

    While the losses do not fit, nothing else is carried out: it would use up what they wait for. A unit whose cost nobody knows is carried
    out once, if anything is left at all, a single round of clips at most. Of FVD, which may cost hours, that is one clip on every rank,
    unless a round of clips tells as much, or there is no bound.
    """
    nothing = Fit(False, 0, False)
    left -= costs.overhead or 0.0
    if losses:
        if not _fits(costs.losses, left):
            return nothing
        left -= costs.losses or 0.0
    if rounds:
        if costs.clips is None:
            rounds = int(left > 0)
        elif costs.clips * rounds > left:
            rounds = max(0, int(left // costs.clips))
        left -= rounds * (costs.clips or 0.0)
    if fvd and costs.fvd is None and left < math.inf:
        return Fit(losses, rounds, False, fvd_trial=left > 0 and not rounds)
    return Fit(losses, rounds, fvd and _fits(costs.fvd, left))


def _fits(cost: float | None, left: float) -> bool:
    return left > 0 if cost is None else cost <= left
