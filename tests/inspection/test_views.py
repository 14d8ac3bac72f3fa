"""What the report shows of a clip is what training makes of it, and its pictures stay small."""

from __future__ import annotations

import base64
import io
import struct

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.containers import LONGEST_MS, png_chunk, png_chunks
from rdtf_ds.data.clips.decoder_process import DecoderUnavailable
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.inspection import views
from rdtf_ds.inspection.views import BYTES_OF_CLIP, draw, pick_clips, shown_for, view_clip
from tests.data.folders import dataset, numbered_clips, plan

SEED = 5
WHITE = (255, 255, 255)
GIF, PNG, WEBP = range(3)  # any numbers will do


def picture(address: str) -> Image.Image:
    kind, _, data = address.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def stickers(tmp_path_factory):
    """Clips whose frames carry their number, as training reads them with SEED."""
    return dataset(numbered_clips(tmp_path_factory.mktemp("clips"), [20, 4, 12]), SEED)


def test_the_frames_shown_are_those_that_training_takes(stickers):
    index = stickers.index
    for clip_id in index.trainable.tolist():
        view = view_clip(index, clip_id, SEED, index.settings.limits, WHITE)
        assert view.frames == index.rows[clip_id].kept and list(view.draws) == [k for k in range(3, 9) if k <= view.frames]
        for k, drawn in view.draws.items():
            for epoch, shown in enumerate(drawn):
                batch = stickers[(plan(clip_id + epoch * len(index.rows), clip_id, "#" * k),)]
                trained_on = batch.frames[0, 0, :, 0, 0].numpy() // 10  # the frames' numbers
                assert list(shown.frames) == trained_on.tolist()


def test_another_seed_draws_other_frames(stickers):
    shown = [view_clip(stickers.index, 0, seed, DecodeLimits(), WHITE).draws for seed in (SEED, SEED, SEED + 1)]
    assert shown[0] == shown[1] != shown[2]


def test_one_frame_of_each_cluster_is_taken():
    features = np.repeat(np.eye(4, dtype=np.float32), [9, 2, 5, 4], axis=0)
    for number in range(20):
        drawn = draw(features, 4, SEED, number)
        assert drawn.clusters == (0,) * 9 + (1,) * 2 + (2,) * 5 + (3,) * 4, "numbered as they come"
        assert [drawn.clusters[frame] for frame in drawn.frames] == [0, 1, 2, 3]
    assert len({draw(features, 4, SEED, number).frames for number in range(20)}) > 5


def test_all_frames_of_a_clip_of_k_are_taken():
    drawn = draw(np.random.default_rng(0).random((5, 3), np.float32), 5, SEED, 0)
    assert drawn.frames == drawn.clusters == (0, 1, 2, 3, 4)


def test_the_pictures_are_the_clip(stickers):
    view = view_clip(stickers.index, 0, SEED, DecodeLimits(), WHITE)
    with picture(view.animation) as playing, picture(view.sheet) as sheet:
        assert playing.n_frames == 20 and playing.width == playing.height == 128
        assert (view.columns, view.rows) == (16, 2)
        assert sheet.width == 16 * sheet.height // 2
        cell = sheet.width // 16
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
        for number in range(20):
            row, column = divmod(number, 16)
            assert abs(pixels[row * cell + cell // 2, column * cell + cell // 2, 0] - 10 * number) <= 6
        assert pixels[-1, -1].tolist() == pytest.approx([255] * 3, abs=3), "the rest of the last row is empty"
    assert "20\u00a0frames" in view.facts and view.path == "0.png" and view.caption == "one two three four"


def test_a_clip_that_has_changed_is_told_and_not_shown(stickers, tmp_path):
    changed = dataset(numbered_clips(tmp_path, [6, 7]), SEED).index
    write_clip(np.zeros((3, 16, 16, 3), np.uint8), tmp_path / "0.png")
    view = view_clip(changed, 0, SEED, DecodeLimits(), WHITE)
    assert "changed" in view.problem and view.draws == {} and view.animation == ""
    assert view_clip(changed, 1, SEED, DecodeLimits(), WHITE).problem == ""


def test_a_machine_that_cannot_decode_is_told_and_not_shown(stickers, monkeypatch):
    def refuse(*arguments, **options):
        raise DecoderUnavailable("exit code 7", "Reinstall.")

    monkeypatch.setattr(views, "decode_clip", refuse)
    view = view_clip(stickers.index, 0, SEED, DecodeLimits(), WHITE)
    assert "cannot be started: exit code 7. Reinstall." in view.problem and view.draws == {} and view.animation == ""


def test_noise_is_made_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), np.uint8)
    write_clip(noise, tmp_path / "noise.webp")
    index = dataset(tmp_path, SEED).index
    view = view_clip(index, 0, SEED, DecodeLimits(), WHITE)
    assert len(view.animation) + len(view.sheet) <= BYTES_OF_CLIP
    with picture(view.animation) as playing:
        assert playing.n_frames == 60 and playing.width < 128


