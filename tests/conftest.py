"""What the tests share: a throw-away queue, real processes, and the check that nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Nothing may be left in the checkout, by these processes and by those they start. What those
# compile is kept for the next ones: the first process here makes the directory and removes it.
sys.dont_write_bytecode = True
COMPILED = "PYTHONPYCACHEPREFIX"
OURS = COMPILED not in os.environ
if OURS:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="queuectl-compiled-")
for name in ("PYTHONDONTWRITEBYTECODE", "NO_COLOR", "TERM"):  # what is tested must not depend on
    os.environ.pop(name, None)
# A shell's background ignores it, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import configuration, settings  # noqa: E402

import database  # noqa: E402
import worker  # noqa: E402

# No deadline, for machines are shared.
configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "hypothesis"))
settings.register_profile("here", database=None, deadline=None)
settings.load_profile("here")

DEADLINE_S = 30.0  # generous: machines are shared; a test that passes never waits for it


def pytest_unconfigure() -> None:
    if OURS:
        shutil.rmtree(os.environ.pop(COMPILED), ignore_errors=True)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Under QUEUECTL_TEST_ALL=1 every part is installed, so a skip hides something."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("QUEUECTL_TEST_ALL"):
        report.outcome = "failed"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """And so does a whole file that skips itself."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("QUEUECTL_TEST_ALL"):
        report.outcome = "failed"


def eventually(check: Callable[[], Any], what: str = "", seconds: float = DEADLINE_S) -> Any:
    """Poll until `check` returns something true, and return that; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or check}")
        time.sleep(0.02)


class Queue:
    """A queue of its own in a private directory, with its own settings."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = str(folder / "queue.db")
        self.config = str(folder / "config.json")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("QUEUECTL_")},
            "QUEUECTL_DB": self.path,
            "QUEUECTL_CONFIG": self.config,
        }
        self.supervisors: list[subprocess.Popen] = []
        self.sessions: set[int] = set()  # of every worker seen, to look for what they left

    def configure(self, **settings: float) -> None:
        """Write a settings file; quick ones, so that tests need not wait."""
        Path(self.config).write_text(json.dumps(settings))

    def run(
        self,
        *words: str,
        stdin: str | bytes | None = None,
        check: int | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess:
        """Run one command as a user would; with `check`, require that exit code."""
        done = subprocess.run(
            [sys.executable, str(ROOT / "queuectl.py"), *words],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env=self.environment,
            cwd=cwd or self.folder,
            timeout=120,
        )
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        assert "Traceback" not in done.stderr, done.stderr
        if check is not None:
            assert done.returncode == check, (words, done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json", check=0).stdout)

    def job(self, id: str) -> dict[str, Any]:
        return self.json("show", id)

    def state(self, id: str) -> str:
        """Read one state straight from the file: cheap enough to poll."""
        db = database.connect(self.path)
        try:
            return database.job(db, database.find(db, id))["state"]
        finally:
            db.close()

    def states(self) -> dict[str, int]:
        db = database.connect(self.path)
        try:
            return database.counts(db)
        finally:
            db.close()

    def workers(self) -> list[Any]:
        """Return the rows of the live workers, remembering their sessions for the last check."""
        db = database.connect(self.path)
        try:
            rows = worker.live_workers(db)
        finally:
            db.close()
        self.sessions |= {row["pid"] for row in rows}
        return rows

    def start(
        self, *words: str, count: int = 1, ready: bool = True, explain: bool = False
    ) -> subprocess.Popen:
        """Start a supervisor in the foreground, its lines going to a file; wait for its workers."""
        log = open(self.folder / f"log{len(self.supervisors)}", "wb")
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "queuectl.py"),
                *["--explain"] * explain,
                "worker",
                "start",
                "--count",
                str(count),
                *words,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
        )
        log.close()
        process.log = self.folder / f"log{len(self.supervisors)}"
        self.supervisors.append(process)
        if ready:
            eventually(
                lambda: (
                    process.poll() is not None
                    or sum(row["supervisor_pid"] == process.pid for row in self.workers()) >= count
                ),
                "the workers are up",
            )
        return process

    def drain(self, *words: str, count: int = 1) -> str:
        """Run all jobs to their end and return what the workers said."""
        done = self.run("worker", "start", "--drain", "--count", str(count), *words, check=0)
        return done.stdout

    def assert_clean(self) -> None:
        """No process, no stray file, no lock is left, and the queue's invariants hold."""
        for process in self.supervisors:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.supervisors:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                text = f"a supervisor did not leave: {process.log.read_text()}"
                raise AssertionError(text) from None
        if not os.path.exists(self.path):
            return
        self.run("worker", "stop", "--now", check=0)  # settles what killed supervisors left
        for session in self.sessions:
            assert worker.session_members(session) == [], f"alive in session {session}"
        run = Path(self.path + ".run")
        stray = {path.name for path in run.glob("*")} - {"bell", "workers.log"}
        assert not stray, f"stray files: {stray}"
        db = database.connect(self.path)
        db.execute("PRAGMA busy_timeout = 0")
        db.execute("BEGIN IMMEDIATE")  # raises if somebody holds the lock
        db.execute("ROLLBACK")
        problems = [(name, text) for name, text, _ in database.check(db) if text]
        assert not database.exposed(self.path)
        db.close()
        assert not problems, problems


def put_in(
    db: sqlite3.Connection, jobs: Iterable[tuple[int, dict[str, Any]]], now: float
) -> tuple[int, int]:
    """Enqueue (line, row) and return the seq of the first and of the last."""
    database.gather(db, jobs)
    return database.enqueue(db, now)


def stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is made or written, or None if it is not there."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


BEFORE = stamp(ROOT / "queue.db")  # a user's own queue, from trying the README's first command


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    """A queue for a test with processes; ends in the shared check that nothing is left."""
    found = Queue(tmp_path)
    found.configure(backoff_base=0.05, backoff_jitter=0, kill_grace_s=1, poll_interval_ms=100)
    before = (ROOT / "config.json").read_bytes()
    yield found
    found.assert_clean()
    assert (ROOT / "config.json").read_bytes() == before
    assert stamp(ROOT / "queue.db") == BEFORE
