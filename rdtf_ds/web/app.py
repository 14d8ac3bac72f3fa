"""The web page, made with gradio: caption, frame slots, task and settings on one side, the clip on the other. It needs no network.

gradio is the extra `ui`; only this file imports it.
"""

from __future__ import annotations

import html
import math
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read by gradio when it is imported and when components are made: no telemetry, no look for newer versions.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402

from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.generation.jobs import Job  # noqa: E402
from rdtf_ds.samplers import SAMPLERS, sampler_name  # noqa: E402
from rdtf_ds.web.form import (  # noqa: E402
    FRAME_MS,
    FRAMES,
    IMAGE_SCALE,
    LONGEST_CAPTION,
    SEED,
    STEPS,
    TEXT_SCALE,
    job_of,
    limits,
)
from rdtf_ds.web.slots import Preset, hint, slot_name  # noqa: E402
from rdtf_ds.web.studio import Made, Studio  # noqa: E402

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SEEDS = 2**31
WAITING = 20  # people in the queue; the next one is told to come again
LEFT = 50 * WAITING  # visitors known to have left: many more than can have been in the queue
UPLOAD_LIMIT = "32mb"
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build(studio: Studio, title: str) -> gr.Blocks:
    """The page for a studio, not yet served; ``title`` stands above it."""
    os.environ["GRADIO_TEMP_DIR"] = str(studio.uploads)  # the only door to where gradio keeps uploads
    config = studio.pipeline.config
    most = config.max_frames
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=False) as page:
        gr.Markdown(f"# {html.escape(title)}\n{config.image_size} × {config.image_size} pixels, up to {most} frames.", elem_id="title")
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(label="Caption", placeholder="a cat waves", lines=2, max_length=LONGEST_CAPTION, elem_id="caption")
                task = gr.Radio([preset.value for preset in Preset], value=Preset.TEXT.value, label="Task", elem_id="task")
                told = gr.Markdown(hint(Preset.TEXT, most), elem_id="hint")
                with gr.Row(elem_id="slots"):
                    slots = [_slot(number, most) for number in range(most)]
                settings = _settings(studio)
            with gr.Column(scale=2):
                with gr.Row():
                    press = gr.Button("Make the clip", variant="primary", scale=3, elem_id="make")
                    stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
                clip = gr.Image(label="Clip", type="filepath", interactive=False, height=360, buttons=["fullscreen"], elem_id="clip")
                file = gr.File(label="GIF file", interactive=False, height=125, elem_id="file")
                notes = gr.Markdown(elem_id="notes")
        desk = Desk(studio, page)
        marked = [task.change, settings[0].change]
        gr.on(marked, _marker(most), [task, settings[0]], [told, *slots], **QUICK)
        values = [prompt, task, *settings, *slots]
        made = gr.on(
            [press.click, prompt.submit],
            desk.make,
            values,
            [clip, file, notes],
            preprocess=False,  # so nothing has been checked: job_of does
            show_progress_on=[clip],  # nor is the notes' place covered after an error
            concurrency_limit=1,
            api_visibility="private",
        )
        stop.click(desk.stop, cancels=made, **QUICK)  # out of the queue at once, or out of the model after a step
        page.unload(desk.leave)
    return page.queue(max_size=WAITING)


def _slot(number: int, num_frames: int) -> gr.Image:
    slot = gr.Image(
        label=slot_name(number, Preset.TEXT, num_frames),
        sources=["upload"],
        image_mode=None,
        height=110,
        min_width=60,
        buttons=[],
        placeholder="+",
        elem_id=f"slot-{number}",
        elem_classes="slot",
    )
    slot.async_move_resource_to_block_cache = _as_it_is  # type: ignore[method-assign, assignment]
    return slot


async def _as_it_is(path: str | Path | None) -> str | None:
    """Instead of gradio's copying of a linked file and fetching of an address that a request made by hand may name."""
    return None if path is None else str(path)


def _settings(studio: Studio) -> list[gr.components.Component]:
    """Components in the order in which ``job_of`` takes their values."""
    config, within = studio.pipeline.config, limits(studio)
    with gr.Row():
        num_frames = gr.Slider(*within[FRAMES], config.max_frames, step=1, label=FRAMES, scale=2, elem_id="num-frames")
        frame_ms = gr.Slider(*within[FRAME_MS], config.frame_ms, step=10, label=FRAME_MS, scale=3, elem_id="frame-ms")
    with gr.Row(equal_height=False):
        seed = gr.Number(0, label=SEED, info="the same seed and settings make the same clip", precision=0, minimum=0, elem_id="seed")
        other = gr.Button("Another seed", scale=0, min_width=130, size="md", elem_id="other-seed")
    other.click(lambda: random.randrange(SEEDS), None, seed, **QUICK)
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        steps = gr.Slider(*within[STEPS], config.steps, step=1, label=STEPS, elem_id="steps")
        sampler = gr.Dropdown(list(SAMPLERS), value=sampler_name(studio.pipeline.scheduler), label="Sampler", elem_id="sampler")
        text_scale = gr.Slider(*within[TEXT_SCALE], config.text_scale, step=0.1, label=TEXT_SCALE, elem_id="text-scale")
        image_scale = gr.Slider(*within[IMAGE_SCALE], config.image_scale, step=0.1, label=IMAGE_SCALE, elem_id="image-scale")
    return [num_frames, frame_ms, seed, steps, sampler, text_scale, image_scale]


