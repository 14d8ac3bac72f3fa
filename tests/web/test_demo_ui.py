"""tools/demo_ui.py as people type it: it serves, it stops, it says what is wrong; nothing else needs gradio."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.small_models import load_tool, make_pipeline, small_dfgn, text_parts

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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(model, tmp_path, monkeypatch, how):
    pytest.importorskip("gradio", reason="gradio (the extra `ui`) is not installed")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    command = [sys.executable, str(ROOT / "tools" / "demo_ui.py"), "--model", str(model), "--device", "cpu"]
    errors = tmp_path / "stderr.txt"
    with errors.open("w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=tmp_path) as process:
        try:
            match = re.fullmatch(rf"Serving '{model}' at (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", first_line(process, 240))
            assert match
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(match[1], timeout=60) as answer:
                page = answer.read().decode()
            assert "Make the clip" in page and "small" in page
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith("rdtf-demo-")]
            process.send_signal(how)
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and rest == "Stopped; uploads and clips are deleted.\n" and "Traceback" not in errors.read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("rdtf-demo-")]
    address = (match[1].split(":")[1].strip("/"), int(match[1].rsplit(":", 1)[1].strip("/")))
    with socket.socket() as tried:
        assert tried.connect_ex(address) != 0, "nobody listens any more"


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
