"""The memory: schema, every SQL statement, every state change.

Owns the queue file. Must not ask what time it is (`now` is passed in: Unix seconds, UTC), start or
signal a process, or print. The life of a job, each arrow a function below:

    enqueue      -> pending
    claim        pending, failed -> processing
    finish       processing -> completed | failed | dead | cancelled | put back
    cancel       pending, failed -> cancelled; processing: a mark that its supervisor acts on
    retry_dead   dead -> pending
    prune        completed, dead, cancelled -> gone

Each is one transaction (prune: one for each 250 jobs). Those of several statements begin with BEGIN
IMMEDIATE: one that reads and then writes would fail at once with SQLITE_BUSY_SNAPSHOT when another
wrote in between, whatever the timeout (https://www.sqlite.org/isolation.html). A single statement
is a transaction by itself.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from itertools import chain
from operator import itemgetter
from sqlite3 import Connection, Row
from typing import Any, NamedTuple

DEFAULT_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "queue.db")
BUSY_TIMEOUT_S = 60
LOST_RACES = 10_000  # so many in a row no worker loses: the file is damaged
RECENT_RUNS = 10_000  # status, chart and metrics look at no more of them
STATES = ("pending", "processing", "completed", "failed", "dead", "cancelled")
SETTLED = ("completed", "dead", "cancelled")

TABLES = ("jobs", "runs", "supervisors", "workers")
VERSION = 1
APPLICATION_ID = 0x7163746C  # "qctl" in the file's header: no other program's database is ours
SCHEMA = (
    """
    CREATE TABLE jobs (
        seq          INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of enqueue, never used again
        id           TEXT NOT NULL UNIQUE,   -- the name users know it by
        command      TEXT NOT NULL,          -- run as /bin/sh -c COMMAND
        priority     INTEGER NOT NULL,       -- higher first
        run_at       REAL NOT NULL,          -- not before; all times are Unix seconds, UTC
        max_retries  INTEGER NOT NULL,       -- at most 1 + max_retries runs
        backoff_base REAL NOT NULL,          -- seconds, raised to the attempt number
        timeout_s    REAL NOT NULL,          -- seconds a run may take; 0: no limit
        cwd          TEXT NOT NULL,          -- where it runs
        state        TEXT NOT NULL,          -- one of STATES
        due          INTEGER,                -- waiting: 1 may run now, 0 later; else NULL
        attempts     INTEGER NOT NULL DEFAULT 0,  -- runs begun since enqueue or DLQ retry
        cancelling   INTEGER NOT NULL DEFAULT 0,  -- 1: its run is to be ended
        worker       TEXT,                   -- who holds it, or held it last
        exit_code    INTEGER,                -- of the latest run; -N: killed by signal N
        last_error   TEXT,                   -- of the latest run; NULL: it succeeded
        created_at   REAL NOT NULL,
        updated_at   REAL NOT NULL,
        started_at   REAL,                   -- of the latest run
        finished_at  REAL                    -- of the latest run, or of the cancel
    )""",
    # What may run now, best first: the look reads its head and nothing else ...
    "CREATE INDEX jobs_due ON jobs (priority DESC, run_at, seq) WHERE due = 1",
    # ... because jobs of a later time wait apart, whatever their priority.
    "CREATE INDEX jobs_later ON jobs (run_at) WHERE due = 0",
    "CREATE INDEX jobs_state ON jobs (state)",  # counts, and lists by state in order of seq
    """
    CREATE TABLE runs (
        id           INTEGER PRIMARY KEY,
        job          INTEGER NOT NULL,       -- its seq
        attempt      INTEGER NOT NULL,       -- 1 for the first; starts over after a DLQ retry
        worker       TEXT NOT NULL,
        due_at       REAL NOT NULL,          -- the job's run_at when it was claimed
        started_at   REAL NOT NULL,
        started_mono REAL NOT NULL,          -- the same on the monotonic clock, for timeouts
        finished_at  REAL,                   -- NULL: it runs
        outcome      TEXT,                   -- completed, failed, cancelled; stopped: not counted
        exit_code    INTEGER,
        error        TEXT,
        stdout_bytes INTEGER,                -- written in all; the end of them is kept:
        stderr_bytes INTEGER,
        stdout       BLOB,
        stderr       BLOB,
        line         TEXT,                   -- the launcher's, that ran in place of the command
        stop_line    TEXT                    -- ends what it may have left elsewhere
    )""",
    "CREATE INDEX runs_job ON runs (job)",
    """
    CREATE TABLE supervisors (
        id           INTEGER PRIMARY KEY AUTOINCREMENT,
        host         TEXT NOT NULL,
        boot         TEXT NOT NULL,          -- names one boot of that host: all older is dead
        pid          INTEGER NOT NULL,
        birth        TEXT NOT NULL,          -- when the pid began, which tells a recycled one
        lock_timeout_s REAL NOT NULL,        -- if it does not beat for so long, it is lost
        heartbeat_at REAL NOT NULL,          -- others watch whether it changes
        stop         INTEGER NOT NULL DEFAULT 0   -- 1: finish the jobs and leave; 2: at once
    )""",
    """
    CREATE TABLE workers (
        id           INTEGER PRIMARY KEY AUTOINCREMENT,  -- "w" and this is its name
        supervisor   INTEGER NOT NULL,
        pid          INTEGER NOT NULL,       -- its session, too
        birth        TEXT NOT NULL,
        started_at   REAL NOT NULL,
        jobs_done    INTEGER NOT NULL DEFAULT 0
    )""",
)
# What brings a file of version N (the key) to N + 1. A new file gets SCHEMA, which has it all.
MIGRATIONS: dict[int, tuple[str, ...]] = {}


class QueueError(Exception):
    """It could not be done; the message names the thing and the next step. Exit 1."""


class NoJob(QueueError):
    """There is no such job."""


SQLiteError = sqlite3.Error  # for the rooms above, which do not import sqlite3


class Run(NamedTuple):
    """One run of one job: what a worker needs to run it, and to prove that it is still its own.
    `claim` and `held_by` select its fields in this order."""

    id: int
    worker: str
    started_at: float
    seq: int
    job: str
    attempt: int
    max_retries: int
    backoff_base: float
    command: str
    cwd: str
    due_at: float
    line: str | None = None
    stop_line: str | None = None


class Result(NamedTuple):
    """How a run ended. `outcome` is completed, failed, cancelled or stopped (not counted)."""

    outcome: str
    exit_code: int | None = None
    error: str | None = None
    stdout: bytes = b""
    stdout_bytes: int = 0
    stderr: bytes = b""
    stderr_bytes: int = 0


turn: Callable[[], Any] = nullcontext  # how to queue up for the write lock: worker.turn
show: Any = None  # --explain: a function of the face, given [(where and what, SQL, remark)]


# --- the file --------------------------------------------------------------------------------


def connect(path: str, durable: bool = True, patience_s: float = BUSY_TIMEOUT_S) -> Connection:
    """Open the queue, made or migrated if need be. Raises QueueError if it is none of ours.

    Whoever finds it locked waits for at most `patience_s`. A durable connection syncs each commit,
    so that an id that was printed survives a power cut. Workers' are not: a power cut may undo
    their last results, and those jobs run again.
    """
    try:
        # Never opened here again: closing any descriptor of a file drops all locks that this
        # process has on it, another connection's too (sqlite.org/howtocorrupt.html, 2.2).
        if not os.path.isfile(path):
            make_file(path)
    except OSError as error:
        raise QueueError(f"{path}: cannot be opened as a queue: {error.strerror}") from None
    # Absolute, for to SQLite some names are no files (:memory:); and not os.path.abspath, which
    # shortens link/.. by its letters: that may be another file than the one that was made.
    kind = {"factory": Explained} if show else {}
    db = sqlite3.connect(os.path.realpath(path), timeout=patience_s, isolation_level=None, **kind)
    try:
        db.row_factory = Row
        db.text_factory = lambda data: data.decode(errors="replace")  # bytes may have been flipped
        db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        # On macOS a sync stops at the drive's cache, unless it is told not to.
        db.execute("PRAGMA fullfsync = 1")
        # Pages. Each checkpoint stops us for some 10 ms; but on a small disk the -wal must not take
        # the room that the file itself needs to grow, without which it could never be emptied.
        free = os.statvfs(os.path.dirname(os.path.realpath(path)))
        pages = max(50, min(4000, free.f_bavail * free.f_frsize // 16_384))
        db.execute(f"PRAGMA wal_autocheckpoint = {pages}")
        db.execute("PRAGMA journal_size_limit = 33554432")  # of what a stalled reader made grow
        if new := identity(db) != (APPLICATION_ID, VERSION):
            migrate(db, path)
        if new or not durable:  # once for each worker: VACUUM INTO, for one, makes copies without
            with suppress(sqlite3.OperationalError):  # then another is at it, which is good enough
                db.execute("PRAGMA journal_mode = WAL")  # readers and a writer work at once
    except BaseException as error:
        db.close()
        if isinstance(error, (sqlite3.Error, UnicodeError)):  # of a message that quotes damage
            raise QueueError(error_text(sqlite3.Error(error), path)) from None
        raise
    return db


def make_file(path: str) -> None:
    """Make an empty file: here and not by SQLite, to be private at birth whatever the umask.

    What a queue of this name has left that was removed goes first: its workers, who may still be
    there, would share its -shm with us (sqlite.org/howtocorrupt.html, 2.4), and run old jobs again.
    """
    place, folder = os.path.realpath(path), None
    try:
        with suppress(PermissionError):  # not ours to tidy: then it is made beside what is there
            folder = os.open(os.path.dirname(place), os.O_RDONLY | os.O_CLOEXEC)
            if locked(folder) and not os.path.exists(path):
                for end in ("-wal", "-shm"):
                    with suppress(FileNotFoundError):
                        os.unlink(place + end)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    finally:
        if folder is not None:
            os.close(folder)


def locked(folder: int) -> bool:
    """Lock a directory, so that of two who make the queue at once neither removes the other's;
    but wait for a second at most: `flock DIRECTORY COMMAND` may be what has started us."""
    import fcntl

    for _ in range(100):
        with suppress(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.01)
    return False


def identity(db: Connection) -> tuple[int, int]:
    """Return whose database this is and of which version."""
    pragmas = ("application_id", "user_version")
    return tuple(db.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in pragmas)


def migrate(db: Connection, path: str) -> None:
    """Bring a new or an older file to VERSION, all steps in one transaction."""
    with transaction(db):
        # Only what is read here, under the lock, counts: another process may have been faster.
        owner, version = identity(db)
        tables = db.execute("SELECT 1 FROM sqlite_master").fetchone()
        new = (owner, version) == (0, 0) and tables is None
        if not new and (owner != APPLICATION_ID or version < 1):
            raise QueueError(f"{path} is a database, but no queue; use another --db")
        if version > VERSION:
            known = f"this program knows up to {VERSION}; use a newer queuectl"
            raise QueueError(f"{path} is a queue of version {version}; {known}")
        for step in [SCHEMA] if new else [MIGRATIONS[v] for v in range(version, VERSION)]:
            for statement in step:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {VERSION}")


@contextmanager
def transaction(db: Connection) -> Iterator[None]:
    """One transaction; inside of another it is a part of that."""
    if db.in_transaction:
        yield
        return
    asked = time.perf_counter()  # noqa: F841  # --explain reads it
    with turn():
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            elif isinstance(error, sqlite3.Error):  # SQLite has by itself: the disk is full,
                with suppress(sqlite3.Error):  # and what it took back still takes all the room
                    empty_log(db)
            raise


def empty_log(db: Connection) -> bool:
    """Give the room that the -wal takes back to the disk; but if somebody is reading all the while,
    not now: to wait for that keeps out all who write."""
    before = db.execute("PRAGMA busy_timeout").fetchone()[0]
    db.execute("PRAGMA busy_timeout = 1000")
    try:
        return not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    finally:
        db.execute(f"PRAGMA busy_timeout = {before}")


def unwritable(path: str) -> str:
    """Return which of a queue's files may not be written. A look at a queue that was read-only may
    have left others so beside it."""
    place = os.path.realpath(path)
    for end in ("", "-wal", "-shm"):
        if os.path.exists(place + end) and not os.access(place + end, os.W_OK):
            return place + end if end else "it"
    return "its directory"


def is_damage(text: str) -> bool:
    """Say whether `error_text` tells of what no second try will mend."""
    return text.endswith(("restore it from a copy", "not a SQLite database; use another --db"))


def error_text(error: Exception, path: str) -> str:
    """Say what an error means for the queue, and what to do.

    One of another kind than these is raised again, for it is a mistake of ours; unless it comes
    from values that no code of ours has written.
    """
    if isinstance(error, QueueError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is no memory left; try again"
    if not isinstance(error, (OSError, sqlite3.Error)):
        if not os.path.exists(path) or not is_damaged(path):
            raise error
        error = sqlite3.DatabaseError("malformed")
    if isinstance(error, OSError):  # of a file beside it, perhaps
        why = "is gone" if isinstance(error, FileNotFoundError) else error.strerror
        return f"{error.filename or path}: {why}"
    for sign, meaning in (
        ("not a database", "is not a queue: not a SQLite database; use another --db"),
        ("malformed", "is damaged; `doctor` tells more; restore it from a copy"),
        ("codec", "is damaged: its schema is no text; restore it from a copy"),
        ("is full", "the disk is full (or TMPDIR): nothing was changed; make room and try again"),
        ("readonly", f"{unwritable(path)} is read-only: nothing was changed; make it writable"),
        ("I/O", "cannot be read or written (disk I/O error); is the disk full, or broken?"),
        ("unable to open", "cannot be opened; is its directory there, and may you write both?"),
        ("is locked", "was locked by another process for too long; try again"),
        ("", f"SQLite says: {error}; `doctor` tells more"),
    ):
        if sign in str(error):
            return f"{path}: {meaning}"


# --- beside the file: the run directory and the bell in it -----------------------------------

# Here and not in worker.py, for who only enqueues loads no more than this (3 ms of some 80).


def run_directory(path: str) -> str:
    return os.path.realpath(path) + ".run"


def exposed(path: str, settings: str = "") -> str:
    """Say where others could write the queue (or the settings, for a launcher is a shell line), or
    replace it, and what mends that; else ""."""
    folder = run_directory(path)  # not beside the path itself, if that is a link
    files = path, folder, settings or path, os.path.realpath(settings or path)
    parents = {os.path.dirname(each) or "." for each in files}
    own = own_group()
    for place in (path, folder, settings or path, *sorted(parents)):
        # Not every queue has its run directory yet; and what we cannot reach we cannot use.
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            status = os.stat(place, follow_symlinks=place != folder)
            if place == folder and not stat.S_ISDIR(status.st_mode):
                return f"{folder} is not a directory; remove it"
            if place == path and not stat.S_ISREG(status.st_mode):
                continue  # no queue, as `connect` says
            # Others cannot replace our files in a sticky directory (/tmp), nor where nobody can
            # (settings on a read-only mount). A group that is our own is let in, but to the queue:
            # where each user has one, umask 002 makes all files so.
            sticky = place in parents and status.st_mode & stat.S_ISVTX
            sticky |= os.statvfs(place).f_flag & os.ST_RDONLY
            bits = 0o002 if place not in (path, folder) and status.st_gid == own else 0o022
            if status.st_mode & bits and not sticky:
                return f"others can write {place}; chmod go-w {place}"
    return ""


def own_group() -> int:
    """Return our group if it is our user's alone, else -1: it has his name (login.defs(5),
    USERGROUPS_ENAB) or number. On macOS, for one, all users are in `staff`."""
    import grp
    import pwd

    user, group = os.geteuid(), os.getegid()
    with suppress(KeyError):
        if user == group or grp.getgrgid(group).gr_name == pwd.getpwuid(user).pw_name:
            return group
    return -1


def safe_open(path: str, flags: int) -> int:
    """Open a private file; never through a symlink that was planted, nor waiting, as on a FIFO."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


