"""The hands: the supervisor, the worker's loop, one run of one job, the end of a process tree.

Owns every process: nothing else starts or signals one. Must not hold SQL (database.py does) nor
print: what happens is told to `say`, a function of the face.

    supervisor          heartbeats, timeouts, cancels, replacements, fence and reclaim
      +- worker 1       claim, run, record, again; leader of a session of its own
      |    +- /bin/sh -c COMMAND, and all that it starts: the same session
      +- worker N

So "a run and all that it started" is a thing the kernel can name, whatever process groups a job
makes. A worker is disposable: to end a run its session is ended, the worker with it.
"""

from __future__ import annotations

import fcntl
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

import config
import database
from database import QueueError, Result, Run, duration_text

Settings = dict[str, Any]
Say = Callable[[str, int, str, str], None]  # (who, pid, verb, the rest of the line)

BUSY_TICK_S = 0.1  # between two looks while a run is known: how late its timeout is noticed
IDLE_TICK_S = 0.5  # and while none is
TURN_LIMIT_S = 1.0  # the longest wait for one's turn to write
SHORT_S = 0.03  # in so short a run no machine gives all its pids, 32,768 or more, once round
HANG_S = 5.0  # after SIGKILL: then a process that is still there is named
STOP_LIMIT_S = 30.0  # for each try of a stop line
STOP_PAUSE_S = 60.0  # the longest between two tries
OUTPUT_BOUND = 16 * 2**20  # bytes on disk of an output file, beyond the end of it that is kept
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DAMAGED = 3  # a worker's exit code: the queue is beyond trying again
# Inherited as ignored, it would hide every exit code: of workers, of jobs, of stop lines.
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
NOT_COUNTED = ("stopped", "stopped with its worker; not counted")


# --- the supervisor --------------------------------------------------------------------------


class Ending:
    """A session on its way out, and what is to be recorded once nothing of it is left."""

    def __init__(self, worker: Any, outcome: str, error: str, kill_at: float):
        self.worker = worker  # its row of database.workers
        self.outcome, self.error = outcome, error
        self.kill_at = kill_at  # when, on the monotonic clock, asking turns into SIGKILL
        self.asked: set[int] = set()
        self.last_signal, self.told = signal.SIGTERM, False
        self.far: FarEnd | None = None  # once nothing is left here


class FarEnd:
    """The end of what a run may have left elsewhere: its stop line, until it has exited 0.

    There is no last try: as long as the line fails something may live there, and then the job must
    not run again. But the pauses grow, and each failure is said.
    """

    def __init__(self, run: Run, say: Callable[[str, str], None], leader: bool):
        self.run, self.say = run, say
        self.leader = leader  # whether each try leads a session of its own; a worker's does not
        self.child, self.tries, self.due = None, 0, 0.0

    def reached(self, mono: float) -> bool:
        """Begin, end or await a try; say whether one has succeeded. Never blocks."""
        code, why = None, ""
        if self.child is None and mono >= self.due:
            try:
                words = [b"/bin/sh", b"-c", self.run.stop_line.encode()]
                where = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/")
                self.child = subprocess.Popen(words, **where, start_new_session=self.leader)
            except OSError as error:  # no more processes: no reason to stop ending the others
                code, why = 1, error.strerror
            self.due = mono + STOP_LIMIT_S
        code = self.child.poll() if self.child else code
        if self.child and code is None and mono >= self.due:
            send(-self.child.pid if self.leader else self.child.pid, signal.SIGKILL)
        if code:
            self.tries, self.child = self.tries + 1, None
            pause = min(STOP_PAUSE_S, 0.25 * 2 ** min(self.tries, 8))
            self.due = mono + pause
            how = f"{why or signal_text(code)}, next try in {duration_text(pause)}"
            told = f"{self.run.job} may still run elsewhere: its stop line has failed"
            self.say("trouble", f"{told} ({how}): {self.run.stop_line}")
        return code == 0

    def give_up(self) -> None:
        """End a try that is under way: later on its line could hit the next run of the job."""
        if self.child and self.child.poll() is None:
            send(-self.child.pid, signal.SIGKILL)


