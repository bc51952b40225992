"""Killed before and after each thing it does, the queue comes to a correct end: a sample of them.

`python tests/crashpoints.py` tries them all, and says how many there are.
"""

from __future__ import annotations

import os
from pathlib import Path

import crashpoints
import pytest

SEED = int(os.environ.get("QUEUECTL_CRASH_SEED", "1"))  # another one tries other points


@pytest.mark.parametrize("part", crashpoints.PARTS)
def test_killed_anywhere_it_comes_to_a_correct_end(part: str, tmp_path: Path) -> None:
    total, wrong = crashpoints.sample(part, tmp_path, 6, SEED)
    assert not wrong, "\n".join(wrong)
    print(f"{part}: {total} points")
    assert total >= 20, "then the hook sees nothing"
