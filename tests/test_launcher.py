"""Runs handed to something else, and above all: what is left there ends before a job runs again.

"Elsewhere" is a session of its own on this machine: it outlives the launcher that started it, as a
step of a cluster does, and nothing of the queue's own reaches it but the stop line.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import pytest
from conftest import ROOT, Queue, eventually
from hypothesis import given
from hypothesis import strategies as st
from test_guards import dead_pid
from test_worker import claimed, enqueue, reaches, runs, settler

import config
import database
import worker

# Starts COMMAND in a session of its own, and waits for it; what it prints and its code come back.
FAR = """cd {folder}; echo "here $2" >> ledger
exec setsid -w sh -c 'echo $$ > pid.$1.$2; cd "$3" && exec sh -c "$4"' sh "$@"
"""
STOP = """cd {folder}; echo "stop $2" >> ledger; [ ! -e refuse ] || exit 5
[ ! -e pid.$1.$2 ] || kill -s KILL -- -$(cat pid.$1.$2) 2> /dev/null; exit 0
"""
# Tells the ledger all the time that it lives, and does not listen; from run 2 on until "go".
DEAF = """trap '' TERM; until echo "$QUEUECTL_ATTEMPT" >> ledger
[ $QUEUECTL_ATTEMPT != 1 ] && [ -e go ]; do sleep 0.02; done"""


@pytest.fixture
def far(queue: Queue) -> Iterator[Queue]:
    """A queue whose runs go elsewhere; nothing may be left there either."""
    for name, text in (("far", FAR), ("stop", STOP)):
        (queue.folder / name).write_text(text.replace("{folder}", shlex.quote(str(queue.folder))))
    words = "{id} {attempt} {cwd} {command}"
    queue.launcher, queue.stop = [f"sh {queue.folder}/{name} {words}" for name in ("far", "stop")]
    quick = dict(backoff_base=0.05, backoff_jitter=0, kill_grace_s=1, poll_interval_ms=100)
    queue.configure(**quick, launcher=queue.launcher, launcher_stop=queue.stop)
    yield queue
    begun = [int(path.read_text()) for path in queue.folder.glob("pid.*")]
    living = [pid for pid in begun if worker.session_members(pid)]
    for pid in living:
        worker.send(-pid, signal.SIGKILL)
    assert living == [], "alive elsewhere"


def ledger(queue: Queue) -> list[str]:
    path = queue.folder / "ledger"
    return path.read_text().splitlines() if path.exists() else []


def lives(queue: Queue, attempt: int, times: int = 3) -> None:
    eventually(lambda: ledger(queue).count(f"{attempt}") >= times, f"run {attempt} lives elsewhere")


def second_run_is_alone(queue: Queue, id: str = "a") -> None:
    """A DEAF job runs again, only after its first run has been ended, and completes."""
    lives(queue, 2)
    (queue.folder / "go").touch()
    reaches(queue, id, "completed")
    seen = ledger(queue)
    assert "1" not in seen[seen.index("2") :], "two runs at once"
    assert "stop 1" in seen[: seen.index("2")]


# --- the lines -------------------------------------------------------------------------------


REFUSED = {
    "sh -c true": "must have {command}",
    "sh -c ${command}": "must have {command}",
    "sh -c {command} {host}": "has {host}; there are: {command}, {id}, {attempt}, {cwd}",
    "sh -c {command} {Id}": "has {Id}",
}


@pytest.mark.parametrize("line, why", REFUSED.items())
def test_a_line_that_cannot_be_filled_in_is_refused_wherever_it_is_given(queue, line, why):
    for words in (["config", "set", "launcher", line], ["worker", "start", "--launcher", line]):
        done = queue.run(*words, check=2)
        assert why in done.stderr and '"launcher"' in done.stderr
    queue.configure(launcher=line)
    assert why in queue.run("config", "list", check=1).stderr


def test_a_stop_line_needs_no_command_but_known_places(queue):
    queue.run("config", "set", "launcher-stop", "scancel -n q-{id}-{attempt}", check=0)
    assert "has {job}" in queue.run("config", "set", "launcher_stop", "{job}", check=2).stderr
    queue.configure(launcher=3)
    assert '"launcher" must be text, not 3' in queue.run("config", "list", check=1).stderr


@pytest.mark.parametrize(
    "line",
    [
        "sh -c '{command}'",
        "sh -c 'cd {cwd} && {command}'",
        'ssh far "x {command}"',
        "# runs {command}\nsh -c {command}",
        'sh -c "echo {command}',
        "sh -c 'echo $(date) {id}; sh -c \"$1\"' sh {command}",
        "echo `sh -c {command}`",
        'sh -c {command}; : --name "$(hostname)-{id}"',
        """sh -c {command} "$(grep '{id}' f)\"""",
        """sh -c {command}; : "$(echo "{id}")\"""",
        """sh -c {command}; : "$(echo $(date) "{id}")\"""",
        "sh -c {command};# {id}",
    ],
)
def test_a_place_inside_of_quotes_is_refused_for_the_value_has_its_own(queue, line):
    said = queue.run("config", "set", "launcher", line, check=2).stderr
    assert "is in quotes or a comment" in said
    queue.configure(launcher=line)
    assert "is in quotes or a comment" in queue.run("config", "list", check=1).stderr