class Supervisor:
    """Keeps `count` workers alive and settles what is lost; with count 0 it only settles."""

    def __init__(
        self, path: str, settings: Settings, say: Say, count: int = 0, drain: bool = False
    ):
        self.path, self.settings, self.say = path, settings, say
        self.count, self.drain = count, drain
        self.pid = os.getpid()
        self.id = 0  # no supervisor's, until registered
        self.children: dict[int, Any] = {}  # pid: multiprocessing.Process
        self.endings: dict[str, Ending] = {}  # by the worker's name
        self.silences: dict[int, tuple[float, float]] = {}  # supervisor: (heartbeat, silent for)
        self.stopped_at: dict[int, float] = {}  # pid: since when it was seen stopped
        # A signal, or 1: finish the running jobs and leave; 2: put them back now; 3: without grace.
        self.signals, self.asked = [], 0
        self.fatal = ""  # why there is no point in going on
        self.trouble = ""  # what was said last of a database that cannot be used
        self.busy = self.told = False  # whether jobs of ours run; whether it was said that we leave
        self.looked_at = 0.0  # when we last looked
        self.beat_at = 0.0  # when the next heartbeat may be
        self.db, self.file, self.beside = None, None, {}  # its files as `file_key` has them
        self.patience_s = database.BUSY_TIMEOUT_S
        if count:  # for who has the lock may be a stopped worker, which we are to end
            self.patience_s = min(self.patience_s, settings["lock_timeout_s"])

    def run(self) -> None:
        """Work until told to stop or, draining, until nothing is left to do."""
        with closing(self):  # also if the queue is gone, in the end
            self.begin()
            self.look()  # first what others left behind; who resists its end holds up its job alone
            while not (self.stopping and not self.children):
                self.keep_count()
                self.sleep()
                self.look()
            database.remove_supervisor(self.queue(), self.id)
        self.say("supervisor", self.pid, "left", "")
        if self.fatal:
            raise QueueError(self.fatal)

    def begin(self) -> None:
        make_run_directory(self.path)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if 2 * self.count + 32 > files:
            needed = f"--count {self.count} needs {2 * self.count + 32} open files"
            raise QueueError(f"{needed}, the limit is {files}; raise it with ulimit -n")
        if not process_birth(self.pid):
            raise QueueError("processes cannot be seen here: /proc (on macOS ps) tells nothing")
        self.wake, self.signals = await_signals()
        self.try_stop_line()
        # Workers read end of file here when the supervisor is gone, however it went.
        self.lifeline, self.lifeline_write = os.pipe()
        me = os.uname().nodename, boot_id(), self.pid, process_birth(self.pid) or "", time.time()
        self.id = database.register_supervisor(self.queue(), *me, self.settings["lock_timeout_s"])
        told = f"{database.plural(self.count, 'worker')} on {self.path}; Ctrl+C stops"
        self.say("supervisor", self.pid, "started", told)

    def try_stop_line(self) -> None:
        """Refuse a stop line that fails when nothing is to be ended: each end would wait for it."""
        run = launched(self.settings, Run(0, "", 0, 0, "nobody", 0, 0, 0, "true", "/", 0))
        far = FarEnd(run, lambda *_: None, leader=True)
        try:
            while run.stop_line and not far.reached(time.monotonic()):
                if far.tries:
                    what = "launcher_stop must exit 0 when nothing is left to end"
                    raise QueueError(f"{what}; this does not: {run.stop_line}")
                if self.signals:  # only noted, for a Popen that is broken off forgets its child
                    raise KeyboardInterrupt
                time.sleep(0.01)
        finally:
            far.give_up()

    @property
    def stopping(self) -> int:
        return max(len(self.signals), self.asked, bool(self.fatal))

    def sleep(self) -> None:
        # Those of the dead that are being settled stay ready: waiting on them would be spinning.
        ending = {each.worker["pid"] for each in self.endings.values()}
        sentinels = [child.sentinel for pid, child in self.children.items() if pid not in ending]
        readable([*sentinels, self.wake], BUSY_TICK_S if self.busy or self.endings else IDLE_TICK_S)
        drained(self.wake)
        if self.pid == 1:
            self.bury_orphans()

    def bury_orphans(self) -> None:
        """Do what init does: in a container without one, jobs' orphans are ours when they end."""
        tries = [each.far.child for each in self.endings.values() if each.far]
        ours = self.children.keys() | {child.pid for child in tries if child}
        for pid in {*map(int, children(self.pid))} - ours:
            os.waitpid(pid, os.WNOHANG)

    def keep_count(self) -> None:
        """Fork workers in place of those that are gone or, stopping, tell them all to leave."""
        from multiprocessing import active_children, get_context

        if self.stopping:
            if self.signals and self.stopping == 1 and self.busy and not self.told:
                self.told = True
                text = "when the running jobs have ended; Ctrl+C again puts them back"
                self.say("supervisor", self.pid, "leaving", text)
            # Who is alive, or not reaped: so long the pid is still the child's.
            alive = [pid for pid, child in self.children.items() if child.exitcode is None]
            push(alive, set(), hard=False)
        failed = False
        while not failed and not self.stopping and len(self.children) < self.count:
            # SQLite's connections must not be carried over a fork (sqlite.org/howtocorrupt.html,
            # 2.6); a signal between it and the worker's own handlers would be lost: hold it back.
            self.disconnect()
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            pipes: list[int] = []
            try:
                active_children()  # closes those of the dead, which would come first
                for _ in range(2):  # the descriptors that those of multiprocessing will have
                    pipes += os.pipe()
                for handle in pipes:
                    os.close(handle)
                child = get_context("fork").Process(target=work, args=(self,), daemon=True)
                child.start()
                self.children[child.pid] = child
            except OSError as error:  # no more processes, no more memory
                for handle in pipes:  # multiprocessing leaves them open if it cannot fork
                    with suppress(OSError):
                        os.close(handle)
                self.say("supervisor", self.pid, "trouble", f"no new worker: {error.strerror}")
                failed = True
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if time.monotonic() > self.looked_at + IDLE_TICK_S:
                self.look()  # hundreds of forks take long, and others listen for our heartbeat
        if self.db is None:
            self.look()  # only while connected does one notice that a file was removed
        if failed:
            time.sleep(IDLE_TICK_S)

    def queue(self) -> Any:
        """Return the connection.

        Raises QueueError if the file is gone, for connecting would make a new one, or is another:
        there the names of our workers and the numbers of our runs are somebody else's.
        """
        file = file_key(self.path)
        if file is None or self.file not in (None, file):
            self.fatal = f"{self.path} {'is gone' if file is None else 'was replaced'}: leaving"
            raise QueueError(self.fatal)
        if self.db is not None:
            self.notice_removal()
        if self.db is None:
            self.db = database.connect(self.path, durable=False, patience_s=self.patience_s)
            self.file, place = file, os.path.realpath(self.path)
            self.beside = {place + end: file_key(place + end) for end in ("-shm", "-wal")}
        return self.db

    def notice_removal(self) -> None:
        """Leave if a file that SQLite keeps beside the queue was removed, at once if need be."""
        for name, known in self.beside.items():
            if known not in (None, file_key(name)):
                self.fatal = f"{name} was removed: leaving"
                self.say("supervisor", self.pid, "trouble", self.fatal)
                self.beside = {}  # what is in the -wal the last of us to close it puts in the file
                if name.endswith("-shm"):  # in it are the locks: who comes anew shares none with us
                    self.asked = 2
                    self.disconnect()  # as long as others have the file open: so it is left alone
                    for pid in self.children:
                        push(session_members(pid), set(), hard=True)
                    time.sleep(2 * IDLE_TICK_S)  # until the others have seen it, and done the same
                return

    def disconnect(self) -> None:
        """Close the connection; `queue` opens the next one."""
        if self.db is not None:
            self.db.close()
        self.db = None

    def close(self) -> None:
        """Disconnect, and leave no try of a stop line running."""
        self.disconnect()
        for ending in self.endings.values():
            if ending.far:
                ending.far.give_up()

    def look(self) -> None:
        """One tick. A database that cannot be used now (full disk, locked) is tried again."""
        try:
            self.tick(self.queue(), time.time(), time.monotonic())
            self.trouble = ""
        except Exception as error:
            self.disconnect()
            text = self.fatal or database.error_text(error, self.path)  # raises a mistake of ours
            if text != self.trouble:
                self.trouble = text
                self.say("supervisor", self.pid, "trouble", text)
            if database.is_damage(text):
                self.fatal = text
            if self.fatal and not self.count:  # a command's: nobody else would ask for it
                raise QueueError(self.fatal) from None
            hopeless = self.fatal or self.stopping > 1  # it cannot be recorded, but can be ended
            ending = {each.worker["pid"] for each in self.endings.values()}
            for pid in list(self.children) if self.stopping else []:
                if pid in ending and not hopeless:
                    continue  # it has its grace, and meanwhile there may be room again
                if pid in ending or self.stopping > 1:
                    push(session_members(pid), set(), hard=True)
                self.reap(pid)  # what it held waits in the database for the next supervisor
            time.sleep(IDLE_TICK_S)

    def tick(self, db: Any, now: float, mono: float) -> None:
        workers = database.workers(db)
        self.busy = False
        for row in workers:
            mine = row["supervisor"] == self.id
            self.busy |= mine and row["run"] is not None
            reason = None if row["worker"] in self.endings else self.judge(row, mine, mono)
            if reason:
                kill_at = mono + self.settings["kill_grace_s"]
                self.endings[row["worker"]] = Ending(row, *reason, kill_at=kill_at)
            elif mine and row["run"]:
                bound_output(self.path, row["worker"], self.settings["output_limit_bytes"])
        over = []
        for ending in self.endings.values():
            row = ending.worker  # if it works elsewhere, this queue is a copy, its run not ours
            copied = is_alive(row) and works_elsewhere(row["pid"], self.path)
            if copied or (self.emptied(ending, mono) and self.ended_afar(db, ending, mono)):
                over.append(ending)
            elif ending.far and ending.far.tries and self.stopping > 2:
                self.reap(ending.worker["pid"])  # leave it, as it is, to the next supervisor
        registered = {row["pid"] for row in workers if row["supervisor"] == self.id}
        for pid in self.children.keys() - registered:
            over_it = self.stopped_for(pid, mono) > self.settings["lock_timeout_s"]
            if over_it and self.children[pid].exitcode is None:
                send(pid, signal.SIGKILL)
            self.reap(pid)  # ended before it could register: it holds nothing
        # So far it has only read, for on a full disk, too, a run must not exceed its time.
        if mono >= self.beat_at:
            # Without an id it changes no row, but waits for the lock: as long as somebody else
            # holds it nobody can beat, and `listen` must not take that for silence.
            database.beat(db, self.id, now)
            self.beat_at = mono + min(10.0, self.settings["lock_timeout_s"] / 4)
        supervisors = database.supervisors(db)
        own = [row["stop"] for row in supervisors if (row["id"], row["pid"]) == (self.id, self.pid)]
        self.asked = max([self.asked, *own, self.drain and database.settled(db)])
        if self.id and not own:
            self.id = 0  # for in a queue that replaces ours another may have this number
            if not self.asked:
                self.say("supervisor", self.pid, "stopping", "the queue was replaced or cleared")
            self.asked = max(self.asked, 1)
        self.listen(supervisors, mono)
        for ending in over:
            self.settle(db, ending)
        for row in supervisors:
            silent = self.silences[row["id"]][1] > row["lock_timeout_s"]
            copied = silent and works_elsewhere(row["pid"], self.path)
            if copied or (silent if is_hidden(row) else not is_alive(row)):
                database.remove_supervisor(db, row["id"])

    def listen(self, supervisors: Iterable[Any], mono: float) -> None:
        """Count for how long each supervisor's heartbeat has not changed under our own eyes.

        So no two clocks are compared. A look adds a second at most: what held us up as well (a
        long write of somebody, a sleeping machine) is not held against the others. Nor is that one
        second: whoever was held up as we were may beat after us.
        """
        elapsed, self.looked_at = min(mono - self.looked_at, 1.0), mono
        for row in supervisors:
            heartbeat, silent = self.silences.get(row["id"], (None, 0.0))
            silent = silent + elapsed if heartbeat == row["heartbeat_at"] else -1.0
            self.silences[row["id"]] = (row["heartbeat_at"], silent)

    def judge(self, row: Any, mine: bool, mono: float) -> tuple[str, str] | None:
        """Say why this worker's session is to be ended: (outcome, error), or None."""
        child = self.children.get(row["pid"]) if mine else None
        others = not mine and is_alive(row, "supervisor_")
        watched = others and not is_stopped(row["supervisor_pid"])
        stopped = self.stopped_for(row["pid"], mono)
        # It may have the lock, without which no heartbeat comes: so none is waited for.
        if not watched and stopped > row["lock_timeout_s"] and is_alive(row):
            return "failed", f"worker lost: silent for {duration_text(stopped)}"
        # What another container or host does, only its supervisor's heartbeat tells.
        if others or is_hidden(row):
            heartbeat, silent = self.silences.get(row["supervisor"], (None, 0.0))
            if heartbeat == row["heartbeat_at"] and silent > row["lock_timeout_s"]:
                return "failed", f"worker lost: silent for {duration_text(silent)}"
            return None  # its supervisor's to judge: it alone knows why it ended this worker
        if max(row["stop"], self.stopping if mine else 0) > 1:
            return NOT_COUNTED
        gone = child.exitcode is not None if child else not is_alive(row)
        if gone:
            cause = f": {signal_text(child.exitcode)}" if child and child.exitcode < 0 else ""
            return "failed", f"worker lost{cause}"
        if row["cancelling"]:
            return "cancelled", "cancelled"
        running = row["run"] and row["exit_code"] is None
        late = running and 0 < row["timeout_s"] < mono - row["started_mono"]
        # A worker that is alone holds a result for which there is no room yet.
        if late and (children(row["pid"]) or len(session_members(row["pid"])) > 1):
            return "failed", f"timed out after {duration_text(row['timeout_s'])}"
        return None

    def stopped_for(self, pid: int, mono: float) -> float:
        """Return for how long a process has been seen stopped (SIGSTOP)."""
        if is_stopped(pid):
            return mono - self.stopped_at.setdefault(pid, mono)
        self.stopped_at.pop(pid, None)
        return 0.0

    def emptied(self, ending: Ending, mono: float) -> bool:
        """Push a session towards its end; say whether no process of it is left: the fence."""
        row = ending.worker
        birth = process_birth(row["pid"])
        if row["boot"] != boot_id() or birth not in (None, row["birth"]):
            return True  # another boot, or a recycled pid: nothing of the old session can live
        if birth:
            # The worker goes first, at once, lest it record what its dying job returns.
            send(row["pid"], signal.SIGKILL)
        left = session_members(row["pid"])
        hard = mono >= ending.kill_at or self.stopping > 2
        push(left, ending.asked, hard, partial(self.say, row["worker"], row["pid"]))
        if hard and left and ending.last_signal != signal.SIGKILL:
            ending.last_signal, ending.kill_at = signal.SIGKILL, mono
        if left and not ending.told and mono > ending.kill_at + HANG_S:
            ending.told = True
            told = f"process {left[0]} does not end: a disk or a network that hangs?"
            self.say(row["worker"], row["pid"], "waits", told)
        return not left

    def ended_afar(self, db: Any, ending: Ending, mono: float) -> bool:
        """Say whether the run is over elsewhere, too: the fence of a launcher.

        After the session here: what lived in it could have started something there.
        """
        name, pid = ending.worker["worker"], ending.worker["pid"]
        run = database.held_by(db, name)  # none any more: another supervisor has settled it
        if not run or not run.stop_line:
            return True
        ending.far = ending.far or FarEnd(run, partial(self.say, name, pid), leader=True)
        return ending.far.reached(mono)

    def settle(self, db: Any, ending: Ending) -> None:
        """Record the end of an emptied session's run, if it held one, and forget the worker."""
        row, name = ending.worker, ending.worker["worker"]
        code = self.reap(row["pid"]) if row["supervisor"] == self.id else None
        run = database.held_by(db, name)
        if run:
            outcome, error = ending.outcome, ending.error
            lost = error.startswith("worker lost")  # then nobody knows how the command ended
            if run.id != row["run"] and not lost:
                outcome, error = NOT_COUNTED  # it had just gone on to another job
            limit = self.settings["output_limit_bytes"]
            out, err = [file_tail(path, limit) for path in output_paths(self.path, name)]
            exit_code = None if lost else -ending.last_signal
            result = Result(outcome, exit_code, error, *out, *err)
            told = record(db, run, result, self.settings, time.time())
            self.say(name, row["pid"], *told)
            database.ring(self.path)  # it may be due again, and nobody who sleeps knows of it
        elif code:
            verb = "stopped" if ending.outcome == "stopped" else "lost"
            self.say(name, row["pid"], verb, ending.error)
        for output in output_paths(self.path, name):
            with suppress(OSError):  # somebody removed the directory
                os.unlink(output)
        if ending.far:
            ending.far.give_up()
        database.remove_worker(db, name)  # last: as long as the row is there, somebody cleans up
        del self.endings[name]

    def reap(self, pid: int) -> int | None:
        """Forget a child that has exited; return its exit code, or None if it lives."""
        child = self.children.get(pid)
        if child is None or child.exitcode is None:
            return None
        del self.children[pid]
        if child.exitcode == DAMAGED:
            self.fatal = f"{self.path} is damaged; see `doctor`"
        return child.exitcode


