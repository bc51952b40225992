#!/usr/bin/env python3
"""The face: the command line. Each command parses, calls a room below once or twice, and prints.

Owns words, tables, colours and exit codes (0 done, 1 could not be done, 2 the call is wrong).
Must not hold SQL or process handling. What only some commands need is imported inside them, so
that `enqueue` starts fast.
"""

from __future__ import annotations

import gc
import sys

if sys.version_info < (3, 10):  # noqa: UP036  # a stock macOS has 3.9
    raise SystemExit("Error: Python 3.10 or newer is needed, this is " + sys.version.split()[0])

if __name__ == "__main__":  # Ctrl+C while all this is being loaded ends it, without a traceback
    sys.excepthook = lambda *e: e[0] is KeyboardInterrupt or sys.__excepthook__(*e)
    gc.disable()  # nothing of it is garbage: to look for some took 5 % of a short command

import codecs
import errno
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext, suppress
from functools import cached_property, lru_cache
from typing import Any

try:
    import click
except ImportError:
    raise SystemExit("Error: click is missing: activate the .venv, or pip install click") from None

import config
import database
from config import BadInput, check_setting
from database import duration_text, plural

LIVE_BYTES = 2**20  # of a running job's output, read at one look
COLOURS = {"completed": "green", "failed": "yellow", "dead": "red", "lost": "red", "trouble": "red"}
DUMB = os.environ.get("TERM") == "dumb"  # a terminal that has no cursor to move
PLAIN = DUMB or bool(os.environ.get("NO_COLOR"))  # no colours: https://no-color.org
LAYOUT = "\n\t"  # what may stay of UNSAFE in the output of a job
# What a terminal would obey instead of showing: controls, and characters that turn text round.
UNSAFE = "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\u061c\ud800-\udfff]"


class Place:
    """Where this call works: the queue, open from its first use to the command's end; settings."""

    path = config_path = ""

    @cached_property
    def opened(self) -> tuple[Any, os.stat_result]:
        db = click.get_current_context().with_resource(closing(database.connect(self.path)))
        return db, os.stat(self.path)

    @property
    def db(self) -> Any:
        """Raises QueueError once the file is gone or another: what one adds there nobody would run,
        and what one waits for would never come."""
        db, file = self.opened
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), file):
                return db
        raise database.QueueError(f"{self.path} is gone or was replaced")

    @property
    def settings(self) -> dict[str, Any]:
        return config.load(self.config_path)

    @property
    def hands(self) -> Any:
        """worker.py, loaded only by the commands that need it: `enqueue` must start fast."""
        import worker

        return worker


def main() -> int:
    """Run one command line, return its exit code; every error that is not our own mistake becomes
    one line here."""
    place = Place()
    try:
        code = cli.main(obj=place, prog_name="queuectl.py", standalone_mode=False) or 0
        sys.stdout.flush()
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
        if message.startswith("Usage:"):  # click's help, shown for a command without its words
            click.echo(message, err=True)
        else:
            hint = isinstance(error, click.UsageError) and not isinstance(error, click.BadParameter)
            if hint and error.ctx:  # it has none where an option lacks its value
                message = f"{message.rstrip('.')} (see {error.ctx.command_path} --help)"
            complain(message, code)
    except (BadInput, config.BadFile) as error:
        code = complain(str(error), 2 if isinstance(error, BadInput) else 1)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except OSError as error:  # nobody reads on (`list | head`), or there is no room for the result
        told = f"{error.filename or 'standard output'}: {error.strerror}"
        if error.errno == errno.ENOENT and not error.filename:
            told = "the current directory is gone; change to another"
        code = 1 if error.errno == errno.EPIPE else complain(told, 1)
    except Exception as error:
        code = complain(database.error_text(error, place.path), 1)  # raises what is ours
    return code


def complain(message: str, code: int) -> int:
    click.echo(f"Error: {clean(message)}", err=True)
    return code


# --- printing --------------------------------------------------------------------------------


def clean(text: str, keep: str = "") -> str:
    """Return text in which nothing can steer the terminal: such characters are shown instead."""
    return re.sub(UNSAFE, lambda m: m[0] if m[0] in keep else repr(m[0])[1:-1], text)