@pytest.mark.parametrize(
    "line",
    [
        """--x="$HOME/logs/"{id} sh -c {command}''""",
        """env A='x y'{id} sh -c {command}""",
        """sh -c {command}; : "$(echo "a")"{id}""",
        """cd "$(dirname "$(readlink -f x)")" && sh -c {command}""",
        r"""echo \"{id} $(echo {id}); sh -c {command}""",
        "sh -c {command};# it's fine\nsh -c {command}",
        "# a job can't do more\nsh -c {command} # nor won't it",
    ],
)
def test_quotes_beside_a_place_are_a_shells_own(queue, line):
    queue.run("config", "set", "launcher", line, check=0)


def test_a_line_is_stored_and_shown_as_it_is(queue):
    line = "x=${HOME} docker run --format '{{.Name}}' {a,b} { :; } sh -c {command}"
    queue.run("config", "set", "launcher", line, check=0)
    assert queue.run("config", "get", "launcher", check=0).stdout == line + "\n"
    assert queue.json("config", "list")["launcher"] == line
    assert queue.json("config", "list")["launcher_stop"] == ""
    filled = line.replace("{command}", "true")
    assert config.expand(line, command="true", id="", attempt=1, cwd="") == filled
    queue.run("config", "set", "launcher", "", check=0)
    assert queue.json("config", "get", "launcher") == {"launcher": ""}


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_whatever_a_command_holds_reaches_the_launcher_whole(text):
    line = config.expand("printf %s {id}-{command}", command=text, id=text, attempt=1, cwd="/")
    shown = subprocess.run(["/bin/sh", "-c", line.encode()], capture_output=True).stdout
    assert shown.decode() == f"{text}-{text}"


# --- a run -----------------------------------------------------------------------------------


def test_a_run_elsewhere_is_recorded_like_one_here(far):
    name = "it's $(odd)"
    enqueue(far, name, 'echo out; echo "why $QUEUECTL_JOB_ID" >&2; exit 3', max_retries=1)
    enqueue(far, "b", "pwd")
    said = far.drain()
    job = far.job(name)
    assert (job["state"], job["exit_code"], job["stdout"]) == ("dead", 3, "out\n")
    assert job["last_error"] == f"exit code 3: why {name}"
    lines = [run["line"] for run in job["runs"]]
    assert lines == [
        config.expand(far.launcher, command=job["command"], id=name, attempt=n, cwd=job["cwd"])
        for n in (1, 2)
    ]
    text = far.run("show", name, check=0).stdout
    assert all(f"\n         {line}\n" in text for line in lines)
    assert far.job("b")["stdout"] == f"{far.folder}\n"
    assert "retry 1 of 1" in said and "after 2 runs" in said


def test_without_a_launcher_a_run_has_no_line(far):
    enqueue(far, "a", "exit 1", max_retries=0)
    far.drain("--launcher", "")  # and no stop line then, though one is set
    assert far.job("a")["runs"][0]["line"] is None
    assert ledger(far) == []


def test_the_lines_of_worker_start_come_before_the_settings_in_the_background_too(far):
    enqueue(far, "a", "echo $X")
    line = "X=mine sh -c {command}"
    far.run("worker", "start", "--detach", "--launcher", line, check=0)
    reaches(far, "a", "completed")
    far.run("worker", "stop", check=0)
    assert far.job("a")["stdout"] == "mine\n"
    assert far.job("a")["runs"][0]["line"] == "X=mine sh -c 'echo $X'"


