"""The demo keeps its word: every scene as promised, a cross where not, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, eventually
from demo import SCENES, marked
from mutants import NOT_COPIED, Mutant, changed

AT_MOST_S = 180  # under a minute on a machine of its own; this one may be shared
NO_FENCE = Mutant("worker.py", "return not left", "return True", "", "")


def call(place: Path, *words: str, root: Path = ROOT, **more: str) -> dict[str, Any]:
    """Return how to call the demo so that all it makes lies in `place`."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith("QUEUECTL_")}
    return dict(
        args=[sys.executable, str(root / "queuectl.py"), "demo", *words],
        env=kept | {"TMPDIR": str(place), "PYTHONIOENCODING": "utf-8", **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def play(place: Path, *words: str, **more: Any) -> tuple[int, str]:
    """Run the demo; return its exit code and what it said. Whatever it is, nothing is left."""
    done = subprocess.run(**call(place, *words, **more), timeout=AT_MOST_S)
    assert "Traceback" not in done.stdout and "\x1b" not in done.stdout, done.stdout
    assert_nothing_left(place)
    return done.returncode, done.stdout


def assert_nothing_left(place: Path) -> None:
    assert marked(place) == [] and list(place.iterdir()) == []


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "temp").mkdir()
    return tmp_path / "temp"


def test_every_scene_is_as_promised(place: Path) -> None:
    code, said = play(place)
    assert code == 0 and "✗" not in said, said
    assert f"✓ {len(SCENES)} scenes, " in said
    for number, name in enumerate(SCENES, 1):
        scene = said.partition(f" {number}. {name} ")[2].partition("\n──")[0]
        assert "$ queuectl.py " in scene and "✓" in scene, name
    assert "another worker was faster" in said


def test_scenes_by_name_in_plain_characters_with_a_pause(place: Path) -> None:
    code, said = play(place, "--pause", "unknown", "complete", PYTHONIOENCODING="ascii")
    assert code == 0 and "1. unknown" in said and "2. complete" in said and "lanes" not in said
    assert said.isascii() and "ok it is completed" in said and said.count("Enter goes on") == 1


def test_a_scene_that_is_not_there_is_refused_and_the_others_are_named(place: Path) -> None:
    assert play(place, "nowhere") == (
        2,
        f'Error: no scene "nowhere"; there are: {", ".join(SCENES)}\n',
    )
    code, said = play(place, "--list")
    assert code == 0 and [line.split()[0] for line in said.splitlines()] == [*SCENES]


@pytest.mark.skipif(sys.platform != "linux", reason="what it left is found in /proc")
def test_a_broken_queue_makes_a_cross(place: Path, tmp_path: Path) -> None:
    """Without the fence a lost job runs again while its first run lives."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    (copy / NO_FENCE.file).write_text(changed(NO_FENCE))
    code, said = play(place, "kill", root=copy)
    assert code == 1 and "✗ never two at once" in said and "checks failed (kill)" in said, said


def test_without_the_tests_it_says_what_is_missing(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("tests", *NOT_COPIED))
    code, said = play(place, root=copy)
    assert code == 1 and "demo.py is missing" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_walk_that_is_broken_off_leaves_nothing(place: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(**call(place, "kill"))
    eventually(lambda: list(place.glob("*/ledger")), "the job of the scene runs")
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "Traceback" not in said, said
    assert_nothing_left(place)