# --- what other commands ask of processes ----------------------------------------------------


def live_workers(db: Any) -> list[Any]:
    """Return the rows of database.workers that are `live`."""
    return live(database.workers(db))


def is_served(db: Any) -> bool:
    """Say whether somebody works on the queue, or soon will: a supervisor replaces its workers."""
    staying = [row for row in database.supervisors(db) if not row["stop"]]
    return bool(live(staying) or live_workers(db))


def live(rows: Iterable[Any]) -> list[Any]:
    """Return those that are alive: of another container or host, going by the heartbeat."""
    now = time.time()

    def beats(row: Any) -> bool:
        return is_hidden(row) and now - row["heartbeat_at"] <= row["lock_timeout_s"]

    return [row for row in rows if is_alive(row) or beats(row)]


def stop(path: str, settings: Settings, say: Say, now: bool, timeout_s: float | None) -> int:
    """Ask every supervisor to leave, wait for it, return how many workers have left.

    Raises QueueError if some are still there after `timeout_s`. Workers whose supervisor was
    killed leave by themselves; what they held is settled here.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with closing(Supervisor(path, settings, say)) as settler:
        if timeout_s is not None:  # somebody may have the lock
            settler.patience_s = min(settler.patience_s, max(1, timeout_s))
        rows = live_workers(settler.queue())  # before any of them can have heard it
        if any(is_alive(row) and row["pid"] == os.getsid(0) for row in rows):
            raise QueueError("this is a job of these workers: it would wait for itself")
        for row in filter(is_alive, database.supervisors(settler.queue())):
            if not works_elsewhere(row["pid"], path):
                send(row["pid"], signal.SIGCONT)  # stopped (Ctrl+Z) it would not hear us
        asked = database.ask_to_stop(settler.queue(), 2 if now else 1)
        if timeout_s is not None:
            settler.disconnect()
            settler.patience_s = 1  # for each look from now on
        running = sum(row["job"] is not None for row in rows)
        if running and not now:
            told = f"for {database.plural(running, 'running job')}; --now puts them back"
            say("stop", os.getpid(), "waits", told)
        while True:
            settler.look()
            db = settler.queue()
            left = [row for row in database.supervisors(db) if row["id"] in asked]
            left += [row for row in database.workers(db) if row["supervisor"] in asked]
            if not left:
                return len(rows)
            if deadline is not None and time.monotonic() >= deadline:
                pids = [str(row["pid"]) for row in left if is_alive(row) or is_hidden(row)]
                who = f"pid {', '.join(pids)}" if pids else "what a lost run has left"
                hint = "" if now or not pids else "; --now does not wait for jobs"
                raise QueueError(f"still there after {duration_text(timeout_s)}: {who}{hint}")
            time.sleep(0.05)


def await_cancelled(path: str, settings: Settings, say: Say, seqs: list[int]) -> None:
    """Wait until jobs asked to end have ended; those without a supervisor are ended here."""
    with closing(Supervisor(path, settings, say)) as settler:
        while True:
            settler.look()
            if all(database.job(settler.queue(), seq)["state"] != "processing" for seq in seqs):
                return
            time.sleep(0.05)


def detach(arguments: list[str], path: str, count: int) -> tuple[int, str]:
    """Run `queuectl.py ARGUMENTS` in the background: its pid and log, once `count` workers are up.

    Raises QueueError with the end of the log if it does not come up.
    """
    make_run_directory(path)
    log = os.path.join(database.run_directory(path), "workers.log")
    with open(log, "a+b", 0, opener=database.safe_open) as file:
        log_start = file.seek(0, os.SEEK_END)
        words = [sys.executable, os.path.join(os.path.dirname(__file__), "queuectl.py"), *arguments]
        streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        for number in SIGNALS:  # all as Ctrl+C: see below
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        limit_s = 30 + count / 10
        deadline = time.monotonic() + limit_s
        process = subprocess.Popen(words, **streams, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < deadline:
                with closing(database.connect(path)) as db:
                    rows = database.workers(db)
                if sum(row["supervisor_pid"] == process.pid for row in rows) >= count:
                    return process.pid, log
                time.sleep(0.01)
            if process.returncode != 0:
                file.seek(log_start)
                said = file.read().decode(errors="replace").strip().removeprefix("Error: ")
                said = said if process.returncode else f"not ready after {duration_text(limit_s)}"
                raise QueueError(f"the workers did not start: {said}; log {log}")
        except BaseException:  # Ctrl+C, too: then nothing is to be left in the background either
            process.terminate()
            raise
    return process.pid, log


# --- the worker ------------------------------------------------------------------------------


class Desk:
    """What one worker process works with: the queue, two output files, and the bell."""

    def __init__(self, db: Any, path: str, name: str, settings: Settings, say: Say):
        self.db, self.path, self.name, self.settings = db, path, name, settings
        self.say = lambda verb, text: say(name, os.getpid(), verb, text)
        self.outputs = [new_output(output) for output in output_paths(path, name)]
        self.nothing = os.open(os.devnull, os.O_RDWR)  # what every job reads
        self.environment = dict(os.environb)
        self.flooded = False  # the supervisor may be cutting a file: it must not hit the next run
        # For writing too: else, once its last writer has closed it, it reads as ended for ever.
        self.bell = database.open_bell(path, os.O_RDWR)

    def clear(self) -> None:
        """Empty the output files for the next run."""
        for handle in self.outputs:
            size = os.fstat(handle).st_size
            self.flooded |= size > OUTPUT_BOUND
            if size:
                os.ftruncate(handle, 0)

    def claim(self) -> tuple[Run | None, float | None]:
        dress = partial(launched, self.settings)
        return database.claim(self.db, self.name, time.time(), time.monotonic, dress)


def work(supervisor: Supervisor) -> None:
    """The life of one worker process."""
    try:
        serve(supervisor)
    except Exception as error:
        time.sleep(1)  # lest those who fail one after the other keep the machine busy
        text = database.error_text(error, supervisor.path)  # raises what is a mistake of ours
        supervisor.say("worker", os.getpid(), "trouble", text)
        raise SystemExit(DAMAGED if database.is_damage(text) else 1) from None


def serve(supervisor: Supervisor) -> None:
    """Claim, run, record, until told to leave."""
    os.setsid()  # no terminal either: Ctrl+C reaches the supervisor alone
    # SIGTERM alone is for us; but if we ignored the others, our jobs would inherit that.
    wake, signals = await_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.close(supervisor.lifeline_write)
    path, pid = supervisor.path, os.getpid()
    make_run_directory(path)  # again: somebody may have removed it meanwhile
    take_turns(path)
    db = database.connect(path, durable=False)
    name = database.register_worker(db, supervisor.id, pid, process_birth(pid) or "", time.time())
    desk = Desk(db, path, name, supervisor.settings, supervisor.say)

    def wanted() -> bool:
        return not desk.flooded and signal.SIGTERM not in signals and os.getppid() == supervisor.pid

    while wanted():
        run = seen = next_at = None
        try:
            seen = database.data_version(desk.db)  # now, for a change during the look must count
            run, next_at = desk.claim()
            if run and next_at:
                # We took all rings: two jobs that came at once need two workers, and one that
                # waits for its time needs somebody who knows of it.
                database.ring(desk.path)
            if not run and supervisor.drain and database.settled(desk.db):
                return
        except database.SQLiteError as error:
            text = database.error_text(error, desk.path)
            if database.is_damage(text):
                raise
            desk.say("trouble", text)
        if not run:
            rest(desk, [wake, supervisor.lifeline], seen, next_at)
        while run:
            run = hand_in(desk, run, run_one(desk, run), wanted)


def rest(desk: Desk, others: list[int], seen: int | None, next_at: float | None) -> None:
    """Sleep until the bell, a signal, the next job's time, or a change of the queue since `seen`.

    Whether it has changed is asked once each poll interval; None: as if it had.
    """
    handles = [*others, *([] if desk.bell is None else [desk.bell])]
    nap, ready = 1.0, []
    with suppress(database.SQLiteError):  # the next look meets the same, and says it
        while not ready and nap > 0:
            nap = desk.settings["poll_interval_ms"] / 1000
            if next_at is not None:
                nap = min(nap, max(0.0, next_at - time.time()))
            ready = readable(handles, nap)
            if database.data_version(desk.db) != seen:
                break
    for handle in ready:
        # Emptied before the next look, so that a ring during it is not lost; and emptied whole,
        # or what is left over from a busy hour would wake us again and again.
        drained(handle)


def launched(settings: Settings, run: Run) -> Run:
    """Give a run its lines: what runs in place of the command, what ends it; none: no launcher."""
    launcher, stop = settings["launcher"], settings["launcher_stop"]
    if not launcher:
        return run
    known = dict(command=run.command, id=run.job, attempt=run.attempt, cwd=run.cwd)
    line, stop_line = [config.expand(template, **known) for template in (launcher, stop)]
    return run._replace(line=line, stop_line=stop_line or None)


def run_one(desk: Desk, run: Run) -> Result:
    """Run one claimed job to its end, with all that it has started."""
    desk.say("started", f"{run.job} (run {run.attempt} of {run.max_retries + 1}): {run.command}")
    began, newest = time.monotonic(), newest_pid()
    code, error = execute(desk, run)
    if has_left(newest, began) or (code and run.stop_line):
        with suppress(database.SQLiteError):  # from here on no timeout counts: `judge`
            database.note_exit(desk.db, run, code)
        end_leftovers(desk)
    if code and run.stop_line:
        # The line has failed, but has the command? Somebody may have killed the launcher alone, or
        # the connection broke: what it started may live on, beside the next run.
        far = FarEnd(run, desk.say, leader=False)
        while not far.reached(time.monotonic()):
            time.sleep(0.01)
        end_leftovers(desk)  # of tries that hung
    out, err = [read_tail(handle, desk.settings["output_limit_bytes"]) for handle in desk.outputs]
    if code:
        last_line = err[0][-500:].decode(errors="replace").strip().rpartition("\n")[2]
        error = signal_text(code) + (last_line and f": {last_line}")
    return Result("failed" if error else "completed", code, error, *out, *err)


def hand_in(desk: Desk, run: Run, result: Result, wanted: Callable[[], bool]) -> Run | None:
    """Record how a run ended and take the next one, if `wanted`, in one transaction: with two,
    workers would wait twice as often for each other."""
    kept, ended_at = False, time.time()  # not when it can be recorded: that may be much later
    while True:
        try:
            with database.transaction(desk.db):
                told = record(desk.db, run, result, desk.settings, ended_at)
                # Not sooner: if we are killed, these are all that is left of the run. Not later:
                # who reads the files of an open run must never see the output of another.
                desk.clear()
                following = desk.claim()[0] if wanted() else None
            break
        except database.SQLiteError as trouble:
            why = database.error_text(trouble, desk.path)
            if database.is_damage(why):
                raise
            # It has run: keep the result until there is room for it, and claim nothing meanwhile.
            # Its output files may be what takes the room.
            if not kept:
                desk.say("trouble", f"{run.job}: result kept: {why}")
            kept = True
            desk.clear()
            time.sleep(0.5)
    desk.say(*told)
    return following


def execute(desk: Desk, run: Run) -> tuple[int | None, str | None]:
    """Run the command to its end: (exit code, None), or (None, why it could not be started)."""
    # The directory may be only where the launcher goes, if the launcher is told of it.
    elsewhere = run.line and "{cwd}" in desk.settings["launcher"] and not os.path.isdir(run.cwd)
    # As bytes: text would be encoded by the locale, which may not know its characters.
    own = {b"QUEUECTL_JOB_ID": run.job.encode(), b"QUEUECTL_ATTEMPT": b"%d" % run.attempt}
    try:
        words, (out, err) = [b"/bin/sh", b"-c", (run.line or run.command).encode()], desk.outputs
        place = dict(cwd=b"/" if elsewhere else run.cwd.encode(), env=desk.environment | own)
        done = subprocess.run(words, stdin=desk.nothing, stdout=out, stderr=err, **place)
        return done.returncode, None
    except OSError as problem:  # cwd gone, command too long, no more processes
        where = f": {os.fsdecode(problem.filename)}" if problem.filename else ""
        return None, f"cannot be started: {problem.strerror}{where}"


def end_leftovers(desk: Desk) -> None:
    """End what a command left in the background: it would write into the next job's output, and
    run beside the next run of its own job."""
    asked: set[int] = set()
    kill_at = time.monotonic() + desk.settings["kill_grace_s"]
    while left := session_members(os.getpid()):
        push(left, asked, time.monotonic() >= kill_at, desk.say)
        time.sleep(0.01)


def record(db: Any, run: Run, result: Result, settings: Settings, now: float) -> tuple[str, str]:
    """Store how a run ended, unless somebody else has; return what to say of it: verb and text."""
    spread = settings["backoff_jitter"] * run.backoff_base
    jitter = random.uniform(0, spread) if result.error else 0.0
    ended = database.finish(db, run, result, now, settings["max_backoff_s"], jitter)
    verb, run_at = ended or ("ignored", now)
    took = f"{run.job} in {duration_text(now - run.started_at)}"
    told = f"{run.job}: {result.error}" if result.error else took
    if result.outcome == "stopped" and verb != "cancelled":
        verb = "put back"
    elif verb == "failed":
        told += f"; retry {run.attempt} of {run.max_retries} in {duration_text(run_at - now)}"
    elif verb == "dead":
        told += f"; moved to the DLQ after {database.plural(run.attempt, 'run')}"
    elif verb == "ignored":
        told += "; somebody else has settled this run"
    return verb, told


# --- the run directory: outputs, log, turns --------------------------------------------------


def output_paths(path: str, worker: str) -> list[str]:
    """Return where a worker's running job writes its stdout and its stderr."""
    folder = database.run_directory(path)
    return [os.path.join(folder, f"{worker}.{name}") for name in ("out", "err")]