def test_a_directory_may_be_there_only(far):
    """But a launcher that is not told of it would run the command in another one."""
    there = far.folder / "there"
    for id in ("a", "b"):
        there.mkdir(exist_ok=True)
        enqueue(far, id, "pwd", cwd=str(there), max_retries=0)
    there.rmdir()
    enqueue(far, "make", f"mkdir {there}", priority=1)
    far.drain("--launcher", f"[ -d {there} ] || mkdir {there}; cd {{cwd}}; sh -c {{command}}")
    assert far.job("a")["stdout"] == far.job("b")["stdout"] == f"{there}\n"
    there.rmdir()
    far.run("enqueue", "--command", "pwd", "--id", "c", "--cwd", str(there), check=0)
    far.start("--launcher", "sh -c {command}")
    eventually(lambda: runs(far, "c") and runs(far, "c")[0][1], "it has failed")
    assert "cannot be started" in runs(far, "c")[0][1]
    far.run("cancel", "c")


# --- the end of what is elsewhere ------------------------------------------------------------


@pytest.mark.parametrize("how", ["timeout", "cancel", "now"])
def test_a_run_that_is_ended_from_outside_is_ended_there_too(far, how):
    enqueue(far, "a", DEAF, max_retries=0, **({"timeout": 2} if how == "timeout" else {}))
    far.start()
    lives(far, 1)
    if how == "cancel":
        far.run("cancel", "a", check=0)
    elif how == "now":
        far.run("worker", "stop", "--now", check=0)
    reaches(far, "a", {"timeout": "dead", "cancel": "cancelled", "now": "pending"}[how])
    seen = ledger(far)
    assert "stop 1" in seen
    time.sleep(0.2)
    assert ledger(far) == seen, "it lives on"


@pytest.mark.parametrize("what", ["launcher", "worker", "all", "all, and the settings are gone"])
def test_what_lives_elsewhere_is_ended_before_the_job_runs_again(far, what):
    enqueue(far, "a", DEAF)
    supervisor = far.start()
    lives(far, 1)
    [row] = far.workers()
    if what == "launcher":
        for pid in worker.session_members(row["pid"]):
            if pid != row["pid"]:
                worker.send(pid, signal.SIGKILL)
    else:
        for pid in [supervisor.pid] * (what != "worker") + worker.session_members(row["pid"]):
            worker.send(pid, signal.SIGKILL)
    seen = len(ledger(far))
    if what.startswith("all"):
        supervisor.wait()
        eventually(lambda: len(ledger(far)) > seen + 3, "it lives on, elsewhere")
        other = ["--launcher", far.launcher, "--launcher-stop", "exit 0"]
        far.start(*(other if "settings" in what else []))
    second_run_is_alone(far)
    assert "lost" in runs(far, "a")[0][1] or what == "launcher"


@pytest.mark.parametrize("boot", ["", "another boot"])
def test_a_run_that_was_never_launched_needs_its_stop_line_too(far, boot):
    """Its worker died between the claim and the start: who comes later cannot know. Nor does it
    matter that this machine was restarted meanwhile: the others were not."""
    enqueue(far, "a", "true")
    db, run = claimed(far, dead_pid(), boot=boot)
    line = worker.launched(config.load(far.config), run).stop_line
    db.execute("UPDATE runs SET stop_line = ?", (line,))
    hands, told = settler(far)
    eventually(lambda: hands.look() or far.state("a") != "processing", "it is settled")
    assert told == ["failed"]
    assert ledger(far) == ["stop 1"]
    db.close()


def test_the_lines_are_stored_with_the_claim_before_anything_is_started(far):
    enqueue(far, "a", "true")
    db, _ = claimed(far, dead_pid())
    database.finish(db, database.held_by(db, "w1"), database.Result("stopped"), 0.0, 0, 0)
    settings = config.load(far.config)
    desk = worker.Desk(db, far.path, "w1", settings, lambda *_: None)
    run, _ = desk.claim()
    assert database.held_by(db, "w1") == run
    assert run.stop_line == config.expand(far.stop, command="true", id="a", attempt=1, cwd=run.cwd)
    for path in worker.output_paths(far.path, "w1"):
        os.unlink(path)
    db.close()


