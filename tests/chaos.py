"""Break everything at random, then compare what happened with what was promised.

    python tests/chaos.py --seconds 180 --seed 1

Supervisors, workers and enqueuers are killed (SIGKILL), stopped and continued, or asked to leave
(SIGTERM) at seeded random moments while jobs of many kinds run. Each run appends lines to a ledger
(O_APPEND), so that the order of its lines is the order of events, whatever any clock says:

    B job attempt token     a run has begun          T job attempt token     it lives
    E job attempt token     it has come to its end

Afterwards the ledger and the database are compared. Exit 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import database  # noqa: E402
import worker  # noqa: E402

LOCK_TIMEOUT_S = 2.0
GRACE_S = 0.2
SETTINGS = {
    "backoff_base": 0,  # so that the time to a re-run is the queue's own
    "max_retries": 1000,  # what is killed may be killed again, and is to complete in the end
    "kill_grace_s": GRACE_S,
    "lock_timeout_s": LOCK_TIMEOUT_S,
    "poll_interval_ms": 200,
}

# `note X` appends a line in one write; `live N` lives for N times 50 ms and says so.
PRELUDE = """
token=$$.$(cut -d' ' -f22 /proc/$$/stat)
note() { echo "$1 $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $token" >> "$LEDGER"; }
live() { i=0; while [ $i -lt $1 ]; do note T; sleep 0.05; i=$((i+1)); done; }
note B
"""
KINDS = {
    "instant": "note E",
    "slow": "live 12; note E",
    "failing": "live 2; note E; exit 3",
    "children": "live 8 & live 6 & wait; note E",
    "leftover": "(live 400) & live 2; note E",
    "pipeline": "live 6 | cat; note E",
    "timeout": "export -f note live; export token; timeout 60 bash -c 'live 10'; note E",
    "groups": "set -m; live 8 & wait; note E",
    "deaf": "trap '' TERM; live 10; note E",
}


class Chaos:
    """One storm over one queue."""

    def __init__(
        self, seconds: float, seed: int, jobs: int, supervisors: int, workers: int,
        keep: bool = False,
    ):  # fmt: skip
        self.random = random.Random(seed)
        self.seconds, self.jobs, self.workers, self.keep = seconds, jobs, workers, keep
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.path, self.ledger = str(self.folder / "queue.db"), self.folder / "ledger"
        (self.folder / "config.json").write_text(json.dumps(SETTINGS))
        self.ledger.touch()
        self.environment = os.environ | {
            "QUEUECTL_DB": self.path,
            "QUEUECTL_CONFIG": str(self.folder / "config.json"),
            "LEDGER": str(self.ledger),
        }
        database.connect(self.path).close()
        self.supervisors: list[subprocess.Popen | None] = [None] * supervisors
        self.enqueuers: list[subprocess.Popen] = []
        self.acknowledged: set[str] = set()
        self.sessions: set[int] = set()
        self.kills: Counter[str] = Counter()
        self.deaths: list[tuple[float, str, int]] = []  # (when, job, its supervisor; 0: all died)
        self.absences: list[tuple[float, float, int]] = []  # (from, to, supervisor hit or stopped)
        self.storm, self.runs, self.hits = True, 0, 0
        self.failures: list[str] = []

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind, however the storm came to its end."""
        self.storm = False
        for process in self.supervisors:
            if process and process.poll() is None:
                process.kill()
        for session in self.sessions:
            for pid in worker.session_members(session):
                worker.send(pid, signal.SIGKILL)
        if self.keep:
            print(self.folder)
        else:
            shutil.rmtree(self.folder)

    # --- what is broken --------------------------------------------------------------------

    def start(self, number: int) -> None:
        log = open(self.folder / "log", "ab")
        words = ["worker", "start", "--count", str(self.workers)]
        self.supervisors[number] = subprocess.Popen(
            [sys.executable, ROOT / "queuectl.py", *words],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment,
            start_new_session=True,
        )  # fmt: skip
        log.close()

    def enqueue(self, number: int) -> None:
        """Enqueue one job in a process of its own, which may be killed; note what it printed."""
        kind = self.random.choice(list(KINDS))
        job = {"id": f"{kind}-{number}", "command": f"bash -c {quoted(PRELUDE + KINDS[kind])}"}
        if kind == "failing":
            job["max_retries"] = 2
        process = subprocess.Popen(
            [sys.executable, ROOT / "queuectl.py", "enqueue", json.dumps(job)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self.environment, text=True,
        )  # fmt: skip
        self.enqueuers.append(process)
        out, err = process.communicate()
        if out.strip():
            self.acknowledged.add(out.strip())
        elif process.returncode > 0:
            self.failures.append(f"enqueue failed: {err}")

    def feed(self) -> None:
        for number in range(self.jobs):
            self.enqueue(number)
            while self.storm and self.load() > len(self.supervisors) * self.workers / 2:
                time.sleep(0.05)

    def load(self) -> int:
        counts = self.read(database.counts)
        return counts["pending"] + counts["failed"] + counts["processing"]

    def registered(self) -> bool:
        """Say whether all supervisors that run would hear of a stop: one has just been started."""
        known = {row["pid"] for row in self.read(database.supervisors)}
        return all(each.pid in known for each in self.supervisors if each.poll() is None)

    def read(self, function):
        db = database.connect(self.path)
        try:
            return function(db)
        finally:
            db.close()

    def look(self) -> list:
        rows = self.read(worker.live_workers)
        self.sessions |= {row["pid"] for row in rows}
        return rows

    def strike(self) -> None:
        """Hit something at random."""
        rows = self.look()
        busy = [row for row in rows if row["job"]] or rows
        living = [number for number, each in enumerate(self.supervisors) if each.poll() is None]
        what = self.random.choices(
            ["worker", "supervisor", "both", "all", "enqueuer"], [60, 10, 8, 3, 10]
        )[0]
        how = self.random.choices(["KILL", "STOP", "TERM"], [70, 15, 15])[0]
        if what == "worker" and busy:
            victim = self.random.choice(busy)
            if how == "KILL" and victim["job"]:
                self.deaths.append((time.time(), victim["job"], victim["supervisor_pid"]))
            self.hit(what, how, [victim])
        elif what == "enqueuer" and self.enqueuers:
            process = self.enqueuers[-1]
            if process.poll() is None:
                self.signal(process.pid, how)
                self.kills[f"{how} {what}"] += 1
        elif what == "all":
            for number in living:
                self.miss(self.supervisors[number].pid)
                self.supervisors[number].kill()
            rows = self.look()
            self.hit(what, "KILL", rows)
            for process in self.supervisors:
                process.wait()
            self.start(0)
            self.deaths += [(time.time(), row["job"], 0) for row in rows if row["job"]]
            for number in range(1, len(self.supervisors)):
                self.start(number)
        elif living and what in ("supervisor", "both"):
            number = self.random.choice(living)
            pid = self.supervisors[number].pid
            mine = [row for row in rows if row["supervisor_pid"] == pid] if what == "both" else []
            if how == "KILL":  # until its workers are lost, nobody will settle what they hold
                self.miss(pid)
                self.supervisors[number].kill()
                self.supervisors[number].wait()
            self.hit(what, how, mine, [] if how == "KILL" else [pid])

    def hit(self, what: str, how: str, rows: list, also: list[int] | None = None) -> None:
        self.kills[f"{how} {what}"] += 1
        pids = (also or []) + [row["pid"] for row in rows if worker.is_alive(row)]
        for pid in pids:
            self.signal(pid, how)

    def miss(self, pid: int, span: float = float("inf")) -> None:
        self.absences.append((time.time(), time.time() + span, pid))

    def signal(self, pid: int, how: str) -> None:
        if how == "TERM":
            self.miss(pid)  # one that is leaving replaces no workers
        worker.send(pid, getattr(signal, "SIG" + how))
        if how == "STOP":
            birth, span = worker.process_birth(pid), self.random.uniform(0.1, 2 * LOCK_TIMEOUT_S)
            self.miss(pid, span)

            def wake() -> None:
                if worker.process_birth(pid) == birth:
                    worker.send(pid, signal.SIGCONT)

            timer = threading.Timer(span, wake)
            timer.start()

    def run(self) -> bool:
        for number in range(len(self.supervisors)):
            self.start(number)
        feeder = threading.Thread(target=self.feed)
        feeder.start()
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            time.sleep(self.random.uniform(0, 0.5))
            self.strike()
            for number, process in enumerate(self.supervisors):
                if process.poll() is not None and self.random.random() < 0.5:
                    self.start(number)
        self.storm = False
        time.sleep(2 * LOCK_TIMEOUT_S)  # whatever was stopped goes on
        feeder.join()
        for number, process in enumerate(self.supervisors):
            if process.poll() is not None:
                self.start(number)
        self.settle()
        return self.report()

    def settle(self) -> None:
        deadline = time.monotonic() + 120
        while self.load() or not self.registered():
            self.look()
            if time.monotonic() > deadline:
                self.failures.append(f"not settled: {self.read(database.counts)}")
                break
            time.sleep(0.1)
        done = subprocess.run(
            [sys.executable, ROOT / "queuectl.py", "worker", "stop"],
            env=self.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode:
            self.failures.append(f"worker stop: {done.stderr}")
        for process in self.supervisors:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                said = (self.folder / "log").read_text().splitlines()
                said = [line for line in said if f"pid {process.pid} " in line][-5:]
                self.failures.append(f"supervisor {process.pid} did not leave: {said}")
                process.kill()

    # --- what is compared ------------------------------------------------------------------

    def report(self) -> bool:
        lines = [line.split() for line in self.ledger.read_text().splitlines()]
        overlaps = self.overlaps(lines)
        db = database.connect(self.path)
        jobs = {row["id"]: row for row in db.execute("SELECT * FROM jobs")}
        runs = defaultdict(list)
        for row in db.execute("SELECT runs.*, jobs.id AS name FROM runs JOIN jobs ON seq = job"):
            runs[row["name"]].append(row)
        lost = sorted(self.acknowledged - set(jobs))
        for name, row in jobs.items():
            wanted = "dead" if name.startswith("failing") else "completed"
            if row["state"] != wanted:
                self.failures.append(f"{name} is {row['state']}, not {wanted}")
        self.compare(lines, runs)
        for name, problem, _ in database.check(db):
            if problem:
                self.failures.append(f"doctor: {name}: {problem}")
        db.close()
        for session in self.sessions:
            if worker.session_members(session):
                self.failures.append(f"alive in session {session}")
        self.failures += [f"overlap: {text}" for text in overlaps]
        self.failures += [f"lost: {name}" for name in lost]
        kills = ", ".join(f"{count} {name}" for name, count in sorted(self.kills.items()))
        print(f"jobs              {len(jobs)} ({len(self.acknowledged)} acknowledged)")
        print(f"kills             {sum(self.kills.values())}: {kills}")
        self.runs = sum(map(len, runs.values()))
        told = [str(row["error"]) for rows in runs.values() for row in rows]
        self.hits = sum(error.startswith("worker lost") for error in told)
        print(f"runs              {self.runs}")
        print(f"overlaps          {len(overlaps)}")
        print(f"lost              {len(lost)}")
        for one, told in ((True, "a worker's death"), (False, "all were killed")):
            spans = self.recoveries(runs, one)
            if spans:
                middle = sorted(spans)[len(spans) // 2]
                print(f"re-run after {told}: {len(spans)}, median {middle:.2f} s,"
                      f" worst {max(spans):.2f} s")  # fmt: skip
        for failure in self.failures[:20]:
            print("BROKEN", failure)
        return not self.failures

    def overlaps(self, lines: list[list[str]]) -> list[str]:
        """A line of a run after another run of the same job has begun is an overlap."""
        current: dict[str, str] = {}
        over: dict[str, set[str]] = defaultdict(set)
        found = []
        for what, job, attempt, token in lines:
            if what == "B" and current.get(job) != token:
                if job in current:
                    over[job].add(current[job])
                current[job] = token
            if token in over[job]:
                found.append(f"{job} attempt {attempt}: {what} of {token} beside {current[job]}")
        return found

    def compare(self, lines: list[list[str]], runs: dict[str, list]) -> None:
        """The history has a row for each run of the ledger, and completed ones came to an end."""
        begun, ended = defaultdict(set), defaultdict(set)
        for what, job, attempt, token in lines:
            if what == "B":
                begun[job, int(attempt)].add(token)
            elif what == "E":
                ended[job, int(attempt)].add(token)
        for (job, attempt), tokens in begun.items():
            rows = [row for row in runs[job] if row["attempt"] == attempt]
            if len(rows) < len(tokens):
                self.failures.append(f"{job} attempt {attempt}: in the ledger, not in the history")
        for job, rows in runs.items():
            if [row["outcome"] for row in rows].count("completed") > 1:
                self.failures.append(f"{job} completed twice")
            for row in rows:
                if row["outcome"] == "completed" and not ended[job, row["attempt"]]:
                    self.failures.append(f"{job} completed, but its run came to no end")
                if row["finished_at"] is None:
                    self.failures.append(f"{job} has an open run")

    def recoveries(self, runs: dict[str, list], one: bool) -> list[float]:
        """Seconds from each kill to the begin of the next run of the job that was hit: of `one`
        worker while its supervisor lived and was left alone, or of all."""
        spans = []
        for when, job, supervisor in self.deaths:
            later = [row["started_at"] for row in runs[job] if row["started_at"] > when]
            hit = [row for row in runs[job] if row["started_at"] <= when]
            if bool(supervisor) != one or not later or not hit:
                continue
            if "lost" not in str(hit[-1]["error"]):
                continue
            away = [pid for begin, end, pid in self.absences if begin < min(later) and when < end]
            if supervisor not in away:
                spans.append(min(later) - when)
        return spans


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=600)
    parser.add_argument("--supervisors", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="keep the queue and the ledger")
    given = vars(parser.parse_args())
    with Chaos(**given) as storm:
        good = storm.run()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