def emit(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def emit_jobs(rows: Iterable[Any]) -> None:
    """Print job objects as one JSON array, one by one: a million need no memory."""
    separator = "[\n"
    for row in rows:
        click.echo(separator + json.dumps(database.as_object(row)), nl=False)
        separator = ",\n"
    click.echo("\n]" if separator != "[\n" else "[]")


def table(head: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print columns; on a terminal cut to its width: the first, an id, is whole, the others have
    a third of it at most, the last what is left."""
    texts = [[clean(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *texts)]
    if sys.stdout.isatty():
        import shutil

        columns = shutil.get_terminal_size().columns
        widths[1:-1] = [min(width, max(3, columns // 3)) for width in widths[1:-1]]
        widths[-1] = max(20, columns - sum(widths[:-1]) - 2 * len(widths[:-1]))
    for row in [head, *texts]:
        cut = [c if len(c) <= width else c[: width - 3] + "..." for c, width in zip(row, widths)]
        cells = [cell.ljust(width) for cell, width in zip(cut, widths[:-1])]
        click.echo("  ".join([*cells, cut[-1]]).rstrip())


def print_event(who: str, pid: int, verb: str, text: str, to: Any = None) -> None:
    """Print one line of `worker start`. Workers call it too: one write, so lines stay whole."""
    to, text = to or sys.stdout, clean(text if len(text) < 1000 else text[:1000] + "...")
    word = click.style(f"{verb:<9}", COLOURS[verb]) if verb in COLOURS and to.isatty() else verb
    now = time.strftime("%Y-%m-%d %H:%M:%S" if to.seekable() else "%H:%M:%S")  # a file lies long
    put(to, f"{now}  {who:<10}  pid {pid:<7}  {word:<9}  {text}".rstrip())


def put(to: Any, text: str) -> None:
    """Write lines, but never let a reader hold up the work: the work matters more."""
    import select

    text = click.unstyle(text) if PLAIN else text
    with suppress(OSError, ValueError):  # the terminal or the reader is gone
        handle, rest = way_to(to.fileno()), f"{text}\n".encode(to.encoding, "replace")
        while rest:
            # One that does not read on (Ctrl+S, a pager) holds us up once for a second, not more.
            if not select.select([], [handle], [], 0 if to in STUCK else 1)[1]:
                STUCK.add(to)
                return
            STUCK.discard(to)
            rest = rest[os.write(handle, rest[: select.PIPE_BUF]) :]  # a ready pipe takes so many


STUCK: set[Any] = set()


@lru_cache
def way_to(handle: int) -> int:
    """Return a handle on which to write does not wait if it is ready.

    A terminal is ready as soon as it can take one byte. So it is opened anew, to write without
    waiting: the handle that we were given is others' too, and has to stay as it is.
    """
    with suppress(OSError):  # no terminal, or none of ours
        return os.open(os.ttyname(handle), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return handle


def print_remark(*event: Any) -> None:
    print_event(*event, to=sys.stderr)


def show_statements(statements: list[tuple[str, str, str]]) -> None:
    """Print what --explain shows (database.Explained makes it): each statement on a line; on a
    terminal wrapped beside its head."""
    import shutil
    import textwrap

    lines = []
    for head, text, remark in statements:
        text, remark = head + clean(text), remark and f"  <- {remark}"
        if sys.stderr.isatty():
            columns = max(len(head) + 10, shutil.get_terminal_size().columns)
            beside = " " * min(len(head), columns // 3)
            text = textwrap.fill(text, columns, subsequent_indent=beside, break_on_hyphens=False)
            verb = text[len(head) :].partition(" ")[0]
            text = head + click.style(verb, bold=True) + text[len(head + verb) :]
            remark = remark and f"\n{beside}{click.style(remark, fg='yellow')}"
        lines.append(text + remark)
    put(sys.stderr, "\n".join(lines))


def warn_unserved(place: Place, start: str = "") -> bool:
    """Remark, if so, that nobody works on the queue; say whether it is so."""
    served = place.hands.is_served(place.db)
    if not served:
        click.echo(f"{start}no worker is running; `worker start` starts one", err=True)
    return not served


def duration(text: str) -> float:
    """Return the seconds of `90`, `90s`, `1.5h`, `500ms`, `7d`; click adds which option it is."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|[smhdw])?", text.strip())
    if match:
        unit = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, None: 1}
        seconds = float(match[1]) * unit[match[2]]
        if seconds <= 100 * config.YEAR_S:
            return seconds
    raise click.BadParameter(f'"{text}" is no duration; write it like 30s, 5m, 2h or 7d')


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
explain_option = click.option("--explain", is_flag=True, help="Show each SQL statement on stderr.")
limit_help = "At most so many; 0: all. Default 100, with --json all."
limit_option = click.option("--limit", type=click.IntRange(0, 2**53), metavar="N", help=limit_help)


