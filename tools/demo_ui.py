"""A web page for an exported model: ``demo_ui.py --model OUT [--port 7860] [--host 127.0.0.1]``, then open the address it prints.

Caption, frame slots, task, seed and settings; the clip is shown and offered as a GIF file. It needs the extra `ui` and no network, and
serves this machine alone unless --host says otherwise. Ctrl-C ends it; uploads and clips are deleted then.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from rdtf_ds.errors import UserError  # noqa: E402

DTYPES = ("auto", "float32", "float16", "bfloat16")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="OUT", help="folder made by tools/export_fp16.py")
    parser.add_argument("--port", type=int, help="port to serve at (the first free one from 7860 on)")
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1 (default): this machine alone; 0.0.0.0: everyone who can reach it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float16 on a GPU, float32 without")
    options = parser.parse_args(arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; choose 1 to 65535")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 once Ctrl-C stopped it, or 2 with one paragraph on standard error when the input does not do."""
    options = parse_arguments(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="rdtf-demo-") as folder:
            _serve(options, Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped; uploads and clips are deleted.")
    return 0


def _serve(options: argparse.Namespace, folder: Path) -> None:
    """Serve until Ctrl-C. What is dear to import comes after what can be said without it."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("The web page needs gradio, which is not installed: pip install -e '.[ui]'")
    import rdtf_ds.web.app as app
    from rdtf_ds.web.studio import open_studio

    studio = open_studio(options.model, folder, options.device, options.dtype)
    page = app.build(studio, options.model.resolve().name)
    address = app.serve(page, options.host, options.port)
    try:
        print(f"Serving '{options.model}' at {address} (Ctrl-C ends it)", flush=True)
        if options.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"--host {options.host}: everyone who can reach this machine can use the page; it asks for no password.", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
