"""The knobs: what a user may set, in config.json or on one job, with its type, range and default.

Owns the settings file and the check of every value that comes from outside. Must not know of SQL,
processes or the terminal: it raises BadInput or BadFile and the face (queuectl.py) says it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

DEFAULT_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config.json")
YEAR_S = 365 * 86_400
LAST_TIME = 253_402_300_799  # 9999-12-31T23:59:59Z, the last second that a date can name


class BadInput(Exception):
    """The call itself is wrong: what was given, its value, and what would be right. Exit 2."""


class BadFile(Exception):
    """The settings file cannot be used; the message names the file and the place. Exit 1."""


class Setting(NamedTuple):
    kind: type  # int: whole numbers only; float: any number; str: a shell line, without a range
    default: float | str
    low: float
    high: float
    meaning: str


SETTINGS = {
    "max_retries": Setting(int, 3, 0, 1000, "times a failed job is run again"),
    "backoff_base": Setting(float, 2.0, 0, 1000, "seconds, raised to the attempt number"),
    "backoff_jitter": Setting(float, 0.5, 0, 10, "share of backoff_base added at random"),
    "max_backoff_s": Setting(float, 3600, 0, YEAR_S, "longest backoff, before jitter"),
    "job_timeout_s": Setting(float, 0, 0, YEAR_S, "seconds a run may take; 0: no limit"),
    "kill_grace_s": Setting(float, 5, 0, 3600, "seconds between SIGTERM and SIGKILL"),
    "lock_timeout_s": Setting(float, 30, 2, 86_400, "a worker silent for so long is lost"),
    "poll_interval_ms": Setting(int, 500, 10, 60_000, "the longest an idle worker sleeps"),
    "output_limit_bytes": Setting(int, 8192, 0, 10 * 2**20, "kept of stdout and of stderr"),
    "launcher": Setting(str, "", 0, 0, "runs a command elsewhere; empty: here, by /bin/sh"),
    "launcher_stop": Setting(str, "", 0, 0, "ends what a run may have left there"),
}
ALIASES = {"default_timeout": "job_timeout_s"}

RANGES = SETTINGS | dict.fromkeys(("timeout", "timeout_s"), SETTINGS["job_timeout_s"])
RANGES["priority"] = Setting(int, 0, -(2**53), 2**53, "higher runs first")
# A record that was printed can be pasted back: what the queue sets is ignored, not refused.
SET_BY_QUEUE = frozenset(
    "state attempts exit_code last_error stdout stderr worker"
    " created_at updated_at started_at finished_at runs".split()
)
ID_LIMIT = 128
TEXT_LIMIT = 131_071  # bytes: so long one argument of a program may be (execve(2), Linux)

# Of ISO 8601: a date, a time, its offset; with all separators or without.
MOMENT = r"""(?ax)(?P<year>\d{4}) (-?) (?P<month>\d\d) \2 (?P<day>\d\d)
    (?: [Tt\ ] (?P<hour>\d\d) (?: (:?) (?P<minute>\d\d) (?: \6 (?P<second>\d\d)
    (?: [.,] (?P<fraction>\d{1,6}) \d*)? )? )?
    \s* (?: [Zz] | (?P<hours>[+-]\d\d) (?: :? (?P<minutes>[0-5]\d))? )? )?"""
# {id} in a launcher, but not what a shell reads: ${id}, {a,b}, { print; }, {{.ID}}.
PLACEHOLDER = r"(?<!\$)\{(\w+)\}"
# As a shell sees a line: escapes, comments, quotes.
QUOTED = r"""(?xs) \\. | (?<![^\s;&|()])\#[^\n]* | '[^']*'? | `[^`]*`?
    | "(?: \\. | \$\( (?: [^()] | \([^()]*\) )* \) | [^"\\] )*"? """
PLACES = ("command", "id", "attempt", "cwd")


# --- the settings file -----------------------------------------------------------------------


def load(path: str) -> dict[str, Any]:
    """Return all settings, those of the file over the defaults. A missing file means the defaults.

    Raises BadFile if the file is no JSON object or one of its keys or values is not allowed.
    """
    return {key: setting.default for key, setting in SETTINGS.items()} | stored(path)


