"""The memory against a model: whatever is done in whatever order, both tell the same story.

The model is the contract in plain Python: a dict of jobs, each with a list of its runs. A step does
one thing to the queue and the same to the model; then all that can be read must be equal. A step
may lose its process at any statement, and another worker may step in between a look and a take.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

from conftest import put_in
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import database
from database import QueueError, Result, Run

WORKERS = 3
MAX_BACKOFF_S = 100.0
TIMEOUT = 7.0


class Died(BaseException):
    """The process is gone: not one more statement."""


class Wire(sqlite3.Connection):
    """A connection that loses its process after so many statements, or lets another one act."""

    left: int | None = None
    meanwhile: tuple[str, Callable[[], None]] | None = None  # before the statement that begins so

    def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
        if self.left is not None:
            if self.left == 0:
                raise Died
            self.left -= 1
        if self.meanwhile and sql.lstrip().startswith(self.meanwhile[0]):
            (_, act), self.meanwhile = self.meanwhile, None
            act()
        return super().execute(sql, *rest)


@dataclass
class Past:
    """One run, as the history tells it."""

    attempt: int
    worker: str
    due_at: float
    started_at: float
    finished_at: float | None = None
    outcome: str | None = None
    exit_code: int | None = None
    error: str | None = None
    stdout: bytes | None = None


@dataclass
class Job:
    id: str
    priority: int
    run_at: float
    max_retries: int
    backoff_base: float
    created_at: float
    updated_at: float
    state: str = "pending"
    attempts: int = 0
    cancelling: int = 0
    worker: str | None = None
    exit_code: int | None = None
    last_error: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    runs: list[Past] = field(default_factory=list)

    def waits(self) -> bool:
        return self.state in ("pending", "failed")


def public(job: Job) -> dict[str, Any]:
    """Return a job as database.job should: output is of the latest run."""
    told = {name: value for name, value in vars(job).items() if name != "runs"}
    return told | {
        "stdout": job.runs[-1].stdout if job.runs else None,
        "command": "true",
        "timeout_s": TIMEOUT,
        "cwd": "/",
    }


PICK = st.integers(0, 999)  # one of what there is, modulo how many there are
CRASH = st.sampled_from([None] * 8 + list(range(5)))  # at that statement, or not at all
NEW = st.fixed_dictionaries(
    {
        # Of the user, made up, or one that the queue would make up soon.
        "id": st.one_of(st.none(), st.sampled_from("abcdef"), st.integers(1, 3)),
        "priority": st.sampled_from([0, 0, 0, -1, 5]),
        "delay": st.sampled_from([0, 0, 0, -5, 0.5, 3, 60]),
        "max_retries": st.integers(0, 3),
        "backoff_base": st.sampled_from([0, 0.5, 2, 1000]),
    }
)
ENDS = st.sampled_from(["completed", "failed", "failed", "failed", "stopped"])
RIVALS = st.sampled_from(["claim", "cancel", "fail", "fail", "stop"])


class Memory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="model.")
        self.path = os.path.join(self.folder, "queue.db")
        self.now, self.last, self.made_up = 1000.0, 0, set()
        self.jobs: dict[int, Job] = {}  # by seq
        self.done: dict[str, int] = {}  # jobs done, by worker
        self.open: dict[str, Run] = {}  # what each worker holds
        self.settled: list[Run] = []
        self.hired = 0
        self.db, self.rival = self.connect(), self.connect()
        self.rival.execute("PRAGMA busy_timeout = 0")

    def connect(self) -> Wire:
        with mock.patch.object(sqlite3, "connect", partial(sqlite3.connect, factory=Wire)):
            return database.connect(self.path, durable=False)

    def teardown(self) -> None:
        self.db.close()
        self.rival.close()
        shutil.rmtree(self.folder)

    @initialize(batch=st.lists(NEW, min_size=1, max_size=4))
    def begin(self, batch: list[dict[str, Any]]) -> None:
        self.boss = database.register_supervisor(self.db, "host", "boot", 1, "birth", self.now, 30)
        for _ in range(WORKERS):
            self.hire()
        self.add(self.db, batch)

    def hire(self) -> None:
        self.hired += 1
        name = database.register_worker(self.db, self.boss, self.hired, "birth", self.now)
        assert name == f"w{self.hired}", "a name was used again"
        self.done[name] = 0

    def unless_it_dies(self, act: Callable[..., None], *args: Any, crash: int | None) -> None:
        """Do something; if its process dies in the middle, nothing has happened."""
        self.db.left = crash
        try:
            act(*args)
        except Died:
            self.reopen()
        self.db.left = None

    def picked(self, pick: int, seqs: list[int]) -> int:
        assume(seqs)
        return seqs[pick % len(seqs)]

    def free(self) -> list[str]:
        return [name for name in self.done if name not in self.open]

    def ready(self) -> list[int]:
        """Return what may run now: highest priority, then earliest run_at, then enqueued."""
        due = [seq for seq, job in self.jobs.items() if job.waits() and job.run_at <= self.now]
        return sorted(due, key=lambda seq: (-self.jobs[seq].priority, self.jobs[seq].run_at, seq))

    # Each does one thing to the queue and, once that has returned, the same to the model.

    def add(self, db: Wire, batch: list[dict[str, Any]]) -> None:
        rows, soon = [], self.last
        for new in batch:
            id = new["id"]
            if isinstance(id, int):
                id = f"{(soon + id) * 2654435761 % 2**32:08x}"
            run_at = self.now + new["delay"]
            row = new | {"id": id, "run_at": run_at, "timeout_s": TIMEOUT, "cwd": "/"}
            rows.append(row | {"command": "true"})
        given = [row["id"] for row in rows if row["id"] is not None]
        twice = len(set(given)) < len(given)
        try:
            first, last = put_in(db, enumerate(rows, 1), self.now)
        except QueueError:
            assert twice or {job.id for job in self.jobs.values()} & set(given)
            return
        assert not twice and not {job.id for job in self.jobs.values()} & set(given)
        assert first > self.last and last - first + 1 == len(rows)
        self.last = last
        for seq, row in enumerate(rows, first):
            id = database.job(self.rival, seq)["id"]
            if row["id"] is None:
                assert len(id) == 8 and id not in self.made_up
                self.made_up.add(id)
            else:
                assert id == row["id"]
            copied = [row[key] for key in "priority run_at max_retries backoff_base".split()]
            self.jobs[seq] = Job(id, *copied, self.now, self.now)

    def take(self, db: Wire, worker: str, alone: bool = True) -> None:
        run, next_at = database.claim(db, worker, self.now, lambda: self.now)
        more = next_at is not None and next_at <= self.now
        ready = self.ready()
        if run is None:
            assert not ready and not more
            return
        assert run.seq == ready[0], "not the best of what was due"
        assert more == (len(ready) > 1) or not alone
        job = self.jobs[run.seq]
        job.state, job.worker, job.attempts = "processing", worker, job.attempts + 1
        job.started_at = job.updated_at = self.now
        job.exit_code = job.last_error = job.finished_at = None
        job.runs.append(Past(job.attempts, worker, job.run_at, self.now))
        copied = (job.attempts, job.max_retries, job.backoff_base)
        told = (run.seq, job.id, *copied, "true", "/", job.run_at)
        assert run == Run(run.id, worker, self.now, *told)
        self.open[worker] = run

    def end(self, db: Wire, run: Run, outcome: str, jitter: float = 0.0) -> None:
        error = None if outcome == "completed" else f"{outcome} at {self.now}"
        code, said = (0 if outcome == "completed" else 3), f"{run.attempt} {self.now}".encode()
        result = Result(outcome, code, error, said, len(said))
        found = database.finish(db, run, result, self.now, MAX_BACKOFF_S, jitter)
        if self.open.get(run.worker) != run:
            assert found is None, "somebody else's run was ended"
            return
        job, past = self.jobs[run.seq], self.jobs[run.seq].runs[-1]
        past.finished_at, past.outcome, past.exit_code, past.error = self.now, outcome, code, error
        past.stdout = said
        job.exit_code, job.last_error = code, error
        job.finished_at = job.updated_at = self.now
        if outcome == "stopped":
            job.attempts -= 1
            job.state = "failed" if job.attempts else "pending"
        elif outcome == "failed" and job.attempts == 1 + job.max_retries:
            job.state = "dead"
        elif outcome == "failed":
            job.state = "failed"
            job.run_at = self.now + min(MAX_BACKOFF_S, job.backoff_base**job.attempts) + jitter
        else:
            job.state = outcome
        if job.cancelling and job.state != "completed":
            job.state, job.cancelling = "cancelled", 0
        assert found == (job.state, job.run_at)
        self.done[run.worker] += 1
        self.settled.append(self.open.pop(run.worker))

    def call_off(self, db: Wire, seq: int) -> None:
        job = self.jobs[seq]
        try:
            found = database.cancel(db, seq, self.now)
        except QueueError as error:
            assert job.state in database.SETTLED and job.state in str(error)
            return
        assert job.state not in database.SETTLED
        job.updated_at = self.now
        if job.state == "processing":
            job.cancelling = 1
        else:
            job.state, job.finished_at = "cancelled", self.now
        assert found == job.state

    # --- the steps ---

    @rule(batch=st.lists(NEW, min_size=1, max_size=4), crash=CRASH, raced=st.booleans())
    def enqueue(self, batch: list[dict[str, Any]], crash: int | None, raced: bool) -> None:
        def write() -> None:
            try:
                self.add(self.rival, [batch[0] | {"id": None}])
            except sqlite3.OperationalError as error:
                assert "locked" in str(error)  # as it should be: there is one writer

        if raced:
            self.db.meanwhile = ("INSERT INTO jobs", write)
        self.unless_it_dies(self.add, self.db, batch, crash=None if raced else crash)
        self.db.meanwhile = None

    @precondition(lambda self: self.free())
    @rule(pick=PICK, crash=CRASH)
    def claim(self, pick: int, crash: int | None) -> None:
        worker = self.free()[pick % len(self.free())]
        self.unless_it_dies(self.take, self.db, worker, crash=crash)

    @precondition(lambda self: len(self.free()) > 1 and self.ready())
    @rule(rival=RIVALS)
    def claim_too_late(self, rival: str) -> None:
        """Between a worker's look and its take another one is faster."""
        worker, other = self.free()[:2]

        def act() -> None:
            if rival == "cancel":
                self.call_off(self.rival, self.ready()[0])
                return
            self.take(self.rival, other)
            if rival != "claim":
                outcome = {"fail": "failed", "stop": "stopped"}[rival]
                self.end(self.rival, self.open[other], outcome)

        self.db.meanwhile = ("BEGIN", act)
        self.take(self.db, worker, alone=False)

    @precondition(lambda self: self.free() and self.ready())
    @rule(outcomes=st.lists(ENDS, min_size=1, max_size=4))
    def work(self, outcomes: list[str]) -> None:
        """A worker runs jobs as long as some are due."""
        worker = self.free()[0]
        for outcome in outcomes:
            self.take(self.db, worker)
            if worker in self.open:
                self.end(self.db, self.open[worker], outcome)

    @precondition(lambda self: self.open)
    @rule(pick=PICK, outcome=ENDS, jitter=st.sampled_from([0, 0.25]), crash=CRASH)
    def finish(self, pick: int, outcome: str, jitter: float, crash: int | None) -> None:
        run = self.open[self.picked(pick, list(self.open))]
        self.unless_it_dies(self.end, self.db, run, outcome, jitter, crash=crash)

    @precondition(lambda self: self.open)
    @rule(pick=PICK, outcome=ENDS, how=st.sampled_from(["cancel", "lost"]))
    def finish_late(self, pick: int, outcome: str, how: str) -> None:
        """Between a worker's last line and its record the job is cancelled, or settled as lost."""
        run = self.open[self.picked(pick, list(self.open))]

        def act() -> None:
            if how == "cancel":
                self.call_off(self.rival, run.seq)
            else:
                self.end(self.rival, run, "failed")

        self.db.meanwhile = ("BEGIN", act)
        self.end(self.db, run, outcome)

    @precondition(lambda self: self.settled)
    @rule(pick=PICK, outcome=ENDS)
    def finish_again(self, pick: int, outcome: str) -> None:
        run = self.settled[pick % len(self.settled)]
        held = self.open.get(run.worker)
        # A worker that was stopped, or has recorded a result, never comes back to that run.
        assume(not held or (held.seq, held.attempt) != (run.seq, run.attempt))
        self.end(self.db, run, outcome)

    @precondition(lambda self: self.open)
    @rule(pick=PICK, outcome=ENDS, other=st.integers(1, 9), worker=st.booleans())
    def finish_not_owned(self, pick: int, outcome: str, other: int, worker: bool) -> None:
        run = self.open[self.picked(pick, list(self.open))]
        wrong = {"worker": f"w{other}"} if worker else {"attempt": other}
        assume(run._replace(**wrong) != run)
        self.end(self.db, run._replace(**wrong), outcome)

    @precondition(lambda self: self.open)
    @rule(pick=PICK)
    def lose_worker(self, pick: int) -> None:
        """What a supervisor does about a worker that has died."""
        name = self.picked(pick, list(self.done))
        database.remove_supervisor(self.rival, self.boss)  # not while workers are to be settled
        if name in self.open:
            self.end(self.rival, self.open[name], "failed")
        database.remove_worker(self.rival, name)
        del self.done[name]
        self.hire()

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        self.call_off(self.db, self.picked(pick, list(self.jobs)))

    @precondition(lambda self: self.open)
    @rule(pick=PICK)
    def cancel_running(self, pick: int) -> None:
        """As its supervisor acts on the mark."""
        run = self.open[self.picked(pick, list(self.open))]
        self.call_off(self.rival, run.seq)
        self.end(self.db, run, "cancelled")

    @precondition(lambda self: self.jobs)
    @rule(picks=st.one_of(st.none(), st.sets(PICK, max_size=2)), any=PICK, crash=CRASH)
    def retry_dead(self, picks: set[int] | None, any: int, crash: int | None) -> None:
        dead = [seq for seq, job in self.jobs.items() if job.state == "dead"]
        seqs = None if picks is None else list({dead[n % len(dead)] for n in picks if dead})
        if seqs is not None and any % 4 == 0:
            seqs.append(self.picked(any, [seq for seq in self.jobs if seq not in seqs]))

        def act() -> None:
            try:
                assert database.retry_dead(self.db, seqs, self.now) == len(seqs or dead)
            except QueueError:
                assert not set(seqs) <= set(dead)
                return
            for job in [self.jobs[seq] for seq in (dead if seqs is None else seqs)]:
                assert job.state == "dead"
                job.state, job.attempts = "pending", 0
                job.run_at = job.updated_at = self.now

        assume(seqs != [])
        self.unless_it_dies(act, crash=crash)

    @precondition(lambda self: any(job.finished_at for job in self.jobs.values()))
    @rule(
        states=st.sets(st.sampled_from(database.STATES), min_size=1),
        age=st.sampled_from([-1, 0, 2, 50]),
        dry=st.booleans(),
        crash=CRASH,
    )
    def prune(self, states: set[str], age: float, dry: bool, crash: int | None) -> None:
        def act() -> None:
            count = database.prune(self.db, sorted(states), self.now - age, dry)
            old = [
                seq
                for seq, job in self.jobs.items()
                if job.state in states & set(database.SETTLED) and job.finished_at < self.now - age
            ]
            assert count == len(old)
            for seq in [] if dry else old:
                del self.jobs[seq]

        self.unless_it_dies(act, crash=crash)

    @rule(seconds=st.sampled_from([0.25, 0.5, 1, 3, 100]), restart=st.booleans())
    def time_passes(self, seconds: float, restart: bool) -> None:
        self.now += seconds
        if restart:
            self.reopen()

    def reopen(self) -> None:
        self.db.left = None
        self.db.close()
        self.db = self.connect()

    # --- what must be so after each ---

    @invariant()
    def both_tell_the_same(self) -> None:
        for seq, job in self.jobs.items():
            row = dict(database.job(self.db, seq))
            assert row.pop("seq") == seq
            assert not row.pop("stderr") and row.pop("stderr_bytes") in (0, None)
            assert row.pop("stdout_bytes") == (len(row["stdout"]) if row["stdout"] else None)
            cancelling = row.pop("cancelling")
            assert row == {name: public(job)[name] for name in row}
            # What has settled never comes back with its mark: there it means nothing.
            assert cancelling == job.cancelling or job.state in ("completed", "cancelled")
            told = [
                {name: row[name] for name in vars(Past(0, "", 0, 0))}
                for row in database.runs(self.db, seq)
            ]
            assert told == [vars(run) for run in job.runs]

    @invariant()
    def all_of_it_is_there(self) -> None:
        states = [job.state for job in self.jobs.values()]
        counts = {state: states.count(state) for state in database.STATES}
        assert database.counts(self.db) == counts | {"total": len(states)}
        left = [job for job in self.jobs.values() if job.state not in database.SETTLED]
        assert database.settled(self.db) == (not left)
        ready = [row["id"] for row in database.ready_jobs(self.db, self.now, -1)]
        assert ready == [self.jobs[seq].id for seq in self.ready()]
        later = [job.run_at for job in left if job.waits() and job.run_at > self.now]
        next_due_at = database.next_due_at(self.db)
        assert (next_due_at or 0) <= min(later) if later else (next_due_at or 0) <= self.now
        found = {row["worker"]: row for row in database.workers(self.db)}
        assert {name: row["jobs_done"] for name, row in found.items()} == self.done
        for name in self.done:
            run = self.open.get(name)
            assert database.held_by(self.db, name) == run
            assert found[name]["run"] == (run and run.id)

    @invariant()
    def doctor_is_content(self) -> None:
        problems = [text for _, text, _ in database.check(self.db) if text]
        assert not problems, problems


TestMemory = Memory.TestCase
TestMemory.settings = settings(
    max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