def _marker(slots: int) -> Callable[[str, int], list[Any]]:
    """A function of (task, frames): the hint, and every slot's name."""

    def mark(task: str, num_frames: int) -> list[Any]:
        """The hint, and an update of each slot's label for this task and number of frames."""
        preset = Preset(task)
        return [hint(preset, num_frames), *(gr.update(label=slot_name(number, preset, num_frames)) for number in range(slots))]

    return mark


class Desk:
    """What the buttons do, for every visitor by the session that gradio gives them."""

    def __init__(self, studio: Studio, page: gr.Blocks) -> None:
        self._studio, self._page = studio, page
        self._running: dict[str | None, threading.Event] = {}
        self._left: OrderedDict[str | None, float] = OrderedDict()  # when, by session

    def make(self, request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> tuple[str, str, str]:  # noqa: B008
        """(values of the page) -> the GIF to show, the file to offer, what to say of it. gradio fills in the first two by their kinds."""
        stopped = self._running[request.session_hash] = threading.Event()
        progress(0, desc="Waiting for the model")

        def go_on() -> None:
            """Asked before the work begins and between two steps.

            Raises:
                UserError: The visitor stopped it, or is no longer there to wait for it.
            """
            if stopped.is_set() or not self._waited_for(request.session_hash):
                raise UserError("Stopped.")

        def on_step(done: int, steps: int) -> None:
            """Moves the bar; between two steps is where a clip can be stopped.

            Raises:
                UserError: The visitor asked for that, or nobody waits for the clip any more.
            """
            go_on()
            progress((done, steps), desc="Sampling")

        try:
            go_on()
            job = job_of(self._studio, *values)
            made = self._studio.make(job, on_step)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), duration=None, title="No clip", print_exception=False) from error
        except Exception as error:  # told to the visitor, and with its traceback on the terminal; the server goes on
            said = html.escape(f"{type(error).__name__}: {error}")
            raise gr.Error(f"The model failed: {said} The terminal of the server says where.", duration=None, title="No clip") from error
        finally:
            self._running.pop(request.session_hash, None)
        return str(made.path), str(made.path), _told(made, job)

    def _waited_for(self, session: str | None) -> bool:
        """Whether the page is served and the visitor still listens for what is made.

        gradio lets a function go on whoever leaves. Only a browser's page has an ``unload``; a request made by hand has a connection, and
        when it ends gradio no more than marks the event in its table of what runs, for which it has no public name. Who asks after they
        left is back: gradio takes a page whose machine slept, or lost its network, for one that was closed.
        """
        running = (event for events in self._page._queue.active_jobs if events for event in events)
        asked = [event for event in running if event.session_hash == session]
        left = self._left.get(session, -math.inf)
        return self._page.is_running and all(event.alive and event.enqueue_time > left for event in asked)

    def leave(self, request: gr.Request) -> None:
        """The visitor closed the page: their clip ends after the step it is at, or before the first if it is still in the queue."""
        self._left[request.session_hash] = time.monotonic()  # the clock of gradio's queue
        self._left.move_to_end(request.session_hash)
        if len(self._left) > LEFT:
            self._left.popitem(last=False)

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's clip after the step it is at; nothing to do if none is being made."""
        running = self._running.get(request.session_hash)
        if running is not None:
            running.set()


def _told(made: Made, job: Job) -> str:
    shown = f"frames given: {', '.join(map(str, sorted(job.pictures)))}" if job.pictures else "no frame given"
    lines = [f"Seed {job.seed}, {job.steps} steps, {shown}, {made.seconds:.1f} s. The file holds these settings.", *made.notes]
    return "\n\n".join(lines)


def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start serving in the background and return the address; ``page.close()`` ends it, and the clip in the making after a step.

    Args:
        host: 127.0.0.1 is this machine alone; 0.0.0.0 is everyone who can reach it.
        port: None takes the first free one from 7860 on.

    Raises:
        UserError: the port is in use, or the host is no address of this machine.
    """
    _reach_directly("127.0.0.1", "localhost")
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=UPLOAD_LIMIT,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
        )
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port or 'any from 7860'}: cannot be served ({error}). Choose another port, or 127.0.0.1."
        ) from error
    return address


def _reach_directly(*hosts: str) -> None:
    """gradio asks itself over HTTP whether it is up; a proxy of this machine's settings must not come between."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*known, *(host for host in hosts if host not in known)])
