#!/usr/bin/env python3
"""The face: the command line. Each command parses, calls a room below once or twice, and prints.

Owns words, tables, colours and exit codes (0 done, 1 could not be done, 2 the call is wrong).
Must not hold SQL or process handling. What only some commands need is imported inside them, so
that `enqueue` starts fast.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import click

import config
import database
from config import BadInput
from database import duration_text, plural

COLOURS = {"completed": "green", "failed": "yellow", "dead": "red", "lost": "red", "trouble": "red"}
# What a terminal would obey instead of showing: controls, and characters that turn text round.
LAYOUT = "\n\t"  # what may stay of it in the output of a job
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\u061c\ud800-\udfff]")


class Place:
    """Where this call works: the queue, opened when first needed, and the settings."""

    def __init__(self) -> None:
        self.path, self.config_path, self.opened = "", "", None

    @property
    def db(self) -> Any:
        if self.opened is None:
            self.opened = database.connect(self.path)
        return self.opened

    @property
    def settings(self) -> dict[str, Any]:
        return config.load(self.config_path)

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()
            self.opened = None


def main() -> None:
    """Run one command line; every error that is not our own mistake becomes one line here."""
    place = Place()
    try:
        code = cli.main(obj=place, prog_name="queuectl.py", standalone_mode=False) or 0
        sys.stdout.flush()
    except click.ClickException as error:
        code = complain(error.format_message(), error.exit_code)
    except BadInput as error:
        code = complain(str(error), 2)
    except (config.BadFile, database.QueueError) as error:
        code = complain(str(error), 1)
    except database.SQLiteError as error:
        code = complain(database.error_text(error, place.path), 1)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except OSError as error:  # nobody reads on (`list | head`), or there is no room for the result
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to flush must not fail again
        code = 1 if error.errno == errno.EPIPE else complain(f"standard output: {error}", 1)
    finally:
        place.close()
    sys.exit(code)


def complain(message: str, code: int) -> int:
    # A message of several lines is click's help, shown for a command without its words.
    click.echo(message if "\n" in message else f"Error: {clean(message)}", err=True)
    return code


# --- printing --------------------------------------------------------------------------------


def clean(text: str, keep: str = "") -> str:
    """Return text in which nothing can steer the terminal: such characters are shown instead."""

    return UNSAFE.sub(lambda m: m[0] if m[0] in keep else repr(m[0])[1:-1], text)


def emit(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def emit_jobs(rows: Iterable[Any]) -> None:
    """Print job objects as one JSON array, one by one: a million need no memory."""
    separator = "[\n"
    for row in rows:
        click.echo(separator + json.dumps(database.as_object(row)), nl=False)
        separator = ",\n"
    click.echo("\n]" if separator != "[\n" else "[]")


def table(head: list[str], rows: list[list[Any]]) -> None:
    """Print columns; on a terminal the last one is cut to the width."""
    texts = [[clean(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *texts)]
    room = 10_000
    if sys.stdout.isatty():
        import shutil

        room = max(20, shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * len(head) + 2)
    for row in [head, *texts]:
        last = row[-1] if len(row[-1]) <= room else row[-1][: room - 3] + "..."
        cells = [cell.ljust(width) for cell, width in zip(row, widths[:-1])]
        click.echo("  ".join([*cells, last]).rstrip())


def print_event(who: str, pid: int, verb: str, text: str, to: Any = None) -> None:
    """Print one line of `worker start`. Workers call it too: one write, so lines stay whole."""
    to, text = to or sys.stdout, clean(text if len(text) < 1000 else text[:1000] + "...")
    word = click.style(f"{verb:<9}", COLOURS[verb]) if verb in COLOURS and to.isatty() else verb
    line = f"{time.strftime('%H:%M:%S')}  {who:<10}  pid {pid:<7}  {word:<9}  {text}"
    import select

    try:
        # A reader that does not read on (Ctrl+S, a pager) holds us up once for a second, not more.
        if not select.select([], [to], [], 0 if to in STUCK else 1)[1]:
            STUCK.add(to)
            return
        STUCK.discard(to)
        to.write(line.rstrip() + "\n")
        to.flush()
    except (OSError, ValueError):
        pass  # the terminal or the reader is gone: the work matters more


STUCK: set[Any] = set()


def print_remark(*event: Any) -> None:
    print_event(*event, to=sys.stderr)


def seconds(_: Any, __: Any, text: str | None) -> float | None:
    return None if text is None else config.parse_duration(text)


def number(_: Any, __: Any, text: str | None) -> float | None:
    return None if text is None else config.parse_number(text)


def template(_: Any, option: Any, text: str | None) -> str | None:
    return None if text is None else config.check_setting(option.name, text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
limit_option = click.option(
    "--limit", type=click.IntRange(0), help="At most so many; 0: all. Default 100, with --json all."
)


# --- the commands ----------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--db", envvar="QUEUECTL_DB", default=database.DEFAULT_PATH, help="The queue file.")
@click.option(
    "--config",
    "settings",
    envvar="QUEUECTL_CONFIG",
    default=config.DEFAULT_PATH,
    help="The settings file.",
)
@click.pass_obj
def cli(place: Place, db: str, settings: str) -> None:
    """A background job queue: shell commands in one SQLite file, run by worker processes."""
    place.path, place.config_path = db, settings


@cli.command()
@click.pass_obj
def init(place: Place) -> None:
    """Make the queue. Not needed: every other command does, too."""
    place.db.close()
    click.echo(clean(f"queue ready: {place.path}"))


@cli.command()
@click.argument("job", required=False)
@click.option("--command", help="The shell command, instead of JOB.")
@click.option("--id", help="A name of your own for the job.")
@click.option("--priority", callback=number, help="Higher runs first. Default 0.")
@click.option("--run-at", metavar="TIME", help="Not before: 2030-01-31T12:00:00Z or Unix seconds.")
@click.option("--delay", callback=seconds, metavar="5m", help="Not before so long from now.")
@click.option("--timeout", callback=seconds, metavar="30s", help="End a run after so long.")
@click.option("--max-retries", callback=number, help="How often a failed job is run again.")
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
    settings, cwd, ignored = place.settings, current_directory(), set()

    def checked(entries: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for line, entry in entries:
            try:
                row, unused = config.check_job(entry, settings, cwd)
            except BadInput as error:
                raise BadInput(f"line {line}: {error}" if line else str(error)) from None
            ignored.update(unused)
            yield line, row

    if file is not None:
        entries = file_entries(file, lines)
    elif job is not None:
        text = "".join(file_lines("-")) if job == "-" else job
        try:
            entries = [(0, config.parse_json(text))]
        except BadInput as error:
            raise BadInput(f"{error}; for a shell command write --command TEXT") from None
    else:
        entries = [(0, job_of_options(given))]
    database.gather(place.db, checked(entries))
    first, last = database.take_in(place.db, time.time())  # now, when all has come in
    ring(place, last - first + 1)
    if ignored:
        click.echo(f"ignored, set by the queue: {', '.join(sorted(ignored))}", err=True)
    if as_json and file is not None:
        emit_jobs(database.jobs_between(place.db, first, last))
    elif as_json:
        emit(database.as_object(database.job(place.db, first)))
    elif file is not None:
        click.echo(f"enqueued {plural(last - first + 1, 'job')}")
    else:
        click.echo(clean(database.job(place.db, first)["id"]))


def current_directory() -> str:
    try:
        return config.check_text("cwd", os.getcwd())
    except FileNotFoundError:
        raise database.QueueError("the current directory is gone; change to another") from None


def job_of_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object that the options stand for."""
    if "delay" in given and "run_at" in given:
        raise BadInput("--delay and --run-at say the same thing; give one of them")
    if "delay" in given:
        given["run_at"] = time.time() + given.pop("delay")
    return given


