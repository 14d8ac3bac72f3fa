"""The fewest passes for the guided noise, and that they say what the formula says."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.diffusion.guidance import combine_guidance
from rdtf_ds.passes import Condition, Passes

NOTHING, IMAGE, TEXT, BOTH = Condition(False, False), Condition(True, False), Condition(False, True), Condition(True, True)

# has_image, has_text, s_I, s_T → what is passed, with its coefficient.
TABLE = [
    (False, False, 7.5, 7.5, {NOTHING: 1.0}),
    (False, False, 0.0, 0.0, {NOTHING: 1.0}),
    (False, True, 9.0, 7.5, {NOTHING: -6.5, TEXT: 7.5}),
    (False, True, 9.0, 1.0, {TEXT: 1.0}),
    (False, True, 9.0, 0.0, {NOTHING: 1.0}),
    (True, False, 7.5, 9.0, {NOTHING: -6.5, IMAGE: 7.5}),
    (True, False, 1.0, 9.0, {IMAGE: 1.0}),
    (True, False, 0.0, 9.0, {NOTHING: 1.0}),
    (True, True, 4.0, 7.5, {NOTHING: -3.0, IMAGE: -3.5, BOTH: 7.5}),
    (True, True, 7.5, 7.5, {NOTHING: -6.5, BOTH: 7.5}),
    (True, True, 1.0, 7.5, {IMAGE: -6.5, BOTH: 7.5}),
    (True, True, 4.0, 0.0, {NOTHING: -3.0, IMAGE: 4.0}),
    (True, True, 0.0, 7.5, {NOTHING: 1.0, IMAGE: -7.5, BOTH: 7.5}),
    (True, True, 4.0, 1.0, {NOTHING: -3.0, IMAGE: 3.0, BOTH: 1.0}),
    (True, True, 1.0, 1.0, {BOTH: 1.0}),
    (True, True, 1.0, 0.0, {IMAGE: 1.0}),
    (True, True, 0.0, 0.0, {NOTHING: 1.0}),
]


@pytest.mark.parametrize(("has_image", "has_text", "image_scale", "text_scale", "expected"), TABLE)
def test_what_is_passed(has_image, has_text, image_scale, text_scale, expected):
    passes = Passes.plan(has_image, has_text, image_scale, text_scale)
    assert dict(zip(passes.conditions, passes.coefficients, strict=True)) == expected
    assert len(passes) == len(expected)
    assert list(passes.conditions) == [condition for condition in (NOTHING, IMAGE, TEXT, BOTH) if condition in expected]


SCALE = st.one_of(st.sampled_from([0.0, 1.0, 7.5]), st.floats(-20, 20))


@given(image_scale=SCALE, text_scale=SCALE, seed=st.integers(0, 99))
def test_joined_passes_are_the_formula(image_scale, text_scale, seed):
    drawn = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).double()
    answers = dict(zip((NOTHING, IMAGE, TEXT, BOTH), drawn, strict=True))
    for has_image, has_text in product((False, True), repeat=2):
        passes = Passes.plan(has_image, has_text, image_scale, text_scale)
        formula = combine_guidance(
            answers[NOTHING], answers[Condition(has_image, False)], answers[Condition(has_image, has_text)], image_scale, text_scale
        )
        torch.testing.assert_close(passes.combine([answers[condition] for condition in passes.conditions]), formula, rtol=1e-9, atol=1e-9)


def test_a_single_pass_comes_out_untouched():
    answer = torch.tensor([1e-8, 3.0, -1e30])
    assert Passes.plan(True, True, 1.0, 1.0).combine([answer]) is answer


def test_a_pass_too_few_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        Passes.plan(True, True, 4.0, 7.5).combine([torch.zeros(1), torch.zeros(1)])
