"""Faults of the machine and of other people: a full disk, a damaged file, a clock that is set,
jobs that kill whoever runs them, names and links that were meant to do harm.

README ("What it survives") names these tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE_S, ROOT, Queue, eventually

import database
import queuectl
import worker

PAGE = 4096
QUICK = dict(backoff_base=0.05, backoff_jitter=0, kill_grace_s=0.5, poll_interval_ms=100)
UNTIL_GO = "echo $QUEUECTL_JOB_ID >> {0}/ledger; until [ -e {0}/go ]; do sleep 0.02; done"
# The supervisor is the parent of the worker; never the parent that takes in orphans.
SUPERVISOR = "s=$(ps -o ppid= -p $PPID); [ $s -gt 1 ] || exit 9; "


def enqueue(queue: Queue, id: str, command: str, **fields: Any) -> None:
    queue.run("enqueue", json.dumps({"id": id, "command": command, **fields}), check=0)


def reaches(queue: Queue, id: str, state: str) -> None:
    eventually(lambda: queue.state(id) == state, f"{id} is {state}")


def ledger(queue: Queue) -> list[str]:
    path = queue.folder / "ledger"
    return path.read_text().split() if path.exists() else []


def runs(queue: Queue, id: str) -> list[tuple[str, str | None]]:
    return [(run["outcome"], run["error"]) for run in queue.job(id)["runs"]]


def one_line(done: subprocess.CompletedProcess) -> None:
    assert done.stdout == "" and done.stderr.startswith("Error: "), (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr


# --- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def small(queue: Queue) -> Iterator[Queue]:
    """A queue on a disk of its own, of one megabyte."""
    disk = queue.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount(8) here")
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    queue.path = queue.environment["QUEUECTL_DB"] = str(disk / "queue.db")
    try:
        yield queue
        (disk / "fill").unlink(missing_ok=True)
        queue.assert_clean()
    finally:
        for process in queue.supervisors:  # after a failure some may be left
            process.kill()
        for pid in [pid for each in queue.sessions for pid in worker.session_members(each)]:
            worker.send(pid, signal.SIGKILL)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(queue: Queue) -> Path:
    path = Path(queue.path).with_name("fill")
    with contextlib.suppress(OSError), open(path, "wb", 0) as file:
        while file.write(b"x" * PAGE):
            pass
    return path


def test_the_disk_is_full_and_enqueue_acknowledges_only_what_it_kept(small: Queue) -> None:
    kept, refused = [], 0
    while refused < 3:
        done = small.run("enqueue", "--command", ": " + "x" * 100_000)
        if done.returncode == 0:
            kept.append(done.stdout.strip())
        else:
            refused += 1
            one_line(done)
            assert done.returncode == 1 and "the disk is full (or TMPDIR)" in done.stderr
    many = small.run("enqueue", "--file", "-", "--lines", stdin=f": {'x' * 9000}\n" * 100, check=1)
    one_line(many)
    assert len(kept) >= 3
    assert [job["id"] for job in small.json("list")] == kept
    small.run("doctor", check=0)
    before = small.states()
    filled = fill(small)
    for words in (("cancel", kept[0]), ("worker", "stop")):
        done = small.run(*words)
        assert done.returncode == 0 or "the disk is full" in done.stderr, done.stderr
    assert small.states()["total"] == before["total"]
    filled.unlink()


def test_the_log_of_a_small_disk_leaves_the_queue_room_to_grow(small: Queue) -> None:
    """It can be emptied only into the file: a log with all the room would never be."""
    command = "head -c 1000 /dev/zero | tr '\\0' x\n"
    small.run("enqueue", "--file", "-", "--lines", stdin=command * 80, check=0)
    small.drain()
    assert small.states()["completed"] == 80


def full_when_it_ends(queue: Queue, **fields: Any) -> Path:
    """Run a job that fills the disk and ends well; return when its worker keeps the result."""
    queue.configure(**QUICK, output_limit_bytes=200_000)
    filled = Path(queue.path).with_name("fill")
    command = f"echo run >> {queue.folder}/ledger; yes 123456789 | head -c 200000; echo end"
    enqueue(queue, "a", f"{command}; cat /dev/zero > {filled} 2> /dev/null; true", **fields)
    threading.Thread(target=take_all_room, args=(filled,), daemon=True).start()
    log = queue.start().log
    eventually(lambda: "a: result kept: " in log.read_text(), "the result cannot be recorded")
    return filled


def take_all_room(filled: Path) -> None:
    """Take whatever room there is, also what the worker gives up, until the file is removed."""
    eventually(lambda: filled.exists() and filled.stat().st_size > 0)
    while filled.exists():
        with contextlib.suppress(OSError), open(filled, "r+b", 0) as file:
            file.seek(0, os.SEEK_END)
            while file.write(bytes(PAGE)):  # all at once: the worker tries again every half second
                pass
        time.sleep(0.001)


def test_the_disk_is_full_and_a_result_waits_for_room(small: Queue) -> None:
    filled = full_when_it_ends(small)
    enqueuing = small.run("enqueue", "-", stdin=json.dumps({"command": "x" * 900_000}))
    one_line(enqueuing)
    later = time.time()
    time.sleep(1)  # several attempts to record it
    assert small.state("a") == "processing"
    filled.unlink()
    reaches(small, "a", "completed")
    with contextlib.closing(database.connect(small.path)) as db:
        assert db.execute("SELECT finished_at FROM runs").fetchone()[0] < later
    assert runs(small, "a") == [("completed", None)] and ledger(small) == ["run"]
    printed = small.job("a")["stdout"]
    assert printed.startswith("[... 4 bytes cut ...]\n") and printed.endswith("\n123456789\nend\n")


def test_what_does_not_fit_leaves_the_disk_as_it_was(small: Queue) -> None:
    def free() -> int:
        status = os.statvfs(Path(small.path).parent)
        return status.f_bavail * status.f_frsize

    enqueue(small, "a", "true")
    small.start()
    reaches(small, "a", "completed")
    before = free()
    done = small.run("enqueue", "--file", "-", "--lines", stdin=f"true {'x' * 100}\n" * 9000)
    one_line(done)
    assert "the disk is full" in done.stderr and free() >= before - 9 * PAGE


def test_a_result_that_waits_for_room_does_not_time_out(small: Queue) -> None:
    filled = full_when_it_ends(small, timeout=3)
    time.sleep(3.5)  # past its timeout; the command has long ended
    filled.unlink()
    reaches(small, "a", "completed")
    assert runs(small, "a") == [("completed", None)] and ledger(small) == ["run"]


def test_the_disk_is_full_and_a_run_does_not_exceed_its_time(small: Queue) -> None:
    small.configure(**QUICK, lock_timeout_s=2)  # a heartbeat each half second
    filled = Path(small.path).with_name("fill")
    command = f"cat /dev/zero > {filled} 2> /dev/null; exec sleep 600"
    enqueue(small, "a", command, timeout=2, max_retries=0)
    log = small.start().log
    eventually(lambda: "the disk is full" in log.read_text(), "no heartbeat can be written")
    [leader] = small.sessions
    eventually(lambda: not worker.session_members(leader), "it has been ended")
    filled.unlink()
    reaches(small, "a", "dead")
    assert small.job("a")["last_error"] == "timed out after 2.0 s"


def test_the_disk_is_full_and_who_is_asked_to_leave_waits_for_a_run_that_makes_room(
    small: Queue,
) -> None:
    small.configure(**QUICK | dict(lock_timeout_s=2, kill_grace_s=600))
    filled = Path(small.path).with_name("fill")
    clean_up = f"trap 'sleep 1; rm {filled}; exit 0' TERM"
    command = f"{clean_up}; cat /dev/zero > {filled} 2> /dev/null; while :; do sleep 0.05; done"
    enqueue(small, "a", command, timeout=2, max_retries=0)
    process = small.start()
    eventually(lambda: "the disk is full" in process.log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=DEADLINE_S) == 0
    assert small.job("a")["last_error"] == "timed out after 2.0 s" and not filled.exists()


def test_a_job_fills_the_disk_with_its_output_and_is_recorded(small: Queue) -> None:
    small.configure(**QUICK)
    enqueue(small, "a", "head -c 5M /dev/zero", max_retries=0)
    enqueue(small, "b", "true")
    small.start()
    reaches(small, "a", "dead")
    reaches(small, "b", "completed")
    assert small.job("a")["stdout"].startswith("[... ")
    assert small.job("a")["exit_code"] == 1  # its complaint itself found no room


# --- a damaged file --------------------------------------------------------------------------

READING = "doctor;list --limit 0;list --json;status;show one;logs one;dlq list;worker list;wait one"
WRITING = "enqueue --command true;cancel one;dlq retry --all;prune --older-than 0s"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> tuple[Queue, bytes, dict[str, int]]:
    """A queue with some of everything, as bytes, and on which page each table begins."""
    queue = Queue(tmp_path_factory.mktemp("whole"))
    queue.configure(**QUICK, max_retries=0)
    lines = "echo hello; exit $((0x$(echo $QUEUECTL_JOB_ID | cut -c8) % 2))\n" * 40
    queue.run("enqueue", "--file", "-", "--lines", stdin=lines, check=0)
    enqueue(queue, "one", "echo one")
    queue.drain(count=2)
    lines = f": {'x' * 200}\n" * 200
    queue.run("enqueue", "--file", "-", "--lines", stdin=lines, check=0)
    db = database.connect(queue.path)
    roots = dict(db.execute("SELECT name, rootpage FROM sqlite_master").fetchall())
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    return queue, Path(queue.path).read_bytes(), roots


def lay(queue: Queue, content: bytes) -> None:
    for tail in ("-wal", "-shm"):
        Path(queue.path + tail).unlink(missing_ok=True)
    Path(queue.path).write_bytes(content)


def call(queue: Queue, *words: str) -> tuple[int, str, str]:
    """Run a command in this process, for there are hundreds: (exit code, stdout, stderr)."""
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["queuectl.py", "--db", queue.path, "--config", queue.config, *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = queuectl.main()  # what it does not catch would be a traceback: it fails here
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()
    raise AssertionError("main returns never")


def assert_told(queue: Queue, content: bytes, what: str) -> bool:
    """Every command works or says a sentence, and if rows are missing doctor says so, too.

    Return whether doctor has found something.
    """
    found = {}
    for line in (READING + ";" + WRITING).split(";"):
        if line in WRITING.split(";") or not found:
            lay(queue, content)
        code, out, err = found[line] = call(queue, *line.split())
        assert code in (0, 1), (what, line, out, err)
        if code and "BROKEN" not in out:
            assert err.startswith("Error: ") and err.count("\n") == 1, (what, line, out, err)
    code, out, err = found["doctor"]
    assert "`doctor` tells more" not in out, "that is what it was asked for"
    if code:
        assert "BROKEN" in out or "damaged" in err or "no queue" in err or "not a" in err, (
            what,
            err,
        )
        return True
    assert found["list --json"][0] == 0, (what, found["list --json"])
    assert len(json.loads(found["list --json"][1])) == 241, f"{what}: rows are lost in silence"
    return False


def test_the_queue_is_cut_short_and_every_command_says_so(whole: Any) -> None:
    queue, good, _ = whole
    lengths = [2, 15, 16, 50, 99, 100, 101, 512, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]
    for length in [*lengths, len(good) // 2, len(good) - PAGE]:
        assert assert_told(queue, good[:length], f"cut to {length} bytes"), length
    # An empty file is how every queue begins: SQLite cannot know that it once was more.
    lay(queue, b"")
    assert call(queue, *"enqueue --command true --id new".split())[:2] == (0, "new\n")
    assert call(queue, "doctor")[0] == 0


def test_bytes_are_flipped_and_no_row_is_lost_in_silence(whole: Any) -> None:
    queue, good, roots = whole
    seeded, noticed = random.Random(3), {}
    parts = {
        "header": (0, 100),
        "schema": (100, 200),
        "its text": (200, PAGE),
        "anywhere": (PAGE, len(good)),
    }
    parts |= {name: ((page - 1) * PAGE, page * PAGE) for name, page in roots.items()}
    for name, (start, end) in parts.items():
        for count in (5,) if name in roots else (1, 3, 40):
            bad = bytearray(good)
            places = seeded.sample(range(start, end), count)
            if name in roots:  # what says where everything is: the head of the page
                places = range(start + 3, start + 8)
            for place in places:
                bad[place] ^= seeded.randrange(1, 256)
            what = f"{count} bytes in {name}"
            noticed[what] = assert_told(queue, bytes(bad), what)
    assert noticed["40 bytes in header"] and noticed["40 bytes in schema"]
    assert all(noticed[f"5 bytes in {name}"] for name in roots), noticed


def test_the_schema_has_a_byte_that_is_no_text(whole: Any) -> None:
    """SQLite's message quotes it, and Python cannot read that."""
    queue, good, _ = whole
    bad = good.replace(b"tablejobsjobs", b"tablejob\xffjobs")
    assert bad != good and assert_told(queue, bad, "the name of a table")
    assert "is damaged: its schema is no text" in call(queue, "list")[2]