def open_bell(path: str, flags: int) -> int | None:
    with suppress(OSError):  # nobody listens, or no FIFOs here
        bell = safe_open(os.path.join(run_directory(path), "bell"), flags)
        if stat.S_ISFIFO(os.fstat(bell).st_mode):
            return bell
        os.close(bell)  # something else was planted there
    return None


def ring(path: str, times: int = 1) -> None:
    """Wake that many idle workers. A hint: a ring that is lost costs the poll interval at most."""
    bell = open_bell(path, os.O_WRONLY)
    if bell is None:
        return
    with suppress(OSError):  # full of rings as it is, or the last who listened has just left
        os.write(bell, b"!" * min(times, 512))
    os.close(bell)


# --- enqueue ---------------------------------------------------------------------------------


INPUT = "id, command, priority, run_at, max_retries, backoff_base, timeout_s, cwd"


def gather(db: Connection, jobs: Iterable[tuple[int, dict[str, Any]]]) -> None:
    """Read (line, row from config.check_job) into a temporary table, for `enqueue`.

    So a slow producer never holds the queue's lock. Raises QueueError if an id is given twice; what
    reading the jobs raises passes through.
    """
    row = itemgetter(*INPUT.split(", "))
    db.execute("PRAGMA cache_size = -40000")  # KiB, for the indexes of a million ids
    db.execute("DROP TABLE IF EXISTS temp.incoming")
    db.execute(f"CREATE TEMP TABLE incoming (number INTEGER PRIMARY KEY, line, {INPUT})")
    db.execute("BEGIN")  # of the temporary table alone: nobody waits for it
    marks = ", ".join("?" * (2 + INPUT.count(",")))
    rows = ((line, *row(job)) for line, job in jobs)
    db.executemany(f"INSERT INTO incoming (line, {INPUT}) VALUES ({marks})", rows)
    db.execute("COMMIT")
    twice = "WHERE id NOTNULL GROUP BY id HAVING count(*) > 1 ORDER BY 1"
    for line, job_id in db.execute(f"SELECT max(line), id FROM incoming {twice}"):
        raise QueueError(f'line {line}: the id "{job_id}" is used twice')