def test_a_session_here_is_empty_before_the_stop_line_runs(far):
    """Else what lives here could still start something there, behind the stop line's back."""
    here = "trap '' TERM; while echo here >> ledger; do sleep 0.01; done; : {command}"
    enqueue(far, "a", "true", max_retries=0, timeout=2)
    far.drain("--launcher", here, "--launcher-stop", f"cd {far.folder}; echo stop >> ledger")
    seen = ledger(far)
    assert seen.count("here") > 3 and seen.count("stop") == 2  # one is the trial at the start
    assert seen[-1] == "stop"


# --- a stop line that fails ------------------------------------------------------------------


def test_a_stop_line_that_fails_with_nothing_to_end_is_refused_at_the_start(far):
    (far.folder / "refuse").touch()
    done = far.run("worker", "start", "--drain", check=1)
    assert "launcher_stop must exit 0 when nothing is left to end" in done.stderr
    assert "nobody" in done.stderr
    assert "did not start" in far.run("worker", "start", "--detach", check=1).stderr
    far.run("worker", "start", "--drain", "--launcher", "", check=0)


def test_ctrl_c_while_the_stop_line_is_tried_ends_it(queue):
    line = f"echo $$ > {queue.folder}/pid; exec sleep 60"
    launch = ("--launcher", "sh -c {command}", "--launcher-stop", line)
    supervisor = queue.start(*launch, ready=False)
    pid = eventually(lambda: (queue.folder / "pid").exists() and (queue.folder / "pid").read_text())
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(20) == 130
    eventually(lambda: worker.process_birth(int(pid)) is None, "it has ended")


@pytest.mark.parametrize("where", ["worker", "supervisor"])
def test_a_job_waits_until_its_stop_line_succeeds_and_everybody_is_told(far, where):
    enqueue(far, "a", DEAF)
    supervisor = far.start()
    lives(far, 1)
    [row] = far.workers()
    (far.folder / "refuse").touch()
    members = worker.session_members(row["pid"])
    for pid in members:
        if pid != row["pid"] or where == "supervisor":
            worker.send(pid, signal.SIGKILL)
    eventually(lambda: ledger(far).count("stop 1") >= 3, "it is tried again")
    assert far.state("a") == "processing"
    lives(far, 1, len(ledger(far)))
    (far.folder / "refuse").unlink()
    second_run_is_alone(far)
    said = supervisor.log.read_text()
    assert "a may still run elsewhere: its stop line has failed (exit code 5, next try in " in said


def test_who_cannot_wait_for_a_stop_line_leaves_it_to_the_next_supervisor(far):
    enqueue(far, "a", DEAF)
    supervisor = far.start()
    lives(far, 1)
    (far.folder / "refuse").touch()

    def pressed() -> bool:  # two that come at once may be taken for one
        supervisor.send_signal(signal.SIGINT)
        time.sleep(0.1)
        return supervisor.poll() is not None

    eventually(pressed, "Ctrl+C, again and again, makes it leave")
    assert "stop 1" in ledger(far), "it was tried"
    assert far.state("a") == "processing"
    said = far.run("worker", "stop", "--timeout", "1s", check=1).stderr
    assert said.endswith("still there after 1.0 s: what a lost run has left\n"), "no dead pids"
    (far.folder / "refuse").unlink()
    far.start()
    second_run_is_alone(far)


def test_a_run_that_another_has_settled_is_left_alone(far):
    """Its next run may be there by now, of the same name: it must not be hit by a late try."""
    enqueue(far, "a", "true")
    db, run = claimed(far, dead_pid())
    line = worker.launched(config.load(far.config), run).stop_line
    db.execute("UPDATE runs SET stop_line = ?", (line,))
    (far.folder / "refuse").touch()
    (late, _), (other, _) = settler(far), settler(far)
    eventually(lambda: late.look() or ledger(far), "it has tried once")
    (far.folder / "refuse").unlink()
    eventually(lambda: other.look() or far.state("a") != "processing", "another settles it")
    tried = ledger(far)
    eventually(lambda: late.look() or not late.endings, "it has seen that")
    assert ledger(far) == tried
    db.close()


