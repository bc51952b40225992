"""Guards that no other test misses when they are taken away: see mutants.tsv."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT, Queue, eventually
from test_worker import claimed, enqueue, settler

import config
import database
import worker

WRITE = "UPDATE supervisors SET stop = 1"
PATCHED = """import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
import database, queuectl, worker
{patch}
sys.exit(queuectl.main())
"""

# A worker stops once, with the lock in its hands.
STOP_IN_FINISH = """
real = database.finish
def finish(*arguments):
    found = real(*arguments)
    if not os.path.exists("stopped"):
        open("stopped", "x").close()
        {0}
        os.kill(os.getpid(), signal.SIGSTOP)
    return found
database.finish = finish"""

SLOW_FORKS = """
import time
from multiprocessing.process import BaseProcess
real = BaseProcess.start
def start(self):
    time.sleep(0.6)
    real(self)
BaseProcess.start = start
sys.argv += ["--count", "6"]"""


def start_patched(queue: Queue, patch: str, *options: str) -> None:
    """`worker start` with a change worked in; the queue's last check ends it."""
    program = queue.folder / "patched.py"
    program.write_text(PATCHED.format(root=str(ROOT), patch=patch))
    with open(queue.folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(program), "worker", "start", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=queue.environment,
            cwd=queue.folder,
            start_new_session=True,
        )
    process.log = queue.folder / "log"
    queue.supervisors.append(process)


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def is_running(pid: int) -> bool:
    """Ask the kernel, not the product: the product's own look may be what is broken."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode == 0
    return state not in "ZX"


# --- the memory ------------------------------------------------------------------------------


def test_a_transaction_has_the_lock_from_its_first_moment(tmp_path: Path) -> None:
    """Else it reads, another writes, and its own write fails at once, however long it may wait."""
    path = str(tmp_path / "queue.db")
    with closing(database.connect(path)) as one, closing(database.connect(path)) as other:
        other.execute("PRAGMA busy_timeout = 0")
        with database.transaction(one):
            one.execute("SELECT count(*) FROM jobs").fetchone()
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute(WRITE)
            one.execute(WRITE)


def test_who_finds_the_queue_locked_waits_for_it(tmp_path: Path) -> None:
    path = str(tmp_path / "queue.db")
    script = """import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE"); print(flush=True); time.sleep(0.3); db.execute("COMMIT")"""
    with closing(database.connect(path)) as db:
        holder = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
        holder.stdout.readline()
        db.execute(WRITE)  # raises if it does not wait
        assert holder.wait() == 0
        holder.stdout.close()


# --- the supervisor --------------------------------------------------------------------------


def test_who_forks_for_long_is_heard_meanwhile(queue: Queue) -> None:
    """Workers that are forked one after another take longer than their supervisor may be silent."""
    queue.configure(poll_interval_ms=100, lock_timeout_s=2)
    run = f"echo $QUEUECTL_JOB_ID >> ledger; until [ -e {queue.folder}/go ]; do sleep 0.02; done"
    enqueue(queue, "a", run)
    queue.start()
    ledger = queue.folder / "ledger"
    eventually(ledger.exists, "the watcher has its job")
    enqueue(queue, "b", run)
    start_patched(queue, SLOW_FORKS)
    eventually(lambda: len(queue.workers()) == 7, "all are there", 60)
    (queue.folder / "go").touch()
    eventually(lambda: queue.states()["completed"] == 2, "both have ended")
    assert ledger.read_text() == "a\nb\n", "one was taken for lost, and ran again"


def test_who_has_forked_is_connected_again_before_it_sleeps(queue: Queue) -> None:
    """Else a file of the queue that is removed meanwhile would not be missed."""
    start_patched(queue, "worker.IDLE_TICK_S = worker.BUSY_TICK_S = 60")
    eventually(queue.workers, "it has forked")
    handles = Path(f"/proc/{queue.supervisors[0].pid}/fd")
    names = lambda: [os.path.realpath(each) for each in handles.iterdir()]  # noqa: E731
    eventually(lambda: f"{queue.path}-shm" in names(), "it is connected", 15)


