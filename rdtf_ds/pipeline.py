"""RDTFPipeline: captions and pictures in, animated stickers out, in the manner of diffusers' video pipelines.

Legend: B clips, P passes of guidance (`rdtf_ds.passes`), F frames, C latent channels, h w latent size, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from rdtf_ds import samplers
from rdtf_ds.clip_requests import ClipRequest, Frames, Generators, Seeds, clip_requests, frame_durations, picture_pixels
from rdtf_ds.data.sources.captions import NO_CAPTION, hide_words
from rdtf_ds.diffusion.guidance import latent_guidance, pixel_guidance
from rdtf_ds.errors import UserError
from rdtf_ds.exported_model import PARTS, check_model
from rdtf_ds.models.autoencoder import FrameAutoencoder, HaarAutoencoder  # noqa: F401  diffusers finds the class by its imported module
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextEncoders, TextFeatures
from rdtf_ds.passes import Passes
from rdtf_ds.seeding import numpy_generator

MIN_FRAMES = 2  # one less than any training clip has; a single frame is no clip


@dataclass
class RDTFOutput(BaseOutput):
    """``frames``: uint8 (B, F, H, W, 3); with ``output_type="pil"`` B lists of F images; with ``"latent"`` float32 (B, C, F, h, w).

    ``durations_ms``: B lists of F numbers, how long each frame is shown.
    """

    frames: np.ndarray | list[list[Image.Image]] | Tensor
    durations_ms: list[list[int]]


class Settings(NamedTuple):
    """What a call goes by once the model's defaults are filled in; ``eta`` is None where the sampler has none."""

    num_frames: int
    steps: int
    sampler: str
    eta: float | None
    text_scale: float
    image_scale: float


class Conditioning(NamedTuple):
    """What the P passes of every step are shown, stacked pass by pass: (P·B, …)."""

    passes: Passes
    visual: Tensor
    text: TextFeatures


