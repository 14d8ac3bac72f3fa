"""Wrongs of files that must outlast a run."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CHECKPOINTS = (
    Mutant(
        name="a damaged checkpoint is loaded",
        file="rdtf_ds/checkpoints/manifest.py",
        old='if digest_file(path).sha256 != expected["sha256"]:',
        new="if not digest_file(path).sha256:",
        tests=("tests/checkpoints/test_manifest.py",),
    ),
    Mutant(
        name="masters exported where the mean was asked for",
        file="rdtf_ds/checkpoints/weights.py",
        old='if weights == "master":',
        new='if weights in ("master", "ema"):',
        tests=("tests/export/test_exporting.py",),
    ),
    Mutant(
        name="what was read of a checkpoint stays in memory",
        file="rdtf_ds/checkpoints/mapped_pages.py",
        old="    if length > 0 and",
        new="    if length < 0 and",
        tests=("tests/checkpoints/test_mapped_pages.py",),
    ),
    Mutant(
        name="a file is committed before its bytes are on the disk",
        file="rdtf_ds/checkpoints/durable.py",
        old="        os.fsync(file.fileno())",
        new="        file.fileno()",
        tests=("tests/faults/test_power_cuts.py",),
    ),
    Mutant(
        name="a rename is not flushed",
        file="rdtf_ds/checkpoints/durable.py",
        old="    sync(target.parent)",
        new="    pass",
        tests=("tests/faults/test_power_cuts.py",),
    ),
    Mutant(
        name="a manifest is believed without its seal",
        file="rdtf_ds/checkpoints/manifest.py",
        old="if not sound or seal != hashlib.sha256(text).hexdigest():",
        new="if not sound or seal is None:",
        tests=("tests/checkpoints/test_manifest.py",),
    ),
    Mutant(
        name="damaged checkpoints count among those that stay",
        file="rdtf_ds/checkpoints/store.py",
        old="elif path.name in self._verified or kept >= _LEAST_VERIFIED or self.flaw(path) is None:",
        new="else:",
        tests=("tests/checkpoints/test_store.py",),
    ),
    Mutant(
        name="the second half of a group goes to the first rank",
        file="rdtf_ds/checkpoints/resharding.py",
        old="return self.rank * length, (self.rank + 1) * length",
        new="return 0, length",
        tests=("tests/checkpoints/test_resharding.py",),
    ),
    Mutant(
        name="the moments change places between GPU and CPU",
        file="rdtf_ds/checkpoints/moments.py",
        old='_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}',
        new='_NAMES = {"state2": "exp_avg", "state1": "exp_avg_sq"}',
        tests=("tests/training/test_offload.py",),
    ),
)
