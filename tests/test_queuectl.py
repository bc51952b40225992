"""The command line as a user meets it: exact output, exit codes, bad input, terminals and pipes."""

from __future__ import annotations

import ctypes
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import DEADLINE_S, ROOT, Queue, eventually

import config
import database
import queuectl

QUEUECTL = [sys.executable, str(ROOT / "queuectl.py")]
FIELDS = (
    "id command priority run_at max_retries backoff_base timeout_s cwd state attempts exit_code"
    " last_error stdout stderr worker created_at updated_at started_at finished_at"
).split()
RUN_FIELDS = (
    "id attempt worker due_at started_at finished_at outcome exit_code error stdout stderr line"
).split()
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
EVIL = "\x1b]0;evil\x07 \x9b31m \u202e"  # title, bell, colour in one byte (C1), turned text


def settle_queue(queue: Queue) -> None:
    """Fill a queue with a job of each kind; what the worker said is kept in `said`."""
    evil = f": '{EVIL}'; printf '{EVIL}'; printf '{EVIL}' >&2; printf '\\377' >&2; exit 3"
    first = [
        {"id": "good", "command": "echo one; echo oops >&2"},
        {"id": "flaky", "command": '[ "$QUEUECTL_ATTEMPT" = 2 ] && echo second'},
        {"id": "long", "command": "yes 123456789 | head -n 1000"},
        {"id": "evil", "command": evil, "max_retries": 0},
    ]
    queue.run("enqueue", "--file", "-", stdin="\n".join(map(json.dumps, first)), check=0)
    queue.said = queue.drain()
    second = [
        {"id": "twin1", "command": "true", "run_at": "2020-01-01"},
        {"id": "twin2", "command": "true", "run_at": "2020-01-02", "priority": 1},
        {"id": "later", "command": "true", "run_at": "2999-01-01T00:00:00Z", "priority": 9},
        {"id": "called off", "command": "true"},
    ]
    queue.run("enqueue", "--file", "-", stdin="\n".join(map(json.dumps, second)), check=0)
    queue.run("cancel", "called off", check=0)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: Any) -> Iterator[Queue]:
    """A queue that is made once and only read: every test finds it as it was, or fails."""
    found = Queue(tmp_path_factory.mktemp("standing"))
    found.configure(backoff_base=0.05, backoff_jitter=0, poll_interval_ms=100)
    settle_queue(found)
    before = snapshot(found)
    yield found
    assert snapshot(found) == before
    found.assert_clean()


def snapshot(queue: Queue) -> tuple[list[str], bytes]:
    db = database.connect(queue.path)
    try:
        return list(db.iterdump()), Path(queue.config).read_bytes()
    finally:
        db.close()


def masked(queue: Queue, text: str) -> list[str]:
    """Return lines without what differs each time; columns that shift with it are closed up."""
    lines = []
    for line in text.replace(str(queue.folder), "DIR").splitlines():
        plain = re.sub(r"pid \d+|\b\d\d:\d\d:\d\d\b", "N", TIME.sub("TIME", line))
        plain = re.sub(r"\d+(\.\d+)? (m?s|min|h|d)\b( \d+ (s|min|h)\b)?", "SPAN", plain)
        lines.append(line if plain == line else re.sub(" +", " ", plain))
    return lines


# --- exact output ----------------------------------------------------------------------------

# $ a command line; then its stdout; "! " its stderr; "[1]" its exit code if that is not 0.
TRANSCRIPT = r"""
$ init
queue ready: DIR/queue.db
$ enqueue '{"command": "echo hi; echo oops >&2", "id": "good", "timeout": 30}'
good
$ enqueue --command 'echo no >&2; exit 3' --id bad --max-retries 1 --priority -1 --timeout 1m
bad
$ enqueue --command true --id later --delay 2h --cwd /tmp
later
$ enqueue --command true --id dated --run-at 2999-01-31T12:00:00+02:00
dated
$ enqueue --command true --id unix --run-at 32477000000
unix
$ enqueue '{"id": "good", "command": "echo other"}'
! Error: the id "good" is in use; choose another, or leave it out
[1]
$ status
Pending:           5
Processing:        0
Completed:         0
Failed:            0
Dead:              0
Cancelled:         0
Total:             5

0 active workers
last hour: no run has ended
$ list --ready
ID    STATE    ATTEMPTS  DUE  COMMAND
good  pending  0         now  echo hi; echo oops >&2
bad   pending  0         now  echo no >&2; exit 3
$ list --pending-ready-only --limit 1
ID    STATE    ATTEMPTS  DUE  COMMAND
good  pending  0         now  echo hi; echo oops >&2
$ logs good
! Error: job "good" has not run yet; --follow waits for it
[1]
$ cancel later dated unix
later cancelled
dated cancelled
unix cancelled
$ cancel later
! Error: job "later" is already cancelled
[1]
$ worker start --drain
N supervisor N started 1 worker on DIR/queue.db; Ctrl+C stops
N w1 N started good (run 1 of 4): echo hi; echo oops >&2
N w1 N completed good in SPAN
N w1 N started bad (run 1 of 2): echo no >&2; exit 3
N w1 N failed bad: exit code 3: no; retry 1 of 1 in SPAN
N w1 N started bad (run 2 of 2): echo no >&2; exit 3
N w1 N dead bad: exit code 3: no; moved to the DLQ after 2 runs
N supervisor N left
$ status
Pending:           0
Processing:        0
Completed:         1
Failed:            0
Dead:              1
Cancelled:         3
Total:             5

0 active workers
last hour: 0.02 jobs a minute, 33.3% of runs succeeded, median wait SPAN, median run SPAN
$ list
ID     STATE      ATTEMPTS  DUE  COMMAND
good   completed  1         -    echo hi; echo oops >&2
bad    dead       2         -    echo no >&2; exit 3
later  cancelled  0         -    true
dated  cancelled  0         -    true
unix   cancelled  0         -    true
$ list --state dead --state completed
ID    STATE      ATTEMPTS  DUE  COMMAND
good  completed  1         -    echo hi; echo oops >&2
bad   dead       2         -    echo no >&2; exit 3
$ show ba
bad: dead after 2 runs; `dlq retry bad` starts over
  command       echo no >&2; exit 3
  priority      -1
 run_at TIME
  max_retries   1
  backoff_base  0.05
  timeout_s     60.0
  cwd           DIR
  state         dead
  attempts      2
  exit_code     3
  last_error    exit code 3: no
  worker        w1
 created_at TIME
 updated_at TIME
 started_at TIME
 finished_at TIME
 run 1: TIME to TIME on w1: exit code 3: no
 run 2: TIME to TIME on w1: exit code 3: no
--- stderr ---
no
$ logs good
--- stdout ---
hi
--- stderr ---
oops
$ wait good
$ wait good bad
! Error: 1 dead, 0 cancelled; `list --state dead --state cancelled` shows them
[1]
$ dlq list
ID   STATE  ATTEMPTS  ERROR            COMMAND
bad  dead   2         exit code 3: no  echo no >&2; exit 3
$ dlq retry good
! Error: job "good" is completed, not dead: nothing was changed
[1]
$ dlq retry bad
1 job pending again
$ dlq retry --all
0 jobs pending again
$ list --ready
ID   STATE    ATTEMPTS  DUE  COMMAND
bad  pending  0         now  echo no >&2; exit 3
$ wait --timeout 10ms
! no worker is running; `worker start` starts one
! Error: after SPAN 1 of 5 jobs not settled
[1]
$ prune --older-than 1d
0 jobs removed
$ prune --older-than 0s --state cancelled --dry-run
3 jobs would be removed
$ prune --older-than 0s
4 jobs removed
$ show good
! Error: no job "good"; `list` shows those that are there
[1]
$ config get backoff-base
0.05
$ config max_retries 5
KEY          VALUE  MEANING
max_retries  5      times a failed job is run again
$ config set Default-Timeout 1.5
KEY            VALUE  MEANING
job_timeout_s  1.5    seconds a run may take; 0: no limit
$ config list
KEY                 VALUE  MEANING
max_retries         5      times a failed job is run again
backoff_base        0.05   seconds, raised to the attempt number
backoff_jitter      0      share of backoff_base added at random
max_backoff_s       3600   longest backoff, before jitter
job_timeout_s       1.5    seconds a run may take; 0: no limit
kill_grace_s        1      seconds between SIGTERM and SIGKILL
lock_timeout_s      30     a worker silent for so long is lost
poll_interval_ms    100    the longest an idle worker sleeps
output_limit_bytes  8192   kept of stdout and of stderr
launcher                   runs a command elsewhere; empty: here, by /bin/sh
launcher_stop              ends what a run may have left there
"""