def file_entries(path: str, lines: bool) -> Iterator[tuple[int, Any]]:
    """Yield (line number, entry) of a file of JSON, or of commands."""
    if not lines:
        yield from config.parse_entries(file_lines(path))
        return
    for line, text in enumerate(file_lines(path), 1):
        if text.strip():
            yield line, {"command": text.rstrip("\r\n")}


def file_lines(path: str) -> Iterator[str]:
    """Yield the decoded lines of a file ("-": stdin), with a progress bar on a terminal."""
    line = 0
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            size = os.fstat(file.fileno()).st_size
            shown = size and sys.stderr.isatty()
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


def ring(place: Place, times: int) -> None:
    from worker import ring

    ring(place.path, times)


@cli.group()
def worker() -> None:
    """Start, stop and list the workers."""


@worker.command()
@click.option("--count", default=1, type=click.IntRange(1, 1000), help="How many. Default 1.")
@click.option("--detach", is_flag=True, help="In the background; returns once they are ready.")
@click.option("--drain", is_flag=True, help="Leave when nothing is left to do.")
@click.option("--launcher", callback=template, metavar="LINE", help="Hand the runs to this line.")
@click.option("--launcher-stop", callback=template, metavar="LINE", help="Ends what one may leave.")
@click.pass_obj
def start(place: Place, count: int, detach: bool, drain: bool, **lines: str | None) -> None:
    """Run jobs. Ctrl+C finishes the running ones and leaves; twice, it puts them back.

    \b
    queuectl.py worker start --count 4 --drain
    queuectl.py worker start --count 32 --launcher 'nice -n 19 sh -c {command}'
    """
    import worker as hands

    given = {name: line for name, line in lines.items() if line is not None}
    settings = place.settings | given
    place.db.close()  # made if need be; the workers open their own
    if not detach:
        hands.Supervisor(place.path, settings, print_event, count, drain).run()
        return
    words = ["--db", os.path.abspath(place.path), "--config", os.path.abspath(place.config_path)]
    words += ["worker", "start", "--count", str(count), *["--drain"] * drain]
    words += [f"--{name.replace('_', '-')}={line}" for name, line in given.items()]
    pid, log = hands.detach(words, place.path, count)
    click.echo(f"{plural(count, 'worker')} in the background, supervisor pid {pid}, log {log}")