def enqueue(db: Connection, now: float) -> tuple[int, int]:
    """Add what was gathered, all or none, and return the seq of the first and of the last.

    Jobs without `run_at` are due at once. Raises QueueError if an id is in use, naming the line.
    """
    with transaction(db):
        for line, job_id in db.execute("SELECT line, id FROM incoming JOIN jobs USING (id)"):
            place = f"line {line}: " if line else ""
            raise QueueError(f'{place}the id "{job_id}" is in use; choose another, or leave it out')
        # A made-up id is short and looks random, yet none repeats: multiplying by an odd number is
        # a permutation of the numbers below a power of two (Knuth, TAOCP 6.4). A user may have
        # pasted one that is still to come, from another queue: then the numbers go on behind it.
        made_up = "printf('%08x', (:last + number) * 2654435761 & 4294967295)"
        last = db.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'jobs'").fetchone()[0]
        last, jump = last or 0, 0
        while True:
            try:
                count = db.execute(
                    f"""
                    INSERT INTO jobs (seq, {INPUT}, state, due, created_at, updated_at)
                    SELECT :last + number, coalesce(id, {made_up}), command, priority,
                           coalesce(run_at, :now), max_retries, backoff_base, timeout_s, cwd,
                           'pending', coalesce(run_at, :now) <= :now, :now, :now
                    FROM incoming ORDER BY number""",
                    {"last": last, "now": now},
                ).rowcount
                return last + 1, last + count
            except sqlite3.IntegrityError as error:
                if not str(error).endswith(("jobs.id", "jobs.seq")):
                    raise  # a hand has changed the schema, or used up the numbers
                # The next 1, 2, 4 ... times as many numbers are left out.
                jump = 2 * jump or db.execute("SELECT count(*) FROM incoming").fetchone()[0]
                last += jump


# --- claim and finish ------------------------------------------------------------------------


