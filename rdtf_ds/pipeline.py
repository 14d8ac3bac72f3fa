"""RDTFPipeline: captions and pictures in, animated stickers out, in the manner of diffusers' video pipelines.

Two-way classifier-free guidance (T caption, I visible frames, ∅ absent):
    ε = ε(∅,∅) + s_I·[ε(∅,I) − ε(∅,∅)] + s_T·[ε(T,I) − ε(∅,I)]
Legend: B clips, P passes of guidance, F frames, C latent channels, h w latent size, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils import BaseOutput
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from rdtf_ds.clip_requests import ClipRequest, Frames, Generators, Seeds, clip_requests
from rdtf_ds.data.clips.clip import letterbox
from rdtf_ds.data.sources.captions import NO_CAPTION, hide_words
from rdtf_ds.diffusion.guidance import combine_guidance, latent_guidance, pixel_guidance
from rdtf_ds.errors import UserError
from rdtf_ds.models.autoencoder import FrameAutoencoder, HaarAutoencoder  # noqa: F401  diffusers finds the class by its imported module
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextEncoders, TextFeatures
from rdtf_ds.seeding import numpy_generator, torch_generator

MIN_FRAMES = 3  # the fewest frames of a training clip


@dataclass
class RDTFOutput(BaseOutput):
    """``frames``: uint8 (B, F, H, W, 3); with ``output_type="pil"`` B lists of F images; with ``"latent"`` float32 (B, C, F, h, w)."""

    frames: np.ndarray | list[list[Image.Image]] | Tensor


class Conditioning(NamedTuple):
    """What the P passes of one step differ in, stacked pass by pass: (P·B, …), and which passes there are."""

    visual: Tensor
    text: TextFeatures
    has_image: bool
    has_text: bool

    @property
    def passes(self) -> int:
        """1 + one for visible frames + one for captions."""
        return 1 + self.has_image + self.has_text


def ddim_scheduler(schedule: str, steps: int, beta_start: float, beta_end: float) -> DDIMScheduler:
    """The sampler of a model trained on ε under these β (Table 6).

    Steps are ``trailing``: they start at the last trained timestep, whose latents are as good as the pure noise sampling starts from,
    and the last one lands on the clean clip (α = 1), so that the picture keeps no noise.
    """
    return DDIMScheduler(
        num_train_timesteps=steps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=schedule,
        prediction_type="epsilon",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


class RDTFPipeline(DiffusionPipeline):
    """Animated stickers from a caption, from pictures that are some of the frames, or from both.

    Generation: a caption, or one frame, or both. Prediction: the first or last frames are given. Interpolation: those in between are
    missing.

    Args:
        unet: DFGN.
        vae: AutoencoderKL or HaarAutoencoder.
        text_encoder, tokenizer: CLIP.
        text_encoder_2, tokenizer_2: T5's encoder.
        scheduler: DDIM with the trained β; see :func:`ddim_scheduler`.
        image_size: side of the square clips, pixels.
        max_frames: of a clip; noise is drawn for so many and cut.
        text_length: tokens of each encoder.
        background: colour behind transparent pixels and beside pictures that are not square.
        steps, eta, text_scale, image_scale: defaults of a call.
        slice_frames: frames that pass through the autoencoder at once.
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
        scheduler: DDIMScheduler,
        image_size: int = 256,
        max_frames: int = 8,
        text_length: int = 77,
        background: tuple[int, int, int] | list[int] = (255, 255, 255),
        steps: int = 50,
        eta: float = 1.0,
        text_scale: float = 7.5,
        image_scale: float = 7.5,
        slice_frames: int = 8,
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
        self.register_to_config(slice_frames=slice_frames)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **kwargs: Any) -> RDTFPipeline:  # type: ignore[override]
        """Loads an exported folder (or hub id), as DiffusionPipeline.from_pretrained; needs no network for a folder.

        ``torch_dtype`` applies to all parts but T5, which overflows in float16 and then stays float32.

        Raises:
            UserError: a path that is no exported model.
        """
        path = Path(folder)
        looks_local = path.exists() or path.is_absolute() or str(folder).startswith(".") or len(path.parts) > 2
        if looks_local and not (path / "model_index.json").is_file():
            raise UserError(
                f"'{folder}' is no exported model: it has no model_index.json. Make one with tools/export_fp16.py CHECKPOINT OUT."
            )
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if dtype == torch.float16:
            dtype = {"default": torch.float16, "text_encoder_2": torch.float32}
        return super().from_pretrained(folder, dtype=dtype, **kwargs)

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
        keep_given_frames: bool = True,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[RDTFPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> RDTFOutput | tuple[np.ndarray | list[list[Image.Image]] | Tensor]:
        """Makes clips.

        Args:
            prompt: one caption, or one for each clip; None or blank leaves the caption term out.
            frames: visible frames by frame number (0 is the first), for all clips or one mapping for each; pictures of any size, RGB or
                RGBA; they are fitted into the square on the background. None or empty leaves the image term out.
            num_frames: 3 to ``max_frames``; None: ``max_frames``.
            num_inference_steps, eta, text_scale, image_scale: None takes the model's defaults.
            seeds: one for each clip; one number s means s, s + 1, …. A clip depends on its own seed alone, not on its neighbours.
            generator: in place of seeds, diffusers' way; seeds are drawn from it. Neither: seeds come from torch's global generator.
            keep_given_frames: the given pictures stand in the result as they were given; False leaves what the model made of them.
            output_type: ``np`` (uint8), ``pil`` or ``latent``.
            callback_on_step_end: called as (pipeline, step number, timestep, {"latents": …}); what it returns replaces the latents.

        Raises:
            UserError: inputs that do not fit each other or the model, or a model that made NaN.
        """
        config = self.config
        num_frames = config.max_frames if num_frames is None else num_frames
        num_inference_steps = config.steps if num_inference_steps is None else num_inference_steps
        self._check_numbers(num_frames, num_inference_steps, output_type)
        requests = clip_requests(prompt, frames, seeds, generator, num_frames)
        eta = config.eta if eta is None else eta
        scales = (config.image_scale if image_scale is None else image_scale, config.text_scale if text_scale is None else text_scale)

        pixels, visible = self._visible_pixels(requests, num_frames)
        condition = self._condition([request.prompt for request in requests], pixels, visible)
        latents = self._denoise(
            condition,
            _NoiseSource([request.seed for request in requests], self._noise_shape()),
            num_frames,
            num_inference_steps,
            eta,
            scales,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        if not torch.isfinite(latents).all():
            raise UserError(
                f"the model made NaN or infinite values in {self.unet.dtype}. Load it with torch_dtype=torch.float32 (generate.py: "
                "--dtype float32); if that fails too, the exported training run has diverged."
            )
        result = latents if output_type == "latent" else self._pictures(latents, pixels, visible & keep_given_frames, output_type)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        return RDTFOutput(frames=result) if return_dict else (result,)

    def _check_numbers(self, num_frames: int, num_inference_steps: int, output_type: str) -> None:
        if not MIN_FRAMES <= num_frames <= self.config.max_frames:
            raise UserError(f"num_frames is {num_frames}; this model makes {MIN_FRAMES} to {self.config.max_frames} frames.")
        trained = self.scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= trained:
            raise UserError(f"num_inference_steps is {num_inference_steps}; choose 1 to {trained}.")
        if output_type not in ("np", "pil", "latent"):
            raise UserError(f"output_type is {output_type!r}; choose np, pil or latent.")

    def _visible_pixels(self, requests: list[ClipRequest], num_frames: int) -> tuple[Tensor, Tensor]:
        """The given pictures as uint8 (B, 3, F, H, W), zero where there is none, and the condition mask (B, F) bool; both on the CPU."""
        size = self.config.image_size
        pixels = torch.zeros(len(requests), 3, num_frames, size, size, dtype=torch.uint8)
        visible = torch.zeros(len(requests), num_frames, dtype=torch.bool)
        for clip, request in enumerate(requests):
            for number, picture in request.pictures.items():
                fitted = letterbox(picture, size, tuple(self.config.background))
                pixels[clip, :, number] = rearrange(torch.from_numpy(fitted.copy()), "h w c -> c h w")
                visible[clip, number] = True
        return pixels, visible

    def _condition(self, prompts: list[str | None], pixels: Tensor, visible: Tensor) -> Conditioning:
        """Visual and text guidance of every pass; passes that would equal the one before are left out."""
        has_image, has_text = bool(visible.any()), any(prompts)
        no_image = self._visual_guidance(pixels, torch.zeros_like(visible))
        image = self._visual_guidance(pixels, visible)
        # The same words hidden as in training: a caption of n words without text is n times "#".
        hidden = [hide_words(prompt, 1.0, numpy_generator(0)) if prompt else NO_CAPTION for prompt in prompts]
        captions = [prompt or no_text for prompt, no_text in zip(prompts, hidden, strict=True)]
        visual, text = [no_image], hidden.copy()
        if has_image:
            visual, text = visual + [image], text + hidden
        if has_text:
            visual, text = visual + [image], text + captions
        return Conditioning(torch.cat(visual), self._encode_text(text), has_image, has_text)

    def _encode_text(self, captions: list[str]) -> TextFeatures:
        encoders = TextEncoders(
            clip_tokenizer=self.tokenizer,
            clip=self.text_encoder,
            t5_tokenizer=self.tokenizer_2,
            t5=self.text_encoder_2,
            text_length=self.config.text_length,
        )
        return encoders.to(self._execution_device).encode(captions).to(dtype=self.unet.dtype)

    def _visual_guidance(self, pixels: Tensor, visible: Tensor) -> Tensor:
        """Guidance channels (B, C or 4, F, h, w) of the visible frames, zero elsewhere, as in training."""
        autoencoder = self._autoencoder()
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

    def _autoencoder(self) -> FrameAutoencoder:
        return FrameAutoencoder(self.vae, self.config.slice_frames).to(self._execution_device)

    def _noise_shape(self) -> tuple[int, ...]:
        side = self.config.image_size // self._autoencoder().factor
        return self.unet.config.out_channels, self.config.max_frames, side, side

    def _denoise(
        self,
        condition: Conditioning,
        noise: _NoiseSource,
        num_frames: int,
        steps: int,
        eta: float,
        scales: tuple[float, float],
        callback: Callable[..., dict[str, Tensor]] | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """The DDIM loop, latents in float32 whatever the model's dtype: float32 (B, C, F, h, w)."""
        device = self._execution_device
        latents = noise.draw(num_frames).to(device)
        self.scheduler.set_timesteps(steps, device=device)
        with self.progress_bar(total=steps) as bar:
            for number, timestep in enumerate(self.scheduler.timesteps):
                epsilon = self._guided_noise(latents, timestep, condition, scales)
                fresh = noise.draw(num_frames).to(device) if eta > 0 else None
                latents = self.scheduler.step(epsilon, timestep, latents, eta=eta, variance_noise=fresh, return_dict=False)[0]
                if callback is not None:
                    offered = {name: {"latents": latents}[name] for name in callback_inputs}
                    latents = callback(self, number, timestep, offered).pop("latents", latents)
                bar.update()
        return latents

    def _guided_noise(self, latents: Tensor, timestep: Tensor, condition: Conditioning, scales: tuple[float, float]) -> Tensor:
        """One step's ε (B, C, F, h, w) float32: all passes in one batch, then two-way guidance."""
        sample = torch.cat([latents.to(self.unet.dtype)] * condition.passes)
        sample = torch.cat([sample, condition.visual], dim=1)  # noisy latents first, guidance after them
        epsilon = self.unet(sample, timestep.expand(len(sample)), condition.text).float()
        eps = list(epsilon.chunk(condition.passes))
        eps_none = eps.pop(0)
        eps_image = eps.pop(0) if condition.has_image else eps_none
        eps_both = eps.pop(0) if condition.has_text else eps_image
        image_scale, text_scale = scales
        return combine_guidance(eps_none, eps_image, eps_both, image_scale=image_scale, text_scale=text_scale)

    def _pictures(self, latents: Tensor, pixels: Tensor, kept: Tensor, output_type: str) -> np.ndarray | list[list[Image.Image]]:
        decoded = self._autoencoder().decode(latents).cpu()
        made = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        made = torch.where(rearrange(kept, "b f -> b 1 f 1 1"), pixels, made)
        clips = rearrange(made, "b c f h w -> b f h w c").contiguous().numpy()
        return clips if output_type == "np" else [[Image.fromarray(frame) for frame in clip] for clip in clips]


class _NoiseSource:
    """Noise of every clip from its own seed, drawn for ``max_frames`` frames and cut: neither neighbours nor length change it."""

    def __init__(self, seeds: list[int], shape: tuple[int, ...]) -> None:
        self.generators = [torch_generator(seed, "sampling noise") for seed in seeds]
        self.shape = shape

    def draw(self, num_frames: int) -> Tensor:
        """The next noise, float32 (B, C, F, h, w) on the CPU."""
        return torch.stack([torch.randn(self.shape, generator=generator)[:, :num_frames] for generator in self.generators])