# --- the commands ----------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--db", envvar="QUEUECTL_DB", default=database.DEFAULT_PATH, help="The queue file.")
@click.option("--config", envvar="QUEUECTL_CONFIG", default=config.DEFAULT_PATH, help="Settings.")
@explain_option
@click.pass_obj
def cli(place: Place, db: str, config: str, explain: bool) -> None:
    """A background job queue: shell commands in one SQLite file, run by worker processes."""
    # Not os.path.abspath: it shortens link/.. by its letters, and that may name another file.
    place.path = db if os.path.isabs(db) else os.path.join(os.getcwd(), db)
    place.config_path = config if os.path.isabs(config) else os.path.join(os.getcwd(), config)
    database.show = show_statements if explain else None


@cli.command()
@click.pass_obj
def init(place: Place) -> None:
    """Make the queue. Not needed: every command that needs it does, too."""
    place.db.close()
    click.echo(clean(f"queue ready: {place.path}"))


@cli.command()
@click.argument("job", required=False)
@click.option("--command", help="The shell command, instead of JOB.")
@click.option("--id", help="A name of your own for the job.")
@click.option("--priority", type=int, metavar="N", help="Higher runs first. Default 0.")
@click.option("--run-at", metavar="TIME", help="Not before: 2030-01-31T12:00 (UTC or with +01:00).")
@click.option("--delay", type=duration, metavar="5m", help="Not before so long from now.")
@click.option("--timeout", type=duration, metavar="30s", help="End a run after so long.")
@click.option("--max-retries", type=int, metavar="N", help="How often it is run again.")
@click.option("--cwd", metavar="DIR", help="Where it runs. Default: here.")
@click.option("--file", metavar="PATH", help="Many: a JSON array or an object a line; - is stdin.")
@click.option("--lines", is_flag=True, help="With --file: each line is a command.")
@json_option
@click.pass_obj
def enqueue(place: Place, job: str, file: str, lines: bool, as_json: bool, **options: Any) -> None:
    """Add a job and print its id.

    \b
    queuectl.py enqueue '{"command": "echo hello", "max_retries": 5}'
    queuectl.py enqueue --command "make test" --timeout 10m
    ls *.wav | sed 's/.*/lame "&"/' | queuectl.py enqueue --file - --lines
    """
    given = {name: value for name, value in options.items() if value is not None}
    if (job is not None) + ("command" in given) + (file is not None) != 1:
        raise BadInput("give one of: a JOB, --command, --file")
    if given and "command" not in given:
        raise BadInput(f"--{next(iter(given)).replace('_', '-')} goes with --command")
    if lines and file is None:
        raise BadInput("--lines goes with --file")
    if "delay" in given and "run_at" in given:
        raise BadInput("--delay and --run-at say the same thing; give one of them")
    if "delay" in given:
        given["run_at"] = time.time() + given.pop("delay")
    if file is not None:
        # Closed before an error is printed, for on a terminal it draws a bar.
        read = click.get_current_context().with_resource(closing(file_lines(file)))
        entries = config.parse_entries(read, commands=lines)
    elif job is not None:
        entries = [(0, parsed_job("".join(file_lines("-")) if job == "-" else job))]
    else:
        entries = [(0, given)]
    ignored: set[str] = set()
    cwd = config.check_text("cwd", os.getcwd())
    jobs = config.check_jobs(entries, place.settings, cwd, ignored)
    database.gather(place.db, jobs)
    first, last = database.enqueue(place.db, time.time())  # now, when all has come in
    database.ring(place.path, last - first + 1)
    if ignored:
        click.echo(f"ignored, set by the queue: {', '.join(sorted(ignored))}", err=True)
    if as_json and file is not None:
        emit_jobs(database.jobs(place.db, range(first, last + 1)))
    elif as_json:
        emit(database.as_object(database.job(place.db, first)))
    elif file is not None:
        click.echo(f"enqueued {plural(last - first + 1, 'job')}")
    else:
        click.echo(clean(database.job(place.db, first)["id"]))