@pytest.mark.parametrize(
    "change",
    (
        "UPDATE jobs SET max_retries = 'x', attempts = x'ff'",
        "UPDATE jobs SET created_at = 1e15 WHERE id = 'one'",
        "UPDATE jobs SET created_at = -1e11 WHERE id = 'one'",
        "UPDATE jobs SET command = x'00ff' WHERE id = 'one'",
        "UPDATE runs SET started_at = 'x', stdout = 'x'",
        "ALTER TABLE runs RENAME COLUMN stderr TO STDERR",
        "DROP INDEX jobs_state",
    ),
)
def test_what_no_code_of_ours_has_written_is_told_as_damage(whole: Any, change: str) -> None:
    """As any flipped byte may: SQLite gives it out as it is, and nobody can reckon with it."""
    queue, good, _ = whole
    lay(queue, good)
    with contextlib.closing(database.connect(queue.path)) as db:
        db.execute(change)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert assert_told(queue, Path(queue.path).read_bytes(), change)


@pytest.mark.parametrize("change", ("max_retries = 'x'", "run_at = 'x', due = 0", "cwd = x'00'"))
def test_workers_leave_a_queue_with_values_that_cannot_be(queue: Queue, change: str) -> None:
    enqueue(queue, "a", "true")
    with contextlib.closing(database.connect(queue.path)) as db:
        db.execute(f"UPDATE jobs SET {change}")
    process = queue.start("--drain", ready=False)
    assert process.wait(timeout=DEADLINE_S / 2) == 1
    said = process.log.read_text()
    assert "is damaged" in said and "Traceback" not in said, said
    Path(queue.path).unlink()  # or the check that ends each test finds it, too