def test_a_session_is_emptied_of_every_process_group_in_it(queue: Queue) -> None:
    """A shell with `set -m`, or timeout(1), makes groups of its own: the session holds them all.

    And this one is deaf to SIGTERM, but the time for asking is over.
    """
    enqueue(queue, "a", "true")
    command = ["bash", "-c", "trap '' TERM; set -m; sleep 300 & echo $!; wait"]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child = int(leader.stdout.readline())
    leader.stdout.close()
    try:
        assert (os.getpgid(child), os.getsid(child)) == (child, leader.pid)
        db, run = claimed(queue, leader.pid, worker.process_birth(leader.pid))
        looks = settler(queue)[0]
        row = database.workers(db)[0]
        looks.endings[run.worker] = worker.Ending(row, "failed", "timed out", kill_at=0)
        eventually(lambda: looks.tick(db, time.time(), 1) or queue.state("a") == "failed", "", 5)
        db.close()
        leader.wait()
        assert not is_running(child), "the job may run again, and a process of its run lives"
    finally:
        leader.kill()
        leader.wait()
        if is_running(child):
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("told", [(-1, 0, 0), (None, None, None)])
def test_a_process_that_slips_by_one_look_is_seen_by_the_next(
    monkeypatch: pytest.MonkeyPatch, told: tuple[int | None, ...]
) -> None:
    """The one that was listed has forked and gone, and what it has forked was not yet listed.

    `told`: the newest pids, from the child's on; None: the system does not tell them.
    """
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        real, seen = os.listdir, [[]]
        newest = [0 if each is None else child.pid + each for each in told]
        with monkeypatch.context() as patched:
            patched.setattr(os, "listdir", lambda path: seen.pop() if seen else real(path))
            patched.setattr(worker, "newest_pid", lambda: newest.pop(0))
            assert worker.session_members(child.pid) == [child.pid]
    finally:
        child.kill()
        child.wait()
    ask = "import os, worker; print(os.getpid() in worker.session_members(os.getsid(0)))"
    words = ["sh", "-c", f"\"$0\" -c '{ask}'; :", sys.executable]  # one that is not the leader
    asked = subprocess.run(words, cwd=ROOT, start_new_session=True, capture_output=True, text=True)
    assert asked.stdout == "True\n", asked.stderr


def test_who_cannot_be_looked_at_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENFILE, "no more open files")

    monkeypatch.setattr(worker, "open", full, raising=False)
    for look in (worker.process_birth, worker.session_members):
        with pytest.raises(OSError, match="no more open files"):
            look(os.getsid(0))


def test_who_was_silent_and_has_just_beaten_is_not_lost(queue: Queue) -> None:
    enqueue(queue, "a", "true")
    other = subprocess.Popen(["sleep", "300"], start_new_session=True)
    db, _ = claimed(queue, other.pid, worker.process_birth(other.pid))
    [row], looks = database.workers(db), settler(queue)[0]
    db.close()
    looks.silences = {row["supervisor"]: (row["heartbeat_at"] - 8, 1e9)}
    found = [looks.judge(row, False, 0)]
    looks.silences = {row["supervisor"]: (row["heartbeat_at"], 1e9)}
    found.append(looks.judge(row, False, 0)[0])
    other.kill()
    other.wait()
    assert found == [None, "failed"]


def test_two_supervisors_hear_each_other_and_neither_takes_the_others_jobs(queue: Queue) -> None:
    enqueue(queue, "a", "true")
    bystander = subprocess.Popen(["sleep", "300"], start_new_session=True)  # worker and owner
    try:
        db, _ = claimed(queue, bystander.pid, worker.process_birth(bystander.pid))
        (owner, _), (other, told) = settler(queue), settler(queue)
        owner.id, owner.pid = database.supervisors(db)[0]["id"], bystander.pid
        for second in range(100):
            owner.tick(db, 1e9 + second, second)
            other.tick(db, 1e9 + second, second)
        db.close()
        assert (told, queue.state("a")) == ([], "processing")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_silent_supervisor_is_lost_and_a_machine_that_slept_makes_nobody_silent(
    queue: Queue,
) -> None:
    enqueue(queue, "a", "true")
    bystander = subprocess.Popen(["sleep", "300"], start_new_session=True)
    try:
        db, _ = claimed(queue, bystander.pid, worker.process_birth(bystander.pid))
        looks = settler(queue)[0]
        for mono in (1, 1e6, 1e6 + 0.1):
            looks.tick(db, time.time(), mono)
        assert (looks.endings, bystander.poll()) == ({}, None)
        for second in range(1, 40):
            looks.tick(db, time.time(), 1e6 + second)
        assert bystander.wait(timeout=5) == -signal.SIGKILL
        eventually(lambda: looks.tick(db, time.time(), 2e6) or queue.state("a") == "failed")
        db.close()
    finally:
        bystander.kill()
        bystander.wait()


