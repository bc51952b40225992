"""The dashboard: who is let in, what it answers, that it bears bad clients; and in a browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE_S, ROOT, Queue, eventually, put_in
from prometheus_client.parser import text_string_to_metric_families

import config
import dashboard
import database
import worker

NEVER = dict(max_retries=0, backoff_base=0, backoff_jitter=0)


class Window:
    """A dashboard as a process of its own, and a client that has its token."""

    def __init__(self, queue: Queue):
        self.queue, self.process, self.address, self.token, self.port = queue, None, "", "", 0

    def open(self, *words: str) -> Window:
        """Start it and wait for the address; by default on a free port."""
        self.log = self.queue.folder / "dashboard.log"
        words = words or ("--port", "0")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "queuectl.py"), "dashboard", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.queue.environment,
                start_new_session=True,
            )
        found = eventually(lambda: self.said(r"http://\S+"), "it prints its address")
        self.address, self.token = found, found.partition("token=")[2]
        self.port = int(re.search(r":(\d+)/", found)[1])
        return self

    def said(self, pattern: str) -> str | None:
        assert self.process.poll() is None, self.log.read_text()
        found = re.search(pattern + r"(?=\s)", self.log.read_text())
        return found and found[0]

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: Any = None,
        host: str | None = None,
        **headers: str,
    ) -> http.client.HTTPResponse:
        """Send one request without the token and return the answer; its `text` has been read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"Host": host or f"127.0.0.1:{self.port}"} | headers
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(data)
        answer = connection.getresponse()
        answer.text = answer.read().decode()
        connection.close()
        return answer

    def get(self, path: str) -> Any:
        """Return what it answers to somebody who has the token."""
        answer = self.ask(path, Authorization=f"Bearer {self.token}")
        assert answer.status == 200, answer.text
        kind = answer.getheader("Content-Type")
        return json.loads(answer.text) if kind == "application/json" else answer.text

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        answer = self.ask(path, "POST", body, Authorization=f"Bearer {self.token}")
        return answer.status, json.loads(answer.text)

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def end(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)
        assert self.process.wait(timeout=20) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()


@pytest.fixture
def window(queue: Queue) -> Iterator[Window]:
    """A dashboard on a free port; at the end Ctrl+C must end it cleanly."""
    found = Window(queue)
    try:
        yield found.open()
        if found.process.poll() is None:
            found.end()
    finally:
        found.process.kill()
        found.process.wait()


@pytest.fixture
def server(queue: Queue) -> Iterator[dashboard.Server]:
    """A dashboard in this process, whose parts can be watched and whose times can be changed."""
    database.connect(queue.path).close()
    before, settings = threading.active_count(), config.load(queue.config)
    found = dashboard.Server(queue.path, "127.0.0.1", 0, worker, settings, lambda *_: None)
    found.start()
    yield found
    found.close()
    eventually(lambda: threading.active_count() <= before, "no thread is left")


def add(queue: Queue, *jobs: dict[str, Any]) -> None:
    """Enqueue jobs in this process, quickly."""
    row = dict(command="true", id=None, priority=0, run_at=None, max_retries=0)
    row |= dict(backoff_base=0, timeout_s=0, cwd=str(queue.folder))
    db = database.connect(queue.path)
    put_in(db, [(0, row | job) for job in jobs], time.time())
    db.close()


def change(queue: Queue, function: Callable[..., Any], *arguments: Any) -> Any:
    db = database.connect(queue.path)
    try:
        return function(db, *arguments)
    finally:
        db.close()


# --- coming and going ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_its_address_and_a_signal_ends_it_cleanly(window: Window, number: int) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", window.address)
    stream = follow(window)
    window.end(number)
    stream.close()
    assert not list(Path(window.queue.path + ".run").glob("*.token"))


def test_a_taken_port_is_one_clear_line(window: Window) -> None:
    done = window.queue.run("dashboard", "--port", str(window.port), check=1)
    assert f"port {window.port}: Address already in use; --port 0" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert window.get("/api/status")["total"] == 0, "and the first goes on"


def test_a_host_that_is_not_here_is_one_clear_line(queue: Queue) -> None:
    done = queue.run("dashboard", "--port", "0", "--host", "192.0.2.1", check=1)
    assert done.stderr.startswith("Error: cannot listen on 192.0.2.1") and done.stdout == ""
    assert "--port 0" not in done.stderr, "which would not help"
    done = queue.run("dashboard", "--port", "0", "--host", "", check=2)
    assert "--host is empty" in done.stderr, "an unset variable is no wish to listen to all"


def test_listening_to_others_is_warned_of_and_then_a_number_is_no_foreign_name(
    window: Window,
) -> None:
    window.end()
    window.open("--port", "0", "--host", "0.0.0.0")
    assert eventually(lambda: window.said("Warning: 0.0.0.0 is reached from elsewhere:"))
    bearer = {"Authorization": f"Bearer {window.token}"}
    assert window.ask("/api/status", host=f"192.0.2.7:{window.port}", **bearer).status == 200
    assert window.ask("/api/status", host=f"evil.example:{window.port}", **bearer).status == 403


def test_without_a_host_there_is_no_warning(window: Window) -> None:
    window.get("/api/status")
    assert "Warning" not in window.log.read_text()


def test_a_killed_dashboard_leaves_its_token_to_the_next_and_a_clean_end_none(
    window: Window,
) -> None:
    before, path = window.token, Path(window.queue.path + ".run", f"dashboard-{window.port}.token")
    assert path.read_text() == before and path.stat().st_mode & 0o777 == 0o600
    window.process.kill()
    window.process.wait()
    again = window.open("--port", str(window.port)).token
    window.end()
    assert again == before and not path.exists()
    assert window.open("--port", str(window.port)).token != before


def test_a_dashboard_that_cannot_print_its_address_keeps_no_token(queue: Queue) -> None:
    with open("/dev/full", "wb") as full:
        words = [sys.executable, str(ROOT / "queuectl.py"), "dashboard", "--port", "0"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=queue.environment)
    assert done.returncode == 1 and b"No space left" in done.stderr
    assert not list(Path(queue.path + ".run").glob("*.token"))


def test_a_queue_that_is_removed_is_said_to_be_gone_and_not_made_anew(window: Window) -> None:
    stream = follow(window)
    next(stream)
    for path in window.queue.folder.glob("queue.db*"):
        if path.is_file():
            path.unlink()
    assert awaited(stream, lambda each: "trouble" in each)["trouble"].endswith("is gone")
    answer = window.ask("/api/status", Authorization=f"Bearer {window.token}")
    assert answer.status == 409 and "is gone" in answer.text
    stream.close()
    window.end()
    assert not os.path.exists(window.queue.path)


# --- who is let in ---------------------------------------------------------------------------

PATHS = "/ /events /metrics /api/status /api/workers /api/jobs /api/job?id=a /nothing".split()
PATHS.append("http://[")  # no URL at all


@pytest.mark.parametrize("method", "GET HEAD POST PUT PATCH DELETE OPTIONS".split())
def test_nobody_is_let_in_without_the_token(window: Window, method: str) -> None:
    for path in PATHS:
        for given in ({}, {"Cookie": f"queuectl_{window.port}=x"}, {"Authorization": "Bearer "}):
            answer = window.ask(path, method, **given)
            assert answer.status == 403, (path, given)
            assert window.token not in answer.text
            if method not in ("GET", "POST"):
                known = {"Authorization": f"Bearer {window.token}"}
                assert window.ask(path, method, **known).status == 405
    assert window.ask("/?token=" + "x" * 43).status == 403
    assert window.ask("/api/jobs?token=" + window.token).status == 403, "only the page takes it so"


def test_the_token_of_the_address_becomes_a_cookie_that_scripts_and_sites_cannot_use(
    window: Window,
) -> None:
    answer = window.ask("/?token=" + window.token)
    cookie, *rest = answer.getheader("Set-Cookie").split("; ")
    assert answer.status == 200 and set(rest) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    for path in ("/", "/metrics", "/api/jobs"):
        assert window.ask(path, Cookie=f"other=1; {cookie}").status == 200
    assert window.token not in answer.text


