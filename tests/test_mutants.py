"""The table of load-bearing lines fits the source, and of its mutants a sample is caught."""

from __future__ import annotations

import ast
import random
import time
from pathlib import Path

import pytest
from mutants import Mutant, changed, harmed, table, unharmed

MUTANTS = table()
QUICK = [each for each in MUTANTS if each.test.startswith(("test_database.py", "test_config.py"))]
# Other ones each day, the same in every process of a parallel run; `python tests/mutants.py`: all.
SAMPLE = random.Random(time.gmtime().tm_yday).sample(QUICK, 3)


def name(mutant: Mutant) -> str:
    return f"{mutant.file}: {mutant.old}"


def test_the_table_is_long_enough_and_each_line_says_what_breaks():
    assert len(MUTANTS) >= 24
    assert len({each[:3] for each in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert all(cell == cell.strip() for cell in mutant), mutant
        assert len(mutant.why) <= 110 and mutant.why.endswith("."), mutant.why


@pytest.mark.parametrize("mutant", MUTANTS, ids=name)
def test_the_line_is_there_once_and_so_is_its_test(mutant):
    changed(mutant)  # raises if not
    file, _, test = mutant.test.partition("::")
    tree = ast.parse(Path(__file__).with_name(file).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert names.count(test) == 1


@pytest.mark.parametrize("mutant", SAMPLE, ids=name)
def test_a_guard_is_missed_when_it_is_gone(mutant):
    assert unharmed([mutant.test])[0] == 0, "then it would be caught by chance"
    verdict, said = harmed(mutant)
    assert verdict == "caught", said