def parsed_job(text: str) -> Any:
    try:
        return config.parse_json(text)
    except BadInput as error:
        raise BadInput(f"{error}; for a shell command write --command TEXT") from None


def file_lines(path: str) -> Iterator[str]:
    """Yield the decoded lines of a file ("-": stdin), with a progress bar on a terminal."""
    line = 0
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            size = os.fstat(file.fileno()).st_size
            shown = size and sys.stderr.isatty() and not DUMB
            steps = {"length": size, "file": sys.stderr, "update_min_steps": size // 200}
            with click.progressbar(**steps) if shown else nullcontext() as bar:
                for line, raw in enumerate(file, 1):
                    yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
                    if bar:
                        bar.update(len(raw))
    except UnicodeDecodeError as error:
        raise BadInput(f"line {line}: not UTF-8: {error.reason}") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None


@cli.group()
def worker() -> None:
    """Start, stop and list the workers."""


@worker.command()
@click.option("--count", default=1, type=click.IntRange(1, 1000), metavar="N", help="Default 1.")
@click.option("--detach", is_flag=True, help="In the background; returns once they are ready.")
@click.option("--drain", is_flag=True, help="Leave when every job has settled, later ones too.")
@click.option("--launcher", metavar="LINE", help="Shell line that runs {command} elsewhere.")
@click.option("--launcher-stop", metavar="LINE", help="Shell line that ends what is left there.")
@explain_option  # here too, for this is where one wants to see it
@click.pass_obj
def start(place: Place, count: int, detach: bool, drain: bool, explain: bool, **lines: Any) -> None:
    """Run jobs. Ctrl+C finishes the running ones and leaves; twice, it puts them back.

    \b
    queuectl.py worker start --count 4 --drain
    queuectl.py worker start --count 32 --launcher 'nice -n 19 sh -c {command}'
    """
    database.show = show_statements if explain else database.show
    given = {name: check_setting(name, line) for name, line in lines.items() if line is not None}
    settings = place.settings | given
    if exposed := database.exposed(place.path, place.config_path):
        raise database.QueueError(exposed)
    place.db.close()  # made if need be; the workers open their own
    if not detach:
        place.hands.Supervisor(place.path, settings, print_event, count, drain).run()
        return
    words = [word for word in sys.argv[1:] if word != "--detach"]
    pid, log = place.hands.detach(words, place.path, count)
    there = f"in the background, supervisor pid {pid}, log {clean(log)}"
    click.echo(f"{plural(count, 'worker')} {there}")


@worker.command()
@click.option("--now", is_flag=True, help="Stop the running jobs and put them back.")
@click.option("--timeout", type=duration, metavar="30s", help="Wait no longer than this.")
@click.pass_obj
def stop(place: Place, now: bool, timeout: float | None) -> None:
    """Let every worker finish its job and leave; wait until they have."""
    left = place.hands.stop(place.path, place.settings, print_remark, now, timeout)
    click.echo(f"{plural(left, 'worker')} stopped")


@worker.command("list")
@json_option
@click.pass_obj
def list_workers(place: Place, as_json: bool) -> None:
    """Show every live worker and what it runs."""
    now, rows = time.time(), place.hands.live_workers(place.db)
    if as_json:
        emit([database.worker_object(row) for row in rows])
        return
    lines = []
    for row in rows:
        since = duration_text(now - row["since"]) if row["since"] else "-"
        beat = duration_text(now - row["heartbeat_at"]) + " ago"
        runs = f"{row['job']}: {row['command']}" if row["job"] else "idle"
        lines.append([row["worker"], row["pid"], since, beat, row["jobs_done"], runs])
    table(["WORKER", "PID", "SINCE", "HEARTBEAT", "DONE", "JOB"], lines)


@cli.command()
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl+C.")
@json_option
@click.pass_obj
def status(place: Place, watch: bool, as_json: bool) -> None:
    """Show the counts by state, the workers and the last hour."""
    if watch and as_json:
        raise BadInput("--json prints one document; leave --watch away and call it again")
    while True:
        found = database.summary(place.db, time.time(), len(place.hands.live_workers(place.db)))
        if watch and sys.stdout.isatty() and not DUMB:
            click.clear()
        if as_json:
            emit(found)
        else:
            print_status(found)
        if not watch:
            return
        time.sleep(1)


def print_status(found: dict[str, Any]) -> None:
    for name in (*database.STATES, "total"):
        click.echo(f"{name.capitalize() + ':':<12}{found[name]:>8}")
    click.echo(f"\n{plural(found['workers'], 'active worker')}")
    if found["success_rate"] is None:
        click.echo("last hour: no run has ended")
        return
    wait, run = (duration_text(found[f"median_{name}_s"]) for name in ("wait", "run"))
    rate = f"{found['jobs_per_minute']:g} jobs a minute, {found['success_rate']:.1%} of runs"
    click.echo(f"last hour: {rate} succeeded, median wait {wait}, median run {run}")


@cli.command("list")
@click.option("--state", "states", multiple=True, type=click.Choice(database.STATES))
@click.option("--ready", "--pending-ready-only", is_flag=True, help="What could be taken now.")
@limit_option
@json_option
@click.pass_obj
def list_jobs(place: Place, states: tuple, ready: bool, limit: int | None, as_json: bool) -> None:
    """Show the newest jobs, the newest last. With --ready: those that come next.

    \b
    queuectl.py list --state failed --state dead
    """
    if ready and states:
        raise BadInput("--ready is a choice of its own; leave --state out")
    now, default = time.time(), limit is None and not as_json
    most = 100 if default else limit or -1  # -1: all
    wanted = most + default  # one more, to know whether there is a rest
    if ready:
        rows = database.ready_jobs(place.db, now, wanted)
    else:
        rows = database.jobs_in(place.db, states, wanted)
    if as_json:
        emit_jobs(rows)
        return
    rows = list(rows)
    if len(rows) > most > 0:
        rows = rows[:most] if ready else rows[-most:]
        click.echo(f"only {most} are shown; --limit 0 shows all", err=True)
    dead = states == ("dead",)
    lines = []
    for row in rows:
        due = row["last_error"] if dead else due_text(row, now)
        lines.append([row["id"], row["state"], row["attempts"], due, row["command"]])
    table(["ID", "STATE", "ATTEMPTS", "ERROR" if dead else "DUE", "COMMAND"], lines)


def due_text(row: Any, now: float) -> str:
    if row["state"] not in ("pending", "failed"):
        return "-"
    return f"in {duration_text(row['run_at'] - now)}" if row["run_at"] > now else "now"


@cli.command()
@click.argument("id")
@json_option
@click.pass_obj
def show(place: Place, id: str, as_json: bool) -> None:
    """Show one job. Why it is in its state, its fields, its history, its output."""
    seq = database.find(place.db, id)
    row, runs = database.job(place.db, seq), database.runs(place.db, seq)
    found = database.as_object(row) | {"runs": [database.as_object(run) for run in runs]}
    if as_json:
        emit(found)
        return
    click.echo(clean(f"{row['id']}: {database.sentence(row, time.time())}"))
    if row["state"] == "processing":
        warn_unserved(place)
    for name, value in found.items():
        if name not in ("id", "stdout", "stderr", "runs"):
            click.echo(f"  {name:<12}  {'-' if value is None else clean(str(value))}")
    for run in found["runs"]:
        span = f"{run['started_at']} to {run['finished_at'] or 'now'} on {run['worker']}"
        how = run["error"] or run["outcome"] or "running"
        click.echo(clean(f"  run {run['attempt']}: {span}: {how}"))
        if run["line"]:
            click.echo(clean(f"         {run['line']}"))
    for name in ("stdout", "stderr"):
        if found[name]:
            click.echo(f"--- {name} ---\n{clean(found[name], keep=LAYOUT).rstrip()}")


@cli.command()
@click.argument("id")
@click.option("--attempt", type=click.IntRange(1), metavar="N", help="The last run of this number.")
@click.option("--stdout", is_flag=True, help="Only the standard output.")
@click.option("--stderr", is_flag=True, help="Only the standard error.")
@click.option("--follow", is_flag=True, help="Go on until the run has ended.")
@json_option
@click.pass_obj
def logs(
    place: Place, id: str, attempt: int | None, follow: bool, as_json: bool, **streams: bool
) -> None:
    """Show what a job's latest run has printed. While it runs: so far."""
    seq = database.find(place.db, id)
    names = [name for name in ("stdout", "stderr") if streams[name] or not any(streams.values())]
    tails = {name: Tail(name, len(names) < 2, follow) for name in names if not as_json}
    known = None  # the number of the run that is shown: to its end, though another may begin
    told = not follow
    while True:
        runs = place.hands.runs_so_far(place.db, place.path, seq, LIVE_BYTES)
        runs = [run for run in runs if attempt in (None, run["attempt"])]
        runs = [run for run in runs if known in (None, run["id"])]
        if runs:
            run, known = runs[-1], runs[-1]["id"]
            last = bool(run["finished_at"] or not follow)
            for name, tail in tails.items():
                tail.put(run[name] or b"", run[f"{name}_bytes"] or 0, last)
            if last:
                break
        else:
            job = database.job(place.db, seq)
            ended = job["state"] in database.SETTLED
            if ended or not follow:
                what = "not run" if attempt is None else f"no run {attempt}"
                hope = "" if ended else " yet; --follow waits for it"
                raise database.QueueError(f'job "{job["id"]}" has {what}{hope}')
        told = told or warn_unserved(place)
        time.sleep(0.1)
    if as_json:
        emit(database.as_object(run) | {"id": database.job(place.db, seq)["id"]})


class Tail:
    """Prints what one stream of a run has gained since the last time."""

    def __init__(self, stream: str, only: bool, follow: bool):
        self.head = "" if only or follow else f"--- {stream} ---"
        self.follow, self.sent = follow, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, kept: bytes, written: int, last: bool) -> None:
        """Print what is new of a stream of `written` bytes, the last of which are `kept`."""
        if kept and written < self.sent:
            self.sent = 0  # the job has emptied it: `> /dev/stdout`
        skipped = written - len(kept) - self.sent
        data = kept[max(0, -skipped) :]
        if data and self.head:
            click.echo(self.head)
        if skipped > 0:
            click.echo(f"[... {skipped} bytes cut ...]")
        self.sent = max(self.sent, written)
        text = clean(self.decoder.decode(data, last), keep=LAYOUT)
        click.echo(text, nl=not self.follow and text[-1:] not in ("", "\n"))


