from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from rdtf_ds.memory.chart import _COLOURS, _MORE, DPI, draw, png
from rdtf_ds.memory.report import CATEGORIES

GB = 10**9


def report(room=10 * GB, **parts):
    phases = [
        {"name": "forward", "bytes": {"weights": 2 * GB, "activations": 3 * GB, **parts}},
        {"name": "step", "bytes": {"weights": 2 * GB, "masters": 4 * GB, "allocator slack": GB // 2}},
    ]
    for phase in phases:
        phase["total"] = sum(phase["bytes"].values())
    peak = max(phases, key=lambda phase: phase["total"])
    return {
        "gpu": "Tesla V100-SXM2-32GB", "gpus": 2, "gpu_bytes": room, "parameters": 955_305_956, "micro_batch": 1, "phases": phases,
        "peak_phase": peak["name"], "peak_bytes": peak["total"], "margin_bytes": room - peak["total"], "margin": 0.35,
        "fits": room >= peak["total"], "host_bytes": {},
    }  # fmt: skip


def bars(axes):
    """(phase number, bottom, height) of the bars of each category."""
    return {
        container.get_label(): [(round(bar.get_x() + bar.get_width() / 2), bar.get_y(), bar.get_height()) for bar in container]
        for container in axes.containers
    }


def test_bars_are_stacked_to_the_totals_in_one_order():
    (axes,) = draw(report()).axes
    drawn = bars(axes)
    assert list(drawn) == ["weights", "masters", "activations", "allocator slack"]
    assert drawn["weights"] == [(0, 0, 2), (1, 0, 2)]
    assert drawn["masters"] == [(0, 2, 0), (1, 2, 4)] and drawn["activations"] == [(0, 2, 3), (1, 6, 0)]
    assert drawn["allocator slack"][1] == (1, 6, 0.5)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["forward", "step"]
    texts = [text.get_text() for text in axes.texts]
    assert "6.50" in texts and "5.00" in texts and "4.00" in texts and "GB of each rank, predicted" in axes.get_ylabel()
    assert {text.get_text() for text in axes.texts if text.get_weight() == "bold"} >= {"6.50"}
    assert not any(text.get_weight() == "bold" for text in axes.texts if text.get_text() == "5.00"), "the peak alone is bold"


def test_a_line_stands_at_the_size_of_the_card():
    (axes,) = draw(report()).axes
    (line,) = axes.lines
    assert set(line.get_ydata()) == {10.0} and axes.get_ylim()[1] > 10
    assert any(text.get_text().endswith("10.00 GB") for text in axes.texts)
    (axes,) = draw(report(room=3 * GB)).axes
    assert set(axes.lines[0].get_ydata()) == {3.0} and axes.get_ylim()[1] > 6.5


def test_a_card_far_larger_than_the_run_leaves_the_bars_legible():
    (axes,) = draw(report(room=80 * GB)).axes
    assert not axes.lines and axes.get_ylim()[1] < 8 and any("80.00 GB, far above" in text.get_text() for text in axes.texts)


def test_the_title_tells_the_verdict_and_the_memory_of_the_cpu():
    title = draw(report() | {"host_bytes": {"EMA": 4 * GB}}).get_suptitle()
    assert "955.3 M parameters on 2 x" in title and "Peak: step, 6.50 GB of 10.00 GB: fits" in title and "each rank: 4.00 GB" in title
    assert "DOES NOT FIT" in draw(report(room=GB)).get_suptitle()


def test_every_category_has_a_colour_of_its_own():
    assert len(_COLOURS) == len(CATEGORIES) and len({*_COLOURS, *_MORE}) == len(_COLOURS) + len(_MORE)
    # Apart for people without red or green cones too (Machado et al. 2009, severity 1), in the order in which they are stacked.
    protan = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    for seen in (np.eye(3), protan, deutan):
        colours = np.array([to_rgb(colour) for colour in _COLOURS]) @ seen.T
        apart = np.linalg.norm(np.diff(colours, axis=0), axis=1)
        assert apart[:-1].min() > 0.2, "the last two, slack and context, differ little and are hatched"
    (axes,) = draw(report(zeal=GB, thrift=GB)).axes
    colours = {container.get_label(): container[0].get_facecolor() for container in axes.containers}
    assert list(colours)[-2:] == ["thrift", "zeal"] and colours["thrift"] != colours["zeal"]
    assert [container[0].get_hatch() for container in axes.containers if container.get_label() == "allocator slack"] == ["////"]


def test_the_png_is_one_of_its_size():
    data, height, width = png(report())
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and picture.size == (width, height) == (11 * DPI, 6 * DPI)
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 6


def test_a_plan_in_megabytes():
    small = report()
    for phase in small["phases"]:
        phase["bytes"] = {category: size // 1000 for category, size in phase["bytes"].items()}
    small |= {"peak_bytes": 6_500_000, "gpu_bytes": 10_000_000}
    (axes,) = draw(small).axes
    assert axes.get_ylabel().startswith("MB") and set(axes.lines[0].get_ydata()) == {10.0} and bars(axes)["weights"][0][2] == 2


def test_matplotlib_is_not_imported_before_a_picture_is_made(project_root):
    """Nor by any module that the chart's imports."""
    code = "import sys, rdtf_ds.memory.chart; print('rdtf_ds.memory.report' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr
