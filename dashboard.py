"""The window: one page, its live events, a JSON interface and metrics, over HTTP.

Owns routes, headers, who is let in, and what is sent to whom when. Must not hold SQL (database.py
does), print, or touch processes: the hands (worker.py) that do this for it are handed in.

    watcher, one thread     looks, while somebody watches, whether the queue has changed; if so,
      |                     takes one snapshot for all
      +- viewer 1 .. N      a thread each: sends the newest snapshot, or only what is new to it
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import database
from database import QueueError, as_object

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "dashboard.html")
LOOK_S = 0.25  # how often the watcher looks for a change ...
SHARE = 10  # ... but it rests ten times as long as it worked: a big queue makes it slow, not hungry
REFRESH_S = 5.0  # without any change: the last hour goes on, and viewers hear that we are there
LANES_S, LANE_RUNS, CHART_S, PAGE_JOBS = 900, 600, 1800, 50  # what the page shows at most ...
PAGE_RUNS = 100  # ... and of one job
REQUEST_S, SEND_S, SEARCH_S = 10.0, 10.0, 0.2  # to read a request, send a piece, find a text
# At once (macOS lets a program open 256 files); then the oldest that has not asked yet must go.
CONNECTIONS = 128
BODY_BYTES, OUTPUT_BYTES = 2**20, 2**16
BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800, 3600)  # seconds, of the histograms
REFUSAL = b"403: open the address that `queuectl.py dashboard` printed\n"
HEADERS = {  # of every answer: what a browser may do with it, which is little
    "Content-Security-Policy": "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors"
    " 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address has the token in it
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def opened(path: str) -> closing:
    """Return a connection for one look, for `with`; raises QueueError if there is no queue."""
    if not os.path.exists(path):  # connecting would make a new one
        raise QueueError(f"{path} is gone")
    return closing(database.connect(path))


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class Watcher:
    """Sees that the queue has changed, and keeps one snapshot as all viewers get it."""

    def __init__(self, path: str, hands: Any):
        self.path, self.hands = path, hands
        self.news, self.sharing = threading.Condition(), threading.Lock()
        self.viewers, self.version, self.stopped = 0, 0, threading.Event()
        self.full = self.delta = b""  # full is empty while nobody watches
        self.runs: dict[int, dict[str, Any]] | None = None  # of the last snapshot, by number
        self.answers: dict[str, bytes] = {}  # to what was asked since the last snapshot

    def run(self) -> None:
        """Follow the queue while there are viewers, until stopped."""
        while not self.stopped.is_set():
            with self.news:
                self.full = b""  # it will be old by the time that somebody comes
                self.news.wait_for(lambda: self.viewers or self.stopped.is_set())
            try:
                with opened(self.path) as db:
                    self.follow(db)
            except Exception as error:
                self.publish({"trouble": database.error_text(error, self.path)}, [])
                self.stopped.wait(1)

    def follow(self, db: Any) -> None:
        """Publish a snapshot whenever something has changed, as long as it is the same file."""
        file, seen, refresh_at, self.runs = os.stat(self.path)[1:3], None, 0.0, None
        while self.viewers and not self.stopped.is_set() and os.stat(self.path)[1:3] == file:
            began = time.monotonic()
            workers = self.hands.live_workers(db)  # one that is killed tells the file nothing
            found = database.data_version(db), [row["worker"] for row in workers]
            if found != seen or began >= refresh_at:
                seen, refresh_at = found, began + REFRESH_S
                self.look(db, workers, time.time())
            self.stopped.wait(min(REFRESH_S, max(LOOK_S, SHARE * (time.monotonic() - began))))

    def look(self, db: Any, workers: list[Any], now: float) -> None:
        """Take a snapshot: all that the page shows, but for the list of jobs."""
        found = {
            "now": now,
            "queue": self.path,
            "status": database.summary(db, now, len(workers)),
            "workers": [{key: row[key] for key in ("worker", "pid", "job")} for row in workers],
            "minutes": database.runs_by_minute(db, now - CHART_S),
        }
        still = [id for id, run in (self.runs or {}).items() if not run["finished_at"]]
        rows = database.lane_runs(db, now - LANES_S, LANE_RUNS, still)
        self.publish(found, [dict(row) for row in rows])

    def publish(self, found: dict[str, Any], runs: list[dict[str, Any]]) -> None:
        known, now = self.runs or {}, {run["id"]: run for run in runs}
        changed = [run for run in runs if known.get(run["id"]) != run]
        # A delta cannot say that an open run is gone, or that this is another queue.
        whole = self.runs is None or any(not known[id]["finished_at"] for id in known.keys() - now)
        with self.news:
            self.version, self.runs, self.answers = self.version + 1, now, {}
            found["version"] = self.version
            self.full = b"data: %s\n\n" % as_json(found | {"runs": runs, "whole": True})
            delta = b"data: %s\n\n" % as_json(found | {"runs": changed})
            self.delta = self.full if whole else delta
            self.news.notify_all()

    def events(self) -> Iterator[bytes]:
        """Yield what one viewer is to be sent: all of it if it is new, or slow and missed some."""
        seen = 0
        with self.news:
            self.viewers += 1
            self.news.notify_all()
        try:
            while True:
                with self.news:
                    while not self.stopped.is_set() and (not self.full or self.version == seen):
                        self.news.wait()
                    text = self.delta if seen and self.version == seen + 1 else self.full
                    seen = self.version
                if self.stopped.is_set():
                    return
                yield text
        finally:
            with self.news:
                self.viewers -= 1

    def shared(self, request: str, make: Callable[[], bytes]) -> bytes:
        """Return make(), or what it made for another viewer who has asked the same."""
        with self.sharing:
            answers = self.answers  # left behind if a snapshot comes meanwhile
            if request not in answers:
                answers[request] = make()
            return answers[request]

    def stop(self) -> None:
        with self.news:
            self.stopped.set()
            self.news.notify_all()


class Meter:
    """Counts runs as they end: so its counters only grow, and a look reads only what is new."""

    def __init__(self) -> None:
        self.lock, self.last, self.open = threading.Lock(), None, set()  # open: seen, not their end
        self.began = 0.0  # when the newest of those seen did
        self.ended: Counter[str] = Counter()  # by outcome
        self.sums = {"run": 0.0, "wait": 0.0}
        self.buckets = {name: [0] * (len(BUCKETS) + 1) for name in self.sums}

    def read(self, db: Any) -> None:
        """Count what has ended since the last time; at first, of the last RECENT_RUNS."""
        if self.last is None:
            self.open = {row["run"] for row in database.workers(db) if row["run"]}
        else:  # numbers are given again when the newest were pruned, or the file replaced
            self.last = min(self.last, database.last_before(db, self.began))
        last, self.last = self.last, self.last or 0
        for row in database.runs_after(db, last, self.open):
            self.last = max(self.last, row["id"])
            self.began = max(self.began, row["started_at"])
            if row["finished_at"] is None:
                self.open.add(row["id"])
                continue
            self.open.discard(row["id"])
            self.ended[row["outcome"]] += 1
            for name, begin, end in (("run", "started", "finished"), ("wait", "due", "started")):
                seconds = max(0.0, row[end + "_at"] - row[begin + "_at"])  # clocks are set back
                self.sums[name] += seconds
                self.buckets[name][bisect_left(BUCKETS, seconds)] += 1

    def families(self, db: Any, workers: list[Any], now: float) -> Iterator[tuple]:
        """Yield (name, type, help, {what follows the name: value}) for each metric."""
        jobs, ready = database.counts(db), database.oldest_ready_at(db, now)
        since = f"ended since the first look here, or are of the {database.RECENT_RUNS} before"
        told = {"run": "Run time of runs that", "wait": "Time from due to begun of runs that"}
        outcomes = ("completed", "failed", "cancelled", "stopped")
        by_state = {f'{{state="{state}"}}': jobs[state] for state in database.STATES}
        yield "jobs", "gauge", "Jobs by state.", by_state
        by_outcome = {f'{{outcome="{each}"}}': self.ended[each] for each in outcomes}
        yield "runs_total", "counter", f"Runs that {since}.", by_outcome
        for name, buckets in self.buckets.items():
            totals = list(accumulate(buckets))
            samples = {f'_bucket{{le="{le:g}"}}': total for le, total in zip(BUCKETS, totals)}
            samples |= {'_bucket{le="+Inf"}': totals[-1], "_count": totals[-1]}
            samples["_sum"] = self.sums[name]
            yield f"{name}_seconds", "histogram", f"{told[name]} {since}.", samples
        yield "workers", "gauge", "Live workers.", {"": len(workers)}
        busy = sum(row["job"] is not None for row in workers)
        yield "workers_busy", "gauge", "Those that run a job.", {"": busy}
        told = "For how long the longest waiting job could have run; 0: none is ready."
        age = 0 if ready is None else max(0.0, now - ready)
        yield "oldest_ready_job_age_seconds", "gauge", told, {"": age}

    def text(self, db: Any, workers: list[Any], now: float) -> str:
        """Return it all as on prometheus.io/docs/instrumenting/exposition_formats."""
        lines = []
        with self.lock:
            self.read(db)
            for name, kind, told, samples in self.families(db, workers, now):
                name = f"queuectl_{name}"
                lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
                lines += [f"{name}{suffix} {value}" for suffix, value in samples.items()]
        return "\n".join([*lines, ""])


class Server(ThreadingTCPServer):  # no HTTPServer: that would ask the DNS for our own name
    """Listens from its making on; `start` begins to answer, `close` ends all of it."""

    allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

    def __init__(self, path: str, host: str, port: int, hands: Any, settings: Any, say: Any):
        """Raises QueueError if the address cannot be had. The hands need `settings` and `say`."""
        hands.make_run_directory(path)  # private: it keeps the token
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, UnicodeError) as error:
            told = f"cannot listen on {host} port {port}: {getattr(error, 'strerror', '') or error}"
            if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES):
                told += "; --port 0 takes a free one"
            raise QueueError(told) from None
        self.port, self.ip = self.server_address[1], ipaddress.ip_address(self.server_address[0])
        self.path, self.hands, self.watcher, self.meter = path, hands, Watcher(path, hands), Meter()
        self.lock = threading.Lock()  # guards `connections`, `ticket` and the threads that cancel
        # The oldest first: until when it must have asked; inf: it has.
        self.connections: dict[Any, float] = {}
        self.await_cancelled = partial(hands.await_cancelled, path, settings, say)
        name = socket.gethostname() if self.ip.is_unspecified else host
        self.host = (f"[{name}]" if ":" in name else name).lower() + f":{self.port}"
        self.token_path = os.path.join(database.run_directory(path), f"dashboard-{self.port}.token")
        self.token = kept_token(self.token_path)
        self.cookie = f"queuectl_{self.port}={self.token}"  # browsers share them between ports
        # A cookie comes along with whatever another site makes the browser send; this does not.
        self.key = hmac.digest(self.token.encode(), b"changes", "sha256").hex()
        self.address = f"http://{self.host}/?token={self.token}"
        # Serves once in place of the token: to start a browser with, for all can read `ps`.
        self.ticket = secrets.token_urlsafe(32)

    def start(self) -> None:
        for target in (self.watcher.run, self.serve_forever):
            threading.Thread(target=target, daemon=True).start()

    def close(self) -> None:
        self.watcher.stop()
        self.shutdown()
        self.server_close()
        with suppress(OSError):
            os.unlink(self.token_path)

    def process_request(self, request: Any, address: Any) -> None:
        """Give a connection its thread, when others have made room for it."""
        with self.lock:
            self.connections[request] = time.monotonic() + REQUEST_S
        self.service_actions()
        super().process_request(request, address)

    def service_actions(self) -> None:
        """Turn out who was to have asked by now, however slowly the bytes come; of a crowd sooner:
        silent ones cannot keep out one that asks. Called twice a second, too."""
        with self.lock:
            for request, until in list(self.connections.items()):
                crowd = until < math.inf and len(self.connections) > CONNECTIONS
                if until <= time.monotonic() or crowd:
                    del self.connections[request]
                    with suppress(OSError):  # its thread reads the end of it, and leaves
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that is gone or slow is no news
            super().handle_error(request, address)

    def takes(self, ticket: str) -> bool:
        with self.lock:
            taken = bool(self.ticket) and same(ticket, self.ticket)
            self.ticket = "" if taken else self.ticket
        return taken

    def is_ours(self, host: str) -> bool:
        """Say whether a Host header names this server. Another name may be a site that has its own
        name point here (DNS rebinding); a bare number cannot be, nor localhost."""
        if self.ip.is_unspecified:
            with suppress(ValueError):
                return bool(ipaddress.ip_address(urlsplit(f"//{host}").hostname or ""))
        names = self.host, f"localhost:{self.port}"
        return host.lower() in (*names, *(name.removesuffix(":80") for name in names))


def kept_token(path: str) -> str:
    """Return the secret of the address: a new one, or what a killed dashboard left in this file.

    So its open pages go on when it is started again, and Prometheus finds it (credentials_file).
    """
    with suppress(OSError, ValueError), open(path, opener=database.safe_open) as file:
        if re.fullmatch(r"[\w-]{43}", token := file.read(100)):
            return token
    token = secrets.token_urlsafe(32)
    with suppress(FileNotFoundError):
        os.unlink(path)
    with open(path, "x", opener=database.safe_open) as file:
        file.write(token)
    return token


def same(given: str, wanted: str) -> bool:
    """Compare secrets in a time that does not tell how much of them is right."""
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())


class Handler(BaseHTTPRequestHandler):
    """One connection, one thread, one request: HTTP/1.0 has no more."""

    server: Server
    server_version, sys_version = "queuectl", ""
    nonce = cached_property(lambda self: secrets.token_urlsafe(16))

    def log_message(self, *_: object) -> None:
        """Say nothing: only the face prints."""

    def do_GET(self) -> None:
        workers = self.server.hands.live_workers
        looks = {
            "/api/status": lambda db: database.summary(db, time.time(), len(workers(db))),
            "/api/workers": lambda db: [database.worker_object(row) for row in workers(db)],
            "/api/jobs": self.jobs,
            "/api/job": self.job,
        }
        routes = {path: lambda look=look: self.found(look) for path, look in looks.items()}
        self.answer(routes | {"/": self.page, "/events": self.events, "/metrics": self.metrics})

    def do_POST(self) -> None:
        self.answer({"/api/retry": self.retry, "/api/cancel": self.cancel}, changes=True)

    do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = lambda self: self.answer({})

    def answer(self, routes: dict[str, Callable[[], None]], changes: bool = False) -> None:
        try:
            path, _, query = self.path.partition("?")
            self.query = dict(parse_qsl(query, errors="replace"))
            if not self.is_let_in(path, changes):
                self.send(403, REFUSAL)
            elif path not in routes:
                code = 404 if routes else 405
                self.send(code, f"{self.responses[code][0]}\n".encode())
            else:
                self.body = self.read_body() if changes else {}
                with self.server.lock:
                    if self.connection not in self.server.connections:
                        return  # turned out: what it has asked for meanwhile is not done
                    self.server.connections[self.connection] = math.inf
                routes[path]()
        except (database.SQLiteError, ArithmeticError, LookupError, TypeError) as error:
            self.send_json({"error": database.error_text(error, self.server.path)}, 503)
        except QueueError as error:
            code = 404 if isinstance(error, database.NoJob) else 409
            self.send_json({"error": str(error)}, code)
        except (ValueError, RecursionError) as error:
            self.send_json({"error": str(error)}, 400)

    def is_let_in(self, path: str, changes: bool) -> bool:
        """Say whether this request has the token, and for a change more than a cookie."""
        server, headers = self.server, self.headers
        if not server.is_ours(headers.get("Host", "")):
            return False
        if same(headers.get("Authorization", ""), f"Bearer {server.token}"):
            return True  # no other site can make a browser send this
        known = any(same(each, server.cookie) for each in headers.get("Cookie", "").split("; "))
        if changes:
            return known and same(headers.get("X-Key", ""), server.key)
        given = self.query.get("token", "") if path == "/" else ""
        return known or same(given, server.token) or server.takes(given)

    def read_body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= BODY_BYTES:
            raise ValueError("the body is too long")
        found = json.loads(self.rfile.read(length))
        if not isinstance(found, dict):
            raise ValueError("the body is to be a JSON object")
        return found

    def page(self) -> None:
        with open(PAGE, encoding="utf-8") as file:
            text = file.read().replace("{{nonce}}", self.nonce).replace("{{key}}", self.server.key)
        cookie = f"{self.server.cookie}; Path=/; HttpOnly; SameSite=Strict"
        self.send(200, text.encode(), "text/html; charset=utf-8", cookie)

    def events(self) -> None:
        self.send(200, b"", "text/event-stream")
        for text in self.server.watcher.events():
            self.wfile.write(text)

    def metrics(self) -> None:
        with opened(self.server.path) as db:
            text = self.server.meter.text(db, self.server.hands.live_workers(db), time.time())
        self.send(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def found(self, look: Callable[[Any], Any]) -> None:
        """Answer with what `look` finds or, but for slow searches, has found since `as_of`."""

        def make() -> bytes:
            with opened(self.server.path) as db:
                return as_json(look(db))

        as_of = 0 if "text" in self.query else int(self.query.get("as_of", 0))
        watcher = self.server.watcher
        answer = watcher.shared(self.path, make) if 0 < as_of <= watcher.version else make()
        self.send(200, answer, "application/json")

    def jobs(self, db: Any) -> dict[str, Any]:
        """Return a page of job objects; `brief`: without output, long texts cut."""
        state, text, brief = (self.query.get(key, "") for key in ("state", "text", "brief"))
        if state not in ("", *database.STATES):
            raise ValueError(f'no state "{state}"; there are {", ".join(database.STATES)}')
        rest = max(0, min(int(self.query.get("before", database.TOP)), database.TOP))
        limit = max(1, min(int(self.query.get("limit", PAGE_JOBS)), 4 * PAGE_JOBS))
        found, until = [], time.monotonic() + SEARCH_S
        while True:
            rows, rest = database.jobs_page(db, state, text, rest, limit - len(found), bool(brief))
            found += [as_object(row) for row in rows]
            if rest is None or len(found) == limit or time.monotonic() > until:
                return {"jobs": found, "next": rest}

    def job(self, db: Any) -> dict[str, Any]:
        """Return a job object with its runs and its sentence; of an open run the output so far.
        `brief`: the last PAGE_RUNS runs, and output of the last alone."""
        seq = database.find(db, self.query.get("id", ""))
        found = self.server.hands.runs_so_far(db, self.server.path, seq, OUTPUT_BYTES)
        if self.query.get("brief"):
            nothing = dict(stdout=b"", stderr=b"", stdout_bytes=0, stderr_bytes=0)
            found = [run | nothing for run in found[-PAGE_RUNS:-1]] + found[-1:]
        runs, row = [as_object(run) for run in found], database.job(db, seq)
        latest = {name: run[name] for run in runs[-1:] for name in ("stdout", "stderr")}
        told = {"sentence": database.sentence(row, time.time())}
        return as_object(row) | latest | told | {"runs": runs}

    def retry(self) -> None:
        """{"id": ID} or {"all": true}: start dead jobs over."""
        with opened(self.server.path) as db:
            seqs = None if self.body.get("all") is True else [self.named(db)]
            count = database.retry_dead(db, seqs, time.time())
        database.ring(self.server.path, count)
        self.send_json({"retried": count})

    def cancel(self) -> None:
        """{"id": ID}: a waiting job at once; a running one is being ended when this returns."""
        with opened(self.server.path) as db:
            seq = self.named(db)
            state = database.cancel(db, seq, time.time())
        if state == "processing":
            name = f"cancel {seq}"  # one thread for each job, however often it is asked for
            thread = threading.Thread(None, self.end_cancelled, name, args=(seq,), daemon=True)
            with self.server.lock:
                if name not in [each.name for each in threading.enumerate()]:
                    thread.start()
        self.send_json({"state": state})

    def end_cancelled(self, seq: int) -> None:
        """Its supervisor ends it; if that is gone, this does."""
        with suppress(QueueError, OSError, database.SQLiteError):
            self.server.await_cancelled([seq])

    def named(self, db: Any) -> int:
        """Return the seq of the job that the body names, by its whole id."""
        id = self.body.get("id")
        seq = database.find(db, id if isinstance(id, str) else "")
        if database.job(db, seq)["id"] != id:
            raise database.NoJob(f'no job "{id}"')
        return seq

    def send_json(self, value: Any, code: int = 200) -> None:
        self.send(code, as_json(value), "application/json")

    def send(self, code: int, body: bytes, kind: str = "text/plain", cookie: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if cookie:
            self.send_header("Set-Cookie", cookie)
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        """Add HEADERS to every answer, the errors of http.server too."""
        for name, value in HEADERS.items():
            self.send_header(name, value.replace("{0}", self.nonce))
        self.connection.settimeout(SEND_S)  # for each piece: a slow reader is dropped
        super().end_headers()
