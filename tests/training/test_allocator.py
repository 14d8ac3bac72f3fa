"""Memory that is let go is the system's again: in a process of its own, since the bounds hold for the rest of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from rdtf_ds.training.allocator import give_freed_memory_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

large = np.ones(30 << 20, np.uint8)
del large  # glibc's bound is now as large as this was
if sys.argv[1] == "ours":
    assert give_freed_memory_back()
before = resident()
blocks = [np.ones(1 << 20, np.uint8) for _ in range(200)]
kept = blocks[-1]
del blocks
print(resident() - before)
"""


def left_over(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_one_block_that_is_kept_holds_no_others():
    assert left_over("ours") < 5 << 20
    assert left_over("glibcs") > 100 << 20, "or the module can go"