@cli.command()
@click.argument("ids", nargs=-1)
@click.option("--timeout", type=duration, metavar="5m", help="Wait no longer than this.")
@click.pass_obj
def wait(place: Place, ids: tuple[str, ...], timeout: float | None) -> None:
    """Wait until jobs (none named: all) have settled. Exit 0 only if all completed."""
    seqs = [*dict.fromkeys([database.find(place.db, id) for id in ids])]
    deadline, told = time.monotonic() + (math.inf if timeout is None else timeout), False
    start = "\r\x1b[K" if sys.stderr.isatty() and not DUMB else ""  # for another line
    click.get_current_context().call_on_close(lambda: click.echo(start, nl=False, err=True))
    while True:
        began = time.monotonic()
        found = database.counts(place.db, seqs)
        pause = max(0.1, min(1, 10 * (time.monotonic() - began)))  # to count a big queue takes long
        total = found["total"]
        left = total - sum(found[state] for state in database.SETTLED)
        if start:
            running = found["processing"]
            line = f"{total - left} of {total} settled, {running} running, {left - running} waiting"
            click.echo(start + line, nl=not left, err=True)
        if not left:
            break
        told = told or warn_unserved(place, start)
        if (rest := deadline - time.monotonic()) <= 0:
            after = duration_text(timeout)
            raise database.QueueError(f"after {after} {left} of {plural(total, 'job')} not settled")
        time.sleep(min(pause, rest))
    if found["completed"] != total:
        told = f"{found['dead']} dead, {found['cancelled']} cancelled"
        raise database.QueueError(f"{told}; `list --state dead --state cancelled` shows them")


