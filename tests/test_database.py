"""The memory: order, one owner a run, retries, history; each test ends in doctor's own checks."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import put_in
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import database
from database import QueueError, Result, Run

NOW = 1_700_000_000.0
DEFAULTS = {key: setting.default for key, setting in config.SETTINGS.items()}
SETTLED = ["completed", "dead", "cancelled"]


@contextmanager
def opened(path: str) -> Iterator[sqlite3.Connection]:
    """A queue with workers w1 to w4, whose invariants must hold in the end."""
    with closing(database.connect(path)) as db:
        supervisor = database.register_supervisor(db, "host", "boot", 1, "birth", NOW, 30)
        names = [database.register_worker(db, supervisor, n, "birth", NOW) for n in range(4)]
        assert names == ["w1", "w2", "w3", "w4"]
        yield db
        assert [(name, text) for name, text, _ in database.check(db) if text] == []


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "queue.db")


@pytest.fixture
def db(path) -> Iterator[sqlite3.Connection]:
    with opened(path) as db:
        yield db


def entry(line: int, now: float = NOW, **fields: Any) -> tuple[int, dict[str, Any]]:
    return line, config.check_job({"command": "true"} | fields, DEFAULTS, "/")


def add(db: sqlite3.Connection, *jobs: dict[str, Any], now: float = NOW) -> list[int]:
    """Enqueue jobs at once and return their seqs."""
    rows = (entry(line, now, **fields) for line, fields in enumerate(jobs, 1))
    first, last = put_in(db, rows, now)
    return list(range(first, last + 1))


def take(db: sqlite3.Connection, worker: str = "w1", now: float = NOW) -> Run | None:
    return database.claim(db, worker, now, lambda: 0.0)[0]


def end(db: sqlite3.Connection, run: Run, outcome: str = "failed", now: float = NOW) -> Any:
    return database.finish(db, run, Result(outcome, 1, "error", b"out", 3), now, 3600, 0)


def bring(db: sqlite3.Connection, state: str, now: float = NOW, **fields: Any) -> int:
    """Make one job of this state; a failed one has run once, a dead one twice."""
    fields = {"priority": 9, "max_retries": 1, "backoff_base": 10} | fields
    [seq] = add(db, fields, now=now)
    if state == "cancelled":
        database.cancel(db, seq, now)
    elif state != "pending":
        run = take(db, "w4" if state == "processing" else "w3", now)
        assert run.seq == seq
        if state != "processing":
            end(db, run, "completed" if state == "completed" else "failed", now)
        if state == "dead":
            end(db, take(db, "w3", now + 10), "failed", now)
    assert state_of(db, seq) == state
    return seq


def state_of(db: sqlite3.Connection, seq: int) -> str:
    return database.job(db, seq)["state"]


def memory(db: sqlite3.Connection) -> list[str]:
    """Everything in the file, to see that nothing changed."""
    return list(db.iterdump())


def together(count: int, deed: Callable[[int], None]) -> None:
    """Let `deed` happen in many threads at the same moment; their errors come out."""
    start, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        try:
            start.wait()
            deed(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# --- the order of claims ---------------------------------------------------------------------

JOBS = st.lists(st.tuples(st.integers(-1, 1), st.integers(-2, 3)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(JOBS)
def test_jobs_are_claimed_by_priority_then_time_then_order_of_enqueue(jobs):
    with tempfile.TemporaryDirectory() as folder, opened(folder + "/queue.db") as db:
        seqs = add(db, *(dict(priority=p, run_at=NOW + at) for p, at in jobs))
        waiting = [(-priority, at, seq) for (priority, at), seq in zip(jobs, seqs)]
        for later in range(-3, 4):
            due = sorted(job for job in waiting if job[1] <= max(later, 0))  # enqueued as due at 0
            waiting = [job for job in waiting if job not in due]
            ready = database.ready_jobs(db, NOW + later, -1)
            assert [database.find(db, row["id"]) for row in ready] == [seq for *_, seq in due]
            for left, (_, _, seq) in zip(reversed(range(len(due))), due):
                run, next_at = database.claim(db, "w1", NOW + later, lambda: 0.0)
                assert (run.seq, next_at) == (seq, NOW + later if left else next_due(waiting))
                assert end(db, run, "completed", NOW + later) == ("completed", run.due_at)
            assert database.claim(db, "w1", NOW + later, lambda: 0.0) == (None, next_due(waiting))


def next_due(waiting):
    return min((NOW + at for _, at, _ in waiting), default=None)


def test_a_far_job_of_high_priority_neither_runs_early_nor_blocks_the_others(db):
    far, near = add(db, dict(priority=9, run_at=NOW + 1e8), dict(priority=-9))
    assert take(db).seq == near
    assert take(db, "w2", NOW + 1e8 - 0.001) is None
    assert take(db, "w2", NOW + 1e8).seq == far


@pytest.mark.parametrize("state", ["cancelled", "processing", "unknown"])
def test_what_a_hand_has_changed_in_the_file_holds_up_no_other_job(path, state):
    """A row whose state and mark for the look contradict each other: doctor names it."""
    with closing(database.connect(path)) as db:
        by_hand, other = add(db, dict(priority=9), {})
        db.execute("UPDATE jobs SET state = ? WHERE seq = ?", (state, by_hand))
        assert take(db).seq == other
        assert take(db) is None
        assert [text for _, text, _ in database.check(db) if text]


def test_an_index_that_the_table_does_not_bear_out_is_damage_and_no_endless_race(path):
    with closing(database.connect(path)) as db:
        add(db, {}, {})
        index = db.execute("SELECT * FROM sqlite_master WHERE name = 'jobs_due'").fetchone()
        db.execute("PRAGMA writable_schema = ON")
        db.execute("DELETE FROM sqlite_master WHERE name = 'jobs_due'")
    with closing(sqlite3.connect(path)) as other:  # which so does not know of the index
        other.execute("UPDATE jobs SET run_at = run_at + 1 WHERE seq = 1")
        other.execute("PRAGMA writable_schema = ON")
        other.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", tuple(index))
        other.commit()
    with closing(database.connect(path)) as db:
        with pytest.raises(database.SQLiteError) as damage:
            take(db)
        assert database.is_damage(database.error_text(damage.value, path))


def plan(db: sqlite3.Connection, deed: Callable[[], Any]) -> dict[str, list[str]]:
    """What SQLite plans for each statement that `deed` runs."""
    said: list[str] = []
    db.set_trace_callback(said.append)
    deed()
    db.set_trace_callback(None)
    explained = (sql for sql in said if sql.split()[0] in ("SELECT", "INSERT", "UPDATE"))
    return {
        sql: [step["detail"] for step in db.execute(f"EXPLAIN QUERY PLAN {sql}")]
        for sql in explained
    }


def test_a_look_reads_the_head_of_an_index_and_never_scans_or_sorts(db):
    add(db, {}, dict(run_at=NOW + 1))
    plans = plan(db, lambda: take(db, now=NOW + 1))
    [look] = [steps for sql, steps in plans.items() if "ORDER BY priority" in sql]
    heads = [step.rpartition(" ")[2] for step in look if "SUBQUERY" not in step]
    assert heads == ["jobs_due", "jobs_later", "jobs_due"], look
    for steps in plans.values():
        known = ("INDEX", "PRIMARY KEY", "SCALAR SUBQUERY")
        assert all(any(word in step for word in known) for step in steps), plans
        assert not any("TEMP B-TREE" in step for step in steps), plans


def test_an_enqueue_costs_the_same_however_many_jobs_there_are(db):
    plans = plan(db, lambda: add(db, {}, dict(id="a")))
    assert any("SEARCH jobs" in step for steps in plans.values() for step in steps)
    assert not any(step.startswith("SCAN jobs") for steps in plans.values() for step in steps), (
        plans
    )


# --- two workers, one job --------------------------------------------------------------------


def fail(db: sqlite3.Connection) -> None:
    end(db, take(db, "w2"), "failed")


def stop(db: sqlite3.Connection) -> None:
    end(db, take(db, "w2"), "stopped")
    assert take(db, "w3")  # put back, it is due at the same time: only its state tells


@pytest.mark.parametrize(
    "deed, state, attempts",
    [
        (lambda db: take(db, "w2"), "processing", 1),
        (lambda db: end(db, take(db, "w2"), "completed"), "completed", 1),
        (lambda db: database.cancel(db, 1, NOW), "cancelled", 0),
        (fail, "failed", 1),
        (stop, "processing", 1),
    ],
)
def test_what_happens_to_a_job_between_look_and_take_keeps_the_second_worker_off(
    db, path, monkeypatch, deed, state, attempts
):
    """Another connection takes (and ends) the job that this one has seen: it gets nothing."""
    real = database.transaction
    after: list[list[str]] = []

    def first_the_deed(connection: sqlite3.Connection) -> Any:
        monkeypatch.setattr(database, "transaction", real)
        with closing(database.connect(path)) as other:
            deed(other)
            after.append(memory(other))
        return real(connection)

    [seq] = add(db, dict(max_retries=2))
    monkeypatch.setattr(database, "transaction", first_the_deed)
    assert take(db, "w1") is None
    assert (state_of(db, seq), database.job(db, seq)["attempts"]) == (state, attempts)
    assert memory(db) == after[0]


def test_four_workers_at_once_run_each_of_200_jobs_once(db, path):
    seqs, ran = add(db, *[{}] * 200), []

    def work(number: int) -> None:
        with closing(database.connect(path, durable=False)) as mine:
            while run := take(mine, f"w{number + 1}"):
                ran.append(run.seq)
                assert end(mine, run, "completed")

    together(4, work)
    assert sorted(ran) == seqs
    assert database.settled(db)


@pytest.mark.parametrize("field, value", [("worker", "w2"), ("attempt", 2), ("attempt", 0)])
@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled", "stopped"])
def test_only_its_owner_can_finish_a_run(db, field, value, outcome):
    add(db, {})
    run = take(db)
    before = memory(db)
    assert end(db, run._replace(**{field: value}), outcome) is None
    assert memory(db) == before
    assert end(db, run, outcome) is not None
    before = memory(db)
    assert end(db, run, outcome) is None  # nor its owner twice
    assert memory(db) == before


def test_a_lost_worker_comes_back_after_its_job_runs_elsewhere_and_cannot_finish_it(db):
    add(db, dict(backoff_base=0))
    lost = take(db, "w1")
    end(db, lost, "failed")  # the fence settles it
    second = take(db, "w2", NOW + 1)
    before = memory(db)
    assert end(db, lost, "completed", NOW + 2) is None
    assert memory(db) == before
    assert end(db, second, "completed", NOW + 3) == ("completed", second.due_at)


# --- retries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_a_job_that_always_fails_runs_once_and_max_retries_times_then_is_dead(db, max_retries):
    [seq] = add(db, dict(max_retries=max_retries, backoff_base=2))
    now = NOW
    for attempt in range(1, max_retries + 2):
        run = take(db, now=now)
        assert (run.seq, run.attempt) == (seq, attempt)
        state, run_at = end(db, run, "failed", now)
        assert state == ("failed" if attempt <= max_retries else "dead")
        if state == "failed":
            assert run_at == database.job(db, seq)["run_at"] == now + 2**attempt  # no jitter
            assert take(db, now=run_at - 0.001) is None
            now = run_at
    assert take(db, now=now + 1e9) is None
    found = database.job(db, seq)
    assert (found["attempts"], found["exit_code"], found["last_error"]) == (run.attempt, 1, "error")
    history = [(row["attempt"], row["outcome"]) for row in database.runs(db, seq)]
    assert history == [(n, "failed") for n in range(1, max_retries + 2)]


def test_a_job_that_fails_once_and_then_succeeds_keeps_both_runs_and_no_error(db):
    seq = bring(db, "failed")
    run = take(db, "w2", NOW + 10)
    assert database.job(db, seq)["exit_code"] is database.job(db, seq)["last_error"] is None
    done = Result("completed", 0, None, b"end", 5000)
    assert database.finish(db, run, done, NOW + 11, 3600, 0) == ("completed", NOW + 10)
    found = database.as_object(database.job(db, seq))
    assert (found["attempts"], found["exit_code"], found["last_error"]) == (2, 0, None)
    assert (found["worker"], found["stdout"]) == ("w2", "[... 4997 bytes cut ...]\nend")
    first, second = map(database.as_object, database.runs(db, seq))
    assert (first["outcome"], first["exit_code"], first["stdout"]) == ("failed", 1, "out")
    assert second["finished_at"] == found["finished_at"] == "2023-11-14T22:13:31.000Z"


@pytest.fixture(scope="module")
def brief_db() -> Iterator[sqlite3.Connection]:
    """A queue in memory alone, for a property that looks at one job hundreds of times."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        database.migrate(db, ":memory:")
        yield db


