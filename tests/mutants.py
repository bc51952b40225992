"""Show that each guard in mutants.tsv bears a load: take it away, and the test it names fails.

    python tests/mutants.py [--only NUMBER ...]

First the named tests must pass as things are. Then each change is made in a copy of the checkout,
alone, and its test is run there: "caught" if it fails or hangs. Exit 1 unless all are caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("mutants.tsv")
AT_ONCE = 2
HANGS_S = 180
MARK = "MUTANT_RUN"  # in the environment of all that a run starts, to find what it leaves behind
NOT_COPIED = (".*", "__pycache__", "*.db*")
CAUGHT = 1  # pytest's exit code for "tests failed"; others mean that it could not run them


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    test: str
    why: str


def table() -> list[Mutant]:
    lines = [line for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0].split("\t") == list(Mutant._fields)
    return [Mutant(*line.split("\t")) for line in lines[1:]]


def changed(mutant: Mutant, folder: Path = ROOT) -> str:
    """Return the file's text without the guard; ValueError if it does not stand there once."""
    text = (folder / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.old!r} is {text.count(mutant.old)} times in {mutant.file}")
    text = text.replace(mutant.old, mutant.new)
    compile(text, mutant.file, "exec")  # a change that is no Python would be caught by any test
    return text


def run_tests(copy: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Run tests in a copy: (pytest's exit code, the end of its output); a hang is a failure."""
    mark, said = uuid.uuid4().hex, copy / "said"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    words = "-m pytest -n0 -x -q --tb=line --basetemp".split()
    with open(said, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words, copy / "temp", *(f"tests/{test}" for test in tests)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=kept | {MARK: mark},
            cwd=copy,
            start_new_session=True,
        )
        try:
            code = process.wait(HANGS_S)
        except subprocess.TimeoutExpired:
            code = CAUGHT
            file.write(f"\nno end after {HANGS_S} s\n".encode())
        finally:
            process.kill()
            process.wait()
            end_marked(mark)
    return code, said.read_text(errors="replace").strip()


def end_marked(mark: str) -> None:
    """End what a failed test has left running: every process that inherited its mark."""
    sign = f"{MARK}={mark}".encode()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else [])):
        try:
            handle = os.pidfd_open(pid)  # holds the process: its pid cannot be used again meanwhile
        except OSError:
            continue
        try:
            if sign in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except OSError:
            pass  # gone, or not ours to read
        finally:
            os.close(handle)


def in_copy(do: Callable[[Path], tuple[int, str]]) -> tuple[int, str]:
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        return do(copy)


def unharmed(tests: Iterable[str]) -> tuple[int, str]:
    return in_copy(lambda copy: run_tests(copy, tests))


def harmed(mutant: Mutant) -> tuple[str, str]:
    """Say what became of one mutant: caught, SURVIVED, DOES NOT APPLY or BROKEN; and details."""

    def do(copy: Path) -> tuple[int, str]:
        (copy / mutant.file).write_text(changed(mutant, copy))
        return run_tests(copy, [mutant.test])

    try:
        code, said = in_copy(do)
    except (ValueError, SyntaxError) as error:
        return "DOES NOT APPLY", str(error)
    return {0: "SURVIVED", CAUGHT: "caught"}.get(code, "BROKEN"), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", type=int, metavar="NUMBER", help="line of the table")
    only = parser.parse_args().only
    chosen = {n: mutant for n, mutant in enumerate(table(), 1) if not only or n in only}
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tests = sorted({mutant.test for mutant in chosen.values()})
        for code, said in pool.map(
            unharmed, filter(None, (tests[n::AT_ONCE] for n in range(AT_ONCE)))
        ):
            if code:
                print(f"{said}\nthe tests must pass before anything is changed")
                return 1
        print(f"{len(tests)} tests pass unharmed ({time.monotonic() - began:.0f} s)", flush=True)

        def timed(mutant: Mutant) -> tuple[str, str, float]:
            start = time.monotonic()
            return *harmed(mutant), time.monotonic() - start

        bad = 0
        for n, (verdict, said, took) in zip(chosen, pool.map(timed, chosen.values())):
            file, old, new, test, _ = chosen[n]
            print(f"{n:3} {verdict} ({took:.1f} s)  {file}: {old} -> {new}  {test}", flush=True)
            if verdict != "caught":
                bad += 1
                print(said, flush=True)
    took = time.monotonic() - began
    print(f"{len(chosen) - bad} of {len(chosen)} mutants caught, in {took:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
