"""The README.md of an exported model: what it is, how to use it, how it was trained, what it cannot do."""

from __future__ import annotations

import math
from string import Template

from rdtf_ds.checkpoints.weights import CheckpointWeights, Weights
from rdtf_ds.config import RDTFSection

_CARD = Template("""\
---
library_name: diffusers
pipeline_tag: text-to-video
tags: [animated-stickers, text-to-gif, image-to-video, frame-interpolation]
---

# DFGN, animated stickers of $side × $side pixels

Makes clips of 2 to $frames frames from a caption, from pictures that are some of the frames, or from both. Trained from scratch with
`rdtf_ds`; $parameters parameters, stored in $dtype.

```python
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.pipeline import RDTFPipeline

pipeline = RDTFPipeline.from_pretrained("FOLDER")  # on a GPU: torch_dtype=torch.$on_gpu, then .to("cuda")
clips = pipeline("$example", seeds=[0]).frames  # uint8 (clips, frames, height, width, 3)
write_clip(clips[0], "sticker.gif")
```

| task | call |
| --- | --- |
| text to animation | `pipeline("$example")` |
| picture and text to animation | `pipeline("$example", frames={0: picture})` |
| prediction | `pipeline(frames={0: first, 1: second})` |
| interpolation | `pipeline(frames={0: first, $last: last})` |

## Training

| | |
| --- | --- |
| optimizer steps | $step attempted, $applied applied |
| weights | $weights |
| noise | $noise |
| temporal layer, visual guidance | $layer, $guidance |
| curriculum | $curriculum |
| clips | $data |
| learning rate, seed | $rate, $seed |

## Parts

| folder | what | source |
| --- | --- | --- |
| `unet` | DFGN, $dtype | this training |
| `vae` | frozen autoencoder | `$vae` |
| `text_encoder`, `tokenizer` | frozen CLIP | `$clip` |
| `text_encoder_2`, `tokenizer_2` | frozen T5 encoder; overflows in fp16, so it stays in fp32 | `$t5` |
| `scheduler` | $sampler; defaults $steps steps, η $eta, text scale $text_scale, image scale $image_scale | |

The frozen parts keep the licences of their sources.

## Limits

Transparent pictures are put on the background colour $background; results are opaque. Captions beyond $text_length tokens are cut.
What the model draws follows its training clips, mistakes and biases included; quality was not measured by the export.
""")

_WEIGHTS = {"ema": "exponential mean over training (EMA $decay)", "master": "as they were at this step, fp32 masters"}


_SAMPLERS = {"ddim": "DDIM", "dpm++": "DPM-Solver++", "unipc": "UniPC"}


def model_card(section: RDTFSection, source: CheckpointWeights, weights: Weights, dtype: str) -> str:
    """The card's markdown, from the run's experiment, the checkpoint's manifest and what DFGN's weights are stored as."""
    data, diffusion, sampling, encoders = section.data, section.diffusion, section.sampling, section.encoders
    return _CARD.substitute(
        side=data.image_size,
        frames=data.frames,
        last=data.frames - 1,
        parameters=f"{sum(math.prod(shape) for shape in source.shapes().values()):,}",
        example="a red circle slides left" if data.data_dir is None else "a cat waves",
        dtype=dtype,
        on_gpu="float16" if dtype == "float32" else dtype,
        step=source.step,
        applied=source.manifest.get("applied_steps", source.step),
        weights=Template(_WEIGHTS[weights]).substitute(decay=section.ema.decay),
        noise=f"{diffusion.steps} steps, β {diffusion.schedule} {diffusion.beta_start} → {diffusion.beta_end}, ε-prediction",
        layer=section.model.temporal_layer,
        guidance=section.model.guidance,
        curriculum=section.curriculum.mode if data.dual_mask else "none (no dual mask)",
        data=f"{data.synthetic_clips} synthetic stickers" if data.data_dir is None else "a folder of captioned stickers",
        rate=section.optimizer.learning_rate,
        seed=section.seed,
        vae=encoders.autoencoder,
        clip=encoders.clip,
        t5=encoders.t5,
        sampler=_SAMPLERS[sampling.sampler],
        steps=sampling.steps,
        eta=sampling.eta,
        text_scale=sampling.text_scale,
        image_scale=sampling.image_scale,
        background=tuple(data.background),
        text_length=encoders.text_length,
    )