def test_who_settles_what_a_lost_worker_held_ends_at_a_value_that_cannot_be(queue: Queue) -> None:
    enqueue(queue, "a", UNTIL_GO.format(queue.folder))
    supervisor = queue.start()
    eventually(lambda: ledger(queue))
    supervisor.kill()
    pid = queue.workers()[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    with contextlib.closing(database.connect(queue.path)) as db:
        db.execute("UPDATE jobs SET max_retries = 'x'")
    for words in ("worker stop", "cancel a"):
        assert queue.run(*words.split(), check=1).stderr.endswith("restore it from a copy\n")
    assert worker.session_members(pid) == [], "but what it ran is ended"
    Path(queue.path).unlink()


@pytest.mark.parametrize("table", [*"jobs jobs_due jobs_state runs runs_job workers".split(), ""])
def test_doctor_names_the_damage(whole: Any, table: str) -> None:
    """It says which table is hurt, and not "`doctor` tells more"."""
    queue, good, roots = whole
    start = (roots[table] - 1) * PAGE if table else len(good) - PAGE
    lay(queue, good[:start] + bytes(PAGE) + good[start + PAGE :])
    for words in ("doctor", "doctor --json"):
        code, out, err = call(queue, *words.split())
        assert code == 1 and "`doctor` tells more" not in out + err, (out, err)
        hurt = table.partition("_")[0] or r"\w+"  # an index is named by its table
        assert re.search(rf"(BROKEN.*integrity_check\):|problem\": \") ?in .*\b{hurt}\b", out), out


@pytest.mark.parametrize("table", ["jobs_due", "runs", "workers"])
def test_workers_do_not_start_or_stay_on_a_damaged_queue(whole: Any, table: str) -> None:
    queue, good, roots = whole
    start = (roots[table] - 1) * PAGE
    lay(queue, good[:start] + bytes(PAGE) + good[start + PAGE :])
    process = queue.start("--drain", ready=False)
    try:
        assert process.wait(timeout=DEADLINE_S / 2) == 1
    finally:
        process.terminate()
        process.wait(timeout=DEADLINE_S)
    assert "is damaged" in process.log.read_text()
    assert len(process.log.read_text()) < 5000, "and it is not said for ever"


def test_the_queue_is_removed_under_its_workers(queue: Queue) -> None:
    """Or else they wait on a file that nobody can reach, and nobody can reach them."""
    supervisor = queue.start()
    for path in Path(queue.folder).glob("queue.db*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    enqueue(queue, "a", "true")
    eventually(
        lambda: supervisor.poll() is not None or queue.state("a") == "completed",
        "the supervisor leaves, or serves the new queue",
        seconds=6,
    )


# --- many at once, much at once --------------------------------------------------------------


def test_fifty_enqueue_while_eight_workers_run(queue: Queue) -> None:
    queue.configure(**QUICK)
    supervisors = [queue.start(count=4) for _ in range(2)]
    command = [sys.executable, str(ROOT / "queuectl.py"), "enqueue", "--file", "-", "--lines"]
    lines = b"echo $QUEUECTL_JOB_ID >> ledger\n" * 3
    many = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=queue.environment,
            cwd=queue.folder,
        )
        for _ in range(50)
    ]
    said = [each.communicate(lines, timeout=DEADLINE_S * 2)[0].decode() for each in many]
    assert set(said) == {"enqueued 3 jobs\n"}
    eventually(lambda: queue.states()["completed"] == 150, "all have run")
    assert len(ledger(queue)) == len(set(ledger(queue))) == 150
    assert {job["attempts"] for job in queue.json("list")} == {1}
    assert not [each for each in supervisors if re.search("locked|trouble", each.log.read_text())]


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_a_job_prints_two_gigabytes(queue: Queue) -> None:
    total = 2 * 2**30
    enqueue(queue, "a", f"head -c {total} /dev/zero | tr '\\0' x; echo the end")
    supervisor = queue.start()
    row = queue.workers()[0]
    output, steady, peak = Path(queue.path + ".run", f"{row['worker']}.out"), [], 0
    while queue.state("a") in ("pending", "processing"):
        with contextlib.suppress(FileNotFoundError):
            peak = peak_bytes(row["pid"])  # it leaves after this run
            status = output.stat()
            # The supervisor has cut by then; before, up to a tick of output is there.
            if status.st_size > total // 2:
                steady.append(status.st_blocks * 512)
        time.sleep(0.01)
    assert steady and max(steady) < 512 * 2**20, max(steady, default=0)
    peaks = peak_bytes(supervisor.pid), peak
    assert max(peaks) < 60 * 2**20, peaks
    limit = 8192
    kept = "x" * (limit - 8) + "the end\n"
    assert queue.job("a")["stdout"] == f"[... {total + 8 - limit} bytes cut ...]\n{kept}"
    assert len(queue.job("a")["runs"]) == 1