def new_output(path: str) -> int:
    """Open an output file in place of what lies there: another queue's of this name, or a link that
    was planted.

    Files, not pipes: a background child cannot block us, memory stays flat, and the supervisor can
    read what a killed run printed.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)
    return database.safe_open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)


def make_run_directory(path: str) -> None:
    """Make it, private, with the bell in it.

    Raises OSError if it cannot be made, QueueError where others could put commands for us to run.
    """
    folder = database.run_directory(path)
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    if exposed := database.exposed(path):
        raise QueueError(exposed)
    for place in (path, folder):
        owner = os.stat(place, follow_symlinks=place != folder).st_uid
        if owner != os.geteuid():
            raise QueueError(f"{place} belongs to another user (uid {owner})")
    # There already; or there are no FIFOs here, and polling alone serves.
    with suppress(OSError):
        os.mkfifo(os.path.join(folder, "bell"), 0o600)


def take_turns(path: str) -> None:
    """Let this process queue up for the write lock, with the others that do.

    For speed alone: who finds SQLite's lock taken looks again after 1, 2, 5 ... ms, and may be
    unlucky each time; here the kernel sends the next one on as soon as the last one is through.
    Not for a supervisor: it must not wait for a stopped worker that it is to end. And nobody waits
    long: who has the turn may have been stopped (Ctrl+Z), and SQLite's lock is the one that counts.
    """

    def too_long(*_: object) -> None:
        if signal.getitimer(signal.ITIMER_REAL)[0]:  # else it is a job's: kill -ALRM 0
            raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    with suppress(OSError):  # no run directory: then there are no workers either
        folder = os.open(database.run_directory(path), os.O_RDONLY | os.O_DIRECTORY)
        database.turn = partial(turn, folder)


@contextmanager
def turn(folder: int) -> Iterator[None]:
    with suppress(TimeoutError):
        try:
            signal.setitimer(signal.ITIMER_REAL, TURN_LIMIT_S, TURN_LIMIT_S)
            fcntl.flock(folder, fcntl.LOCK_EX)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


def file_key(path: str) -> tuple[int, int] | None:
    """Return what tells a file from another one of its name: inode and device; None: it is gone."""
    with suppress(FileNotFoundError):
        return os.stat(path)[1:3]
    return None


def read_tail(handle: int, limit: int) -> tuple[bytes, int]:
    """Return the last `limit` bytes of an open file, and its size."""
    size = os.fstat(handle).st_size
    return os.pread(handle, min(size, limit), max(0, size - limit)) if size else b"", size


def file_tail(path: str, limit: int) -> tuple[bytes, int]:
    """Return the same of an output file that is not open here; nothing if it is gone."""
    with suppress(OSError), open(path, "rb", 0, opener=database.safe_open) as file:
        return read_tail(file.fileno(), limit)
    return b"", 0  # somebody removed the directory


def runs_so_far(db: Any, path: str, seq: int, limit: int) -> list[dict[str, Any]]:
    """Return database.runs of a job; an open one with the last `limit` bytes of its output."""
    runs = [dict(run) for run in database.runs(db, seq)]
    if not runs or runs[-1]["finished_at"] is not None:
        return runs
    for name, output in zip(("stdout", "stderr"), output_paths(path, runs[-1]["worker"])):
        data, size = file_tail(output, limit)
        if size > OUTPUT_BOUND:
            data = data.lstrip(b"\0")  # what `bound_output` has cut reads as zeros
        runs[-1] |= {name: data, f"{name}_bytes": size}
    # Only what was read while the run was open is its own: the file serves the next one, too.
    held = database.held_by(db, runs[-1]["worker"])
    still_open = held and held.id == runs[-1]["id"]
    return runs if still_open else [dict(run) for run in database.runs(db, seq)]


def bound_output(path: str, worker: str, limit: int) -> None:
    """Cut output files that outgrow their bound, so that a runaway job cannot fill the disk."""
    import ctypes

    for output in output_paths(path, worker):
        with suppress(OSError), open(output, "r+b", 0, opener=database.safe_open) as file:
            status = os.fstat(file.fileno())
            if status.st_blocks * 512 <= OUTPUT_BOUND + limit:
                continue
            # A hole in front of the end that is kept: size and what is still to come stay right.
            ends = ctypes.c_int64(0), ctypes.c_int64(status.st_size - limit)
            library = ctypes.CDLL(None)  # it has the first name where the second takes 32 bits
            punch = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
            if not punch or punch(file.fileno(), 3, *ends):  # 3: PUNCH_HOLE | KEEP_SIZE
                file.truncate(0)  # no holes here: the end so far is lost, the disk is not


# --- what the operating system decides: Linux reads /proc, macOS asks ps ---------------------


@lru_cache
def boot_id() -> str:
    """Return a name for this boot of this machine, and for the container that we see of it.

    A process of another boot is dead, and a pid of another container is not ours to judge.
    """
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    return ask("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")


def process_birth(pid: int) -> str | None:
    """Return when a process began, in words of this system; None if it is dead or a zombie.

    With the pid it names one process for good: a recycled pid has another birth.
    """
    status = process_status(pid)
    return status[19] if status else None


def works_elsewhere(pid: int, path: str) -> bool:
    """Say whether a process works, by its open files, for another queue than the one at `path`:
    then that is a copy of it. Of a file that was moved or replaced /proc says another name."""
    handles = {}
    with suppress(OSError):  # it has just gone, or this system has no such directory
        for name in os.listdir(f"/proc/{pid}/fd"):
            handle = f"/proc/{pid}/fd/{name}"
            with suppress(FileNotFoundError):  # closed meanwhile
                handles[os.readlink(handle)] = os.stat(handle)
    queues = [handles[name] for name in handles if f"{name}-wal" in handles]
    return bool(queues) and not any(os.path.samestat(each, os.stat(path)) for each in queues)


def is_stopped(pid: int) -> bool:
    return (process_status(pid) or "?")[0] in "Tt"


def session_members(session: int, seen: int = 0) -> list[int]:
    """Return the pids of a session's living processes. Its leader, asking, leaves itself out.

    Who forks and ends behind our look is known by his child, whose pid is later than any before: so
    those given meanwhile are looked at, until there are no more. With `seen` only those since it.
    """
    members: list[int] = []
    for look in range(1000):  # there may be no end to the pids that a big machine gives
        newest = newest_pid()
        if members or (newest == seen and (newest or look == 2)):
            break
        for pid in range(seen + 1, newest + 1) if 0 < seen < newest else all_pids():
            with suppress(ProcessLookupError, PermissionError):  # it has just gone; it is hidden
                itself = pid == session == os.getpid()
                if os.getsid(pid) == session and not itself and process_status(pid):
                    members.append(pid)
        seen = newest
    return members


def all_pids() -> Iterable[int]:
    linux = sys.platform == "linux"
    names = os.listdir("/proc") if linux else ask("ps", "-axo", "pid=").split()
    return [int(name) for name in names if name.isdigit()]


def has_left(newest: int, began: float) -> bool:
    """Say whether a run has left something in our session. `newest`: the newest pid as it began.

    To look at all processes takes a tenth of a short run. So after one only those are looked at
    whose pids were given meanwhile; later on the pids may have gone round.
    """
    short = time.monotonic() <= began + SHORT_S and newest < newest_pid()
    return bool(session_members(os.getpid(), newest if short else 0))


def newest_pid() -> int:
    """Return the pid that was given last; 0 where the system does not say."""
    with suppress(OSError):
        return int(os.pread(last_pid_file(), 20, 0))
    return 0


@lru_cache  # opened once: to open it for each run took 3 % of a short one
def last_pid_file() -> int:
    return os.open("/proc/sys/kernel/ns_last_pid", os.O_RDONLY | os.O_CLOEXEC)


def children(pid: int) -> list[str]:
    """Return the pids of a process's children, where the system says."""
    if sys.platform != "linux":
        return ask("pgrep", "-P", str(pid)).split()
    with suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()
    return []


