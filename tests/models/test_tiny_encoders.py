"""Tiny encoders: one token per word, words kept apart, same weights every time, the real ones' layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

from rdtf_ds.data.synthetic import COLOURS, MOTIONS, SHAPES, all_stickers
from rdtf_ds.models.text_conditioning import TextEncoders
from rdtf_ds.models.tiny_encoders import STICKER_WORDS, tiny_autoencoder, tiny_clip, tiny_t5, write_tiny_encoders
from rdtf_ds.seeding import torch_generator

STICKERS = all_stickers(held_out=False) + all_stickers(held_out=True)


def test_vocabulary_is_the_words_of_the_synthetic_captions():
    words = {word for sticker in STICKERS for word in sticker.caption.split()}
    assert words | {"#"} == set(STICKER_WORDS)


def test_each_word_is_one_token_in_both_tokenizers():
    for tokenizer in (tiny_clip()[1], tiny_t5()[1]):
        ids = [tokenizer(word, add_special_tokens=False).input_ids for word in STICKER_WORDS]
        assert all(len(tokens) == 1 for tokens in ids)
        assert len({tokens[0] for tokens in ids}) == len(STICKER_WORDS)
        caption = tokenizer("a red # # right", add_special_tokens=False).input_ids
        assert caption == [ids[STICKER_WORDS.index(word)][0] for word in ("a", "red", "#", "#", "right")]


def test_any_other_text_is_spelt_out():
    clip, t5 = tiny_clip()[1], tiny_t5()[1]
    assert clip("starred", add_special_tokens=False).input_ids != clip("star", add_special_tokens=False).input_ids
    for text in ("starlight", "犬が走る", "naïve así ☃ 😀"):
        pieces = clip.tokenize(text)
        assert clip.unk_token_id not in clip.convert_tokens_to_ids(pieces)
        assert len("".join(piece.removesuffix("</w>") for piece in pieces)) == len(text.replace(" ", "").encode())  # a letter per byte
    assert "".join(t5.tokenize("zebra crossing")).replace("▁", "") == "zebracrossing"
    assert len(t5.tokenize("zebra")) == 6


def test_words_with_shared_parts_still_become_single_tokens():
    words = ("grow", "grows", "rows", "row", "low", "slow", "slower")
    clip = tiny_clip(16, words)[1]
    assert [len(clip.tokenize(word)) for word in words] == [1] * len(words)


def _probe(features: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> float:
    """Accuracy on one half of the captions of a ridge regression on one-hot labels that saw the other half."""
    train, test = order.chunk(2)
    inputs = features - features[train].mean(0)
    targets = torch.nn.functional.one_hot(labels).float()
    centre = targets[train].mean(0)
    gram = inputs[train] @ inputs[train].T
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(train))
    weights = inputs[train].T @ torch.linalg.solve(gram + ridge, targets[train] - centre)
    return float(((inputs[test] @ weights + centre).argmax(1) == labels[test]).float().mean())


def test_a_linear_probe_reads_colour_shape_and_motion_from_unseen_captions():
    encoders = TextEncoders.from_pretrained("tiny", "tiny", 16)
    order = torch.randperm(len(STICKERS), generator=torch_generator("probe"))
    for features in encoders.encode([sticker.caption for sticker in STICKERS]):
        for names, attribute in ((list(COLOURS), "colour"), (SHAPES, "shape"), (MOTIONS, "motion")):
            labels = torch.tensor([names.index(getattr(sticker, attribute)) for sticker in STICKERS])
            assert _probe(features.mean(1), labels, order) >= 0.95  # mean over tokens: no help from the word's position


def test_a_word_stays_itself_in_any_sentence_and_words_differ():
    encoders = TextEncoders.from_pretrained("tiny", "tiny", 16)
    features = encoders.encode(["a red circle rises", "a blue circle rises", "# red star slides left"])
    for tokens, place in ((features.clip, 2), (features.t5, 1)):
        red, blue, red_elsewhere = torch.nn.functional.normalize(tokens[:, place], dim=-1)
        assert red @ blue < 0.4 and red @ red_elsewhere > 0.9
        assert not torch.equal(red, red_elsewhere)  # the sentence shows
    words = features.clip[0, 1:5], features.t5[0, :4]
    for tokens in words:
        assert tokens.square().mean() == pytest.approx(1.0, abs=0.05)


def test_embeddings_of_the_words_are_orthogonal_and_of_unit_variance():
    clip, clip_tokenizer = tiny_clip()
    t5, t5_tokenizer = tiny_t5()
    for table, tokenizer in ((clip.get_input_embeddings().weight, clip_tokenizer), (t5.shared.weight, t5_tokenizer)):
        rows = table[[tokenizer(word, add_special_tokens=False).input_ids[0] for word in STICKER_WORDS]]
        torch.testing.assert_close(rows @ rows.T, 64 * torch.eye(len(STICKER_WORDS)), rtol=0, atol=1e-3)


def test_weights_are_the_same_on_every_call_and_leave_torchs_seed_alone():
    torch.manual_seed(1)
    first = [tiny_clip()[0], tiny_t5()[0], tiny_autoencoder()]
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    for one, other in zip(first, [tiny_clip()[0], tiny_t5()[0], tiny_autoencoder()], strict=True):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name]), name


def test_folder_has_the_real_layout_and_loads_by_the_real_classes(tmp_path: Path):
    write_tiny_encoders(tmp_path, width=32, vocabulary=("red", "zebra"))
    assert {path.name for path in tmp_path.iterdir()} == {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"}
    assert CLIPTextModel.from_pretrained(tmp_path / "text_encoder").config.hidden_size == 32
    assert T5EncoderModel.from_pretrained(tmp_path / "text_encoder_2").config.d_model == 32
    assert CLIPTokenizer.from_pretrained(tmp_path / "tokenizer").tokenize("zebra") == ["zebra</w>"]
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer_2").tokenize("red zebra") == ["▁red", "▁zebra"]
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.latent_channels == 4
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 2 * 2**20


def test_autoencoder_scales_patches_to_about_unit_variance():
    vae = tiny_autoencoder()
    patches = torch.rand(4, 3, 6, 6, generator=torch_generator("other patches")).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        latents = vae.encode(2 * patches - 1).latent_dist.mode() * vae.config.scaling_factor
    assert latents.shape == (4, 4, 6, 6)
    assert 0.5 < latents.square().mean().sqrt() < 2
