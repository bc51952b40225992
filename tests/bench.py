"""How fast: queuectl beside its rivals and beside the ideal, measured in turn, in one table.

    python tests/bench.py [--json FILE] [--svg FILE] [--only NAME ...] [--quick | --long]

Each row has a figure of queuectl, one of a rival, an ideal or a target, their ratio, and what the
ratio should be. Figures are medians, with the lowest and highest in brackets; ratios are medians of
the rounds' ratios. Rivals (xargs, parallel, tsp, nq) are used if they are here: apt-get install
findutils parallel task-spooler nq. It takes three minutes on two cores, four or more if they are
shared; `--long` prunes all of a million jobs instead of a fifth, a minute and more.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import re
import select
import shlex
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchtable import Row, chart, table  # noqa: E402

import config  # noqa: E402
import database  # noqa: E402
import worker  # noqa: E402

CORES = len(os.sched_getaffinity(0))
KILOBYTE = "printf %01023d\\\\n 0"  # a builtin of sh: 1,024 bytes and no further process

# How each rival runs the lines of ./jobs, CORES at a time, each line as `/bin/sh -c LINE`.
RIVALS = {
    "xargs": ("findutils", "xargs -d '\\n' -P $CORES -n1 /bin/sh -c < jobs > said"),
    "parallel": (
        "parallel",
        "PARALLEL_HOME=$PWD PARALLEL_SHELL=/bin/sh parallel --will-cite -j $CORES < jobs > said",
    ),
    # A server with CORES slots. Enqueueing is its own command for each job, and part of the time.
    "tsp": (
        "task-spooler",
        "export TS_SOCKET=$PWD/socket TMPDIR=$PWD; tsp -S $CORES &&"
        " xargs -d '\\n' -n1 tsp /bin/sh -c < jobs > said && tsp -w && tsp -K",
    ),
    # One queue runs one job at a time, so there are CORES queues, fed side by side.
    "nq": (
        "nq",
        "for n in $(seq $CORES); do (NQDIR=$PWD/q$n; export NQDIR;"
        " awk \"NR % $CORES == $n - 1\" jobs | xargs -d '\\n' -n1 nq -q /bin/sh -c && nq -w) &"
        " done; wait",
    ),
}

# `worker start` as it is, in an interpreter that notes each claim: w for won, l for lost.
COUNTING = """
import os, re, sqlite3, sys
note = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.path.insert(0, sys.argv.pop(1))
class Connection(sqlite3.Connection):
    def execute(self, sql, *given):
        cursor = super().execute(sql, *given)
        if re.search(r"UPDATE jobs\\s+SET state = 'processing'", sql):
            os.write(note, b"w" if cursor.rowcount else b"l")
        return cursor