def test_every_command_prints_exactly_this(queue: Queue) -> None:
    for step in TRANSCRIPT.strip().removeprefix("$ ").split("\n$ "):
        line, *told = step.split("\n")
        done = queue.run(*shlex.split(line))
        got = ["! " + text if text else "" for text in masked(queue, done.stderr)]
        got += masked(queue, done.stdout) + [f"[{done.returncode}]"] * (done.returncode != 0)
        assert got == told, line


def test_json_is_one_document_and_a_job_looks_the_same_everywhere(standing: Queue) -> None:
    shown = standing.json("show", "good")
    runs = shown.pop("runs")
    assert [list(run) for run in runs] == [RUN_FIELDS]
    assert list(shown) == FIELDS
    fixed = {key: value for key, value in shown.items() if not TIME.fullmatch(str(value))}
    assert fixed == {
        "id": "good",
        "command": "echo one; echo oops >&2",
        "priority": 0,
        "max_retries": 3,
        "backoff_base": 0.05,
        "timeout_s": 0,
        "cwd": str(standing.folder),
        "state": "completed",
        "attempts": 1,
        "exit_code": 0,
        "last_error": None,
        "stdout": "one\n",
        "stderr": "oops\n",
        "worker": "w1",
    }
    listed = standing.json("list")
    assert {job["id"]: job for job in listed}["good"] == shown
    others = [*listed, *standing.json("list", "--ready"), *standing.json("dlq", "list")]
    assert [list(job) for job in others] == [FIELDS] * (8 + 2 + 1)
    assert standing.json("worker", "list") == standing.json("list", "--state", "failed") == []
    status = standing.json("status")
    assert list(status)[:7] == [*database.STATES, "total"]
    assert [status[key] for key in (*database.STATES, "total")] == [3, 0, 3, 0, 1, 1, 8]
    assert list(status)[7:] == (
        "workers jobs_per_minute success_rate median_wait_s median_run_s".split()
    )
    assert standing.json("config", "get", "max-retries") == {"max_retries": 3}
    assert standing.json("config", "get") == standing.json("config", "list")
    assert standing.json("doctor")["ok"] is True