def parent(pid: int) -> int:
    """Return the pid of a process's parent; 0 if it has just ended."""
    status = process_status(pid)
    return int(status[1]) if status else 0


def process_status(pid: int) -> Any:
    """Return /proc/PID/stat from the state on (proc(5): its field 3 is item 0 here), if alive; of
    what `ps` knows only the three items that are needed here."""
    if sys.platform != "linux":
        state, *told = ask("ps", "-o", "stat=,ppid=,lstart=", "-p", str(pid)).split(None, 2) or [""]
        return None if state[:1] in ("", "Z") else {0: state[0], 1: told[0], 19: told[1]}
    # Any other error (no more open files) does not say that it is dead.
    gone = FileNotFoundError, ProcessLookupError, PermissionError
    with suppress(*gone), open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        status = file.read().rpartition(b")")[2].decode().split()
        # A program whose first thread has ended looks like a zombie, but its other threads live on.
        return None if status[0] in "ZX" and int(status[17]) < 2 else status
    return None


def ask(*command: str) -> str:
    # `ps` tells a birth by locale and time zone: another one would make a live worker look dead.
    # And so would a `ps` that Ctrl+C has ended: in a session of its own it does not come.
    plain = dict(env=os.environ | {"LC_ALL": "C", "TZ": "UTC"}, start_new_session=True)
    return subprocess.run(command, capture_output=True, text=True, **plain).stdout.strip()


