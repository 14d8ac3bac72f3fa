"""Which passes of the network a step with two-way guidance needs, and how their answers are joined.

    ε = ε(∅,∅) + s_I·[ε(∅,I) − ε(∅,∅)] + s_T·[ε(T,I) − ε(∅,I)]
      = (1 − s_I)·ε(∅,∅) + (s_I − s_T)·ε(∅,I) + s_T·ε(T,I)

A pass whose coefficient is 0 is not made. Without visible frames I = ∅ and without a caption T = ∅; equal passes are one, with the sum of
their coefficients:

    | frames | caption | passes, in the order they are stacked      | one of them is left out where     |
    | no     | no      | ε(∅,∅)                                     |                                   |
    | no     | yes     | (1 − s_T)·ε(∅,∅) + s_T·ε(T,∅)              | s_T = 1, s_T = 0                  |
    | yes    | no      | (1 − s_I)·ε(∅,∅) + s_I·ε(∅,I)              | s_I = 1, s_I = 0                  |
    | yes    | yes     | all three                                  | s_I = 1, s_I = s_T, s_T = 0       |

So both scales 1 need one pass, and the default, 7.5 and 7.5, needs two. What a batch needs is decided for all of its clips together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Condition(NamedTuple):
    """What a pass is shown: the visible frames or none, the caption or its hidden words."""

    image: bool
    text: bool


@dataclass(frozen=True)
class Passes:
    """The passes of one call: ``conditions`` in the order they are stacked, and the coefficient of each; coefficients sum to 1."""

    conditions: tuple[Condition, ...]
    coefficients: tuple[float, ...]

    @classmethod
    def plan(cls, has_image: bool, has_text: bool, image_scale: float, text_scale: float) -> Passes:
        """The fewest passes that give the guided ε.

        Args:
            has_image, has_text: any clip of the batch has a visible frame, a caption.
            image_scale, text_scale: s_I and s_T.
        """
        nothing, image, text, both = Condition(False, False), Condition(True, False), Condition(False, True), Condition(True, True)
        if has_image and has_text:
            terms = {nothing: 1 - image_scale, image: image_scale - text_scale, both: text_scale}
        elif has_image:
            terms = {nothing: 1 - image_scale, image: image_scale}
        elif has_text:
            terms = {nothing: 1 - text_scale, text: text_scale}
        else:
            terms = {nothing: 1.0}
        needed = {condition: coefficient for condition, coefficient in terms.items() if coefficient != 0}
        return cls(tuple(needed), tuple(needed.values()))

    def __len__(self) -> int:
        """P."""
        return len(self.conditions)

    def combine(self, eps: Sequence[Tensor]) -> Tensor:
        """The guided ε from what each pass predicted, in the order of ``conditions``.

        Differences to the first pass are summed, which the coefficients allow since they sum to 1: a single pass comes out untouched, and
        two that agree give what they agree on.

        Raises:
            ValueError: a number of predictions that is not P.
        """
        first, *others = eps
        guided = first
        for coefficient, other in zip(self.coefficients[1:], others, strict=True):
            guided = guided + coefficient * (other - first)
        return guided