def test_enqueue_prints_the_job_as_json_and_many_as_an_array(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    one = queue.json("enqueue", '{"command": "a", "run_at": 32503680000.5}')
    assert list(one) == FIELDS
    assert (one["state"], one["run_at"]) == ("pending", "3000-01-01T00:00:00.500Z")
    assert re.fullmatch("[0-9a-f]{8}", one["id"])
    many = queue.run("enqueue", "--file", "-", "--lines", "--json", stdin="b\nc\n", check=0)
    assert [job["command"] for job in json.loads(many.stdout)] == ["b", "c"]
    assert json.loads(queue.run("enqueue", "--file", "-", "--json", stdin="").stdout) == []


def test_only_as_many_jobs_are_listed_as_asked_for(standing: Queue) -> None:
    def ids(*words: str) -> list[str]:
        return [job["id"] for job in standing.json("list", *words)]

    assert ids("--ready") == ["twin2", "twin1"]  # in the order in which they would run
    assert ids("--limit", "2") == ["later", "called off"]  # the newest, in order
    assert ids("--state", "dead", "--state", "cancelled") == ["evil", "called off"]
    assert ids("--state", "dead", "--state", "cancelled", "--limit", "1") == ["called off"]


def test_doctor_says_of_a_file_that_was_cut_short_what_is_wrong(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.run("init", check=0)
    os.truncate(queue.path, 4096)
    said = queue.run("doctor", check=1).stdout.splitlines()
    assert said[0].startswith("BROKEN  the file can be opened as a queue: ")
    assert said[1].startswith("        perhaps broken by a failing disk, a copy that was cut short")
    assert json.loads(queue.run("doctor", "--json", check=1).stdout)["ok"] is False


def test_doctor_names_a_file_that_sqlite_cannot_open(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["d" * 200] * 3)  # it takes 512 bytes; as if it were not ours
    folder.mkdir(parents=True)
    (folder / "queue.db").touch()
    done = Queue(tmp_path).run("--db", str(folder / "queue.db"), "doctor", "--json", check=1)
    assert "cannot be opened" in json.loads(done.stdout)["checks"][0]["problem"]


def test_a_queue_that_is_removed_meanwhile_acknowledges_nothing(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.run("init", check=0)
    process = subprocess.Popen(
        [*QUEUECTL, "enqueue", "--lines", "--file", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=queue.environment,
    )
    last = Path(queue.path + "-shm")  # SQLite makes it after the -wal
    eventually(last.exists, "it has opened the queue and waits for its input")
    for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
        (tmp_path / name).unlink()
    said, remarks = process.communicate(b"echo lost\n", timeout=30)
    assert (process.returncode, said) == (1, b"")
    assert remarks.endswith(b"queue.db is gone or was replaced\n")


@pytest.mark.parametrize("words", ["wait", "wait a", "logs a --follow", "status --watch"])
def test_a_queue_is_replaced_while_one_waits_for_it(tmp_path: Path, words: str) -> None:
    """By a copy, in which the job will never settle where this one looks."""
    queue = Queue(tmp_path)
    queue.run("enqueue", '{"id": "a", "command": "true"}', check=0)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([*QUEUECTL, *words.split()], **streams, env=queue.environment)
    assert process.stdout.readline()
    copy = tmp_path / "copy"
    copy.write_bytes(Path(queue.path).read_bytes())
    copy.rename(queue.path)
    said = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 1 and said.endswith(b"queue.db is gone or was replaced\n")


def test_doctor_names_the_invariant_that_is_broken(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.run("enqueue", "--command", "true", "--id", "odd", check=0)
    well = queue.run("doctor", check=0).stdout.splitlines()
    assert all(line.startswith("ok      ") for line in well[::2])
    assert all(line.startswith("        would be broken by ") for line in well[1::2])
    db = database.connect(queue.path)
    db.execute("UPDATE jobs SET state = 'asleep'")
    db.close()
    said = queue.run("doctor", check=1).stdout.splitlines()
    broken = said.index("BROKEN  every state is one of the six: found in odd")
    assert said[broken + 1].startswith("        perhaps broken by a hand in the file")
    found = json.loads(queue.run("doctor", "--json", check=1).stdout)
    assert found["ok"] is False
    [state] = [each for each in found["checks"] if each["problem"] == "found in odd"][:1]
    assert state["check"] == "every state is one of the six" and "hand" in state["broken_by"]


def test_doctor_looks_at_the_settings_too(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.configure(max_retries="many")
    found = json.loads(queue.run("doctor", "--json", check=1).stdout)
    [problem] = [each["problem"] for each in found["checks"] if each["problem"]]
    assert problem.startswith(f'{queue.config}: "max_retries" must be a whole number, not "many"; ')


def test_doctor_prints_its_document_whatever_the_path(tmp_path: Path) -> None:
    done = Queue(tmp_path).run("--db", "/etc/passwd/x", "doctor", "--json", check=1)
    assert json.loads(done.stdout)["ok"] is False


def test_an_older_python_is_refused_in_a_sentence() -> None:
    program = "import sys; sys.version_info = (3, 9, 18); import queuectl"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Python 3.10 or newer is needed, this is ")


# --- bad input -------------------------------------------------------------------------------


def assert_refused(queue: Queue, code: int, said: str, *words: str) -> None:
    """One clear line, the right exit code, nothing on stdout, and nothing changed.

    In this process, for there are many of these: an exception that gets out fails the test.
    """
    before, out, err = snapshot(queue), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(os, "environ", queue.environment)
        patch.setattr(sys, "argv", ["queuectl.py", *words])
        patch.chdir(queue.folder)
        left = queuectl.main()
    *usage, last = err.getvalue().splitlines()
    assert last.startswith("Error: ") and said in last, err.getvalue()
    assert not usage or usage[0].startswith("Usage: queuectl.py"), err.getvalue()
    assert (left, out.getvalue()) == (code, "")
    assert snapshot(queue) == before


def with_command(field: str, value: str) -> str:
    return f'{{"command": "true", "{field}": {value}}}'


HUGE = str(2**63)
BAD_JOBS = [
    ("not json", "not JSON"),
    ('{"command": "true"', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("", "not JSON"),
    ("[1]", "not an array"),
    ("null", "not null"),
    ("7", "not 7"),
    ('{"id": "x"}', 'needs a "command"'),
    ('{"command": ""}', '"command" is empty'),
    ('{"command": " \\n"}', '"command" is empty'),
    ('{"command": ["ls"]}', '"command" must be text, not an array'),
    ('{"command": null}', '"command" must be text, not null'),
    ('{"command": "a\\u0000b"}', '"command" contains a NUL'),
    ('{"command": "a\\ud800b"}', '"command" is not valid Unicode'),
    ('{"command": "a", "command": "b"}', 'the key "command" is repeated'),
    (with_command("colour", "1"), 'unknown field "colour"'),
    (with_command("a\\ud800", "1"), r'unknown field "a\ud800"'),
    (with_command("timeout", '1, "timeout_s": 2'), "the same field"),
    (with_command("cwd", '"/tmp\\u0000"'), '"cwd" contains a NUL'),
    (with_command("cwd", '"\\udfff"'), '"cwd" is not valid Unicode'),
    (with_command("cwd", "7"), '"cwd" must be text'),
    (with_command("run_at", "true"), '"run_at" must be a date or Unix seconds, not true'),
    (with_command("id", '""'), '"id" is empty'),
    (with_command("id", '"' + "x" * 129 + '"'), "129 characters; at most 128"),
    (with_command("id", '"a\\u001bb"'), "cannot be printed"),
    (with_command("id", '"a\\nb"'), "cannot be printed"),
    (with_command("id", '"a\\u202eb"'), "cannot be printed"),
    (with_command("id", '"a\\u0000"'), '"id" contains a NUL'),
    (with_command("id", '"\\ud800"'), '"id" is not valid Unicode'),
    (with_command("cwd", '""'), '"cwd" is empty'),
    (with_command("id", "7"), '"id" must be text, not 7'),
] + [
    (with_command(field, value), f'"{field}"')
    for field, values in (
        ("priority", ["1.5", HUGE, "-" + HUGE, "NaN", "true", '"5"', "null"]),
        ("max_retries", ["-1", "1.5", HUGE, "NaN", "true", "1001"]),
        ("timeout", ["-1", HUGE, "NaN", "Infinity", "true", '"30s"']),
        ("timeout_s", ["-0.5", "1e400"]),
        ("backoff_base", ["-1", "true", "1001"]),
        ("run_at", ["-1", HUGE, "NaN", "true", "[]", '""', '"soon"', '"2030-13-01"', '"1\\u0000"']),
    )
    for value in values
]


@pytest.mark.parametrize("text, said", BAD_JOBS, ids=[text[:60] for text, _ in BAD_JOBS])
def test_a_bad_job_is_refused_and_nothing_changes(standing: Queue, text: str, said: str) -> None:
    assert_refused(standing, 2, said, "enqueue", text)


BAD_CALLS = [
    (2, "give one of: a JOB, --command, --file", "enqueue"),
    (2, "give one of: a JOB, --command, --file", "enqueue '{}' --command true"),
    (2, "argument (hello) (see queuectl.py enqueue --help)", "enqueue echo hello"),
    (2, "No such command 'retry' (see queuectl.py --help)", "retry good"),
    (2, "'--limit' requires an argument", "list --limit"),
    (2, "'--ready' does not take a value", "list --ready=1"),
    (2, "--id goes with --command", "enqueue --id x '{}'"),
    (2, "--lines goes with --file", "enqueue --lines --command true"),
    (2, "give one of them", "enqueue --command true --delay 1s --run-at 0"),
    (2, "is no date", "enqueue --command true --run-at tomorrow"),
    (2, "'1969-07-20' is no date from 1970", "enqueue --command true --run-at 1969-07-20"),
    (2, "is no date", "enqueue --command true --run-at 9999-12-31T23:59:59-01:00"),
    (2, "argument (two\\nlines) (see", "enqueue echo 'two\nlines'"),
    (2, "'--delay': \"-1s\" is no duration", "enqueue --command true --delay -1s"),
    (2, "'--timeout': \"5x\" is no duration", "enqueue --command true --timeout 5x"),
    (2, "Invalid value for '--priority': '1.5'", "enqueue --command true --priority 1.5"),
    (2, '"max_retries" must be from', "enqueue --command true --max-retries -1"),
    (2, "'--max-retries': 'many' is not", "enqueue --command true --max-retries many"),
    (2, '"command" is empty', "enqueue --command ''"),
    (2, '"command" is not valid Unicode', "enqueue --command \udcff"),
    (1, 'the id "good" is in use', "enqueue --command true --id good"),
    (2, "No such file", "enqueue --file missing.json"),
    (2, "Is a directory", "enqueue --file ."),
    (2, "No such option", "list --colour"),
    (2, "No such command", "frobnicate"),
    (2, "is not one of 'pending'", "list --state asleep"),
    (2, "--limit", "list --limit -1"),
    (2, "--limit", f"dlq list --limit {HUGE}"),
    (2, "leave --state out", "list --ready --state dead"),
    (1, 'no job "nope"', "show nope"),
    (1, 'no job ""', "show ''"),
    (1, "no job", "show \udcff"),
    (1, '"twin" is ambiguous: twin1, twin2', "show twin"),
    (1, '"twin" is ambiguous', "logs twin"),
    (1, '"twin" is ambiguous', "wait twin"),
    (1, '"twin" is ambiguous', "cancel later twin"),
    (1, '"twin" is ambiguous', "dlq retry evil twin"),
    (1, "is pending, not dead", "dlq retry evil twin1"),
    (1, "is already completed", "cancel good"),
    (2, "give the IDs of dead jobs, or --all", "dlq retry"),
    (2, "give the IDs of dead jobs, or --all", "dlq retry --all evil"),
    (1, "has no run 2", "logs good --attempt 2"),
    (2, "--attempt", "logs good --attempt 0"),
    (2, "--count", "worker start --count 0"),
    (2, "--count", "worker start --count 1.5"),
    (2, "is no duration", "worker stop --timeout soon"),
    (2, "--older-than", "prune"),
    (2, "is no duration", "prune --older-than -1d"),
    (2, "--state", "prune --older-than 1d --state pending"),
    (2, 'unknown setting "colour"', "config set colour 1"),
    (2, 'unknown setting "colour"', "config get colour"),
    (2, 'max_retries: "many" is not a number', "config set max-retries many"),
    (2, '"max_retries" must be a whole number', "config max-retries 1.5"),
    (2, '"max_retries" must be from 0 to 1000, not -1', "config set max-retries -1"),
    (2, '"max_retries" must be from', f"config set max-retries {HUGE}"),
    (2, '"backoff_base" must be from', "config set backoff-base nan"),
    (2, '"lock_timeout_s" must be from 2 to 86400, not 1', "config lock_timeout_s 1"),
    (2, "config set KEY VALUE", "config set max-retries"),
]


@pytest.mark.parametrize("code, said, line", BAD_CALLS, ids=[ascii(call[2]) for call in BAD_CALLS])
def test_a_wrong_call_is_refused(standing: Queue, code: int, said: str, line: str) -> None:
    assert_refused(standing, code, said, *shlex.split(line))


def test_no_help_is_named_where_it_would_be_anothers(queue: Queue) -> None:
    """Of an option without its value click does not say of which command it is."""
    assert "--help" not in queue.run("list", "--limit", check=2).stderr


BAD_FILES = [
    (2, "line 2: not JSON: Expecting value, column 13", [], '{"command": "a"}\n{"command": }\n'),
    (2, "line 3: a job is a JSON object, not 7", [], '[{"command": "a"},\n\n7]'),
    (2, "line 2: a job is a JSON object, not an array", [], '{"command": "a"}\n[{"command": "b"}]'),
    (2, 'line 2: not JSON: "," or "]" is missing', [], '[{"command": "a"}\n{"command": "b"}]'),
    (2, "something follows the array", [], '[{"command": "a"}] x'),
    (2, 'line 1: a job needs a "command"', [], "{}"),
    (2, 'line 2: "command" has 131,072 bytes; a program', ["--lines"], "true\n" + "x" * 131_072),
    (2, 'line 2: unknown field "b"', [], '{"command": "a"}\r\n{"command": "a", "b": 1}\r\n'),
    (1, 'line 2: the id "x" is used twice', [], '{"command":"a","id":"x"}\n' * 2),
    (1, 'line 2: the id "good" is in use', [], '{"command":"a"}\n{"command":"a","id":"good"}\n'),
    (1, 'line 3: the id "good" is in use', [], '\n\n{"command":"a","id":"good"}\n'),
    (2, "line 2: not UTF-8", [], b'{"command": "a"}\n{"command": "\xff"}\n'),
    (2, "line 2: not UTF-8", ["--lines"], b"echo a\necho \xff\n"),
    (2, 'line 2: "command" contains a NUL', ["--lines"], b"echo a\necho \0\n"),
]


@pytest.mark.parametrize("code, said, words, data", BAD_FILES, ids=[bad[1] for bad in BAD_FILES])
def test_one_bad_entry_refuses_a_whole_file_and_its_line_is_named(
    standing: Queue, code: int, said: str, words: list[str], data: str | bytes
) -> None:
    file = standing.folder / "bad"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    assert_refused(standing, code, said, "enqueue", "--file", str(file), *words)


def test_line_70000_of_100000_is_named_and_nothing_is_enqueued(standing: Queue) -> None:
    lines = ['{"command": "true", "priority": 1}\n'] * 100_000
    lines[69_999] = '{"command": "true", "priority": 1.5}\n'
    file = standing.folder / "many.json"
    file.write_text("".join(lines))
    assert_refused(standing, 2, 'line 70000: "priority" must be', "enqueue", "--file", str(file))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: path.mkdir() or path.chmod(0o777), "Is a directory"),  # as /tmp is
        (lambda path: path.write_bytes(b"no database, but long enough\n" * 99), "is not a queue"),
        (lambda path: path.write_text("short"), "is not a queue"),
        (lambda path: path.symlink_to("nowhere/at/all"), "cannot be opened"),
        (lambda path: path.parent.joinpath("queue.db").rename(path.parent / "gone"), "No such"),
    ],
    ids=["a directory", "some file", "a short file", "a dangling link", "a missing directory"],
)
@pytest.mark.parametrize("words", ["enqueue --command true", "worker start --drain"])
def test_what_is_no_queue_is_refused_and_stays_as_it_is(
    tmp_path: Path, make: Any, said: str, words: str
) -> None:
    queue = Queue(tmp_path)
    if said == "No such":
        queue.path = str(tmp_path / "gone" / "queue.db")
    else:
        make(tmp_path / "queue.db")
    before = [(path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")]
    done = queue.run("--db", queue.path, *words.split(), check=1)
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr and queue.path in done.stderr and done.stdout == ""
    assert [(path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")] == before


def test_a_database_of_someone_else_or_of_a_newer_queuectl_is_refused(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.run("init", check=0)
    db = database.connect(queue.path)
    db.execute(f"PRAGMA user_version = {database.VERSION + 1}")
    assert "use a newer queuectl" in queue.run("list", check=1).stderr
    db.execute("PRAGMA application_id = 7")
    db.close()
    assert "is a database, but no queue" in queue.run("list", check=1).stderr


def without_power_over_permissions() -> None:
    """In a child of root: what the mode bits forbid is forbidden (prctl(2), capabilities(7))."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_a_read_only_database_is_read_and_refuses_changes(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.configure()
    queue.run("enqueue", "--command", "true", "--id", "fixed", check=0)
    before = snapshot(queue)

    def run(*command: str) -> tuple[int, str, str]:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=queue.environment,
            preexec_fn=without_power_over_permissions if os.geteuid() == 0 else None,
        )
        return done.returncode, done.stdout, done.stderr

    os.chmod(queue.path, 0o400)
    if run("test", "-w", queue.path)[0] == 0:
        pytest.skip("root cannot give up its power over permissions here")
    for mode in (0o500, 0o700):
        tmp_path.chmod(mode)
        for line in ("enqueue --command true", "cancel fixed", "worker start --drain"):
            code, out, err = run(*QUEUECTL, *line.split())
            assert (code, out, err.count("\n")) == (1, "", 1), err
            assert err.startswith(f"Error: {queue.path}") and "writable" in err, err
    assert run(*QUEUECTL, "show", "fixed")[0] == 0
    assert snapshot(queue) == before


DAMAGED = {
    "": "not JSON",
    '{"max_retries": 3,': "line 1 column 19",
    "[1]": "",
    '{"max_retries": 1, "max_retries": 2}': 'the key "max_retries" is repeated',
    '{"colour": 1}': 'unknown setting "colour"',
    '{"max_retries": "3"}': '"max_retries" must be a whole number, not "3"',
    '{"max_retries": true}': '"max_retries" must be a whole number, not true',
    '{"backoff_base": NaN}': '"backoff_base" must be from 0 to 1000, not NaN',
    '{"poll_interval_ms": 5}': '"poll_interval_ms" must be from 10 to 60000, not 5',
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_settings_file_is_an_error_that_names_the_place(
    tmp_path: Path, text: str
) -> None:
    queue = Queue(tmp_path)
    Path(queue.config).write_text(text)
    for line in ("enqueue --command true", "config get", "config set max-retries 5"):
        done = queue.run(*shlex.split(line), check=1)
        assert done.stderr.startswith(f"Error: {queue.config}: ") and DAMAGED[text] in done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert Path(queue.config).read_text() == text
    assert not os.path.exists(queue.path) or queue.states()["total"] == 0


def test_a_run_that_cannot_start_fails_and_the_worker_lives_on(queue: Queue) -> None:
    queue.configure(launcher="exec sh -c {command}")
    gone = queue.folder / "gone"
    gone.mkdir()
    jobs = [
        {"id": "long", "command": "true ".ljust(config.TEXT_LIMIT, "x"), "max_retries": 0},
        {"id": "lost", "command": "true", "cwd": str(gone), "max_retries": 0},
        {"id": "next", "command": "echo fine"},
    ]
    for job in jobs:
        queue.run("enqueue", "-", stdin=json.dumps(job), check=0)
    gone.rmdir()
    queue.drain()
    found = [queue.job(job["id"]) for job in jobs]
    assert [(job["state"], job["worker"], job["exit_code"]) for job in found] == [
        ("dead", "w1", None),
        ("dead", "w1", None),
        ("completed", "w1", 0),
    ]
    assert found[0]["last_error"].startswith("cannot be started: Argument list too long")
    assert found[1]["last_error"] == f"cannot be started: No such file or directory: {gone}"


def test_vacuum_gives_the_room_back_but_does_not_wait_for_who_reads(queue: Queue) -> None:
    text = "true " + "x" * 1000 + "\n"
    queue.run("enqueue", "--file", "-", "--lines", stdin=text * 2000, check=0)
    ids = [job["id"] for job in queue.json("list")]
    queue.run("cancel", *ids, check=0)
    with closing(sqlite3.connect(queue.path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM jobs").fetchall()
        done = queue.run("prune", "--older-than", "0s", "--vacuum", check=0)
        assert done.stdout == "2000 jobs removed\n" and "shrinks later" in done.stderr
    done = queue.run("prune", "--older-than", "0s", "--vacuum", check=0)
    assert (done.stdout, done.stderr) == ("0 jobs removed\n", "")
    assert os.path.getsize(queue.path) < 200_000


def test_a_path_goes_through_links_as_the_system_goes(queue: Queue) -> None:
    (queue.folder / "far" / "sub").mkdir(parents=True)
    (queue.folder / "far" / "config.json").write_text('{"max_retries": 7}')
    (queue.folder / "link").symlink_to("far/sub")
    found = queue.run("--config", "link/../config.json", "config", "get", "max_retries", check=0)
    assert found.stdout == "7\n"
    queue.run("--db", "link/../q.db", "enqueue", "--command", "true", check=0)
    assert queue.run("--db", "far/q.db", "list", "--json", check=0).stdout.count('"pending"') == 1
    assert not (queue.folder / "q.db").exists()


@pytest.mark.parametrize(
    "words",
    [
        "enqueue --command true",
        "--config c worker start --detach",
        "--config c config max-retries 1",
    ],
)
def test_a_caller_without_a_directory_gets_one_line(
    standing: Queue, tmp_path: Path, words: str
) -> None:
    (tmp_path / "gone").mkdir()
    line = 'cd gone && rmdir ../gone && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", line, "sh", *QUEUECTL, *words.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=standing.environment,
    )
    assert done.returncode == 1
    assert done.stderr == "Error: the current directory is gone; change to another\n"


# --- many at once ----------------------------------------------------------------------------

GOOD_FILES = {
    "objects": ([], '{"command": "a"}\n\n{"command": "b"}'),
    "an array": ([], '\n[{"command": "a"},\n {"command": "b"}]\n'),
    "CRLF": ([], '{"command": "a"}\r\n{"command": "b"}\r\n'),
    "a BOM": ([], '\ufeff{"command": "a"}\n{"command": "b"}\n'),
    "a BOM and an array": ([], '\ufeff[{"command": "a"}, {"command": "b"}]'),
    "lines": (["--lines"], "a\n\nb"),
    "lines of CRLF with a BOM": (["--lines"], "\ufeffa\r\nb\r\n"),
}


@pytest.mark.parametrize("form", GOOD_FILES)
def test_a_file_may_come_in_any_of_these_forms(tmp_path: Path, form: str) -> None:
    queue, (words, text) = Queue(tmp_path), GOOD_FILES[form]
    (tmp_path / "jobs").write_bytes(text.encode())
    done = queue.run("enqueue", "--file", "jobs", *words, check=0)
    assert (done.stdout, done.stderr) == ("enqueued 2 jobs\n", "")
    assert [job["command"] for job in queue.json("list")] == ["a", "b"]


def test_an_empty_file_is_no_job(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    for text in ("", "\n\n", "[]", " [ ] \n"):
        assert queue.run("enqueue", "--file", "-", stdin=text).stdout == "enqueued 0 jobs\n"


def test_a_printed_record_can_be_pasted_back(standing: Queue, tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    shown = standing.run("show", "evil", "--json", check=0).stdout
    done = queue.run("enqueue", "-", stdin="\ufeff" + shown, check=0)
    assert done.stdout == "evil\n"
    ignored = {*FIELDS[FIELDS.index("state") :], "runs"}
    assert done.stderr == f"ignored, set by the queue: {', '.join(sorted(ignored))}\n"
    old, new = json.loads(shown), queue.job("evil")
    kept = FIELDS[: FIELDS.index("state")]
    assert [new[name] for name in kept] == [old[name] for name in kept]
    assert (new["state"], new["attempts"], new["runs"]) == ("pending", 0, [])


# --- terminals and pipes ---------------------------------------------------------------------


def on_terminal(queue: Queue, *words: str, ended_at: str | None = None) -> tuple[int, str]:
    """Run a command on a terminal of its own; return (exit code, what appeared there).

    It is sent SIGINT as soon as `ended_at` has appeared.
    """
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "80"} | queue.environment
    process = subprocess.Popen(
        [*QUEUECTL, *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        cwd=queue.folder,
    )
    os.close(theirs)
    shown = b""
    try:
        while select.select([ours], [], [], DEADLINE_S)[0]:
            data = os.read(ours, 65_536)
            shown += data
            if not data:
                break
            if ended_at and ended_at.encode() in shown:
                process.send_signal(signal.SIGINT)
                ended_at = None
    except OSError:
        pass  # how Linux says that the last one has closed it
    os.close(ours)
    try:
        return process.wait(DEADLINE_S), shown.decode()
    finally:
        process.kill()


SHOWS_IT = "list;list --state dead;show evil;logs evil;logs evil --stderr --follow;dlq list"
HIDES_IT = "list --json;show evil --json;status;wait evil;worker list;enqueue 'E';'E';list --'E'"
REPEATS_IT = "show 'E';config get 'E';list --state 'E';--db '/nowhere/E' list"


@pytest.mark.parametrize(
    "line", [*SHOWS_IT.split(";"), *HIDES_IT.split(";"), *REPEATS_IT.split(";")]
)
def test_what_a_terminal_would_obey_never_reaches_it_raw(standing: Queue, line: str) -> None:
    done = standing.run(*shlex.split(line.replace("E", EVIL)))
    assert not set("\x1b\x07\x9b\u202e") & set(done.stdout + done.stderr)
    if line not in HIDES_IT:
        assert ascii(EVIL)[1:-1] in done.stdout + done.stderr
    assert not set("\x1b\x07\x9b\u202e") & set(standing.said)
    assert standing.said.count(ascii(EVIL)[1:-1]) == 4  # started: it is in the command three times


def test_a_reader_who_leaves_early_sees_no_traceback(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    many = f"true {'x' * 60}\n" * 4000  # more than a pipe holds
    queue.run("enqueue", "--file", "-", "--lines", stdin=many, check=0)
    for words, first in (("list --limit 0", b"ID "), ("list --json", b"[")):
        done = subprocess.run(
            ["sh", "-c", '"$@" | head -n 1', "sh", *QUEUECTL, *words.split()],
            capture_output=True,
            env=queue.environment,
        )
        assert done.stdout.startswith(first) and done.stdout.count(b"\n") == 1
        assert done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_result_that_cannot_be_written_is_an_error_of_one_line(standing: Queue) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*QUEUECTL, "list"], stdout=full, stderr=subprocess.PIPE, env=standing.environment
        )
    assert (done.returncode, done.stderr) == (
        1,
        b"Error: standard output: No space left on device\n",
    )


def test_a_result_for_which_there_is_no_way_out_is_an_error_of_one_line(standing: Queue) -> None:
    for way, why in (("1</dev/null", "Bad file descriptor"), ("1>big", "File too large")):
        line = f'ulimit -f 0; "$@" {way}'
        done = subprocess.run(
            ["sh", "-c", line, "sh", *QUEUECTL, "config", "list"],
            stderr=subprocess.PIPE,
            cwd=standing.folder,
            env=standing.environment,
        )
        assert (done.returncode, done.stderr.decode()) == (1, f"Error: standard output: {why}\n")
    (standing.folder / "big").unlink()


def test_progress_is_shown_on_a_terminal_and_not_in_a_pipe(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    file = queue.folder / "jobs"
    file.write_text("true\n" * 20_000)
    words = ["enqueue", "--file", "jobs", "--lines"]
    code, shown = on_terminal(queue, *words)
    assert code == 0 and "100%" in shown and shown.endswith("enqueued 20000 jobs\r\n")
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is visible again
    piped = queue.run(*words, check=0)
    assert (piped.stdout, piped.stderr) == ("enqueued 20000 jobs\n", "")
    file.write_text("true\n" * 20_000 + "\0\n")
    code, shown = on_terminal(queue, *words)
    assert code == 2 and '\r\nError: line 20001: "command" contains a NUL' in shown
    assert shown.rfind("\x1b[?25h") >= shown.rfind("\x1b[?25l"), "the cursor stays hidden"


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_colours_has_none(tmp_path: Path, name: str, value: str) -> None:
    queue = Queue(tmp_path)
    lines = (["worker", "start", "--drain"], ["doctor"], ["--explain", "list"])
    for wanted in (True, False):
        queue.run("enqueue", '{"command": "false", "max_retries": 0}', check=0)
        shown = [on_terminal(queue, *words)[1] for words in lines]
        assert ["\x1b[" in each for each in shown] == [wanted] * 3
        queue.environment[name] = value
    assert "  dead       " in shown[0]


def test_a_dumb_terminal_is_sent_no_cursor_control(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    (tmp_path / "jobs").write_text("true\n" * 20_000)
    for words in (["enqueue", "--file", "jobs", "--lines"], ["wait", "--timeout", "0s"]):
        for term in ("xterm", "dumb"):
            queue.environment["TERM"] = term
            assert ("\x1b[" in on_terminal(queue, *words)[1]) == (term == "xterm"), words


def test_wait_status_and_list_know_a_terminal(standing: Queue) -> None:
    code, shown = on_terminal(standing, "wait", "good")
    assert (code, shown) == (0, "\r\x1b[K1 of 1 settled, 0 running, 0 waiting\r\n\r\x1b[K")
    code, shown = on_terminal(standing, "wait", "later", "--timeout", "0s")
    assert code == 1 and shown.split("\r\x1b[K")[1:] == [
        "0 of 1 settled, 0 running, 1 waiting",
        "no worker is running; `worker start` starts one\r\n",
        "Error: after 0 ms 1 of 1 job not settled\r\n",
    ]
    piped = standing.run("wait", "good", check=0)
    assert (piped.stdout, piped.stderr) == ("", "")
    assert on_terminal(standing, "status")[1].split("\r\n") == (
        standing.run("status").stdout.split("\n")
    )
    lines = on_terminal(standing, "list")[1].split("\r\n")
    assert max(map(len, lines)) == 80 and "\x1b" not in "".join(lines)  # cut, not wrapped
    assert next(line for line in lines if line.startswith("evil")).endswith("...")
    code, shown = on_terminal(standing, "show", "nope")
    assert (code, shown) == (1, 'Error: no job "nope"; `list` shows those that are there\r\n')


def test_a_long_error_does_not_push_the_command_over_the_edge(queue: Queue) -> None:
    job = {"command": "ls /a/rather/long/path/that/is/not/there/nor/anywhere", "max_retries": 0}
    queue.run("enqueue", json.dumps(job), check=0)
    queue.drain()
    head, row, _ = on_terminal(queue, "dlq", "list")[1].split("\r\n")
    assert len(row) == 80 and row.count("...") == 2, row
    assert row[head.index("COMMAND") :].startswith("ls /a/rather")


def test_a_list_too_long_for_people_shows_the_newest_or_with_ready_the_next(queue: Queue) -> None:
    ids = [f"j{number:03}" for number in range(101)]
    lines = "\n".join(json.dumps({"id": each, "command": "true"}) for each in ids)
    queue.run("enqueue", "--file", "-", stdin=lines, check=0)
    for words, shown in (([], ids[1:]), (["--ready"], ids[:100]), (["--limit", "0"], ids)):
        listed = queue.run("list", *words, check=0)
        assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == shown
        rest = "" if len(shown) == 101 else "only 100 are shown; --limit 0 shows all\n"
        assert listed.stderr == rest


def test_status_is_watched_by_people_not_by_programs(queue: Queue) -> None:
    assert "one document" in queue.run("status", "--watch", "--json", check=2).stderr


@pytest.mark.parametrize(("term", "clears"), [("xterm", True), ("dumb", False)])
def test_status_is_watched_until_ctrl_c(queue: Queue, term: str, clears: bool) -> None:
    queue.environment["TERM"] = term
    code, shown = on_terminal(queue, "status", "--watch", ended_at="last hour")
    assert code == 130 and ("\x1b[2J" in shown) == clears, shown


def test_the_workers_lines_are_coloured_on_a_terminal_only(queue: Queue) -> None:
    for _ in range(2):
        queue.run("enqueue", "--command", "true", check=0)
        code, shown = on_terminal(queue, "worker", "start", "--drain")
        assert code == 0 and "\x1b[32mcompleted\x1b[0m" in shown
    queue.run("enqueue", "--command", "true", check=0)
    said = queue.drain()
    assert "completed" in said and "\x1b" not in said


# --- files and places ------------------------------------------------------------------------


def test_without_click_it_says_what_to_do() -> None:
    words = [sys.executable, "-S", QUEUECTL[1], "init"]  # -S: without what is installed
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "click is missing: activate the .venv" in done.stderr


def test_the_option_db_beats_the_environment(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.run("--db", "other.db", "--config", "other.json", "init", check=0)
    queue.run("--db", "x.db", "--config", "other.json", "config", "max-retries", "7", check=0)
    assert sorted(os.listdir(tmp_path)) == ["other.db", "other.json"]
    assert json.loads((tmp_path / "other.json").read_text())["max_retries"] == 7


def test_the_default_files_are_beside_the_program_wherever_it_is_called(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    for name in ("queuectl.py", "database.py", "worker.py", "config.py"):
        shutil.copy(ROOT / name, home)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("QUEUECTL_")}

    def run(program: str, *words: str) -> str:
        command = [sys.executable, str(home / program), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=elsewhere)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    for _ in range(2):  # doing it again is harmless
        assert run("database.py") == run("queuectl.py", "init") == f"queue ready: {home}/queue.db\n"
    run("queuectl.py", "enqueue", "--command", "pwd", "--id", "here")
    run("queuectl.py", "enqueue", "--command", "pwd", "--id", "up", "--cwd", "..")
    run("queuectl.py", "worker", "start", "--drain")
    assert run("queuectl.py", "logs", "here", "--stdout") == f"{elsewhere}\n"
    assert run("queuectl.py", "logs", "up", "--stdout") == f"{tmp_path}\n"
    run("queuectl.py", "config", "set", "max-retries", "7")
    assert os.listdir(elsewhere) == []
    made = {name for name in os.listdir(home) if not name.endswith((".py", "__pycache__"))}
    assert made - {"queue.db-wal", "queue.db-shm"} == {"queue.db", "queue.db.run", "config.json"}


def test_the_module_of_the_queue_says_why_it_cannot_make_one() -> None:
    words, place = [sys.executable, str(ROOT / "database.py")], {"QUEUECTL_DB": "/sys/queue.db"}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | place)
    assert done.stderr.startswith("Error: /sys/queue.db: ") and done.stderr.count("\n") == 1


def test_the_queue_is_private_whatever_the_umask(queue: Queue) -> None:
    def run(*words: str) -> None:
        subprocess.run([*QUEUECTL, *words], env=queue.environment, umask=0, check=True)

    run("enqueue", "--command", f"stat -c %a {queue.path}* {queue.path}.run/*", "--id", "stat")
    run("worker", "start", "--drain")
    modes = sorted(queue.job("stat")["stdout"].split())  # database, -shm, -wal, bell, outputs
    assert modes == ["600"] * 6 + ["700"]


def test_a_later_config_set_changes_no_job_that_is_enqueued(tmp_path: Path) -> None:
    queue, copied = Queue(tmp_path), ("max_retries", "backoff_base", "timeout_s")
    old = queue.json("enqueue", '{"command": "true", "id": "old"}')
    for key in ("max-retries", "backoff-base", "job-timeout-s"):
        queue.run("config", "set", key, "7", check=0)
    assert [queue.job("old")[name] for name in copied] == [old[name] for name in copied]
    new = queue.json("enqueue", '{"command": "true"}')
    assert [new[name] for name in copied] == [7, 7, 7]
    assert [old[name] for name in copied] == [3, 2, 0]


def test_a_second_look_in_one_process_does_not_unlock_the_queue(tmp_path: Path) -> None:
    """Closing any descriptor of a file drops all POSIX locks that the process has on it
    (https://www.sqlite.org/howtocorrupt.html, 2.2): then another process takes itself for the
    last one and deletes the -wal under our feet."""
    queue = Queue(tmp_path)
    queue.run("enqueue", "--command", "true", check=0)
    with closing(database.connect(queue.path)) as db:
        assert database.counts(db)["pending"] == 1
        database.connect(queue.path).close()
        queue.run("cancel", queue.json("list")[0]["id"], check=0)
        assert os.path.exists(queue.path + "-wal")
        assert database.counts(db)["cancelled"] == 1


# --- with running workers --------------------------------------------------------------------


def test_logs_choose_the_attempt_and_the_stream(standing: Queue) -> None:
    def logs(*words: str) -> str:
        return standing.run("logs", *words, check=0).stdout

    assert logs("good", "--stdout") == "one\n"
    assert logs("good", "--stderr") == "oops\n"
    assert logs("good", "--stderr", "--stdout") == logs("good")
    assert logs("flaky") == logs("flaky", "--attempt", "2") == "--- stdout ---\nsecond\n"
    assert logs("flaky", "--attempt", "1") == ""
    assert standing.json("logs", "flaky")["id"] == "flaky"
    cut = "[... 1808 bytes cut ...]\n"
    assert logs("long", "--stdout") == cut + ("123456789\n" * 1000)[-8192:]
    assert standing.job("long")["stdout"] == logs("long", "--stdout")


def test_logs_follow_a_job_from_before_its_start_to_its_end(queue: Queue) -> None:
    command = "echo early; until [ -e go ]; do sleep 0.02; done; echo late >&2; echo end"
    queue.run("enqueue", "--command", command, "--id", "slow", check=0)
    follower = subprocess.Popen(
        [*QUEUECTL, "logs", "slow", "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=queue.environment,
    )
    assert select.select([follower.stdout], [], [], 0.2)[0] == []
    queue.start()
    assert select.select([follower.stdout], [], [], DEADLINE_S)[0]
    assert follower.stdout.readline() == b"early\n"
    assert queue.run("logs", "slow", check=0).stdout == "--- stdout ---\nearly\n"
    assert queue.run("logs", "slow", "--stderr", check=0).stdout == ""
    (queue.folder / "go").touch()
    out, err = follower.communicate(timeout=DEADLINE_S)
    assert (sorted(out.split()), follower.returncode) == ([b"end", b"late"], 0)
    assert err == b"no worker is running; `worker start` starts one\n", "at first, and said once"
    queue.run("wait", "slow", "--timeout", "30s", check=0)


def test_logs_show_the_half_of_a_character_with_which_an_output_ends(queue: Queue) -> None:
    queue.run("enqueue", "--id", "half", "--command", r"printf 'caf\303'", check=0)
    queue.drain()
    for words in (("--stdout",), ("--stdout", "--follow")):
        assert queue.run("logs", "half", *words, check=0).stdout.rstrip() == "caf\ufffd"
    assert queue.job("half")["stdout"] == "caf\ufffd"


def test_logs_follow_a_job_that_empties_its_own_output(queue: Queue) -> None:
    wait = "until [ -e go ]; do sleep 0.02; done"
    command = f"echo a long line; {wait}; echo two > /dev/stdout; echo three"
    queue.run("enqueue", "--command", command, "--id", "a", check=0)
    queue.start()
    follower = subprocess.Popen(
        [*QUEUECTL, "logs", "a", "--follow"], stdout=subprocess.PIPE, env=queue.environment
    )
    assert follower.stdout.readline() == b"a long line\n"
    (queue.folder / "go").touch()
    assert follower.communicate(timeout=DEADLINE_S)[0] == b"two\nthree\n"


def test_logs_that_follow_print_nothing_twice_if_the_output_is_out_of_sight(queue: Queue) -> None:
    wait = "until [ -e go ]; do sleep 0.02; done"
    queue.run("enqueue", "--command", f"echo one; {wait}; echo two", "--id", "a", check=0)
    queue.start()
    follower = subprocess.Popen(
        [*QUEUECTL, "logs", "a", "--follow"], stdout=subprocess.PIPE, env=queue.environment
    )
    assert follower.stdout.readline() == b"one\n"
    output = next((queue.folder / "queue.db.run").glob("*.out"))
    output.rename(queue.folder / "away")
    assert select.select([follower.stdout], [], [], 0.5)[0] == []  # some looks find nothing
    (queue.folder / "go").touch()
    assert follower.communicate(timeout=DEADLINE_S)[0] == b"two\n"


def test_logs_that_follow_a_run_stay_with_it_when_the_next_has_begun(queue: Queue) -> None:
    queue.configure(backoff_base=0, backoff_jitter=0)
    wait = "until [ -e go$QUEUECTL_ATTEMPT ]; do sleep 0.02; done"
    command = f"echo run $QUEUECTL_ATTEMPT; {wait}; echo end; test $QUEUECTL_ATTEMPT = 2"
    queue.run("enqueue", "--command", command, "--id", "twice", check=0)
    words = [*QUEUECTL, "logs", "twice", "--follow"]
    follower = subprocess.Popen(words, stdout=subprocess.PIPE, env=queue.environment)
    queue.start()
    assert follower.stdout.readline() == b"run 1\n"
    follower.send_signal(signal.SIGSTOP)
    (queue.folder / "go1").touch()
    eventually(lambda: "run 2" in queue.run("logs", "twice").stdout, "the next has begun")
    follower.send_signal(signal.SIGCONT)
    assert follower.communicate(timeout=DEADLINE_S)[0] == b"end\n"
    (queue.folder / "go2").touch()
    queue.run("wait", "twice", "--timeout", "30s", check=0)


def test_workers_in_the_background_are_listed_cancelled_under_and_stopped(queue: Queue) -> None:
    done = queue.run("worker", "start", "--detach", "--count", "2", check=0)
    told = r"2 workers in the background, supervisor pid (\d+), log (.+)\n"
    match = re.fullmatch(told, done.stdout)
    assert match and Path(match[2]).stat().st_mode & 0o777 == 0o600
    command = "sleep 60; : \x1b[31m"
    queue.run("enqueue", "--command", command, "--id", "slow", check=0)
    eventually(lambda: queue.state("slow") == "processing", "it runs")
    queue.workers()  # remembered, for the last check
    busy, idle = sorted(queue.json("worker", "list"), key=lambda row: row["job"] is None)
    assert list(busy)[:7] == "worker pid job command since heartbeat_at jobs_done".split()
    assert (busy["job"], busy["command"], busy["jobs_done"]) == ("slow", command, 0)
    assert (idle["job"], busy["supervisor_pid"]) == (None, int(match[1]))
    assert TIME.fullmatch(busy["since"]) and TIME.fullmatch(busy["heartbeat_at"])
    head, *rows = queue.run("worker", "list", check=0).stdout.splitlines()
    assert head.split() == ["WORKER", "PID", "SINCE", "HEARTBEAT", "DONE", "JOB"]
    shown = sorted(re.sub(r"\d+(\.\d+)? m?s", "SPAN", row).split()[2:] for row in rows)
    assert shown[0] == "- SPAN ago 0 idle".split()
    assert shown[1] == r"SPAN SPAN ago 0 slow: sleep 60; : \x1b[31m".split()
    assert "2 active workers" in queue.run("status", check=0).stdout
    stopped = queue.run("worker", "stop", "--timeout", "100ms", check=1)
    assert stopped.stdout == "" and "--now does not wait for jobs" in stopped.stderr
    assert stopped.stderr.splitlines()[0].endswith("for 1 running job; --now puts them back")
    cancelled = queue.run("cancel", "slow", check=0)
    assert cancelled.stdout == "slow cancelled\n"
    assert queue.run("worker", "stop", check=0).stdout.endswith("stopped\n")
    assert queue.json("worker", "list") == []
    assert queue.run("wait", "slow", check=1).stderr == (
        "Error: 0 dead, 1 cancelled; `list --state dead --state cancelled` shows them\n"
    )


# --- --explain -------------------------------------------------------------------------------


def test_each_statement_is_shown_with_its_values_and_what_it_did(queue: Queue) -> None:
    done = queue.run("--explain", "enqueue", "--id", "a", "--command", "echo hello", check=0)
    assert done.stdout == "a\n"
    shown = [re.sub(r" +", " ", line) for line in done.stderr.splitlines()]
    assert all(re.match(r"pid \d+ [a-z_]+:\d+ [\d.]+ ms ", line) for line in shown), shown
    assert any("(0, 'a', 'echo hello', 0, NULL, " in line for line in shown), shown
    assert any("enqueue" in line and "1 row changed INSERT INTO jobs" in line for line in shown)
    assert any("job:" in line and "1 row SELECT" in line and "seq = 1" in line for line in shown)
    assert queue.run("show", "a", check=0).stderr == ""


def test_a_statement_that_fails_is_shown_and_says_why(queue: Queue) -> None:
    queue.run("init", check=0)
    with closing(sqlite3.connect(queue.path)) as db:
        db.execute("CREATE TRIGGER t BEFORE INSERT ON jobs BEGIN SELECT raise(abort, 'no'); END")
    done = queue.run("--explain", "enqueue", "--command", "true", check=1)
    with closing(sqlite3.connect(queue.path)) as db:
        db.execute("DROP TRIGGER t")
    [failed] = [line for line in done.stderr.splitlines() if "INSERT INTO jobs" in line]
    assert re.search(
        r" ms  failed +INSERT INTO jobs .* FROM incoming .*<- SQLite says: no$", failed
    )
    assert done.stderr.splitlines()[-1] == (
        f"Error: {queue.path}: SQLite says: no; `doctor` tells more"
    )


def test_the_statements_of_a_transaction_stand_between_its_brackets(queue: Queue) -> None:
    queue.run("enqueue", "--command", "true", check=0)
    done = queue.run("--explain", "worker", "start", "--drain", check=0)
    claim = [line for line in done.stderr.splitlines() if re.search(r" claim:\d+ ", line)]
    begin = next(n for n, line in enumerate(claim) if "BEGIN IMMEDIATE" in line)
    at = claim[begin].index("BEGIN")
    update, insert, commit = claim[begin + 1 : begin + 4]
    assert update[at : at + 13] == "  UPDATE jobs" and update.endswith(
        "  <- rowcount 1: it is mine"
    )
    assert (
        "worker = 'w1'" in update and "WHERE seq = 1 AND state IN ('pending', 'failed')" in update
    )
    assert insert[at : at + 13] == "  INSERT INTO" and commit[at:] == "COMMIT"


def test_each_look_that_finds_something_else_is_shown(queue: Queue) -> None:
    queue.run("enqueue", "--file", "-", "--lines", stdin="true\n" * 4, check=0)
    shown = queue.run("--explain", "worker", "start", "--drain", check=0).stderr
    looks = re.findall(r" claim:\d+ .*SELECT seq, id, attempts", shown)
    assert len(looks) == 5, "one found nothing"


def test_two_workers_race_for_one_job_and_it_is_seen(queue: Queue) -> None:
    process = queue.start(count=2, explain=True)

    def lost() -> bool:
        queue.run("enqueue", "--file", "-", "--lines", stdin="true\ntrue\n", check=0)
        return "0 rows changed" in process.log.read_text()

    eventually(lost, "one of them was faster", 120)
    [line, *_] = [each for each in process.log.read_text().splitlines() if "0 rows changed" in each]
    assert " claim:" in line and line.endswith("another worker was faster; look again")


@pytest.mark.parametrize("columns", (40, 80, 120))
def test_explain_fits_the_terminal_and_loses_nothing_where_it_is_narrow(
    queue: Queue, columns: int
) -> None:
    queue.environment["COLUMNS"] = str(columns)
    shown = on_terminal(queue, "--explain", "enqueue", "--command", "true")[1]
    lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
    assert columns == 40 or max(map(len, lines)) <= columns, lines
    told = re.sub(r"\s", "", "".join(lines))
    assert "SELECTline,idFROMincomingJOINjobs" in told and "COMMIT<-nowitissafe" in told, told


def test_nothing_in_a_job_steers_the_terminal_through_explain(queue: Queue) -> None:
    done = queue.run("--explain", "enqueue", json.dumps({"command": "echo \x1b[31m"}), check=0)
    shown = queue.run("--explain", "list", check=0)
    queue.run("--explain", "worker", "start", "--drain", check=0)
    assert "\x1b" not in done.stderr + shown.stderr + shown.stdout


def test_ctrl_c_while_it_is_still_loading_ends_it_without_a_traceback(queue: Queue) -> None:
    # Python runs this before the program: it presses Ctrl+C in the middle of its imports.
    (queue.folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'database':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    queue.environment["PYTHONPATH"] = str(queue.folder)
    done = queue.run("status")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# --- durations -------------------------------------------------------------------------------


DURATIONS = {"90": 90, "90s": 90, "500ms": 0.5, "5m": 300, "1.5h": 5400, " 3 s ": 3, "0": 0}


@pytest.mark.parametrize("text, seconds", (DURATIONS | {"7d": 604_800, "2w": 1_209_600}).items())
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert queuectl.duration(text) == seconds


@pytest.mark.parametrize("text", [*"s -5s +5 1e3 5M 1h30m nan inf 101y".split(), "", "9" * 400])
def test_what_is_no_duration_is_shown_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no duration; write it like 30s"):
        queuectl.duration(text)