@worker.command()
@click.option("--now", is_flag=True, help="Stop the running jobs and put them back.")
@click.option("--timeout", callback=seconds, metavar="30s", help="Wait no longer than this.")
@click.pass_obj
def stop(place: Place, now: bool, timeout: float | None) -> None:
    """Let every worker finish its job and leave; wait until they have."""
    from worker import stop as stop_workers

    left = stop_workers(place.path, place.settings, print_remark, now, timeout)
    click.echo(f"{plural(left, 'worker')} left")


@worker.command("list")
@json_option
@click.pass_obj
def list_workers(place: Place, as_json: bool) -> None:
    """Show every live worker and what it runs."""
    from worker import live_workers

    now, rows = time.time(), live_workers(place.db)
    if as_json:
        keys = "worker pid job command since heartbeat_at jobs_done started_at supervisor_pid host"
        found = [database.as_object(row) for row in rows]
        emit([{key: each[key] for key in keys.split()} for each in found])
        return
    lines = [
        [
            row["worker"],
            row["pid"],
            duration_text(now - (row["since"] or row["started_at"])),
            duration_text(now - row["heartbeat_at"]) + " ago",
            row["jobs_done"],
            f"{row['job']}: {row['command']}" if row["job"] else "idle",
        ]
        for row in rows
    ]
    table(["WORKER", "PID", "SINCE", "HEARTBEAT", "DONE", "RUNS"], lines)