def claim(
    db: Connection,
    worker: str,
    now: float,
    clock: Callable[[], float],
    launched: Callable = lambda run: run,
) -> tuple[Run | None, float | None]:
    """Give the best due job to `worker`: (its run, or None if none is due; when the next is due).

    Best: highest priority, then earliest run_at, then earliest enqueued. `clock` is the monotonic
    one: the run begins when the lock is had, and that may be long after `now`. `launched` gives the
    run its lines; they are stored before anything is started, so that whoever finds the run lost
    can end it elsewhere. Why it holds between processes: design.md, "Which line stops a double
    claim?".
    """
    asked = clock()
    for _ in range(LOST_RACES):
        # Look, without a lock (but for hand_in's). It costs the same however many wait or are done.
        best = db.execute(
            """
            SELECT seq, id, attempts + 1, max_retries, backoff_base, command, cwd, run_at,
                   (SELECT min(run_at) FROM jobs WHERE due = 0) AS later,
                   (SELECT 1 FROM jobs WHERE due = 1 LIMIT 1 OFFSET 1) AS more
            FROM jobs WHERE due = 1
              AND +state IN ('pending', 'failed')  -- a hand may have changed one; +: no index
            ORDER BY priority DESC, run_at, seq LIMIT 1"""
        ).fetchone()
        later = best["later"] if best else next_due_at(db)
        if later is not None and later <= now:  # its time has come: it joins those that are due
            db.execute("UPDATE jobs SET due = 1 WHERE due = 0 AND run_at <= ?", (now,))
            continue
        if not best:
            return None, later
        # Take: of all that saw the same job, one finds it still waiting and changes one row.
        *seen, _, more = best
        run = launched(Run(0, worker, now, *seen))
        with transaction(db):
            start = now + clock() - asked
            taken = db.execute(
                """
                UPDATE jobs
                SET state = 'processing', worker = ?, attempts = attempts + 1, due = NULL,
                    exit_code = NULL, last_error = NULL,
                    started_at = ?, finished_at = NULL, updated_at = ?
                WHERE seq = ?
                  AND state IN ('pending', 'failed')  -- nobody was faster,
                  AND run_at = ? AND attempts + 1 = ?  -- nor has it run since""",
                (worker, start, start, run.seq, run.due_at, run.attempt),
            ).rowcount
            if taken == 1:
                opened = db.execute(
                    """
                    INSERT INTO runs (job, worker, attempt, due_at, started_at, started_mono,
                                      line, stop_line)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                    (run.seq, worker, run.attempt, run.due_at, start, clock(), *run[-2:]),
                )
                return run._replace(id=opened.lastrowid, started_at=start), now if more else later
        # rowcount 0: another worker was faster; look again.
    raise sqlite3.DatabaseError("malformed: what an index finds, no row of the table bears out")


def note_exit(db: Connection, run: Run, exit_code: int) -> None:
    """Note that a command has exited, while what it left behind is still being ended."""
    note = "UPDATE runs SET exit_code = ? WHERE id = ? AND finished_at IS NULL"
    db.execute(note, (exit_code, run.id))


def held_by(db: Connection, worker: str) -> Run | None:
    """Return the run that a worker holds, or None."""
    row = db.execute(
        """
        SELECT runs.id, runs.worker, runs.started_at, seq, jobs.id, attempt, max_retries,
               backoff_base, command, cwd, due_at, line, stop_line
        FROM jobs JOIN runs ON job = seq AND runs.finished_at IS NULL
        WHERE state = 'processing' AND jobs.worker = :worker""",
        {"worker": worker},
    ).fetchone()
    return Run(*row) if row else None


def finish(
    db: Connection, run: Run, result: Result, now: float, max_backoff_s: float, jitter: float
) -> tuple[str, float] | None:
    """Record how a run ended: (the job's new state, its run_at), or None if it has lost the job.

    `jitter` is added to the backoff, in seconds. None means that somebody else has settled this
    run meanwhile (fenced, cancelled); then nothing at all is changed.
    """
    state, attempts, run_at = result.outcome, run.attempt, run.due_at
    if state == "stopped":  # not the job's fault: this run is not counted
        attempts = run.attempt - 1
        state = "failed" if attempts else "pending"
    elif state == "failed" and run.attempt > run.max_retries:
        state = "dead"
    elif state == "failed":
        run_at = now + backoff_s(run.attempt, run.backoff_base, max_backoff_s) + jitter
    due = int(run_at <= now) if state in ("failed", "pending") else None
    new = (state, attempts, run_at, due, result.exit_code, result.error, now, now)
    with transaction(db):
        owned = db.execute(
            """
            UPDATE jobs
            SET state = ?, attempts = ?, run_at = ?, due = ?,
                exit_code = ?, last_error = ?, finished_at = ?, updated_at = ?
            WHERE seq = ?
              AND state = 'processing' AND worker = ? AND attempts = ?""",
            (*new, run.seq, run.worker, run.attempt),
        ).rowcount
        if owned != 1:
            return None
        db.execute(
            """
            UPDATE runs
            SET finished_at = ?, outcome = ?, exit_code = ?, error = ?,
                stdout = ?, stdout_bytes = ?, stderr = ?, stderr_bytes = ?
            WHERE id = ? AND finished_at IS NULL""",
            (now, *result, run.id),
        )
        db.execute("UPDATE workers SET jobs_done = jobs_done + 1 WHERE id = ?", (run.worker[1:],))
        if state != "completed":  # and asked to be cancelled while it ran: it must not run again
            cancelled = db.execute(
                """
                UPDATE jobs SET state = 'cancelled', due = NULL, cancelling = 0
                WHERE seq = ? AND cancelling = 1""",
                (run.seq,),
            ).rowcount
            state = "cancelled" if cancelled else state
    return state, run_at


def backoff_s(attempts: int, backoff_base: float, max_backoff_s: float) -> float:
    """Return the seconds to wait after that many runs, before jitter."""
    with suppress(OverflowError):
        return min(max_backoff_s, float(backoff_base) ** attempts)
    return max_backoff_s


# --- cancel, retry, prune --------------------------------------------------------------------


def cancel(db: Connection, seq: int, now: float) -> str:
    """Cancel a waiting job at once, mark a running one; return its state now.

    Raises QueueError if it has settled.
    """
    with transaction(db):
        changed = db.execute(
            """
            UPDATE jobs
            SET cancelling = (state = 'processing'), due = NULL, updated_at = :now,
                finished_at = CASE state WHEN 'processing' THEN NULL ELSE :now END,
                state = CASE state WHEN 'processing' THEN state ELSE 'cancelled' END
            WHERE seq = :seq AND state IN ('pending', 'failed', 'processing')""",
            {"seq": seq, "now": now},
        ).rowcount
        found = job(db, seq)
    if changed != 1:
        raise QueueError(f'job "{found["id"]}" is already {found["state"]}')
    return found["state"]


def retry_dead(db: Connection, seqs: list[int] | None, now: float) -> int:
    """Make dead jobs (None: all of them) pending, due now, with all their runs ahead.

    Returns how many; their history stays. All or none: raises QueueError if one is not dead.
    """
    again = """
        UPDATE jobs
        SET state = 'pending', attempts = 0, due = 1, run_at = :now, updated_at = :now
        WHERE state = 'dead'"""
    with transaction(db):
        if seqs is None:
            return db.execute(again, {"now": now}).rowcount
        for seq in seqs:
            if db.execute(f"{again} AND seq = :seq", {"seq": seq, "now": now}).rowcount != 1:
                found = job(db, seq)
                told = f'job "{found["id"]}" is {found["state"]}, not dead'
                raise QueueError(f"{told}: nothing was changed")
    return len(seqs)


def prune(db: Connection, states: Iterable[str], before: float, dry_run: bool = False) -> int:
    """Remove settled jobs that finished before a time, with their history; return how many.

    Few at a time, so that no claim waits long.
    """
    # A power cut may bring some back: that is no reason to wait for the disk each time.
    db.execute("PRAGMA synchronous = NORMAL")
    wanted = json.dumps([state for state in states if state in SETTLED])
    # "+": walk by seq; the index on state would collect and sort a whole state each time.
    old = "finished_at < :before AND +state IN (SELECT value FROM json_each(:wanted))"
    chosen = f"SELECT seq FROM jobs WHERE seq > :last AND {old} ORDER BY seq LIMIT 250"
    given, total = {"last": 0, "before": before, "wanted": wanted}, 0
    while seqs := [row["seq"] for row in db.execute(chosen, given)]:
        count, given["first"], given["last"] = len(seqs), seqs[0], seqs[-1]
        if not dry_run:
            these = f"FROM jobs WHERE seq BETWEEN :first AND :last AND {old}"
            with transaction(db):
                db.execute(f"DELETE FROM runs WHERE job IN (SELECT seq {these})", given)
                count = db.execute(f"DELETE {these}", given).rowcount
        total += count
    return total


def vacuum(db: Connection) -> bool:
    """Give the room of what was removed back to the disk; False: later, when nobody reads.

    Who writes meanwhile waits.
    """
    try:
        db.execute("VACUUM")
    finally:
        emptied = empty_log(db)
    return emptied


# --- supervisors and workers -----------------------------------------------------------------


def register_supervisor(
    db: Connection, host: str, boot: str, pid: int, birth: str, now: float, lock_timeout_s: float
) -> int:
    return db.execute(
        """
        INSERT INTO supervisors (host, boot, pid, birth, heartbeat_at, lock_timeout_s)
        VALUES (?, ?, ?, ?, ?, ?)""",
        (host, boot, pid, birth, now, lock_timeout_s),
    ).lastrowid


def register_worker(db: Connection, supervisor: int, pid: int, birth: str, now: float) -> str:
    """Return the new worker's name, never used before in this queue: w1, w2, ..."""
    added = db.execute(
        """
        INSERT INTO workers (supervisor, pid, birth, started_at)
        SELECT id, :pid, :birth, :now FROM supervisors WHERE id = :supervisor""",
        {"supervisor": supervisor, "pid": pid, "birth": birth, "now": now},
    )
    if added.rowcount != 1:  # gone, and forgotten by another: nobody would know of this worker
        raise QueueError("the supervisor of this worker is gone")
    return f"w{added.lastrowid}"


def beat(db: Connection, supervisor: int, now: float) -> None:
    db.execute("UPDATE supervisors SET heartbeat_at = ? WHERE id = ?", (now, supervisor))


def ask_to_stop(db: Connection, how: int) -> set[int]:
    """Ask every supervisor to leave: 1 finishes the running jobs, 2 puts them back. Return whom."""
    with transaction(db):
        db.execute("UPDATE supervisors SET stop = max(stop, ?)", (how,))
        return {row["id"] for row in supervisors(db)}


def supervisors(db: Connection) -> list[Row]:
    return db.execute("SELECT * FROM supervisors ORDER BY id").fetchall()


def workers(db: Connection) -> list[Row]:
    """Return every registered worker, live or not, with its supervisor and its run if any."""
    return db.execute(
        """
        SELECT 'w' || workers.id AS worker, workers.pid, workers.birth, workers.started_at,
               jobs_done, supervisor, host, boot, heartbeat_at, lock_timeout_s, stop,
               supervisors.pid AS supervisor_pid, supervisors.birth AS supervisor_birth,
               jobs.id AS job, command, jobs.started_at AS since, timeout_s, cancelling,
               runs.id AS run, started_mono, runs.exit_code
        FROM workers
        JOIN supervisors ON supervisors.id = supervisor
        LEFT JOIN jobs ON state = 'processing' AND jobs.worker = 'w' || workers.id
        LEFT JOIN runs ON runs.job = jobs.seq AND runs.finished_at IS NULL
        ORDER BY workers.id"""
    ).fetchall()


def remove_worker(db: Connection, name: str) -> None:
    """Forget a worker that is gone and holds no job."""
    db.execute("DELETE FROM workers WHERE id = ?", (name[1:],))


def remove_supervisor(db: Connection, supervisor: int) -> None:
    """Forget a supervisor that is gone, unless workers of it are still to be settled."""
    unless = "id IN (SELECT supervisor FROM workers)"
    db.execute(f"DELETE FROM supervisors WHERE id = ? AND NOT {unless}", (supervisor,))


# --- reading ---------------------------------------------------------------------------------

# A job as everybody sees it, its fields in this order. Output is of the latest run.
JOB = """
    SELECT seq, jobs.id, command, priority, run_at, max_retries, backoff_base, timeout_s, cwd,
           state, attempts, jobs.exit_code, last_error, stdout, stderr, jobs.worker, created_at,
           updated_at, jobs.started_at, jobs.finished_at, stdout_bytes, stderr_bytes, cancelling
    FROM jobs LEFT JOIN runs ON runs.id = (SELECT max(id) FROM runs WHERE job = seq)"""

RUN = """id, attempt, worker, due_at, started_at, finished_at, outcome, exit_code, error, stdout,
    stderr, stdout_bytes, stderr_bytes, line"""


def find(db: Connection, text: str) -> int:
    """Return the seq of the job with this id, or with the one id that begins so."""
    text = text.encode(errors="replace").decode()  # bytes that are no text: no id either
    begun = """
        SELECT seq, id FROM jobs WHERE id >= :text AND id < :text || char(1114111)
        ORDER BY id LIMIT 4"""
    rows = db.execute(begun, {"text": text}).fetchall() if text else []
    if not rows:
        raise NoJob(f'no job "{text}"; `list` shows those that are there')
    if len(rows) > 1 and rows[0]["id"] != text:
        some = ", ".join(row["id"] for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
        raise QueueError(f'"{text}" is ambiguous: {some}; give more of the id')
    return rows[0]["seq"]


def job(db: Connection, seq: int) -> Row:
    found = db.execute(f"{JOB} WHERE seq = ?", (seq,)).fetchone()
    if found is None:
        raise NoJob("the job was pruned meanwhile")
    return found


def jobs(db: Connection, seqs: Sequence[int], order: str = "seq") -> Iterator[Row]:
    """Yield the jobs of these numbers that are still there, read some at a time: while a query is
    open the -wal only grows, and whoever reads what is printed (`| less`) may take all day."""
    some = f"{JOB} WHERE seq IN (SELECT value FROM json_each(?)) ORDER BY {order}"
    for start in range(0, len(seqs), 20):
        yield from db.execute(some, (json.dumps([*seqs[start : start + 20]]),)).fetchall()


def jobs_in(db: Connection, states: Sequence[str], limit: int) -> Iterator[Row]:
    """Return the newest `limit` jobs (-1: all) in these states (none: any), in order of enqueue."""
    where = f"WHERE state IN ({', '.join('?' * len(states))})" if states else ""
    newest = f"SELECT seq FROM jobs {where} ORDER BY seq DESC LIMIT ?"
    found = jobs(db, [seq for (seq,) in db.execute(newest, (*states, limit))][::-1])
    return (row for row in found if not states or row["state"] in states)


def ready_jobs(db: Connection, now: float, limit: int) -> Iterator[Row]:
    """Return what a worker could take now, in the order in which it would."""
    order = "priority DESC, run_at, seq"
    # Each part by its own index; an OR would read all jobs.
    due = "SELECT seq FROM jobs WHERE due = 1 ORDER BY priority DESC, run_at, seq LIMIT :limit"
    come = "SELECT seq FROM jobs WHERE due = 0 AND run_at <= :now"
    query = f"""
        SELECT seq FROM jobs WHERE seq IN (SELECT * FROM ({due}) UNION ALL {come})
        ORDER BY {order} LIMIT :limit"""
    seqs = [seq for (seq,) in db.execute(query, {"now": now, "limit": limit})]
    return (row for row in jobs(db, seqs, order) if row["state"] in ("pending", "failed"))


def runs(db: Connection, seq: int) -> list[Row]:
    return db.execute(f"SELECT {RUN} FROM runs WHERE job = ? ORDER BY id", (seq,)).fetchall()


def runs_after(db: Connection, last: int | None, others: Iterable[int] = ()) -> Iterator[Row]:
    """Return the runs whose number is above `last` (None: of the last RECENT_RUNS), and others."""
    return db.execute(
        f"""
        SELECT runs.id, outcome, runs.started_at, runs.finished_at,
               max(due_at, created_at) AS due_at  -- an old run_at may be pasted back
        FROM runs JOIN jobs ON seq = job
        WHERE runs.id > coalesce(:last, (SELECT max(id) FROM runs) - {RECENT_RUNS})
        OR runs.id IN (SELECT value FROM json_each(:others))""",
        {"last": last, "others": json.dumps([*others])},
    )


def counts(db: Connection, seqs: Iterable[int] = ()) -> dict[str, int]:
    """Return the number of jobs (of these, or all) in each state, and the total."""
    if seqs:
        states = [job(db, seq)["state"] for seq in seqs]
        return {state: states.count(state) for state in STATES} | {"total": len(states)}
    each = ", ".join(f"(SELECT count(*) FROM jobs WHERE state = '{state}')" for state in STATES)
    found = dict(zip(STATES, db.execute(f"SELECT {each}").fetchone()))
    return found | {"total": sum(found.values())}


def summary(db: Connection, now: float, workers: int) -> dict[str, Any]:
    """Return the counts, and of the last hour: jobs a minute, success rate, median times."""
    import statistics

    recent = list(runs_after(db, None))
    # Of very many runs only the last are looked at; their numbers tell how many there were.
    begun = max([run["id"] for run in recent], default=0) - last_before(db, now - 3600)
    ended = [run for run in recent if run["outcome"] in ("completed", "failed")]
    ended = [run for run in ended if run["finished_at"] > now - 3600]
    completed = sum(run["outcome"] == "completed" for run in ended)
    waits = [max(0, run["started_at"] - run["due_at"]) for run in ended]
    spans = [max(0, run["finished_at"] - run["started_at"]) for run in ended]
    return counts(db) | {
        "workers": workers,
        "jobs_per_minute": round(completed / 60 * max(1, begun / RECENT_RUNS), 2),
        "success_rate": round(completed / len(ended), 4) if ended else None,
        "median_wait_s": round(statistics.median(waits), 4) if ended else None,
        "median_run_s": round(statistics.median(spans), 4) if ended else None,
    }


def settled(db: Connection) -> bool:
    """Say whether no job is pending, failed or processing: nothing is left to do."""
    left = "SELECT 1 FROM jobs WHERE state IN ('pending', 'failed', 'processing') LIMIT 1"
    return db.execute(left).fetchone() is None


def next_due_at(db: Connection) -> float | None:
    """Return when the next waiting job comes due, or None if none waits for a time."""
    return db.execute("SELECT min(run_at) FROM jobs WHERE due = 0").fetchone()[0]


# What follows is mostly for the dashboard: each costs the same in a queue of a million jobs as in a
# small one, but for `oldest_ready_at`: a tenth of a second, as `counts` does.

SEARCHED = 50_000  # jobs in which one page of a search looks for a text
TOP = 2**53  # above every seq, and exact in JavaScript: the `before` of the first page
BRIEF = """
    SELECT seq, id, substr(command, 1, 300) AS command, priority, run_at, max_retries, state,
           attempts, exit_code, substr(last_error, 1, 300) AS last_error, worker, created_at,
           updated_at, started_at, finished_at, cancelling
    FROM jobs"""


def data_version(db: Connection) -> int:
    """Return a number that changes when another connection has changed the queue."""
    return db.execute("PRAGMA data_version").fetchone()[0]


def jobs_page(
    db: Connection, state: str, text: str, before: int, limit: int, brief: bool = False
) -> tuple[list[Row], int | None]:
    """Return (jobs whose seq is below `before`, newest first; the next `before`, None at the end).

    `state` and `text` (in the id or the command, in any case) may be "". The job whose id is the
    text comes first, alone and however old. After it the next SEARCHED jobs are looked through for
    the text, so there may be more behind a short page. Brief: no output, long texts cut.
    """
    given = {"state": state, "text": text, "before": before, "limit": limit, "floor": -1}
    where, order = "state = :state" if state else "1", "ORDER BY seq DESC LIMIT"
    window = f"{where} AND seq < :before AND seq > :floor"
    if text and before >= TOP:
        window, given["floor"] = f"jobs.id = :text AND +{where}", TOP - 2
    elif text:
        edge = f"SELECT seq FROM jobs WHERE {window} {order} 1 OFFSET {SEARCHED}"
        given["floor"] = (db.execute(edge, given).fetchone() or [-1])[0]
        window += """ AND jobs.id != :text
            AND (instr(lower(command), lower(:text)) OR instr(lower(jobs.id), lower(:text)))"""
    chosen = f"{BRIEF if brief else JOB} WHERE {window} {order} :limit + 1"
    rows = db.execute(chosen, given).fetchall()
    rest = rows[limit - 1]["seq"] if len(rows) > limit else given["floor"] + 1 or None
    return rows[:limit], rest


def lane_runs(db: Connection, since: float, limit: int, also: list[int]) -> list[Row]:
    """Return the open runs, the newest `limit` that ended after `since`, and those `also` named."""
    return db.execute(
        """
        SELECT runs.id, jobs.id AS job, substr(command, 1, 200) AS command, attempt,
               max_retries + 1 AS most, runs.worker, max(due_at, created_at) AS due_at,
               runs.started_at, runs.finished_at, outcome, substr(error, 1, 200) AS error
        FROM runs JOIN jobs ON seq = job
        WHERE runs.id IN (
            SELECT runs.id FROM jobs JOIN runs ON job = seq
            WHERE state = 'processing' AND runs.finished_at IS NULL
            UNION
            SELECT value FROM json_each(:also)
            UNION
            SELECT id FROM (
                SELECT id FROM runs
                WHERE id > (SELECT max(id) FROM runs) - 2 * :limit AND finished_at > :since
                ORDER BY id DESC LIMIT :limit))
        ORDER BY runs.id""",
        {"since": since, "limit": limit, "also": json.dumps(also)},
    ).fetchall()


def runs_by_minute(db: Connection, since: float) -> list[tuple[int, int, int]]:
    """Return (minutes since 1970, runs completed in it, failed) of at most RECENT_RUNS runs."""
    query = f"""
        SELECT CAST(finished_at / 60 AS INTEGER), sum(outcome = 'completed'),
               sum(outcome = 'failed')
        FROM runs
        WHERE id > (SELECT max(id) FROM runs) - {RECENT_RUNS} AND finished_at > ?
        GROUP BY 1 ORDER BY 1"""
    return [tuple(row) for row in db.execute(query, (since,))]


def last_before(db: Connection, began_by: float) -> int:
    """Return the number up to which all runs had begun by then, at once, however many there are.
    About: after the clock was set back they are out of order."""
    low, high = 0, db.execute("SELECT max(id) FROM runs").fetchone()[0] or 0
    while low < high:
        middle = (low + high + 1) // 2
        first = "SELECT started_at FROM runs WHERE id >= ? ORDER BY id LIMIT 1"
        found = db.execute(first, (middle,)).fetchone()  # None: pruned meanwhile
        if found and found[0] <= began_by:
            low = middle
        else:
            high = middle - 1
    return low


def oldest_ready_at(db: Connection, now: float) -> float | None:
    """Return since when the longest waiting job could have run, or None if none is ready."""
    due = db.execute("SELECT min(run_at) FROM jobs WHERE due = 1").fetchone()[0]
    waiting = [moment for moment in (due, next_due_at(db)) if moment is not None]
    return min((moment for moment in waiting if moment <= now), default=None)


# --- how a row looks from outside ------------------------------------------------------------


def as_object(row: Row) -> dict[str, Any]:
    """Return a job, a run or a worker with text for its output and ISO 8601 for its times."""
    found = {}
    for key in row.keys():
        if key in ("stdout", "stderr"):
            found[key] = output_text(row[key], row[key + "_bytes"])
        elif key.endswith("_at") or key == "since":
            found[key] = iso(row[key])
        elif key not in ("stdout_bytes", "stderr_bytes", "cancelling", "seq"):
            found[key] = row[key]
    return found


def worker_object(row: Row) -> dict[str, Any]:
    found = as_object(row)
    keys = "worker pid job command since heartbeat_at jobs_done started_at supervisor_pid host"
    return {key: found[key] for key in keys.split()}


def iso(moment: float | None) -> str | None:
    """Return Unix seconds as ISO 8601, UTC, with milliseconds: 2030-01-31T12:00:00.000Z."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def output_text(kept: bytes | None, written: int | None) -> str:
    """Return captured output as text, with a mark in front if its beginning was cut."""
    text = (kept or b"").decode(errors="replace")
    cut = (written or 0) - len(kept or b"")
    return f"[... {cut} bytes cut ...]\n{text}" if cut else text


def duration_text(seconds: float) -> str:
    """Return a span for people: 4 ms, 3.4 s, 2 min 5 s, 3 h 20 min, 2 d 4 h."""
    if seconds < 0.0995:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    if seconds < 60:
        return f"{min(seconds, 59.9):.1f} s"
    for size, unit, part, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // part)} {smaller}"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def sentence(job: Row, now: float) -> str:
    """Say why a job is in its state and what happens next."""
    state, total, ran = job["state"], job["max_retries"] + 1, plural(job["attempts"], "run")
    until = duration_text(job["run_at"] - now) if job["run_at"] > now else ""
    if state == "pending":
        return f"pending, due in {until}" if until else "pending, waits for a worker"
    if state == "processing":
        span = duration_text(now - (job["started_at"] or now))  # none: a hand in the file
        told = f"run {job['attempts']} of {total}, on {job['worker']} for {span}"
        return told + (", being cancelled" if job["cancelling"] else "")
    if state == "failed":
        after = f"next try in {until}" if until else "next try as soon as a worker is free"
        return f"failed {job['attempts']} of {plural(total, 'run')}, {after}"
    if state == "dead":
        import shlex

        name = "-- " * job["id"].startswith("-") + shlex.quote(job["id"])  # it will be pasted
        return f"dead after {ran}; `dlq retry {name}` starts over"
    if state == "completed":
        return f"completed on run {job['attempts']} of {total}"
    return f"cancelled after {ran}" if job["attempts"] else "cancelled while it waited"


# --- explain: what --explain shows -----------------------------------------------------------

# (function, verb, rows changed; None: any): what a reader would not see by himself.
REMARKS = {
    ("claim", "UPDATE", 1): "rowcount 1: it is mine",
    ("claim", "UPDATE", 0): "rowcount 0: another worker was faster; look again",
    ("finish", "UPDATE", 0): "rowcount 0: nobody has asked to cancel it, or another settled it",
    ("gather", "BEGIN", None): "for a temporary table alone: nobody waits for it",
    ("enqueue", "COMMIT", None): "now it is safe, and its id may be printed",
}
LAST_FOUND: dict[str, list] = {}  # by the text of a SELECT
UNSHOWN: list[tuple[str, str, str]] = []  # told, but not yet shown


class Rows(list):
    """The rows of a SELECT, read at once to be counted."""

    fetchall = list.copy

    def fetchone(self) -> Any:
        return self[0] if self else None


class Explained(Connection):
    """What `connect` opens if `show` is set: each statement is told to it."""

    def execute(self, sql: str, values: Any = ()) -> Any:
        return self.told(super().execute, sql, values)

    def executemany(self, sql: str, values: Any) -> Any:
        rows = iter(values)
        first = next(rows, None)  # it stands for all, of which there may be a million
        run, every = super().executemany, () if first is None else chain([first], rows)
        return self.told(lambda sql, _: run(sql, every), sql, first)

    def told(self, run: Callable[[str, Any], Any], sql: str, values: Any) -> Any:
        """Execute one statement, and tell it with what it did and cost."""
        inside, frame = self.in_transaction, sys._getframe(2)
        # A BEGIN has waited since its transaction was asked for, first for our turn.
        began = frame.f_locals.get("asked", 0) if "BEGIN I" in sql else time.perf_counter()
        answer = failure = None
        try:
            answer = run(sql, values)
            answer = Rows(answer.fetchall()) if answer.description else answer
        except sqlite3.Error as error:
            failure = error
        took = (time.perf_counter() - began) * 1000
        # The function that a reader knows: no comprehension, nor what `with transaction` calls.
        while re.match("<|transaction|__", frame.f_code.co_name):
            frame = frame.f_back
        function, text = frame.f_code.co_name, inlined(sql, values)
        verb = text.partition(" ")[0]
        if isinstance(answer, Rows):
            changed, effect = None, plural(len(answer), "row")
            if LAST_FOUND.get(text) == answer:
                return answer  # idle ones look again and again: what they find is shown once
            if len(LAST_FOUND) > 1000:
                LAST_FOUND.clear()
            LAST_FOUND[text] = answer
        elif failure:
            changed, effect = None, "failed"
        else:
            changed = answer.rowcount if answer.rowcount >= 0 else None
            effect = "" if changed is None else f"{plural(changed, 'row')} changed"
        remark = REMARKS.get((function, verb, changed), "")
        if failure:
            remark = f"SQLite says: {failure}"
        elif verb == "BEGIN" and took > 1:
            remark = f"waited {took:.1f} ms for another writer's lock"
        place = f"pid {os.getpid():<7}  {f'{function}:{frame.f_lineno}':<24}"
        within = inside and verb not in ("COMMIT", "ROLLBACK")
        UNSHOWN.append((f"{place} {took:8.2f} ms  {effect:<14}  " + "  " * within, text, remark))
        if not self.in_transaction:  # while the lock is held nobody waits for a reader
            show(UNSHOWN)
            UNSHOWN.clear()
        if failure:
            raise failure
        return answer


def inlined(sql: str, values: Any) -> str:
    """Return SQL on one line, without its comments, each placeholder replaced by its value."""
    text = " ".join(re.sub("--.*", "", sql).split())
    if isinstance(values, dict):
        return re.sub(r":([a-z]\w*)", lambda match: literal(values[match[1]]), text)
    rest = list(values)[::-1] if isinstance(values, tuple) else []
    return re.sub(r"\?", lambda _: literal(rest.pop()), text) if rest else text


def literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{plural(len(value), 'byte')}>"
    if isinstance(value, float):
        return f"{value:.3f}"
    return repr(value if len(str(value)) <= 40 else value[:37] + "...")


# --- doctor ----------------------------------------------------------------------------------

# What holds at every moment between transactions: (the query that finds what breaks it, what would
# have broken it).
INVARIANTS = {
    "every state is one of the six": (
        f"SELECT id FROM jobs WHERE state NOT IN {STATES}",
        "a hand in the file, or a transition with a word of its own: nobody would know the job",
    ),
    "waiting jobs, and no others, are marked for the look": (
        "SELECT id FROM jobs WHERE (state IN ('pending', 'failed')) != (due IS NOT NULL)",
        "a transition that sets `state` and forgets `due`: the job would wait for ever",
    ),
    "a processing job has one open run, of its own worker and attempt": (
        """
        SELECT id FROM jobs WHERE state = 'processing' AND 1 != (
            SELECT count(*) FROM runs WHERE job = seq AND finished_at IS NULL
            AND runs.worker = jobs.worker AND attempt = attempts)""",
        "a `claim` that does not ask whether it changed a row: two workers would run the job",
    ),
    "an open run belongs to a processing job": (
        """
        SELECT runs.id FROM runs LEFT JOIN jobs ON seq = job
        WHERE runs.finished_at IS NULL AND state IS NOT 'processing'""",
        "a `finish` in two transactions, and a kill -9 between them",
    ),
    "a processing job's worker is registered": (
        """
        SELECT id FROM jobs WHERE state = 'processing'
        AND worker NOT IN (SELECT 'w' || id FROM workers)""",
        "a supervisor that forgets a lost worker before its job: nobody would give it back",
    ),
    "no job has begun more runs than it may": (
        "SELECT id FROM jobs WHERE attempts NOT BETWEEN 0 AND 1 + max_retries",
        "a `finish` that sends a failed job back after its last run",
    ),
    "a dead job has used all its runs": (
        "SELECT id FROM jobs WHERE state = 'dead' AND attempts != 1 + max_retries",
        "a `finish` that gives up early, or a `retry_dead` that leaves the job dead",
    ),
    "a settled job knows since when": (
        f"SELECT id FROM jobs WHERE state IN {SETTLED} AND finished_at IS NULL",
        "a transition that forgets `finished_at`: `prune` would keep the job for ever",
    ),
    "every run has its job": (
        "SELECT id FROM runs WHERE job NOT IN (SELECT seq FROM jobs)",
        "a `prune` that removes jobs and not their history, or in two transactions",
    ),
}


def check(db: Connection) -> Iterator[tuple[str, str, str]]:
    """Check the file and the invariants: yield what holds, what breaks it now or "", what would."""

    def found(query: str, where: str = "") -> str:
        rows, error = [], ""
        try:
            for row in db.execute(query):
                rows.append(str(row[0]))
        except sqlite3.Error as problem:  # the file is damaged; what came before it counts, too
            error = f" {problem}"
        return (where + ", ".join(rows) if rows else "") + error

    damage = found("PRAGMA integrity_check(5)").strip().removeprefix("ok")
    if damage:  # it stops at some kinds of damage before it has named the place
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        hurt = [name for (name,) in tables if found(f"PRAGMA quick_check({name})") != "ok"]
        damage = f"in {', '.join(hurt) or 'its unused pages'}: {damage}"
    cause = "a failing disk, or a copy of queue.db without its -wal"
    yield "the file is whole (PRAGMA integrity_check)", damage, cause
    with closing(sqlite3.connect(":memory:")) as new:
        for statement in SCHEMA:
            new.execute(statement)
        known, there = shape(new), shape(db)
    odd = {row for row in there - known if row[0] == "trigger" or row[1] in TABLES}
    changed = {name for _, name, *_ in known - there | odd}
    cause = "a hand in the file: `connect` has refused or brought up every other version"
    yield f"its schema is version {VERSION}, unchanged", ", ".join(sorted(changed)), cause
    odd = "".join(found(odd_values(db, table), f" in {table}: ") for table in TABLES).strip()
    cause = "a hand in the file, or a flipped byte: who reads the value cannot reckon with it"
    yield "every value has its column's type, every time a date", odd, cause
    for name, (query, cause) in INVARIANTS.items():
        yield name, found(query + " LIMIT 3", "found in "), cause


def shape(db: Connection) -> set[tuple[str, ...]]:
    """Return what a database is made of: (table or index, its name, a column of it, its type)."""
    query = """
        SELECT m.type, m.name, c.name, c.type
        FROM sqlite_master AS m LEFT JOIN pragma_table_info(m.name) AS c
        WHERE m.type != 'view'  -- it may name what is not there"""
    return {tuple(row) for row in db.execute(query)}


def odd_values(db: Connection, table: str) -> str:
    """Return the query that finds rows with a value of another type, or a time without a date."""
    columns = [row[1:3] for row in db.execute(f"PRAGMA table_info({table})")]
    odd = [f"typeof({name}) NOT IN ('{kind.lower()}', 'null')" for name, kind in columns]
    times = [name for name, _ in columns if name.endswith("_at")]
    odd += [f"{name} NOT BETWEEN 0 AND 253402300799" for name in times]  # 1970 to 9999
    return f"SELECT rowid FROM {table} WHERE {' OR '.join(odd) or 0} LIMIT 3"


def is_damaged(path: str) -> bool:
    """Say whether `check` finds something; if it cannot look, whether that is damage."""
    try:
        with closing(connect(path)) as db:
            return any(problem for _, problem, _ in check(db))
    except (QueueError, sqlite3.Error) as error:
        return is_damage(error_text(error, path))


if __name__ == "__main__":
    path = os.environ.get("QUEUECTL_DB") or DEFAULT_PATH
    try:
        connect(path).close()
    except (QueueError, sqlite3.Error) as error:
        raise SystemExit(f"Error: {error_text(error, path)}") from None
    print(f"queue ready: {path}")
