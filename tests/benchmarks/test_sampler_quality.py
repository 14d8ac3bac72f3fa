"""The benchmark of samplers gives each the same prompts and seeds, and judges what each made."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from rdtf_ds.benchmarks import samplers
from rdtf_ds.data.synthetic import MOTIONS, on_white, render
from rdtf_ds.pipeline import RDTFOutput, RDTFPipeline
from rdtf_ds.seeding import numpy_generator


def test_prompts_are_half_held_out_and_of_all_motions():
    chosen = samplers.prompts(0, 24)
    assert [sticker.held_out for sticker in chosen] == [True, False] * 12
    assert Counter(sticker.motion for sticker in chosen) == dict.fromkeys(MOTIONS, 4)
    assert chosen == samplers.prompts(0, 24) != samplers.prompts(1, 24)
    assert chosen[:12] == samplers.prompts(0, 12)


class Artist:
    """Draws what it is asked for with every sampler but UniPC, with which it draws nothing."""

    def __init__(self) -> None:
        self.config = argparse.Namespace(image_size=24, max_frames=8, text_scale=4.0, image_scale=2.0)
        self.calls: list[tuple[str, int, float | None, int]] = []
        self.known = {sticker.caption: sticker for sticker in samplers.prompts(0, 24)}

    def set_progress_bar_config(self, **_: bool) -> None:
        pass

    def __call__(self, captions, *, sampler, num_inference_steps, eta, seeds) -> RDTFOutput:
        self.calls.append((sampler, num_inference_steps, eta, seeds))
        clips = [on_white(render(self.known[caption], 8, 24, numpy_generator(0))) for caption in captions]
        frames = np.stack(clips) if sampler != "unipc" else np.full((len(captions), 8, 24, 24, 3), 255, np.uint8)
        return RDTFOutput(frames=frames, durations_ms=[[120] * 8] * len(captions))


def test_every_sampler_is_judged_on_the_same_requests(monkeypatch):
    artist = Artist()
    monkeypatch.setattr(RDTFPipeline, "from_pretrained", lambda folder, torch_dtype: artist)
    report = samplers.run(argparse.Namespace(model=Path("model"), clips=24, batch=12, seed=0))
    values = {row["name"]: row["value"] for row in report["rows"]}
    assert values["dpm++ 25: colour right"] == values["ddim 50, η = 0: motion right"] == 1
    assert values["unipc 25: colour right"] == values["unipc 25: motion right"] == 0
    assert values["dpm++ 25: distance from dpm++ 100"] == 0 and values["unipc 25: distance from dpm++ 100"] > 1
    assert "ddim 50, η = 1: distance from dpm++ 100" not in values  # with fresh noise it solves another equation
    assert artist.calls[0] == ("dpm++", 100, None, 0)
    for contestant in samplers.CONTESTANTS:
        assert artist.calls.count((*contestant, 0)) == artist.calls.count((*contestant, 12)) == 1


def test_the_comparison_has_ddim_with_and_without_noise():
    assert {contestant.eta for contestant in samplers.CONTESTANTS if contestant[:2] == ("ddim", 50)} == {0.0, 1.0}
