"""Crash points, all of them: kill the program around everything it does, and see the queue mend.

    python tests/crashpoints.py [--jobs N] [PART ...]    every point; prints a table
    python tests/crashpoints.py PART POINT               one point; prints what happened

A part is a scenario and the process that dies in it: an enqueuing or cancelling command, a
supervisor, or its first worker. That process runs under `launch` below, which counts before and
after each SQL statement, file operation, signal and child process, and at the chosen count ends it
with SIGKILL. Then what a user would do is done (the command again, a fresh supervisor), and the
queue must come to a correct end. A part is done when a run passes its last point unharmed.

The job keeps a ledger of its own. All its processes hold one lock, so a run that begins while
anything of another one still lives is seen, by whatever it is missed by the queue.
"""

from __future__ import annotations

import os
import signal
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILE_OPERATIONS = (
    "open close unlink mkdir rmdir mkfifo ftruncate write read pread replace rename fsync chmod"
    " fchmod dup2 pipe kill setsid fork"
)

# --- inside the program that dies ------------------------------------------------------------


class Points:
    """Counts what the process does and, if it is the victim, kills it at one count."""

    def __init__(self, role: str) -> None:
        self.role, self.workers, self.count = role, 0, 0
        # Taken out again: the jobs are not to know.
        self.victim, self.at = os.environ.pop("CRASH_IN"), int(os.environ.pop("CRASH_AT"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.trace = os.open(os.environ.pop("CRASH_TRACE"), flags, 0o600)
        self.write, self.kill = os.write, os.kill  # before they are wrapped
        os.register_at_fork(after_in_parent=self.forked, after_in_child=self.born)

    def forked(self) -> None:
        self.workers += 1

    def born(self) -> None:
        self.role = "later worker" if self.workers else "worker"

    def point(self, what: str) -> None:
        if self.role != self.victim:
            return
        self.count += 1
        self.write(self.trace, f"{what}\n".encode())
        if self.count == self.at:
            self.kill(os.getpid(), signal.SIGKILL)

    def around(self, what: str, real, *args, **options):
        self.point(f"before {what}")
        try:
            return real(*args, **options)
        finally:
            self.point(f"after {what}")

    def wrap(self, owner, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args, **options):
            shown = args[0] if args and isinstance(args[0], str | int) else ""
            if isinstance(shown, str) and shown.startswith("/proc/"):
                return real(*args, **options)  # only looked at, and as often as there are processes
            shown = os.path.basename(shown) if isinstance(shown, str) else shown
            return self.around(f"{name} {shown}".strip(), real, *args, **options)

        setattr(owner, name, wrapped)


def launch() -> None:
    """Be queuectl.py with the words of the command line, under the hook."""
    import builtins
    import io
    import runpy
    import sqlite3
    import subprocess

    points = Points("supervisor" if sys.argv[1:3] == ["worker", "start"] else "command")

    class Wire(sqlite3.Connection):
        def execute(self, sql, *rest):
            return points.around(" ".join(sql.split())[:60], super().execute, sql, *rest)

        def executemany(self, sql, *rest):
            return points.around(" ".join(sql.split())[:60], super().executemany, sql, *rest)

        def commit(self):
            return points.around("commit", super().commit)

        def close(self):
            return points.around("close of the database", super().close)

    class Voice(io.TextIOWrapper):
        def flush(self):
            points.around("flush of stdout", super().flush)

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **options: points.around(
        "sqlite3.connect", connect, *args, factory=Wire, **options
    )
    for name in FILE_OPERATIONS.split():
        points.wrap(os, name)
    points.wrap(builtins, "open")
    start = subprocess.Popen.__init__
    subprocess.Popen.__init__ = lambda self, *args, **options: points.around(
        "start of a process", start, self, *args, **options
    )
    end = subprocess.Popen.wait
    subprocess.Popen.wait = lambda self, *args, **options: points.around(
        "wait for a process", end, self, *args, **options
    )
    sys.stdout = Voice(sys.stdout.buffer, "utf-8")
    sys.argv[0] = os.path.join(ROOT, "queuectl.py")
    sys.path[0] = ROOT
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__" and "CRASH_IN" in os.environ:
    launch()
    sys.exit()

# --- outside: one run of a part --------------------------------------------------------------

import argparse  # noqa: E402
import fcntl  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from contextlib import closing  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, ROOT)

import database  # noqa: E402
import worker  # noqa: E402

DEADLINE_S = 60.0
SETTINGS = dict(
    max_retries=9,
    backoff_base=0.05,
    backoff_jitter=0,
    kill_grace_s=0.3,
    lock_timeout_s=2,
    poll_interval_ms=50,
    max_backoff_s=3600,
    job_timeout_s=0,
    output_limit_bytes=8192,
)
# Whatever of an earlier run is still alive, down to a child in the background, holds the lock.
BEGIN = """
exec 9>>lock
flock -n 9 || echo overlap $QUEUECTL_ATTEMPT >>ledger
echo begin $QUEUECTL_ATTEMPT >>ledger
echo ran $QUEUECTL_ATTEMPT
"""
END = "echo end $QUEUECTL_ATTEMPT >>ledger; exit"
STAY = "trap '' TERM; sleep 60 & sleep 60"  # neither it nor its child heeds SIGTERM
FAILS_ONCE = f"{BEGIN} sleep 60 & [ -e failed ] && {{ {END} 0; }}; sleep 0.05; : >failed; {END} 3"
NEVER_ENDS = f"{BEGIN} {STAY}"
ENDS_LATER = f"{BEGIN} [ $(grep -c begin ledger) -gt 1 ] && {{ {END} 0; }}; {STAY}"


def until(check: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.02)
    return found


class Trial:
    """One job in a queue of its own, and one process of it that is killed at a point (0: none)."""

    def __init__(self, folder: Path, role: str, at: int) -> None:
        self.folder, self.role, self.at = folder, role, at
        folder.mkdir(mode=0o700, parents=True)
        self.path, self.trace = str(folder / "queue.db"), folder / "trace"
        (folder / "config.json").write_text(json.dumps(SETTINGS))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("QUEUECTL_", "CRASH_"))},
            "QUEUECTL_DB": self.path,
            "QUEUECTL_CONFIG": str(folder / "config.json"),
        }

    def start(self, *words: str, victim: bool = False) -> subprocess.Popen:
        program, environment = os.path.join(ROOT, "queuectl.py"), self.environment
        if victim:
            program = os.path.abspath(__file__)
            names = {"CRASH_IN": self.role, "CRASH_AT": str(self.at), "CRASH_TRACE": self.trace}
            environment = environment | names
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, program, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if words[0] != "worker" else log,
                stderr=log,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        process.victim = victim
        return process

    def ends(self, process: subprocess.Popen) -> str:
        """Wait until a process has ended, well or killed at its point; return what it printed."""
        said = process.communicate(timeout=DEADLINE_S)[0] or b""
        killed = process.victim and self.role != "worker" and self.crashed()
        expected = -signal.SIGKILL if killed else 0
        assert process.returncode == expected, f"exit {process.returncode}: {self.log()}"
        return said.decode()

    def run(self, *words: str, victim: bool = False) -> str:
        return self.ends(self.start(*words, victim=victim))

    def enqueue(self, command: str, *words: str, victim: bool = False) -> str:
        return self.run("enqueue", "--id", "job", "--command", command, *words, victim=victim)

    def drain(self, victim: bool = False) -> subprocess.Popen:
        return self.start("worker", "start", "--drain", victim=victim)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def points(self) -> list[str]:
        return self.trace.read_text().splitlines() if self.trace.exists() else []

    def crashed(self) -> bool:
        return len(self.points()) == self.at > 0

    def ledger(self, word: str) -> list[str]:
        try:
            lines = (self.folder / "ledger").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line for line in lines if line.startswith(word)]

    def processes(self) -> list[int]:
        """Return all that runs for this queue, whoever started it: its environment says so."""
        mark, found = f"QUEUECTL_DB={self.path}\0".encode(), []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    if mark in file.read() and worker.process_birth(int(pid)):
                        found.append(int(pid))
            except OSError:
                pass
        return found

    def verify(self, state: str) -> tuple[Any, list[Any]]:
        """Hold the queue, the ledger and the machine against each other; return job and runs."""
        assert not self.ledger("overlap"), f"two runs at once: {self.ledger('')}"
        until(lambda: not self.processes(), f"all processes have left; {self.log()}")
        worker.stop(self.path, SETTINGS, lambda *_: None, True, 10)
        with closing(database.connect(self.path)) as db:
            assert database.counts(db)["total"] == 1, "the job is lost, or doubled"
            seq = database.find(db, "job")
            job, runs = database.job(db, seq), database.runs(db, seq)
            problems = [text for _, text, _ in database.check(db) if text]
            staff = [tuple(row) for row in db.execute("SELECT id, supervisor, pid FROM workers")]
        assert not problems, f"doctor: {problems}"
        assert not staff, f"a worker that nobody will settle (id, supervisor, pid): {staff}"
        assert job["state"] == state, f"{job['state']}, not {state}: {self.log()}"
        with open(self.folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if something holds it
        outcomes = [run["outcome"] for run in runs]
        assert outcomes.count("completed") == (state == "completed"), outcomes
        assert outcomes[:-1] == ["failed"] * len(outcomes[:-1]), outcomes
        assert [run["attempt"] for run in runs] == list(range(1, job["attempts"] + 1)), "history"
        begun = self.ledger("begin")
        assert begun == sorted(set(begun)), f"an attempt began twice: {begun}"
        for line in begun:
            assert int(line.split()[1]) <= job["attempts"], f"a run that is not recorded: {line}"
        for run in runs:
            own = f"ran {run['attempt']}\n".encode()
            assert run["stdout"] in ((own,) if run["exit_code"] in (0, 3) else (own, b"")), (
                f"run {run['attempt']} printed {run['stdout']}"
            )
        left = set(os.listdir(self.path + ".run")) - {"bell"}
        assert not left, f"stray files: {left}"
        return job, runs

    def clean(self) -> None:
        """After a failure: end all that still runs for this queue."""
        while pids := self.processes():
            for pid in pids:
                worker.send(pid, signal.SIGKILL)
            time.sleep(0.05)


# --- the scenarios ---------------------------------------------------------------------------


def enqueue(trial: Trial) -> None:
    """The enqueuing command is killed, and given again."""
    acknowledged = "job" in trial.enqueue(FAILS_ONCE, victim=True)
    again = trial.start("enqueue", "--id", "job", "--command", FAILS_ONCE)
    again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 0 or '"job" is in use' in trial.log(), trial.log()
    assert again.returncode == 1 or not acknowledged, "an acknowledged job was lost"
    trial.ends(trial.drain())
    trial.verify("completed")


def life(trial: Trial) -> None:
    """Claim, run, fail, wait, run again, complete; supervisor or worker is killed."""
    trial.enqueue(FAILS_ONCE)
    trial.ends(trial.drain(victim=True))
    if trial.role == "supervisor":  # a worker's death is its living supervisor's to mend
        trial.ends(trial.drain())
    _, runs = trial.verify("completed")
    assert len(runs) <= 2 + trial.crashed(), "one death cost more than one run"
    if not trial.crashed():
        assert [run["exit_code"] for run in runs] == [3, 0]


def end(trial: Trial) -> None:
    """A run is ended by its timeout, the next one by a cancel; anything of it is killed."""
    trial.enqueue(NEVER_ENDS, "--timeout", "0.6s")
    first = trial.drain(victim=trial.role != "command")
    started = [first]

    def timed_out() -> bool:
        if first.poll() is not None and len(started) == 1:
            started.append(trial.drain())
        return len(trial.ledger("begin")) > 1

    until(timed_out, "the second run has begun")
    cancel = trial.start("cancel", "job", victim=trial.role == "command")
    said = cancel.communicate(timeout=DEADLINE_S)[0]
    if trial.role == "command" and cancel.returncode:
        assert trial.crashed(), trial.log()
        cancel = trial.start("cancel", "job")
        cancel.communicate(timeout=DEADLINE_S)
        assert cancel.returncode == 0 or "already cancelled" in trial.log(), trial.log()
        assert cancel.returncode or b"job cancelled" not in said, "a cancel was forgotten"
    else:
        assert cancel.returncode == 0, trial.log()
    for process in [*started, trial.drain()]:
        trial.ends(process)
    job, runs = trial.verify("cancelled")
    if not trial.crashed():
        assert runs[0]["error"].startswith("timed out"), runs[0]["error"]
        assert len(runs) == job["attempts"] > 1


def orphan(trial: Trial) -> None:
    """Leave a job whose worker and supervisor were killed, while its processes live on."""
    trial.enqueue(ENDS_LATER)
    supervisor = trial.drain()
    until(lambda: trial.ledger("begin"), "the run has begun")
    with closing(database.connect(trial.path)) as db:
        pids = [row["pid"] for row in database.workers(db)]
    supervisor.kill()
    supervisor.wait()
    for pid in pids:
        worker.send(pid, signal.SIGKILL)


def reclaim(trial: Trial) -> None:
    """The supervisor that fences and takes over what others left behind is killed."""
    orphan(trial)
    trial.ends(trial.drain(victim=True))
    trial.ends(trial.drain())
    _, runs = trial.verify("completed")
    assert runs[0]["error"].startswith("worker lost"), runs[0]["error"]


def abandoned(trial: Trial) -> None:
    """The cancelling command is killed while it ends a run that no supervisor looks after."""
    orphan(trial)
    said = trial.run("cancel", "job", victim=True)
    if trial.crashed() and "job" not in said:
        again = trial.start("cancel", "job")
        again.communicate(timeout=DEADLINE_S)
        # A first cancel that came to the mark alone lets the run end as lost, and then as marked.
        assert again.returncode == 0 or "already cancelled" in trial.log(), trial.log()
    trial.ends(trial.drain())
    trial.verify("cancelled")


PARTS: dict[str, tuple[Callable[[Trial], None], str]] = {
    "enqueue/command": (enqueue, "command"),
    "life/supervisor": (life, "supervisor"),
    "life/worker": (life, "worker"),
    "end/supervisor": (end, "supervisor"),
    "end/worker": (end, "worker"),
    "end/command": (end, "command"),
    "reclaim/supervisor": (reclaim, "supervisor"),
    "abandoned/command": (abandoned, "command"),
}


def attempt(part: str, at: int, folder: Path) -> tuple[bool, str, str, int]:
    """Run a part with its victim killed at one point: (killed?, where, what is wrong, points)."""
    scenario, role = PARTS[part]
    trial, wrong = Trial(folder / f"{part.replace('/', '-')}-{at}", role, at), ""
    try:
        scenario(trial)
    except Exception:
        wrong = traceback.format_exc() + trial.log()
    finally:
        trial.clean()
    points = trial.points()
    crashed, where = trial.crashed(), points[-1] if points else ""
    if not wrong:
        shutil.rmtree(trial.folder)
    return crashed, where, wrong, len(points)


def sample(part: str, folder: Path, count: int, seed: int, width: int = 2) -> tuple[int, list[str]]:
    """Try every k-th point so that there are about `count`: (points of the part, what is wrong)."""
    _, _, wrong, total = attempt(part, 0, folder)
    if wrong:
        return total, [f"{part} unharmed: {wrong}"]
    step = max(1, total // count)
    # The first is always reached; others may not be, where a slow machine has made `total` long.
    chosen = [1, *range(2 + random.Random(seed).randrange(step), total + 1, step)]
    with ThreadPoolExecutor(width) as pool:
        found = list(pool.map(lambda at: (at, *attempt(part, at, folder)), chosen))
    killed = sum(crashed for _, crashed, *_ in found)
    wrong = [f"{part} {at} ({where}): {why}" for at, _, where, why, _ in found if why]
    if not killed:
        wrong.append(f"{part}: never killed")
    return total, wrong


def all_points(part: str, folder: Path, width: int) -> tuple[int, list[str]]:
    """Try each point until runs pass unharmed: (points, what is wrong).

    How often a supervisor looks varies with the time, so one run alone does not tell the end.
    """
    points, wrong, first = 0, [], 1
    with ThreadPoolExecutor(width) as pool:
        while True:
            chosen = range(first, first + 4 * width)
            found = list(pool.map(lambda at: (at, *attempt(part, at, folder)), chosen))
            points += sum(crashed for _, crashed, *_ in found)
            wrong += [f"{part} {at} ({where}): {why}" for at, _, where, why, _ in found if why]
            if not any(crashed for _, crashed, *_ in found[-width:]):
                return points, wrong
            first = chosen.stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=4, help="how many runs at a time")
    parser.add_argument("words", nargs="*", metavar="PART [POINT]", help=", ".join(PARTS))
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crashpoints."))
    if given.words[1:] and given.words[1].isdigit():
        crashed, where, wrong, count = attempt(given.words[0], int(given.words[1]), folder)
        print(f"{'killed' if crashed else 'unharmed'} at point {count}, {where}")
        print(wrong or "a correct end")
        sys.exit(bool(wrong))
    print(f"{'scenario/killed':<20}  {'points':>6}  {'wrong':>5}  {'seconds':>7}", flush=True)
    total, failures = 0, []
    for part in given.words or PARTS:
        began = time.monotonic()
        points, wrong = all_points(part, folder, given.jobs)
        took = time.monotonic() - began
        print(f"{part:<20}  {points:>6}  {len(wrong):>5}  {took:>7.0f}", flush=True)
        total, failures = total + points, failures + wrong
    print(f"{'in all':<20}  {total:>6}  {len(failures):>5}")
    for text in failures:
        print(f"\n{text}")
    if failures:
        print(f"\nwhat is left of the failed runs: {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