connect = sqlite3.connect
sqlite3.connect = lambda *given, **named: connect(*given, factory=Connection, **named)
import queuectl
sys.exit(queuectl.main())
"""


class Bench:
    """The measurements, each a method that adds rows; and what they share."""

    def __init__(self, folder: Path, quick: bool, long: bool):
        self.folder, self.quick, self.long, self.rows = folder, quick, long, []
        self.places = 0
        self.environment = {k: v for k, v in os.environ.items() if k[:9] != "QUEUECTL_"} | {
            "CORES": str(CORES),
            # Compiled once, as where people use it, and not into the checkout.
            "PYTHONPYCACHEPREFIX": str(folder / "compiled"),
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.timed(self.words("warm", "enqueue", "--command", "true"))

    def size(self, full: int) -> int:
        return max(1, full // 10) if self.quick else full

    def rounds(self, full: int) -> range:
        return range(2 if self.quick else full)

    def add(self, *given: object, **named: object) -> None:
        self.rows.append(Row(*given, **named))

    # --- processes and queues ------------------------------------------------------------------

    def place(self) -> Path:
        """Return a new empty directory."""
        self.places += 1
        folder = self.folder / str(self.places)
        folder.mkdir()
        return folder

    def words(self, queue: str | Path, *words: object) -> list[str]:
        """Return a command line of queuectl on a queue of the temporary directory."""
        files = ["--db", str(self.folder / queue), "--config", str(self.folder / "config.json")]
        return [sys.executable, str(ROOT / "queuectl.py"), *files, *map(str, words)]

    def start(self, words: list[str], stdin: str | None = None, cwd: Path | None = None):
        """Start a process whose lines go to a file, away from our terminal and its Ctrl+C."""
        with open(stdin or os.devnull) as source, open(self.folder / "said", "wb") as said:
            return subprocess.Popen(
                words, stdin=source, stdout=said, stderr=said, env=self.environment,
                cwd=cwd or self.folder, start_new_session=True,
            )  # fmt: skip

    def timed(self, words: list[str], stdin: str | None = None, cwd: Path | None = None) -> float:
        """Return the seconds from a process's start to its exit; it must succeed."""
        began = time.perf_counter()
        process = self.start(words, stdin, cwd)
        code = process.wait()
        span = time.perf_counter() - began
        if code:
            raise RuntimeError(f"{words}: exit code {code}: {(self.folder / 'said').read_text()}")
        return span

    def drained(self, command: str, count: int, workers: int = CORES) -> tuple[float, float]:
        """Return the seconds of enqueueing these jobs and of draining them, from start to exit."""
        queue = self.place() / "queue.db"
        (queue.parent / "jobs").write_text(f"{command}\n" * count)
        enqueue = self.words(queue, "enqueue", "--lines", "--file", queue.parent / "jobs")
        start = self.words(queue, "worker", "start", "--drain", "--count", workers)
        spans = self.timed(enqueue), self.timed(start)
        self.must_be_completed(queue, count)
        return spans

    def must_be_completed(self, queue: Path, count: int) -> None:
        db = database.connect(str(queue))
        found = database.counts(db)
        db.close()
        if found["completed"] != count:
            raise RuntimeError(f"{count} jobs should be completed: {found}")

    def rival(self, name: str, command: str, count: int) -> float:
        """Return the seconds in which a rival has taken in and run these jobs."""
        folder = self.place()
        (folder / "jobs").write_text(f"{command}\n" * count)
        span = self.timed(["/bin/sh", "-c", RIVALS[name][1]], cwd=folder)
        reap()
        shutil.rmtree(folder, ignore_errors=True)  # nq and tsp leave a file for each job
        return span

    def idle_workers(self, queue: str, count: int) -> tuple[subprocess.Popen, list[int]]:
        """Start workers, wait until they have nothing to do, and return all their pids."""
        process, pids = self.start(self.words(queue, "worker", "start", "--count", count)), []
        deadline = time.monotonic() + 30
        while len(pids) < count:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "said").read_text())
            time.sleep(0.05)
            db = database.connect(str(self.folder / queue))
            pids = [row["pid"] for row in database.workers(db)]
            db.close()
        time.sleep(1)
        return process, pids

    # --- one row after another -----------------------------------------------------------------

    def drain(self) -> None:
        """`true` at full speed. Rivals that are slow get fewer jobs: rates are compared."""
        count, few = self.size(3000), self.size(600)
        jobs = {"xargs": count, "parallel": few // 2, "tsp": few, "nq": few}
        here = [name for name in jobs if shutil.which(name)]
        drain, both, rates = [], [], {name: [] for name in jobs}
        for _ in self.rounds(3):
            enqueued, ran = self.drained("true", count)
            drain.append(count / ran)
            both.append(count / (enqueued + ran))
            for name in here:
                rates[name].append(jobs[name] / self.rival(name, "true", jobs[name]))
        what, remark = f"{count:,} jobs `true`, {CORES} workers", "start-up included"
        self.add("drain", what, "jobs/s", drain, "xargs", rates["xargs"], ">= 0.9", remark)
        for name in ("parallel", "tsp", "nq"):
            # parallel reads its jobs as it goes; for the others enqueueing is part of the time.
            ours, more = (drain, "") if name == "parallel" else (both, ", enqueued")
            told = f"{name} with {jobs[name]:,}"
            self.add("drain", what + more, "jobs/s", ours, name, rates[name], ">= 2", told)

    def output(self) -> None:
        """Jobs that print 1 KB each, which queuectl keeps and xargs writes into one file: 10,000 of
        them, in two rounds."""
        count, ours, theirs = self.size(5_000), [], []
        for _ in self.rounds(2):
            ours.append(count / self.drained(KILOBYTE, count)[1])
            if shutil.which("xargs"):
                theirs.append(count / self.rival("xargs", KILOBYTE, count))
        self.add("output", f"{count:,} jobs print 1 KB", "jobs/s", ours, "xargs", theirs, ">= 0.9")

    def sleeps(self) -> None:
        """Jobs of 10 and 100 ms. Their length is what `/bin/sh -c 'sleep ...'` takes by itself."""
        for length, count in ((0.01, self.size(2000)), (0.1, self.size(200))):
            command = f"sleep {length}"
            before = [spawned(command) for _ in range(self.size(20))]
            rate = count / self.drained(command, count)[1]
            after = [spawned(command) for _ in range(self.size(20))]
            ideal = CORES / statistics.median(before + after)
            remark = f"{rate * length / CORES:.3f} of sleeps that cost no process"
            what = f"{count:,} jobs `{command}`"
            self.add("sleeps", what, "jobs/s", [rate], "ideal", [ideal], ">= 0.95", remark)

    def latency(self) -> None:
        """From the commit of an enqueue to the first act of its job, workers idle, on one clock.

        The job writes a byte into a FIFO that we wait on: so the claim, the fork and the start of
        the shell are all in it. The column `started_at`, which comes before them, is the remark.
        """
        fifo, acts, recorded = self.folder / "fifo", [], []
        os.mkfifo(fifo)
        given, settings = {"command": f"echo > {shlex.quote(str(fifo))}"}, config.load("")
        job, handle = config.check_job(given, settings, "/"), os.open(fifo, os.O_RDWR)
        process, _ = self.idle_workers("latency", CORES)
        db, path = database.connect(str(self.folder / "latency")), str(self.folder / "latency")
        for _ in range(self.size(200)):
            time.sleep(random.uniform(0.01, 0.02))
            database.gather(db, [(0, job)])
            first, _ = database.enqueue(db, time.time())
            wall, began = time.time(), time.perf_counter()
            database.ring(path)
            if not select.select([handle], [], [], 30)[0]:
                raise RuntimeError("the job did not start")
            acts.append((time.perf_counter() - began) * 1000)
            os.read(handle, 9)
            recorded.append((database.runs(db, first)[0]["started_at"] - wall) * 1000)
        db.close()
        process.terminate()
        process.wait()
        what = f"enqueue to the job's first act, of {len(acts)}"
        remark = f"to the recorded start: {statistics.median(recorded):.2f}, {p99(recorded):.2f} ms"
        self.add("latency", f"{what}: median", "ms", acts, "target", [2], "<= 1", remark)
        self.add("latency", f"{what}: 99th percentile", "ms", [p99(acts)], "target", [10], "<= 1")

    def enqueue(self) -> None:
        """One command from start to exit, beside the interpreter with the modules it needs."""
        ours, bare = [], []
        for _ in self.rounds(20):
            ours.append(1000 * self.timed(self.words("one", "enqueue", '{"command": "true"}')))
            bare.append(1000 * self.timed([sys.executable, "-c", "import click, sqlite3"]))
        self.add("enqueue", "command `enqueue`", "ms", ours, "bare imports", bare, "<= 1.25")

    def bulk(self) -> None:
        """`enqueue --file` of a million lines: its rate, and the most memory it had."""
        count, lines = self.size(1_000_000), self.folder / "lines"
        with open(lines, "w") as file:
            file.writelines(f'{{"command": "echo {n}"}}\n' for n in range(count))
        began = time.perf_counter()
        process = self.start(self.words("bulk", "enqueue", "--file", lines))
        _, process.returncode, used = os.wait4(process.pid, 0)
        rate = count / (time.perf_counter() - began)
        if process.returncode:
            raise RuntimeError((self.folder / "said").read_text())
        what = f"`enqueue --file`, {count:,} lines of JSON"
        self.add("bulk", what, "jobs/s", [rate], "target", [100_000], ">= 1")
        megabytes = used.ru_maxrss * 1024 / 1e6
        self.add("bulk", f"{what}: peak memory", "MB", [megabytes], "target", [100], "<= 1")
        lines.unlink()
        (self.folder / "bulk").unlink()

    @cached_property
    def big(self) -> str:
        """A queue with 1,000,000 completed, 1,000,000 for later, 100,000 of lower priority."""
        path, began = str(self.folder / "big"), time.perf_counter()
        sizes = self.size(1_000_000), self.size(1_000_000), self.size(100_000)
        build(path, *sizes, self.size(1000))
        told = f"a queue of {sum(sizes):,} jobs in {time.perf_counter() - began:.0f} s"
        print(f"         built {told}", file=sys.stderr)
        return path

    def growth(self) -> None:
        """Claims and finishes a second through database.py, in a small and in the big queue."""
        count, rates = self.size(1000), {}
        queues = [Hand(str(self.folder / "small")), Hand(self.big)]
        for number in range(len(self.rounds(9)) + 1):
            for hand in queues:
                hand.enqueue(count)
                began = time.perf_counter()
                for _ in range(count):
                    hand.claim()
                    hand.finish()
                if number:  # the first warms the caches
                    rate = count / (time.perf_counter() - began)
                    rates.setdefault(hand, []).append(rate)
        for hand in queues:
            hand.close()
        small, big = rates.values()
        what = "claims with 2,100,000 jobs" if not self.quick else "claims with 210,000 jobs"
        self.add("growth", what, "/s", big, "empty queue", small, ">= 0.9")

    def commands(self) -> None:
        """Commands that report, in the big queue, above the start-up: `config get` reads no queue.

        Not `--help`: laying out its text takes longer than `list` does.
        """
        db = database.connect(self.big)
        job = database.job(db, self.size(500_000))["id"]
        db.close()
        asked = {
            "status": ["status"], "list": ["list"], "list --ready": ["list", "--ready"],
            "show": ["show", job], "logs": ["logs", job], "dlq list": ["dlq", "list"],
        }  # fmt: skip
        spans = {name: [] for name in asked}
        for _ in self.rounds(4):
            bare = self.timed(self.words(self.big, "config", "get", "max-retries"))
            for name, words in asked.items():
                span = self.timed(self.words(self.big, *words))
                spans[name].append(max(0.1, 1000 * (span - bare)))
        for name, ours in spans.items():
            bound = 300 if name == "status" else 150
            what = f"`{name}` above start-up"
            self.add("commands", what, "ms", ours, "target", [bound], "<= 1")

    def prune(self) -> None:
        """Prune a fifth of the million, or all, while jobs are claimed; then the file's size."""
        old = "1s" if self.long else f"{0.008 * self.size(1_000_000)}s"  # a hundred ended a second
        before = sizes_of(self.big)[0]
        worker.make_run_directory(self.big)
        worker.take_turns(self.big)  # as every worker does, and so `prune`
        hand, waits = Hand(self.big), []
        process = self.start(self.words(self.big, "prune", "--older-than", old))
        began = time.perf_counter()
        while process.poll() is None:
            asked = time.perf_counter()
            hand.claim()
            waits.append(1000 * (time.perf_counter() - asked))
            hand.finish()
            time.sleep(0.001)
        span = time.perf_counter() - began
        hand.close()
        database.turn = nullcontext
        said = (self.folder / "said").read_text().strip()
        if process.returncode or not said.endswith("removed"):
            raise RuntimeError(said)
        remark = f"{said} in {span:.1f} s; median claim {statistics.median(waits):.1f} ms"
        what = f"longest of {len(waits):,} claims during `prune`"
        self.add("prune", what, "ms", [max(waits)], "target", [100], "<= 1", remark)
        self.shrink(before, sizes_of(self.big)[0], old)

    def shrink(self, before: int, pruned: int, old: str) -> None:
        """Make the file small again, if there is a word for it; ideal: no page of it is free."""
        words, how = self.words(self.big, "prune", "--older-than", old), "`prune`"
        self.timed(self.words(self.big, "prune", "--help"))
        if "--vacuum" in (self.folder / "said").read_text():
            how = f"`prune --vacuum` ({self.timed([*words, '--vacuum']):.1f} s)"
        after, used = sizes_of(self.big)
        remark = f"{before / 1e6:.0f} MB before, {pruned / 1e6:.0f} after `prune`"
        what = f"the file after {how}"
        self.add("prune", what, "MB", [after / 1e6], "in use", [used / 1e6], "<= 1.1", remark)

    def crowd(self) -> None:
        """64 workers; how often a claim was lost to another, counted in their own processes."""
        queue, workers, count = self.place() / "queue.db", 64, 64 if self.quick else 640
        (queue.parent / "jobs").write_text("sleep 1\n" * count)
        jobs = ["enqueue", "--lines", "--file", queue.parent / "jobs"]
        self.timed(self.words(queue, *jobs))
        words = self.words(queue, "worker", "start", "--drain", "--count", workers)
        words[1:2] = ["-c", COUNTING, str(queue.parent / "claims"), str(ROOT)]
        rate = count / self.timed(words)
        self.must_be_completed(queue, count)
        claims = (queue.parent / "claims").read_bytes()
        won, lost = claims.count(b"w"), claims.count(b"l")
        remark = f"{lost / won:.2f} lost races a claim" if won else "claims could not be counted"
        what = f"{count} jobs `sleep 1`, {workers} workers"
        self.add("crowd", what, "jobs/s", [rate], "ideal", [workers], ">= 0.9", remark)

    def idle(self) -> None:
        """A supervisor and 8 workers with nothing to do."""
        process, workers = self.idle_workers("idle", 8)
        pids, span = [process.pid, *workers], 1 if self.quick else 6
        before, began = sum(map(cpu_s, pids)), time.perf_counter()
        time.sleep(span)
        share = 100 * (sum(map(cpu_s, pids)) - before) / (time.perf_counter() - began)
        memory = [private_megabytes(pid) for pid in workers]
        process.terminate()
        process.wait()
        what = f"supervisor and 8 idle workers, {span} s: of one core"
        self.add("idle", what, "%", [share], "target", [0.5], "<= 1")
        what = "memory not shared, of an idle worker"
        self.add("idle", what, "MB", [max(memory)], "target", [12], "<= 1")


ROWS = ("drain output sleeps latency enqueue bulk growth commands prune crowd idle").split()


# --- the big queue, and a worker's hand in this process ----------------------------------------

FILL = """
    WITH RECURSIVE counted(n) AS (SELECT :first UNION ALL SELECT n + 1 FROM counted WHERE n < :last)
    INSERT INTO jobs (seq, id, command, priority, run_at, max_retries, backoff_base, timeout_s, cwd,
                      state, due, attempts, worker, exit_code, last_error,
                      created_at, updated_at, started_at, finished_at)
    SELECT n, printf('%08x', n * 2654435761 & 4294967295), 'echo ' || n, :priority, :at + n * 0.01,
           3, 2, 0, '/', :state, :due, :attempts, :worker, :code, :error,
           :now, :now, :ended + n * 0.01, :ended + n * 0.01
    FROM counted"""
FILL_RUNS = """
    INSERT INTO runs (job, attempt, worker, due_at, started_at, started_mono, finished_at, outcome,
                      exit_code, error, stdout_bytes, stderr_bytes, stdout, stderr)
    SELECT seq, attempts, worker, run_at, started_at, 0, finished_at,
           CASE state WHEN 'dead' THEN 'failed' ELSE state END,
           exit_code, last_error, 100, 0, zeroblob(100), x''
    FROM jobs WHERE finished_at IS NOT NULL"""


def build(path: str, completed: int, later: int, lower: int, dead: int) -> None:
    """Make a queue of so many jobs by two statements, faster than they could be enqueued."""
    database.connect(path).close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = OFF")
    db.execute("PRAGMA synchronous = OFF")
    db.execute("PRAGMA cache_size = -200000")
    named = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    indexes, now, last = db.execute(named).fetchall(), time.time(), 0
    db.execute("BEGIN")
    for name, _ in indexes:
        db.execute(f"DROP INDEX {name}")
    for state, count, priority, due in (
        ("completed", completed, 0, None),  # of the last hours, a hundred a second
        ("pending", later, 100, 0),  # for next year, and then before all others
        ("pending", lower, -1, 1),
        ("dead", dead, 0, None),
    ):
        first, last = last + 1, last + count
        ended = None if state == "pending" else now - last * 0.01
        at = now - last * 0.01 + (366 * 86_400 if due == 0 else 0)
        runs = {"completed": 1, "dead": 4}.get(state, 0)
        given = dict(first=first, last=last, priority=priority, at=at, state=state, due=due)
        given |= dict(attempts=runs, worker="w0" if runs else None, ended=ended, now=now)
        given |= dict(code=runs // 4 if runs else None, error="exit code 1" if runs > 1 else None)
        db.execute(FILL, given)
    db.execute(FILL_RUNS)
    for _, sql in indexes:
        db.execute(sql)
    db.execute("COMMIT")
    db.execute("PRAGMA journal_mode = WAL")
    db.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # or the first checkpoint of a measurement would have to


class Hand:
    """A worker that only claims and finishes: what the database does for a job, and no more."""

    def __init__(self, path: str):
        self.db, now = database.connect(path, durable=False), time.time()
        self.supervisor = database.register_supervisor(self.db, "bench", "", 0, "", now, 30)
        self.name = database.register_worker(self.db, self.supervisor, 0, "", now)
        self.run: database.Run | None = None

    def enqueue(self, count: int) -> None:
        """Add jobs, and write the log of that into the file: it is not what is measured next."""
        job = config.check_job({"command": "true"}, config.load(""), "/")
        database.gather(self.db, ((0, job) for _ in range(count)))
        database.enqueue(self.db, time.time())
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def claim(self) -> None:
        self.run, _ = database.claim(self.db, self.name, time.time(), time.monotonic)

    def finish(self) -> None:
        done = database.Result("completed", 0)
        if not database.finish(self.db, self.run, done, time.time(), 3600, 0):
            raise RuntimeError("a claim was lost")

    def close(self) -> None:
        database.remove_worker(self.db, self.name)
        database.remove_supervisor(self.db, self.supervisor)
        self.db.close()


def sizes_of(path: str) -> tuple[int, int]:
    """Return the bytes of a queue on disk, and of its pages that are in use."""
    db = sqlite3.connect(path)
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    db.close()
    return os.path.getsize(path), (pages - free) * size


# --- what the system says of processes (Linux) -------------------------------------------------


def spawned(command: str) -> float:
    """Return the seconds of one command by itself, with nobody but the kernel in between."""
    began = time.perf_counter()
    os.waitpid(os.posix_spawn("/bin/sh", ["/bin/sh", "-c", command], os.environ), 0)
    return time.perf_counter() - began


def cpu_s(pid: int) -> float:
    """Return the seconds a process has computed: its main thread, and its children that ended."""
    status = worker.process_status(pid)
    children = sum(map(int, status[13:15])) / os.sysconf("SC_CLK_TCK")  # cutime, cstime: proc(5)
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9 + children
    except OSError:  # only ticks of 10 ms then
        return sum(map(int, status[11:13])) / os.sysconf("SC_CLK_TCK") + children


def private_megabytes(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", text, re.M))) * 1024 / 1e6


def adopt() -> None:
    """Become the parent of all that our children leave behind, so that it can be found and ended:
    tsp's server, nq's jobs, workers (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def reap(kill: bool = False) -> None:
    """Bury adopted children that have ended or, to `kill`, end all until none is left."""
    while True:
        if kill:
            for stat in Path("/proc").glob("[0-9]*"):
                status = worker.process_status(int(stat.name))
                if status and int(status[1]) == os.getpid():
                    worker.send(int(stat.name), signal.SIGKILL)
        try:
            if os.waitpid(-1, 0 if kill else os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def about() -> dict[str, object]:
    """Return what was measured where, and against which versions."""
    versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name, (package, _) in RIVALS.items():
        ask = ["dpkg-query", "-W", "-f", "${Version}", package]
        known = shutil.which(name) and shutil.which("dpkg-query")
        found = subprocess.run(ask, capture_output=True, text=True).stdout if known else ""
        versions[name] = (found or "version unknown") if shutil.which(name) else "absent"
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return dict(when=when, cores=CORES, kernel=platform.release(), load=os.getloadavg()[0]) | {
        "versions": versions
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="every figure of every round")
    parser.add_argument("--svg", metavar="FILE", help="a bar chart")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=ROWS, help=" ".join(ROWS))
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="a tenth of the size: a smoke test")
    sizes.add_argument("--long", action="store_true", help="prune a million jobs, not a fifth")
    given = parser.parse_args()
    adopt()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    folder, facts, began = Path(tempfile.mkdtemp(prefix="bench-")), about(), time.monotonic()
    try:
        bench = Bench(folder, given.quick, given.long)
        for name in given.only or ROWS:
            print(f"{time.monotonic() - began:5.0f} s  {name}", file=sys.stderr)
            getattr(bench, name)()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # this is quick, and must come to its end
        reap(kill=True)
        shutil.rmtree(folder)
    facts["seconds"] = round(time.monotonic() - began, 1)
    print(table(bench.rows))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    quick = "; QUICK: a tenth of the size, for a smoke test" if given.quick else ""
    spent = f"{CORES} cores, load {facts['load']:.1f} at the start, {facts['seconds']:.0f} s"
    print(f"\n{spent}; {versions}{quick}")
    if given.json:
        rows = [asdict(row) for row in bench.rows]
        Path(given.json).write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    if given.svg:
        Path(given.svg).write_text(chart(bench.rows, facts))


if __name__ == "__main__":
    main()