def stored(path: str) -> dict[str, Any]:
    """Return what the settings file says, under the one spelling of each key."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = parse_json(file.read())
        if not isinstance(found, dict):
            raise BadInput(f"must be a JSON object, not {shown(found)}")
        settings = {}
        for key, value in found.items():
            name = setting_name(key)
            if name in settings:
                raise BadInput(f'"{name}" is given twice, in two spellings')
            settings[name] = check_setting(name, value)
        return settings
    except FileNotFoundError:
        return {}
    except (BadInput, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: {error}; mend or remove the file") from None
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None


def store(path: str, key: str, text: str) -> dict[str, Any]:
    """Set one key in the file and return {key: value}; the file is replaced atomically.

    Raises BadInput for an unknown key or a value that is no number or out of range (or no line that
    `expand` can fill in), BadFile if the file as it is cannot be read or written. The other
    entries of the file are kept.
    """
    import fcntl
    import tempfile

    name = setting_name(key)
    value = check_setting(name, text if SETTINGS[name].kind is str else parse_number(text, name))
    path = os.path.realpath(path)  # the file itself, not a link to it, is replaced
    try:
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            # Locked, so that of two `config set` at once neither undoes the other.
            fcntl.flock(folder, fcntl.LOCK_EX)
            settings = stored(path) | {name: value}
            # Private at birth; synced before the rename, else a power cut may leave it empty.
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as private:
                new = os.path.join(private, "config.json")
                with open(new, "w", encoding="utf-8") as file:
                    os.chmod(new, os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o600)
                    file.write(json.dumps(settings, indent=2) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, path)
        finally:
            os.close(folder)
    except OSError as error:
        raise BadFile(f"{path}: cannot be written: {error.strerror}") from None
    return {name: value}


def setting_name(key: str) -> str:
    """Return the one spelling of a key: `max-retries` and `max_retries` are alike."""
    name = key.lower().replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in SETTINGS:
        raise BadInput(f'unknown setting "{key}"; there are: {", ".join(SETTINGS)}')
    return name


def check_setting(name: str, value: Any) -> float | str:
    if SETTINGS[name].kind is not str:
        return check_number(name, value)
    found = re.findall(PLACEHOLDER, check_text(name, value))
    unknown = [word for word in found if word not in PLACES]
    if unknown:
        there_are = ", ".join(f"{{{word}}}" for word in PLACES)
        raise BadInput(f'"{name}" has {{{unknown[0]}}}; there are: {there_are}')
    for text in re.findall(QUOTED, value):
        if text[0] != "\\" and (place := re.search(PLACEHOLDER, text)):
            told = "is in quotes or a comment: each value has its own; pass it on as an argument"
            raise BadInput(f"\"{name}\": {place[0]} {told} (sh -c '...' sh {place[0]})")
    if name == "launcher" and value and "command" not in found:
        raise BadInput(f'"{name}" must have {{command}} in it, else nothing of the job would run')
    return value


def expand(template: str, **values: Any) -> str:
    """Fill a launcher's placeholders in, each quoted: an id or a command may hold anything."""
    import shlex

    return re.sub(PLACEHOLDER, lambda place: shlex.quote(str(values[place[1]])), template)


# --- one job ---------------------------------------------------------------------------------


def check_job(given: Any, settings: dict[str, Any], cwd: str) -> dict[str, Any]:
    """Turn what a user wrote into the row that database.gather takes.

    `given` is parsed JSON; `settings` fill in what it leaves out: they are copied into the job
    here, so that a later `config set` never changes it. Raises BadInput, naming the field.
    """
    if not isinstance(given, dict):
        raise BadInput(f"a job is a JSON object, not {shown(given)}")
    job = UNSET.copy()
    job["cwd"], job["timeout_s"] = cwd, settings["job_timeout_s"]
    job["max_retries"], job["backoff_base"] = settings["max_retries"], settings["backoff_base"]
    if "timeout" in given and "timeout_s" in given:
        raise BadInput('"timeout" and "timeout_s" are the same field; give one of them')
    for name, value in given.items():
        if name == "timeout":
            job["timeout_s"] = check_number(name, value)
        elif name in FIELDS:
            job[name] = FIELDS[name](name, value)
        elif name not in SET_BY_QUEUE:
            there_are = ", ".join(sorted([*FIELDS, "timeout"]))
            raise BadInput(f'unknown field "{name}"; a job has: {there_are}')
    if job["command"] is None:
        raise BadInput('a job needs a "command"')
    if "cwd" in given:
        job["cwd"] = check_text("cwd", os.path.join(cwd, os.path.expanduser(job["cwd"])))
    return job


