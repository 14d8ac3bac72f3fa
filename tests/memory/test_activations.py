"""The trace without data against what PyTorch really keeps and allocates."""

from __future__ import annotations

import pytest
import torch

from rdtf_ds.memory.activations import DFGNTracer, LiveBytes, trace_inference, trace_training, without_data
from tests.memory.networks import CLIP_SHAPES, allocator_peak, arguments, build, saved_for_backward

MODES = ("none", "blocks")


def tracer(size: str, dtype: torch.dtype = torch.float32) -> DFGNTracer:
    return DFGNTracer(lambda: build(size), CLIP_SHAPES[size], dtype)


@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_saved_bytes_are_those_autograd_keeps(size, mode, clips):
    network = build(size)
    network.set_activation_checkpointing(mode)
    kept = saved_for_backward(network, arguments(size, clips))
    assert tracer(size).training(mode, clips).saved == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_peak_of_forward_and_backward_is_the_allocators(mode, tmp_path):
    network, inputs = build("small"), arguments("small", 2)
    network.set_activation_checkpointing(mode)
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    network(*inputs).square().mean().backward()  # whatever is made once
    trace = tracer("small").training(mode, 2)
    kept = []
    forward = allocator_peak(tmp_path, lambda: kept.append(network(*inputs)))
    assert trace.forward_peak == pytest.approx(forward, rel=0.05)
    kept.clear()
    both = allocator_peak(tmp_path, lambda: network(*inputs).square().mean().backward())
    predicted = max(trace.forward_peak, trace.backward_tail, *(arrival.peak for arrival in trace.arrivals))
    assert predicted == pytest.approx(both, rel=0.05)


def test_sampling_peak_is_the_allocators(tmp_path):
    network, inputs = build("small"), (*arguments("small", 3)[:3], None)
    with torch.no_grad():
        network(*inputs)
        peak = allocator_peak(tmp_path, lambda: network(*inputs))
    assert tracer("small").sampling(3) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_tensors_without_data_give_the_trace_of_real_ones(mode):
    network, inputs = build("tiny"), arguments("tiny", 1)
    network.set_activation_checkpointing(mode)
    real = trace_training(network, lambda: network(*inputs), [*inputs[:2], *inputs[2]])
    assert tracer("tiny").training(mode, 1) == real


def test_every_gradient_arrives_once_and_is_let_go():
    network = build("small")
    trace = tracer("small").training("blocks", 1)
    assert sorted(arrival.elements for arrival in trace.arrivals) == sorted(p.numel() for p in network.parameters())
    assert all(arrival.peak >= arrival.live >= 4 * arrival.elements for arrival in trace.arrivals)
    assert trace.arrivals[-1].live < trace.saved / 10
    assert trace.backward_tail < trace.saved / 10


def test_half_precision_takes_half_and_checkpointing_less():
    full, half = tracer("small"), tracer("small", torch.bfloat16)
    assert half.training("none", 1).saved == pytest.approx(full.training("none", 1).saved / 2, rel=0.1)
    assert full.training("blocks", 1).saved < full.training("none", 1).saved / 3
    assert full.sampling(1) < full.training("none", 1).forward_peak / 3
    assert full.training("none", 4).saved == pytest.approx(2 * full.training("none", 2).saved, rel=0.02)


def test_storages_count_once_while_held():
    known = torch.zeros(100)
    with LiveBytes([known, None]) as live:
        view = known[10:]
        assert live.now == 0
        made = torch.zeros(50)
        part = made[:10]
        assert live.now == 200
        del made
        assert live.now == 200, "a view holds the whole storage"
        del part
        assert live.now == 0 and live.peak == 200
        live.restart_peak()
        assert live.peak == 0
    assert view.numel() == 90


def test_inference_leaves_the_graph_out():
    layer = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.ReLU(), torch.nn.Linear(10, 10))
    x = torch.zeros(5, 10)
    assert trace_inference(layer, lambda: layer(x), [x]) == 2 * 5 * 10 * 4


def test_default_dtype_comes_back_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), without_data(torch.float16):
        assert torch.zeros(1).dtype == torch.float16
        raise RuntimeError("inside")
    assert torch.get_default_dtype() == torch.float32


def test_what_waits_on_the_cpu_is_not_on_the_device():
    offloaded, kept = tracer("small").training("blocks_cpu_offload", 1), tracer("small").training("blocks", 1)
    assert kept.host == 0 < offloaded.host
    assert offloaded.saved < kept.saved - 0.5 * offloaded.host / 2, "the units' inputs are gone"
    assert sorted(arrival.elements for arrival in offloaded.arrivals) == sorted(arrival.elements for arrival in kept.arrivals)


def test_host_bytes_are_counted_apart():
    with LiveBytes() as live:
        with live.on_host():
            there = torch.zeros(50)
        here = torch.zeros(10)
        assert (live.host, live.now) == (200, 40)
        del there
        assert (live.host, live.host_peak, live.now) == (0, 200, 40)
    assert here.numel() == 10