@cli.command()
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl+C.")
@json_option
@click.pass_obj
def status(place: Place, watch: bool, as_json: bool) -> None:
    """Show the counts by state, the workers and the last hour."""
    while True:
        found = status_of(place)
        if watch and sys.stdout.isatty():
            click.clear()
        if as_json:
            emit(found)
        else:
            print_status(found)
        if not watch:
            return
        time.sleep(1)


def status_of(place: Place) -> dict[str, Any]:
    import statistics

    from worker import live_workers

    now = time.time()
    runs = database.recent_runs(place.db, now - 3600)
    # Of very many runs only the last are looked at; then the time that they took is the span.
    span = 3600 if len(runs) < database.RECENT_RUNS else max(1, now - runs[0]["finished_at"])
    ended = [run for run in runs if run["outcome"] in ("completed", "failed")]
    completed = sum(run["outcome"] == "completed" for run in ended)
    found = database.counts(place.db) | {"workers": len(live_workers(place.db))}
    found["jobs_per_minute"] = round(completed * 60 / span, 2)
    found["success_rate"] = round(completed / len(ended), 4) if ended else None
    for key, begin, end in (
        ("median_wait_s", "due_at", "started_at"),
        ("median_run_s", "started_at", "finished_at"),
    ):
        spans = [max(0, run[end] - run[begin]) for run in ended]
        found[key] = round(statistics.median(spans), 4) if spans else None
    return found


def print_status(found: dict[str, Any]) -> None:
    for name in (*database.STATES, "total"):
        click.echo(f"{name.capitalize() + ':':<12}{found[name]:>8}")
    click.echo(f"\n{plural(found['workers'], 'active worker')}")
    if found["success_rate"] is None:
        click.echo("last hour: no run has ended")
        return
    click.echo(
        f"last hour: {found['jobs_per_minute']:g} jobs a minute,"
        f" {found['success_rate']:.1%} of runs succeeded,"
        f" median wait {duration_text(found['median_wait_s'])},"
        f" median run {duration_text(found['median_run_s'])}"
    )


@cli.command("list")
@click.option("--state", "states", multiple=True, type=click.Choice(database.STATES))
@click.option("--ready", "--pending-ready-only", is_flag=True, help="What could be taken now.")
@limit_option
@json_option
@click.pass_obj
def list_jobs(place: Place, states: tuple, ready: bool, limit: int | None, as_json: bool) -> None:
    """Show the newest jobs, or with --ready those that come next.

    \b
    queuectl.py list --state failed --state dead
    """
    if ready and states:
        raise BadInput("--ready is a choice of its own; leave --state out")
    print_jobs(place, None if ready else list(states), limit, as_json)