# --- time ------------------------------------------------------------------------------------


def test_the_clock_is_set_forward_and_back_while_jobs_run(queue: Queue) -> None:
    """Nobody is lost, nothing times out, nothing runs twice. Real processes, another time()."""
    queue.configure(**QUICK, lock_timeout_s=2)
    offset = queue.folder / "offset"
    site = queue.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import time\nreal = time.time\n"
        f"time.time = lambda: real() + float(open({str(offset)!r}).read())\n"
    )

    def clock(days: float) -> None:
        offset.with_name("new").write_text(str(days * 86_400))
        offset.with_name("new").rename(offset)

    clock(0)
    queue.environment["PYTHONPATH"] = str(site)
    for n in range(2):
        enqueue(queue, f"running{n}", UNTIL_GO.format(queue.folder), timeout=60)
    supervisors = [queue.start(), queue.start()]
    eventually(lambda: len(ledger(queue)) == 2, "both run")
    for days in (1, -1):
        clock(days)
        time.sleep(2.3)  # what is waited for is that nobody is taken for lost
    clock(1)
    enqueue(queue, "tomorrow", "echo $QUEUECTL_JOB_ID >> ledger")
    assert queue.job("tomorrow")["created_at"] > database.iso(time.time() + 80_000)
    clock(-1)
    for words in ("list", "status", "worker list", "show running0", "doctor"):
        queue.run(*words.split(), check=0)
    (queue.folder / "go").touch()
    for id in ("running0", "running1", "tomorrow"):
        reaches(queue, id, "completed")
        assert runs(queue, id) == [("completed", None)]
    assert sorted(ledger(queue)) == ["running0", "running1", "tomorrow"]
    assert [each.poll() for each in supervisors] == [None, None]