def test_a_browser_is_started_with_a_ticket_that_serves_once(
    server: dashboard.Server,
) -> None:
    def status(ticket: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", f"/?token={ticket}")
        code = connection.getresponse().status
        connection.close()
        return code

    ticket = server.ticket
    assert ticket != server.token
    assert [status(given) for given in ("", ticket, ticket, "", server.token)] == [
        403,
        200,
        403,
        403,
        200,
    ]


@pytest.mark.parametrize("host", ["evil.example:{}", "localhost:1", "127.0.0.1", "", "[::1]:{}"])
def test_another_host_name_is_turned_away_even_with_the_token(window: Window, host: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", window.port, timeout=30)
    connection.putrequest("GET", "/?token=" + window.token, skip_host=True)
    connection.putheader("Host", host.format(window.port))
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()


def test_localhost_is_let_in_with_the_token(window: Window) -> None:
    host = f"LocalHost:{window.port}"
    assert window.ask("/?token=" + window.token, host=host).status == 200
    assert window.ask("/", host=host).status == 403


def test_a_change_needs_more_than_the_cookie(window: Window) -> None:
    add(window.queue, {"id": "a"})
    page = window.ask("/?token=" + window.token)
    cookie = page.getheader("Set-Cookie").partition(";")[0]
    key = re.search(r'name="key" content="(\w+)"', page.text)[1]
    body = {"id": "a"}
    assert window.ask("/api/cancel", "POST", body, Cookie=cookie).status == 403
    assert window.ask("/api/cancel", "POST", body, Cookie=cookie, X_Key="0" * 64).status == 403
    assert window.ask("/api/cancel", "POST", body, X_Key=key).status == 403
    assert window.queue.state("a") == "pending"
    assert window.ask("/api/cancel", "POST", body, Cookie=cookie, X_Key=key).status == 200
    assert window.queue.state("a") == "cancelled"


def test_reading_changes_nothing_and_nothing_can_be_enqueued(window: Window) -> None:
    add(window.queue, {"id": "a"})
    bearer = {"Authorization": f"Bearer {window.token}"}
    for path in ("/api/cancel?id=a", "/api/retry?all=true"):
        assert window.ask(path, **bearer).status == 404
    for path in ("/", "/api/jobs", "/api/job", "/api/enqueue"):
        assert window.ask(path, "POST", {"command": "true"}, **bearer).status == 404
    assert window.queue.states()["total"] == window.queue.states()["pending"] == 1


def test_every_answer_has_a_strict_policy(window: Window) -> None:
    nonces = set()
    for path in ("/?token=" + window.token, "/", "/nothing"):
        answer = window.ask(path)
        policy = answer.getheader("Content-Security-Policy")
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Referrer-Policy") == "no-referrer", "the address is a secret"
        assert answer.getheader("Cache-Control") == "no-store"
        nonces.add(re.search(r"script-src 'nonce-([\w-]+)'", policy)[1])
    assert len(nonces) == 3, "a nonce is of one answer only"


# --- what it answers -------------------------------------------------------------------------


def test_jobs_have_the_fields_of_the_command_line(window: Window) -> None:
    window.queue.run("enqueue", "--command", "echo out; echo err >&2; exit 3", check=0)
    window.queue.configure(**NEVER)
    window.queue.run("enqueue", "--command", "false", "--id", "last", check=0)
    window.queue.drain()
    assert window.get("/api/jobs")["jobs"] == window.queue.json("list")[::-1]
    shown, found = window.queue.json("show", "last"), window.get("/api/job?id=last")
    assert found.pop("sentence") == "dead after 1 run; `dlq retry last` starts over"
    assert found == shown
    status = window.get("/api/status")
    assert (
        status.keys() == window.queue.json("status").keys()
        and status["failed"] + status["dead"] == 2
    )
    assert window.get("/api/workers") == []
    window.queue.start()
    keys = window.queue.json("worker", "list")[0].keys()
    assert window.get("/api/workers")[0].keys() == keys, "and no columns of our own"


def test_a_page_is_not_sent_the_output_of_each_run_of_a_job(window: Window) -> None:
    window.queue.configure(**NEVER)
    words = "enqueue --id a --max-retries 120 --command".split()
    window.queue.run(*words, "echo out; echo err >&2; [ $QUEUECTL_ATTEMPT = 120 ]", check=0)
    window.queue.drain()
    whole, brief = window.get("/api/job?id=a"), window.get("/api/job?id=a&brief=1")
    assert [run["stdout"] for run in whole["runs"]] == ["out\n"] * 120
    assert [run["attempt"] for run in brief["runs"]] == [*range(21, 121)]
    assert [run["stdout"] + run["stderr"] for run in brief["runs"]] == [""] * 99 + ["out\nerr\n"]
    assert brief["stdout"] == "out\n" and brief["runs"][-1] == whole["runs"][-1]


def test_pages_give_each_job_once_while_new_ones_come(window: Window) -> None:
    add(window.queue, *({"id": f"job {n}"} for n in range(25)))
    found, query = [], "limit=10"
    while query:
        page = window.get("/api/jobs?" + query)
        found += [job["id"] for job in page["jobs"]]
        add(window.queue, {})
        query = f"limit=10&before={page['next']}" if page["next"] else ""
    assert found == [f"job {n}" for n in range(24, -1, -1)]


def test_jobs_are_found_by_state_and_by_text(window: Window) -> None:
    add(window.queue, *({"command": text} for text in ("ECHO 100%", "echo 1000", "a_b", "axb")))
    add(window.queue, {"id": "Nightly"}, {"id": "gone"})
    window.post("/api/cancel", id="gone")

    def found(query: str) -> list[str]:
        return [job["command"] for job in window.get("/api/jobs?" + query)["jobs"]]

    assert found("text=echo") == ["echo 1000", "ECHO 100%"]
    assert found("text=100%25") == ["ECHO 100%"], "no wildcard"
    assert found("text=a_b") == ["a_b"] and found("text=NIGHT") == ["true"]
    assert len(found("state=pending")) == 5 and found("state=cancelled&text=GONE") == ["true"]
    assert found("state=cancelled&text=echo") == []
    for query in ("before=-" + "9" * 99, "limit=-1&before=" + "9" * 99):
        assert "jobs" in window.get("/api/jobs?" + query)
    answer = window.ask("/api/jobs?state=lost", Authorization=f"Bearer {window.token}")
    assert answer.status == 400 and 'no state "lost"' in json.loads(answer.text)["error"]


def test_a_search_looks_through_a_bounded_part_and_says_where_to_go_on(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SEARCHED", 10)
    add(queue, {"id": "needle"}, *({"command": f"<{n}>"} for n in range(25)))
    db = database.connect(queue.path)

    def pages(text: str, state: str = "") -> list[list[str]]:
        found, before = [], database.TOP
        while before:
            rows, before = database.jobs_page(db, state, text, before, 5)
            found.append([row["id"] for row in rows])
        return found

    assert pages("eedle") == pages("eedle", "pending") == [[], [], [], ["needle"]]
    assert pages("needle") == [["needle"], [], [], []], "at once, and not again in its place"
    assert pages("needle", "dead") == [[], []]
    for n in range(25):
        assert sum(map(len, pages(f"<{n}>"))) == 1, "no job falls between two pages"
    add(queue, *({"id": f"more{n}"} for n in range(4)))
    assert [len(page) for page in pages("")] == [5] * 6, "none is empty"
    db.close()


def asked(server: dashboard.Server, path: str) -> dict[str, Any]:
    """Return what a dashboard in this process answers to somebody who has the token."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path, headers={"Authorization": f"Bearer {server.token}"})
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found


def test_the_server_looks_on_for_a_text_until_the_page_is_full_or_the_time_is_over(
    server: dashboard.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pages(query: str) -> list[list[str]]:
        found, path = [], f"/api/jobs?{query}"
        while path:
            page = asked(server, path)
            found.append([job["id"] for job in page["jobs"]])
            path = page["next"] and f"/api/jobs?{query}&before={page['next']}"
        return found

    monkeypatch.setattr(database, "SEARCHED", 10)
    monkeypatch.setattr(dashboard, "SEARCH_S", 60)
    olds = [f"needle{n}" for n in range(5)]
    add(Queue(Path(server.path).parent), *({"id": id} for id in ["needle", *olds]), *[{}] * 44)
    assert pages("text=eedle") == [[*reversed(olds), "needle"]]
    full = [["needle", "needle4"], ["needle3", "needle2"], ["needle1", "needle0"]]
    assert pages("text=needle&limit=2") == full, "each once"
    assert pages("text=needle&limit=1") == [[id] for two in full for id in two]
    monkeypatch.setattr(dashboard, "SEARCH_S", 0)
    assert pages("text=edle4") == [[], [], [], [], [], ["needle4"]], "one part at a time, then"


def test_a_slow_search_holds_up_nobody(
    server: dashboard.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, go = database.jobs_page, threading.Event(), threading.Event()

    def slow(db: Any, state: str, text: str, *rest: Any) -> Any:
        if text:
            begun.set()
            assert go.wait(DEADLINE_S)
        return real(db, state, text, *rest)

    monkeypatch.setattr(database, "jobs_page", slow)
    server.watcher.version = 1
    search = threading.Thread(target=asked, args=(server, "/api/jobs?text=x&as_of=1"))
    search.start()
    assert begun.wait(DEADLINE_S)
    other = threading.Thread(target=asked, args=(server, "/api/jobs?as_of=1"))
    other.start()
    other.join(5)
    held_up = other.is_alive()
    go.set()
    for thread in (search, other):
        thread.join()
    assert not held_up


def test_a_running_job_shows_what_it_has_printed_so_far(window: Window) -> None:
    flag = window.queue.folder / "flag"
    command = f"echo begun; echo oops >&2; while [ ! -e {flag} ]; do sleep 0.05; done; echo ended"
    add(window.queue, {"id": "slow", "command": command})
    window.queue.start()
    job = eventually(
        lambda: (job := window.get("/api/job?id=slow"))["stderr"] == "oops\n" and job, "it prints"
    )
    assert job["state"] == "processing" and job["stdout"] == job["runs"][0]["stdout"] == "begun\n"
    assert "on w" in job["sentence"]
    assert window.get("/api/workers")[0]["job"] == "slow"
    flag.touch()
    eventually(lambda: window.get("/api/job?id=slow")["stdout"] == "begun\nended\n")


def test_dead_jobs_are_retried_one_or_all(window: Window) -> None:
    add(window.queue, *({"id": id, "command": "exit 1"} for id in ("a", "b", "c")), {"id": "w"})
    window.queue.drain()
    assert window.post("/api/retry", id="a") == (200, {"retried": 1})
    assert window.queue.states()["pending"] == 1 and window.queue.state("a") == "pending"
    assert window.post("/api/retry", all=True) == (200, {"retried": 2})
    code, found = window.post("/api/retry", id="w")
    assert code == 409 and found["error"] == 'job "w" is completed, not dead: nothing was changed'
    for body in ({"id": "x"}, {"id": 7}, {}, {"all": "yes"}):
        assert window.post("/api/retry", **body)[0] == 404, body


def test_a_change_goes_by_the_whole_id(window: Window) -> None:
    add(window.queue, {"id": "abc"})
    assert window.post("/api/cancel", id="ab") == (404, {"error": 'no job "ab"'})
    unknown = window.ask("/api/job?id=x", Authorization=f"Bearer {window.token}")
    assert unknown.status == 404 and 'no job \\"x\\"' in unknown.text
    assert window.queue.state("abc") == "pending"


def test_a_running_job_is_cancelled(window: Window) -> None:
    add(window.queue, {"id": "a", "command": "sleep 60"})
    window.queue.start()
    eventually(lambda: window.queue.state("a") == "processing")
    assert window.post("/api/cancel", id="a") == (200, {"state": "processing"})
    eventually(lambda: window.queue.state("a") == "cancelled")


def test_a_running_job_without_its_supervisor_is_cancelled(window: Window) -> None:
    add(window.queue, {"id": "a", "command": "sleep 60"})
    supervisor = window.queue.start()
    eventually(lambda: window.queue.state("a") == "processing")
    supervisor.kill()
    supervisor.wait()
    threads = window.threads()
    for _ in range(3):
        assert window.post("/api/cancel", id="a")[0] in (200, 409)
    eventually(lambda: window.queue.state("a") == "cancelled")
    eventually(lambda: window.threads() <= threads, "no thread is left")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'"a"', b"[" * 100_000])
def test_a_bad_body_is_an_error_and_no_more(window: Window, body: bytes) -> None:
    head = f"POST /api/cancel HTTP/1.0\r\nHost: 127.0.0.1:{window.port}\r\n"
    head += f"Authorization: Bearer {window.token}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", window.port), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(100).startswith(b"HTTP/1.0 400 ")


# --- live ------------------------------------------------------------------------------------


def follow(window: Any) -> Iterator[dict[str, Any]]:
    """Yield the events that a viewer is sent; the connection ends with the generator."""
    connection = socket.create_connection(("127.0.0.1", window.port), timeout=30)
    head = f"GET /events HTTP/1.0\r\nHost: 127.0.0.1:{window.port}\r\n"
    connection.sendall(f"{head}Authorization: Bearer {window.token}\r\n\r\n".encode())

    def events() -> Iterator[dict[str, Any]]:
        with connection, connection.makefile("rb") as file:
            for line in file:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    return events()


def awaited(stream: Iterator[dict[str, Any]], check: Callable[[dict], Any]) -> dict[str, Any]:
    """Return the first event for which `check` holds; events come every few seconds at least."""
    deadline = time.monotonic() + DEADLINE_S
    for found in stream:
        if check(found):
            return found
        assert time.monotonic() < deadline, found
    raise AssertionError("the stream has ended")


def test_a_viewer_is_sent_everything_once_and_then_what_is_new(server: dashboard.Server) -> None:
    queue = Queue(Path(server.path).parent)
    stream = follow(server)
    first = next(stream)
    assert first["whole"] and first["runs"] == [] and first["status"]["total"] == 0
    add(queue, {"id": "a"}, {"id": "b"})
    second = awaited(stream, lambda each: each["status"]["total"])
    assert second["version"] > first["version"] and "whole" not in second
    queue.drain()
    third = awaited(stream, lambda each: each["status"]["completed"] == 2)
    assert {run["job"] for run in third["runs"]} <= {"a", "b"}
    again = next(follow(server))
    assert again["whole"] and [run["job"] for run in again["runs"]] == ["a", "b"]
    assert [run["outcome"] for run in again["runs"]] == ["completed"] * 2
    stream.close()


def test_fifty_viewers_cost_one_look_each_change_and_no_thread_when_they_leave(
    server: dashboard.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "REFRESH_S", 3600)
    queue, looks, before = Queue(Path(server.path).parent), [], threading.active_count()
    take, version, asked = server.watcher.look, database.data_version, []
    monkeypatch.setattr(database, "data_version", lambda db: asked.append(1) or version(db))
    monkeypatch.setattr(dashboard, "LOOK_S", 0.02)
    monkeypatch.setattr(server.watcher, "look", lambda *all: (looks.append(1), take(*all)))
    viewers = [follow(server) for _ in range(50)]
    eventually(lambda: server.watcher.viewers == 50)
    for viewer in viewers:
        next(viewer)
    count = len(looks)
    add(queue, {"id": "a"})
    for viewer in viewers:
        assert awaited(viewer, lambda each: each["status"]["total"])["status"]["pending"] == 1
    asks = len(asked)
    eventually(lambda: len(asked) > asks + 5)
    assert len(looks) == count + 1, "one look for all of them, and none when nothing has changed"
    for viewer in viewers:
        viewer.close()
    # It is in writing to them that it notices, and the first write to a closed one succeeds.
    eventually(lambda: add(queue, {}) or server.watcher.viewers == 0)
    eventually(lambda: threading.active_count() <= before)
    eventually(lambda: not server.watcher.full, "it has noticed that nobody watches")
    count = len(looks)
    add(queue, {"id": "c"})
    assert next(follow(server))["status"]["total"] >= 3, "and whoever comes later sees all"
    assert len(looks) == count + 1, "nobody watched, so nothing was looked at"


def test_viewers_who_ask_alike_cost_one_look(
    server: dashboard.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = [], database.jobs_page
    monkeypatch.setattr(database, "jobs_page", lambda *a: looks.append(1) or look(*a))

    def looks_for(query: str) -> int:
        looks.clear()
        for _ in range(3):
            asked(server, f"/api/jobs?{query}")
        return len(looks)

    assert looks_for("as_of=1") == looks_for("as_of=0") == looks_for("") == 3
    server.watcher.publish({}, [])
    assert looks_for("as_of=1") == 1 and looks_for("as_of=1&state=dead") == 1
    assert looks_for("as_of=1") == 0 and looks_for("as_of=-1") == 3
    assert looks_for("as_of=2") == 3, "what was made for an earlier one is too old"
    server.watcher.publish({}, [])
    assert looks_for("as_of=2") == 1


def test_a_viewer_that_missed_a_snapshot_is_sent_all(server: dashboard.Server) -> None:
    watcher = server.watcher
    watcher.publish({"n": 1}, [{"id": 1, "finished_at": 1}])
    stream = watcher.events()
    assert b'"whole":true' in next(stream)
    watcher.publish({"n": 2}, [{"id": 1, "finished_at": 1}, {"id": 2, "finished_at": 1}])
    assert b'"runs":[{"id":2,"finished_at":1}]' in next(stream)
    watcher.publish({"n": 3}, [{"id": 2, "finished_at": 1}, {"id": 3, "finished_at": 1}])
    watcher.publish({"n": 4}, [{"id": 3, "finished_at": 1}])
    assert b'"runs":[{"id":3,"finished_at":1}],"whole":true' in next(stream)
    stream.close()


# --- bad clients -----------------------------------------------------------------------------


def test_silent_slow_and_broken_clients_neither_stop_it_nor_leak_threads(
    server: dashboard.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "CONNECTIONS", 20)
    monkeypatch.setattr(dashboard, "REQUEST_S", 3.0)
    monkeypatch.setattr(dashboard, "REFRESH_S", 0.2)
    before = threading.active_count()
    here = ("127.0.0.1", server.port)
    crowd = [socket.create_connection(here, timeout=30) for _ in range(100)]
    for number, client in enumerate(crowd):
        said = [b"", b"GET / HT", b"\0\xff\r\n\r\n", b"GET / HTTP/1.0\r\nHost: a\r\nCookie: "]
        with suppress(OSError):  # turned out already, for a newer one
            client.sendall(said[number % 4])
        if number % 4 == 1:
            client.close()
    assert next(follow(server))["whole"], "one that asks is served meanwhile"
    drip = socket.create_connection(here, timeout=30)
    began = time.monotonic()

    def is_dropped() -> bool:
        try:
            drip.sendall(b"G")
            return False
        except OSError:
            return True

    eventually(is_dropped, "a request that comes byte by byte is given up")
    assert time.monotonic() - began < 20
    eventually(lambda: threading.active_count() <= before and not server.connections)
    for client in [*crowd, drip]:
        client.close()


def test_of_who_is_turned_out_nothing_is_done(
    server: dashboard.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "CONNECTIONS", 2)
    viewers = [follow(server) for _ in range(2)]
    assert all(next(viewer)["whole"] for viewer in viewers)
    done: list[int] = []
    monkeypatch.setattr(dashboard.Handler, "retry", lambda handler: done.append(1))
    head = f"POST /api/retry HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 2\r\n"
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            with suppress(OSError):
                client.sendall(f"{head}Authorization: Bearer {server.token}\r\n\r\n{{}}".encode())
                assert client.recv(99) == b""
    eventually(lambda: len(server.connections) == 2)
    assert done == []
    for viewer in viewers:
        viewer.close()


def test_a_viewer_that_does_not_read_is_dropped(
    server: dashboard.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "SEND_S", 0.5)
    deaf, good = follow(server), follow(server)
    next(deaf)
    next(good)
    eventually(lambda: server.watcher.viewers == 2)

    def is_alone() -> bool:
        server.watcher.publish({"noise": "x" * 2**20}, [])
        assert next(good)
        return server.watcher.viewers == 1

    eventually(is_alone, "only the one that reads is left")
    deaf.close()
    good.close()


# --- metrics ---------------------------------------------------------------------------------


def metrics(window: Window) -> dict[tuple, float]:
    """Return {(name, label values): value} as Prometheus's own parser reads them."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(window.get("/metrics"))
        for sample in family.samples
    }


def test_metrics_are_what_prometheus_reads_and_what_has_happened(window: Window) -> None:
    text = window.get("/metrics")
    families = {each.name: each for each in text_string_to_metric_families(text)}
    kinds = {name.removeprefix("queuectl_"): family.type for name, family in families.items()}
    assert kinds == {
        "jobs": "gauge",
        "runs": "counter",
        "run_seconds": "histogram",
        "wait_seconds": "histogram",
        "workers": "gauge",
        "workers_busy": "gauge",
        "oldest_ready_job_age_seconds": "gauge",
    }
    assert all(family.documentation for family in families.values())
    assert not any(metrics(window).values()), "of an empty queue all is 0"
    add(window.queue, {}, {}, {"command": "sleep 0.15"}, {"command": "exit 1", "max_retries": 1})
    window.queue.drain()
    found = metrics(window)
    assert found["queuectl_jobs", "completed"] == 3 and found["queuectl_jobs", "dead"] == 1
    assert found["queuectl_runs_total", "completed"] == 3
    assert found["queuectl_runs_total", "failed"] == 2
    assert found["queuectl_run_seconds_count",] == found["queuectl_wait_seconds_count",] == 5
    assert found["queuectl_run_seconds_bucket", "+Inf"] == 5
    db = database.connect(window.queue.path)
    took = [row[0] for row in db.execute("SELECT finished_at - started_at FROM runs")]
    db.close()
    assert found["queuectl_run_seconds_bucket", "0.1"] == sum(each <= 0.1 for each in took) < 5
    assert 0.15 < found["queuectl_run_seconds_sum",] < 30
    bounds = [value for name, value in found.items() if name[0] == "queuectl_run_seconds_bucket"]
    assert bounds == sorted(bounds)


def test_metrics_count_on_and_each_run_once(window: Window) -> None:
    flag = window.queue.folder / "flag"
    add(window.queue, {})
    window.queue.start(count=2)
    eventually(lambda: metrics(window)["queuectl_runs_total", "completed"] == 1)
    add(window.queue, {"id": "a", "command": f"while [ ! -e {flag} ]; do sleep 0.05; done"})
    eventually(lambda: metrics(window)["queuectl_workers_busy",] == 1)
    found = metrics(window)
    assert found["queuectl_workers",] == 2 and found["queuectl_runs_total", "completed"] == 1
    flag.touch()
    eventually(lambda: metrics(window)["queuectl_runs_total", "completed"] == 2)
    assert metrics(window)["queuectl_run_seconds_count",] == 2
    add(window.queue, {"id": "b"})
    eventually(lambda: window.queue.state("b") == "completed")
    assert metrics(window)["queuectl_runs_total", "completed"] == 3
    change(window.queue, lambda db: database.prune(db, ["completed"], time.time() + 9))
    found = metrics(window)
    assert found["queuectl_jobs", "completed"] == 0, "a gauge follows"
    assert found["queuectl_runs_total", "completed"] == 3, "a counter never goes back"
    add(window.queue, {"id": "c"})  # its run gets a number that was there before
    eventually(lambda: window.queue.state("c") == "completed")
    assert metrics(window)["queuectl_runs_total", "completed"] == 4
    change(window.queue, lambda db: database.prune(db, ["completed"], time.time() + 9))
    add(window.queue, {}, {}, {})  # as many as there had been, and none of them looked at
    eventually(lambda: change(window.queue, database.counts)["completed"] == 3)
    assert metrics(window)["queuectl_runs_total", "completed"] == 7


def test_a_run_that_began_long_before_the_first_look_is_counted_when_it_ends(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "RECENT_RUNS", 1)
    add(queue, {}, {}, {}, {})
    db, now, meter = database.connect(queue.path), time.time(), dashboard.Meter()
    supervisor = database.register_supervisor(db, "elsewhere", "boot", 1, "birth", now, 30)
    slow, quick = (database.register_worker(db, supervisor, 1, "birth", now) for _ in range(2))
    held, _ = database.claim(db, slow, now, lambda: 0.0)
    while run := database.claim(db, quick, now, lambda: 0.0)[0]:
        database.finish(db, run, database.Result("completed"), now, 0, 0)
    meter.read(db)
    assert meter.ended == {"completed": 1}, "of the past only RECENT_RUNS"
    database.finish(db, held, database.Result("failed"), now, 0, 0)
    meter.read(db)
    meter.read(db)
    assert meter.ended == {"completed": 1, "failed": 1}
    for name in (slow, quick):
        database.remove_worker(db, name)
    database.remove_supervisor(db, supervisor)
    db.close()


def test_the_oldest_ready_job_is_found_whatever_its_priority(queue: Queue) -> None:
    now = time.time()

    def oldest() -> float | None:
        return change(queue, database.oldest_ready_at, now)

    assert oldest() is None
    add(queue, {"run_at": now + 60})
    assert oldest() is None
    add(queue, {"run_at": now - 5, "priority": 9}, {"run_at": now - 7, "priority": -(2**53)})
    assert oldest() == now - 7
    add(queue, {"run_at": now - 90, "priority": 2**53})
    assert oldest() == now - 90


def test_no_question_of_the_dashboard_reads_the_whole_queue(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of every statement uses an index, but for the counts, which are covered by one."""
    add(queue, *({} for _ in range(3)))
    queue.drain()
    db, asked = database.connect(queue.path), []
    db.set_trace_callback(asked.append)
    watcher = dashboard.Watcher(queue.path, worker)
    watcher.look(db, worker.live_workers(db), time.time())
    dashboard.Meter().text(db, [], time.time())
    for state in ("", "dead"):
        for text in ("", "x"):
            for brief in (True, False):
                database.jobs_page(db, state, text, database.TOP, 50, brief)
                database.jobs_page(db, state, text, database.TOP - 1, 50, brief)
    db.set_trace_callback(None)
    statements = {text for text in asked if text.lstrip().startswith(("SELECT", "WITH"))}
    assert len(statements) > 10
    for statement in statements:
        for row in db.execute("EXPLAIN QUERY PLAN " + statement):
            plan = row["detail"]
            whole = re.match(r"SCAN (jobs|runs)\b(?!.*INDEX)", plan)
            bounded = "ORDER BY seq DESC LIMIT" in statement or "UNION\n" in statement
            assert bounded or not whole, (plan, statement)
            assert bounded or "GROUP BY 1" in statement or "TEMP B-TREE" not in plan, statement
    db.close()


# --- in a browser ----------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update""".split()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def tab(browser: Any, window: Window) -> Iterator[Callable[..., Any]]:
    """A function that opens the page in a tab; at the end no tab may have had an error."""
    context, errors = browser.new_context(viewport={"width": 1280, "height": 900}), []

    def opened() -> Any:
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.on(
            "console",
            lambda said: (
                errors.append(said.text)
                if "Security Policy" in said.text or "Trusted" in said.text
                else None
            ),
        )
        page.goto(window.address)
        page.wait_for_selector("#link:text-is('live')")
        return page

    yield opened
    context.close()
    assert errors == []


def count_of(page: Any, state: str) -> int:
    return int(page.text_content(f"#states button[data-state='{state}'] b").replace(",", ""))


def bars(page: Any, kind: str) -> list[dict[str, float]]:
    """Return the boxes of the lanes' bars of a kind, with the job of each."""
    return page.eval_on_selector_all(
        f"#bars .{kind}",
        """all => all.map(bar => {
            const box = bar.firstChild.getBoundingClientRect();
            const job = (seen.runs.get(Number(bar.dataset.run)) || {}).job;
            return {job, top: box.top, left: box.left, right: box.right};
        })""",
    )


def test_counts_change_live_while_workers_run(window: Window, tab: Callable) -> None:
    page = tab()
    assert "token" not in page.url, "the secret leaves the address bar"
    eventually(lambda: page.is_visible("text=The queue is empty"))
    window.queue.run("enqueue", "--command", "exit 1", "--max-retries", "0", check=0)
    flag = window.queue.folder / "flag"
    add(window.queue, *({"command": "sleep 0.05"} for _ in range(30)))
    held = {"command": f"while [ ! -e {flag} ]; do sleep 0.05; done"}
    add(window.queue, *(held for _ in range(30)))
    eventually(lambda: count_of(page, "pending") == 61)
    assert page.is_visible("text=No worker is running, and 61 jobs wait")
    window.queue.start(count=2)
    eventually(lambda: count_of(page, "completed") == 30, "it is live in between, too")
    eventually(lambda: count_of(page, "processing") == 2)
    flag.touch()
    eventually(lambda: count_of(page, "completed") == 60)
    eventually(lambda: count_of(page, "dead") == 1 and count_of(page, "") == 61)
    eventually(lambda: page.text_content("#success") == "98.4%")
    assert page.text_content("#workers") == "2 workers" and not page.is_visible("#idle")
    assert "61 runs ended, 1 of them failed" in page.get_attribute("#chart", "aria-label")


def test_lanes_show_two_workers_at_once_and_never_one_job_twice(
    window: Window, tab: Callable
) -> None:
    flag = window.queue.folder / "flag"
    command = f"while [ ! -e {flag} ]; do sleep 0.05; done"
    add(window.queue, {"id": "a", "command": command}, {"id": "b", "command": command})
    page = tab()
    window.queue.start(count=2)

    def beside() -> list[dict[str, float]]:  # not yet if one of them begins only now
        found = bars(page, "processing")
        at_once = found and max(bar["left"] for bar in found) < min(bar["right"] for bar in found)
        return found if len(found) == 2 and at_once else []

    both = eventually(beside, "both run at the same time")
    assert {bar["job"] for bar in both} == {"a", "b"} and both[0]["top"] != both[1]["top"]
    width = both[0]["right"] - both[0]["left"]
    eventually(lambda: (bar := bars(page, "processing")[0])["right"] - bar["left"] > width + 3)
    flag.touch()
    eventually(lambda: len(bars(page, "completed")) == 2 and not bars(page, "processing"))


def test_lanes_link_the_retries_of_a_job_and_mark_a_crash(window: Window, tab: Callable) -> None:
    page = tab()
    job = {"command": "sleep 0.3; [ $QUEUECTL_ATTEMPT = 1 ] && kill -9 $PPID; exit 1"}
    add(window.queue, {"id": "a", "max_retries": 2, "backoff_base": 1} | job, {"id": "other"})
    window.queue.start(count=1)
    eventually(lambda: window.queue.state("a") == "dead")
    eventually(lambda: len(bars(page, "failed")) == 2)
    assert page.locator("#bars .lost .mark").count() == 1
    page.hover("#bars .lost rect")
    assert page.locator("#links path").count() == 2, "from each run to the next"
    assert page.locator("#bars .same").count() == 3
    assert "a run 1 of 3 on w1: lost after" in page.text_content("#caption")
    page.click("#bars .lost rect")
    page.wait_for_selector("#job[open]")
    assert page.text_content("#job-id") == "a"
    assert page.locator("#history tbody tr").count() == 3
    assert page.text_content("#sentence").startswith("Dead after 3 runs")


def test_an_open_run_is_drawn_at_most_twice_as_long_as_it_was_seen_to_run(
    window: Window, tab: Callable
) -> None:
    page = tab()
    drawn = r"""([age, ago]) => {  // how old it was at the last look, and how long ago that is
        const run = { id: 1, job: "a", command: "true", attempt: 1, most: 1, worker: "w1" };
        view.held = clock(); view.span = 5; seen.now = view.held - ago;
        run.started_at = run.due_at = seen.now - age;
        seen.runs.set(1, run); view.chosen = 1; draw();
        const box = elements.get(1).firstChild.getBBox();
        const toNow = $("grid").querySelector(".row").x2.baseVal.value - box.x - box.width;
        return [toNow < 1, $("caption").textContent.match(/runs for ([.\d]+ m?s)/)[1]];
    }"""
    assert page.evaluate(drawn, [0.003, 0.7]) == [False, "6 ms"], "of a busy worker: it has ended"
    assert page.evaluate(drawn, [9, 0.7]) == [True, "9.7 s"]
    assert page.evaluate(drawn, [0.1, 4.5]) == [True, "4.6 s"], "no news: it runs still"


def test_retry_from_the_dlq_runs_the_job(window: Window, tab: Callable) -> None:
    flag = window.queue.folder / "flag"
    add(window.queue, *({"id": id, "command": f"test -e {flag}"} for id in ("a", "b", "c")))
    window.queue.start()
    page = tab()
    eventually(lambda: count_of(page, "dead") == 3)
    flag.touch()
    page.click("#states button[data-state=dead]")
    page.click("button[aria-label='Retry b']")
    eventually(lambda: window.queue.state("b") == "completed")
    eventually(lambda: page.text_content("#retry-all") == "Retry all 2")
    page.click("#retry-all")
    assert "Start all 2 dead jobs over?" in page.text_content("#question")
    page.click("#no")
    assert window.queue.states()["dead"] == 2, "it asks first"
    page.click("#retry-all")
    page.click("#yes")
    eventually(lambda: count_of(page, "completed") == 3)
    eventually(lambda: page.text_content("#no-jobs") == "No job is dead.")


def test_a_waiting_and_a_running_job_are_cancelled(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a", "command": "sleep 60"}, {"id": "b"})
    window.queue.start()
    eventually(lambda: window.queue.state("a") == "processing")
    page = tab()
    page.click("button[aria-label='Cancel b']")
    eventually(lambda: window.queue.state("b") == "cancelled")
    page.click("button[aria-label='Cancel a']")
    page.click("#yes")
    eventually(lambda: window.queue.state("a") == "cancelled")
    eventually(lambda: count_of(page, "cancelled") == 2 and len(bars(page, "cancelled")) == 1)


def test_what_a_job_contains_stays_text(window: Window, tab: Callable) -> None:
    evil = "<img src=x onerror=alert(1)>"
    codes = r"\033[31mred\0\177\302\233\n"
    command = f"printf '</script><script>alert(2)</script>{codes}'; echo '{evil}' >&2 #"
    add(window.queue, {"id": evil, "command": f"{command} {evil} \u202egpj"})
    add(window.queue, {"id": "../?a=b&c#d'\"%", "command": f"exit 1 # {evil}"})
    window.queue.drain()
    page = tab()
    page.click(f"button[title={json.dumps(evil)}]")
    page.wait_for_selector("#job[open]")
    assert page.text_content("#job-id") == evil
    said = r"</script><script>alert(2)</script>\x1b[31mred\x00\x7f\x9b"
    assert page.text_content("#out") == said + "\n"
    assert page.text_content("#err") == evil + "\n"
    assert page.text_content("#command").endswith(evil + " \\u202egpj")
    page.keyboard.press("Escape")
    page.click("button[title^='../']")
    page.wait_for_selector("#job[open]")
    assert page.text_content("#job-id") == "../?a=b&c#d'\"%"
    page.keyboard.press("Escape")
    page.hover("#bars .failed rect")
    assert evil in page.text_content("#caption")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1


def test_output_grows_while_the_job_runs(window: Window, tab: Callable) -> None:
    flags = [window.queue.folder / name for name in ("first", "second")]
    waits = [f"while [ ! -e {flag} ]; do sleep 0.05; done" for flag in flags]
    command = f"echo one; {waits[0]}; echo two; {waits[1]}; echo three"
    add(window.queue, {"id": "a", "command": command})
    window.queue.start()
    page = tab()
    page.click("button[title=a]")
    eventually(lambda: page.text_content("#out") == "one\n")
    flags[0].touch()
    eventually(lambda: page.text_content("#out") == "one\ntwo\n")
    assert "on w1 for" in page.text_content("#sentence"), "it still runs"
    flags[1].touch()
    eventually(lambda: page.text_content("#out") == "one\ntwo\nthree\n")
    eventually(lambda: page.text_content("#sentence") == "Completed on run 1 of 1.")


def test_two_tabs_stay_right(window: Window, tab: Callable) -> None:
    first, second = tab(), tab()
    add(window.queue, {"id": "a"}, {"id": "b"})
    for page in (first, second):
        eventually(lambda page=page: count_of(page, "pending") == 2)
    second.click("#states button[data-state=cancelled]")
    first.click("button[aria-label='Cancel a']")
    for page in (first, second):
        eventually(lambda page=page: count_of(page, "cancelled") == 1)
    eventually(lambda: second.locator("#jobs tbody tr").count() == 1)
    assert first.locator("#jobs tbody tr").count() == 2, "each keeps its own view"


def test_a_killed_server_is_reported_and_a_new_one_found_again(
    window: Window, tab: Callable
) -> None:
    page = tab()
    window.process.kill()
    window.process.wait()
    page.wait_for_selector("#broken:has-text('connection is lost')")
    assert page.text_content("#link") == "not live"
    add(window.queue, {"id": "a"})
    window.open("--port", str(window.port))
    eventually(lambda: count_of(page, "pending") == 1, "the open page goes on")
    assert not page.is_visible("#broken") and page.text_content("#link") == "live"
    page.wait_for_selector("#idle:has-text('No worker is running')")
    window.end()
    page.wait_for_selector("#broken:has-text('connection is lost')")
    assert not page.is_visible("#idle"), "nobody knows any more"
    window.open("--port", str(window.port))  # after a clean end: with another token
    page.wait_for_selector("#broken:has-text('Open the address that it printed')")


def test_workers_that_are_gone_are_missed(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a", "command": "sleep 60"})
    supervisor = window.queue.start()
    page = tab()
    eventually(lambda: len(bars(page, "processing")) == 1)
    assert not page.is_visible("#idle")
    for pid in (supervisor.pid, window.queue.workers()[0]["pid"]):
        os.kill(pid, signal.SIGKILL)
    page.wait_for_selector("#idle:has-text('The workers are gone. 1 running job')")
    command = f"python3 queuectl.py --db '{window.queue.path}' worker start"
    assert page.text_content("#idle code") == command, "for this queue and no other"
    assert page.text_content("#workers") == "no workers"
    assert page.text_content("#grid .gone") == "w1gone"


def test_all_can_be_done_with_the_keyboard(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a", "command": "exit 1"}, {"id": "b"})
    window.queue.start()
    page = tab()
    eventually(lambda: len(bars(page, "failed")) == len(bars(page, "completed")) == 1)

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"the keyboard does not reach {selector}")

    tab_to("#lanes-scroll")
    for key, said in (("ArrowLeft", "b run 1"), ("ArrowLeft", "a run 1"), ("ArrowRight", "b run")):
        page.keyboard.press(key)
        assert page.text_content("#caption").startswith(said)
    page.keyboard.press("Enter")
    page.wait_for_selector("#job[open]")
    assert page.text_content("#job-id") == "b"
    assert page.text_content("#caption").startswith("b run 1"), "it is still marked in the lanes"
    page.keyboard.press("Escape")
    eventually(lambda: not page.is_visible("#job"))
    tab_to("#states button[data-state=dead]")
    page.keyboard.press("Enter")
    eventually(lambda: page.locator("#jobs tbody tr").count() == 1)
    tab_to("#jobs .link")
    page.keyboard.press("Enter")
    page.wait_for_selector("#job[open]")
    page.evaluate("document.querySelector('#jobs .link').id = 'old'")
    add(window.queue, {"id": "c", "command": "exit 1"})
    eventually(
        lambda: page.locator("#jobs tbody tr").count() == 2 and not page.query_selector("#old")
    )
    page.keyboard.press("Escape")
    focus = "document.activeElement.matches('#jobs .link') && document.activeElement.textContent"
    back = "focus comes back, though the row was made anew"
    eventually(lambda: page.evaluate(focus) == "a", back)


def test_a_job_opened_by_its_row_gives_the_focus_to_the_rows_button(
    window: Window, tab: Callable
) -> None:
    add(window.queue, {"id": "a"}, {"id": "b"})
    page = tab()
    page.set_viewport_size({"width": 375, "height": 700})
    page.click("#jobs [data-id=a] code")
    page.wait_for_selector("#job[open]")
    said = page.locator("#history td")
    assert said.text_content() == "It has not run."
    assert said.bounding_box()["height"] < 30, "on one line"
    page.keyboard.press("Escape")
    focus = "document.activeElement.matches('#jobs .link') && document.activeElement.textContent"
    eventually(lambda: page.evaluate(focus) == "a")


def test_text_and_pages_are_the_servers_work(window: Window, tab: Callable) -> None:
    add(
        window.queue, *({"id": f"job-{n}"} for n in range(1, 121)), {"id": "x", "command": "NEEDLE"}
    )
    page = tab()
    eventually(lambda: page.locator("#jobs tbody tr").count() == 50)
    page.click("#older")
    eventually(lambda: page.text_content("#jobs tbody tr:first-child .link") == "job-71")
    page.click("#older")
    eventually(lambda: page.locator("#jobs tbody tr").count() == 21)
    assert page.is_disabled("#older")
    page.fill("#text", "needle")
    eventually(lambda: page.locator("#jobs tbody tr").count() == 1)
    assert page.text_content("#jobs tbody .link") == "x"
    page.fill("#text", "no such thing")
    page.wait_for_selector("text=No job with this text.")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_window(window: Window, tab: Callable, width: int) -> None:
    page = tab()
    page.set_viewport_size({"width": width, "height": 700})

    def overflow() -> int:
        return page.evaluate("document.documentElement.scrollWidth - innerWidth")

    assert overflow() <= 0  # nor when it is empty
    long = "x" * 500
    add(window.queue, {"id": "i" * 128, "command": f"echo {long}; echo {long} >&2; exit 1"})
    window.queue.drain()
    page.wait_for_selector("#jobs .link")
    assert overflow() <= 0
    page.click("#jobs .link")
    page.wait_for_selector("#job[open]")
    assert overflow() <= 0
    assert (
        page.evaluate("(d => d.scrollWidth - d.clientWidth)(document.querySelector('#job'))") <= 0
    )


def test_a_server_that_hangs_is_not_called_live(window: Window, tab: Callable) -> None:
    page = tab()
    eventually(lambda: page.text_content("#link") == "live")
    window.process.send_signal(signal.SIGSTOP)
    try:
        # As if it had been quiet for so long; something said before may still have been on its way.
        quiet = "(heardAt -= 20000) && $('link').textContent"
        eventually(lambda: page.evaluate(quiet) == "not live", "it is noticed")
    finally:
        window.process.send_signal(signal.SIGCONT)
    eventually(lambda: page.text_content("#link") == "live", "it goes on")


def test_one_slow_look_is_not_followed_by_a_long_silence(
    server: dashboard.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests, wait = [], server.watcher.stopped.wait
    monkeypatch.setattr(dashboard, "SHARE", 1e9)  # as if each look had taken very long
    monkeypatch.setattr(
        server.watcher.stopped, "wait", lambda span=None: rests.append(span) or wait(0.05)
    )
    stream = follow(server)
    next(stream)
    eventually(lambda: len(rests) > 2)
    assert set(rests) == {dashboard.REFRESH_S}
    stream.close()


def test_an_opened_job_is_not_changed_or_closed_by_mistake(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a", "command": "echo " + "word " * 30})
    page = tab()
    page.click("#jobs .link")
    page.wait_for_selector("#job[open]")
    page.keyboard.press("Enter")  # once too often
    eventually(lambda: not page.is_visible("#job"), "Close has the focus")
    assert window.queue.state("a") == "pending"
    page.click("#jobs .link")
    page.wait_for_selector("#job[open]")
    assert "a" in page.locator("#fields dd").all_text_contents(), "its whole id can be read"
    box = page.locator("#command").bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(5, 5)  # text is marked, to beyond the edge
    page.mouse.up()
    assert page.is_visible("#job")
    page.mouse.click(5, 5)
    eventually(lambda: not page.is_visible("#job"), "a click outside closes it")


def test_a_second_click_hits_no_other_job_nor_what_the_first_has_made(
    window: Window, tab: Callable
) -> None:
    """The row goes, and the next one slides under the pointer; Retry becomes Cancel."""
    add(window.queue, *({"id": f"job{n}"} for n in range(5)))
    page = tab()
    page.click("#states [data-state=pending]")
    box = eventually(page.locator("#jobs .button").nth(1).bounding_box)  # none of a row made anew
    page.mouse.click(box["x"] + 9, box["y"] + 9)
    eventually(lambda: page.locator("#jobs tbody tr").count() == 4)
    page.mouse.down(click_count=2)  # the second of a double click
    page.mouse.up(click_count=2)
    add(window.queue, {"id": "later"})
    eventually(lambda: page.locator("#jobs [data-id=later]").count() == 1)
    assert window.queue.states()["cancelled"] == 1


def test_the_second_click_answers_no_question_that_the_first_has_raised(
    window: Window, tab: Callable
) -> None:
    add(window.queue, {"id": "a", "command": "until [ -e go ]; do sleep 0.02; done"})
    window.queue.start()
    page = tab()
    page.wait_for_selector("#jobs .processing")
    page.click("#jobs .button")
    page.wait_for_selector("#ask[open]")
    page.hover("#yes")
    page.mouse.down(click_count=2)
    page.mouse.up(click_count=2)
    assert page.is_visible("#ask")
    page.click("#no")
    (window.queue.folder / "go").touch()
    eventually(lambda: window.queue.state("a") == "completed")


def test_text_can_be_marked_and_a_job_opened_while_some_is(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a", "command": "echo one two three"})
    page = tab()
    page.wait_for_selector("#jobs td code")
    # In one look: the row is made anew now and then, and what was found is no longer there.
    code = "document.querySelector('#jobs td code').getBoundingClientRect()"
    left, top = page.evaluate(f"(box => [box.x, box.y])({code})")
    page.mouse.move(left + 3, top + 5)
    page.mouse.down()
    page.mouse.move(left + 80, top + 5)
    assert page.evaluate("String(getSelection())"), "the row stays as it is while it is pressed"
    page.mouse.up()
    assert page.evaluate("view.job") is None and not page.is_visible("#job")
    page.focus("#jobs .link")
    page.evaluate("getSelection().selectAllChildren($('idle'))")
    page.keyboard.press("Enter")
    page.wait_for_selector("#job[open]")


def test_a_value_that_cannot_be_is_told_and_mended(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a"})
    window.queue.drain()
    page = tab()
    eventually(lambda: count_of(page, "completed") == 1)
    with sqlite3.connect(window.queue.path) as db:
        db.execute("UPDATE runs SET started_at = 'x'")
    page.wait_for_selector("#broken:has-text('is damaged')")
    answer = window.ask("/api/status", Authorization=f"Bearer {window.token}")
    assert answer.status == 503 and "is damaged" in answer.text
    with sqlite3.connect(window.queue.path) as db:
        db.execute("UPDATE runs SET started_at = finished_at")
    db.close()
    add(window.queue, {"id": "b"})
    eventually(lambda: count_of(page, "pending") == 1, "it goes on")


def test_the_edge_of_an_opened_job_is_a_scrollbar_and_not_the_outside(
    window: Window, tab: Callable
) -> None:
    add(window.queue, {"id": "a"})
    page = tab()
    page.click("#jobs .link")
    page.wait_for_selector("#job[open]")
    box = page.locator("#job").bounding_box()
    event = "new PointerEvent('pointerdown', {clientX: x, clientY: y})"
    press = f"([x, y]) => $('job').dispatchEvent({event})"
    page.evaluate(press, [box["x"] + box["width"] - 3, box["y"] + 90])
    assert page.is_visible("#job")
    page.evaluate(press, [box["x"] + box["width"] + 3, box["y"] + 90])
    eventually(lambda: not page.is_visible("#job"))


def test_the_end_of_a_running_jobs_output_is_shown(window: Window, tab: Callable) -> None:
    command = "seq 2000; until [ -e go ]; do sleep 0.1; echo more; done"
    add(window.queue, {"id": "a", "command": command})
    window.queue.start()
    eventually(lambda: "2000" in window.get("/api/job?id=a")["stdout"])
    page = tab()
    page.click("#jobs .link")
    page.wait_for_selector("#job[open]")
    at_end = "(o => o.scrollTop > 999 && o.scrollTop + o.clientHeight >= o.scrollHeight - 4)"
    height, lines = page.evaluate("$('out').scrollHeight"), f"{at_end}($('out'))"
    assert page.evaluate(lines)
    eventually(lambda: page.evaluate("$('out').scrollHeight") > height, "it goes on")
    assert page.evaluate(lines), "and is followed"
    (window.queue.folder / "go").touch()


def test_a_job_is_pruned_while_it_is_open(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a"}, {"id": "b", "run_at": time.time() + 1e6})
    window.queue.start()
    eventually(lambda: window.queue.state("a") == "completed")
    page, asked = tab(), []
    page.click("#jobs [data-id=a] .link")
    page.wait_for_selector("#job[open]")
    window.queue.run("prune", "--older-than", "0s", check=0)
    page.wait_for_selector("#sentence:has-text('pruned')")  # until then it is, as often as it may
    page.on("request", lambda request: "/api/job" in request.url and asked.append(request.url))
    window.queue.run("cancel", "b", check=0)
    page.wait_for_selector("#jobs [data-id=b] .cancelled")
    eventually(lambda: any("/api/jobs?" in url for url in asked) or page.wait_for_timeout(10))
    page.evaluate("new Promise(requestAnimationFrame)")
    assert not any("/api/job?" in url for url in asked), "it is not asked for again"
    assert not page.is_visible("#said")


def test_the_focus_is_not_lost_when_what_had_it_goes(window: Window, tab: Callable) -> None:
    add(window.queue, *({"id": f"job{n:02}"} for n in range(60)))
    page = tab()
    page.wait_for_selector("#shown:has-text('50 jobs')")  # only then it is known what is older
    focus = "document.activeElement.id || document.activeElement.dataset.state"
    page.focus("#older")
    page.keyboard.press("Enter")
    page.wait_for_selector("#shown:has-text('10 jobs')")
    assert page.evaluate(focus) == "newer", "there are no older ones"
    page.keyboard.press("Enter")
    page.wait_for_selector("#shown:has-text('50 jobs')")
    assert page.evaluate(focus) == "older"
    page.click("#states [data-state=pending]")
    page.focus("#jobs .button")
    page.keyboard.press("Enter")
    eventually(lambda: count_of(page, "pending") == 59 and page.evaluate(focus) == "pending")


def test_what_is_said_can_be_seen_above_a_dialog_and_far_down_the_page(
    window: Window, tab: Callable
) -> None:
    add(window.queue, *({"id": f"job{n}"} for n in range(50)))
    page = tab()
    page.click("#jobs .link")
    page.wait_for_selector("#job[open]")
    page.click("#job-do")
    eventually(lambda: page.text_content("#said").endswith("cancelled"))
    above = "document.querySelector('#said').matches(':popover-open')"  # shown later: on top
    assert page.evaluate(above)
    window.end()
    eventually(lambda: page.text_content("#said").startswith("The connection is lost"))
    assert page.evaluate(above), "for the notice is behind the dialog"
    page.click("#job-close")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert page.evaluate("scrollY") > 0 and page.locator("#broken").bounding_box()["y"] > 0


def open_in_vain(page: Any, id: str) -> list[Any]:
    """Click on a job whose answer does not come; return the request that waits for it."""
    held: list[Any] = []
    page.route(f"**/api/job?id={id}&*", lambda route: held.append(route))
    page.click(f"#jobs [data-id={id}] .link")
    eventually(lambda: held or page.wait_for_timeout(10))
    return held


def test_of_two_jobs_opened_the_one_is_shown_that_was_asked_for_last(
    window: Window, tab: Callable
) -> None:
    add(window.queue, {"id": "a"}, {"id": "b"})
    page = tab()
    held = open_in_vain(page, "a")
    page.click("#jobs [data-id=b] .link")
    page.wait_for_selector("#job[open]")
    with page.expect_response("**/api/job?id=a&*"):
        held[0].continue_()
    page.evaluate("new Promise(requestAnimationFrame)")
    assert page.text_content("#job-id") == "b"
    page.click("#job-close")
    eventually(lambda: not page.is_visible("#job"))
    held.clear()
    page.click("#jobs [data-id=a] .link")
    eventually(lambda: held or page.wait_for_timeout(10))
    page.click("#jobs [data-id=b] .link")
    page.wait_for_selector("#job[open]")
    page.click("#job-close")
    with page.expect_response("**/api/job?id=a&*"):
        held[0].continue_()
    page.evaluate("new Promise(requestAnimationFrame)")
    assert not page.is_visible("#job"), "it was closed"


def test_that_one_job_is_gone_is_not_said_of_another(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a"}, {"id": "b"})
    page = tab()
    held = open_in_vain(page, "a")
    page.click("#jobs [data-id=b] .link")
    page.wait_for_selector("#job[open]")
    with page.expect_response("**/api/job?id=a&*"):
        held[0].fulfill(status=404, json={"error": "gone"})
    page.evaluate("new Promise(requestAnimationFrame)")
    assert page.text_content("#job-id") == "b" and page.is_visible("#job-do")


def test_what_is_pressed_does_not_move_meanwhile(window: Window, tab: Callable) -> None:
    add(window.queue, {"id": "a"})
    page = tab()
    page.hover("#jobs .link")
    page.mouse.down()
    with page.expect_response(lambda each: "/api/jobs" in each.url and '"b"' in each.text()):
        add(window.queue, {"id": "b"})
    page.evaluate("new Promise(requestAnimationFrame)")
    page.mouse.up()
    page.wait_for_selector("#job[open]")
    assert page.text_content("#job-id") == "a"


def test_an_open_run_that_is_no_longer_listed_is_taken_from_the_page(queue):
    watcher = dashboard.Watcher(queue.path, None)
    watcher.publish({}, [{"id": 1, "finished_at": None}, {"id": 2, "finished_at": 1}])
    watcher.publish({}, [{"id": 1, "finished_at": None}])
    assert b'"whole"' not in watcher.delta, "what has ended is old: the page drops it by itself"
    watcher.publish({}, [{"id": 3, "finished_at": None}])
    assert watcher.delta == watcher.full


def test_a_long_run_is_listed_when_it_ends_however_many_were_run_beside_it(queue):
    add(queue, *[{"command": "true"}] * 61)
    db = database.connect(queue.path)
    long, _ = database.claim(db, "w1", time.time(), time.monotonic)
    for _ in range(60):
        run, _ = database.claim(db, "w2", time.time(), time.monotonic)
        database.finish(db, run, database.Result("completed", 0), 2.0, 0, 0)
    assert long.id in [row["id"] for row in database.lane_runs(db, 0, 10, [])]
    database.finish(db, long, database.Result("completed", 0), 3.0, 0, 0)
    assert long.id not in [row["id"] for row in database.lane_runs(db, 0, 10, [])]
    assert long.id in [row["id"] for row in database.lane_runs(db, 0, 10, [long.id])]
    db.close()
