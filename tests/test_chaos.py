"""A short storm; `python tests/chaos.py` is the long one."""

from __future__ import annotations

import os

from chaos import Chaos

SEED = int(os.environ.get("QUEUECTL_CHAOS_SEED", "1"))  # another one makes another storm


def test_in_a_storm_of_kills_no_job_is_lost_and_no_two_runs_of_one_overlap(capsys):
    with Chaos(seconds=12, seed=SEED, jobs=60, supervisors=2, workers=3) as storm:
        good = storm.run()
    assert good, capsys.readouterr().out
    strikes = sum(storm.kills.values())
    assert strikes >= 10 and storm.runs > 20 and storm.hits >= 3, "then this was no storm"


def test_the_storm_would_see_two_runs_at_once():
    lines = [line.split() for line in ("B a 1 x", "B a 2 y", "T a 1 x", "T a 2 y")]
    assert Chaos.overlaps(None, lines) == ["a attempt 1: T of x beside y"]
