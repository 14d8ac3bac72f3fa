"""Pages of a mapped file that were read, and let go."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

MEASURE = """
import sys, torch
from safetensors import safe_open
from rdtf_ds.checkpoints.mapped_pages import let_go

def resident():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssFile")).split()[1])

kind, path = sys.argv[1:]
if kind == "pt":
    flat = torch.load(path, mmap=True, weights_only=True)["flat"]
else:
    file = safe_open(path, framework="pt")
    flat = file.get_tensor("flat")
torch.ones(1).sum()  # the code of a sum is paged in
bare = resident()
total = flat.sum()
read = resident() - bare
let_go(flat[1:])
left = resident() - bare
assert flat.sum() == total  # read again: nothing was lost
print(read, left)
"""


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_what_was_read_of_a_file_leaves_memory_and_is_still_there(tmp_path, kind, project_root):
    flat, path = torch.randn(4_000_000), tmp_path / "file"
    (torch.save if kind == "pt" else save_file)({"flat": flat}, str(path))
    done = subprocess.run([sys.executable, "-c", MEASURE, kind, str(path)], cwd=project_root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    read, left = map(int, done.stdout.split())
    assert read > 15_000_000, "both loaders map: this is what is to be let go"
    assert left < 1_000_000


def test_neighbours_keep_their_values():
    """Only whole pages within the tensor go, so what stands before and behind it in memory of its own is not touched."""
    from rdtf_ds.checkpoints.mapped_pages import let_go

    whole = torch.arange(5000, dtype=torch.float32)
    let_go(whole[100:4900])
    assert torch.equal(whole[:100], torch.arange(100.0)) and torch.equal(whole[4900:], torch.arange(4900.0, 5000))
    small = torch.ones(3)
    let_go(small)
    let_go(small[:0])
    assert torch.equal(small, torch.ones(3))
