"""Runs on a real Slurm, by the README's own two lines: four nodes of eight slots on this machine.

Here an end from outside is real: a step lives on when all of ours is dead, nodes go down, the
controller goes away. The jobs write the ledger of chaos.py, each line from the node it runs on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from chaos import PRELUDE, Chaos, quoted
from conftest import ROOT, Queue, eventually
from test_worker import enqueue, reaches, runs

import database
import worker

NODES, SLOTS = 4, 8
LINES = dict(
    re.findall(
        r"config set (launcher\w*) \"\$\(cat <<'END'\n(.*?)\nEND\n",
        (ROOT / "README.md").read_text().partition("\n### Slurm\n")[2].partition("\n##")[0],
        re.DOTALL,
    )
)
# A tree that does not listen, with a daemon of its own session; each process notes its pid.
TREE = """trap '' TERM; echo $$ >> pids; setsid sh -c 'trap "" TERM; echo $$ >> pids; sleep 60' &
(echo $$ >> pids; sleep 60) & sleep 60; echo done"""

UNTIL_GO = "until [ -e go ]; do live 1; done"


def missing() -> str:
    needed = [name for name in ("slurmctld", "slurmd", "srun", "munged") if not shutil.which(name)]
    if needed:
        return f"not installed: {', '.join(needed)}"
    return "" if os.geteuid() == 0 else "a Slurm with cgroups is started by root"


def free_ports(count: int) -> int:
    """Return the first of so many ports in a row that nobody uses."""
    for first in range(21_000 + os.getpid() % 1000 * 10, 32_000, 10):  # pids of a run are close
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no ports are free")


class Cluster:
    def __init__(self, slots: int = SLOTS) -> None:
        self.folder = tempfile.mkdtemp(prefix="slurm-")  # short, for a socket is in it
        self.port = free_ports(NODES + 1)
        self.environment = os.environ | {"SLURM_CONF": f"{self.folder}/slurm.conf"}
        try:
            self.script("start", NODES, slots, self.port)
        except subprocess.SubprocessError:
            self.script("stop")
            raise

    def script(self, what: str, *words: object) -> None:
        command = [ROOT / "tests" / "slurm.sh", what, self.folder, *map(str, words)]
        subprocess.run(command, check=True, timeout=90)

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else f"{words[0]}: {done.stderr}"

    @property
    def steps(self) -> str:
        return self.ask("squeue", "-h", "-o", "%A %j %N %T")

    def node(self, number: int) -> str:
        return f"n{self.port}-{number}"

    def stop_controller(self) -> None:
        pid = int(Path(self.folder, "pid.slurmctld").read_text())
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: worker.process_birth(pid) is None, "slurmctld is gone")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if missing():
        pytest.skip(missing())
    found = Cluster()
    yield found
    found.script("stop")
    left = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/slurm_n{found.port}*")]
    assert not left and not os.path.exists(found.folder)


@pytest.fixture
def far(queue: Queue, cluster: Cluster) -> Iterator[Queue]:
    """A queue whose runs go to the cluster; no step may be left there."""
    queue.environment |= {
        "SLURM_CONF": cluster.environment["SLURM_CONF"],
        "LEDGER": str(queue.folder / "ledger"),
    }
    (queue.folder / "ledger").touch()
    quick = dict(backoff_base=0.05, backoff_jitter=0, kill_grace_s=1, poll_interval_ms=100)
    queue.configure(**quick, **LINES)
    yield queue
    for process in queue.supervisors:
        process.send_signal(signal.SIGTERM)
    assert eventually(lambda: not cluster.steps or None, f"no step is left: {cluster.steps}")


def noted(queue: Queue, id: str, script: str, **fields: float) -> None:
    """Enqueue a job whose script writes the ledger: `live N` for N times 50 ms, `note E`."""
    enqueue(queue, id, f"bash -c {quoted(PRELUDE + script)}", **fields)


def ledger(queue: Queue) -> list[list[str]]:
    return [line.split() for line in (queue.folder / "ledger").read_text().splitlines()]


def begun(queue: Queue, count: int) -> None:
    def seen() -> bool:
        return len({line[1] for line in ledger(queue) if line[0] == "T"}) >= count

    eventually(seen, f"{count} jobs run")


def nothing_overlapped(queue: Queue) -> None:
    """No two runs of a job at once, none lost, and what is completed has come to its end."""
    lines = ledger(queue)
    assert Chaos.overlaps(None, lines) == []
    ended = {(job, int(attempt)) for what, job, attempt, _ in lines if what == "E"}
    for job in queue.json("list"):
        assert job["state"] == "completed", job
        assert (job["id"], job["attempts"]) in ended, "completed, but it came to no end"
    assert queue.run("doctor", check=0)


def settle(queue: Queue, count: int) -> None:
    eventually(lambda: queue.states()["completed"] == count, "all are completed", 60)


def test_200_jobs_run_on_the_nodes_they_say_and_end_as_they_end(far, cluster):
    codes = {f"job {number}": number % 7 if number % 5 == 0 else 0 for number in range(200)}
    says = 'echo "$QUEUECTL_JOB_ID/$SLURMD_NODENAME/$SLURM_JOB_NODELIST" | tee -a "$LEDGER"'
    command = f"{says}; echo err $SLURMD_NODENAME >&2; sleep 0.1; exit "
    jobs = [dict(id=id, command=command + str(code)) for id, code in codes.items()]
    text = json.dumps([job | {"max_retries": 0} for job in jobs])
    far.run("enqueue", "--file", "-", stdin=text, check=0)
    far.drain(count=NODES * SLOTS)
    written = (far.folder / "ledger").read_text().splitlines()
    assert len(written) == 200
    for job in far.json("list"):
        _, node, allotted = job["stdout"].strip().split("/")
        assert node == allotted and job["stdout"].strip() in written
        assert job["stderr"] == f"err {node}\n"
        assert job["exit_code"] == codes[job["id"]]
        assert job["state"] == ("dead" if codes[job["id"]] else "completed")
    nodes = [line.split("/")[1] for line in written]
    assert sorted(set(nodes)) == [cluster.node(number) for number in range(1, NODES + 1)]


def test_a_run_there_fails_is_retried_and_dies_as_one_here(far):
    there = far.folder / "there"
    there.mkdir()
    enqueue(far, "code", "echo out $QUEUECTL_ATTEMPT; echo why >&2; exit 7", max_retries=1)
    enqueue(far, "odd 'id", "kill -9 $$", max_retries=0)
    enqueue(far, "unknown", "no-such-program", max_retries=0)
    enqueue(far, "200", "exit 200", max_retries=0)
    enqueue(far, "a,b", "true", max_retries=0)
    enqueue(far, "nowhere", "echo ran", max_retries=0, cwd=str(there))
    there.rmdir()
    far.drain(count=6)
    assert runs(far, "code") == [("failed", "exit code 7: why")] * 2
    job = far.job("code")
    assert (job["state"], job["stdout"]) == ("dead", "out 2\n")
    assert all(run["line"].startswith("case code in") for run in job["runs"])
    assert far.job("odd 'id")["exit_code"] == 137
    assert far.job("unknown")["exit_code"] == 127
    assert far.job("200")["exit_code"] == 200
    assert "comma" in far.job("a,b")["last_error"]
    assert "can't cd" in far.job("nowhere")["last_error"] and not far.job("nowhere")["stdout"]


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_the_tree_there_is_dead_within_a_second(far, how):
    """Children that ignore SIGTERM, and daemons, too. The best of three, for machines are busy."""
    far.start()
    spans, pids = [], far.folder / "pids"
    for number in range(3):
        id = f"{how}-{number}"
        enqueue(far, id, TREE, max_retries=0, **({"timeout": 1.5} if how == "timeout" else {}))
        eventually(lambda: pids.exists() and len(pids.read_text().split()) == 3, "it runs")
        tree = [int(pid) for pid in pids.read_text().split()]
        began = time.monotonic()
        with closing(database.connect(far.path)) as db:
            if how == "cancel":
                database.cancel(db, database.find(db, id), time.time())
            else:
                started = db.execute("SELECT max(started_mono) FROM runs").fetchone()[0]
                began = started + 1.5
        eventually(lambda tree=tree: not any(map(worker.process_birth, tree)), "it is dead")
        spans.append(time.monotonic() - began)
        pids.unlink()
        reaches(far, id, "cancelled" if how == "cancel" else "dead")
        error = "cancelled" if how == "cancel" else "timed out after 1.5 s"
        assert far.job(id)["last_error"] == error
        assert far.job(id)["exit_code"] in (-signal.SIGTERM, -signal.SIGKILL)
        if spans[-1] < 1:
            break
    assert min(spans) < 1, spans


def kill_workers(queue: Queue, supervisor: subprocess.Popen) -> None:
    for row in queue.workers()[::2]:
        worker.send(row["pid"], signal.SIGKILL)


def kill_launchers(queue: Queue, supervisor: subprocess.Popen) -> None:
    for row in queue.workers()[::2]:
        for pid in worker.session_members(row["pid"]):
            if pid != row["pid"]:
                worker.send(pid, signal.SIGKILL)


def kill_everything(queue: Queue, supervisor: subprocess.Popen) -> None:
    rows = queue.workers()
    supervisor.kill()
    for row in rows:
        for pid in worker.session_members(row["pid"]):
            worker.send(pid, signal.SIGKILL)
    supervisor.wait()
    seen = len(ledger(queue))
    eventually(lambda: len(ledger(queue)) > seen + 8, "they live on, there")
    queue.start(count=8)


@pytest.mark.parametrize("kill", [kill_workers, kill_launchers, kill_everything])
def test_what_runs_there_is_ended_before_it_runs_again(far, kill: Callable):
    for number in range(8):
        deaf = "trap '' TERM;" if number % 2 else ""
        noted(far, f"{number}", f"{deaf} ({UNTIL_GO}) & {UNTIL_GO}; note E", max_retries=20)
    supervisor = far.start(count=8)
    begun(far, 8)
    kill(far, supervisor)
    eventually(lambda: len({line[1] for line in ledger(far) if line[2] != "1"}) >= 4, "again", 60)
    (far.folder / "go").touch()
    settle(far, 8)
    nothing_overlapped(far)
    again = [job for job in far.json("list") if job["attempts"] > 1]
    assert len(again) >= 4


def test_the_controller_goes_away_and_comes_back(far, cluster):
    for number in range(12):
        noted(far, f"{number}", "live 20; note E", max_retries=20)
    far.start(count=8)
    begun(far, 8)
    cluster.stop_controller()
    eventually(lambda: sum(line[0] == "E" for line in ledger(far)) >= 8, "they go on and end")
    cluster.script("ctld")
    settle(far, 12)
    nothing_overlapped(far)


def test_a_node_goes_down_and_its_jobs_run_on_another(far, cluster):
    """srun exits 0 then: a killed run must not pass for a completed one."""
    for number in range(8):
        noted(far, f"{number}", f"echo $SLURMD_NODENAME > node.{number}; {UNTIL_GO}; note E")

    def where(number: int) -> str:
        return (far.folder / f"node.{number}").read_text().strip()

    far.start(count=8)
    begun(far, 8)
    node = where(0)
    hit = {number for number in range(8) if where(number) == node}
    cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    eventually(lambda: all(where(number) not in ("", node) for number in hit), "elsewhere", 60)
    (far.folder / "go").touch()
    settle(far, 8)
    cluster.ask("scontrol", "update", f"nodename={node}", "state=idle")
    nothing_overlapped(far)
    for number in hit:
        assert far.job(f"{number}")["attempts"] == 2


def test_who_is_cancelled_by_a_stranger_has_failed(far, cluster):
    noted(far, "a", f"{UNTIL_GO}; note E", max_retries=0)
    far.start()
    begun(far, 1)
    cluster.ask("scancel", "-n", "q-a-1")
    reaches(far, "a", "dead")
    assert far.job("a")["exit_code"] in (143, 200)