def test_a_signal_comes_between_the_fork_and_the_workers_own_handlers(queue: Queue) -> None:
    patch = """
real = worker.work
def told_at_once(supervisor):
    if not os.path.exists("told"):
        open("told", "x").close()
        os.kill(os.getpid(), signal.SIGTERM)
    real(supervisor)
worker.work = told_at_once"""
    start_patched(queue, patch)
    left = lambda: [row["worker"] for row in queue.workers()] == ["w2"]  # noqa: E731
    eventually(left, "the first worker has heard it and left", 15)


# --- the worker ------------------------------------------------------------------------------


def test_a_job_comes_between_a_workers_look_and_its_sleep(queue: Queue) -> None:
    """It rings while the worker sees an empty queue: the ring must not be lost."""
    queue.configure(poll_interval_ms=60_000)
    patch = f"""
real = database.claim
def claim(*arguments):
    found = real(*arguments)
    if not os.path.exists("rung"):
        open("rung", "x").close()
        words = [{str(ROOT / "queuectl.py")!r}, "enqueue", "--id", "a", "--command", "true"]
        subprocess.run([sys.executable, *words], check=True)
    return found
database.claim = claim"""
    start_patched(queue, patch)
    eventually(lambda: queue.states()["completed"], "it has run, and not waited for a poll", 20)


def test_a_job_comes_between_a_workers_look_and_its_sleep_and_no_ring_is_heard(
    queue: Queue,
) -> None:
    """Then the worker sleeps until the queue changes: since that look, not since a later one."""
    queue.configure(poll_interval_ms=50)
    patch = """
import config, time
real = database.claim
def claim(db, *arguments):
    found = real(db, *arguments)
    if not os.path.exists("come"):
        open("come", "x").close()
        other = database.connect(os.environ["QUEUECTL_DB"])
        job = config.check_job({"command": "true"}, config.load(""), "/")
        database.gather(other, [(0, job)])
        database.enqueue(other, time.time())
        other.close()
    return found
database.claim = claim"""
    start_patched(queue, patch)
    eventually(lambda: (queue.folder / "come").exists(), "it has come", 20)
    # The next heartbeat, five seconds after the first, would be a change, too.
    eventually(lambda: queue.states()["completed"], "it has run", 4)


def test_a_worker_is_stopped_with_the_lock_in_its_hands_and_the_others_go_on(queue: Queue) -> None:
    queue.configure(lock_timeout_s=2, backoff_base=0)
    enqueue(queue, "a", "true")
    start_patched(queue, STOP_IN_FINISH.format("pass"))
    eventually(lambda: queue.states()["completed"], "it has run again", 30)
    assert queue.json("show", "a")["runs"][0]["error"].startswith("worker lost")


def test_a_worker_and_its_supervisor_are_stopped_with_the_lock_and_others_go_on(
    queue: Queue,
) -> None:
    queue.configure(lock_timeout_s=2, backoff_base=0)
    queue.start()
    start_patched(queue, STOP_IN_FINISH.format("os.kill(os.getppid(), signal.SIGSTOP)"))

    def stopped() -> bool:
        queue.run("enqueue", "--command", "true")
        return (queue.folder / "stopped").exists()

    try:
        eventually(stopped, "one of the jobs is the patched worker's")
        eventually(lambda: queue.states()["completed"] == queue.states()["total"], "all done", 40)
    finally:
        queue.supervisors[1].send_signal(signal.SIGCONT)


def test_two_short_pauses_of_a_worker_and_its_supervisor_are_not_one_long(queue: Queue) -> None:
    """While its supervisor runs the worker is that one's matter: its pauses are not added up."""
    pair = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    found = [worker.process_birth(each.pid) for each in pair]
    row = dict(pid=pair[0].pid, birth=found[0], boot=worker.boot_id(), lock_timeout_s=6)
    row |= dict(supervisor=7, supervisor_pid=pair[1].pid, supervisor_birth=found[1], heartbeat_at=0)
    looks = settler(queue)[0]

    def signalled(number: int) -> None:
        for each in pair:
            each.send_signal(number)
        stopped = number == signal.SIGSTOP
        eventually(lambda: all(worker.is_stopped(each.pid) == stopped for each in pair))

    try:
        signalled(signal.SIGSTOP)
        assert looks.judge(row, False, 0.0) is None
        signalled(signal.SIGCONT)
        assert looks.judge(row, False, 1.0) is None
        signalled(signal.SIGSTOP)
        assert looks.judge(row, False, 10.0) is None, "it was stopped twice, not for ten seconds"
        assert looks.judge(row, False, 17.0)[1] == "worker lost: silent for 7.0 s"
        pair[1].send_signal(signal.SIGCONT)
        eventually(lambda: not worker.is_stopped(pair[1].pid))
        assert looks.judge(row, False, 17.0) is None, "its supervisor is awake, and may end it"
    finally:
        for each in pair:
            each.kill()
            each.wait()