@cli.command()
@click.argument("ids", nargs=-1, required=True)
@click.pass_obj
def cancel(place: Place, ids: tuple[str, ...]) -> int:
    """Cancel jobs. A waiting one at once, a running one with its whole process tree."""
    running, failed, settings = [], False, place.settings
    for seq in dict.fromkeys([database.find(place.db, id) for id in ids]):
        try:
            if database.cancel(place.db, seq, time.time()) == "processing":
                running.append(seq)
            else:
                click.echo(clean(f"{database.job(place.db, seq)['id']} cancelled"))
        except database.QueueError as error:
            failed = complain(str(error), 1)
    if running:
        place.hands.await_cancelled(place.path, settings, print_remark, running)
    for row in [database.job(place.db, seq) for seq in running]:
        click.echo(clean(f"{row['id']} {row['state']}"))
        failed |= row["state"] != "cancelled"  # it ended first
    return int(failed)


@cli.group()
def dlq() -> None:
    """The dead letter queue: jobs that have used all their runs."""


@dlq.command("list")
@limit_option
@json_option
@click.pass_context
def dlq_list(context: click.Context, **options: Any) -> None:
    """Show the dead jobs."""
    context.invoke(list_jobs, states=("dead",), **options)


@dlq.command("retry")
@click.argument("ids", nargs=-1)
@click.option("--all", "all_dead", is_flag=True, help="Every dead job.")
@click.pass_obj
def dlq_retry(place: Place, ids: tuple[str, ...], all_dead: bool) -> None:
    """Start dead jobs over. Pending, due now, no attempts used, history kept."""
    if bool(ids) == all_dead:
        raise BadInput("give the IDs of dead jobs, or --all")
    seqs = None if all_dead else list(dict.fromkeys(database.find(place.db, id) for id in ids))
    count = database.retry_dead(place.db, seqs, time.time())
    database.ring(place.path, count)
    click.echo(f"{plural(count, 'job')} pending again")