def is_hidden(row: Any) -> bool:
    """Say whether a row is of another container of this machine, whose pids say nothing here, or
    of another host. Perhaps it is ours of an earlier boot, under a name that we had then."""
    mine, other = boot_id(), row["boot"]
    same_machine = mine.partition("/")[0] == other.partition("/")[0]
    return mine != other and (same_machine or row["host"] != os.uname().nodename)


def is_alive(row: Any, prefix: str = "") -> bool:
    """Say whether the very process that a row names by pid, birth and boot is alive."""
    return row["boot"] == boot_id() and process_birth(row[prefix + "pid"]) == row[prefix + "birth"]


def send(pid: int, number: int) -> bool:
    """Signal a process; say whether that is allowed. One that is gone already is fine."""
    try:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    except PermissionError:
        return False
    return True


def push(pids: Collection[int], asked: set[int], hard: bool, say: Any = lambda *_: None) -> None:
    """Ask processes to end, or `hard` end them; say, once, which may not be signalled.

    Asked are those who are there at first, and of the later ones orphans: what somebody starts who
    has been asked is to clean up, perhaps, and has the grace to do so.
    """
    first, refused = not asked, []
    for pid in pids:
        if hard:
            allowed = send(pid, signal.SIGKILL) or pid in asked
        elif first or (pid not in asked and parent(pid) not in pids):
            # SIGCONT too, for a stopped process does not hear SIGTERM.
            allowed = send(pid, signal.SIGTERM) and send(pid, signal.SIGCONT)
        else:
            continue
        asked.add(pid)
        refused += [] if allowed else [str(pid)]
    if refused:
        say("waits", f"process {', '.join(refused)} may not be signalled")


def signal_text(code: int) -> str:
    """Return an exit code in words: exit code 2, killed by SIGKILL."""
    if code >= 0:
        return f"exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


def await_signals() -> tuple[int, list[int]]:
    """Handle SIGNALS; return what can be read once one has come, and the list of all that come.

    The handler only notes them; the byte that the interpreter writes into this pipe ends a sleep.
    """
    ends, come = os.pipe(), []
    for end in ends:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)

    def note(number: int, _: Any) -> None:
        # Of a terminal that is closed two may come: of its shell, and of the kernel.
        if number != signal.SIGHUP or not come:
            come.append(number)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, note)
    return ends[0], come


def readable(handles: Iterable[int], span_s: float) -> list[int]:
    """Wait until some of these can be read, and return them; [] once the span is over."""
    waiting = select.poll()
    for handle in handles:
        waiting.register(handle, select.POLLIN)
    return [handle for handle, _ in waiting.poll(1000 * span_s)]


def drained(handle: int) -> None:
    """Read all that is there now."""
    with suppress(BlockingIOError):
        while len(os.read(handle, 65_536)) == 65_536:
            pass