def test_a_worker_is_stopped_before_it_is_registered_and_another_takes_its_place(
    queue: Queue,
) -> None:
    queue.configure(lock_timeout_s=2)
    enqueue(queue, "a", "true")
    patch = """
real = worker.take_turns
def take_turns(path):
    real(path)
    if not os.path.exists("stopped"):
        open("stopped", "x").close()
        with database.turn():
            os.kill(os.getpid(), signal.SIGSTOP)
worker.take_turns = take_turns"""
    start_patched(queue, patch)
    eventually(lambda: queue.states()["completed"], "it has run", 30)


def test_stop_is_heard_by_a_supervisor_that_was_stopped_with_the_lock(queue: Queue) -> None:
    patch = """
def beat(*_):
    database.beat = real
    with database.transaction(_[0]):
        os.kill(os.getpid(), signal.SIGSTOP)
real, database.beat = database.beat, beat"""
    start_patched(queue, patch)
    [process] = queue.supervisors
    eventually(lambda: worker.is_stopped(process.pid))
    assert queue.run("worker", "stop", "--timeout", "10s", check=0).stderr == ""
    assert process.wait(20) == 0


def test_no_more_processes_can_be_had_for_a_while_and_no_file_stays_open(queue: Queue) -> None:
    patch = """
real = os.fork
def fork():
    with open("open", "a") as file:
        print(len(os.listdir("/dev/fd")), file=file)
        if file.tell() < 8:
            raise OSError(11, "not now")
    return real()
os.fork = fork"""
    enqueue(queue, "a", "true")
    start_patched(queue, patch)
    eventually(lambda: queue.states()["completed"], "it has run")
    assert len(set((queue.folder / "open").read_text().split())) == 1


def test_no_more_processes_can_be_had_and_signals_and_a_removed_file_are_noticed(
    queue: Queue,
) -> None:
    patch = """
me, real_fork, real_sleep = os.getpid(), os.fork, time.sleep
def fork():
    os.fork = no_more
    return real_fork()
def no_more():
    raise OSError(11, "not now")
def sleep(span):
    if os.fork is no_more and os.getpid() == me:
        with open("held_back", "a") as file:
            print(signal.pthread_sigmask(signal.SIG_BLOCK, []), file=file)
        if os.path.exists("b"):
            os.rename("b", "removed")
            os.unlink("queue.db-shm")
    real_sleep(span)
os.fork, time.sleep = fork, sleep"""
    enqueue(queue, "a", "touch b; exec sleep 300", max_retries=0)
    start_patched(queue, patch, "--count", "2")
    [process] = queue.supervisors
    assert process.wait(20) == 1
    assert "queue.db-shm was removed: leaving" in process.log.read_text()
    assert set((queue.folder / "held_back").read_text().split("\n")) == {"set()", ""}


def test_a_jobs_alarm_does_not_end_its_workers_wait(queue: Queue) -> None:
    """The worker uses this signal itself, and is of the same process group."""
    enqueue(queue, "a", "trap '' ALRM; kill -ALRM 0; echo fine")
    queue.drain()
    assert (queue.state("a"), queue.job("a")["stdout"]) == ("completed", "fine\n")


