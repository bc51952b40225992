"""Every command line that the seeds print runs, and does what is said there: see seeds.tsv.

Then the three scenarios of "Testing Instructions" in 001_1abc4a1f3fd3d0d0.txt, with two terminals.
All of it in a copy of the checkout, so that the files beside queuectl.py are tested too.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import BEFORE, ROOT, Queue, eventually, stamp

PROGRAM = re.compile(r"(?:queuectl|python3? queuectl\.py|node index\.js)(?= )")
DATABASE = re.compile(r"python3? database\.py$")
FROM_NOTHING = re.compile(r".*(?: (?:enqueue|init)\b|database\.py$)")  # what makes its own queue


class Row(NamedTuple):
    seed: str
    printed: str
    exit: int
    stdout: str
    then: str
    seen: str
    run: str


def table() -> list[Row]:
    text = (Path(__file__).parent / "seeds.tsv").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0].split("\t") == list(Row._fields)
    cells = [line.split("\t") for line in lines[1:]]
    rows = [Row(*each, *[""] * (len(Row._fields) - len(each))) for each in cells]
    breaks = [row._replace(printed=row.printed.replace(r"\n", "\n")) for row in rows]
    return [row._replace(exit=int(row.exit), run=row.run or row.printed) for row in breaks]


class Checkout(Queue):
    """A copy of the product's files, where lines run as somebody would who has just cloned it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.shell_environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("QUEUECTL_") and name != "PYTHONDONTWRITEBYTECODE"
        }

    def real(self, line: str) -> str:
        """Return the line with the program's name replaced by this copy of it."""
        for name, file in ((PROGRAM, "queuectl.py"), (DATABASE, "database.py")):
            if found := name.match(line):
                return f'"{sys.executable}" "{self.folder / file}"{line[found.end() :]}'
        raise AssertionError(f"no line of ours: {line}")

    def shell(self, line: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            ["sh", "-c", self.real(line)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.shell_environment,
            cwd=self.folder,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def output(self, line: str) -> str:
        done = self.shell(line)
        assert done.returncode == 0, (line, done)
        return done.stdout

    def background(self, line: str, **streams: Any) -> subprocess.Popen:
        """Start a line in a session of its own, where Ctrl+C reaches nothing else."""
        log = self.folder / f"log{len(self.supervisors)}"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                ["sh", "-c", "exec " + self.real(line)],
                env=self.shell_environment,
                cwd=self.folder,
                start_new_session=True,
                **(streams or {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}),
            )
        process.log = log
        self.supervisors.append(process)
        return process


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders to copy: one fresh, and one with a queue in which all the named jobs are."""
    fresh, used = [tmp_path_factory.mktemp("copy") / name for name in ("fresh", "used")]
    fresh.mkdir()
    for pattern in ("*.py", "*.html", "config.json"):
        for path in ROOT.glob(pattern):
            shutil.copy2(path, fresh)
    jobs = [{"id": "first", "command": "echo first"}, {"command": "echo second"}]
    (fresh / "jobs.json").write_text(json.dumps(jobs, indent=2))
    # Compiled here once: the copies of a file keep its time, and with it what was compiled.
    Checkout(fresh).output("queuectl --help")
    Checkout(fresh).output("queuectl init")
    for path in fresh.glob("queue.db*"):
        path.unlink()
    shutil.copytree(fresh, used)
    checkout = Checkout(used)
    enqueue = "queuectl enqueue --max-retries"
    checkout.output(f"{enqueue} 0 --id job-123 --command 'echo partial; echo broken >&2; exit 3'")
    checkout.output(f"{enqueue} 0 --id job1 --command 'echo hello'")
    checkout.output(f"{enqueue} 0 --id job_dead_id --command 'exit 1'")
    for job in (
        """{"id":"job3","command":"ls /nonexistent","max_retries":1,"backoff_base":0}""",
        """{"id":"flaky","command":"exit 1","max_retries":5,"backoff_base":1000}""",
    ):
        checkout.output(f"queuectl enqueue '{job}'")
    id = checkout.output(f"{enqueue} 0 --command 'echo Hello World; exit 1'").strip()
    (used / "generated").write_text(id)
    supervisor = checkout.background("queuectl worker start")
    wanted = {"pending": 0, "processing": 0, "completed": 1, "failed": 1, "dead": 4}
    try:
        eventually(lambda: wanted.items() <= checkout.states().items(), "the named jobs are ready")
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.wait(timeout=20) == 0
    finally:
        supervisor.kill()  # had this failed; its worker then leaves by itself
    checkout.output("queuectl enqueue --id job2 --command 'echo two'")
    checkout.output("queuectl enqueue --id later --run-at 2099-01-01 --command 'echo later'")
    checkout.assert_clean()
    return {"fresh": fresh, "used": used}


@pytest.fixture
def make(copies: dict[str, Path], tmp_path: Path) -> Iterator[Callable[[str], Checkout]]:
    """Return a function that makes a checkout; the test ends in the check that nothing is left."""
    before = (ROOT / "config.json").read_bytes()
    made = []

    def make_one(kind: str) -> Checkout:
        folder = tmp_path / "queuectl"
        shutil.copytree(copies[kind], folder, ignore=shutil.ignore_patterns("*.run"))
        made.append(Checkout(folder))
        if kind == "used":
            made[0].shell_environment["JOB"] = (folder / "generated").read_text()
        return made[0]

    yield make_one
    for checkout in made:
        if checkout.supervisors:
            checkout.assert_clean()
    assert (ROOT / "config.json").read_bytes() == before
    assert stamp(ROOT / "queue.db") == BEFORE


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row.seed[:3]}: {row.printed:.70}")
def test_line_of_a_seed(row: Row, make: Callable[[str], Checkout]) -> None:
    checkout = make("fresh" if FROM_NOTHING.match(row.printed) else "used")
    if " worker start" in row.run:
        code, stdout = run_workers(checkout, row)
    else:
        running = None
        if row.run.endswith(" worker stop"):
            running = checkout.background("queuectl worker start --count 2")
            eventually(lambda: len(checkout.workers()) == 2, "two workers to stop")
        done = checkout.shell(row.run)
        code, stdout = done.returncode, done.stdout
        assert done.stderr == ""
        if running:
            assert running.wait(timeout=20) == 0
    assert (code, bool(re.search(row.stdout, stdout, re.M))) == (row.exit, True), stdout
    if row.run.endswith(" --json"):
        json.loads(stdout)
    assert (checkout.folder / "queue.db").exists() or row.run.endswith(" --help")
    if row.then:
        seen = checkout.output(f"queuectl {row.then}")
        assert re.search(row.seen, seen, re.M), seen


def run_workers(checkout: Checkout, row: Row) -> tuple[int, str]:
    """Run `worker start`, see that it has its workers and does the waiting job, then Ctrl+C."""
    count = int(re.search(r"--count (\d+)|$", row.run)[1] or 1)
    process = checkout.background(row.run)
    eventually(lambda: len(checkout.workers()) == count, f"{count} workers are up")
    eventually(lambda: checkout.state("job2") == "completed", "the workers do the waiting job")
    assert process.poll() is None, "it must stay until Ctrl+C"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground
    return process.wait(timeout=20), process.log.read_text()


# --- "Testing Instructions" --------------------------------------------------------------------


class Terminal:
    """A real terminal, in which one line runs; what it shows is read without the colours."""

    def __init__(self, checkout: Checkout, line: str):
        self.master, slave = pty.openpty()
        self.shown = b""
        try:
            self.process = checkout.background(
                line,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        finally:
            os.close(slave)

    def text(self) -> str:
        while select.select([self.master], [], [], 0)[0]:
            try:
                data = os.read(self.master, 65_536)
            except OSError:  # Linux: nobody has the other side open any more
                break
            if not data:
                break
            self.shown += data
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", self.shown.decode())

    def wait_for(self, pattern: str) -> None:
        eventually(lambda: re.search(pattern, self.text(), re.M), f"the terminal shows {pattern}")

    def lines(self, verb: str) -> list[tuple[str, str]]:
        """Return (pid, the rest) of the workers' lines with this verb, in order."""
        pattern = rf"^\d\d:\d\d:\d\d  w\d+ +pid (\d+) +{verb} +(.*)$"
        return re.findall(pattern, self.text(), re.M)

    def type_ctrl_c(self) -> None:
        os.write(self.master, b"\x03")
        eventually(lambda: (self.text(), self.process.poll())[1] is not None, "it leaves")
        assert self.process.returncode == 0
        self.wait_for(r"supervisor .* left *$")


@pytest.fixture
def terminals(make: Callable[[str], Checkout]) -> Iterator[tuple[Checkout, Callable]]:
    """Return the second terminal (a checkout, to run lines in) and what opens the first."""
    checkout = make("fresh")
    opened = []

    def open_one(line: str) -> Terminal:
        opened.append(Terminal(checkout, line))
        opened[-1].wait_for(r"supervisor .* started .*worker")
        return opened[-1]

    yield checkout, open_one
    for terminal in opened:
        terminal.process.log.write_text(terminal.text())
        os.close(terminal.master)  # hangs up: should the test have failed, the workers leave


def seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def test_scenario_1_a_job_succeeds(terminals: tuple[Checkout, Callable]) -> None:
    second, open_first = terminals
    first = open_first("python3 queuectl.py worker start --count 1")
    eventually(second.workers, "the worker is up")
    line = r'''python3 queuectl.py enqueue "{\"command\":\"echo 'Test Success'\"}"'''
    id = second.output(line).strip()
    first.wait_for(rf"completed +{id}\b")
    listed = second.output("python3 queuectl.py list --state completed")
    assert re.search(rf"^{id} +completed +1 .*echo 'Test Success'$", listed, re.M), listed
    assert second.output(f"queuectl logs --stdout {id}") == "Test Success\n"
    first.type_ctrl_c()


def test_scenario_2_retries_with_backoff_then_the_dlq(
    terminals: tuple[Checkout, Callable],
) -> None:
    second, open_first = terminals
    # Smaller than the default of 2 s (2, 4 and 8 s), to be short; exact, to be told apart.
    second.output("queuectl config set backoff_base 1.2")
    second.output("queuectl config set backoff_jitter 0")
    first = open_first("python3 queuectl.py worker start --count 1")
    line = r'python3 queuectl.py enqueue "{\"id\":\"fail_test\",\"command\":\"exit 1\"}"'
    assert second.output(line) == "fail_test\n"
    first.wait_for(r"dead +fail_test: .*DLQ")
    tries = [text for _, text in first.lines("failed")]
    waits = [re.search(r"^fail_test: .*retry (\d of \d) in (\S+ s)$", text) for text in tries]
    assert [wait and wait.groups() for wait in waits] == [
        ("1 of 3", "1.2 s"),  # 1.2 ** 1
        ("2 of 3", "1.4 s"),  # 1.2 ** 2
        ("3 of 3", "1.7 s"),  # 1.2 ** 3
    ]
    assert len(first.lines("started")) == 4
    dead = second.output("python3 queuectl.py dlq list")
    assert re.search(r"^fail_test +dead +4 .*exit 1$", dead, re.M), dead
    runs = second.json("show", "fail_test")["runs"]
    for number, (run, following) in enumerate(pairwise(runs), 1):
        gap = seconds_of(following["started_at"]) - seconds_of(run["finished_at"])
        assert gap > 1.2**number - 0.01, "the wait that is told is kept"
    first.type_ctrl_c()


def test_scenario_3_three_workers_share_five_jobs(terminals: tuple[Checkout, Callable]) -> None:
    second, open_first = terminals
    lines = [
        rf'''python3 queuectl.py enqueue "{{\"command\":\"sleep 4; echo 'job {number}'\"}}"'''
        for number in range(1, 6)
    ]
    ids = [second.output(line).strip() for line in lines]
    first = open_first("python3 queuectl.py worker start --count 3")
    eventually(lambda: len(first.lines("completed")) == 5, "five jobs are completed")
    started = first.lines("started")
    assert {text.split()[0] for _, text in started[:3]} == set(ids[:3])
    assert len({pid for pid, _ in started[:3]}) == 3, "three workers take the first three"
    assert {text.split()[0] for _, text in started[3:]} == set(ids[3:])
    assert {pid for pid, _ in started[3:]} <= {pid for pid, _ in started[:3]}
    runs = [second.json("show", id)["runs"][0] for id in ids]
    begins = sorted(seconds_of(run["started_at"]) for run in runs)
    ends = sorted(seconds_of(run["finished_at"]) for run in runs)
    assert begins[2] < ends[0], "three at once"
    assert begins[3] >= ends[0] and begins[4] >= ends[1], "never more than three"
    assert begins[3] - ends[0] < 2, "and the next at once"
    assert [second.output(f"queuectl logs {id} --stdout") for id in ids] == [
        f"job {number}\n" for number in range(1, 6)
    ]
    first.type_ctrl_c()