def test_a_supervisor_alone_is_stopped_while_another_lives(queue: Queue) -> None:
    """Its workers go on, but nobody keeps their time: they are fenced, their jobs run again."""
    queue.configure(**QUICK, lock_timeout_s=2)
    run = """trap '' TERM
    until echo $QUEUECTL_ATTEMPT >> ledger; [ $QUEUECTL_ATTEMPT != 1 ] && [ -e go ]
    do sleep 0.02; done"""
    enqueue(queue, "a", run)
    old = queue.start()
    eventually(lambda: ledger(queue), "it runs")
    os.kill(old.pid, signal.SIGSTOP)
    try:
        queue.start()
        eventually(lambda: ledger(queue).count("2") > 10, "it was fenced and runs again")
    finally:
        os.kill(old.pid, signal.SIGCONT)
    (queue.folder / "go").touch()
    reaches(queue, "a", "completed")
    assert ledger(queue) == sorted(ledger(queue)), "two runs of one job overlapped"
    (outcome, error), second = runs(queue, "a")
    assert (outcome, second) == ("failed", ("completed", None))
    start, _, span = error.partition("silent for ")
    assert start == "worker lost: " and float(span.split()[0]) >= 2, error


def test_the_machine_restarts_and_strangers_have_the_pids(queue: Queue) -> None:
    """All died at once; the rows name another boot and pids that belong to somebody else now."""
    queue.configure(**QUICK, lock_timeout_s=3600)
    enqueue(queue, "a", f"[ $QUEUECTL_ATTEMPT = 2 ] && exit; {UNTIL_GO.format(queue.folder)}")
    supervisor = queue.start()
    eventually(lambda: ledger(queue), "it runs")
    session = queue.workers()[0]["pid"]
    supervisor.kill()
    supervisor.wait()
    for pid in worker.session_members(session):
        worker.send(pid, signal.SIGKILL)
    shutil.rmtree(queue.path + ".run")
    strangers = [subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(2)]
    try:
        births = [worker.process_birth(each.pid) for each in strangers]
        db = database.connect(queue.path)
        update = "UPDATE {} SET pid = ?, birth = ?"
        db.execute(
            update.format("supervisors") + ", boot = 'before'", (strangers[0].pid, births[0])
        )
        db.execute(update.format("workers"), (strangers[1].pid, births[1]))
        db.close()
        queue.drain()  # and does not wait for lock_timeout_s, or it would time out
        assert [each.poll() for each in strangers] == [None, None]
    finally:
        for each in strangers:
            each.kill()
            each.wait()
    assert runs(queue, "a") == [("failed", "worker lost"), ("completed", None)]