ATTEMPTS = st.integers(1, 20) | st.integers(1, 10**6)
BASES, CAPS = st.floats(0, 1000), st.floats(0, 31_536_000) | st.integers(0, 31_536_000)


@settings(deadline=None)
@given(ATTEMPTS, BASES, CAPS, st.floats(0, 10), st.floats(0, 1))
def test_a_backoff_is_the_power_up_to_the_cap_plus_no_more_than_the_jitter(
    brief_db, attempts, base, cap, share, chance
):
    with localcontext(Context(prec=40, Emax=MAX_EMAX, Emin=MIN_EMIN)):
        exact = float(min(Decimal(cap), Decimal(base) ** attempts))
    wait = database.backoff_s(attempts, base, cap)
    assert 0 <= wait <= cap
    assert abs(wait - exact) <= 1e-9 * exact + 1e-300
    for jitter in (0.0, chance * share * base, share * base):
        brief_db.execute("DELETE FROM jobs")
        [seq] = add(brief_db, dict(backoff_base=base))
        run = take(brief_db)._replace(attempt=attempts, max_retries=attempts)
        brief_db.execute("UPDATE jobs SET attempts = ?", (attempts,))
        ended = database.finish(brief_db, run, Result("failed"), NOW, cap, jitter)
        assert ended == ("failed", database.job(brief_db, seq)["run_at"])
        assert NOW + wait <= ended[1] <= NOW + wait + share * base
        assert ended[1] == NOW + wait + jitter


