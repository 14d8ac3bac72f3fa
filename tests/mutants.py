"""Small named wrongs, one of which at a time must make the suite fail: what ``make mutants`` puts into a copy of the code.

A test that passes with the wrong in place would not have noticed it in a change either. ``tests`` are the files that speak of what
is broken, so that a wrong costs seconds and not a run of the whole suite.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One wrong.

    Attributes:
        name: what is wrong.
        file: of the code, from the project's folder.
        old: text that stands exactly once in the file.
        new: what takes its place.
        tests: files of tests, at least one of which must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied_to(self, source: str) -> str:
        """The file with the wrong in it.

        Raises:
            ValueError: ``old`` does not stand exactly once in ``source``.
        """
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {found} times in {self.file}, it must stand there once")
        return source.replace(self.old, self.new)


_DIFFUSION = (
    Mutant(
        name="condition mask off by one",
        file="rdtf_ds/diffusion/masks.py",
        old="frame >= k - visible",
        new="frame > k - visible",
        tests=("tests/diffusion/test_masks.py",),
    ),
    Mutant(
        name="level counts the visible frames",
        file="rdtf_ds/diffusion/masks.py",
        old="sum(not visible for visible in mask)",
        new="sum(visible for visible in mask)",
        tests=("tests/diffusion/test_masks.py",),
    ),
    Mutant(
        name="loss mask ignored",
        file="rdtf_ds/diffusion/loss.py",
        old="torch.where(frame_mask[:, None, :, None, None], difference, 0.0)",
        new="torch.where(torch.ones_like(frame_mask)[:, None, :, None, None], difference, 0.0)",
        tests=("tests/diffusion/test_loss.py",),
    ),
    Mutant(
        name="loss divided by padded frames too",
        file="rdtf_ds/diffusion/loss.py",
        old="elements = frame_mask.sum(dim=1)",
        new="elements = torch.ones_like(frame_mask).sum(dim=1)",
        tests=("tests/diffusion/test_loss.py",),
    ),
    Mutant(
        name="noise scaled by 1 - sqrt(alpha)",
        file="rdtf_ds/diffusion/loss.py",
        old="(1 - alpha).sqrt()",
        new="(1 - alpha.sqrt())",
        tests=("tests/diffusion/test_loss.py",),
    ),
    Mutant(
        name="guidance terms swapped",
        file="rdtf_ds/diffusion/guidance.py",
        old="image_scale * (eps_image - eps_none) + text_scale * (eps_both - eps_image)",
        new="text_scale * (eps_image - eps_none) + image_scale * (eps_both - eps_image)",
        tests=("tests/diffusion/test_guidance.py",),
    ),
    Mutant(
        name="hidden frames guide and visible ones do not",
        file="rdtf_ds/diffusion/guidance.py",
        old="torch.where(_per_frame(condition_mask, latents)",
        new="torch.where(_per_frame(~condition_mask, latents)",
        tests=("tests/diffusion/test_guidance.py",),
    ),
)

_CURRICULUM = (
    Mutant(
        name="static schedule goes past its end",
        file="rdtf_ds/curriculum/static.py",
        old="min(applied_step / self.steps, 1.0)",
        new="applied_step / self.steps",
        tests=("tests/curriculum/test_static.py",),
    ),
    Mutant(
        name="PID sign flipped",
        file="rdtf_ds/curriculum/curriculum.py",
        old="self._static_level(static) - terms.total",
        new="self._static_level(static) + terms.total",
        tests=("tests/curriculum/test_curriculum.py",),
    ),
    Mutant(
        name="integral unclamped",
        file="rdtf_ds/curriculum/pid.py",
        old="integral = min(max(integral, -self.integral_limit), self.integral_limit)",
        new="integral = float(integral)",
        tests=("tests/curriculum/test_pid.py",),
    ),
    Mutant(
        name="derivative unfiltered",
        file="rdtf_ds/curriculum/pid.py",
        old="derivative = state.derivative + (slope - state.derivative) * dt",
        new="derivative = slope",
        tests=("tests/curriculum/test_pid.py",),
    ),
    Mutant(
        name="levels drawn twice as narrow",
        file="rdtf_ds/curriculum/curriculum.py",
        old="distance**2 / (2 * self.sigma**2)",
        new="distance**2 / self.sigma**2",
        tests=("tests/curriculum/test_curriculum.py",),
    ),
    Mutant(
        name="a skipped step moves the schedule",
        file="rdtf_ds/curriculum/curriculum.py",
        old="        if loss is None:\n            return state\n",
        new="        if loss is None:\n            return CurriculumState(state.applied_steps + 1, state.pid, state.buckets)\n",
        tests=("tests/curriculum/test_curriculum.py",),
    ),
)

_PLANS = (
    Mutant(
        name="delay + 1",
        file="rdtf_ds/data/step_plan.py",
        old="self._delay = delay\n",
        new="self._delay = delay + 1\n",
        tests=("tests/data/test_step_plan.py",),
    ),
    Mutant(
        name="every rank takes the first slice",
        file="rdtf_ds/data/step_plan.py",
        old="range(rank * micro_batch, len(self.samples)",
        new="range(0, len(self.samples)",
        tests=("tests/data/test_step_plan.py",),
    ),
    Mutant(
        name="task seed without the sample number",
        file="rdtf_ds/data/step_plan.py",
        old='numpy_generator(self.seed, *draw_key(number, "task", attempt))',
        new='numpy_generator(self.seed, *draw_key(0, "task", attempt))',
        tests=("tests/data/test_step_plan.py",),
    ),
    Mutant(
        name="noise seed without the sample number",
        file="rdtf_ds/data/dataset.py",
        old='torch_generator(self.seed, *draw_key(plan.sample_number, "noise", plan.attempt))',
        new='torch_generator(self.seed, *draw_key(0, "noise", plan.attempt))',
        tests=("tests/data/test_dataset.py",),
    ),
    Mutant(
        name="seed parts run together",
        file="rdtf_ds/seeding.py",
        old='f"{tag}{len(encoded)}:"',
        new='f"{tag}"',
        tests=("tests/test_seeding.py",),
    ),
)

_DATA = (
    Mutant(
        name="noise drawn for k frames only",
        file="rdtf_ds/data/dataset.py",
        old="torch.randn(self.latent.channels, self.frames,",
        new="torch.randn(self.latent.channels, plan.k,",
        tests=("tests/data/test_dataset.py",),
    ),
    Mutant(
        name="padded frames count as real",
        file="rdtf_ds/data/dataset.py",
        old="loss_mask(length, longest)",
        new="loss_mask(longest, longest)",
        tests=("tests/data/test_dataset.py",),
    ),
    Mutant(
        name="a cached sample takes the first frames",
        file="rdtf_ds/data/dataset.py",
        old="clip.take(self._choose(clip_id, plan).tolist(), text)",
        new="clip.take(range(plan.k), text)",
        tests=("tests/data/test_dataset.py",),
    ),
    Mutant(
        name="checksums of a cache are not compared",
        file="rdtf_ds/data/feature_cache.py",
        old="if checksum != self._sums[name][number]:",
        new="if not self._sums[name][number]:",
        tests=("tests/data/test_feature_cache.py",),
    ),
    Mutant(
        name="another text stands for one that is cached",
        file="rdtf_ds/data/feature_cache.py",
        old="return texts.index(wanted)",
        new="return 0",
        tests=("tests/data/test_feature_cache.py",),
    ),
    Mutant(
        name="a cache made with replaced weights fits",
        file="rdtf_ds/data/cache_header.py",
        old="return all(cached[part] == own[part] for part in known) and (",
        new="return (",
        tests=("tests/data/test_cache_header.py",),
    ),
    Mutant(
        name="a drop takes the only condition",
        file="rdtf_ds/data/dataset.py",
        old="(no_text and has_image)",
        new="no_text",
        tests=("tests/data/test_dataset.py",),
    ),
    Mutant(
        name="words hidden with the opposite probability",
        file="rdtf_ds/data/sources/captions.py",
        old="rng.random(len(words)) < probability",
        new="rng.random(len(words)) >= probability",
        tests=("tests/data/sources/test_captions.py",),
    ),
    Mutant(
        name="several frames of one cluster",
        file="rdtf_ds/data/clustering.py",
        old="np.flatnonzero(labels == label)",
        new="np.flatnonzero(labels >= label)",
        tests=("tests/data/test_clustering.py",),
    ),
    Mutant(
        name="a clip is barred one step early",
        file="rdtf_ds/data/quarantine.py",
        old="self._barred_from[problem.content] = step + self._delay + 1",
        new="self._barred_from[problem.content] = step + self._delay",
        tests=("tests/data/test_quarantine.py",),
    ),
    Mutant(
        name="a worker hears of a barred clip one step early",
        file="rdtf_ds/data/quarantine.py",
        old="self._barred.append((step + self._delay + 1, problem.content))",
        new="self._barred.append((step + self._delay, problem.content))",
        tests=("tests/data/test_quarantine.py", "tests/data/test_loader.py"),
    ),
    Mutant(
        name="a share that holds nothing out is not doubted",
        file="rdtf_ds/data/indexing/split_check.py",
        old='fraction > 0 and not index.counts()["held_out"]',
        new='fraction > 1 and not index.counts()["held_out"]',
        tests=("tests/data/indexing/test_split_check.py",),
    ),
    Mutant(
        name="a pattern is searched in a window's own name",
        file="rdtf_ds/data/indexing/index.py",
        old='yield path if first == WHOLE else path.rpartition("#")[0]',
        new="yield path",
        tests=("tests/data/indexing/test_split_check.py",),
    ),
    Mutant(
        name="an index that a checkpoint names is removed",
        file="rdtf_ds/training/kept_index.py",
        old="            if path.name not in needed:\n",
        new="            if path.name != current.folder.name:\n",
        tests=("tests/training/test_kept_index.py",),
    ),
    Mutant(
        name="a tar packed by xz is read as one that is damaged",
        file="rdtf_ds/data/sources/tar.py",
        old='b"\\xfd7zXZ\\0": ".tar.xz"',
        new='b"\\xfd7zXZ": ".tar.zst"',
        tests=("tests/data/sources/test_sources.py",),
    ),
    Mutant(
        name="one strike is enough",
        file="rdtf_ds/data/quarantine.py",
        old="_STRIKES = 2",
        new="_STRIKES = 1",
        tests=("tests/data/test_quarantine.py",),
    ),
    Mutant(
        name="alpha ignored",
        file="rdtf_ds/data/clips/clip.py",
        old='canvas.paste(frame, mask=frame.getchannel("A") if frame.mode == "RGBA" else None)',
        new="canvas.paste(frame)",
        tests=("tests/data/clips/test_decoding.py",),
    ),
)

_MODELS = (
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
        name="a phase is counted from the start of the step",
        file="rdtf_ds/training/telemetry.py",
        old="            before = mark\n",
        new="",
        tests=("tests/training/test_telemetry.py",),
    ),
    Mutant(
        name="a lower bar is read as an upper one",
        file="rdtf_ds/benchmarks/report.py",
        old="self.ratio >= self.bar if self.at_least",
        new="self.ratio <= self.bar if self.at_least",
        tests=("tests/benchmarks/test_report.py",),
    ),
)

_TRAINING = (
    Mutant(
        name="every frame is shown to the network",
        file="rdtf_ds/training/objective.py",
        old="self._visible(pixels, latents, condition_mask)",
        new="self._visible(pixels, latents, frame_mask)",
        tests=("tests/training/test_objective.py",),
    ),
    Mutant(
        name="damaged clips of a cache are not made again",
        file="rdtf_ds/training/cache_making.py",
        old="if cache.flaw(key) is None:",
        new="if cache.path(key).is_file():",
        tests=("tests/training/test_cache_making.py",),
    ),
    Mutant(
        name="a cache of another text length fits",
        file="rdtf_ds/training/caching.py",
        old='        "rdtf.encoders.text_length": sources.text_length,\n',
        new="",
        tests=("tests/training/test_cached_run.py",),
    ),
    Mutant(
        name="frame_mask does not reach the network",
        file="rdtf_ds/training/objective.py",
        old="frame_mask = encoded.frame_mask if encoded.padded else None",
        new="frame_mask = None",
        tests=("tests/training/test_objective.py",),
    ),
    Mutant(
        name="norms and biases with 8-bit moments",
        file="rdtf_ds/training/optimizer.py",
        old='("no_decay", others, 32, False)',
        new='("no_decay", others, bits, False)',
        tests=("tests/training/test_optimizer.py",),
    ),
    Mutant(
        name="weight decay on norms and biases",
        file="rdtf_ds/training/optimizer.py",
        old="weight_decay if group.weight_decay else 0.0",
        new="weight_decay",
        tests=("tests/training/test_optimizer.py",),
    ),
    Mutant(
        name="warm-up counts skipped steps",
        file="rdtf_ds/training/engine.py",
        old="warmed_up(self._learning_rate, self._warmup_steps, self.applied_steps)",
        new="warmed_up(self._learning_rate, self._warmup_steps, self.attempted_steps)",
        tests=("tests/training/test_engine.py",),
    ),
    Mutant(
        name="EMA of the wrong weights",
        file="rdtf_ds/training/ema.py",
        old="self._masters = dict(masters)",
        new="self._masters = {name: master.detach().clone() for name, master in masters.items()}",
        tests=("tests/training/test_ema.py",),
    ),
    Mutant(
        name="a damaged checkpoint is loaded",
        file="rdtf_ds/checkpoints/manifest.py",
        old='if digest_file(path).sha256 != expected["sha256"]:',
        new="if not digest_file(path).sha256:",
        tests=("tests/checkpoints/test_manifest.py",),
    ),
    Mutant(
        name="a resumed log holds a step twice",
        file="rdtf_ds/training/telemetry.py",
        old='if metrics["step"] < first_step:',
        new='if metrics["step"] <= first_step:',
        tests=("tests/training/test_telemetry.py",),
    ),
)

_GENERATION = (
    Mutant(
        name="words hidden from one encoder only",
        file="rdtf_ds/pipeline.py",
        old="        visual = {shown: self._visual_guidance",
        new=(
            "        text = text._replace(t5=self.encode_text(captions * len(passes)).t5)\n"
            "        visual = {shown: self._visual_guidance"
        ),
        tests=("tests/test_pipeline.py",),
    ),
    Mutant(
        name="every pass sees the visible frames",
        file="rdtf_ds/pipeline.py",
        old="visible & shown)",
        new="visible)",
        tests=("tests/test_pipeline.py",),
    ),
    Mutant(
        name="the scales change places",
        file="rdtf_ds/pipeline.py",
        old="any(prompts), settings.image_scale, settings.text_scale)",
        new="any(prompts), settings.text_scale, settings.image_scale)",
        tests=("tests/test_pipeline.py",),
    ),
    Mutant(
        name="given latents are ignored",
        file="rdtf_ds/pipeline.py",
        old="latents = (start if latents is None else latents)",
        new="latents = start",
        tests=("tests/test_pipeline.py",),
    ),
    Mutant(
        name="a call's sampler is ignored",
        file="rdtf_ds/pipeline.py",
        old="samplers.begin(self.scheduler if own else samplers.swap_sampler(self.scheduler, settings.sampler), settings.steps)",
        new="samplers.begin(self.scheduler, settings.steps)",
        tests=("tests/test_pipeline.py",),
    ),
    Mutant(
        name="a bounded batch sees the text of its first passes alone",
        file="rdtf_ds/pipeline.py",
        old="TextFeatures(text.clip[part], text.t5[part])",
        new="TextFeatures(text.clip[: len(sample[part])], text.t5[part])",
        tests=("tests/test_pipeline.py",),
    ),
    Mutant(
        name="a pass that cancels is made all the same",
        file="rdtf_ds/passes.py",
        old="if coefficient != 0}",
        new="}",
        tests=("tests/test_passes.py",),
    ),
    Mutant(
        name="the caption's term has the picture's coefficient",
        file="rdtf_ds/passes.py",
        old="image: image_scale - text_scale, both: text_scale}",
        new="image: image_scale - text_scale, both: image_scale}",
        tests=("tests/test_passes.py",),
    ),
    Mutant(
        name="DDIM takes steps of one length though they differ",
        file="rdtf_ds/samplers.py",
        old="        scheduler.num_inference_steps = Fraction(",
        new="        _ = Fraction(",
        tests=("tests/test_samplers.py",),
    ),
    Mutant(
        name="a step at timestep -1",
        file="rdtf_ds/samplers.py",
        old="if mine.timesteps[-1] < 0:",
        new="if mine.timesteps[-1] < -1:",
        tests=("tests/test_samplers.py",),
    ),
    Mutant(
        name="a call leaves its state in the pipeline's sampler",
        file="rdtf_ds/samplers.py",
        old="mine = copy.deepcopy(scheduler)",
        new="mine = scheduler",
        tests=("tests/test_samplers.py",),
    ),
    Mutant(
        name="sixteen bits of grey are cut off at 255",
        file="rdtf_ds/clip_requests.py",
        old="(grey.clip(0, 65535) / 257)",
        new="grey.clip(0, 255)",
        tests=("tests/test_clip_requests.py",),
    ),
    Mutant(
        name="nearly opaque pixels pass for opaque",
        file="rdtf_ds/clip_requests.py",
        old="[0] < 255:",
        new="[0] < 254:",
        tests=("tests/test_clip_requests.py",),
    ),
    Mutant(
        name="a model without one of its weights loads",
        file="rdtf_ds/exported_model.py",
        old="for name in sorted(expected.keys() | found.keys()):",
        new="for name in sorted(expected.keys() & found.keys()):",
        tests=("tests/test_exported_model.py",),
    ),
    Mutant(
        name="an offloaded autoencoder is called where it waits",
        file="rdtf_ds/models/autoencoder.py",
        old="    @apply_forward_hook\n    def encode",
        new="    def encode",
        tests=("tests/test_offload.py",),
    ),
    Mutant(
        name="guidance channels before the noisy latents",
        file="rdtf_ds/pipeline.py",
        old="torch.cat([sample, visual], dim=1)",
        new="torch.cat([visual, sample], dim=1)",
        tests=("tests/test_pipeline.py",),
    ),
    Mutant(
        name="masters exported where the mean was asked for",
        file="rdtf_ds/checkpoints/weights.py",
        old='if weights == "master":',
        new='if weights in ("master", "ema"):',
        tests=("tests/export/test_exporting.py",),
    ),
    Mutant(
        name="a value beyond the exported dtype is let through",
        file="rdtf_ds/export/weight_files.py",
        old="    if largest > limit:",
        new="    if largest > 2 * limit:",
        tests=("tests/export/test_weight_files.py",),
    ),
    Mutant(
        name="a shard is as large as the size and one parameter more",
        file="rdtf_ds/export/weight_files.py",
        old="held + length > max_shard",
        new="held > max_shard",
        tests=("tests/export/test_weight_files.py",),
    ),
    Mutant(
        name="a frozen part keeps its weights once it is written",
        file="rdtf_ds/export/frozen_parts.py",
        old='    return part.to("meta")',
        new="    return part",
        tests=("tests/export/test_exporting.py",),
    ),
    Mutant(
        name="what was read of a checkpoint stays in memory",
        file="rdtf_ds/checkpoints/mapped_pages.py",
        old="    if length > 0 and",
        new="    if length < 0 and",
        tests=("tests/checkpoints/test_mapped_pages.py",),
    ),
    Mutant(
        name="values that are NaN pass the half check",
        file="rdtf_ds/export/half_check.py",
        old="        return self.relative_error is not None and self.relative_error <= self.bar",
        new="        return self.relative_error is None or self.relative_error <= self.bar",
        tests=("tests/export/test_half_check.py",),
    ),
    Mutant(
        name="a batch of which a clip is there is not made",
        file="rdtf_ds/generation/making.py",
        old="if any(job.name not in there for job in group)",
        new="if all(job.name not in there for job in group)",
        tests=("tests/generation/test_making.py",),
    ),
    Mutant(
        name="clips of other settings count as made",
        file="rdtf_ds/generation/making.py",
        old="if found.get(key) != note.get(key)]",
        new="if key not in found]",
        tests=("tests/generation/test_making.py",),
    ),
    Mutant(
        name="sub-blocks of a GIF's comment are a byte too long",
        file="rdtf_ds/data/clips/metadata.py",
        old="data[start : start + 255] for start in range(0, len(data), 255)",
        new="data[start : start + 256] for start in range(0, len(data), 256)",
        tests=("tests/data/clips/test_metadata.py",),
    ),
)

_FAULTS = (
    Mutant(
        name="a file is committed before its bytes are on the disk",
        file="rdtf_ds/checkpoints/durable.py",
        old="        os.fsync(file.fileno())",
        new="        file.fileno()",
        tests=("tests/faults/test_power_cuts.py",),
    ),
    Mutant(
        name="a rename is not flushed",
        file="rdtf_ds/checkpoints/durable.py",
        old="    sync(target.parent)",
        new="    pass",
        tests=("tests/faults/test_power_cuts.py",),
    ),
    Mutant(
        name="a manifest is believed without its seal",
        file="rdtf_ds/checkpoints/manifest.py",
        old="if not sound or seal != hashlib.sha256(text).hexdigest():",
        new="if not sound or seal is None:",
        tests=("tests/checkpoints/test_manifest.py",),
    ),
    Mutant(
        name="damaged checkpoints count among those that stay",
        file="rdtf_ds/checkpoints/store.py",
        old="elif path.name in self._verified or kept >= _LEAST_VERIFIED or self.flaw(path) is None:",
        new="else:",
        tests=("tests/checkpoints/test_store.py",),
    ),
    Mutant(
        name="a failed write is committed",
        file="rdtf_ds/training/checkpoint.py",
        old='failures = [f"rank {rank}: {text}" for rank, text in enumerate(gather_objects(failure)) if text]',
        new="failures = [text for text in gather_objects(None) if text]",
        tests=("tests/training/test_checkpoint.py",),
    ),
    Mutant(
        name="files are not read again before the commit",
        file="rdtf_ds/training/checkpoint.py",
        old="failure = failure or _save_beside(engine, ema, partial, state, files) or _not_as_written(partial, files)",
        new="failure = failure or _save_beside(engine, ema, partial, state, files)",
        tests=("tests/training/test_checkpoint.py",),
    ),
    Mutant(
        name="the second half of a group goes to the first rank",
        file="rdtf_ds/checkpoints/resharding.py",
        old="return self.rank * length, (self.rank + 1) * length",
        new="return 0, length",
        tests=("tests/checkpoints/test_resharding.py",),
    ),
    Mutant(
        name="a bad step passes for a search of the loss scale",
        file="rdtf_ds/training/engine.py",
        old="bad=not applied and not searching,",
        new="bad=False,",
        tests=("tests/training/test_engine.py",),
    ),
    Mutant(
        name="a loss that is not finite trains",
        file="rdtf_ds/training/engine.py",
        old="self._ds.backward(mean * torch.where(torch.isfinite(mean.detach()), 1.0, math.nan))",
        new="self._ds.backward(mean)",
        tests=("tests/training/test_engine.py",),
    ),
    Mutant(
        name="a passed-over sample keeps its noise",
        file="rdtf_ds/data/dataset.py",
        old='draw_key(plan.sample_number, "noise", plan.attempt)',
        new='draw_key(plan.sample_number, "noise", 0)',
        tests=("tests/data/test_dataset.py",),
    ),
    Mutant(
        name="a stop signal is forgotten",
        file="rdtf_ds/training/interruptions.py",
        old="            self._stopped_by = self._signal",
        new="            self._stopped_by = None",
        tests=("tests/training/test_interruptions.py",),
    ),
)

_MEMORY = (
    Mutant(
        name="the last micro-batch's gradient alone counts",
        file="rdtf_ds/training/gradient_buffer.py",
        old="output.add_(source)",
        new="output.copy_(source)",
        tests=("tests/training/test_gradient_buffer.py",),
    ),
    Mutant(
        name="half a step survives going back",
        file="rdtf_ds/training/engine.py",
        old="        forget_gradients(self._ds.optimizer)\n",
        new="",
        tests=("tests/training/test_gradient_buffer.py",),
    ),
    Mutant(
        name="the mean on the CPU averages the buffer as it was",
        file="rdtf_ds/training/ema.py",
        old="return self._staging[: master.numel()].copy_(master)",
        new="return self._staging[: master.numel()]",
        tests=("tests/training/test_ema.py",),
    ),
    Mutant(
        name="encoders stay on the device after a pass",
        file="rdtf_ds/models/visiting.py",
        old="            tensor.data = home\n",
        new="            pass\n",
        tests=("tests/models/test_visiting.py",),
    ),
    Mutant(
        name="the moments change places between GPU and CPU",
        file="rdtf_ds/checkpoints/moments.py",
        old='_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}',
        new='_NAMES = {"state2": "exp_avg", "state1": "exp_avg_sq"}',
        tests=("tests/training/test_offload.py",),
    ),
)

_INSPECTION = (
    Mutant(
        name="a caption becomes markup",
        file="rdtf_ds/inspection/page.py",
        old="autoescape=True",
        new="autoescape=False",
        tests=("tests/inspection/test_page.py",),
    ),
    Mutant(
        name="a caption ends the report's script",
        file="rdtf_ds/inspection/page.py",
        old='text.replace("<",',
        new='text.replace("no such text",',
        tests=("tests/inspection/test_page.py",),
    ),
    Mutant(
        name="a frame is compared with itself",
        file="rdtf_ds/inspection/variety.py",
        old="np.triu_indices(count, 1)",
        new="np.triu_indices(count, 0)",
        tests=("tests/inspection/test_variety.py",),
    ),
    Mutant(
        name="the report draws other frames than training",
        file="rdtf_ds/inspection/variety.py",
        old='draw_key(sample_number, "frames", 0)',
        new='draw_key(sample_number, "frame", 0)',
        tests=("tests/inspection/test_views.py",),
    ),
)

_WEB = (
    Mutant(
        name="the web page takes predictions with gaps",
        file="rdtf_ds/web/slots.py",
        old="if len(frames) >= MIN_SHOWN and frames in ends:",
        new="if len(frames) >= MIN_SHOWN:",
        tests=("tests/web/test_slots.py",),
    ),
    Mutant(
        name="visitors of the web page share the model at once",
        file="rdtf_ds/web/studio.py",
        old="        with self._busy:\n",
        new="        if True:\n",
        tests=("tests/web/test_studio.py",),
    ),
)

_EVALUATION = (
    Mutant(
        name="patches are drawn for all cells at once",
        file="rdtf_ds/evaluation/fragments.py",
        old="(VIEWS, CELLS, CELLS)) for cell",
        new="(VIEWS, 1, 1)).repeat(CELLS, 1).repeat(CELLS, 2) for cell",
        tests=("tests/evaluation/test_fragments.py",),
    ),
    Mutant(
        name="opposite ends of a shifted picture see each other",
        file="rdtf_ds/evaluation/swin3d.py",
        old="return inside[:, :, None] != inside[:, None]",
        new="return inside[:, :, None] < inside[:, None]",
        tests=("tests/evaluation/test_swin3d.py",),
    ),
    Mutant(
        name="the tables of two fragments and of one are swapped",
        file="rdtf_ds/evaluation/swin3d.py",
        old="torch.lerp(within, biases,",
        new="torch.lerp(biases, within,",
        tests=("tests/evaluation/test_swin3d.py",),
    ),
    Mutant(
        name="weights of strangers may run what they say",
        file="rdtf_ds/evaluation/fast_vqa_weights.py",
        old="weights_only=True",
        new="weights_only=False",
        tests=("tests/evaluation/test_fast_vqa.py",),
    ),
    Mutant(
        name="halves of a distance share their clips",
        file="rdtf_ds/evaluation/measures.py",
        old="found.append(_distance(real[order[:half]], other[order[half : 2 * half]]))",
        new="found.append(_distance(real[order[:half]], other[order[:half]]))",
        tests=("tests/evaluation/test_measures.py",),
    ),
    Mutant(
        name="clips held out are mixed with those trained on",
        file="rdtf_ds/evaluation/test_set.py",
        old="ids = index.held_out if held_out else",
        new="ids = index.trainable if held_out else",
        tests=("tests/evaluation/test_test_set.py",),
    ),
    Mutant(
        name="an evaluation goes on with clips of other settings",
        file="rdtf_ds/evaluation/evaluating.py",
        old="        if told:\n",
        new="        if False:\n",
        tests=("tests/tools/test_evaluate.py",),
    ),
    Mutant(
        name="all clips of an evaluation have one seed",
        file="rdtf_ds/evaluation/test_set.py",
        old='derive_seed(seed, "evaluated clip", row["path"])',
        new="seed",
        tests=("tests/evaluation/test_test_set.py",),
    ),
)

_VALIDATION = (
    Mutant(
        name="validation with the weights of the last step",
        file="rdtf_ds/training/validation.py",
        old="with self.ema.applied_to(self.engine) if self.ema is not None else nullcontext():",
        new="with nullcontext():",
        tests=("tests/training/test_validation.py",),
    ),
    Mutant(
        name="the bound of validation forgets what it took",
        file="rdtf_ds/training/validation_budget.py",
        old=" / (1 - max_share) - validated_s",
        new=" / (1 - max_share)",
        tests=("tests/training/test_validation_budget.py",),
    ),
    Mutant(
        name="clips of validation use up what the losses wait for",
        file="rdtf_ds/training/validation_budget.py",
        old="            return nothing\n",
        new="            losses = False\n",
        tests=("tests/training/test_validation_budget.py",),
    ),
    Mutant(
        name="held-out samples of a clip share their noise",
        file="rdtf_ds/training/held_out.py",
        old="clip.name, task.value, timestep)",
        new="clip.name)",
        tests=("tests/training/test_held_out.py",),
    ),
    Mutant(
        name="held-out losses are weighted",
        file="rdtf_ds/training/held_out.py",
        old="min_snr_gamma=None",
        new="min_snr_gamma=objective.min_snr_gamma",
        tests=("tests/training/test_held_out.py",),
    ),
    Mutant(
        name="every rank measures the same held-out clips",
        file="rdtf_ds/training/held_out.py",
        old="range(rank, len(clips), world_size)",
        new="range(0, len(clips), world_size)",
        tests=("tests/training/test_held_out.py",),
    ),
    Mutant(
        name="a rank that fails leaves the others waiting",
        file="rdtf_ds/training/validation_units.py",
        old="    except Exception as error:\n",
        new="    except UserError as error:\n",
        tests=("tests/training/test_validation.py",),
    ),
    Mutant(
        name="a validation is forgotten by the resume that follows it",
        file="rdtf_ds/training/telemetry.py",
        old="first_step + 1 if first_step else 0",
        new="first_step",
        tests=("tests/training/test_telemetry.py",),
    ),
    Mutant(
        name="features of real clips take part twice in FVD",
        file="rdtf_ds/training/validation_fvd.py",
        old="np.stack([pair.made for pair in ordered])",
        new="np.stack([pair.real for pair in ordered])",
        tests=("tests/training/test_validation_fvd.py",),
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    *_DIFFUSION, *_CURRICULUM, *_PLANS, *_DATA, *_MODELS, *_TRAINING, *_GENERATION, *_FAULTS, *_MEMORY, *_INSPECTION, *_WEB,
    *_EVALUATION, *_VALIDATION,
)  # fmt: skip