# --- poison ----------------------------------------------------------------------------------

POISON = {
    "its session": "set -m; sleep 60 & kill -9 $(ps -o pid= --sid $PPID)",
    "its session, one by one": "for p in $(ps -o pid= --sid $PPID); do kill -9 $p; done; sleep 60",
    "its worker and lives on": "trap '' TERM; kill -9 $PPID; while :; do sleep 0.1; done",
}


@pytest.mark.parametrize("command", POISON.values(), ids=POISON)
def test_a_job_kills_all_around_it_each_time(queue: Queue, command: str) -> None:
    queue.configure(**QUICK)
    enqueue(queue, "poison", f"sleep 60 & echo >> ledger2; {command}", max_retries=2, priority=1)
    for n in range(4):
        enqueue(queue, f"job{n}", "true")
    queue.start("--drain", count=2).wait(timeout=DEADLINE_S)
    assert (queue.states()["completed"], queue.state("poison")) == (4, "dead")
    assert runs(queue, "poison") == [("failed", "worker lost: killed by SIGKILL")] * 3
    assert (queue.folder / "ledger2").read_text() == "\n" * 3


@pytest.mark.parametrize("also", ["$PPID", "0", "$(ps -o pid= --sid $PPID)"])
def test_a_job_kills_its_supervisor_each_time(queue: Queue, also: str) -> None:
    queue.configure(**QUICK)
    command = f"{SUPERVISOR} echo >> ledger2; kill -9 $s; kill -9 {also}; sleep 60"
    enqueue(queue, "poison", command, max_retries=2, priority=1)
    for n in range(4):
        enqueue(queue, f"job{n}", "true")
    for _ in range(3):  # each takes one run of it down with it, and others run beside it
        assert queue.start("--drain", ready=False).wait(timeout=DEADLINE_S) == -signal.SIGKILL
    assert queue.start("--drain", ready=False).wait(timeout=DEADLINE_S) == 0
    assert (queue.states()["completed"], queue.state("poison")) == (4, "dead")
    assert runs(queue, "poison") == [("failed", "worker lost")] * 3
    assert (queue.folder / "ledger2").read_text() == "\n" * 3


def test_a_job_stops_its_own_worker_each_time(queue: Queue) -> None:
    """A worker that is not heard of for lock_timeout_s is lost, under a living supervisor too."""
    queue.configure(**QUICK, lock_timeout_s=2)
    enqueue(queue, "poison", "kill -STOP $PPID; echo >> ledger; sleep 60", max_retries=1)
    enqueue(queue, "after", "true")
    queue.start()
    reaches(queue, "poison", "dead")
    reaches(queue, "after", "completed")
    assert [outcome for outcome, _ in runs(queue, "poison")] == ["failed"] * 2
    assert all(error.startswith("worker lost: silent") for _, error in runs(queue, "poison"))
    queue.run("worker", "stop", "--timeout", "10s", check=0)


