"""bench.py measures what it says. No figure is judged here: machines are shared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import bench
import pytest
from conftest import ROOT, eventually

import database

# All rows but those that take long; `growth` makes the big queue that the next two need.
FAST = ["drain", "latency", "bulk", "growth", "commands", "prune", "idle"]


def start(folder: Path, *words: str, quick: bool = True) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "bench.py"), *["--quick"] * quick, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )


def test_every_row_has_figures_and_the_chart_shows_it(tmp_path):
    (tmp_path / "tmp").mkdir()
    files = [str(tmp_path / "found.json"), str(tmp_path / "chart.svg")]
    process = start(tmp_path / "tmp", "--json", files[0], "--svg", files[1], "--only", *FAST)
    said, remarks = process.communicate(timeout=300)
    assert process.returncode == 0, remarks
    assert os.listdir(tmp_path / "tmp") == [], "it cleans up"
    found = json.loads(Path(files[0]).read_text())
    rows = found["rows"]
    assert {row["name"] for row in rows} == set(FAST)
    for row in rows:
        assert row["what"] in said and row["unit"]
        assert row["ours"] and min(row["ours"]) > 0, row
        if row["beside"]:
            assert min(row["beside"]) > 0 and row["ratio"] > 0, row
            assert row["met"] in (True, False), row
        else:
            assert found["versions"][row["against"]] == "absent" and row["met"] is None, row
    rivals = [row["against"] for row in rows if row["name"] == "drain"]
    assert rivals == list(bench.RIVALS)
    assert all(bool(shutil.which(name)) == (found["versions"][name] != "absent") for name in rivals)
    bars = ElementTree.parse(files[1]).findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 2 * sum(bool(row["beside"]) for row in rows)


def test_the_big_queue_is_one_that_could_have_come_about(tmp_path):
    path = str(tmp_path / "queue.db")
    bench.build(path, 50, 40, 30, 20)
    db = database.connect(path)
    assert [text for _, text, _ in database.check(db) if text] == []
    counts = database.counts(db)
    assert (counts["completed"], counts["pending"], counts["dead"]) == (50, 70, 20)
    assert len(list(database.ready_jobs(db, time.time(), -1))) == 30
    db.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_interrupted_it_leaves_nothing_behind(tmp_path, number):
    process = start(tmp_path, "--only", "crowd", quick=False)
    eventually(lambda: list(tmp_path.glob("bench-*/*/queue.db.run/w*.out")), "jobs run", 120)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert os.listdir(tmp_path) == []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(tmp_path) not in status.read_text(), status
        except OSError:
            pass  # it has ended
