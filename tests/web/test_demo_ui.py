"""tools/demo_ui.py as people type it: it serves, it stops, it says what is wrong; nothing else needs gradio."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

import pytest

from rdtf_ds.models.devices import DTYPES
from tests.small_models import load_tool, make_pipeline, small_dfgn, text_parts
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    make_pipeline(text_parts(), small_dfgn()).save_pretrained(folder)
    return folder


@pytest.fixture
def tool():
    return load_tool(ROOT, "demo_ui")


def first_line(process: subprocess.Popen[str], seconds: float) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    assert ready, "it said nothing"
    return process.stdout.readline()


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """A function that lists the folders of clips and uploads; temporary files go to a folder of this test, and a proxy leads nowhere."""
    pytest.importorskip("gradio", reason="gradio (the extra `ui`) is not installed")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    return lambda: [path for path in tmp_path.iterdir() if path.name.startswith("rdtf-demo-")]


def ask(address: str) -> str:
    """The page as it is served."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=60) as answer:
        return answer.read().decode()


def heard(port: int) -> bool:
    """Whether anybody listens."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def test_it_serves_until_it_is_terminated(model, clips, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "demo_ui.py"), "--model", str(model), "--device", "cpu"]
    errors = tmp_path / "stderr.txt"
    with errors.open("w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=tmp_path) as process:
        try:
            match = re.fullmatch(rf"Serving '{model}' at (http://127\.0\.0\.1:(\d+)/) \(Ctrl-C ends it\)\n", first_line(process, 240))
            assert match
            page = ask(match[1])
            assert "Make the clip" in page and "small" in page and clips() and heard(int(match[2]))
            process.terminate()
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and rest == "Stopped; uploads and clips are deleted.\n" and "Traceback" not in errors.read_text()
    assert not clips() and not heard(int(match[2]))


def test_it_serves_until_ctrl_c(tool, model, clips, capsys):
    """In this process: what another one needs to start is imported here already."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen, said = [], []

    def it_says_that_it_serves() -> bool:
        said.append(capsys.readouterr().out)
        return "Serving" in "".join(said)

    def visit_and_interrupt() -> None:
        try:
            until(it_says_that_it_serves)
            seen.append(("Make the clip" in ask(f"http://127.0.0.1:{port}/"), bool(clips())))
        finally:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # in another thread it would wake nobody

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        visitor = threading.Thread(target=visit_and_interrupt)
        visitor.start()
        assert tool.main(["--model", str(model), "--device", "cpu", "--port", str(port)]) == 0
        visitor.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [(True, True)]
    out = "".join([*said, capsys.readouterr().out])
    assert out == f"Serving '{model}' at http://127.0.0.1:{port}/ (Ctrl-C ends it)\nStopped; uploads and clips are deleted.\n"
    assert not clips() and not heard(port)


def test_without_gradio_one_line_says_what_to_install(tool, model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert tool.main(["--model", str(model)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "gradio" in said and "pip install" in said and "[ui]" in said


def test_nothing_else_needs_gradio():
    code = "import sys; sys.modules['gradio'] = None; import rdtf_ds.generation.making, rdtf_ds.web.slots, rdtf_ds.web.studio"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    importers = [
        path for path in (ROOT / "rdtf_ds").rglob("*.py") if re.search(r"^\s*(import|from) gradio", path.read_text(), re.MULTILINE)
    ]
    assert [path.name for path in importers] == ["app.py"]


def test_a_wrong_model_is_told_before_anything_is_served(tool, tmp_path, capsys):
    pytest.importorskip("gradio", reason="gradio (the extra `ui`) is not installed")
    assert tool.main(["--model", str(tmp_path / "absent")]) == 2
    said = capsys.readouterr().err
    assert "absent" in said and "tools/export_fp16.py" in said and "Traceback" not in said


def test_a_port_in_use_is_told(tool, model, capsys):
    pytest.importorskip("gradio", reason="gradio (the extra `ui`) is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert tool.main(["--model", str(model), "--port", str(port), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"--port {port}" in said and "Traceback" not in said


@pytest.mark.parametrize("port", ["0", "70000", "x"])
def test_a_port_that_is_none(tool, model, port):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--model", str(model), "--port", port])
    assert stopped.value.code == 2


def test_the_dtypes_are_those_of_the_other_commands(tool):
    assert ("auto", *DTYPES) == tool.DTYPES  # not imported there: `--help` needs no torch