@pytest.mark.parametrize("before", ["pending", "failed"])
def test_a_stopped_run_is_not_counted_and_the_job_goes_back_to_its_old_place(db, before):
    seq = bring(db, before, priority=0)
    add(db, dict(run_at=NOW + 20))
    old = database.job(db, seq)
    run = take(db, now=NOW + 30)
    assert end(db, run, "stopped", NOW + 31) == (before, old["run_at"])
    found = database.job(db, seq)
    assert (found["state"], found["attempts"]) == (before, old["attempts"])
    again = take(db, "w2", NOW + 31)
    assert (again.seq, again.attempt) == (seq, run.attempt)
    assert [row["outcome"] for row in database.runs(db, seq)][-2:] == ["stopped", None]


# --- cancel, retry, prune --------------------------------------------------------------------


@pytest.mark.parametrize("state", ["pending", "failed"])
def test_a_waiting_job_is_cancelled_at_once_and_never_runs(db, state):
    seq = bring(db, state)
    assert database.cancel(db, seq, NOW + 1) == state_of(db, seq) == "cancelled"
    assert take(db, now=NOW + 1e9) is None
    assert database.settled(db)
    assert list(database.ready_jobs(db, NOW + 1e9, -1)) == []


@pytest.mark.parametrize(
    "outcome, state",
    [(name, "cancelled") for name in ("cancelled", "failed", "stopped")]
    + [("completed", "completed")],
)
@pytest.mark.parametrize("max_retries", [0, 1])
def test_a_running_job_is_marked_and_however_it_ends_never_runs_again(
    db, outcome, state, max_retries
):
    seq = bring(db, "processing", max_retries=max_retries)
    for _ in range(2):
        assert database.cancel(db, seq, NOW) == "processing"
    assert [row["cancelling"] for row in database.workers(db)] == [None, None, None, 1]
    assert end(db, database.held_by(db, "w4"), outcome)[0] == state_of(db, seq) == state
    assert take(db, now=NOW + 1e9) is None


@pytest.mark.parametrize("state", SETTLED)
def test_a_settled_job_cannot_be_cancelled(db, state):
    seq = bring(db, state, id="a")
    before = memory(db)
    with pytest.raises(QueueError, match=f'^job "a" is already {state}$'):
        database.cancel(db, seq, NOW)
    assert memory(db) == before


