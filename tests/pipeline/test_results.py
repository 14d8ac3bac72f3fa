"""What comes out and in which form, what is refused, and a pipeline saved and loaded again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rdtf_ds import samplers
from rdtf_ds.errors import UserError
from rdtf_ds.models.autoencoder import FrameAutoencoder, HaarAutoencoder
from rdtf_ds.pipeline import RDTFPipeline
from tests.pipeline.known_unet import RED, known
from tests.small_models import FACTOR, SIDE, make_pipeline, small_dfgn


def test_output_types(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    call = lambda **options: pipeline("a star", num_frames=3, num_inference_steps=2, seeds=[1], **options)  # noqa: E731
    array = call().frames
    assert array.shape == (1, 3, SIDE, SIDE, 3) and array.dtype == np.uint8
    images = call(output_type="pil").frames
    assert len(images) == 1 and all(np.array_equal(image, frame) for image, frame in zip(images[0], array[0], strict=True))
    latents = call(output_type="latent").frames
    pixels = FrameAutoencoder(HaarAutoencoder(FACTOR)).decode(latents)
    expected = ((pixels + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 4, 1)
    assert np.array_equal(array, expected.numpy().astype(np.uint8))
    assert np.array_equal(call(return_dict=False)[0], array)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 1}, "num_frames is 1; this model makes 2 to 8"),
        ({"num_frames": 9}, "2 to 8"),
        ({"num_frames": "4"}, "num_frames is '4'; give a whole number"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; give a whole number"),
        ({"prompt": ["a", 5]}, "the prompt is int; give a text"),
        ({"prompt": b"a star"}, "the prompt is bytes; give a text"),
        ({"num_inference_steps": 0}, "1 to 1000"),
        ({"num_inference_steps": 1001}, "1 to 1000"),
        ({"frames": {5: RED}, "num_frames": 5}, "numbered 0 to 4"),
        ({"frames": {-1: RED}}, "numbered 0 to 7"),
        ({"frames": dict.fromkeys(range(3), RED), "num_frames": 3}, "leave at least one out"),
        ({"frames": {0: "a.png"}}, "PIL image"),
        ({"frames": {0: RED.astype(np.float32)}}, "float32"),
        ({"frames": {0: RED[:8]}}, "frame 0 is 16 x 8 pixels, but this model makes 16 x 16"),
        ({"prompt": ["a", "b"], "seeds": [1]}, "prompt: 2, seeds: 1"),
        ({"prompt": []}, "at least one"),
        ({"prompt": " "}, "neither a prompt nor a frame"),
        ({"prompt": None}, "unconditional=True"),
        ({"prompt": ["a", ""], "frames": None}, "clip 1 of 2 has neither"),
        ({"seeds": 1, "generator": torch.Generator()}, "one of them"),
        ({"output_type": "gif"}, "np, pil or latent"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"sampler": "euler"}, "'euler'; choose ddim, dpm.., unipc"),
        ({"sampler": "unipc", "eta": 0.5}, "eta is 0.5, but the sampler unipc has none"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"text_scale": float("nan")}, "text_scale is nan"),
        ({"image_scale": float("inf")}, "image_scale is inf"),
        ({"durations_ms": [100, 100]}, "2 numbers, but the clip has 8 frames"),
        ({"durations_ms": 5}, "holds 5"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'; there is only 'latents'"),
    ],
)
def test_requests_that_do_not_fit_are_refused(encoders, options, message):
    pipeline = known(encoders)
    with pytest.raises(UserError, match=message):
        pipeline(**{"prompt": "a star", **options})
    assert not pipeline.unet.samples


def test_two_frames_are_a_clip(encoders):
    output = make_pipeline(encoders, small_dfgn())("a star", {1: RED}, num_frames=2, num_inference_steps=2, seeds=0)
    assert output.frames.shape == (1, 2, SIDE, SIDE, 3) and np.array_equal(output.frames[0, 1], RED)


def test_durations_are_told_with_the_frames(encoders):
    pipeline = make_pipeline(encoders, small_dfgn(), frame_ms=90)
    call = lambda durations: pipeline(["a star"] * 2, num_frames=3, num_inference_steps=1, durations_ms=durations).durations_ms  # noqa: E731
    assert call(None) == [[90] * 3] * 2 and call(40) == [[40] * 3] * 2 and call([10, 200, 30]) == [[10, 200, 30]] * 2


def test_a_model_that_makes_nan_is_not_shown_as_black_pictures(encoders):
    with pytest.raises(UserError, match="NaN or infinite values in torch.float32. Take smaller guidance scales; if that fails too"):
        known(encoders, answers=(float("nan"), 0, 0, 0))(None, None, unconditional=True, num_inference_steps=1, seeds=0)
    half = make_pipeline(encoders, small_dfgn()).to(torch.bfloat16)
    with torch.no_grad():
        half.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(UserError, match="NaN or infinite values in torch.bfloat16. Take torch_dtype=torch.float32"):
        half("a star", num_frames=3, num_inference_steps=1, seeds=0)


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.bfloat16, r"Take torch_dtype=torch\.float32"), (torch.float32, "Take smaller .*its weights are damaged")]
)
def test_an_autoencoder_that_overflows_is_not_shown_as_black_pictures(encoders, monkeypatch, dtype, remedy):
    pipeline = make_pipeline(encoders, small_dfgn()).to(dtype)
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda latents: decode(latents).index_fill(2, torch.tensor([3]), float("nan")))
    call = lambda **options: pipeline("a star", num_frames=3, num_inference_steps=1, seeds=0, **options)  # noqa: E731
    with pytest.raises(UserError, match=rf"the autoencoder made NaN or infinite values in {dtype}\. {remedy}"):
        call()
    assert torch.isfinite(call(output_type="latent").frames).all()


def test_bfloat16_makes_about_the_same_clip(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    options = {"prompt": "a red star", "frames": {0: RED}, "num_inference_steps": 2, "seeds": [4]}
    clip = pipeline(**options).frames.astype(int)
    halved = pipeline.to(torch.bfloat16)(**options, output_type="latent").frames
    assert halved.dtype == torch.float32 and pipeline.unet.dtype == torch.bfloat16
    assert np.abs(pipeline(**options).frames - clip).mean() < 12


@pytest.mark.parametrize(("settings", "slices"), [({}, [8]), ({"slice_frames": 3}, [3, 3, 2])])
def test_frames_pass_through_the_autoencoder_in_slices(encoders, monkeypatch, settings, slices):
    pipeline = make_pipeline(encoders, small_dfgn(), **settings)
    seen = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda latents: (seen.append(len(latents)), decode(latents))[1])
    call = lambda: pipeline("a star", num_inference_steps=1, seeds=0).frames  # noqa: E731
    clip = call()
    assert seen == slices
    pipeline.enable_vae_slicing()
    assert np.array_equal(call(), clip) and seen[len(slices) :] == [1] * 8
    pipeline.disable_vae_slicing()
    call()
    assert seen[len(slices) + 8 :] == slices


# --- saved and loaded


def test_saved_pipeline_loads_and_makes_the_same_clip(encoders, tmp_path):
    pipeline = make_pipeline(encoders, small_dfgn(), background=(1, 2, 3), eta=0.5, slice_frames=5, frame_ms=70)
    options = {"prompt": "a red star", "frames": {0: RED}, "num_inference_steps": 2, "seeds": [4]}
    clip = pipeline(**options).frames
    pipeline.save_pretrained(tmp_path)
    loaded = RDTFPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.steps, loaded.config.eta, tuple(loaded.config.background)) == (4, 0.5, (1, 2, 3))
    assert (loaded.config.slice_frames, loaded.config.frame_ms) == (5, 70)
    assert np.array_equal(loaded(**options).frames, clip)
    half = RDTFPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16 and half.text_encoder.dtype == torch.float16
    assert half.text_encoder_2.dtype == torch.float32  # T5 overflows in fp16
    half.set_progress_bar_config(disable=True)
    assert np.abs(half(**options).frames.astype(int) - clip).mean() < 2


def test_an_export_from_before_there_were_these_settings_loads(encoders, tmp_path):
    make_pipeline(encoders, small_dfgn()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["slice_frames"], index["frame_ms"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = RDTFPipeline.from_pretrained(tmp_path)
    assert (loaded.config.slice_frames, loaded.config.frame_ms) == (8, 120)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_the_sampler_is_saved_with_the_model(encoders, tmp_path, sampler):
    pipeline = make_pipeline(encoders, small_dfgn())
    pipeline.scheduler = samplers.make_sampler(sampler, "linear", 1000, 0.00085, 0.012)
    pipeline.save_pretrained(tmp_path)
    loaded = RDTFPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.settings().sampler == sampler
    options = {"prompt": "a star", "num_frames": 3, "seeds": 1, "output_type": "latent"}
    assert torch.equal(loaded(**options).frames, pipeline(**options).frames)


def test_a_folder_that_is_no_export_is_named(tmp_path):
    with pytest.raises(UserError, match="model_index.json"):
        RDTFPipeline.from_pretrained(tmp_path)