def test_a_stranger_with_the_pid_of_a_lost_worker_does_not_switch_its_stop_line_off(far):
    """Whoever has a database of his own open would pass for a worker of another queue."""
    enqueue(far, "a", "true", max_retries=0)
    db, run = claimed(far, dead_pid())
    line = worker.launched(config.load(far.config), run).stop_line
    opens = f"""import sqlite3
db = sqlite3.connect({str(far.folder / "other.db")!r})
db.executescript("PRAGMA journal_mode = WAL; CREATE TABLE other (a)")
input(print(flush=True))"""
    words = [sys.executable, "-c", opens]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
        stranger.stdout.readline()
        assert worker.works_elsewhere(stranger.pid, far.path)
        db.execute("UPDATE runs SET stop_line = ?", (line,))
        db.execute("UPDATE workers SET pid = ?", (stranger.pid,))
        hands, _ = settler(far)
        eventually(lambda: hands.look() or far.state("a") != "processing", "it is settled")
        assert ledger(far) == ["stop 1"] and stranger.poll() is None
        stranger.communicate(b"\n")
    db.close()


@pytest.mark.parametrize("how", ["it leaves", "another has settled the run"])
def test_a_try_is_not_left_running(queue, how):
    enqueue(queue, "a", "true")
    db, run = claimed(queue, dead_pid())
    line = f"echo $$ > {queue.folder}/pid; exec sleep 60"
    db.execute("UPDATE runs SET stop_line = ?", (line,))
    put_back = partial(database.finish, db, run, database.Result("stopped"), time.time(), 0, 0)
    hands, _ = settler(queue)
    path = queue.folder / "pid"
    pid = eventually(lambda: hands.look() or (path.exists() and path.read_text()), "a try")
    if how == "it leaves":
        hands.close()
    else:
        put_back()
        eventually(lambda: hands.look() or not hands.endings, "it has seen that")
    eventually(lambda: worker.process_birth(int(pid)) is None, "it has ended")
    put_back()
    db.close()


def test_a_try_is_not_left_running_when_the_queue_is_removed(queue):
    hang, file = queue.folder / "hang", queue.folder / "pid"
    line = f"if [ -e {hang} ]; then echo $$ > {file}; exec sleep 60; fi"
    enqueue(queue, "a", "sleep 60")
    process = queue.start("--launcher", "sh -c {command}", "--launcher-stop", line)
    reaches(queue, "a", "processing")
    hang.touch()
    worker.send(queue.workers()[0]["pid"], signal.SIGKILL)
    pid = int(eventually(lambda: file.exists() and file.read_text(), "a try"))
    (queue.folder / "queue.db").unlink()
    assert process.wait(20) == 1
    eventually(lambda: worker.process_birth(pid) is None, "it has ended")


def far_end(line: str, leader: bool = True) -> tuple[worker.FarEnd, list[str]]:
    run = database.Run(1, "w1", 0, 1, "a", 1, 0, 0, "true", "/", 0, "", line)
    said: list[str] = []
    return worker.FarEnd(run, lambda verb, text: said.append(text), leader), said


def test_a_try_that_does_not_end_is_ended_and_counts_as_failed(tmp_path):
    far, said = far_end(f"echo $$ > {tmp_path}/pid; sleep 60 & wait")
    assert not far.reached(100.0)
    pid = int(eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert not far.reached(100.0 + worker.STOP_LIMIT_S - 0.1) and not said
    eventually(lambda: far.reached(100.0 + worker.STOP_LIMIT_S) or said, "it was killed")
    assert "killed by SIGKILL, next try in 0.5 s" in said[0]
    eventually(lambda: not worker.session_members(pid), "with its children")


def test_tries_come_less_often_and_never_end(tmp_path):
    far, said = far_end(f"echo try >> {tmp_path}/tries; exit 9")
    now = 0.0
    for number in range(1, 12):
        eventually(lambda: far.reached(now) or len(said) == number, "a try")  # noqa: B023
        pause = min(60.0, 0.25 * 2**number)
        assert f"next try in {database.duration_text(pause)}" in said[-1]
        assert not far.reached(now + pause - 0.01) and far.child is None
        now += pause
    assert (tmp_path / "tries").read_text().count("try") == 11
    far.tries = 2000  # a day and a half later: 2.0 ** 2000 is more than a float can hold
    eventually(lambda: far.reached(now) or len(said) == 12, "a try")
    assert "next try in 1 min 0 s" in said[-1]


def test_a_stop_line_that_fails_is_refused_also_where_sigchld_was_inherited_as_ignored(queue):
    """The kernel then forgets exit codes, and to Python each child has ended well."""
    ignoring = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
    ignoring += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    words = ["worker", "start", "--drain", "--launcher", "sh -c {command}"]
    done = subprocess.run(
        [sys.executable, "-c", ignoring, ROOT / "queuectl.py", *words, "--launcher-stop", "false"],
        env=queue.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "must exit 0" in done.stderr