def test_a_dead_job_starts_over_due_now_with_all_its_runs_ahead_and_its_history_kept(db):
    seq, other = bring(db, "dead"), bring(db, "dead")
    assert database.retry_dead(db, [seq], NOW + 100) == 1
    found = database.job(db, seq)
    assert (found["state"], found["attempts"]) == ("pending", 0)
    assert (found["run_at"], found["last_error"]) == (NOW + 100, "error")
    for now in (NOW + 100, NOW + 110):
        end(db, take(db, now=now), "failed", now)
    assert [row["attempt"] for row in database.runs(db, seq)] == [1, 2, 1, 2]
    assert database.retry_dead(db, None, NOW + 200) == 2  # all
    assert [take(db, worker, NOW + 200).seq for worker in ("w1", "w2")] == [seq, other]


def test_of_several_dead_jobs_all_are_retried_or_none(db):
    seqs = [bring(db, "dead"), bring(db, "completed", id="done"), bring(db, "dead")]
    before = memory(db)
    with pytest.raises(QueueError, match='job "done" is completed, not dead'):
        database.retry_dead(db, seqs, NOW)
    assert memory(db) == before


def test_prune_removes_old_settled_jobs_with_their_history_and_nothing_else(db):
    old = {state: bring(db, state, NOW - 100) for state in SETTLED}
    old["failed"] = bring(db, "failed", NOW - 100, backoff_base=1000)
    bring(db, "pending", NOW - 100, run_at=NOW + 1)
    young = [bring(db, state) for state in ("completed", "cancelled", "processing")]
    before = memory(db)
    asked = ["completed", "cancelled", "pending", "failed", "processing"]
    assert database.prune(db, asked, NOW, dry_run=True) == 2
    assert memory(db) == before
    assert database.prune(db, asked, NOW) == 2
    states = [row["state"] for row in database.jobs_in(db, [], -1)]
    assert states == ["dead", "failed", "pending", "completed", "cancelled", "processing"]
    assert [len(database.runs(db, seq)) for seq in old.values()] == [0, 2, 0, 1]
    assert database.prune(db, ["dead"], NOW) == 1
    assert [len(database.runs(db, seq)) for seq in (*old.values(), *young)] == [0, 0, 0, 1, 1, 0, 1]
    with pytest.raises(QueueError, match="pruned"):
        database.job(db, old["dead"])


def test_prune_keeps_to_the_log_that_the_disk_bears(db):
    before = db.execute("PRAGMA wal_autocheckpoint").fetchone()[0]
    assert database.prune(db, database.SETTLED, NOW) == 0
    assert db.execute("PRAGMA wal_autocheckpoint").fetchone()[0] == before


def test_prune_goes_by_small_steps(db):
    add(db, *[{}] * 501)
    db.execute("UPDATE jobs SET state = 'cancelled', due = NULL, finished_at = 0")
    steps = []
    db.set_trace_callback(lambda sql: steps.append(sql) if sql == "COMMIT" else None)
    assert database.prune(db, SETTLED, NOW, dry_run=True) == 501 and not steps
    assert database.prune(db, SETTLED, NOW) == 501 and len(steps) == 3, "250, 250, 1"
    assert database.counts(db)["total"] == 0
    assert add(db, {}) == [502]  # a number is never used again


# --- enqueue and ids -------------------------------------------------------------------------


def generated(folder: str, count: int) -> list[str]:
    """The ids that a new queue makes up."""
    with opened(f"{folder}/other.db") as db:
        return [database.job(db, seq)["id"] for seq in add(db, *[{}] * count)]


def test_generated_ids_are_short_plain_and_never_the_same(tmp_path):
    ids = generated(str(tmp_path), 5000)
    assert len({*ids}) == 5000
    assert {int(id, 16) % 2 for id in ids} == {0, 1}  # an even factor would repeat one day
    assert all(len(id) == 8 and id.isalnum() for id in ids)
    assert len({id[:2] for id in ids}) == 256  # a short prefix is enough


@pytest.mark.parametrize("at", [0, 4, 9])
@pytest.mark.parametrize("one_call", [True, False])
def test_ids_pasted_from_another_queue_are_kept_and_the_made_up_ones_go_round_them(
    db, tmp_path, at, one_call
):
    pasted = [dict(id=id) for id in generated(str(tmp_path), 10)[at : at + 2]]
    for jobs in [pasted + [{}] * 10] if one_call else [pasted, [{}] * 10]:
        add(db, *jobs)
    ids = [row["id"] for row in database.jobs_in(db, [], -1)]
    assert ids[: len(pasted)] == [job["id"] for job in pasted]
    assert len({*ids}) == len(pasted) + 10


@pytest.mark.parametrize(
    "text, found",
    [
        ("build", "build"),  # the exact one, though others begin so
        ("build-1", "build-1"),
        ("t", "test"),
        ("build-", '"build-" is ambiguous: build-1, build-12; give more'),
        ("b", '"b" is ambiguous: build, build-1, build-12, ...; give more'),
        ("build_", 'no job "build_"'),
        ("%", "%d"),
        ("T", 'no job "T"'),
        ("test1", 'no job "test1"'),
        ("", 'no job ""'),
        ("ü", "ürün"),
        ("\udcff", "no job"),  # what a shell passes for a byte that is not UTF-8
    ],
)
def test_a_job_is_found_by_its_id_or_by_an_unambiguous_prefix(db, text, found):
    ids = ["build-12", "build", "test", "build-1", "bw", "%d", "ürün"]
    seqs = dict(zip(ids, add(db, *(dict(id=id) for id in ids))))
    if found in ids:
        assert database.find(db, text) == seqs[found]
    else:
        with pytest.raises(QueueError) as refused:
            database.find(db, text)
        assert found in str(refused.value)


def bad_at_the_end() -> Iterator[tuple[int, dict[str, Any]]]:
    yield entry(1)
    raise config.BadInput("line 2: oops")