def test_a_frame_that_is_shown_for_hours_does_not_keep_the_page_from_being_made(tmp_path):
    """An APNG that holds a picture for 65535 seconds, more than a WebP can say."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    write_clip(frames, tmp_path / "0.png", [100, 100, LONGEST_MS, 100])
    data = (tmp_path / "0.png").read_bytes()
    body = [body for kind, body in png_chunks(data) if kind == b"fcTL"][2]
    held = body[:20] + struct.pack(">HH", 65535, 1) + body[24:]
    (tmp_path / "0.png").write_bytes(data.replace(png_chunk(b"fcTL", body), png_chunk(b"fcTL", held)))
    view = view_clip(dataset(tmp_path, SEED).index, 0, SEED, DecodeLimits(), WHITE)
    assert view.problem == "" and "6.55e+04\u00a0s" in view.facts
    with picture(view.animation) as playing:
        assert playing.n_frames == 4


@pytest.mark.parametrize(
    ("durations", "kept", "expected"),
    [
        ((10, 20, 30), 3, [10, 20, 30]), ((1, 2, 3, 4, 5), 3, [3, 7, 5]), ((0, 0), 2, [100, 100]), ((), 3, [100] * 3),
        ((5, 0), 2, [5, 1]), ((10, 65_535_000, 60_000), 3, [10, 60_000, 60_000]),
    ],
)  # fmt: skip
def test_thinning_keeps_the_time(durations, kept, expected):
    assert shown_for(durations, kept) == expected


class TestPicking:
    def test_every_format_and_length_comes_before_any_comes_twice(self):
        formats = np.array([GIF] * 90 + [WEBP] * 5 + [PNG] * 5)
        counts = np.array([4] * 80 + [40] * 10 + [4] * 5 + [70] * 5)
        picked = pick_clips(np.arange(100), formats, counts, 4, seed=0)
        assert picked == sorted(picked) and {(formats[clip], int(counts[clip])) for clip in picked} == {
            (GIF, 4), (GIF, 40), (WEBP, 4), (PNG, 70)
        }  # fmt: skip
        assert len(pick_clips(np.arange(100), formats, counts, 12, seed=0)) == 12

    def test_the_seed_decides(self):
        arguments = (np.arange(0, 400, 2), np.full(200, GIF), np.full(200, 9))
        assert pick_clips(*arguments, 5, seed=1) == pick_clips(*arguments, 5, seed=1) != pick_clips(*arguments, 5, seed=2)
        assert all(clip % 2 == 0 for clip in pick_clips(*arguments, 5, seed=1)), "ids, not places"

    def test_no_more_than_there_are(self):
        assert pick_clips(np.array([3, 9]), np.array([GIF, PNG]), np.array([3, 3]), 12, seed=0) == [3, 9]
        assert pick_clips(np.array([], np.int64), np.array([], np.int64), np.array([], np.int64), 12, seed=0) == []
