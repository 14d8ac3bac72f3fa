"""A loss signal freed of the timesteps drawn, going further than the paper: t moves the loss more than difficulty does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BucketMeans:
    """Per timestep bucket: the raw exponential mean of the per-sample loss, and how many steps had a sample there."""

    means: tuple[float, ...]
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists of numbers, exact."""
        return {"means": list(self.means), "counts": list(self.counts)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BucketMeans:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: lists of unequal length, or a mean that is not finite.
        """
        means, counts = tuple(map(float, values["means"])), tuple(map(int, values["counts"]))
        if len(means) != len(counts) or not all(map(math.isfinite, means)):
            raise ValueError(f"bucket means must be finite and as many as their counts, got {dict(values)}")
        return cls(means, counts)


class TimestepNormaliser:
    """Signal = mean over samples of (loss / mean loss of its timestep bucket) × mean of the bucket means.

    The first factor says how the samples did for the timesteps they drew, the second how training stands over all timesteps.

    Args:
        buckets: equal ranges of t.
        diffusion_steps: t is in 0..diffusion_steps - 1.
        horizon: of the exponential means, in steps that drew the bucket.

    Raises:
        ValueError: buckets not in 1..diffusion_steps, or a horizon below 1.
    """

    def __init__(self, buckets: int, diffusion_steps: int, horizon: int) -> None:
        if not 1 <= buckets <= diffusion_steps:
            raise ValueError(f"timestep buckets must be in 1..{diffusion_steps}, got {buckets}")
        if horizon < 1:
            raise ValueError(f"the horizon of the bucket means must be at least 1, got {horizon}")
        self.buckets = buckets
        self.diffusion_steps = diffusion_steps
        self.horizon = horizon

    def initial(self) -> BucketMeans:
        """Before the first step."""
        return BucketMeans((0.0,) * self.buckets, (0,) * self.buckets)

    def update(self, state: BucketMeans, losses: Sequence[float], timesteps: Sequence[int]) -> tuple[BucketMeans, float]:
        """The means after one more applied step, and its signal. The order of the samples does not matter.

        Args:
            losses: of every sample of the global batch, finite and positive.
            timesteps: the t each of them drew.

        Raises:
            ValueError: no samples, unequal numbers of them, a loss that is not finite and positive, or an impossible t.
        """
        if not losses or len(losses) != len(timesteps):
            raise ValueError(f"need one timestep per sample loss, got {len(losses)} losses and {len(timesteps)} timesteps")
        if not all(math.isfinite(loss) and loss > 0 for loss in losses):
            raise ValueError("the curriculum needs finite, positive sample losses")
        if not all(0 <= timestep < self.diffusion_steps for timestep in timesteps):
            raise ValueError(f"timesteps must be in 0..{self.diffusion_steps - 1}, got {list(timesteps)}")
        drawn = [timestep * self.buckets // self.diffusion_steps for timestep in timesteps]
        keep = 1 - 1 / self.horizon
        means, counts = list(state.means), list(state.counts)
        for bucket in sorted(set(drawn)):
            own = [loss for loss, where in zip(losses, drawn, strict=True) if where == bucket]
            means[bucket] = keep * means[bucket] + (1 - keep) * math.fsum(own) / len(own)
            counts[bucket] += 1
        unbiased = [mean / (1 - keep**count) if count else 0.0 for mean, count in zip(means, counts, strict=True)]
        # fsum is exact, so ranks may hand the samples over in any order.
        relative = math.fsum(loss / unbiased[bucket] for loss, bucket in zip(losses, drawn, strict=True)) / len(losses)
        overall = math.fsum(unbiased) / sum(count > 0 for count in counts)
        return BucketMeans(tuple(means), tuple(counts)), relative * overall