@pytest.mark.parametrize(
    "jobs, message",
    [
        ([entry(1), entry(3, id="b"), entry(7, id="b")], 'line 7: the id "b" is used twice'),
        ([entry(1), entry(3, id="a"), entry(5)], 'line 3: the id "a" is in use; choose another'),
        ([entry(0, id="a")], 'the id "a" is in use; choose another'),
        (bad_at_the_end(), "line 2: oops"),
    ],
)
def test_many_jobs_are_enqueued_all_or_none_and_the_line_is_named(db, path, jobs, message):
    add(db, dict(id="a", command="first"))
    before = memory(db)
    with pytest.raises((QueueError, config.BadInput), match=f"^{message}"):
        with closing(database.connect(path)) as other:
            put_in(other, jobs, NOW)
    assert memory(db) == before
    assert add(db, dict(id="b")) == [2]


def test_a_slow_producer_never_holds_the_lock_and_its_jobs_come_behind(db, path):
    def slow() -> Iterator[tuple[int, dict[str, Any]]]:
        yield entry(1, id="slow")
        with closing(database.connect(path)) as other:
            other.execute("PRAGMA busy_timeout = 0")
            assert add(other, dict(id="quick")) == [1]
        yield entry(2, id="slow2")

    assert put_in(db, slow(), NOW) == (2, 3)


# --- the file --------------------------------------------------------------------------------


def test_a_new_queue_is_private_whatever_the_umask_and_has_the_version_and_wal(path):
    before = os.umask(0)
    try:
        with closing(database.connect(path)) as db:
            add(db, {})
            for name in (path, path + "-wal", path + "-shm"):
                assert stat.S_IMODE(os.stat(name).st_mode) == 0o600, name
            assert db.execute("PRAGMA user_version").fetchone()[0] == database.VERSION
            assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    finally:
        os.umask(before)


@pytest.mark.parametrize("durable, level", [(True, 2), (False, 1)])
def test_commands_commit_for_good_and_workers_fast(path, durable, level):
    with closing(database.connect(path, durable)) as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == level
        assert db.execute("PRAGMA fullfsync").fetchone()[0] == 1


def test_many_who_make_the_queue_at_once_all_get_the_same_one(tmp_path):
    def make(number: int) -> None:
        with closing(database.connect(path)) as db:
            add(db, {})

    for turn in range(5):
        path = str(tmp_path / f"queue{turn}.db")
        together(8, make)
        with closing(database.connect(path)) as db:
            assert database.counts(db)["pending"] == 8


def test_who_makes_the_queue_waits_for_another_who_is_at_it(path):
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.3, other.rollback)
        release.start()
        with closing(database.connect(path)) as db:
            add(db, {})
        release.join()
    with closing(database.connect(path, durable=False)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_copy_without_a_log_gets_one_from_the_first_worker(path):
    with closing(database.connect(path)) as db:
        db.execute("VACUUM INTO ?", (path + ".copy",))
    modes = []
    for durable in (True, False):
        with closing(database.connect(path + ".copy", durable)) as db:
            modes.append(db.execute("PRAGMA journal_mode").fetchone()[0])
    assert modes == ["delete", "wal"]


def test_a_queue_in_place_of_a_removed_one_has_nothing_in_common_with_it(path):
    """`rm queue.db` leaves its -wal and its -shm, and perhaps workers who still have all three."""
    with closing(database.connect(path, durable=False)) as old:
        add(old, *[{"id": f"old{n}"} for n in range(200)])
        os.unlink(path)
        with closing(database.connect(path)) as new:
            for n in range(9):
                add(new, {"id": f"new{n}"})
                take(old)
            add(new, *[{"id": f"more{n}"} for n in range(200)])
            assert database.counts(old) == {**database.counts(old), "processing": 9, "total": 200}
            assert database.counts(new) == {**database.counts(new), "pending": 209, "total": 209}
            assert not any(problem for _, problem, _ in database.check(new))


def test_who_makes_the_queue_leaves_alone_what_another_was_faster_to_make(path, monkeypatch):
    waiting, flock = threading.Event(), fcntl.flock
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    flock(folder, fcntl.LOCK_EX)
    monkeypatch.setattr(fcntl, "flock", lambda *given: (waiting.set(), flock(*given)))
    slow = threading.Thread(target=lambda: database.connect(path).close())
    slow.start()
    assert waiting.wait(10)
    open(path, "x").close()
    with closing(database.connect(path)) as db:
        add(db, {"id": "kept"})
        made = os.stat(path + "-wal").st_ino
        os.close(folder)
        slow.join()
        assert os.stat(path + "-wal").st_ino == made
        with closing(database.connect(path)) as another:
            assert database.counts(another)["pending"] == 1


@pytest.mark.parametrize("why", [PermissionError, BlockingIOError])
def test_a_queue_is_made_and_private_where_its_directory_cannot_be_locked(path, monkeypatch, why):
    """It may belong to others (/tmp), or be locked by who has started us (`flock DIR COMMAND`)."""

    def flock(*_: object) -> None:
        raise why

    monkeypatch.setattr(fcntl, "flock", flock)
    before = os.umask(0)
    try:
        with closing(database.connect(path)) as db:
            add(db, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@pytest.mark.parametrize("version", [-1, 0, database.VERSION, database.VERSION + 1])
def test_another_programs_database_is_refused_and_left_as_it_is(path, version):
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"CREATE TABLE notes (text); PRAGMA user_version = {version}")
    before = open(path, "rb").read()
    with pytest.raises(QueueError, match=path):
        database.connect(path)
    assert open(path, "rb").read() == before


@pytest.mark.parametrize("content", [b"once upon a time, " * 99, bytes(range(256)) * 16])
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path, content):
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(QueueError, match=f"^{path}: is not a queue: not a SQLite database"):
        database.connect(path)
    assert open(path, "rb").read() == content


