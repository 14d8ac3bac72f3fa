from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.training.validation_budget import Costs, Fit, allowance, fit, share

NOTHING = Fit(False, 0, False)
KNOWN = Costs(overhead=1.0, losses=4.0, clips=2.0, fvd=20.0)
seconds = st.floats(0.001, 1e4)


def test_what_is_allowed_makes_the_share():
    assert allowance(0.05, 190.0, 4.0) == pytest.approx(6.0), "10 s of 200 s are 5 %"
    assert allowance(0.5, 10.0, 0.0) == pytest.approx(10.0)
    assert allowance(0.05, 19.0, 3.0) == pytest.approx(-2.0), "what went past the bound is made up for"
    assert allowance(1.0, 0.0, 1e9) == math.inf
    assert share(190.0, 10.0) == pytest.approx(0.05) and share(0.0, 0.0) == 0.0


@given(bound=st.floats(0.001, 0.999), trained=seconds, validated=seconds)
def test_spending_what_is_allowed_meets_the_bound(bound, trained, validated):
    left = allowance(bound, trained, validated)
    if left > 0:
        assert share(trained, validated + left) == pytest.approx(bound)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (0.5, NOTHING),  # not even the mean weights in and out
        (4.99, NOTHING),  # and the losses
        (5.0, Fit(True, 0, False)),
        (6.99, Fit(True, 0, False)),
        (7.0, Fit(True, 1, False)),
        (12.9, Fit(True, 3, False)),
        (13.0, Fit(True, 4, False)),
        (32.9, Fit(True, 4, False)),
        (33.0, Fit(True, 4, True)),
        (math.inf, Fit(True, 4, True)),
    ],
)
def test_losses_come_first_then_clips_then_fvd(left, expected):
    assert fit(left, KNOWN, losses=True, rounds=4, fvd=True) == expected


def test_what_is_not_wanted_costs_nothing():
    assert fit(3.0, KNOWN, losses=False, rounds=1, fvd=False) == Fit(False, 1, False)
    assert fit(21.0, KNOWN, losses=False, rounds=0, fvd=True) == Fit(False, 0, True)
    assert fit(math.inf, KNOWN, losses=False, rounds=0, fvd=False) == NOTHING


def test_while_the_losses_wait_nothing_uses_up_what_they_wait_for():
    assert fit(4.0, KNOWN, losses=True, rounds=1, fvd=False) == NOTHING


def test_unknown_costs_are_found_out_by_one_unit():
    assert fit(0.01, Costs(), losses=True, rounds=9, fvd=True) == Fit(True, 1, False), "FVD may take hours, the clips tell"
    assert fit(0.01, Costs(), losses=True, rounds=0, fvd=True) == Fit(True, 0, False, fvd_trial=True), "no other clips: one of its own"
    assert fit(5.0, Costs(losses=5.0), losses=True, rounds=0, fvd=True) == Fit(True, 0, False), "but not with nothing left"
    assert fit(math.inf, Costs(), losses=True, rounds=0, fvd=True) == Fit(True, 0, True), "nor without a bound"
    assert fit(0.01, Costs(), losses=False, rounds=0, fvd=False) == NOTHING
    assert fit(0.0, Costs(), losses=True, rounds=9, fvd=False) == NOTHING
    assert fit(-1.0, Costs(), losses=False, rounds=9, fvd=False) == NOTHING
    assert fit(4.0, Costs(losses=4.0), losses=True, rounds=9, fvd=False) == Fit(True, 0, False)


@given(left=seconds, overhead=seconds, losses=seconds, clips=seconds, fvd=seconds, rounds=st.integers(0, 50))
def test_known_costs_never_go_past_what_is_left(left, overhead, losses, clips, fvd, rounds):
    costs = Costs(overhead, losses, clips, fvd)
    fits = fit(left, costs, True, rounds, True)
    spent = fits.losses * losses + fits.rounds * clips + fits.fvd * fvd
    assert fits.rounds <= rounds
    if fits != NOTHING:
        assert overhead + spent <= left * (1 + 1e-9)


def test_costs_are_those_measured_last():
    costs = KNOWN.measured(clips=3.0, fvd=None)
    assert costs == Costs(1.0, 4.0, 3.0, 20.0)
    assert Costs.from_json(costs.to_json()) == costs and Costs.from_json({}) == Costs()
