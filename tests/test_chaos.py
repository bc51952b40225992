"""A short storm; `python tests/chaos.py` is the long one."""

from __future__ import annotations

import os

from chaos import Chaos

SEED = int(os.environ.get("QUEUECTL_CHAOS_SEED", "1"))  # another one makes another storm


def test_in_a_storm_of_kills_no_job_is_lost_and_no_two_runs_of_one_overlap(capsys):
    with Chaos(seconds=12, seed=SEED, jobs=60, supervisors=2, workers=3) as storm:
        good = storm.run()
    assert good, capsys.readouterr().out
    assert sum(storm.kills.values()) >= 10 and storm.runs > 20, "then this was no storm"