@pytest.mark.parametrize("name", ["", "nowhere/queue.db"])
def test_a_directory_or_a_path_to_nowhere_is_refused_by_name(tmp_path, name):
    with pytest.raises(QueueError, match=f"^{tmp_path}.*: cannot be opened as a queue: "):
        database.connect(str(tmp_path / name))


def test_a_newer_queue_is_refused_in_a_sentence(db, path):
    add(db, {})
    db.execute(f"PRAGMA user_version = {database.VERSION + 1}")
    with pytest.raises(QueueError, match=f"is a queue of version {database.VERSION + 1}; .* newer"):
        database.connect(path)
    db.execute(f"PRAGMA user_version = {database.VERSION}")


STEPS = ("ALTER TABLE jobs ADD COLUMN colour TEXT", "UPDATE jobs SET colour = 'red'")


def test_an_older_queue_is_brought_up_step_by_step_and_keeps_its_jobs(path, monkeypatch):
    with closing(database.connect(path)) as db:
        add(db, {})
    old = database.VERSION
    monkeypatch.setattr(database, "VERSION", old + 2)
    steps = {old: STEPS, old + 1: ("UPDATE jobs SET colour = colour || 'der'",)}
    monkeypatch.setattr(database, "MIGRATIONS", steps)
    for _ in range(2):  # the second time there is nothing to do
        with closing(database.connect(path)) as migrated:
            assert migrated.execute("SELECT colour FROM jobs").fetchone()[0] == "redder"
            assert migrated.execute("PRAGMA user_version").fetchone()[0] == old + 2


def test_an_error_of_another_file_names_that_file():
    for number, why in ((2, "is gone"), (13, "Permission denied")):
        error = OSError(number, os.strerror(number), "/there/q.db.run/w1.out")
        assert database.error_text(error, "/there/q.db") == f"/there/q.db.run/w1.out: {why}"
    assert database.error_text(OSError(12, "no memory"), "/q.db") == "/q.db: no memory"


def test_damage_is_told_by_the_words_and_not_by_a_path_that_has_them():
    for error, damage in (("database or disk is full", False), ("disk image is malformed", True)):
        text = database.error_text(sqlite3.Error(error), "/what is damaged; restore it/q.db")
        assert database.is_damage(text) is damage
    assert database.is_damage(database.error_text(sqlite3.Error("file is not a database"), "/q.db"))


def test_a_mistake_of_ours_is_not_told_as_damage(db, path):
    with pytest.raises(TypeError, match="ours"):
        database.error_text(TypeError("ours"), path)
    db.execute("ALTER TABLE runs RENAME COLUMN error TO ERROR")
    assert "is damaged" in database.error_text(TypeError("of damage"), path)
    assert "no memory" in database.error_text(MemoryError(), path), "it passes; damage does not"
    db.execute("ALTER TABLE runs RENAME COLUMN ERROR TO error")


def test_a_migration_that_fails_half_way_leaves_the_queue_as_it_was(db, path, monkeypatch):
    add(db, {})
    before, old = memory(db), database.VERSION
    with monkeypatch.context() as patch:
        patch.setattr(database, "VERSION", old + 1)
        patch.setattr(database, "MIGRATIONS", {old: (*STEPS, "INSERT INTO nowhere VALUES (1)")})
        with pytest.raises(QueueError, match=f"^{path}: SQLite says: no such table: nowhere"):
            database.connect(path)
    assert memory(db) == before
    assert db.execute("PRAGMA user_version").fetchone()[0] == old


# --- doctor ----------------------------------------------------------------------------------

BROKEN = {  # by one UPDATE of a queue with one job of each state, named after it
    "every state is one of the six": "jobs SET state = 'odd' WHERE id = 'dead'",
    "waiting jobs, and no others, are marked for the look": """
        jobs SET due = NULL WHERE id = 'failed'""",
    "a processing job has one open run, of its own worker and attempt": """
        runs SET worker = 'w1' WHERE finished_at IS NULL""",
    "an open run belongs to a processing job": """
        runs SET finished_at = NULL WHERE outcome = 'completed'""",
    "a processing job's worker is registered": "workers SET id = 77 WHERE id = 4",
    "no job has begun more runs than it may": "jobs SET attempts = 3 WHERE id = 'completed'",
    "a dead job has used all its runs": "jobs SET attempts = 1 WHERE id = 'dead'",
    "a settled job knows since when": "jobs SET finished_at = NULL WHERE id = 'cancelled'",
    "every run has its job": "runs SET job = 77 WHERE outcome = 'completed'",
}


def test_doctor_finds_every_broken_invariant_and_names_it(db, path):
    assert {*BROKEN} == {*database.INVARIANTS}
    for state in database.STATES[::-1]:  # the waiting ones last
        bring(db, state, id=state)
    for name, update in BROKEN.items():
        db.execute("BEGIN")
        db.execute(f"UPDATE {update}")
        found = {name: text for name, text, _ in database.check(db) if text}
        db.execute("ROLLBACK")
        assert found.get(name, "").startswith("found in "), (name, found)
        if "WHERE id = '" in update:
            assert found[name] == "found in " + update.split("'")[-2]


