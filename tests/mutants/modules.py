"""Wrongs of the modules that lie beside the packages: the seeds, the pipeline and what it is called with."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MODULES = (
    Mutant(
        name="seed parts run together",
        file="rdtf_ds/seeding.py",
        old='f"{tag}{len(encoded)}:"',
        new='f"{tag}"',
        tests=("tests/test_seeding.py",),
    ),
    Mutant(
        name="words hidden from one encoder only",
        file="rdtf_ds/pipeline.py",
        old="        visual = {shown: self._visual_guidance",
        new=(
            "        text = text._replace(t5=self.encode_text(captions * len(passes)).t5)\n        visual = {shown: self._visual_guidance"
        ),
        tests=("tests/pipeline/test_guidance.py",),
    ),
    Mutant(
        name="every pass sees the visible frames",
        file="rdtf_ds/pipeline.py",
        old="visible & shown)",
        new="visible)",
        tests=("tests/pipeline/test_guidance.py",),
    ),
    Mutant(
        name="the scales change places",
        file="rdtf_ds/pipeline.py",
        old="any(prompts), settings.image_scale, settings.text_scale)",
        new="any(prompts), settings.text_scale, settings.image_scale)",
        tests=("tests/pipeline/test_guidance.py",),
    ),
    Mutant(
        name="given latents are ignored",
        file="rdtf_ds/pipeline.py",
        old="latents = (start if latents is None else latents)",
        new="latents = start",
        tests=("tests/pipeline/test_sampling.py",),
    ),
    Mutant(
        name="a call's sampler is ignored",
        file="rdtf_ds/pipeline.py",
        old="samplers.begin(self.scheduler if own else samplers.swap_sampler(self.scheduler, settings.sampler), settings.steps)",
        new="samplers.begin(self.scheduler, settings.steps)",
        tests=("tests/pipeline/test_sampling.py",),
    ),
    Mutant(
        name="a bounded batch sees the text of its first passes alone",
        file="rdtf_ds/pipeline.py",
        old="TextFeatures(text.clip[part], text.t5[part])",
        new="TextFeatures(text.clip[: len(sample[part])], text.t5[part])",
        tests=("tests/pipeline/test_guidance.py",),
    ),
    Mutant(
        name="a pass that cancels is made all the same",
        file="rdtf_ds/passes.py",
        old="if coefficient != 0}",
        new="}",
        tests=("tests/test_passes.py",),
    ),
    Mutant(
        name="the caption's term has the picture's coefficient",
        file="rdtf_ds/passes.py",
        old="image: image_scale - text_scale, both: text_scale}",
        new="image: image_scale - text_scale, both: image_scale}",
        tests=("tests/test_passes.py",),
    ),
    Mutant(
        name="DDIM takes steps of one length though they differ",
        file="rdtf_ds/samplers.py",
        old="        scheduler.num_inference_steps = Fraction(",
        new="        _ = Fraction(",
        tests=("tests/test_samplers.py",),
    ),
    Mutant(
        name="a step at timestep -1",
        file="rdtf_ds/samplers.py",
        old="if mine.timesteps[-1] < 0:",
        new="if mine.timesteps[-1] < -1:",
        tests=("tests/test_samplers.py",),
    ),
    Mutant(
        name="a call leaves its state in the pipeline's sampler",
        file="rdtf_ds/samplers.py",
        old="mine = copy.deepcopy(scheduler)",
        new="mine = scheduler",
        tests=("tests/test_samplers.py",),
    ),
    Mutant(
        name="sixteen bits of grey are cut off at 255",
        file="rdtf_ds/clip_requests.py",
        old="(grey.clip(0, 65535) / 257)",
        new="grey.clip(0, 255)",
        tests=("tests/test_clip_requests.py",),
    ),
    Mutant(
        name="nearly opaque pixels pass for opaque",
        file="rdtf_ds/clip_requests.py",
        old="[0] < 255:",
        new="[0] < 254:",
        tests=("tests/test_clip_requests.py",),
    ),
    Mutant(
        name="a model without one of its weights loads",
        file="rdtf_ds/exported_model.py",
        old="for name in sorted(expected.keys() | found.keys()):",
        new="for name in sorted(expected.keys() & found.keys()):",
        tests=("tests/test_exported_model.py",),
    ),
    Mutant(
        name="guidance channels before the noisy latents",
        file="rdtf_ds/pipeline.py",
        old="torch.cat([sample, visual], dim=1)",
        new="torch.cat([visual, sample], dim=1)",
        tests=("tests/pipeline/test_guidance.py",),
    ),
    Mutant(
        name="interpolation may become more probable",
        file="rdtf_ds/cross_checks.py",
        old="if (end[task] < start[task]) if rises else (end[task] > start[task]):",
        new="if rises and end[task] < start[task]:",
        tests=("tests/test_cross_checks.py",),
    ),
)