def check_jobs(
    entries: Iterable[tuple[int, Any]], settings: dict[str, Any], cwd: str, ignored: set[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of each (line, entry); fields that are ignored are added to `ignored`.

    Raises BadInput, naming the line, if it has one.
    """
    for line, entry in entries:
        try:
            row = check_job(entry, settings, cwd)
        except BadInput as error:
            raise BadInput(f"line {line}: {error}" if line else str(error)) from None
        ignored.update(SET_BY_QUEUE.intersection(entry))
        yield line, row


def check_id(name: str, value: Any) -> str:
    if len(check_filled(name, value)) > ID_LIMIT:
        raise BadInput(f'"id" has {len(value)} characters; at most {ID_LIMIT} are allowed')
    if not value.isprintable():
        raise BadInput(f'"id" {value!a} has characters that cannot be printed')
    return value


def check_filled(name: str, value: Any) -> str:
    if not check_text(name, value).strip():
        raise BadInput(f'"{name}" is empty')
    return value


def check_text(name: str, value: Any) -> str:
    """Return the text. NUL would cut it short in exec, a lone surrogate has no UTF-8."""
    if not isinstance(value, str):
        raise BadInput(f'"{name}" must be text, not {shown(value)}')
    if "\0" in value:
        raise BadInput(f'"{name}" contains a NUL character')
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise BadInput(f'"{name}" is not valid Unicode: {error.reason}') from None
    if size > TEXT_LIMIT:
        raise BadInput(f'"{name}" has {size:,} bytes; a program takes {TEXT_LIMIT:,} at most')
    return value


def check_number(name: str, value: Any) -> float:
    setting = RANGES[name]
    # bool is an int to Python; to a user, true is no number.
    if type(value) is not int and (type(value) is not float or setting.kind is int):
        wanted = "a whole number" if setting.kind is int else "a number"
        raise BadInput(f'"{name}" must be {wanted}, not {shown(value)}')
    if not setting.low <= value <= setting.high:  # false for NaN too
        raise BadInput(f'"{name}" must be from {setting.low} to {setting.high}, not {shown(value)}')
    return value


def check_time(name: str, value: Any) -> float:
    """Return Unix seconds from Unix seconds or an ISO 8601 date; no offset means UTC."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{9,11}([.][0-9]+)?", value):
        value = float(value)  # other numbers are rather dates: 20300131, 203001311200
    if type(value) not in (int, float, str):
        raise BadInput(f'"{name}" must be a date or Unix seconds, not {shown(value)}')
    if type(value) is not str:
        if not 0 <= value <= LAST_TIME:
            raise BadInput(f'"{name}" {value!s:.40} is no time in Unix seconds')
        return float(value)
    try:
        # datetime.fromisoformat takes 12.5 for half a second past noon, and any character for a T.
        found = re.fullmatch(MOMENT, check_text(name, value).strip()).groupdict("0")
        hours, minutes, fraction = found.pop("hours"), found.pop("minutes"), found.pop("fraction")
        offset = timedelta(hours=int(hours), minutes=int(hours[0] + minutes))
        fields = {key: int(digits) for key, digits in found.items()}
        moment = datetime(**fields, microsecond=int(f"{fraction:0<6}"), tzinfo=timezone(offset))
        if 0 <= moment.timestamp() <= LAST_TIME:
            return moment.timestamp()
        raise ValueError
    except (AttributeError, ValueError, OverflowError):
        told = "is no date from 1970 to 9999; write it like 2030-01-31T12:00:00Z"
        raise BadInput(f'"{name}" {value[:40]!a} {told}') from None


# What a user may say of one job, and what makes sure of it.
FIELDS = {"id": check_id, "command": check_filled, "cwd": check_filled, "run_at": check_time}
FIELDS |= dict.fromkeys(("priority", "max_retries", "backoff_base", "timeout_s"), check_number)
UNSET = dict.fromkeys(FIELDS) | {"priority": 0}


# --- text to values --------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Parse JSON, refusing a repeated key: of two values, which one was meant?"""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not JSON: {error}") from None


def parse_entries(lines: Iterator[str], commands: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield (line number, job) from a JSON array, or one JSON object or one command a line.

    Lines are read one by one, so a million of them need no memory; an array is read whole.
    """
    begun = False
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if commands and text:
            yield number, {"command": line.rstrip("\r\n")}
        elif text.startswith("[") and not begun:
            yield from parse_array("".join([line, *lines]), number)
        elif text:
            begun = True
            try:
                yield number, parse_json(text)
            except BadInput as error:
                told = str(error).replace(": line 1 column", ", column")
                raise BadInput(f"line {number}: {told}") from None


def parse_array(text: str, first_line: int) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each entry of one JSON array, and refuse what follows it."""
    mark = re.match(r"\s*\[\s*(\]?)\s*", text)
    at, line = mark.end(), first_line + mark[0].count("\n")
    try:
        while mark[1] != "]":
            value, end = DECODER.raw_decode(text, at)
            yield line, value
            mark = re.compile(r"\s*([],]?)\s*").match(text, end)
            at, line = mark.end(), line + text.count("\n", at, mark.end())
            if not mark[1]:
                raise ValueError('"," or "]" is missing')
        if at < len(text):
            raise ValueError("something follows the array")
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise BadInput(f"line {line}: not JSON: {message}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{repeated}" is repeated')
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def parse_number(text: str, name: str) -> float:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise BadInput(f'{name}: "{text}" is not a number')


def shown(value: Any) -> str:
    """Return a JSON value as a message names it."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."