@pytest.mark.parametrize(
    "change, named",
    [
        ("CREATE TRIGGER t BEFORE INSERT ON jobs BEGIN SELECT 1; END", "t"),
        ("ALTER TABLE runs ADD COLUMN more TEXT", "runs"),
        ("DROP TABLE workers", "workers"),
    ],
)
def test_doctor_names_what_a_hand_has_changed_in_the_schema(db, change, named):
    db.execute("ANALYZE")  # which adds tables of SQLite's own; some may add views
    db.execute("CREATE VIEW v AS SELECT * FROM nowhere")
    assert [problem for _, problem, _ in database.check(db) if problem] == []
    db.execute("BEGIN")
    db.execute(change)
    found = {name: problem for name, problem, _ in database.check(db) if problem}
    db.execute("ROLLBACK")
    assert found["its schema is version 1, unchanged"] == named
    assert "syntax" not in str(found)


@pytest.mark.parametrize(
    "change, why",
    [
        ("CREATE TRIGGER t BEFORE INSERT ON jobs BEGIN SELECT raise(abort, 'no'); END", "no"),
        ("UPDATE sqlite_sequence SET seq = 9223372036854775807", "datatype mismatch"),
        ("CREATE UNIQUE INDEX u ON jobs (command)", "UNIQUE constraint failed: jobs.command"),
    ],
)
def test_a_hand_in_the_file_keeps_jobs_out_and_enqueue_does_not_try_for_ever(db, change, why):
    add(db, {})
    database.gather(db, [entry(0)])
    db.execute("SAVEPOINT before")
    db.execute(change)
    with pytest.raises(sqlite3.IntegrityError, match=f"^{why}$"):
        database.enqueue(db, NOW)
    db.execute("ROLLBACK TO before")


def test_what_nobody_can_write_is_not_exposed(path, monkeypatch):
    """Settings on a read-only mount are mostly in a directory of mode 0777."""
    folder = os.path.dirname(path)
    os.chmod(folder, 0o777)
    assert database.exposed(path) == f"others can write {folder}; chmod go-w {folder}"
    readonly = SimpleNamespace(f_flag=os.ST_RDONLY | os.ST_NOSUID)
    monkeypatch.setattr(os, "statvfs", lambda _: readonly)
    assert database.exposed(path) == ""


@pytest.mark.parametrize("left", ["", "-wal", "-shm"])
def test_what_is_read_only_is_named(db, path, left, monkeypatch):
    """A look at a queue that was read-only leaves files beside it that are so, too."""
    can = os.access
    monkeypatch.setattr(os, "access", lambda name, mode: name != path + left and can(name, mode))
    told = database.error_text(sqlite3.Error("attempt to write a readonly database"), path)
    assert told.startswith(f"{path}: {path + left if left else 'it'} is read-only: ")
    monkeypatch.setattr(os, "access", can)
    told = database.error_text(sqlite3.Error("attempt to write a readonly database"), path)
    assert told.startswith(f"{path}: its directory is read-only: ")


