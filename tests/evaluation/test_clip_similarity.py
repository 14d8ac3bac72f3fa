"""CLIP similarity against CLIP's own forward pass, and against hand-made features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from rdtf_ds.evaluation.clip_similarity import ClipScorer
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.models.tiny_encoders import STICKER_WORDS, tiny_clip

SIZE = 16
CAPTIONS = ["a red circle slides left", "a blue star", "green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    _, tokenizer = tiny_clip(16, STICKER_WORDS)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = CLIPConfig(
        text_config={**text, "pad_token_id": tokenizer.pad_token_id},
        vision_config={**shape, "image_size": SIZE, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(place)
    tokenizer.save_pretrained(str(place))
    return place


def clips(count: int, frames: int = 4, side: int = SIZE) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), np.uint8) for seed in range(count)]


def test_it_is_what_clip_itself_says(folder: Path) -> None:
    scorer, model = ClipScorer(str(folder)), CLIPModel.from_pretrained(folder).eval()
    _, tokenizer = tiny_clip(16, STICKER_WORDS)
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's clip.py
    shown = clips(3)
    found = scorer.score(shown, CAPTIONS)
    rows = []
    for clip in shown:
        pixels = torch.from_numpy((clip / 255 - mean) / deviation).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            answer = model(**tokenizer(CAPTIONS, padding=True, return_tensors="pt"), pixel_values=pixels)
        rows.append(answer.logits_per_image.double().mean(dim=0))
    logits = torch.stack(rows)
    scale = float(model.logit_scale.exp())
    assert found.plain == pytest.approx(float(logits.diagonal().mean()) / scale, abs=1e-5)
    assert found.among_candidates == pytest.approx(float(logits.softmax(dim=1).diagonal().mean()), abs=1e-4)
    assert (found.candidates, found.clips) == (3, 3)
    assert found.first == pytest.approx(float((logits.argmax(dim=1) == torch.arange(3)).double().mean()))


class Known(ClipScorer):
    """Texts are unit vectors; a frame is the colour it has."""

    def __init__(self) -> None:
        self._model = type("Model", (), {"logit_scale": torch.tensor(np.log(10.0))})

    def _frame_features(self, clip: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(clip[:, 0, 0] / 255.0)

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(3, dtype=torch.float64)[[("red", "green", "blue").index(text) for text in texts]]


def test_by_hand() -> None:
    clip = np.zeros((2, 1, 1, 3), np.uint8)
    clip[:, ..., 0] = 255  # both frames red
    half = clip.copy()
    half[1, ..., 0], half[1, ..., 1] = 0, 255  # red, then green
    found = Known().score([clip, half], ["red", "green"], ["blue", "red", "green"])
    assert found.plain == pytest.approx((1 + 0.5) / 2)
    e = np.exp
    assert found.among_candidates == pytest.approx((e(10) / (e(10) + 2) + e(5) / (2 * e(5) + 1)) / 2)
    assert (found.candidates, found.clips) == (3, 2)


def test_captions_shared_by_clips_are_one_candidate() -> None:
    found = Known().score([np.full((1, 1, 1, 3), 255, np.uint8)] * 3, ["red", "red", "blue"])
    assert found.candidates == 2 and found.among_candidates == pytest.approx(0.5)


def test_frames_of_any_size_are_fitted(folder: Path) -> None:
    scorer = ClipScorer(str(folder))
    assert scorer.score(clips(1, side=40), ["a"]).clips == 1
    flat = [np.full((2, side, side, 3), 90, np.uint8) for side in (SIZE, 50)]
    one, other = (scorer.score([clip], ["a blue star"]) for clip in flat)
    assert one.plain == pytest.approx(other.plain, abs=1e-6)


def test_a_folder_is_told_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ClipScorer(str(folder)).source == folder.name
    monkeypatch.chdir(folder)
    assert ClipScorer(".").source == folder.name


def test_its_own_preprocessing_is_taken(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    plain = ClipScorer(str(folder)).score(clips(1), ["a"]).plain
    (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}))
    assert ClipScorer(str(tmp_path / "other")).score(clips(1), ["a"]).plain != pytest.approx(plain, abs=1e-6)


def test_what_does_not_fit_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 captions are no candidates, such as 'pink'"):
        Known().score(clips(2), ["red", "pink"], ["red"])
    with pytest.raises(ValueError, match="2 clips need as many captions"):
        Known().score(clips(2), ["red"])
    words = r"CLIP for similarity not found: --clip is .*hf download openai/clip-vit.*\(the files lie at its root\)"
    with pytest.raises(EncoderNotFound, match=words):
        ClipScorer(str(tmp_path))
    shutil.copytree(folder, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(EncoderNotFound, match="loading it fails"):
        ClipScorer(str(tmp_path / "torn"))
    shutil.copytree(folder, tmp_path / "odd")
    for text in ('{"image_std": [0, 1, 1]}', '{"image_mean": "grey"}', '{"image_mean": [0.5]}', '{"image_std": [NaN, 1, 1]}', "["):
        (tmp_path / "odd" / "preprocessor_config.json").write_text(text)
        with pytest.raises(EncoderNotFound, match=r"--clip is .*preprocessor_config.json' cannot be used"):
            ClipScorer(str(tmp_path / "odd"))