def setting_text(value: float | str, keep: str = "") -> str:
    return clean(value, keep) if isinstance(value, str) else f"{value:.10g}"


@cli.command("config", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="[get [KEY]|list|[set] KEY VALUE]")
@json_option
@click.pass_obj
def configure(place: Place, words: tuple[str, ...], as_json: bool) -> None:
    """Show or change the settings.

    \b
    queuectl.py config list
    queuectl.py config set max-retries 5
    """
    if words in ((), ("get",), ("list",)):
        found, lone = place.settings, False
    elif len(words) == 2 and words[0] == "get":
        name = config.setting_name(words[1])
        found, lone = {name: place.settings[name]}, True
    elif len(words) == 2 + (words[0] == "set") and words[0] != "list":
        found, lone = config.store(place.config_path, *words[-2:]), False
    else:
        raise BadInput("write: config get [KEY], config list, or config set KEY VALUE")
    if as_json:
        emit(found)
    elif lone:
        click.echo(setting_text(found[name], keep=LAYOUT))
    else:
        meanings = [config.SETTINGS[key].meaning for key in found]
        texts = [setting_text(value) for value in found.values()]
        texts = [text if len(text) < 40 else text[:37] + "..." for text in texts]
        table(["KEY", "VALUE", "MEANING"], zip(found, texts, meanings))


@cli.command()
@click.option("--older-than", type=duration, required=True, metavar="7d", help="Ended so long ago.")
@click.option("--state", "states", multiple=True, type=click.Choice(database.SETTLED))
@click.option("--dry-run", is_flag=True, help="Only say how many.")
@click.option("--vacuum", is_flag=True, help="Make the file small; who writes meanwhile waits.")
@click.pass_obj
def prune(place: Place, older_than: float, states: tuple, dry_run: bool, vacuum: bool) -> None:
    """Remove settled jobs and their history. Dead ones only if --state names them."""
    place.hands.take_turns(place.path)
    states, before = states or ("completed", "cancelled"), time.time() - older_than
    count = database.prune(place.db, states, before, dry_run)
    click.echo(f"{plural(count, 'job')} {'would be ' if dry_run else ''}removed")
    if vacuum and not dry_run and not database.vacuum(place.db):
        click.echo("the file shrinks later: somebody is reading it", err=True)


