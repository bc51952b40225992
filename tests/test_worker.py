"""Incidents in the life of processes: real workers, real signals, and nothing left afterwards.

Most of these tests could be written with a clock; they are written with a ledger instead. A job
appends to a file, the kernel keeps the order of appends, and so two runs of a job overlapped just
if the numbers of its runs are out of order there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import DEADLINE_S, ROOT, Queue, eventually, put_in

import config
import database
import worker

HOST = os.uname().nodename
# Run 1 never ends by itself nor when asked to; later ones end once there is a file "go".
STUBBORN = """trap '' TERM
until echo $QUEUECTL_ATTEMPT >> ledger; [ $QUEUECTL_ATTEMPT != 1 ] && [ -e go ]
do sleep 0.02; done"""
UNTIL_GO = "echo $QUEUECTL_JOB_ID >> ledger; until [ -e go ]; do sleep 0.02; done; echo done"
# What a run may have become by the time it is to be ended, and the exit code that tells how it was.
TREES = {
    "with children": ("sleep 60 & sleep 60", -signal.SIGTERM),
    "in groups": ("bash -c 'set -m; sleep 60 & timeout 60 sleep 60; wait'", -signal.SIGTERM),
    "stopped": ("sleep 60 & kill -STOP $$; sleep 60", -signal.SIGTERM),
    "deaf": ("trap '' TERM; sleep 60 & sleep 60; sleep 60", -signal.SIGKILL),
}


def enqueue(queue: Queue, id: str, command: str, **fields: float) -> None:
    queue.run("enqueue", json.dumps({"id": id, "command": command, **fields}), check=0)


def ledger(queue: Queue) -> list[str]:
    try:
        return (queue.folder / "ledger").read_text().split()
    except FileNotFoundError:
        return []


def go(queue: Queue) -> None:
    (queue.folder / "go").touch()


def begun(queue: Queue, entries: int = 1) -> None:
    eventually(lambda: len(ledger(queue)) >= entries, "the jobs have begun")


def reaches(queue: Queue, id: str, state: str) -> None:
    eventually(lambda: queue.state(id) == state, f"{id} is {state}")


def ask_to_end(queue: Queue, id: str) -> None:
    """Cancel a running job, and do not wait for its end."""
    with closing(database.connect(queue.path)) as db:
        database.cancel(db, database.find(db, id), time.time())


def runs(queue: Queue, id: str) -> list[tuple[str, str | None]]:
    return [(run["outcome"], run["error"]) for run in queue.job(id)["runs"]]


def sees_out_the_second_run(queue: Queue, id: str) -> None:
    """A STUBBORN job runs again, and no process of its first run writes from then on."""
    eventually(lambda: ledger(queue).count("2") >= 10, "the second run goes on")
    go(queue)
    reaches(queue, id, "completed")
    assert ledger(queue) == sorted(ledger(queue)), "two runs of one job overlapped"


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen]:
    """A process that is nobody's worker, leader of a session as a worker would be."""
    process = subprocess.Popen(["sleep", "300"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def claimed(
    queue: Queue, pid: int, birth: str = "gone", host: str = HOST, boot: str = "", owner: int = 0
) -> tuple[sqlite3.Connection, database.Run]:
    """Claim the next job for a worker that is nothing but a row, as is its supervisor.

    The supervisor has the worker's pid, unless `owner` is a process that is to be it.
    """
    worker.make_run_directory(queue.path)
    db = database.connect(queue.path)
    whose = (owner, worker.process_birth(owner)) if owner else (pid, birth)
    boot = boot or worker.boot_id()
    supervisor = database.register_supervisor(db, host, boot, *whose, time.time(), 30)
    name = database.register_worker(db, supervisor, pid, birth, time.time())
    run, _ = database.claim(db, name, time.time(), time.monotonic)
    return db, run


def settler(queue: Queue) -> tuple[worker.Supervisor, list[str]]:
    """Return a supervisor to step by hand, and what it says."""
    told: list[str] = []
    settings = config.load(queue.config)
    return worker.Supervisor(queue.path, settings, lambda *words: told.append(words[2])), told


# --- one run ---------------------------------------------------------------------------------


def test_jobs_end_in_many_ways_and_each_is_recorded(queue: Queue) -> None:
    commands = {
        "well": ("echo out; echo err >&2", "completed", 0, None),
        "badly": ("echo why >&2; exit 3", "dead", 3, "exit code 3: why"),
        "killed": ("kill -9 $$", "dead", -9, "killed by SIGKILL"),
        "asked to end": ("kill -TERM $$", "dead", -15, "killed by SIGTERM"),
        "unknown": ("no-such-program 2> /dev/null", "dead", 127, "exit code 127"),
    }
    for id, (command, *_) in commands.items():
        enqueue(queue, id, command, max_retries=0)
    nowhere = {"id": "nowhere", "command": "true", "max_retries": 0, "cwd": str(queue.folder / "x")}
    os.mkdir(nowhere["cwd"])
    queue.run("enqueue", json.dumps(nowhere), check=0)
    os.rmdir(nowhere["cwd"])
    queue.drain()
    for id, (_, *expected) in commands.items():
        job = queue.job(id)
        assert [job["state"], job["exit_code"], job["last_error"]] == expected
    assert (queue.job("well")["stdout"], queue.job("well")["stderr"]) == ("out\n", "err\n")
    assert queue.job("nowhere")["exit_code"] is None
    assert queue.job("nowhere")["last_error"].startswith("cannot be started: No such file")
    assert {run["worker"] for run in queue.json("list")} == {"w1"}, "no end of a job ends a worker"


def test_a_job_fails_waits_longer_each_time_and_dies(queue: Queue) -> None:
    enqueue(queue, "dies", "exit 1", max_retries=2, backoff_base=0.6)
    enqueue(queue, "recovers", "exit $((2 - QUEUECTL_ATTEMPT))", backoff_base=0.3)
    queue.drain(count=2)
    assert (queue.state("dies"), queue.state("recovers")) == ("dead", "completed")
    assert [outcome for outcome, _ in runs(queue, "recovers")] == ["failed", "completed"]
    db = database.connect(queue.path)
    first, second, third = database.runs(db, database.find(db, "dies"))
    db.close()
    for wait, before, after in ((0.6, first, second), (0.6**2, second, third)):
        assert after["due_at"] == pytest.approx(before["finished_at"] + wait, abs=1e-3)
        assert after["started_at"] >= after["due_at"]


def test_a_job_finds_the_surroundings_it_was_promised(queue: Queue) -> None:
    enqueue(queue, "names", "echo $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT; pwd; wc -c", max_retries=0)
    # A signal that a shell finds ignored or blocked never reaches its trap.
    signals = 'for s in INT TERM PIPE; do trap "echo $s" $s; kill -$s $$; done'
    enqueue(queue, "signals", signals)
    enqueue(queue, "odd bytes", r"printf '\377\000\033'; printf '\376' >&2; exit 1", max_retries=0)
    queue.drain()
    assert queue.job("names")["stdout"].split() == ["names", "1", str(queue.folder), "0"]
    assert queue.job("signals")["stdout"].split() == ["INT", "TERM", "PIPE"]
    assert queue.job("odd bytes")["stdout"] == "\ufffd\0\x1b"
    assert queue.job("odd bytes")["last_error"] == "exit code 1: \ufffd"


def test_a_terminal_is_there_and_jobs_have_none_of_it(queue: Queue) -> None:
    """Ctrl+C typed there reaches the supervisor alone; the job finishes."""
    enqueue(queue, "a", f"if (: < /dev/tty) 2> /dev/null; then echo tty; fi; {UNTIL_GO}")
    command = [sys.executable, str(ROOT / "queuectl.py"), "worker", "start", "--count", "2"]
    terminal = subprocess.Popen(
        [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=queue.environment,
        cwd=queue.folder,
        start_new_session=True,
    )
    begun(queue)
    eventually(lambda: len(queue.workers()) == 2)
    terminal.stdin.write(b"\x03")
    terminal.stdin.flush()
    eventually(lambda: len(queue.workers()) == 1, "the idle worker has left")
    go(queue)
    terminal.wait(timeout=DEADLINE_S)
    terminal.stdin.close()
    assert (queue.job("a")["state"], queue.job("a")["stdout"]) == ("completed", "done\n")


def test_one_run_needs_no_pool_and_its_result_waits_for_room(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue(queue, "a", "echo hello")
    gone = subprocess.Popen(["true"])
    gone.wait()
    db, run = claimed(queue, gone.pid)
    finish, troubles, told = database.finish, [sqlite3.OperationalError("disk is full")], []

    def finish_later(*arguments: object) -> tuple[str, float] | None:
        if troubles:
            raise troubles.pop()
        return finish(*arguments)

    monkeypatch.setattr(database, "finish", finish_later)
    say = lambda *words: told.append(words[2])  # noqa: E731
    desk = worker.Desk(db, queue.path, run.worker, config.load(queue.config), say)
    assert worker.hand_in(desk, run, worker.run_one(desk, run), lambda: True) is None
    db.close()
    assert told == ["started", "trouble", "completed"]
    assert queue.job("a")["stdout"] == "hello\n"


# --- output ----------------------------------------------------------------------------------


def test_a_job_prints_more_than_is_kept(queue: Queue) -> None:
    queue.configure(output_limit_bytes=100)
    enqueue(queue, "a", "seq 1000; seq 2000 >&2")
    enqueue(queue, "b", "printf %0100d 0")
    queue.drain()
    for stream, last in (("stdout", 1000), ("stderr", 2000)):
        printed = "".join(f"{n}\n" for n in range(1, last + 1))
        mark = f"[... {len(printed) - 100} bytes cut ...]\n"
        assert queue.job("a")[stream] == mark + printed[-100:]
    assert queue.job("b")["stdout"] == "0" * 100, "exactly the limit: nothing was cut"


def test_a_job_floods_its_output_and_the_disk_is_not_filled(queue: Queue) -> None:
    flood = "for n in 1 2 3 4; do head -c 50000000 /dev/zero; echo $n >> ledger; "
    enqueue(queue, "a", flood + "until [ -e go$n ]; do sleep 0.02; done; done; echo the end")
    enqueue(queue, "b", "echo mine")
    supervisor = queue.start()
    output, bound = Path(queue.path + ".run", "w1.out"), worker.OUTPUT_BOUND + 8192
    for n in range(1, 5):
        begun(queue, n)
        assert output.stat().st_size == n * 50_000_000
        eventually(lambda: output.stat().st_blocks * 512 <= bound, "the file is cut")
        (queue.folder / f"go{n}").touch()
    reaches(queue, "b", "completed")
    assert queue.job("a")["stdout"].startswith(f"[... {200_000_008 - 8192} bytes cut ...]\n\0")
    assert queue.job("a")["stdout"].endswith("\0the end\n")
    assert queue.job("b")["stdout"] == "mine\n"
    assert queue.job("b")["worker"] == "w2", "whose files the supervisor cannot be cutting"
    assert supervisor.poll() is None


@pytest.mark.parametrize("first", ["", "for n in $(seq 150); do /bin/true; done;", "sleep 1.1;"])
def test_a_job_leaves_children_behind_and_they_are_ended(queue: Queue, first: str) -> None:
    """Also if it was long, or has started many: see `has_left`."""
    deaf = "trap '' TERM; (while :; do echo late; sleep 0.01; done) & echo early"
    enqueue(queue, "a", f"{first} {deaf}")
    enqueue(queue, "b", "sleep 0.3; echo mine")
    queue.start()
    reaches(queue, "a", "completed")
    reaches(queue, "b", "completed")
    assert "early\n" in queue.job("a")["stdout"]
    assert queue.job("b")["stdout"] == "mine\n"


def test_a_job_leaves_a_chain_of_processes_each_of_which_forks_and_ends(queue: Queue) -> None:
    """Wherever one looks it is over already, and the next one has a later pid: so it is caught."""
    queue.configure(kill_grace_s=0.2)
    (queue.folder / "chain.py").write_text("""
import os
chain = os.open("chain", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
for _ in range(20_000):  # by itself it ends too late
    if os.fork():
        os._exit(0)
    os.write(chain, b".")""")
    enqueue(queue, "a", f"trap '' TERM; {sys.executable} chain.py; sleep 0.2")
    queue.drain()
    assert queue.state("a") == "completed"
    length = (queue.folder / "chain").stat().st_size
    for _ in range(20):
        subprocess.run(["true"])
    assert 0 < length < 20_000 and length == (queue.folder / "chain").stat().st_size


def test_what_a_job_leaves_is_not_adopted_by_its_worker(queue: Queue) -> None:
    """Which is not there to bury it: a job that awaits the end of what it has ended (`kill -0`)
    would wait for ever."""
    parents = "ps -o ppid= -p $(cat pid); echo $PPID; kill $(cat pid)"
    enqueue(queue, "a", f"(sleep 60 & echo $! > pid); {parents}")
    queue.drain()
    parent, ours = queue.job("a")["stdout"].split()
    assert parent != ours


def test_in_a_container_without_an_init_the_supervisor_buries_the_orphans() -> None:
    """But none whose end somebody asks for: its workers, the tries of stop lines."""
    program = """
import ctypes, os, subprocess, sys
from types import SimpleNamespace as Some
import worker
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: as to pid 1, orphans come to us
looks = worker.Supervisor("", dict(lock_timeout_s=9), print)
child, tried = [subprocess.Popen(["false"]) for _ in range(2)]
looks.children = {child.pid: Some(sentinel=child.pid)}
looks.endings["w1"] = Some(worker=dict(pid=child.pid), far=Some(child=tried))
orphan = int(subprocess.getoutput("sleep 60 >&- 2>&- & echo $!"))
looks.bury_orphans()
os.kill(orphan, 9)
os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
looks.wake, looks.pid = worker.await_signals()[0], 1
looks.bury_orphans = lambda: print("buries")
looks.sleep()
del looks.bury_orphans
looks.pid = os.getpid()
looks.bury_orphans()
print(os.path.exists(f"/proc/{orphan}"), child.wait(), tried.wait())"""
    words = [sys.executable, "-c", program]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout.split() == ["buries", "False", "1", "1"], said.stderr


def test_a_look_through_the_newest_pids_finds_what_is_left() -> None:
    """And where the system does not tell them, or tells the same always, all are looked at."""
    program = """
import os, time, worker
os.setsid()
now = time.monotonic()
def left(): return [worker.has_left(newest, began) for newest, began in cases]
cases = [(worker.newest_pid(), now), (worker.newest_pid(), now - 9), (0, now), (10**9, now)]
os.spawnlp(os.P_WAIT, "sh", "sh", "-c", "sleep 60 & echo $!")
cases.append((worker.newest_pid(), now - 9))  # as if the pids had gone round since
os.spawnlp(os.P_WAIT, "true", "true")
print(left())
worker.push(worker.session_members(os.getpid()), set(), hard=True)
while worker.session_members(os.getpid()): pass
print(left())
real, now = worker.newest_pid, time.monotonic()
before, first = real(), os.spawnlp(os.P_NOWAIT, "true", "true")
os.waitpid(first, 0)
os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")
told = [first, first, real()]  # the sleep began behind the first look
worker.newest_pid = lambda: told.pop(0) if told else real()
print(worker.has_left(before, now))
worker.newest_pid = lambda: 7
print(worker.has_left(7, now))
worker.push(worker.session_members(os.getpid()), set(), hard=True)"""
    words = [sys.executable, "-c", program]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert said.splitlines()[1:] == [str([True] * 5), str([False] * 5), "True", "True"]


def test_a_program_leaves_its_session_on_purpose(queue: Queue) -> None:
    leaves = (
        "import os, time; os.setsid(); open('pid', 'w').write(f'{os.getpid()} '); time.sleep(60)"
    )
    enqueue(queue, "a", f'{sys.executable} -c "{leaves}" & until [ -s pid ]; do sleep 0.01; done')
    queue.drain()
    pid = int((queue.folder / "pid").read_text())
    assert worker.process_birth(pid), "it was ended with the job"
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: worker.process_birth(pid) is None)


# --- told to leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_supervisor_is_told_to_leave_and_finishes_the_running_job(
    queue: Queue, number: signal.Signals
) -> None:
    queue.configure(poll_interval_ms=60_000)  # no poll: the signal itself ends an idle sleep
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    enqueue(queue, "running", UNTIL_GO)
    supervisor = queue.start(count=2)
    signal.signal(signal.SIGHUP, before)
    begun(queue)
    supervisor.send_signal(number)
    eventually(lambda: len(queue.workers()) == 1, "the idle worker has left")
    supervisor.send_signal(signal.SIGHUP)  # of its terminal: no second Ctrl+C, not even after HUP
    enqueue(queue, "waiting", "true")
    go(queue)
    assert supervisor.wait(timeout=DEADLINE_S) == 0
    assert queue.job("running")["stdout"] == "done\n"
    assert (queue.state("running"), queue.state("waiting")) == ("completed", "pending")


def test_a_terminal_is_closed_over_nohup(queue: Queue) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    supervisor = queue.start()
    signal.signal(signal.SIGHUP, before)
    supervisor.send_signal(signal.SIGHUP)
    enqueue(queue, "a", "kill -HUP $$; echo still here")
    reaches(queue, "a", "completed")
    assert supervisor.poll() is None


def test_ctrl_c_twice_puts_the_job_back_and_the_run_is_not_counted(queue: Queue) -> None:
    command = (
        "[ -e go ] && exit; echo $QUEUECTL_ATTEMPT >> ledger; [ $QUEUECTL_ATTEMPT = 2 ] || exit 1"
    )
    enqueue(queue, "a", command + "; sleep 60 & sleep 60", max_retries=1)
    supervisor = queue.start(count=2)
    begun(queue, 2)
    supervisor.send_signal(signal.SIGINT)
    eventually(lambda: len(queue.workers()) == 1, "the idle worker has left")
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(timeout=DEADLINE_S) == 0
    assert supervisor.log.read_text().count("leaving    when the running jobs have ended") == 1
    assert [worker.session_members(session) for session in queue.sessions] == [[], []]
    assert [outcome for outcome, _ in runs(queue, "a")] == ["failed", "stopped"]
    assert (queue.state("a"), queue.job("a")["attempts"]) == ("failed", 1)
    go(queue)
    queue.drain()
    assert (queue.state("a"), queue.job("a")["attempts"]) == ("completed", 2)


def test_ctrl_c_three_times_spares_the_grace(queue: Queue) -> None:
    queue.configure(kill_grace_s=3600)
    enqueue(
        queue, "a", "trap 'echo asked >> ledger' TERM; echo . >> ledger; while :; do sleep 1; done"
    )
    supervisor = queue.start(count=2)
    begun(queue)
    supervisor.send_signal(signal.SIGINT)
    eventually(lambda: len(queue.workers()) == 1, "the idle worker has left")
    supervisor.send_signal(signal.SIGINT)
    begun(queue, 2)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(timeout=DEADLINE_S) == 0
    assert (queue.state("a"), queue.job("a")["attempts"]) == ("pending", 0)
    assert queue.job("a")["exit_code"] == -signal.SIGKILL


def test_workers_are_stopped_from_another_terminal(queue: Queue) -> None:
    enqueue(queue, "a", UNTIL_GO)
    supervisor = queue.start(count=2)
    begun(queue)
    pids = {supervisor.pid} | {row["pid"] for row in queue.workers() if row["job"]}
    late = queue.run("worker", "stop", "--timeout", "1s", check=1)
    waits, told = late.stderr.splitlines()
    assert waits.endswith("for 1 running job; --now puts them back")
    assert told.startswith("Error: still there after 1.0 s: pid ")
    assert all(str(pid) in told for pid in pids), told
    assert told.endswith("; --now does not wait for jobs")
    eventually(lambda: len(queue.workers()) == 1, "the idle worker has left")
    go(queue)
    assert queue.run("worker", "stop", check=0).stdout in (
        "0 workers stopped\n",
        "1 worker stopped\n",
    )
    assert supervisor.wait(timeout=DEADLINE_S) == 0
    assert queue.job("a")["stdout"] == "done\n"


def test_wait_calls_for_no_workers_while_those_there_are_end_a_run(queue: Queue) -> None:
    """The worker goes first, and is replaced when all that it ran is gone."""
    queue.configure(kill_grace_s=3600)
    enqueue(queue, "a", "trap '' TERM; echo . >> ledger; while :; do sleep 1; done")
    enqueue(queue, "later", "true", run_at=time.time() + 1e6)
    supervisor = queue.start(count=1)
    begun(queue)
    ask_to_end(queue, "a")
    eventually(lambda: queue.json("worker", "list") == [], "the worker is being ended")
    waited = queue.run("wait", "a", "a", "--timeout", "0s", check=1)
    assert waited.stderr == "Error: after 0 ms 1 of 1 job not settled\n"
    eventually(lambda: supervisor.send_signal(signal.SIGINT) or supervisor.poll() == 0)
    assert "no worker is running" in queue.run("wait", "--timeout", "0s", check=1).stderr


def test_show_says_that_nobody_ends_a_run_whose_workers_are_all_gone(queue: Queue) -> None:
    enqueue(queue, "a", UNTIL_GO)
    supervisor = queue.start()
    begun(queue)
    assert queue.run("show", "a", check=0).stderr == ""
    supervisor.kill()
    os.kill(queue.workers()[0]["pid"], signal.SIGKILL)
    eventually(lambda: "no worker is running" in queue.run("show", "a", check=0).stderr)
    go(queue)


def test_who_has_been_asked_to_leave_serves_no_more_but_a_worker_alone_does(tmp_path: Path) -> None:
    me = os.getpid()
    birth = worker.process_birth(me)
    with closing(database.connect(str(tmp_path / "queue.db"))) as db:
        assert not worker.is_served(db)
        row = HOST, worker.boot_id(), me, birth, time.time(), 30
        supervisor = database.register_supervisor(db, *row)
        assert worker.is_served(db)
        database.ask_to_stop(db, 1)
        assert not worker.is_served(db)
        database.register_worker(db, supervisor, me, birth, time.time())
        assert worker.is_served(db), "it finishes what it holds"


def test_worker_stop_waits_no_longer_than_it_may_for_somebodys_lock(queue: Queue) -> None:
    settings = config.load(queue.config)
    with closing(database.connect(queue.path)):
        other = sqlite3.connect(queue.path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(DEADLINE_S / 2, other.rollback)
        release.start()
        try:
            with pytest.raises(database.SQLiteError, match="locked"):
                worker.stop(queue.path, settings, print, False, 0.1)
        finally:
            release.cancel()
            release.join()
            other.close()


def test_stop_is_heard_by_a_supervisor_that_was_stopped(queue: Queue) -> None:
    """By Ctrl+Z, which its workers do not see."""
    process = queue.start()
    os.kill(process.pid, signal.SIGSTOP)
    assert queue.run("worker", "stop", check=0).stdout == "1 worker stopped\n"


def test_stop_on_a_copy_does_not_wake_the_originals_supervisor(queue: Queue) -> None:
    queue.configure(lock_timeout_s=2)
    process = queue.start()
    copy = str(queue.folder / "copy.db")
    with closing(sqlite3.connect(queue.path)) as db:
        db.execute("VACUUM INTO ?", (copy,))
    os.kill(process.pid, signal.SIGSTOP)
    eventually(lambda: worker.is_stopped(process.pid))
    queue.run("--db", copy, "worker", "stop", check=0)
    assert worker.is_stopped(process.pid)
    os.kill(process.pid, signal.SIGCONT)


def test_all_workers_of_all_supervisors_are_stopped_at_once(queue: Queue) -> None:
    enqueue(queue, "a", UNTIL_GO)
    supervisors = [queue.start(), queue.start(count=2)]
    begun(queue)
    assert queue.run("worker", "stop", "--now", check=0).stdout.endswith("3 workers stopped\n")
    assert [each.wait(timeout=DEADLINE_S) for each in supervisors] == [0, 0]
    assert not any("leaving" in each.log.read_text() for each in supervisors), "it did not wait"
    assert (queue.state("a"), queue.job("a")["attempts"]) == ("pending", 0)
    # One put back by the first supervisor may be taken up by the second before it hears of it.
    assert set(runs(queue, "a")) == {("stopped", "stopped with its worker; not counted")}
    assert queue.run("worker", "stop", check=0).stdout == "0 workers stopped\n"


def test_a_worker_that_is_stopped_hears_that_it_is_to_leave(queue: Queue) -> None:
    queue.configure(lock_timeout_s=3600)
    supervisor = queue.start()
    [row] = queue.workers()
    os.kill(row["pid"], signal.SIGSTOP)
    stopped = queue.run("worker", "stop", check=0)
    assert (stopped.stdout, stopped.stderr) == ("1 worker stopped\n", ""), "no job, no remark"
    assert supervisor.wait(timeout=DEADLINE_S) == 0


def test_a_queue_is_drained_to_the_last_retry(queue: Queue) -> None:
    enqueue(queue, "later", "true", run_at=time.time() + 0.7)
    enqueue(queue, "again", "exit $((QUEUECTL_ATTEMPT < 3))")
    assert "supervisor" in queue.drain(count=2)
    assert queue.states()["completed"] == queue.states()["total"] == 2
    assert "left" in queue.drain(), "nothing to do: it leaves at once"


def test_workers_go_to_the_background(queue: Queue) -> None:
    told = queue.run("worker", "start", "--detach", "--count", "2", check=0).stdout
    rows = queue.workers()
    log = queue.path + ".run/workers.log"
    pid = rows[0]["supervisor_pid"]
    assert told == f"2 workers in the background, supervisor pid {pid}, log {log}\n"
    assert len(rows) == 2 and os.getsid(pid) == pid
    enqueue(queue, "a", "true")
    reaches(queue, "a", "completed")
    assert queue.run("worker", "stop", check=0).stdout == "2 workers stopped\n"
    assert "completed  a" in Path(log).read_text()
    eventually(lambda: worker.process_birth(pid) is None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_starts_workers_in_the_background_is_ended_meanwhile_and_leaves_none(
    queue: Queue, number: signal.Signals
) -> None:
    words = [sys.executable, str(ROOT / "queuectl.py"), "worker", "start", "--detach"]
    log, pid = Path(queue.path + ".run", "workers.log"), queue.folder / "pid"
    # The first of the workers does it: who looks from here may see them only when all are up.
    enqueue(queue, "a", f"until [ -s {pid} ]; do :; done; kill -{number.value} $(cat {pid})")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    with subprocess.Popen([*words, "--count", "60"], env=queue.environment) as process:
        signal.signal(signal.SIGHUP, before)
        pid.write_text(str(process.pid))
    assert process.returncode == 130
    eventually(lambda: "left" in log.read_text(), "the supervisor has left")


# --- killed ----------------------------------------------------------------------------------


def test_a_worker_alone_is_asked_to_leave_and_is_replaced(queue: Queue) -> None:
    enqueue(queue, "a", UNTIL_GO)
    queue.start()
    begun(queue)
    os.kill(queue.workers()[0]["pid"], signal.SIGTERM)
    go(queue)
    eventually(lambda: [row["worker"] for row in queue.workers()] == ["w2"])
    assert runs(queue, "a") == [("completed", None)]


def test_a_worker_is_killed_in_mid_job(queue: Queue) -> None:
    enqueue(queue, "a", STUBBORN)
    queue.start()
    begun(queue)
    os.kill(queue.workers()[0]["pid"], signal.SIGKILL)
    sees_out_the_second_run(queue, "a")
    assert [row["worker"] for row in queue.workers()] == ["w2"]
    assert runs(queue, "a") == [
        ("failed", "worker lost: killed by SIGKILL"),
        ("completed", None),
    ]


@pytest.mark.parametrize("command", ["kill -9 $PPID; sleep 60", "kill -9 0"])
def test_a_job_kills_its_worker_each_time(queue: Queue, command: str) -> None:
    enqueue(queue, "murder", command, max_retries=2, priority=1)
    for n in range(5):
        enqueue(queue, f"job{n}", "true")
    queue.start("--drain", count=2).wait(timeout=DEADLINE_S)
    assert (queue.states()["completed"], queue.state("murder")) == (5, "dead")
    assert runs(queue, "murder") == [("failed", "worker lost: killed by SIGKILL")] * 3


def test_a_supervisor_is_killed_and_its_workers_finish_their_jobs(queue: Queue) -> None:
    queue.configure(poll_interval_ms=60_000)
    enqueue(queue, "a", UNTIL_GO)
    supervisor = queue.start(count=2)
    begun(queue)
    supervisor.kill()
    supervisor.wait()
    eventually(lambda: len(queue.workers()) == 1, "the idle worker has left")
    enqueue(queue, "waiting", "true")
    go(queue)
    reaches(queue, "a", "completed")
    eventually(lambda: queue.workers() == [], "the other one has left")
    assert queue.state("waiting") == "pending"


@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_supervisor_is_killed_and_another_terminal_ends_its_job(queue: Queue, how: str) -> None:
    enqueue(queue, "a", STUBBORN)
    supervisor = queue.start()
    begun(queue)
    supervisor.kill()
    supervisor.wait()
    queue.run(*{"stop": ("worker", "stop", "--now"), "cancel": ("cancel", "a")}[how], check=0)
    assert queue.state("a") == {"stop": "pending", "cancel": "cancelled"}[how]
    assert [worker.session_members(session) for session in queue.sessions] == [[]]


@pytest.mark.parametrize("rescuer", ["afterwards", "meanwhile"])
def test_supervisor_and_workers_are_killed_and_the_run_lives_on(queue: Queue, rescuer: str) -> None:
    """It is fenced, by a supervisor that starts then or by one that was there, and runs again."""
    enqueue(queue, "a", STUBBORN)
    supervisor = queue.start()
    begun(queue)
    if rescuer == "meanwhile":
        queue.start()
    supervisor.kill()
    for row in queue.workers():
        if row["supervisor_pid"] == supervisor.pid:
            os.kill(row["pid"], signal.SIGKILL)
    supervisor.wait()
    so_far = len(ledger(queue))
    begun(queue, so_far + 3)  # the run lives on
    if rescuer == "afterwards":
        queue.start(ready=False)
    sees_out_the_second_run(queue, "a")
    assert runs(queue, "a") == [("failed", "worker lost"), ("completed", None)]


def test_a_supervisor_and_its_worker_fall_silent_and_wake_up_too_late(queue: Queue) -> None:
    queue.configure(lock_timeout_s=2, kill_grace_s=0.3, backoff_base=0.05, backoff_jitter=0)
    enqueue(queue, "a", STUBBORN)
    old = queue.start()
    begun(queue)
    lost = queue.workers()[0]
    for pid in (old.pid, lost["pid"]):
        os.kill(pid, signal.SIGSTOP)
    new = queue.start()
    eventually(lambda: "2" in ledger(queue), "it was fenced and runs again")
    os.kill(old.pid, signal.SIGCONT)
    eventually(
        lambda: any(
            row["supervisor_pid"] == old.pid and row["pid"] != lost["pid"]
            for row in queue.workers()
        ),
        "the old supervisor has replaced its worker",
    )
    sees_out_the_second_run(queue, "a")
    (first, error), second = runs(queue, "a")
    assert (first, second) == ("failed", ("completed", None))
    start, _, span = error.partition("silent for ")
    assert start == "worker lost: " and float(span.split()[0]) >= 2, error
    new.send_signal(signal.SIGTERM)
    new.wait(timeout=DEADLINE_S)
    enqueue(queue, "b", "true")
    reaches(queue, "b", "completed")
    assert old.poll() is None


# --- who is lost, and who is somebody else ---------------------------------------------------


@pytest.mark.parametrize("boot, birth", [("an earlier boot", None), ("", "an earlier time")])
def test_a_lost_workers_pid_now_belongs_to_somebody_else(
    queue: Queue, bystander: subprocess.Popen, boot: str, birth: str | None
) -> None:
    enqueue(queue, "a", "true")
    birth = birth or worker.process_birth(bystander.pid)
    claimed(queue, bystander.pid, birth, boot=boot)[0].close()
    queue.drain()
    assert runs(queue, "a") == [("failed", "worker lost"), ("completed", None)]
    assert bystander.poll() is None


@pytest.mark.parametrize("host", [HOST, "elsewhere"])
def test_a_silent_worker_is_lost_and_one_of_another_host_is_never_signalled(
    queue: Queue, bystander: subprocess.Popen, host: str
) -> None:
    """The other host may be this one: before it was started anew, and had another name."""
    enqueue(queue, "a", "true")
    boot = None if host == HOST else "another boot"
    db, _ = claimed(queue, bystander.pid, worker.process_birth(bystander.pid), host, boot=boot)
    looks = settler(queue)[0]
    looks.tick(db, time.time(), 0)
    looks.tick(db, time.time(), 1e6)  # a machine that slept holds nobody's silence against him
    assert (queue.state("a"), bystander.poll()) == ("processing", None)
    for mono in range(40):
        looks.tick(db, time.time(), 1e6 + mono)
    eventually(lambda: looks.tick(db, time.time(), 2e6) or queue.state("a") == "failed")
    db.close()
    assert bystander.poll() == (-signal.SIGKILL if host == HOST else None)
    assert runs(queue, "a")[0][1].startswith("worker lost: silent for 3")


def test_a_worker_is_ended_by_its_own_supervisor_and_others_look_on(
    queue: Queue, bystander: subprocess.Popen
) -> None:
    """Only the supervisor knows why (timeout, cancel, Ctrl+C); others would call it lost."""
    enqueue(queue, "a", "true")
    gone = subprocess.Popen(["true"])
    gone.wait()
    db, _ = claimed(queue, gone.pid, owner=bystander.pid)
    looks, told = settler(queue)
    for mono in range(3):
        looks.tick(db, time.time(), mono)
    assert (queue.state("a"), told) == ("processing", [])
    bystander.kill()
    bystander.wait()
    looks.tick(db, time.time(), 4)
    db.close()
    assert (queue.state("a"), told) == ("failed", ["failed"])


def test_a_worker_records_a_run_that_was_taken_from_it(queue: Queue) -> None:
    queue.configure(backoff_base=0, backoff_jitter=0)
    enqueue(queue, "a", "true")
    gone = subprocess.Popen(["true"])
    gone.wait()
    db, first = claimed(queue, gone.pid)
    looks, told = settler(queue)
    looks.tick(db, time.time(), 0)
    second = claimed(queue, gone.pid)
    second[0].close()
    done = database.Result("completed", 0)
    assert worker.record(db, first, done, looks.settings, 0)[0] == "ignored"
    db.close()
    assert told == ["failed"]
    assert (second[1].attempt, queue.state("a")) == (2, "processing")


def test_a_process_may_not_be_signalled_and_is_waited_for(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.configure(kill_grace_s=5)
    enqueue(queue, "a", "true")
    command = ["sh", "-c", "sleep 300 & echo $!"]  # the leader ends; its session lives
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child = int(leader.stdout.readline())
    leader.wait()
    leader.stdout.close()
    db, _ = claimed(queue, leader.pid)
    looks, told = settler(queue)
    with monkeypatch.context() as patched:
        patched.setattr(worker, "send", lambda *_: False)
        for mono in range(5):
            looks.tick(db, time.time(), mono)
        assert (queue.state("a"), told) == ("processing", ["waits"])
        for mono in (20, 24):  # held up meanwhile, perhaps: the grace is over, SIGKILL goes out
            looks.tick(db, time.time(), mono)
        assert told == ["waits"]
        looks.tick(db, time.time(), 26)  # five seconds after that: it does not end
    assert (queue.state("a"), told) == ("processing", ["waits", "waits"])
    looks.tick(db, time.time(), 27)
    eventually(lambda: worker.process_birth(child) is None)
    looks.tick(db, time.time(), 28)
    db.close()
    assert queue.state("a") == "failed"


def test_a_timeout_comes_as_the_worker_goes_on_to_the_next_job(queue: Queue) -> None:
    enqueue(queue, "next", "true")
    gone = subprocess.Popen(["true"])
    gone.wait()
    db, run = claimed(queue, gone.pid)
    looks = settler(queue)[0]
    row = dict(database.workers(db)[0], run=run.id - 1)
    ending = worker.Ending(row, "failed", "timed out", kill_at=0)
    looks.endings[run.worker] = ending
    looks.settle(db, ending)
    db.close()
    assert (queue.state("next"), queue.job("next")["attempts"]) == ("pending", 0)


# --- timeout and cancel ----------------------------------------------------------------------


def test_a_run_takes_too_long_and_ends_with_all_that_it_started(queue: Queue) -> None:
    for id, (command, _) in TREES.items():
        enqueue(queue, id, f"echo before; {command}", timeout=2, max_retries=0)
    queue.start(count=len(TREES))
    sessions = set(queue.sessions)
    eventually(lambda: queue.states()["dead"] == len(TREES), "all have timed out")
    assert [worker.session_members(session) for session in sessions] == [[]] * len(TREES)
    for id, (_, code) in TREES.items():
        job = queue.job(id)
        assert (job["exit_code"], job["last_error"]) == (code, "timed out after 2.0 s"), id
        assert job["stdout"] == "before\n"


def test_what_is_asked_to_end_can_start_what_cleans_up(queue: Queue) -> None:
    queue.configure(kill_grace_s=20)
    careful = "trap 'sleep 1; echo cleaned $?; exit' TERM; sleep 300 & wait"
    enqueue(queue, "late", careful, timeout=1, max_retries=0)
    enqueue(queue, "left", f"({careful}) & sleep 0.5")
    queue.drain()
    assert [queue.job(id)["stdout"] for id in ("late", "left")] == ["cleaned 0\n"] * 2


def test_who_was_born_as_the_others_were_asked_is_asked_as_an_orphan() -> None:
    command = ["sh", "-c", "sleep 300 & echo $!"]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    orphan = int(leader.stdout.readline())
    leader.wait()
    leader.stdout.close()
    worker.push([orphan], asked := {leader.pid}, hard=False)
    eventually(lambda: worker.process_birth(orphan) is None)
    assert asked == {leader.pid, orphan}


def test_a_run_is_cancelled_with_all_that_it_started_and_never_runs_again(queue: Queue) -> None:
    for id, (command, _) in TREES.items():
        enqueue(queue, id, f"echo >> begun; {command}")
    queue.start(count=len(TREES))
    sessions = set(queue.sessions)
    lines = queue.folder / "begun"
    eventually(lambda: lines.exists() and len(lines.read_text()) == len(TREES), "all run")
    told = queue.run("cancel", *TREES, check=0).stdout
    assert told == "".join(f"{id} cancelled\n" for id in TREES)
    assert [worker.session_members(session) for session in sessions] == [[]] * len(TREES)
    queue.drain()
    for id, (_, code) in TREES.items():
        job = queue.job(id)
        assert (job["state"], job["attempts"], job["exit_code"]) == ("cancelled", 1, code), id
        assert runs(queue, id) == [("cancelled", "cancelled")]
    assert len(lines.read_text()) == len(TREES)


def test_a_command_looks_twice_and_loses_no_lock(queue: Queue) -> None:
    """`cancel` holds a connection and opens another for each look.

    To open and close a file drops all locks that a process holds on it. Then a worker that leaves
    takes the log (-wal) away under the first connection, and what it writes is lost.
    """
    queue.run("init", check=0)
    db = database.connect(queue.path)
    database.connect(queue.path).close()
    queue.drain()
    id = database.register_supervisor(db, "elsewhere", "", 1, "", 0, 30)
    other = sqlite3.connect(queue.path)
    assert other.execute("SELECT count(*) FROM supervisors").fetchone() == (1,)
    other.close()
    database.remove_supervisor(db, id)
    db.close()


def test_a_supervisor_does_not_spin_while_a_deaf_job_has_its_grace(queue: Queue) -> None:
    queue.configure(kill_grace_s=3600)
    enqueue(queue, "a", STUBBORN)
    supervisor = queue.start()
    begun(queue)  # from here on it is deaf
    ask_to_end(queue, "a")
    eventually(lambda: queue.workers() == [], "the worker has been ended, its job not yet")
    before = cpu_s(supervisor.pid)
    time.sleep(1)  # what is measured is a second of waiting
    assert cpu_s(supervisor.pid) - before < 0.3
    assert queue.state("a") == "processing"
    eventually(lambda: supervisor.send_signal(signal.SIGINT) or supervisor.poll() == 0)
    assert queue.state("a") == "cancelled"


# --- the doorbell ----------------------------------------------------------------------------


def test_work_arrives_and_wakes_sleeping_workers(queue: Queue) -> None:
    """Each job waits for the other: both end only if two workers were woken, long before a poll."""
    queue.configure(poll_interval_ms=60_000)
    queue.start(count=2)
    meet = "touch {0}; until [ -e {1} ]; do sleep 0.02; done"
    jobs = "\n".join(meet.format(*pair) for pair in ("ab", "ba"))
    queue.run("enqueue", "--file", "-", "--lines", stdin=jobs, check=0)
    eventually(lambda: queue.states()["completed"] == 2, "both have run")
    # Two more, and a ring was lost: the worker that takes one rings for the other.
    for pair in ("cd", "dc"):
        db, now = database.connect(queue.path), time.time()
        job = {"command": meet.format(*pair), "cwd": str(queue.folder)}
        row = config.check_job(job, config.load(queue.config), "/")
        put_in(db, [(1, row)], now)
        db.close()
    database.ring(queue.path)
    eventually(lambda: queue.states()["completed"] == 4, "both have run")


def test_a_bell_is_full_of_stale_rings_and_no_worker_spins(queue: Queue) -> None:
    queue.configure(poll_interval_ms=60_000)
    enqueue(queue, "a", UNTIL_GO)
    queue.start()
    begun(queue)
    pid = queue.workers()[0]["pid"]
    for _ in range(200):
        database.ring(queue.path, 512)  # more than a pipe holds: nobody may be held up by that
    before = cpu_s(pid)
    go(queue)
    reaches(queue, "a", "completed")
    for _ in range(3):
        database.ring(queue.path, 100)
    time.sleep(1)  # what is measured is a second of sleep
    assert cpu_s(pid) - before < 0.2


def test_where_there_are_no_fifos_workers_go_without_the_bell(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    database.connect(queue.path).close()
    monkeypatch.setattr(os, "mkfifo", none)
    worker.make_run_directory(queue.path)
    assert database.open_bell(queue.path, os.O_RDWR) is None


def cpu_s(pid: int) -> float:
    """Return the seconds that a process itself has computed."""
    user, system = worker.process_status(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_a_job_of_a_later_time_and_a_retry_wake_a_sleeping_worker(queue: Queue) -> None:
    queue.configure(poll_interval_ms=60_000, backoff_base=0.3, backoff_jitter=0)
    queue.start()
    enqueue(queue, "later", "true", run_at=time.time() + 0.5)
    reaches(queue, "later", "completed")
    enqueue(queue, "again", "exit $((QUEUECTL_ATTEMPT < 2))")
    reaches(queue, "again", "completed")
    for id in ("later", "again"):
        assert queue.job(id)["started_at"] >= queue.job(id)["run_at"]


# --- files that others could write, or have planted ------------------------------------------


@pytest.mark.parametrize(
    "name, mode",
    [
        ("queue.db", 0o620),
        ("queue.db", 0o602),
        ("queue.db.run", 0o770),
        ("queue.db.run", 0o707),
        ("config.json", 0o602),  # with a launcher in it
        ("", 0o777),
    ],
)
def test_others_could_write_commands_into_the_queue(queue: Queue, name: str, mode: int) -> None:
    database.ring(queue.path)
    queue.configure()
    queue.drain()
    place = str(queue.folder / name)
    os.chmod(place, mode)
    checks = json.loads(queue.run("doctor", "--json", check=1).stdout)["checks"]
    [problem] = [each["problem"] for each in checks if each["problem"]]
    assert problem == f"others can write {place}; chmod go-w {place}"
    for words in ([], ["--detach"]):
        refused = queue.run("worker", "start", *words, check=1)
        assert refused.stderr == f"Error: others can write {place}; chmod go-w {place}\n"
    subprocess.run(["chmod", "go-w", place], check=True)
    queue.drain()
    queue.run("doctor", check=0)


def test_others_could_replace_the_settings_that_a_link_leads_to(queue: Queue) -> None:
    elsewhere = queue.folder / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    (elsewhere / "config.json").write_text("{}")
    Path(queue.config).unlink()
    Path(queue.config).symlink_to(elsewhere / "config.json")
    refused = queue.run("worker", "start", "--drain", check=1)
    assert refused.stderr == f"Error: others can write {elsewhere}; chmod go-w {elsewhere}\n"


def test_where_processes_cannot_be_seen_no_worker_is_started(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor would take itself for dead."""
    monkeypatch.setattr(worker, "process_birth", lambda _: None)
    database.connect(queue.path).close()
    looks = settler(queue)[0]
    with pytest.raises(database.QueueError, match="processes cannot be seen here"):
        looks.begin()


def test_a_queue_lies_in_a_sticky_directory_like_tmp(queue: Queue) -> None:
    queue.folder.chmod(0o1777)
    queue.drain()


def test_the_run_directory_is_a_link_to_somewhere_else(queue: Queue) -> None:
    elsewhere, run = queue.folder / "elsewhere", Path(queue.path + ".run")
    elsewhere.mkdir(0o700)
    run.symlink_to(elsewhere)
    refused = queue.run("worker", "start", "--drain", check=1)
    assert refused.stderr == f"Error: {run} is not a directory; remove it\n"
    assert list(elsewhere.iterdir()) == []
    run.unlink()
    queue.drain()


@pytest.mark.parametrize("link, output", [(os.symlink, "w1.out"), (os.link, "w1.err")])
def test_a_link_was_planted_where_a_worker_will_write(
    queue: Queue, link: Callable[[Path, Path], None], output: str
) -> None:
    victim, run = queue.folder / "victim", Path(queue.path + ".run")
    victim.write_text("precious")
    run.mkdir(0o700)
    link(victim, run / output)
    enqueue(queue, "a", "echo out; echo err >&2")
    supervisor = queue.start(ready=False)
    reaches(queue, "a", "completed")
    assert victim.read_text() == "precious"
    assert (queue.job("a")["stdout"], queue.job("a")["worker"]) == ("out\n", "w1")
    assert supervisor.poll() is None


def test_the_run_directory_is_removed_while_nobody_works(queue: Queue) -> None:
    queue.drain()
    shutil.rmtree(queue.path + ".run")
    enqueue(queue, "a", "echo hello")
    queue.drain()
    assert queue.job("a")["stdout"] == "hello\n"


# --- many ------------------------------------------------------------------------------------


def test_eight_workers_of_two_supervisors_run_each_of_200_jobs_once(queue: Queue) -> None:
    jobs = "echo $QUEUECTL_JOB_ID >> ledger\n" * 200
    queue.run("enqueue", "--file", "-", "--lines", stdin=jobs, check=0)
    supervisors = [queue.start("--drain", count=4, ready=False) for _ in range(2)]
    assert [each.wait(timeout=DEADLINE_S * 2) for each in supervisors] == [0, 0]
    assert queue.states()["completed"] == 200
    assert len(ledger(queue)) == len(set(ledger(queue))) == 200
    assert {job["attempts"] for job in queue.json("list")} == {1}


# --- what a reviewer broke -------------------------------------------------------------------

CLOSES_ALL = (
    "import subprocess, sys; subprocess.Popen(['sh', '-c', "
    "'echo $QUEUECTL_JOB_ID.$QUEUECTL_ATTEMPT $$ >> ledger; sleep 60; echo leaked']); sys.exit(1)"
)


def test_a_child_that_closed_all_it_inherited_is_ended_with_its_run(queue: Queue) -> None:
    """Python's subprocess closes every descriptor, so no pipe can tell that such a child lives."""
    states = "for pid in $(cut -sd' ' -f2 ledger 2> /dev/null); do ps -o stat= -p $pid; done"
    looks = f"for state in $({states}); do [ ${{state%${{state#?}}}} = Z ] || echo lives; done"
    command = f"{looks}; {sys.executable} -c {shlex.quote(CLOSES_ALL)}"
    begins = "until grep -qs ^a.$QUEUECTL_ATTEMPT ledger; do sleep 0.02; done"
    enqueue(queue, "a", f"{command}; {begins}; exit 1", max_retries=1)
    enqueue(queue, "quick", command, max_retries=1)
    queue.drain()
    began = dict(zip(ledger(queue)[::2], map(int, ledger(queue)[1::2])))
    assert {"a.1", "a.2"} <= began.keys()
    assert not any(worker.process_birth(pid) for pid in began.values()), "one lives on"
    assert {job["stdout"] for job in queue.json("list")} == {""}


def test_exit_codes_are_seen_though_the_caller_ignores_sigchld(queue: Queue) -> None:
    enqueue(queue, "a", "exit 3", max_retries=0)
    script = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
    script += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    words = [str(ROOT / "queuectl.py"), "worker", "start", "--drain"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=queue.environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (queue.job("a")["state"], queue.job("a")["exit_code"]) == ("dead", 3)


def test_it_is_asked_to_leave_while_the_session_of_a_dead_worker_is_being_emptied(queue):
    queue.configure(kill_grace_s=4, poll_interval_ms=100)
    enqueue(queue, "deaf", "trap '' TERM; echo here > here; while :; do sleep 0.1; done")
    process = queue.start()
    eventually(lambda: (queue.folder / "here").exists())
    os.kill(queue.workers()[0]["pid"], signal.SIGKILL)
    time.sleep(0.2)  # within the grace; later it would be an ordinary stop
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert queue.state("deaf") == "failed"


def test_a_healthy_worker_whose_supervisor_was_killed_finishes_however_long_it_takes(queue):
    queue.configure(lock_timeout_s=2, poll_interval_ms=100, backoff_base=0.05)
    enqueue(queue, "long", "sleep 4", max_retries=0)
    first = queue.start()
    eventually(lambda: queue.state("long") == "processing")
    first.kill()
    queue.run("worker", "stop", check=0)
    assert queue.state("long") == "completed"


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_nobody_reads_what_the_workers_say_and_they_work_on(queue: Queue, kind: str) -> None:
    """A terminal is ready when it has room for one byte, and a write of more would wait."""
    jobs = [{"id": f"{number:03}" + "x" * 100, "command": "true"} for number in range(100)]
    queue.run("enqueue", "--file", "-", stdin=json.dumps(jobs), check=0)
    reader, writer = os.pipe() if kind == "pipe" else os.openpty()
    if kind == "pipe":
        fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "queuectl.py"), "worker", "start", "--drain"],
        stdout=writer, env=queue.environment,
    )  # fmt: skip
    os.close(writer)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(reader)
    assert queue.states()["completed"] == 100


def test_worker_stop_waits_only_for_those_it_asked(queue: Queue) -> None:
    enqueue(queue, "a", UNTIL_GO)
    queue.start()
    eventually(lambda: queue.state("a") == "processing")
    stop = subprocess.Popen(
        [sys.executable, str(ROOT / "queuectl.py"), "worker", "stop"],
        env=queue.environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    db = database.connect(queue.path)
    eventually(lambda: database.supervisors(db)[0]["stop"] == 1)
    db.close()
    second = queue.start()
    go(queue)
    assert stop.wait(20) == 0
    assert second.poll() is None


def test_the_queue_is_removed_under_its_workers_and_they_leave(queue: Queue) -> None:
    process = queue.start()
    for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
        (queue.folder / name).unlink()
    assert process.wait(20) in (0, 1)
    for row in queue.sessions:
        eventually(lambda row=row: not worker.session_members(row))
    assert not (queue.folder / "queue.db").exists() or queue.workers() == []
    for path in (queue.folder / "queue.db.run").glob("w*"):
        path.unlink()  # of workers of a queue that is no more


@pytest.mark.parametrize("end", ["-shm", "-wal"])
def test_a_file_of_the_queue_is_removed_and_its_workers_leave(queue: Queue, end: str) -> None:
    """In -shm are the locks: what the others write would be overwritten, unread. In -wal is what
    was written: no new connection finds it, but those that are there save it as they close."""
    queue.configure(max_retries=0)
    enqueue(queue, "a", UNTIL_GO)
    enqueue(queue, "b", "true")
    process = queue.start()
    begun(queue)
    [session], removed = queue.sessions, queue.folder / f"queue.db{end}"

    def is_connected() -> bool:  # once more, after each fork
        for handle in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if handle.samefile(removed):
                    return True
        return False

    eventually(is_connected)
    removed.unlink()
    if end == "-shm":
        enqueue(queue, "c", "true")
    else:
        eventually(lambda: "was removed" in process.log.read_text())
        go(queue)
    assert process.wait(timeout=DEADLINE_S) == 1
    assert f"queue.db{end} was removed: leaving" in process.log.read_text()
    assert worker.session_members(session) == []
    go(queue)
    queue.drain()
    assert {job["id"] for job in queue.json("list")} == {"a", "b"} | (
        {"c"} if end == "-shm" else set()
    )
    assert queue.states()["completed"] == queue.states()["total"]


def test_the_index_of_the_log_is_removed_while_a_run_is_being_ended(queue: Queue) -> None:
    """What it had come to is recorded, and who waits for its end hears of it."""
    queue.configure(kill_grace_s=3, max_retries=0)
    command = "trap '' TERM; touch begun; while :; do sleep 0.1; done"
    enqueue(queue, "late", command, timeout=0.5)
    process = queue.start()
    eventually((queue.folder / "begun").exists, "it runs")
    words = [sys.executable, str(ROOT / "queuectl.py"), "worker", "stop"]
    with subprocess.Popen(words, env=queue.environment, stdout=subprocess.PIPE) as stop:
        eventually(lambda: queue.json("worker", "list") == [], "its worker is being ended")
        (queue.folder / "queue.db-shm").unlink()
        assert process.wait(timeout=DEADLINE_S) == 1
        assert stop.communicate()[0].endswith(b" stopped\n"), "0 if it was slow"
    assert "queue.db-shm was removed: leaving" in process.log.read_text()
    assert runs(queue, "late") == [("failed", "timed out after 0.5 s")]


def test_who_slept_while_the_queue_was_replaced_leaves_the_new_ones_workers_alone(
    queue: Queue,
) -> None:
    """Supervisors and workers are numbered from 1 again there."""
    old = queue.start()
    os.kill(old.pid, signal.SIGSTOP)
    (queue.folder / "queue.db").unlink()
    new = queue.start(ready=False)
    enqueue(queue, "a", UNTIL_GO)
    begun(queue)
    os.kill(old.pid, signal.SIGCONT)
    assert old.wait(timeout=DEADLINE_S) == 1
    assert "queue.db was replaced: leaving" in old.log.read_text()
    assert new.poll() is None
    go(queue)
    reaches(queue, "a", "completed")
    assert runs(queue, "a") == [("completed", None)]


def test_a_backup_takes_the_queues_place_and_its_workers_do_not_work_on_for_the_old_file(
    queue: Queue,
) -> None:
    """Their rows are in it, too: all would look as if they were there."""
    process = queue.start()
    with closing(sqlite3.connect(queue.path)) as db:
        db.execute("VACUUM INTO ?", (queue.path + ".new",))
    os.chmod(queue.path + ".new", 0o600)
    for end in ("-wal", "-shm"):
        os.unlink(queue.path + end)
    os.replace(queue.path + ".new", queue.path)
    assert process.wait(timeout=DEADLINE_S) == 1
    assert re.search(
        "queue.db( was replaced|-(shm|wal) was removed): leaving", process.log.read_text()
    )
    enqueue(queue, "a", "true")
    queue.drain()
    assert queue.state("a") == "completed"


def test_the_queue_is_removed_while_a_run_is_being_ended_and_nothing_of_it_stays(
    queue: Queue,
) -> None:
    queue.configure(kill_grace_s=600)
    enqueue(queue, "a", "trap 'echo asked >> ledger' TERM; while :; do sleep 0.05; done", timeout=1)
    process = queue.start()
    [session] = queue.sessions
    begun(queue)
    (queue.folder / "queue.db").unlink()
    assert process.wait(timeout=DEADLINE_S) == 1
    assert "queue.db is gone: leaving" in process.log.read_text()
    assert worker.session_members(session) == []


def test_something_lies_where_the_run_directory_was_and_lost_runs_are_settled(
    queue: Queue,
) -> None:
    queue.configure(max_retries=0)
    for id in ("a", "b"):
        enqueue(queue, id, UNTIL_GO)
    queue.start(count=2)
    begun(queue, 2)
    shutil.rmtree(queue.path + ".run")
    Path(queue.path + ".run").touch()
    for row in queue.workers():
        os.kill(row["pid"], signal.SIGKILL)
    for id in ("a", "b"):
        reaches(queue, id, "dead")
    os.unlink(queue.path + ".run")


def test_ctrl_c_after_worker_stop_is_the_first_and_lets_the_job_finish(queue: Queue) -> None:
    enqueue(queue, "a", UNTIL_GO)
    process = queue.start()
    eventually(lambda: queue.state("a") == "processing")
    queue.run("worker", "stop", "--timeout", "0.1s", check=1)
    process.send_signal(signal.SIGINT)
    go(queue)
    assert process.wait(20) == 0
    assert queue.state("a") == "completed"


def test_a_locale_without_the_commands_characters_is_no_trouble(queue: Queue) -> None:
    queue.environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    job = json.dumps({"id": "\u2603", "command": "echo h\u00e9llo $QUEUECTL_JOB_ID"})
    queue.run("enqueue", "-", stdin=job, check=0)
    queue.drain()
    [found] = queue.json("list")
    assert found["stdout"] == "h\u00e9llo \u2603\n"


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_trouble(queue: Queue, closed: str) -> None:
    program = f"{sys.executable} {ROOT}/queuectl.py"
    script = f"{program} enqueue --command true {closed} && {program} worker start --drain {closed}"
    done = subprocess.run(["sh", "-c", script], env=queue.environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert queue.states()["completed"] == 1


# --- what a sceptical reader broke -----------------------------------------------------------

THREADS_LIVE_ON = """
import ctypes, os, sys, threading, time
def live():
    for _ in range(200):
        with open(sys.argv[1], "a") as ledger: ledger.write(f"{os.getpid()}\\n")
        time.sleep(0.05)
threading.Thread(target=live).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_program_whose_first_thread_has_ended_is_alive_and_is_ended(queue: Queue) -> None:
    (queue.folder / "program.py").write_text(THREADS_LIVE_ON)
    command = f"exec {sys.executable} program.py ledger"
    enqueue(queue, "a", command, timeout=3, max_retries=0)
    queue.start()
    reaches(queue, "a", "dead")
    ledger = queue.folder / "ledger"
    pid = int(ledger.read_text().split()[0])
    assert worker.process_birth(pid) is None, "it lives on"
    size = ledger.stat().st_size
    assert size and worker.session_members(pid) == []


def test_what_is_left_behind_is_not_in_the_time_of_the_run(queue: Queue) -> None:
    left = "(trap '' TERM; touch deaf; until [ -e go ]; do sleep 0.02; done) &"
    command = f"{left} until [ -e deaf ]; do sleep 0.02; done; echo done; exit 0"
    queue.configure(kill_grace_s=3.5)
    enqueue(queue, "a", command, timeout=2.5, max_retries=0)
    queue.drain()  # it is killed after the grace, long after the timeout
    job = queue.job("a")
    assert (job["state"], job["exit_code"], job["stdout"]) == ("completed", 0, "done\n")


@pytest.mark.parametrize("how", [[], ["--now"]])
def test_a_job_that_asks_its_own_workers_to_stop_is_told_so(queue: Queue, how: list) -> None:
    words = [sys.executable, str(ROOT / "queuectl.py"), "worker", "stop", *how]
    enqueue(queue, "a", shlex.join(words), max_retries=0)
    queue.drain()
    assert queue.job("a")["stderr"].startswith("Error: this is a job of these workers")


@pytest.mark.parametrize("words", ["worker start --drain", "worker stop", "cancel a"])
def test_what_is_done_to_a_copy_of_the_queue_leaves_the_runs_of_the_original_alone(
    queue: Queue, tmp_path_factory: Any, words: str
) -> None:
    queue.configure(lock_timeout_s=3)  # nobody beats in the copy
    enqueue(queue, "a", UNTIL_GO, max_retries=0)
    queue.start()
    reaches(queue, "a", "processing")
    copy = Queue(tmp_path_factory.mktemp("copy"))
    with closing(database.connect(queue.path)) as db, closing(sqlite3.connect(copy.path)) as other:
        db.backup(other)
    os.chmod(copy.path, 0o600)
    copy.run(*words.split())
    assert copy.states()["processing"] == 0
    assert queue.state("a") == "processing" and len(queue.workers()) == 1
    go(queue)
    reaches(queue, "a", "completed")
    copy.assert_clean()


def test_only_who_works_for_a_queue_that_is_still_there_works_elsewhere(tmp_path: Path) -> None:
    """A queue that was moved, or replaced by a backup, still has the workers it had."""
    for name in ("queue", "copy"):
        (tmp_path / name).mkdir()
    queue, copy = str(tmp_path / "queue" / "queue.db"), str(tmp_path / "copy" / "queue.db")
    db, me = database.connect(queue), os.getpid()
    with closing(sqlite3.connect(copy)) as other:
        db.backup(other)
    (tmp_path / "link").symlink_to(queue)
    assert not worker.works_elsewhere(me, queue)
    assert not worker.works_elsewhere(me, str(tmp_path / "link"))
    assert worker.works_elsewhere(me, copy)
    os.rename(queue, moved := str(tmp_path / "queue" / "moved.db"))
    assert not worker.works_elsewhere(me, moved)
    os.rename(moved, queue)
    for suffix in ("", "-wal", "-shm"):  # as mv to another disk does
        os.unlink(queue + suffix)
    assert not worker.works_elsewhere(me, copy)
    os.rename(copy, queue)
    assert not worker.works_elsewhere(me, queue)
    db.close()


def test_a_note_of_the_exit_comes_too_late_for_a_settled_run(queue: Queue) -> None:
    enqueue(queue, "a", "true", max_retries=0)
    db, run = claimed(queue, 1)
    database.finish(db, run, database.Result("failed", None, "worker lost"), 0, 0, 0)
    database.note_exit(db, run, 0)
    assert database.runs(db, run.seq)[0]["exit_code"] is None
    db.close()


def test_a_setsid_program_that_is_the_run_itself_has_a_timeout(queue: Queue) -> None:
    enqueue(queue, "a", "exec setsid sleep 3", timeout=0.3, max_retries=0)
    queue.start()
    reaches(queue, "a", "dead")
    assert "timed out" in queue.job("a")["last_error"]


def test_a_supervisor_with_more_patience_is_judged_by_its_own(queue: Queue) -> None:
    queue.configure(lock_timeout_s=40, backoff_base=0)
    enqueue(queue, "a", "sleep 4; echo fine")
    begun_at = time.monotonic()
    queue.start()
    reaches(queue, "a", "processing")
    queue.configure(lock_timeout_s=2, backoff_base=0)
    queue.run("worker", "stop", check=0)
    assert time.monotonic() - begun_at > 2.5
    assert (queue.state("a"), queue.job("a")["attempts"]) == ("completed", 1)


def test_a_long_lock_of_somebody_else_makes_nobody_silent(queue: Queue) -> None:
    queue.configure(lock_timeout_s=2, backoff_base=0)
    enqueue(queue, "a", "sleep 6; echo fine")
    queue.start()
    reaches(queue, "a", "processing")
    db = database.connect(queue.path)
    db.execute("BEGIN IMMEDIATE")
    words = [sys.executable, str(ROOT / "queuectl.py"), "worker", "stop"]
    with subprocess.Popen(words, env=queue.environment, stdout=subprocess.DEVNULL) as stop:
        with pytest.raises(subprocess.TimeoutExpired):
            stop.wait(4)  # twice as long as silence may last
        db.execute("ROLLBACK")
        db.close()
        assert stop.wait(DEADLINE_S) == 0
    assert (queue.state("a"), queue.job("a")["attempts"]) == ("completed", 1)


def test_a_look_that_was_held_up_is_held_against_nobody(queue: Queue) -> None:
    looks, row = settler(queue)[0], {"id": 1, "heartbeat_at": 0.0}
    for mono in (0.0, 0.5, 100.0):
        looks.listen([row], mono)
    assert looks.silences[1][1] == 0.5


def test_a_job_removes_the_run_directory_and_its_result_is_kept(queue: Queue) -> None:
    removing = f"head -c {worker.OUTPUT_BOUND + 1} /dev/zero; rm -rf {queue.path}.run"
    enqueue(queue, "a", removing)
    enqueue(queue, "b", "echo hello")
    queue.drain()
    assert (queue.state("a"), queue.job("a")["attempts"]) == ("completed", 1)
    assert queue.job("b")["stdout"] == "hello\n"


@pytest.mark.parametrize("host", (HOST, "4f5a90c1be77"))
def test_workers_of_another_container_are_heard_and_not_judged_by_their_pids(
    queue: Queue, host: str
) -> None:
    """Same machine, another PID namespace and mostly host name: its pids say nothing here."""
    enqueue(queue, "a", "true")
    gone = subprocess.Popen(["true"])
    gone.wait()
    db, _ = claimed(queue, gone.pid)
    here = worker.boot_id()
    db.execute("UPDATE supervisors SET boot = ?, lock_timeout_s = 60, host = ?", (here + "1", host))
    looks, told = settler(queue)
    looks.tick(db, time.time(), 0)
    assert (queue.state("a"), told) == ("processing", [])
    assert [row["worker"] for row in worker.live_workers(db)] == ["w1"]
    db.execute("UPDATE supervisors SET heartbeat_at = heartbeat_at - 61")
    assert worker.live_workers(db) == [], "it has been silent for too long"
    looks.tick(db, time.time(), 0)
    for mono in range(1, 64):
        looks.tick(db, time.time(), mono)
    db.close()
    assert told == ["failed"], "after its heartbeat has been silent for its own lock_timeout_s"


def test_ps_is_asked_in_the_same_words_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another time zone or language would make each live worker look like a recycled pid."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    asked = worker.ask("sh", "-c", "echo $TZ $LC_ALL; ps -o sid= -p $$").split()
    assert asked[:2] == ["UTC", "C"]
    assert asked[2] != str(os.getsid(0)), "and not in the session that Ctrl+C comes to"
    monkeypatch.setattr(sys, "platform", "darwin")
    with subprocess.Popen(["sleep", "60"]) as child:
        assert str(child.pid) in worker.children(os.getpid())
        child.kill()


def test_a_child_that_died_is_forgotten_though_a_worker_elsewhere_has_its_pid(queue: Queue) -> None:
    """A worker of another container: while it lives the child would be waited for in vain."""
    enqueue(queue, "a", "true")
    gone = subprocess.Popen(["true"])
    gone.wait()
    db, _ = claimed(queue, gone.pid)
    # Its heartbeat will not count for long, lest the fixture wait for it at the end.
    db.execute("UPDATE supervisors SET boot = ?, lock_timeout_s = 2", (worker.boot_id() + "1",))
    looks, _ = settler(queue)
    looks.children[gone.pid] = SimpleNamespace(exitcode=0, sentinel=0)
    looks.tick(db, time.time(), 0)
    db.close()
    assert looks.children == {}


def test_explain_with_a_reader_that_stalls_holds_nobody_up(queue: Queue) -> None:
    enqueue(queue, "a", "true")
    words = [
        sys.executable,
        str(ROOT / "queuectl.py"),
        "--explain",
        "worker",
        "start",
        "--count",
        "2",
    ]
    with subprocess.Popen(
        words, env=queue.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:  # nobody reads its stderr
        queue.supervisors.append(process)
        process.log = queue.folder / "none"
        queue.run("enqueue", "--file", "-", "--lines", stdin="true\n" * 60, check=0)
        eventually(lambda: queue.states()["completed"] == 61, "all have run", 90)
        process.stderr.close()
        enqueue(queue, "b", "true")
        reaches(queue, "b", "completed")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
