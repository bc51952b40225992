"""What a launcher costs beside calling it bare: overhead per run, and what a run in flight takes.

    python tests/launcher_bench.py --runs 100 --rounds 5 --workers 1 8 --flight 200

Brings up a Slurm of its own (as root; see slurm.sh). "Bare" is `xargs -P WORKERS` over `srun true`,
in turn with the queue, for the machine may be busy. "By hand" is xargs over the queue's own line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from conftest import Queue, eventually
from test_slurm import LINES, Cluster

import config
import database
import worker

BARE = "srun -QQ -n1 true"


def by_xargs(line: str, runs: int, workers: int, environment: dict[str, str]) -> float:
    """Return the seconds that so many runs of a shell line take, so many at once."""
    numbers = "\0".join(map(str, range(runs)))
    began = time.monotonic()
    subprocess.run(
        ["xargs", "-0", "-n1", "-P", str(workers), "sh", "-c", line],
        input=numbers.encode(),
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - began


def by_queue(queue: Queue, runs: int, workers: int) -> float:
    """The same by the queue, from the first claim to the last result."""
    lines = "true\n" * runs
    queue.run("enqueue", "--file", "-", "--lines", stdin=lines, check=0)
    with closing(database.connect(queue.path)) as db:
        before = db.execute("SELECT count(*) FROM runs").fetchone()[0]
        queue.drain(count=workers)
        span = "SELECT max(finished_at) - min(started_at), sum(outcome = 'completed') FROM runs"
        seconds, completed = db.execute(f"{span} WHERE id > ?", (before,)).fetchone()
    assert completed == runs
    return seconds


def overhead(queue: Queue, runs: int, rounds: int, workers: int) -> None:
    known = dict(command="true", id="hand", attempt=1, cwd=str(queue.folder))
    hand = config.expand(LINES["launcher"], **known)
    ways = {
        "bare srun": lambda: by_xargs(BARE, runs, workers, queue.environment),
        "by hand": lambda: by_xargs(hand, runs, workers, queue.environment),
        "queue, srun": lambda: by_queue_of(BARE + " # {command}"),
        "queue, README": lambda: by_queue_of(LINES["launcher"]),
    }

    def by_queue_of(launcher: str) -> float:
        queue.configure(launcher=launcher, launcher_stop=LINES["launcher_stop"])
        return by_queue(queue, runs, workers)

    spans: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):  # in turn, and from another one on each time
        for name in [*ways][number % 4 :] + [*ways][: number % 4]:
            spans[name].append(ways[name]() / runs * 1000)
    for name, base in zip(ways, ("bare srun", "bare srun", "bare srun", "by hand")):
        ratios = [mine / its for mine, its in zip(spans[name], spans[base])]
        middle, ratio = statistics.median(spans[name]), statistics.median(ratios) - 1
        print(f"{workers:3} at once  {name:<14}{middle:7.1f} ms a run  {ratio:+.1%} beside {base}")


def memory_kib(pids: list[int], key: str) -> int:
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(key))
    return total


def cpu_s(pids: list[int]) -> float:
    ticks = [worker.process_status(pid) for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in ticks) / os.sysconf("SC_CLK_TCK")


def in_flight(queue: Queue, count: int) -> None:
    """What so many waiting runs hold of this machine: memory, and time of a processor."""
    queue.configure(**LINES)
    queue.run("enqueue", "--file", "-", "--lines", stdin="sleep 600\n" * count, check=0)
    supervisor = queue.start(count=count)
    eventually(lambda: queue.states()["processing"] == count, "all run", 120)
    time.sleep(10)
    sessions = {row["pid"]: worker.session_members(row["pid"]) for row in queue.workers()}
    workers, others = list(sessions), [p for s, pids in sessions.items() for p in pids if p != s]
    for name, pids in (("worker", workers), ("sh and srun", others)):
        pss, uss = memory_kib(pids, "Pss:"), memory_kib(pids, "Private_")
        print(
            f"{count} in flight  {name:<12} PSS {pss / count:6.0f} KiB, USS {uss / count:6.0f} KiB"
        )
    everybody = [supervisor.pid, *workers, *others]
    before, began = cpu_s(everybody), time.monotonic()
    apart = cpu_s([supervisor.pid])
    time.sleep(20)
    span = time.monotonic() - began
    share, own = (cpu_s(everybody) - before) / span, (cpu_s([supervisor.pid]) - apart) / span
    print(
        f"{count} in flight  {share:.1%} of a core, {own:.1%} of it the supervisor:"
        f" {count / share:.0f} a core"
    )
    queue.run("worker", "stop", "--now", check=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--flight", type=int, default=0)
    given = parser.parse_args()
    cluster = Cluster(slots=64)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            queue = Queue(Path(folder))
            queue.environment["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
            queue.environment.pop("PYTHONDONTWRITEBYTECODE", None)
            for workers in given.workers:
                overhead(queue, given.runs, given.rounds, workers)
            if given.flight:
                in_flight(queue, given.flight)
    finally:
        cluster.script("stop")


if __name__ == "__main__":
    sys.exit(main())