def print_jobs(place: Place, states: list[str] | None, limit: int | None, as_json: bool) -> None:
    """Print jobs in these states (empty: all; None: what is ready)."""
    now, most = time.time(), 100 if limit is None and not as_json else limit or -1
    wanted = most if limit or most < 0 else most + 1  # one more, to know whether there is a rest
    if states is None:
        rows = database.ready_jobs(place.db, now, wanted)
    else:
        rows = database.jobs_in(place.db, states, wanted)
    if as_json:
        emit_jobs(rows)
        return
    rows = list(rows)
    if len(rows) > most > 0:
        rows.pop()
        click.echo(f"only {most} are shown; --limit 0 shows all", err=True)
    dead = states == ["dead"]
    lines = []
    for row in rows if states is None else reversed(rows):
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
    """Show one job: why it is in its state, its fields, its history, its output."""
    seq = database.find(place.db, id)
    row, runs = database.job(place.db, seq), database.runs(place.db, seq)
    found = database.as_object(row) | {"runs": [database.as_object(run) for run in runs]}
    if as_json:
        emit(found)
        return
    click.echo(clean(f"{row['id']}: {database.sentence(row, time.time())}"))
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
@click.option("--attempt", type=click.IntRange(1), help="Of this run. Default: the latest.")
@click.option("--stdout", "only", flag_value="stdout", help="Only the standard output.")
@click.option("--stderr", "only", flag_value="stderr", help="Only the standard error.")
@click.option("--follow", is_flag=True, help="Go on until the run has ended.")
@json_option
@click.pass_obj
def logs(
    place: Place, id: str, attempt: int | None, only: str | None, follow: bool, as_json: bool
) -> None:
    """Show what a job has printed; while it runs, what there is so far."""
    from worker import live_output

    seq, limit = database.find(place.db, id), int(place.settings["output_limit_bytes"])
    sent = {name: 0 for name in ("stdout", "stderr") if only in (None, name)}
    decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in sent}

    def chosen() -> dict[str, Any] | None:
        runs = [run for run in database.runs(place.db, seq) if attempt in (None, run["attempt"])]
        if not runs:
            ended = database.job(place.db, seq)["state"] in database.SETTLED
            if ended or not follow:
                what = "not run" if attempt is None else f"no run {attempt}"
                hope = "" if ended else " yet; --follow waits for it"
                raise database.QueueError(f'job "{id}" has {what}{hope}')
        return dict(runs[-1]) if runs else None

    def put(stream: str, skipped: int, data: bytes) -> None:
        if data and not only and not follow:
            click.echo(f"--- {stream} ---")
        if skipped > 0:
            click.echo(f"[... {skipped} bytes cut ...]")
        sent[stream] += max(0, skipped) + len(data)
        text = clean(decoders[stream].decode(data), keep=LAYOUT)
        click.echo(text, nl=not follow and text[-1:] not in ("", "\n"))

    run = chosen()
    while run is None or run["finished_at"] is None:
        worker = run["worker"] if run else ""
        new = {
            name: live_output(place.path, worker, name, start, limit)
            for name, start in sent.items()
        }
        before, run = run, chosen()
        # Only what was read while the run was open is its own: the file serves the next one too.
        if before and run["id"] == before["id"] and run["finished_at"] is None:
            for name, (skipped, data) in new.items():
                if as_json:
                    run |= {name: data, name + "_bytes": skipped + len(data)}
                else:
                    put(name, skipped, data)
            if not follow:
                break
        if run is None or run["finished_at"] is None:
            time.sleep(0.1)
    if as_json:
        emit(database.as_object(run) | {"id": database.job(place.db, seq)["id"]})
    elif run["finished_at"] is not None:
        for name in sent:
            kept = run[name] or b""
            cut = run[name + "_bytes"] - len(kept)
            put(name, cut - sent[name], kept[max(0, sent[name] - cut) :])


@cli.command()
@click.argument("ids", nargs=-1)
@click.option("--timeout", callback=seconds, metavar="5m", help="Wait no longer than this.")
@click.pass_obj
def wait(place: Place, ids: tuple[str, ...], timeout: float | None) -> None:
    """Wait until jobs (none named: all) have settled; exit 0 only if all completed."""
    from worker import live_workers

    seqs = [database.find(place.db, id) for id in ids]
    deadline, told = None if timeout is None else time.monotonic() + timeout, False
    while True:
        found = database.counts(place.db, seqs)
        total = found["total"]
        left = total - sum(found[state] for state in database.SETTLED)
        if sys.stderr.isatty():
            line = f"\r{total - left} of {total} settled, {found['processing']} running\x1b[K"
            click.echo(line, nl=not left, err=True)
        if not left:
            break
        if not told and not live_workers(place.db):
            told = True
            click.echo("no worker is running; `worker start` starts one", err=True)
        if deadline and time.monotonic() >= deadline:
            after = duration_text(timeout)
            raise database.QueueError(f"after {after} {left} of {plural(total, 'job')} not settled")
        time.sleep(0.1)
    if found["completed"] != total:
        raise database.QueueError(f"{found['dead']} dead, {found['cancelled']} cancelled")


