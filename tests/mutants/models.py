"""Wrongs of the network, the encoders and where their weights wait."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MODELS = (
    Mutant(
        name="frame_mask not applied to the convolutions",
        file="rdtf_ds/models/sti.py",
        old='rearrange(mask_frames(hidden, frame_mask), "(b f) c h w -> b c f (h w)"',
        new='rearrange(hidden, "(b f) c h w -> b c f (h w)"',
        tests=("tests/models/test_sti.py",),
    ),
    Mutant(
        name="padded frames are attended to",
        file="rdtf_ds/models/sti.py",
        old="key_mask = repeat(frame_mask,",
        new="key_mask = repeat(torch.ones_like(frame_mask),",
        tests=("tests/models/test_sti.py",),
    ),
    Mutant(
        name="gamma ignored",
        file="rdtf_ds/models/sti.py",
        old="gamma = self.gamma or default_gamma(min(height, width))",
        new="gamma = default_gamma(min(height, width))",
        tests=("tests/models/test_sti.py",),
    ),
    Mutant(
        name="frame positions left out",
        file="rdtf_ds/models/sti.py",
        old="self.norm(hidden) + frame_positions(",
        new="self.norm(hidden) + 0 * frame_positions(",
        tests=("tests/models/test_sti.py",),
    ),
    Mutant(
        name="frame positions count padded frames",
        file="rdtf_ds/models/sti.py",
        old="if frame_mask is None else frame_mask.sum(dim=1)",
        new="if frame_mask is None else 0 * frame_mask.sum(dim=1) + frames",
        tests=("tests/models/test_sti.py",),
    ),
    Mutant(
        name="frame_mask does not reach the temporal layers",
        file="rdtf_ds/models/dfgn.py",
        old="self.temporals[i](hidden, frames, frame_mask)",
        new="self.temporals[i](hidden, frames, None)",
        tests=("tests/models/test_dfgn.py",),
    ),
    Mutant(
        name="hidden words reach one encoder only",
        file="rdtf_ds/models/text_conditioning.py",
        old="tokens = self._tokens(self.t5_tokenizer, caption)",
        new='tokens = self._tokens(self.t5_tokenizer, caption.replace("#", ""))',
        tests=("tests/models/test_text_conditioning.py",),
    ),
    Mutant(
        name="frames of different clips look at each other's text",
        file="rdtf_ds/models/spatial.py",
        old='rearrange(layer.to_q(hidden_states), "(b f) n (g d)',
        new='rearrange(layer.to_q(hidden_states), "(f b) n (g d)',
        tests=("tests/models/test_spatial.py",),
    ),
    Mutant(
        name="selective checkpointing keeps what is cheap",
        file="rdtf_ds/models/recompute.py",
        old="multiply_adds_per_element(operation, args) >= keep_from",
        new="multiply_adds_per_element(operation, args) < keep_from",
        tests=("tests/models/test_recompute.py",),
    ),
    Mutant(
        name="an offloaded autoencoder is called where it waits",
        file="rdtf_ds/models/autoencoder.py",
        old="    @apply_forward_hook\n    def encode",
        new="    def encode",
        tests=("tests/test_offload.py",),
    ),
    Mutant(
        name="encoders stay on the device after a pass",
        file="rdtf_ds/models/visiting.py",
        old="            tensor.data = home\n",
        new="            pass\n",
        tests=("tests/models/test_visiting.py",),
    ),
)
