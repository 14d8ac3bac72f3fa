"""Wrongs of how clips are judged."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

EVALUATION = (
    Mutant(
        name="patches are drawn for all cells at once",
        file="rdtf_ds/evaluation/fragments.py",
        old="(VIEWS, CELLS, CELLS)) for cell",
        new="(VIEWS, 1, 1)).repeat(CELLS, 1).repeat(CELLS, 2) for cell",
        tests=("tests/evaluation/test_fragments.py",),
    ),
    Mutant(
        name="opposite ends of a shifted picture see each other",
        file="rdtf_ds/evaluation/swin3d.py",
        old="return inside[:, :, None] != inside[:, None]",
        new="return inside[:, :, None] < inside[:, None]",
        tests=("tests/evaluation/test_swin3d.py",),
    ),
    Mutant(
        name="the tables of two fragments and of one are swapped",
        file="rdtf_ds/evaluation/swin3d.py",
        old="torch.lerp(within, biases,",
        new="torch.lerp(biases, within,",
        tests=("tests/evaluation/test_swin3d.py",),
    ),
    Mutant(
        name="weights of strangers may run what they say",
        file="rdtf_ds/evaluation/fast_vqa_weights.py",
        old="weights_only=True",
        new="weights_only=False",
        tests=("tests/evaluation/test_fast_vqa.py",),
    ),
    Mutant(
        name="halves of a distance share their clips",
        file="rdtf_ds/evaluation/measures.py",
        old="found.append(_distance(real[order[:half]], other[order[half : 2 * half]]))",
        new="found.append(_distance(real[order[:half]], other[order[:half]]))",
        tests=("tests/evaluation/test_measures.py",),
    ),
    Mutant(
        name="clips held out are mixed with those trained on",
        file="rdtf_ds/evaluation/test_set.py",
        old="ids = index.held_out if held_out else",
        new="ids = index.trainable if held_out else",
        tests=("tests/evaluation/test_test_set.py",),
    ),
    Mutant(
        name="an evaluation goes on with clips of other settings",
        file="rdtf_ds/evaluation/evaluating.py",
        old="        if told:\n",
        new="        if False:\n",
        tests=("tests/tools/test_evaluate.py",),
    ),
    Mutant(
        name="all clips of an evaluation have one seed",
        file="rdtf_ds/evaluation/test_set.py",
        old='derive_seed(seed, "evaluated clip", row["path"])',
        new="seed",
        tests=("tests/evaluation/test_test_set.py",),
    ),
    Mutant(
        name="I3D is padded at the start where TensorFlow pads at the end",
        file="rdtf_ds/evaluation/i3d.py",
        old="padding += [total // 2, total - total // 2]",
        new="padding += [total - total // 2, total // 2]",
        tests=("tests/evaluation/test_i3d.py",),
    ),
    Mutant(
        name="a covariance divided by n",
        file="rdtf_ds/evaluation/frechet.py",
        old="np.sqrt(len(samples) - 1)",
        new="np.sqrt(len(samples))",
        tests=("tests/evaluation/test_frechet.py",),
    ),
    Mutant(
        name="a short clip is shown to I3D twice, not slowly",
        file="rdtf_ds/evaluation/fvd.py",
        old="frames.repeat_interleave(shown_times(len(clip)), dim=0)",
        new="frames.repeat(shown_times(len(clip)), 1, 1, 1)",
        tests=("tests/evaluation/test_i3d.py",),
    ),
)