def test_an_alarm_that_comes_as_the_wait_begins_leaves_no_timer_behind(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = signal.setitimer

    def setitimer(which: int, *spans: float) -> None:
        real(which, *spans)
        if spans[0]:
            os.kill(os.getpid(), signal.SIGALRM)

    queue.run("init", check=0)
    worker.make_run_directory(queue.path)
    monkeypatch.setattr(database, "turn", database.turn)
    before = signal.getsignal(signal.SIGALRM)
    worker.take_turns(queue.path)
    monkeypatch.setattr(signal, "setitimer", setitimer)
    with database.turn():
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    real(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_somebody_keeps_the_turn_to_write_and_nobody_waits_for_long(queue: Queue) -> None:
    """As a `prune` does that was stopped (Ctrl+Z) between two transactions."""
    enqueue(queue, "a", "true")
    os.mkdir(queue.path + ".run", 0o700)
    folder = os.open(queue.path + ".run", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        queue.start(count=2)
        eventually(lambda: queue.states()["completed"], "it has run")
        queue.run("prune", "--older-than", "0s", check=0)
        assert queue.states()["total"] == 0
    finally:
        os.close(folder)


def test_a_worker_takes_the_place_of_another_while_others_are_ended_and_nobody_sleeps(
    queue: Queue,
) -> None:
    patch = """
me, real = os.getpid(), time.sleep
def sleep(span):
    if os.getpid() == me:
        open("slept", "w").close()
    real(span)
time.sleep = sleep"""
    for n in range(20):
        enqueue(queue, f"a{n}", "exec sleep 300", timeout=0.2 + n / 20, max_retries=0)
    start_patched(queue, patch, "--count", "4", "--drain")
    assert queue.supervisors[0].wait(60) == 0
    assert queue.states()["dead"] == 20
    assert not (queue.folder / "slept").exists()


def test_a_job_that_is_to_run_again_is_told_to_those_who_sleep(queue: Queue) -> None:
    """Its supervisor is killed with its worker; another settles the job, whose worker is idle."""
    queue.configure(poll_interval_ms=60_000, backoff_base=0.5, backoff_jitter=0, kill_grace_s=0)
    lost = queue.start()
    enqueue(queue, "a", "echo $QUEUECTL_ATTEMPT > by; exec sleep 60")
    begun = queue.folder / "by"
    eventually(begun.exists, "it has begun")
    queue.start()
    [pid] = [row["pid"] for row in queue.workers() if row["job"]]
    lost.kill()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: begun.read_text() == "2\n", "it has begun again", 20)
    queue.run("cancel", "a", check=0)


def test_a_retry_is_told_to_those_who_sleep_for_its_worker_may_be_busy(queue: Queue) -> None:
    queue.configure(poll_interval_ms=60_000, backoff_base=0.7, backoff_jitter=0, kill_grace_s=0)
    supervisor = queue.start(count=2)
    for n in range(12):  # who gets the second job is left to chance
        enqueue(queue, f"retry{n}", "test $QUEUECTL_ATTEMPT = 2")
        eventually(lambda n=n: f"retry{n}: exit code 1" in supervisor.log.read_text(), "it failed")
        enqueue(queue, f"busy{n}", "exec sleep 60")
        eventually(lambda n=n: queue.state(f"retry{n}") == "completed", "the other has run it", 20)
        queue.run("cancel", f"busy{n}", check=0)


def test_a_runs_output_is_there_until_its_result_is(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the worker dies with the result in its hands, the supervisor still finds the output."""
    enqueue(queue, "a", "echo hello")
    db, run = claimed(queue, dead_pid())
    finish, output, seen = database.finish, Path(queue.path + ".run", run.worker + ".out"), []

    def look_and_finish(*arguments: object) -> tuple[str, float] | None:
        seen.append(output.read_bytes())
        return finish(*arguments)

    monkeypatch.setattr(database, "finish", look_and_finish)
    settings, say = config.load(queue.config), lambda *_: None
    desk = worker.Desk(db, queue.path, run.worker, settings, say)
    worker.hand_in(desk, run, worker.run_one(desk, run), lambda: False)
    db.close()
    assert seen == [b"hello\n"]
    assert output.read_bytes() == b"", "cleared for the next run"


# --- files -----------------------------------------------------------------------------------


def test_a_planted_link_is_neither_read_nor_written_through(queue: Queue) -> None:
    secret, run = queue.folder / "secret", Path(queue.path + ".run")
    secret.write_text("secret")
    run.mkdir(0o700)
    for name in ("w1.out", "w1.err", "workers.log"):
        (run / name).symlink_to(secret)
    for output in worker.output_paths(queue.path, "w1"):
        assert worker.file_tail(output, 100) == (b"", 0)
    with pytest.raises(OSError):
        database.safe_open(str(run / "workers.log"), os.O_RDWR | os.O_APPEND | os.O_CREAT)
    assert secret.read_text() == "secret"
    for name in ("w1.out", "w1.err", "workers.log"):
        (run / name).unlink()


def test_a_run_directory_that_cannot_be_made_is_named(queue: Queue) -> None:
    path = str(queue.folder / ("q" * 252))  # ".run" makes it too long
    with pytest.raises(OSError, match="too long") as caught:
        worker.make_run_directory(path)
    assert caught.value.filename == path + ".run", "then the face names it"


@pytest.mark.parametrize("name, mode", [("queue.db", 0o602), ("queue.db.run", 0o770)])
def test_a_queue_that_others_can_write_is_not_worked_on(queue: Queue, name: str, mode: int) -> None:
    database.connect(queue.path).close()
    worker.make_run_directory(queue.path)
    os.chmod(queue.folder / name, mode)
    with pytest.raises(database.QueueError, match="others can write"):
        worker.make_run_directory(queue.path)
    os.chmod(queue.folder / name, 0o700)
