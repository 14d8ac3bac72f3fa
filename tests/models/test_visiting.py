"""Frozen encoders that wait on the CPU: who is on the device when, and that what they give is the same."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from rdtf_ds.experiment import load_experiment
from rdtf_ds.models import visiting
from rdtf_ds.models.autoencoder import FrameAutoencoder, load_autoencoder
from rdtf_ds.models.text_conditioning import TextEncoders
from rdtf_ds.models.visiting import Visitor
from rdtf_ds.training.assembly import build_run
from rdtf_ds.training.encoders import load_encoders
from rdtf_ds.training.validation_assembly import build_pipeline

CPU = torch.device("cpu")


class OtherMemory:
    """A second memory on a machine without one: what is brought there is a copy, counted for as long as it lives."""

    def __init__(self) -> None:
        self.weights: list[weakref.ref] = []
        self.moves = 0
        self.fails_after: int | None = None

    def bring(self, home: torch.Tensor, device: torch.device) -> torch.Tensor:
        if self.moves == self.fails_after:
            raise torch.OutOfMemoryError("no room")
        self.moves += 1
        there = home.clone()
        self.weights.append(weakref.ref(there.untyped_storage()))
        return there

    @property
    def addresses(self) -> set[int]:
        return {storage.data_ptr() for reference in self.weights if (storage := reference()) is not None}

    def holds(self, module: nn.Module) -> bool:
        """Whether all of a module's weights are there, not only some."""
        inside = [tensor.untyped_storage().data_ptr() in self.addresses for tensor in (*module.parameters(), *module.buffers())]
        assert all(inside) or not any(inside)
        return all(inside)


@pytest.fixture
def other_memory(monkeypatch: pytest.MonkeyPatch) -> OtherMemory:
    memory = OtherMemory()
    monkeypatch.setattr(visiting, "_brought", memory.bring)
    return memory


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)


def test_weights_and_buffers_come_and_nothing_is_copied_back(other_memory):
    module = frozen()
    homes = [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]
    x, visitor = torch.randn(2, 3), Visitor(module, CPU)
    expected = module(x)
    for _ in range(2):
        with visitor:
            assert other_memory.holds(module)
            assert torch.equal(module(x), expected)
            module[0].weight.data.add_(1.0)  # lost on the way home
        assert not other_memory.addresses and not other_memory.holds(module)
        assert [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())] == homes
        assert torch.equal(module(x), expected)
    assert other_memory.moves == 2 * len(homes)


def test_an_error_leaves_the_weights_at_home(other_memory):
    module = frozen()
    visitor = Visitor(module, CPU)
    with pytest.raises(ValueError, match="in the middle"), visitor:
        raise ValueError("in the middle")
    assert not other_memory.holds(module) and not other_memory.addresses
    other_memory.fails_after = other_memory.moves + 3
    with pytest.raises(torch.OutOfMemoryError), visitor:
        pytest.fail("entered without all of the weights")
    assert not other_memory.holds(module) and not other_memory.addresses
    other_memory.fails_after = None
    with visitor:
        assert other_memory.holds(module)


def test_visits_do_not_nest_and_a_trained_module_does_not_visit():
    visitor = Visitor(frozen(), CPU)
    with visitor, pytest.raises(RuntimeError, match="on the device already"), visitor:
        pytest.fail("entered twice")
    with pytest.raises(ValueError, match="Linear is not frozen"):
        Visitor(nn.Linear(2, 2), CPU)


@pytest.fixture
def watched(other_memory):
    """Visiting encoders, and the names of those on the device at each of their passes."""
    autoencoder, text = load_autoencoder("tiny"), TextEncoders.from_pretrained("tiny", "tiny", 12)
    modules = {"vae": autoencoder.vae, "clip": text.clip, "t5": text.t5}
    passes: list[tuple[str, list[str]]] = []

    def note(name):
        return lambda module, given: passes.append((name, [other for other in modules if other_memory.holds(modules[other])]))

    hooks = [autoencoder.vae.encoder, autoencoder.vae.decoder, text.clip, text.t5]
    for module, name in zip(hooks, ("vae", "vae", "clip", "t5"), strict=True):
        module.register_forward_pre_hook(note(name))
    return autoencoder.visit(CPU), text.visit(CPU), passes


def test_each_is_on_the_device_alone_and_for_its_pass_only(watched, other_memory):
    autoencoder, text, passes = watched
    autoencoder.slice_frames = 2
    latents = autoencoder.encode(torch.rand(1, 3, 4, 16, 16))
    text.encode(["a", "b", "a"])
    autoencoder.decode(latents)
    assert passes == [("vae", ["vae"])] * 2 + [("clip", ["clip"])] * 2 + [("t5", ["t5"])] * 2 + [("vae", ["vae"])] * 2
    assert not other_memory.addresses
    moves = other_memory.moves
    text.encode(["b", "a"])  # remembered: nobody has to come
    assert other_memory.moves == moves


def test_results_are_those_of_encoders_that_stay(watched):
    autoencoder, text, _ = watched
    staying, staying_text = FrameAutoencoder(load_autoencoder("tiny").vae), TextEncoders.from_pretrained("tiny", "tiny", 12)
    frames = torch.rand(2, 3, 3, 16, 16)
    latents = autoencoder.encode(frames)
    assert torch.equal(latents, staying.encode(frames))
    assert torch.equal(autoencoder.decode(latents), staying.decode(latents))
    for one, other in zip(text.encode(["a red circle", ""]), staying_text.encode(["a red circle", ""]), strict=True):
        assert torch.equal(one, other)


def test_what_visits_cannot_be_moved(watched):
    autoencoder, text, _ = watched
    with pytest.raises(RuntimeError, match="visits its device"):
        autoencoder.to("cpu")
    with pytest.raises(RuntimeError, match="visit their device"):
        text.to("cpu")


@pytest.fixture
def tiny(project_root, tmp_path):
    def load(*settings):
        fixed = ("rdtf.encoders.autoencoder=tiny", "rdtf.data.synthetic_clips=10", "train_batch_size=1", "rdtf.data.workers=0")
        return load_experiment(project_root / "ds_configs" / "tiny_cpu.json", [*fixed, *settings], output_dir=tmp_path / "run")

    return load


def test_the_key_makes_encoders_visit(tiny, other_memory):
    for place, visits in (("resident", False), ("cpu", True)):
        autoencoder, text = load_encoders(tiny(f"rdtf.memory.encoders={place}").rdtf, torch.float32, CPU)
        before = other_memory.moves
        autoencoder.encode(torch.rand(1, 3, 3, 16, 16))
        text.encode(["a"])
        assert (other_memory.moves > before) == visits


def test_validation_makes_the_same_clips_with_visiting_encoders(process_group, tiny, other_memory):
    clips = {}
    for place in ("resident", "cpu"):
        run = build_run(tiny(f"rdtf.memory.encoders={place}"), 0, 1, CPU)
        pipeline = build_pipeline(run)
        for _ in range(2):  # the second finds everybody at home
            clips[place] = pipeline("a red circle", num_inference_steps=2, seeds=3, num_frames=3).frames
        assert (other_memory.moves > 0) == (place == "cpu") and not other_memory.addresses
    assert (clips["resident"] == clips["cpu"]).all()
