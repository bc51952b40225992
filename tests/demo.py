"""A guided walk: the queue at work, scene by scene, with real processes on a throw-away queue.

    python3 queuectl.py demo [--list] [--pause] [NAME ...]

A test that talks. Each scene is a function below; its docstring says what is about to happen. It
types the commands that a user would type, shows what comes out, and checks it: exit 1 on any cross.
Whatever happens, Ctrl+C too, no process and no file is left. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import database  # noqa: E402  to check, which is quicker than by the command line,
import worker  # noqa: E402  and to see which processes live

SETTINGS = {"backoff_base": 0.5, "backoff_jitter": 0, "kill_grace_s": 1}
SCENE_S = 60  # a scene that takes longer hangs
DEADLINE_S = 20  # what is waited for comes sooner, or never
MOST_LINES = 14
LEAVE = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
Bar = tuple[str, float, float, str]  # (lane, from, to, name)

# A job that keeps a ledger of its own: times that do not come from the queue.
STUBBORN = """\
import os, signal, time

def note(what):
    with open("ledger", "a") as ledger:
        print(time.time(), os.environ["QUEUECTL_ATTEMPT"], what, file=ledger)

signal.signal(signal.SIGTERM, lambda *_: note("is asked to end, and does not listen"))
note("begins")
for _ in range(40 if os.environ["QUEUECTL_ATTEMPT"] == "1" else 8):
    time.sleep(0.1)
    note("works")
