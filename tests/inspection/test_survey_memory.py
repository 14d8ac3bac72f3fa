"""What a survey holds in memory does not follow the columns of the index: measured in a process of its own.

``RDTF_SURVEYED_ROWS=300000 python -m pytest -s tests/inspection/test_survey_memory.py`` prints what docs/data.md tells.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from rdtf_ds.benchmarks.index import write_made_up_index
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index_segments import IndexSettings

ROWS = int(os.environ.get("RDTF_SURVEYED_ROWS", "60000"))
FEW = 2000
MOST_MB = 6 + ROWS * 80 / 1e6  # columns that are copied take 800 bytes a row

SURVEY = """
import json, sys, threading, time
from pathlib import Path
from rdtf_ds.benchmarks.index_child import resident_mb
from rdtf_ds.data.indexing.index import open_index
from rdtf_ds.inspection import report

report.MOST_MEASURED = 0  # clips whose features are read, which are as many for any number of rows
few, many = (open_index(Path(folder), identity) for folder, identity in json.loads(sys.argv[1]))
report.inspect("few", few, 0, 0).page()  # what is made once, whatever the number of rows
before, most, done = resident_mb("RssAnon"), [0.0], threading.Event()

def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], resident_mb("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
made = report.inspect("many", many, 0, 0)
made.page()
seconds = time.perf_counter() - start
done.set()
watcher.join()
print(json.dumps({"own_mb": most[0] - before, "seconds": seconds, "intact": made.survey.intact}))
"""


def test_a_survey_holds_a_few_bytes_a_clip(tmp_path: Path, project_root: Path) -> None:
    places = []
    for rows in (FEW, ROWS):
        settings = IndexSettings(tmp_path / str(rows), DecodeLimits())
        write_made_up_index(settings.root, settings, rows)
        places.append((str(settings.root), settings.identity))
    command = [sys.executable, "-c", SURVEY, json.dumps(places)]
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"{ROWS} clips: {found['own_mb']:.1f} MB of own memory, {found['seconds']:.1f} s")
    assert found["intact"] == ROWS * 99 // 100
    assert found["own_mb"] < MOST_MB