# --- no one let in ---------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_all_that_is_made_is_private_whatever_the_umask(queue: Queue, umask: int) -> None:
    os.remove(queue.config)

    def run(*words: str) -> None:
        command = [sys.executable, str(ROOT / "queuectl.py"), *words]
        subprocess.run(command, env=queue.environment, umask=umask, check=True, capture_output=True)

    run("config", "set", "max-retries", "0")
    run("init")
    run("enqueue", "--command", "sleep 60", "--id", "a")
    run("worker", "start", "--detach")
    eventually(lambda: queue.state("a") == "processing")
    made = [path for path in queue.folder.rglob("*") if not path.name.startswith("log")]
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in made}
    run("worker", "stop", "--now")
    names = "bell config.json queue.db queue.db-shm queue.db-wal queue.db.run w1.err w1.out"
    assert sorted(modes) == [*names.split(), "workers.log"]
    for name, mode in modes.items():
        allowed = 0o700 if name == "queue.db.run" else 0o600
        assert mode == allowed & ~umask or mode == allowed, (name, oct(mode))


CONTROLS = "\x1b]0;t\x07\x1b[2J\x9b31m\x90q\x9c\u202e\u2066\u061c\u200f\r\x08\x00"[:-1]
TRICKS = [
    "'; DROP TABLE jobs; --",
    '" OR 1=1; --',
    "$(touch pwned)",
    "`touch pwned`; touch pwned | touch pwned & touch pwned > pwned",
    "' || touch pwned '",
    ":id ?1 %s %n {0} \\",
    "--all",
    "../../pwned",
    "%",
    "_",
]


def assert_nothing_obeyed(queue: Queue, text: str) -> None:
    assert not re.findall("[^\n\x20-\x7e\xa0-\u0500\u2000-\u200d\ufffd]", text), ascii(text)
    assert not list(queue.folder.rglob("pwned")) + list(queue.folder.parent.glob("pwned"))


def test_names_that_are_also_code_are_only_names(queue: Queue) -> None:
    queue.configure(**QUICK)
    jobs = []
    for n, trick in enumerate(TRICKS):
        where = queue.folder / f"$(touch pwned)'; touch pwned #{n}"
        where.mkdir()
        command = 'printf %s "$QUEUECTL_JOB_ID"; pwd >&2; exit 1'
        jobs.append(dict(id=trick, command=command, max_retries=0, cwd=str(where)))
        jobs.append(dict(id=f"off {trick}", command="true", run_at="2999-01-01"))
        jobs.append(dict(id=f"good {trick}", command=f"true # {trick}"))
    queue.run("enqueue", "--file", "-", stdin=json.dumps(jobs), check=0)
    started = queue.start("--drain", count=2, ready=False)
    queue.run("cancel", "--", *[f"off {trick}" for trick in TRICKS], check=0)
    assert started.wait(timeout=DEADLINE_S) == 0
    assert [job["id"] for job in queue.json("dlq", "list")] == TRICKS
    count = len(TRICKS)
    states = {"dead": count, "cancelled": count, "completed": count, "total": 3 * count}
    assert {state: n for state, n in queue.states().items() if n} == states
    for n, trick in enumerate(TRICKS):
        seen = [call(queue, words, "--", trick) for words in ("show", "logs", "wait", "cancel")]
        assert [code for code, *_ in seen] == [0, 0, 1, 1]
        assert trick in seen[0][1] and f"--- stdout ---\n{trick}" in seen[1][1]
        assert f"touch pwned #{n}\n" in seen[1][1], "it ran where it was told to"
        assert call(queue, "dlq", "retry", "--", trick)[1] == "1 job pending again\n"
        assert call(queue, "show", "--", trick[:-1] + "\u2603")[0] == 1
    assert queue.states()["pending"] == count
    assert_nothing_obeyed(queue, "")