class RDTFPipeline(DiffusionPipeline):
    """Animated stickers from a caption, from pictures that are some of the frames, or from both.

    Generation: a caption, or one frame, or both. Prediction: the first or last frames are given. Interpolation: those in between are
    missing.

    Args:
        unet: DFGN.
        vae: AutoencoderKL or HaarAutoencoder.
        text_encoder, tokenizer: CLIP.
        text_encoder_2, tokenizer_2: T5's encoder.
        scheduler: the sampler a call uses by default, with the trained β; see :func:`rdtf_ds.samplers.make_sampler`.
        image_size: side of the square clips, pixels.
        max_frames: of a clip; noise is drawn for so many and cut.
        text_length: tokens of each encoder.
        background: colour behind transparent pixels and beside pictures that are not square.
        steps, eta, text_scale, image_scale: defaults of a call; samplers without η do without it.
        slice_frames: frames that pass through the autoencoder at once.
        frame_ms: how long a frame is shown, unless a call says otherwise.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _callback_tensor_inputs = ["latents"]

    # what diffusers' register_modules and register_to_config set
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    text_encoder_2: Any
    tokenizer_2: Any
    scheduler: Any
    config: Any

    def __init__(
        self,
        unet: DFGN,
        vae: ModelMixin,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        image_size: int = 256,
        max_frames: int = 8,
        text_length: int = 77,
        background: tuple[int, int, int] | list[int] = (255, 255, 255),
        steps: int = 50,
        eta: float = 1.0,
        text_scale: float = 7.5,
        image_scale: float = 7.5,
        slice_frames: int = 8,
        frame_ms: int = 120,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            scheduler=scheduler,
        )
        self.register_to_config(image_size=image_size, max_frames=max_frames, text_length=text_length, background=tuple(background))
        self.register_to_config(steps=steps, eta=eta, text_scale=text_scale, image_scale=image_scale)
        self.register_to_config(slice_frames=slice_frames, frame_ms=frame_ms)
        self._slice_frames = slice_frames
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **kwargs: Any) -> RDTFPipeline:  # type: ignore[override]
        """Loads an exported folder (or hub id), as DiffusionPipeline.from_pretrained; needs no network for a folder.

        ``torch_dtype`` applies to all parts but T5, which overflows in float16 and then stays float32.

        Raises:
            UserError: a path that is no exported model, or one of which something is missing or damaged.
        """
        path = Path(folder)
        if path.exists() or path.is_absolute() or str(folder).startswith(".") or len(path.parts) > 2:
            check_model(path, given=[name for name in PARTS if kwargs.get(name) is not None])
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if dtype == torch.float16:
            dtype = {"default": torch.float16, "text_encoder_2": torch.float32}
        return super().from_pretrained(folder, dtype=dtype, **kwargs)

    def enable_vae_slicing(self) -> None:
        """From now on frames pass through the autoencoder one by one: the least memory, the same pictures but for rounding."""
        self._slice_frames = 1

    def disable_vae_slicing(self) -> None:
        """Frames pass through the autoencoder ``slice_frames`` at once again."""
        self._slice_frames = self.config.slice_frames

    @property
    def interrupt(self) -> bool:
        """Whether the call under way was asked to stop; a callback asks by ``pipeline._interrupt = True``, as with diffusers.

        The steps that are left are then not made, and the result is what the latents were by then.
        """
        return self._interrupt

    def settings(
        self,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        text_scale: float | None = None,
        image_scale: float | None = None,
    ) -> Settings:
        """What a call with these arguments would go by.

        Raises:
            UserError: a value the model or the sampler has no use for.
        """
        config = self.config
        name = samplers.sampler_name(self.scheduler if sampler is None else samplers.swap_sampler(self.scheduler, sampler))
        if name != "ddim" and eta is not None and eta > 0:
            raise UserError(f"eta is {eta:g}, but the sampler {name} has none: leave eta out, or choose sampler='ddim'.")
        found = Settings(
            config.max_frames if num_frames is None else num_frames,
            config.steps if num_inference_steps is None else num_inference_steps,
            name,
            (config.eta if eta is None else eta) if name == "ddim" else None,
            config.text_scale if text_scale is None else text_scale,
            config.image_scale if image_scale is None else image_scale,
        )
        for key, value in (("num_frames", found.num_frames), ("num_inference_steps", found.steps)):
            if not isinstance(value, Integral):
                raise UserError(f"{key} is {value!r}; give a whole number.")
        if not MIN_FRAMES <= found.num_frames <= config.max_frames:
            raise UserError(f"num_frames is {found.num_frames}; this model makes {MIN_FRAMES} to {config.max_frames} frames.")
        trained = self.scheduler.config.num_train_timesteps
        if not 1 <= found.steps <= trained:
            raise UserError(f"num_inference_steps is {found.steps}; choose 1 to {trained}.")
        if found.eta is not None and not 0 <= found.eta <= 1:
            raise UserError(f"eta is {found.eta:g}; choose 0 (no noise is added while sampling) to 1.")
        for key in ("text_scale", "image_scale"):
            if not math.isfinite(getattr(found, key)):
                raise UserError(f"{key} is {getattr(found, key)}; choose a number, such as 7.5; 0 leaves its term out.")
        return found

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None = None,
        frames: Frames | Sequence[Frames | None] | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        text_scale: float | None = None,
        image_scale: float | None = None,
        seeds: Seeds | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        sampler: str | None = None,
        keep_given_frames: bool = True,
        fit: bool = False,
        unconditional: bool = False,
        durations_ms: int | Sequence[int] | None = None,
        max_batch: int | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[RDTFPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> RDTFOutput | tuple[np.ndarray | list[list[Image.Image]] | Tensor]:
        """Makes clips.

        Args:
            prompt: one caption, or one for each clip; None or blank leaves the caption term out.
            frames: visible frames by number (0 is the first), for all clips or one mapping for each: PIL images or uint8 arrays.
            num_frames, num_inference_steps, eta, text_scale, image_scale: None takes the model's defaults. 2 frames are fewer than any
                training clip had.
            seeds: one for each clip; one number s means s, s + 1, …. A clip depends on its own seed alone, not on its neighbours.
            generator: in place of seeds, diffusers' way; seeds are drawn from it. Neither: seeds come from torch's global generator.
            latents: (B, C, F, h, w), in place of the noise sampling starts from; the seeds stay those of noise added later.
            sampler: one of ``rdtf_ds.samplers.SAMPLERS`` in place of ``pipeline.scheduler``.
            keep_given_frames: the given pictures stand in the result as they were given; False leaves what the model made of them.
            fit: pictures of another size or with transparent pixels are fitted into the square, on the background; else refused.
            unconditional: clips with neither caption nor frame may be asked for.
            durations_ms: how long frames are shown, one number or one for each; None: the model's ``frame_ms``.
            max_batch: the most clips × passes of guidance that go through the network at once; None: all.
            output_type: ``np`` (uint8), ``pil`` or ``latent``.
            callback_on_step_end: called as (pipeline, step number, timestep, {"latents": …}); what it returns replaces the latents.

        Raises:
            UserError: inputs that do not fit each other or the model, or a model that made NaN.
        """
        settings = self.settings(num_frames, num_inference_steps, sampler, eta, text_scale, image_scale)
        _check_choices(output_type, max_batch, callback_on_step_end_tensor_inputs)
        clips = None if latents is None else len(latents)
        requests = clip_requests(prompt, frames, seeds, generator, settings.num_frames, clips=clips, unconditional=unconditional)
        durations = frame_durations(self.config.frame_ms if durations_ms is None else durations_ms, settings.num_frames)
        pixels, visible = self._visible_pixels(requests, settings.num_frames, fit)
        condition = self._condition([request.prompt for request in requests], pixels, visible, settings)
        noise = samplers.ClipNoise([request.seed for request in requests], self._noise_shape(), settings.num_frames)
        steps = samplers.StepOptions(max_batch, callback_on_step_end, callback_on_step_end_tensor_inputs)
        made = self._denoise(condition, noise, latents, settings, steps)
        result = made if output_type == "latent" else self._pictures(made, pixels, visible & keep_given_frames, output_type)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        return RDTFOutput(frames=result, durations_ms=[list(durations) for _ in requests]) if return_dict else (result,)

    def _visible_pixels(self, requests: list[ClipRequest], num_frames: int, fit: bool) -> tuple[Tensor, Tensor]:
        """The given pictures as uint8 (B, 3, F, H, W), zero where there is none, and the condition mask (B, F) bool; both on the CPU."""
        size = self.config.image_size
        pixels = torch.zeros(len(requests), 3, num_frames, size, size, dtype=torch.uint8)
        visible = torch.zeros(len(requests), num_frames, dtype=torch.bool)
        for clip, request in enumerate(requests):
            for number, picture in request.pictures.items():
                frame = picture_pixels(picture, number, size, tuple(self.config.background), fit)
                pixels[clip, :, number] = rearrange(torch.from_numpy(frame.copy()), "h w c -> c h w")
                visible[clip, number] = True
        return pixels, visible

    def _condition(self, prompts: list[str | None], pixels: Tensor, visible: Tensor, settings: Settings) -> Conditioning:
        """Visual and text guidance of every pass."""
        passes = Passes.plan(bool(visible.any()), any(prompts), settings.image_scale, settings.text_scale)
        # The same words hidden as in training: a caption of n words without text is n times "#".
        hidden = [hide_words(prompt, 1.0, numpy_generator(0)) if prompt else NO_CAPTION for prompt in prompts]
        captions = [prompt or no_text for prompt, no_text in zip(prompts, hidden, strict=True)]
        # In the order of `model_cpu_offload_seq`, but for the autoencoder, which is small.
        text = self.encode_text([caption for one in passes.conditions for caption in (captions if one.text else hidden)])
        visual = {shown: self._visual_guidance(pixels, visible & shown) for shown in {one.image for one in passes.conditions}}
        return Conditioning(passes, torch.cat([visual[one.image] for one in passes.conditions]), text)

    def encode_text(self, captions: list[str]) -> TextFeatures:
        """Features of captions in DFGN's dtype, on the device it computes on."""
        encoders = TextEncoders(
            clip_tokenizer=self.tokenizer,
            clip=self.text_encoder,
            t5_tokenizer=self.tokenizer_2,
            t5=self.text_encoder_2,
            text_length=self.config.text_length,
        )
        return encoders.encode(captions).to(self._execution_device, self.unet.dtype)

    def frame_autoencoder(self) -> FrameAutoencoder:
        """The autoencoder as this call uses it."""
        return FrameAutoencoder(self.vae, self._slice_frames)

    def _visual_guidance(self, pixels: Tensor, visible: Tensor) -> Tensor:
        """Guidance channels (B, C or 4, F, h, w) of the visible frames, zero elsewhere, as in training."""
        autoencoder = self.frame_autoencoder()
        device = self._execution_device
        side = self.config.image_size // autoencoder.factor
        frames = pixels.to(device, torch.float32) / 127.5 - 1
        mask = visible.to(device)
        if self.unet.config.guidance == "pixel":
            return pixel_guidance(frames, mask, (side, side)).to(self.unet.dtype)
        latents = torch.zeros(len(pixels), autoencoder.channels, pixels.shape[2], side, side, device=device)
        if mask.any():  # only visible frames are worth encoding: each as a clip of one frame
            chosen = rearrange(frames, "b c f h w -> b f c h w")[mask]
            encoded = autoencoder.encode(rearrange(chosen, "n c h w -> n c 1 h w"))
            rearrange(latents, "b c f h w -> b f c h w")[mask] = rearrange(encoded, "n c 1 h w -> n c h w")
        return latent_guidance(latents, mask).to(self.unet.dtype)

    def _noise_shape(self) -> tuple[int, ...]:
        side = self.config.image_size // self.frame_autoencoder().factor
        return self.unet.config.out_channels, self.config.max_frames, side, side

    def _denoise(
        self, condition: Conditioning, noise: samplers.ClipNoise, latents: Tensor | None, settings: Settings, options: samplers.StepOptions
    ) -> Tensor:
        """The sampling loop, latents in float32 whatever the model's dtype: float32 (B, C, F, h, w)."""
        device = self._execution_device
        start = noise.draw()
        if latents is not None and latents.shape != start.shape:
            raise UserError(f"latents are {tuple(latents.shape)}; these clips start from {tuple(start.shape)}.")
        latents = (start if latents is None else latents).to(device, torch.float32)
        own = samplers.sampler_name(self.scheduler) == settings.sampler
        scheduler = samplers.begin(self.scheduler if own else samplers.swap_sampler(self.scheduler, settings.sampler), settings.steps)
        self._interrupt = False
        with self.progress_bar(total=settings.steps) as bar:
            for number, timestep in enumerate(scheduler.timesteps):
                if self._interrupt:
                    break
                epsilon = self._guided_noise(latents, timestep, condition, options.max_batch)
                latents = samplers.step(scheduler, epsilon, timestep, latents, settings.eta or 0.0, lambda: noise.draw().to(device))
                latents = options.call_back(self, number, timestep, latents)
                bar.update()
        diverged = "the exported training run has diverged"
        _refuse_unless_finite(latents, "model", self.unet.dtype, "Take smaller guidance scales", diverged)
        return latents

    def _guided_noise(self, latents: Tensor, timestep: Tensor, condition: Conditioning, max_batch: int | None) -> Tensor:
        """One step's ε (B, C, F, h, w) float32: all passes in one batch, or in as many as ``max_batch`` asks for, then joined."""
        passes, visual, text = condition
        sample = torch.cat([latents.to(self.unet.dtype)] * len(passes))
        sample = torch.cat([sample, visual], dim=1)  # noisy latents first, guidance after them
        timesteps = timestep.to(sample.device).expand(len(sample))
        size = max_batch or len(sample)
        epsilon = [
            self.unet(sample[part], timesteps[part], TextFeatures(text.clip[part], text.t5[part])).float()
            for part in (slice(first, first + size) for first in range(0, len(sample), size))
        ]
        return passes.combine(torch.cat(epsilon).chunk(len(passes)))

    def _pictures(self, latents: Tensor, pixels: Tensor, kept: Tensor, output_type: str) -> np.ndarray | list[list[Image.Image]]:
        decoded = self.frame_autoencoder().decode(latents).cpu()
        other = "its weights are damaged or it is none for this model: export with another one (--encoders autoencoder=FOLDER)"
        _refuse_unless_finite(decoded, "autoencoder", self.vae.dtype, "Take smaller guidance scales", other)
        made = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        made = torch.where(rearrange(kept, "b f -> b 1 f 1 1"), pixels, made)
        clips = rearrange(made, "b c f h w -> b f h w c").contiguous().numpy()
        return clips if output_type == "np" else [[Image.fromarray(frame) for frame in clip] for clip in clips]


def _refuse_unless_finite(values: Tensor, who: str, dtype: torch.dtype, smaller: str, lost: str) -> None:
    """Bytes have no NaN: it would be shown as black.

    Args:
        who: made the values, in ``dtype``.
        smaller, lost: what may help in float32, and what is wrong if nothing does.
    """
    if not torch.isfinite(values).all():
        remedy = smaller if dtype == torch.float32 else "Take torch_dtype=torch.float32 (generate.py: --dtype float32)"
        raise UserError(f"the {who} made NaN or infinite values in {dtype}. {remedy}; if that fails too, {lost}.")


def _check_choices(output_type: str, max_batch: int | None, callback_inputs: Sequence[str]) -> None:
    if output_type not in ("np", "pil", "latent"):
        raise UserError(f"output_type is {output_type!r}; choose np, pil or latent.")
    if max_batch is not None and max_batch < 1:
        raise UserError(f"max_batch is {max_batch}; choose 1 or more, or None for no bound.")
    if unknown := set(callback_inputs) - {"latents"}:
        raise UserError(f"callback_on_step_end_tensor_inputs names {min(unknown)!r}; there is only 'latents'.")