@cli.command()
@click.argument("names", nargs=-1, metavar="[SCENE]...")
@click.option("--list", "listed", is_flag=True, help="Only name the scenes.")
@click.option("--pause", is_flag=True, help="Wait for Enter between scenes.")
def demo(names: tuple[str, ...], listed: bool, pause: bool) -> None:
    """Show the queue at work. Scene by scene, on a throw-away queue of its own.

    \b
    queuectl.py demo --pause kill race
    """
    import runpy

    script = os.path.join(os.path.dirname(os.path.realpath(__file__)), "tests", "demo.py")
    if not os.path.exists(script):
        raise database.QueueError(f"{script} is missing: demo needs the whole checkout")
    sys.argv = [script, *["--list"] * listed, *["--pause"] * pause, "--", *names]
    runpy.run_path(script, run_name="__main__")


@cli.command()
@json_option
@click.pass_obj
def doctor(place: Place, as_json: bool) -> int:
    """Check the file and the queue's own invariants. Exit 1 if one is broken.

    Below each stands what would break it.
    """
    try:
        found = list(database.check(place.db))
    except (database.QueueError, database.SQLiteError) as error:
        cause = "a failing disk, a copy that was cut short, a newer queuectl, another program"
        problem = database.error_text(error, place.path).replace("`doctor` tells more; ", "")
        found = [("the file can be opened as a queue", problem, cause)]
    cause = "a chmod: who writes them has commands run as their owner (a launcher is one)"
    exposed = database.exposed(place.path, place.config_path)
    found.append(("only their owner can write the queue and the settings", exposed, cause))
    problem, cause = "", "a typing error in it: `enqueue` and `worker start` would refuse it"
    try:
        config.load(place.config_path)
    except config.BadFile as error:
        problem = str(error)
    found.append(("the settings file says what settings may be", problem, cause))
    ok = not any(problem for _, problem, _ in found)
    if as_json:
        keys = "check", "problem", "broken_by"
        emit({"ok": ok, "checks": [dict(zip(keys, (a, b or None, c))) for a, b, c in found]})
    else:
        for name, problem, cause in found:
            click.echo(clean(f"BROKEN  {name}: {problem}" if problem else f"ok      {name}"))
            told = f"        {'perhaps' if problem else 'would be'} broken by {cause}"
            click.echo(told if PLAIN else click.style(told, dim=True))
    return int(not ok)


@cli.command()
@click.option("--port", default=3000, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--host", default="127.0.0.1", help="Listen here. Default: this machine alone.")
@click.option("--open", "opening", is_flag=True, help="Open it in a browser.")
@click.pass_obj
def dashboard(place: Place, port: int, host: str, opening: bool) -> None:
    """Serve a live page of the queue until Ctrl+C.

    \b
    queuectl.py dashboard --port 0 --open
    """
    import select

    from dashboard import Server

    if not host:
        raise BadInput("--host is empty; for all addresses write 0.0.0.0")
    place.db.close()  # made if need be; the window opens its own
    server = Server(place.path, host, port, place.hands, place.settings, print_remark)
    wake, _ = place.hands.await_signals()
    server.start()
    with closing(server):
        click.echo(f"dashboard on {server.address}")
        click.echo("Ctrl+C ends it", err=True)
        if not server.ip.is_loopback:
            told = "whoever sees this address can read all jobs and let them run again"
            click.echo(f"Warning: {host} is reached from elsewhere: {told}", err=True)
        if opening:
            import webbrowser

            webbrowser.open(server.address.replace(server.token, server.ticket))
        select.select([wake], [], [])


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (>&-): what is opened next must not take its place
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no text is too foreign to be shown
    # All is written and closed; what the interpreter would tidy up takes longer than most commands.
    os._exit(main())