@pytest.mark.parametrize(
    "user, group, name, own",
    [(7, 7, "", 7), (7, 9, "ann", 9), (7, 20, "staff", -1), (7, 9, "", -1)],
)
def test_a_group_is_its_users_own_by_name_or_number(monkeypatch, user, group, name, own):
    """On macOS everybody is in `staff`; in a container nobody may have a name."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "getegid", lambda: group)
    known = {group: SimpleNamespace(gr_name=name)} if name else {}
    monkeypatch.setattr(grp, "getgrgid", known.__getitem__)
    monkeypatch.setattr(pwd, "getpwuid", {user: SimpleNamespace(pw_name="ann")}.__getitem__)
    assert database.own_group() == own


# --- what people and scripts read ------------------------------------------------------------


def test_a_job_object_has_the_fields_of_the_contract_in_its_order(db):
    fields = """id command priority run_at max_retries backoff_base timeout_s cwd state attempts
        exit_code last_error stdout stderr worker created_at updated_at started_at finished_at"""
    seq = bring(db, "failed", id="a")
    [found] = map(database.as_object, database.jobs_in(db, ["failed", "dead"], -1))
    assert list(found) == fields.split()
    assert found == database.as_object(database.job(db, seq))
    expected = dict(id="a", command="true", state="failed", attempts=1, exit_code=1, stdout="out")
    times = dict(run_at="2023-11-14T22:13:30.000Z", started_at="2023-11-14T22:13:20.000Z")
    assert found.items() >= (expected | times).items()
    assert database.as_object(database.job(db, *add(db, {})))["started_at"] is None


def test_the_time_of_a_run_does_not_begin_before_its_worker_has_the_lock(db):
    add(db, {})
    run, _ = database.claim(db, "w1", NOW, lambda: float(db.in_transaction))
    told = db.execute("SELECT started_mono, started_at FROM runs").fetchone()
    assert (*told, run.started_at) == (1.0, NOW + 1, NOW + 1)


@pytest.mark.parametrize("some", ["jobs_in(db, [], -1)", "ready_jobs(db, NOW, 9)"])
def test_who_reads_jobs_slowly_keeps_no_log_from_being_emptied(db, some):
    """`list --json | less`, and workers that go on: its statement must not stay open."""
    for _ in range(3):
        add(db, {})
    rows = eval(f"database.{some}")
    assert next(rows)["state"] == "pending"
    with closing(database.connect(db.execute("PRAGMA database_list").fetchone()["file"])) as other:
        add(other, {})
        assert database.empty_log(other)
    assert len(list(rows)) == 2


def test_a_job_that_goes_on_while_it_is_listed_is_in_no_list_of_its_old_state(db):
    add(db, {})
    add(db, {})
    lists = database.jobs_in(db, ["pending"], -1), database.ready_jobs(db, NOW, 9)
    claimed = take(db).job
    for rows in lists:
        assert [row["id"] == claimed for row in rows] == [False]


def test_counts_have_every_state_in_order_and_the_queue_is_settled_when_all_jobs_are(db):
    assert database.settled(db)
    assert database.counts(db) == dict.fromkeys([*database.STATES, "total"], 0)
    seqs = {state: bring(db, state) for state in SETTLED}
    assert database.settled(db)
    assert database.counts(db, [seqs["dead"]])["total"] == 1
    for state in ("processing", "failed", "pending"):
        bring(db, state)
        assert not database.settled(db)
    assert list(database.counts(db).values()) == [1, 1, 1, 1, 1, 1, 6]
    assert [row["state"] for row in database.jobs_in(db, ["dead", "pending"], 1)] == ["pending"]
    assert database.summary(db, NOW + 1, 0)["success_rate"] == 0.25
    assert database.summary(db, NOW + 3601, 0)["success_rate"] is None


def test_the_rate_counts_all_runs_of_the_hour_but_looks_at_the_last(db, monkeypatch):
    monkeypatch.setattr(database, "RECENT_RUNS", 4)
    add(db, *[{}] * 16)
    for minute in range(16):
        run = take(db, now=NOW + 60 * minute)
        if minute < 15:  # the last one is under way
            end(db, run, "completed", NOW + 60 * minute + 1)
    assert database.summary(db, NOW + 920, 0)["jobs_per_minute"] == pytest.approx(0.2)  # 3/4 of 16
    later = database.summary(db, NOW + 3600 + 9 * 60 + 30, 0)
    assert later["jobs_per_minute"] == pytest.approx(3 / 60 * 6 / 4, abs=0.01)


def test_the_last_run_before_a_time_is_found_however_many_were_pruned(db):
    add(db, *[{}] * 30)
    for minute in range(30):
        end(db, take(db, now=NOW + 60 * minute), "completed", NOW + 60 * minute + 1)
    for gone in ("id = 0", "id BETWEEN 5 AND 9", "id % 2 = 0", "id < 20", "1"):
        db.execute(f"DELETE FROM runs WHERE {gone}")
        for moment in range(-1, 31):
            newest = "SELECT coalesce(max(id), 0) FROM runs WHERE started_at <= ?"
            exact = db.execute(newest, (NOW + 60 * moment,)).fetchone()[0]
            found = database.last_before(db, NOW + 60 * moment)
            between = "SELECT count(*) FROM runs WHERE id > ? AND id <= ?"
            assert found >= exact and db.execute(between, (exact, found)).fetchone()[0] == 0


def test_a_job_has_not_waited_since_before_it_was_there(db):
    add(db, {"run_at": NOW - 1e6}, now=NOW)
    end(db, take(db, now=NOW + 3), "completed", NOW + 4)
    assert database.summary(db, NOW + 5, 0)["median_wait_s"] == 3
    [run] = database.lane_runs(db, NOW, 10, [])
    assert run["started_at"] - run["due_at"] == 3


SENTENCES = [
    (dict(state="pending"), "pending, waits for a worker"),
    (dict(state="pending", run_at=NOW + 125), "pending, due in 2 min 5 s"),
    (dict(state="processing", attempts=2), "run 2 of 4, on w1 for 7.5 s"),
    (
        dict(state="processing", attempts=1, cancelling=1),
        "run 1 of 4, on w1 for 7.5 s, being cancelled",
    ),
    (dict(state="processing", started_at=None), "run 0 of 4, on w1 for 0 ms"),
    (dict(state="failed", attempts=2, run_at=NOW + 3.4), "failed 2 of 4 runs, next try in 3.4 s"),
    (
        dict(state="failed", attempts=1, run_at=NOW),
        "failed 1 of 4 runs, next try as soon as a worker is free",
    ),
    (dict(state="dead", attempts=4), "dead after 4 runs; `dlq retry a` starts over"),
    (dict(state="dead", attempts=1), "dead after 1 run; `dlq retry a` starts over"),
    (dict(state="dead", attempts=1, id="a b"), "dead after 1 run; `dlq retry 'a b'` starts over"),
    (
        dict(state="dead", attempts=1, id="--all"),
        "dead after 1 run; `dlq retry -- --all` starts over",
    ),
    (dict(state="completed", attempts=1), "completed on run 1 of 4"),
    (dict(state="cancelled"), "cancelled while it waited"),
    (dict(state="cancelled", attempts=2), "cancelled after 2 runs"),
]


@pytest.mark.parametrize("fields, text", SENTENCES)
def test_one_sentence_says_why_a_job_is_in_its_state_and_what_is_next(fields, text):
    job = dict(id="a", attempts=0, max_retries=3, run_at=NOW - 1, worker="w1", cancelling=0)
    assert database.sentence(job | dict(started_at=NOW - 7.5) | fields, NOW) == text
    assert {fields["state"] for fields, _ in SENTENCES} == {*database.STATES}


SPANS = {-1: "0 ms", 0.04: "40 ms", 0.0996: "0.1 s", 3.44: "3.4 s", 60: "1 min 0 s"}
SPANS |= {59.97: "59.9 s", 3599: "59 min 59 s", 12_000: "3 h 20 min", 187_200: "2 d 4 h"}


def test_a_span_of_time_reads_like_a_sentence():
    assert {span: database.duration_text(span) for span in SPANS} == SPANS


@pytest.mark.parametrize(
    "kept, written, text",
    [
        (None, None, ""),
        (b"abc", 3, "abc"),
        (b"\xffc", 2, "�c"),
        (b"c", 3, "[... 2 bytes cut ...]\nc"),
    ],
)
def test_output_is_text_and_says_what_was_cut(kept, written, text):
    assert database.output_text(kept, written) == text
