"""The four benchmarks at their smallest: what they compare is what they say, and counted figures are right. Times are not asserted."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any

import pytest
import torch

from rdtf_ds.benchmarks import attention, forward, peers, train_step, trim
from rdtf_ds.benchmarks.peers import SIZES


def report(module: ModuleType, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(["--size", "tiny", "--repetitions", "1", *arguments]))


def rows(report: dict[str, Any]) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    found = {(row["name"], row["unit"], row["compared_with"]): row for row in report["rows"]}
    assert len(found) == len(report["rows"])
    return found


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_are_diffusers_own_defaults_at_full_size(name: str) -> None:
    shown = {"I2VGenXLUNet": 1.42, "UNet3DConditionModel": 1.41}
    flops, parameters = forward.count_work(name, SIZES["full"], 8, torch.bfloat16)
    assert round(parameters / 1e9, 2) == shown[name]
    assert 2.3e12 < flops < 2.6e12


def test_full_size_work_is_at_most_seven_tenths_of_the_base_model() -> None:
    """The row of the table; parameters 0.96 B."""
    flops, parameters = forward.count_work("DFGN", SIZES["full"], 8, torch.bfloat16)
    peer_flops, _ = forward.count_work("I2VGenXLUNet", SIZES["full"], 8, torch.bfloat16)
    assert parameters == 955_305_956
    assert flops / peer_flops <= 0.70


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_run_on_the_same_clip_and_depend_on_all_of_it(name: str) -> None:
    torch.manual_seed(0)
    network, clip = peers.peer(name, SIZES["tiny"]), peers.make_clip(SIZES["tiny"], 4)
    with torch.no_grad():
        result = peers.call_peer(name, network, clip)
        assert result.shape == (1, 4, 4, 16, 16)
        for part in (clip.sample[:, :4], clip.sample[:, 4:], clip.text.clip):
            before = part.clone()
            part += 1.0
            assert not torch.allclose(peers.call_peer(name, network, clip), result)
            part.copy_(before)
    with pytest.raises(ValueError, match="no peer 'other'"):
        peers.peer("other", SIZES["tiny"])


def test_forward_stands_beside_peer_and_limit() -> None:
    found = rows(report(forward, "--peers", *peers.PEERS, "--matmul_sides", "256", "512", "--peers_channels_last"))
    for name in peers.PEERS:
        ours, theirs = found["forward", "s", name], found[f"forward of {name}", "s", None]
        assert ours["ratio"] == pytest.approx(ours["value"] / theirs["value"])
    rate, limit = found["rate", "GFLOP/s", "best matrix product"], found["best matrix product", "GFLOP/s", None]
    assert rate["ratio"] == pytest.approx(rate["value"] / limit["value"]) and rate["at_least"]
    work, seconds = found["work", "TFLOP", None]["value"], found["forward", "s", None]["value"]
    assert rate["value"] == pytest.approx(1e3 * work / seconds)
    assert all(row["bar"] is None for row in found.values()), "bars are of the full size"


def test_train_step_has_every_mode_and_no_gradient_is_left() -> None:
    found = rows(report(train_step, "--dtype", "fp32", "--plain", "--modes", "none", "selective"))
    assert {("step, none", "s", "forward"), ("step, selective", "s", "forward"), ("step, selective", "s", train_step.PLAIN)} <= set(found)
    assert found[train_step.HALF, "s", "step, selective"]["ratio"] < 1
    none, selective = (found[f"peak activations, {mode}", "MB", beside] for mode, beside in (("none", None), ("selective", "none")))
    assert selective["predicted"] and selective["ratio"] == pytest.approx(selective["value"] / none["value"]) and selective["ratio"] < 0.5
    assert found["work, none", "TFLOP", "forward"]["value"] < found["work, selective", "TFLOP", "forward"]["value"]


def test_the_plain_trainer_learns_and_a_step_without_optimizer_does_not() -> None:
    torch.manual_seed(0)
    network, clip = peers.dfgn(SIZES["tiny"]), peers.make_clip(SIZES["tiny"], 3)
    target = torch.ones_like(clip.sample[:, :4])
    step = peers.forward_and_backward(network, clip, target)
    assert step() == step() == 1.0
    assert network.conv_out.weight.grad.abs().sum() > 0
    network.zero_grad()
    train = peers.plain_training(network, clip, target)
    assert train() > train() > train()
    assert network.conv_out.weight.grad is None


def test_attention_has_a_row_for_each_backend_that_runs() -> None:
    made = report(attention)
    found = rows(made)
    assert attention.token_counts(SIZES["full"], 8) == {
        "level 0, γ = 2": 2048, "level 1, γ = 2": 512, "level 2, γ = 1": 512, "middle, γ = 1": 128, "level 0, γ = 1": 8192,
    }  # fmt: skip
    for backend, beside in (("sdpa", "math"), ("math", None)):
        assert ("level 0, γ = 1, 2048 tokens, " + backend, "ms", beside) in found
    # Scores of 8 heads and 2048² pairs in fp32 alone are 134 MB; sdpa gives 2048 x 8 x 32 results and one number for each query.
    assert found["level 0, γ = 1, 2048 tokens, math", "MB", None]["value"] > 134
    assert found["level 0, γ = 1, 2048 tokens, sdpa", "MB", "math"]["value"] == pytest.approx(2048 * 8 * 33 * 4 / 1e6)
    if not torch.cuda.is_available():
        assert any("xformers has no attention kernel for cpu" in note for note in made["notes"])


def test_trimmed_and_padded_losses_agree_and_could_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    name = ("difference of the loss, k = 5", "relative", "tolerance 0.0001")
    found = rows(report(trim, "--dtype", "fp32", "--k", "5"))
    assert found[name]["holds"] and found["step, k = 5 frames alone", "s", "padded"]["ratio"] < 1
    # A network that is not told of its padding lets the padded frames in.
    told = trim.DFGN.forward
    monkeypatch.setattr(trim.DFGN, "forward", lambda self, sample, timestep, text, mask=None: told(self, sample, timestep, text, None))
    assert rows(report(trim, "--dtype", "fp32", "--k", "5"))[name]["holds"] is False