@cli.command()
@click.argument("ids", nargs=-1, required=True)
@click.pass_obj
def cancel(place: Place, ids: tuple[str, ...]) -> None:
    """Cancel jobs: a waiting one at once, a running one with its whole process tree."""
    from worker import await_cancelled

    running, failed = [], False
    for seq in dict.fromkeys([database.find(place.db, id) for id in ids]):
        try:
            if database.cancel(place.db, seq, time.time()) == "processing":
                running.append(seq)
            else:
                click.echo(clean(f"{database.job(place.db, seq)['id']} cancelled"))
        except database.QueueError as error:
            failed = complain(str(error), 1)
    if running:
        await_cancelled(place.path, place.settings, print_remark, running)
    for row in [database.job(place.db, seq) for seq in running]:
        click.echo(clean(f"{row['id']} {row['state']}"))
        failed |= row["state"] != "cancelled"  # it ended first
    raise SystemExit(int(failed))


@cli.group()
def dlq() -> None:
    """The dead letter queue: jobs that have used all their runs."""


@dlq.command("list")
@limit_option
@json_option
@click.pass_obj
def dlq_list(place: Place, limit: int | None, as_json: bool) -> None:
    """Show the dead jobs."""
    print_jobs(place, ["dead"], limit, as_json)


@dlq.command("retry")
@click.argument("ids", nargs=-1)
@click.option("--all", "all_dead", is_flag=True, help="Every dead job.")
@click.pass_obj
def dlq_retry(place: Place, ids: tuple[str, ...], all_dead: bool) -> None:
    """Start dead jobs over: pending, due now, no attempts used, history kept."""
    if bool(ids) == all_dead:
        raise BadInput("give the IDs of dead jobs, or --all")
    seqs = None if all_dead else list(dict.fromkeys(database.find(place.db, id) for id in ids))
    count = database.retry_dead(place.db, seqs, time.time())
    ring(place, count)
    click.echo(f"{plural(count, 'job')} pending again")


def setting_text(value: float | str, keep: str = "") -> str:
    return clean(value, keep) if isinstance(value, str) else f"{value:.10g}"


@cli.command("config", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="[get [KEY] | list | set KEY VALUE | KEY VALUE]")
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
        lines = [list(each) for each in zip(found, texts, meanings)]
        table(["KEY", "VALUE", "MEANING"], lines)


@cli.command()
@click.option("--older-than", callback=seconds, required=True, metavar="7d", help="Ended before.")
@click.option("--state", "states", multiple=True, type=click.Choice(database.SETTLED))
@click.option("--dry-run", is_flag=True, help="Only say how many.")
@click.option("--vacuum", is_flag=True, help="Make the file small; who writes meanwhile waits.")
@click.pass_obj
def prune(
    place: Place, older_than: float, states: tuple[str, ...], dry_run: bool, vacuum: bool
) -> None:
    """Remove settled jobs (dead ones only if --state names them) and their history."""
    count, before, began = 0, time.time() - older_than, time.monotonic()
    for removed in database.prune(place.db, states or ("completed", "cancelled"), before, dry_run):
        count += removed
        if not dry_run:  # leave the lock to others for longer than it was held
            time.sleep(min(0.1, 2 * (time.monotonic() - began)))
        began = time.monotonic()
    if vacuum and not dry_run:
        database.vacuum(place.db)
    click.echo(f"{plural(count, 'job')} {'would be ' if dry_run else ''}removed")


@cli.command()
@json_option
@click.pass_obj
def doctor(place: Place, as_json: bool) -> None:
    """Check the file and the queue's own invariants; exit 1 if one is broken."""
    found = list(database.check(place.db, place.path))
    ok = not any(problem for _, problem in found)
    if as_json:
        emit(
            {"ok": ok, "checks": [{"check": name, "problem": text or None} for name, text in found]}
        )
    else:
        for name, problem in found:
            click.echo(clean(f"BROKEN  {name}: {problem}" if problem else f"ok      {name}"))
    raise SystemExit(not ok)


if __name__ == "__main__":
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (>&-): what is opened next must not take its place
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no text is too foreign to be shown
    main()