def test_what_a_job_says_steers_no_terminal(queue: Queue) -> None:
    """In the lines of the workers, in the background too, and in every answer about the job."""
    queue.configure(**QUICK)
    script = queue.folder / "say"
    script.write_text(f"printf '%s' '{CONTROLS}'; printf '%s' '{CONTROLS}' >&2\n")
    held = f"echo '{CONTROLS}'\n. ./say; echo >> ledger2; sleep 60"
    enqueue(queue, "held", held)
    enqueue(queue, "dead", f". ./say # {CONTROLS}\nexit 1", max_retries=0)
    started = queue.run("worker", "start", "--detach", "--count", "2", check=0)
    reaches(queue, "dead", "dead")
    eventually((queue.folder / "ledger2").exists)
    calls = "worker list;list;list --state dead;dlq list;show held;show dead;logs held;logs dead"
    said = [call(queue, *line.split()) for line in f"{calls};status;wait dead".split(";")]
    for line in ("cancel held", "cancel held", "show held", "logs held", "dlq retry held"):
        said.append(call(queue, *line.split()))
    stopped = queue.run("worker", "stop", check=0)
    log = Path(queue.path + ".run", "workers.log").read_text()
    text = started.stdout + stopped.stderr + log + "".join(out + err for _, out, err in said)
    assert_nothing_obeyed(queue, text)
    assert text.count("\\x1b]0;t\\x07\\x1b[2J\\x9b31m\\x90q\\x9c\\u202e") >= 12
    # A line break in a command makes no line of its own, which could look like another job.
    assert (
        len(
            [line for line in log.splitlines() if not re.match(r"[\d-]{10} \d\d:\d\d:\d\d  ", line)]
        )
        == 0
    )
    assert said[1][1].count("\n") == 3


@pytest.mark.parametrize("name", ["bell", "workers.log", "w1.out", "w1.err"])
def test_a_symlink_was_planted_in_the_run_directory(queue: Queue, name: str) -> None:
    victim, run = queue.folder / "victim", Path(queue.path + ".run")
    victim.write_text("precious")
    victim.chmod(0o644)
    run.mkdir(0o700)
    (run / name).symlink_to(victim)
    enqueue(queue, "a", "echo out; echo err >&2")
    started = queue.run("worker", "start", "--detach")
    if name == "workers.log":
        one_line(started)
        assert started.returncode == 1 and started.stderr.startswith(f"Error: {run / name}")
        queue.drain()
    reaches(queue, "a", "completed")
    assert (queue.job("a")["stdout"], queue.job("a")["stderr"]) == ("out\n", "err\n")
    queue.run("worker", "stop", check=0)
    assert victim.read_text() == "precious" and stat.S_IMODE(victim.stat().st_mode) == 0o644
    assert (run / name).is_symlink() == (name in ("bell", "workers.log"))


def test_a_job_puts_a_fifo_in_place_of_its_output_and_holds_up_nobody(queue: Queue) -> None:
    queue.configure(max_retries=0, kill_grace_s=0.2)
    outputs = f"{queue.path}.run/*.out"
    enqueue(queue, "a", f"for f in {outputs}; do rm $f; mkfifo $f; done; sleep 60", timeout=0.5)
    enqueue(queue, "b", "sleep 60", timeout=1)
    queue.start("--count", "2")
    reaches(queue, "a", "dead")
    reaches(queue, "b", "dead")


def test_a_dangling_symlink_makes_no_file_elsewhere(queue: Queue) -> None:
    elsewhere, run = queue.folder / "elsewhere", Path(queue.path + ".run")
    run.mkdir(0o700)
    for name in ("bell", "workers.log", "w1.out"):
        (run / name).symlink_to(elsewhere)
    enqueue(queue, "a", "true")
    queue.run("worker", "start", "--detach", check=1)
    queue.drain()
    assert not elsewhere.exists() and queue.state("a") == "completed"


@pytest.mark.parametrize("plant", [Path.touch, lambda bell: os.link(bell.parents[1] / "f", bell)])
def test_a_file_was_planted_as_bell(queue: Queue, plant: Callable[[Path], Any]) -> None:
    """It is not written to, and does not keep the workers awake."""
    bell, file = Path(queue.path + ".run", "bell"), queue.folder / "f"
    file.write_text("precious")
    bell.parent.mkdir(0o700)
    plant(bell)
    before = bell.read_bytes()
    enqueue(queue, "a", "true")
    queue.start()
    reaches(queue, "a", "completed")
    enqueue(queue, "b", "true")
    reaches(queue, "b", "completed")
    pid, used = queue.workers()[0]["pid"], []
    for _ in range(2):
        used.append(sum(map(int, worker.process_status(pid)[11:13])) / os.sysconf("SC_CLK_TCK"))
        time.sleep(0.7)  # of sleep, if all is well
    assert bell.read_bytes() == before, "it was written to"
    assert used[1] - used[0] < 0.3, "a worker spins"