note("is done")
"""

TREE = """\
sleep 60 &                  # a child in the background,
set -m; sleep 60 & set +m   # one in a process group of its own,
(sleep 60; true) &          # a grandchild;
trap '' TERM; sleep 60      # and this one does not listen to SIGTERM
"""


# --- how it looks ----------------------------------------------------------------------------


def can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


TICK, CROSS, CUT, BAR, RULE = "✓✗…━─" if can_print("✓✗…━─") else ("ok", "FAILED", "~", "=", "-")
COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32"}


def width() -> int:
    return max(40, min(shutil.get_terminal_size((100, 24)).columns, 120))


def say(text: str = "", *style: str) -> None:
    """Print a line; coloured on a terminal only."""
    if style and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        text = "".join(f"\x1b[{COLOURS[each]}m" for each in style) + text + "\x1b[0m"
    print(text, flush=True)


def say_cut(text: str, *style: str) -> None:
    """Print a line, cut to the width of the terminal: in the middle, for its end says the most."""
    say(text if len(text) <= width() else text[: width() - 25] + CUT + text[-24:], *style)


def draw(bars: list[Bar]) -> None:
    """Draw bars on a common time axis, one row a lane."""
    lanes = sorted({lane for lane, *_ in bars})
    head = max(map(len, lanes))
    first, last = min(bar[1] for bar in bars), max(bar[2] for bar in bars)
    room = width() - head - 12
    scale = room / max(last - first, 0.001)
    say()
    for lane in lanes:
        row = " " * room
        for _, begin, end, name in sorted(bar for bar in bars if bar[0] == lane):
            at, to = round((begin - first) * scale), round((end - first) * scale)
            row = row[:at] + name.ljust(max(to - at - 1, 1), BAR) + row[max(to - 1, at + 1) :]
        say(f"    {lane:<{head}}  {row.rstrip()}", "bold")
    axis = f"0 s{f'{(last - first) / 2:.1f} s':^{room - 9}}{last - first:.1f} s"
    say(f"    {'':<{head}}  {axis}", "dim")


def overlaps(bars: list[Bar]) -> list[tuple[Bar, Bar]]:
    """Return the pairs that follow each other in one lane and overlap."""
    found = sorted(bars)
    return [(one, two) for one, two in pairwise(found) if one[0] == two[0] and one[2] > two[1]]


def bars_of(jobs: list[dict[str, Any]], lane: str = "worker") -> list[Bar]:
    """Return the ended runs of jobs as bars, in the lanes of their workers or of their jobs."""
    found = []
    for job in jobs:
        # Named by the comment at the end of the command, else by its id.
        name = job["command"].partition(" # ")[2] or job["id"]
        for run in [run for run in job["runs"] if run["finished_at"]]:
            span = epoch(run["started_at"]), epoch(run["finished_at"])
            found.append((name if lane == "job" else run["worker"], *span, name))
    return found


def epoch(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


# --- what a scene works with -----------------------------------------------------------------


class Broken(Exception):
    """The scene cannot go on."""


class Stage:
    """A throw-away queue, and the hands of a user at it."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.path = str(self.folder / "queue.db")
        self.good = self.bad = 0
        self.started: list[subprocess.Popen] = []
        (self.folder / "config.json").write_text(json.dumps(SETTINGS))
        kept = {key: text for key, text in os.environ.items() if not key.startswith("QUEUECTL_")}
        self.environment = kept | {
            "QUEUECTL_DB": self.path,  # also the mark of all we start: `marked`
            "QUEUECTL_CONFIG": str(self.folder / "config.json"),
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}",
        }

    def start(self, *words: str, **streams: Any) -> subprocess.Popen:
        """Start queuectl in a session of its own, so that Ctrl+C reaches us alone."""
        call = [sys.executable, str(ROOT / "queuectl.py"), *words]
        place = dict(cwd=self.folder, env=self.environment, start_new_session=True)
        process = subprocess.Popen(call, **place, **streams)
        self.started.append(process)
        return process

    def type(self, *words: str, given: str = "", code: int = 0, most: int = MOST_LINES) -> str:
        """Type a command, show what it prints as it comes, return that."""
        feed = f"printf {shlex.quote(given.encode('unicode_escape').decode())} | " if given else ""
        self.typed(f"{feed}queuectl.py {shlex.join(words)}")
        pipe = subprocess.PIPE
        process = self.start(*words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
        process.stdin.write(given.encode())
        process.stdin.close()
        lines = []
        for raw in process.stdout:
            lines.append(raw.decode(errors="replace").rstrip())
            if len(lines) <= most:
                say_cut(f"    {lines[-1]}")
        if len(lines) > most:
            say(f"    ({len(lines) - most} more lines)", "dim")
        if process.wait() != code:
            self.check(False, f"its exit code is {code}; it was {process.returncode}")
            raise Broken
        return "\n".join(lines)

    def typed(self, command: str) -> None:
        say()
        lines = textwrap.wrap(command, width() - 6, break_on_hyphens=False)
        say("  $ " + "\n      ".join(lines), "bold")

    def write(self, name: str, text: str) -> None:
        """Write a file, and show it."""
        (self.folder / name).write_text(text)
        self.typed(f"cat {name}")
        say(textwrap.indent(text.rstrip(), "    "))

    def jobs(self) -> list[dict[str, Any]]:
        """Return all jobs in the order in which they came, each as `show ID --json` prints it."""
        with closing(database.connect(self.path)) as db:
            found = [database.as_object(row) for row in database.jobs_in(db, [], -1)]
            for job in found:
                runs = database.runs(db, database.find(db, job["id"]))
                job["runs"] = [database.as_object(run) for run in runs]
        return found

    def job(self, id: str) -> dict[str, Any]:
        return next(job for job in self.jobs() if job["id"] == id)

    def workers(self, busy: int = 0, idle: int = 0) -> list[Any]:
        """Wait until so many workers have a job, and so many have none; return all."""

        def found() -> list[Any]:
            with closing(database.connect(self.path)) as db:
                rows = worker.live_workers(db)
            at_work = sum(row["job"] is not None for row in rows)
            return rows if at_work >= busy and len(rows) - at_work >= idle else []

        return self.until(found, f"{busy} workers with a job and {idle} without are there")

    def until(self, look: Callable[[], Any], what: str) -> Any:
        """Look again and again until there is something to see; return that."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := look()):
            if time.monotonic() > deadline:
                self.check(False, f"{what}, within {DEADLINE_S} s")
                raise Broken
            time.sleep(0.02)
        return found

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def kill(self, *pids: int) -> None:
        self.typed(f"kill -9 {' '.join(map(str, pids))}")
        for pid in pids:
            worker.send(pid, signal.SIGKILL)

    def check(self, ok: bool, text: str) -> None:
        self.good += bool(ok)
        self.bad += not ok
        for part, line in enumerate(textwrap.wrap(text, width() - 4)):
            mark = (TICK if ok else CROSS) if part == 0 else " " * len(TICK)
            say(f"  {mark} {line}", "green" if ok else "red")

    def end(self) -> None:
        """Let the workers leave; then end, without asking, whatever should have left by then."""
        if self.left() or not os.path.isdir("/proc/self"):
            quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            with suppress(subprocess.TimeoutExpired):
                self.start("worker", "stop", "--now", "--timeout", "10s", **quiet).wait(20)
        deadline = time.monotonic() + 3
        while (late := self.left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        while left := self.left():
            for pid in left:
                worker.send(pid, signal.SIGKILL)
            time.sleep(0.02)
        if late:
            self.check(False, f"nothing is left running; there was {', '.join(map(str, late))}")

    def left(self) -> list[int]:
        """Return what lives of all that was started here."""
        for process in self.started:
            process.poll()
        return marked(self.folder)


def marked(folder: Path) -> list[int]:
    """Return the processes that have inherited our mark. (Where there is no /proc: none.)"""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc/self") else []):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue  # gone, or not ours
        if os.fsencode(folder) in environment:
            found.append(int(pid))
    return found


# --- the scenes ------------------------------------------------------------------------------


def complete(on: Stage) -> None:
    """A job goes into the queue, a worker takes it, runs it, and keeps what it printed."""
    on.type("enqueue", "--id", "hello", "--command", "echo hello from $QUEUECTL_JOB_ID")
    on.type("worker", "start", "--drain")
    said = on.type("logs", "hello")
    job = on.job("hello")
    on.check(job["state"] == "completed" and job["exit_code"] == 0, "it is completed, exit code 0")
    on.check("hello from hello" in said, "its output is kept")


def retry(on: Stage) -> None:
    """A job that fails is tried again, later each time (backoff_base ** attempts seconds). When its
    runs are used up it lies in the dead letter queue (DLQ); mended, it is sent back from there."""
    job = {"command": "cat sales.csv", "id": "report", "max_retries": 2, "backoff_base": 1.5}
    on.type("enqueue", json.dumps(job))
    on.type("worker", "start", "--drain")
    on.type("dlq", "list")
    job = on.job("report")
    runs = bars_of([job])
    on.check(job["state"] == "dead" and len(runs) == 3, "dead after 3 runs: 1 + max_retries")
    waits = [two[1] - one[2] for one, two in pairwise(runs)]
    text = ", then ".join(f"{wait:.2f} s" for wait in waits)
    on.check(all(wait >= 1.5**n for n, wait in enumerate(waits, 1)), f"it waited {text}")
    on.typed("echo 1,2,3 >sales.csv")
    (on.folder / "sales.csv").write_text("1,2,3\n")
    on.type("dlq", "retry", "report")
    on.type("worker", "start", "--drain")
    job = on.job("report")
    on.check((job["state"], job["attempts"]) == ("completed", 1), "completed, on run 1 again")
    on.check(len(job["runs"]) == 4, "its history has all 4 runs")


def unknown(on: Stage) -> None:
    """A command that nobody knows is a failure like any other; its worker goes on."""
    on.type("enqueue", "--id", "typo", "--command", "gti status", "--max-retries", "0")
    on.type("enqueue", "--id", "next", "--command", "echo still here")
    on.type("worker", "start", "--drain")
    typo, after = on.jobs()
    on.check(typo["state"] == "dead" and typo["exit_code"] == 127, "dead, with exit code 127")
    on.check("not found" in typo["last_error"], f"and the reason is kept: {typo['last_error']}")
    same = typo["worker"] == after["worker"]
    on.check(after["state"] == "completed" and same, "the same worker has run the next job")


def lanes(on: Stage) -> None:
    """Three workers share five jobs. The picture is drawn from the times that the queue recorded:
    a row for each worker, a bar for each run."""
    on.type("worker", "start", "--count", "3", "--detach")
    spans = {"a": 1.0, "b": 0.6, "c": 0.8, "d": 0.7, "e": 0.5}
    on.write("jobs.txt", "".join(f"sleep {span} # {name}\n" for name, span in spans.items()))
    on.type("enqueue", "--file", "jobs.txt", "--lines")
    on.type("wait")
    jobs = on.jobs()
    draw(bars := bars_of(jobs))
    on.check(sorted(bar[3] for bar in bars) == [*spans], "each of the five ran once")
    on.check(len({bar[0] for bar in bars}) == 3, "all three workers took part")
    on.check(not overlaps(bars), "no worker ran two at a time")
    on.check(not overlaps(bars_of(jobs, "job")), "no job ran twice at a time")
    took, work = max(bar[2] for bar in bars) - min(bar[1] for bar in bars), sum(spans.values())
    on.check(took < work, f"{work:.1f} s of work were done in {took:.1f} s")


def order(on: Stage) -> None:
    """Higher priorities run first; a scheduled job, however important, waits for its time and holds
    up nobody. There is one worker, so that the order can be seen."""
    for id, priority in (("normal", 0), ("low", -5), ("urgent", 10)):
        on.type("enqueue", "--id", id, "--command", "true", "--priority", str(priority))
    on.type("enqueue", *"--id later --command true --priority 100 --delay 3s".split())
    on.type("list")
    on.type("worker", "start", "--drain")
    runs = sorted(bars_of(on.jobs()), key=lambda bar: bar[1])
    told = ", ".join(bar[3] for bar in runs)
    on.check(told == "urgent, normal, low, later", f"they ran in this order: {told}")
    job = on.job("later")
    late = epoch(job["started_at"]) - epoch(job["run_at"])
    on.check(0 <= late < 1, f"the scheduled one began {late * 1000:.0f} ms after its time")


def tree(on: Stage) -> None:
    """A job that takes too long is ended with all that it has started: children in the background,
    in process groups of their own, and those that do not listen."""
    shell = "bash" if shutil.which("bash") else "sh"  # some sh know no set -m without a terminal
    on.write("tree.sh", TREE)
    on.type("worker", "start", "--detach")
    on.type("enqueue", "--command", f"{shell} tree.sh", *"--timeout 1s --max-retries 0".split())
    leader = on.workers(busy=1)[0]["pid"]

    def family() -> list[int]:
        pids = [pid for pid in worker.session_members(leader) if pid != leader]
        return pids if len(pids) >= 6 else []

    pids = on.until(family, "the job has started its children")
    births = {pid: worker.process_birth(pid) for pid in pids}
    if shutil.which("ps"):
        command = ["ps", "-o", "pid,pgid,args", "-p", ",".join(map(str, pids))]
        on.typed(shlex.join(command))
        for line in subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines():
            say_cut(f"    {line}")
    on.until(lambda: on.jobs()[0]["state"] == "dead", "the job is ended")
    on.type("dlq", "list")
    [job] = on.jobs()
    error = f"ended by signal {-(job['exit_code'] or 0)}: {job['last_error']}"
    on.check("timed out" in error, error)
    alive = [pid for pid in pids if worker.process_birth(pid) == births[pid] is not None]
    on.check(not alive, f"of its {len(pids)} processes {len(alive)} are left")


def kill(on: Stage) -> None:
    """A worker is killed with -9 in mid-job, and the job's own process lives on. The job comes
    back, but not before that process has been ended. The job keeps a ledger of its own."""
    on.write("job.py", STUBBORN)
    on.type("worker", "start", "--detach")
    on.type("enqueue", "--id", "ledger", "--command", "python3 job.py")
    on.until(lambda: len(on.lines("ledger")) >= 4, "the job works")
    [lost] = on.workers(busy=1)
    killed = time.time()
    on.kill(lost["pid"])
    on.until(lambda: on.job("ledger")["attempts"] == 2, "it is claimed again")
    on.type("wait")
    notes = [line.split(" ", 2) for line in on.lines("ledger")]
    notes = [(float(when), f"run {attempt}", what) for when, attempt, what in notes]
    zero, spans = notes[0][0], {}
    for when, run, _ in notes:
        spans[run] = (spans.get(run, (when,))[0], when)
    told = [(when, f"{run} {what}") for when, run, what in notes if what != "works"]
    told += [(spans["run 1"][1], "run 1 gives its last sign of life")]
    say("\n  what the ledger says:")
    for when, what in sorted([*told, (killed, f"{lost['worker']} is killed")]):
        say_cut(f"    {when - zero:5.2f} s  {what}")
    draw([(run, begin, end, "") for run, (begin, end) in spans.items()])
    job = on.job("ledger")
    on.check(job["state"] == "completed" and len(spans) == 2, "it came back, and is completed")
    end, begin = spans["run 1"][1] - zero, spans["run 2"][0] - zero
    text = (
        f"never two at once: the last of run 1 is from {end:.2f} s, run 2 begins at {begin:.2f} s"
    )
    on.check(end < begin, text)
    error = job["runs"][0]["error"]
    on.check(error.startswith("worker lost"), f"the history says of run 1: {error}")


def restart(on: Stage) -> None:
    """Everything is killed while three jobs run and three wait: the workers, and who started them.
    Then the workers are started again. The runs that live on are ended before their jobs come
    back; the three that wait need not wait for that."""
    on.type("worker", "start", "--count", "3", "--detach")
    on.write("jobs.txt", "".join(f"sleep 0.8; echo {name} >>done # {name}\n" for name in "abcdef"))
    on.type("enqueue", "--file", "jobs.txt", "--lines")
    workers = on.workers(busy=3)
    on.kill(workers[0]["supervisor_pid"], *(each["pid"] for each in workers))
    on.type("list")
    on.type("worker", "start", "--count", "3", "--drain", most=20)
    jobs = on.jobs()
    bars = bars_of(jobs, "job")
    on.check([job["state"] for job in jobs] == ["completed"] * 6, "all six are completed")
    on.check({*on.lines("done")} == {*"abcdef"}, "and each has done its work")
    lost = [job for job in jobs if (job["runs"][0]["error"] or "").startswith("worker lost")]
    on.check(len(lost) == 3, "three were lost in mid-run, and ran again")
    on.check(not overlaps(bars), "no job ran twice at a time")


def race(on: Stage) -> None:
    """Two idle workers wait for the time of one job. It comes, both see it, and both try to take
    it. With --explain it can be watched: the guard in WHERE lets only one of them change the
    row."""
    on.typed("queuectl.py --explain worker start --count 2 2>explained &")
    null = subprocess.DEVNULL
    with open(on.folder / "explained", "wb") as log:
        words = "--explain", "worker", "start", "--count", "2"
        on.start(*words, stdin=null, stdout=null, stderr=log)
    names = {str(row["pid"]): row["worker"] for row in on.workers(idle=2)}
    on.typed("queuectl.py enqueue --command true --delay 0.5s")
    tries, lost, deadline = 0, [], time.monotonic() + 2 * DEADLINE_S
    while not lost and time.monotonic() < deadline:
        tries += 1
        on.start("enqueue", *"--command true --delay 0.5s".split(), stdout=null).wait()
        lost = [
            n
            for n, line in enumerate(on.lines("explained"))
            if "SET state" in line and "was faster" in line
        ]
    told = "until both reached for one job; lines come as statements end"
    say(f"    (typed {database.plural(tries, 'time')}, {told})", "dim")
    if lost:
        on.typed("grep claim explained  # shortened, the worker's name for its pid")
        show_race(on.lines("explained"), lost[0], names)
    on.check(bool(lost), "two workers reached for one job")
    on.until(lambda: all(job["finished_at"] for job in on.jobs()), "all jobs have run")
    jobs = on.jobs()
    once = all(len(job["runs"]) == 1 and job["state"] == "completed" for job in jobs)
    on.check(once, f"each of the {len(jobs)} jobs ran once")


def show_race(shown: list[str], at: int, names: dict[str, str]) -> None:
    """Show what two workers did from their looks to the UPDATE at line `at`, which was too late."""
    row = re.search(r"WHERE seq = \d+ ", shown[at])[0]
    won = next(n for n, line in enumerate(shown) if row in line and "it is mine" in line)
    pids = {n: shown[n].split()[1] for n in (won, at)}
    claims = [n for n, line in enumerate(shown) if " claim:" in line]
    claims = [n for n in claims if " INSERT " not in shown[n] and " SET due " not in shown[n]]
    first = min(
        max((k for k in claims if k < n and pid in shown[k] and "SELECT" in shown[k]), default=n)
        for n, pid in pids.items()
    )
    end = next(n for n in claims if n > at and pids[at] in shown[n])
    for line in [shown[n] for n in claims if first <= n <= end]:
        head, _, text = re.split(r"( ms +(?:\d+ rows? (?:changed )?)? +)", line, maxsplit=1)
        _, pid, _, took = head.split()
        text, _, remark = text.rstrip().partition("  <- ")
        # What matters, within 80 columns.
        text = re.sub(r"(?<=SELECT ).*(?=FROM jobs)|(?<=UPDATE ).*(?=WHERE)", "... ", text)
        text = re.sub(r" (AND run_at|AND \+state|ORDER BY).*", "", text)
        say_cut(f"    {names.get(pid, pid):<3} {took:>6} ms  {text}")
        if remark:
            say(f"                   <- {remark}", "bold")


SCENES = {
    scene.__name__: scene
    for scene in (complete, retry, unknown, lanes, order, tree, kill, restart, race)
}


# --- the walk --------------------------------------------------------------------------------


def play(position: int, name: str, folder: str) -> Stage:
    """Play one scene, and leave nothing of it behind."""
    title = f"{RULE * 2} {position}. {name} "
    say("\n" + title + RULE * (width() - len(title)), "bold")
    for line in textwrap.wrap(" ".join(SCENES[name].__doc__.split()), width()):
        say(line)
    on = Stage(folder)
    try:
        signal.alarm(SCENE_S)
        SCENES[name](on)
    except Broken:
        pass  # said already
    except Exception as error:
        on.check(False, f"the scene broke: {type(error).__name__}: {error}")
    finally:
        for number in LEAVE:
            signal.signal(number, signal.SIG_IGN)  # cleaning up is short, and must not be cut short
        signal.alarm(0)
        on.end()
        listen()
    return on


def listen() -> None:
    """Take every way to be told to leave as one: an exception, which passes through `play`."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    def hang(*_: Any) -> None:
        raise TimeoutError(f"no end after {SCENE_S} s")

    for number in LEAVE:
        signal.signal(number, leave)
    signal.signal(signal.SIGALRM, hang)


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--pause", action="store_true")
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    if wrong := [name for name in asked.names if name not in SCENES]:
        text = f"Error: no scene {json.dumps(wrong[0])}; there are: {', '.join(SCENES)}"
        print(text, file=sys.stderr)
        return 2
    if asked.list:
        for name, scene in SCENES.items():
            say(f"{name:<9} {textwrap.shorten(scene.__doc__, width() - 10, placeholder=CUT)}")
        return 0
    listen()
    sys.stdout.reconfigure(errors="backslashreplace")
    chosen, began, bad, good = asked.names or [*SCENES], time.monotonic(), [], 0
    settings = ", ".join(f"{key} {value}" for key, value in SETTINGS.items())
    told = f"A throw-away queue, real processes. Settings for the sake of speed: {settings}."
    say("\n".join(textwrap.wrap(told, width())))
    for number, name in enumerate(chosen, 1):
        with tempfile.TemporaryDirectory(prefix="queuectl-demo-") as folder:
            on = play(number, name, folder)
        good += on.good
        bad += [name] * on.bad
        if asked.pause and number < len(chosen):
            say("\nEnter goes on ...", "dim")
            sys.stdin.readline()
    took = f"in {time.monotonic() - began:.1f} s; nothing is left behind"
    if bad:
        failed = f"{len(bad)} of {good + len(bad)} checks failed ({', '.join(dict.fromkeys(bad))})"
        say(f"\n{CROSS} {failed} {took}", "bold", "red")
        return 1
    scenes = f"{len(chosen)} scenes" if len(chosen) > 1 else "1 scene"
    say(f"\n{TICK} {scenes}, {good} checks, all as promised, {took}", "bold", "green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
