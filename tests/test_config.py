"""The knobs: every value from outside is taken, or refused by name, and the file is never lost."""

from __future__ import annotations

import io
import json
import math
import os
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from config import BadFile, BadInput

NOW = 1_700_000_000.0
NOON = 1_896_091_200.0  # 2030-01-31T12:00:00Z
DEFAULTS = {key: setting.default for key, setting in config.SETTINGS.items()}
YEAR_S = 31_536_000
RANGES = [  # the contract's table
    ("max_retries", 3, 0, 1000),
    ("backoff_base", 2.0, 0, 1000),
    ("backoff_jitter", 0.5, 0, 10),
    ("max_backoff_s", 3600, 0, YEAR_S),
    ("job_timeout_s", 0, 0, YEAR_S),
    ("kill_grace_s", 5, 0, 3600),
    ("lock_timeout_s", 30, 2, 86_400),
    ("poll_interval_ms", 500, 10, 60_000),
    ("output_limit_bytes", 8192, 0, 10_485_760),
]
LINES = {"launcher": "", "launcher_stop": ""}


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "config.json")


def write(path: str, text: str | bytes) -> None:
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


# --- the settings file -----------------------------------------------------------------------


def test_a_missing_file_means_the_defaults_of_the_contract(path):
    assert config.load(path) == {name: default for name, default, _, _ in RANGES} | LINES
    assert config.load(config.DEFAULT_PATH) == config.load(path)
    assert not os.path.exists(path)


@pytest.mark.parametrize("name, default, low, high", RANGES)
def test_a_setting_takes_both_ends_of_its_range_and_nothing_beyond(path, name, default, low, high):
    whole = config.SETTINGS[name].kind is int
    for value in (low, high):
        assert config.store(path, name, str(value)) == {name: value}
        assert config.load(path)[name] == value
    below = low - 1 if whole else math.nextafter(low, -math.inf)
    above = high + 1 if whole else math.nextafter(high, math.inf)
    for value in (below, above):
        refusal = f'"{name}" must be from {low} to {high}, not {value}$'
        with pytest.raises(BadInput, match=refusal.replace("+", r"\+")):
            config.store(path, name, repr(value))
        write(path, json.dumps({name: value}))
        with pytest.raises(BadFile, match=f'"{name}" must be from'):
            config.load(path)
    if whole:
        write(path, f'{{"{name}": {low}.0}}')
        with pytest.raises(BadFile, match=f'"{name}" must be a whole number'):
            config.load(path)


@pytest.mark.parametrize("key", ["default_timeout", "default-timeout", "Job-Timeout-S"])
def test_hyphens_underscores_and_the_alias_name_the_same_setting(path, key):
    assert config.store(path, key, "1.5") == {"job_timeout_s": 1.5}
    write(path, json.dumps({key: 7}))
    assert config.load(path)["job_timeout_s"] == 7


@pytest.mark.parametrize("name", ["max_retries", "backoff_base"])
@pytest.mark.parametrize("value", ["true", '"3"', "null", "[]", "{}", "-1", str(2**63), "1e999"])
def test_what_is_no_number_in_range_is_refused_by_name_in_the_file(path, name, value):
    write(path, f'{{"{name}": {value}}}')
    with pytest.raises(BadFile, match=f'config.json: "{name}" must be '):
        config.load(path)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", str(2**63), "9" * 5000, "1.5"])
def test_what_is_no_number_in_range_is_refused_by_name_on_the_command_line(path, text):
    with pytest.raises(BadInput, match='"max_retries" must be '):
        config.store(path, "max_retries", text)
    assert not os.path.exists(path)


@pytest.mark.parametrize("text", ["", "many", "true", "0x10", "1,5", "[1]"])
def test_a_value_that_is_no_number_at_all_is_shown(path, text):
    with pytest.raises(BadInput) as refused:
        config.store(path, "backoff_base", text)
    assert f'"{text}" is not a number' in str(refused.value)


def test_an_unknown_key_is_refused_and_the_known_ones_are_told(path):
    with pytest.raises(BadInput, match='unknown setting "colour"; there are: max_retries'):
        config.store(path, "colour", "1")


DAMAGED = {
    "": "line 1 column 1",
    '{"max_retries": 3,\n oops}': "line 2 column 2",
    '{"max_retries": 3': "line 1 column 18",
    '{"max_retries": 1, "max_retries": 2}': '"max_retries" is repeated',
    '{"backoff_base": NaN}': "NaN",
    '{"colour": 1}': 'unknown setting "colour"',
    b'{"\xff": 1}': "position 2",
    "[" * 100_000: "recursion",
    "[]": "",
    "null": "",
    '"text"': "",
}


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: repr(text[:24]))
def test_a_damaged_file_is_an_error_that_names_it_and_stays_as_it_is(path, text):
    write(path, text)
    for use in (lambda: config.load(path), lambda: config.store(path, "max_retries", "1")):
        with pytest.raises(BadFile) as refused:
            use()
        assert str(refused.value).startswith(path)
        assert DAMAGED[text] in str(refused.value)
    assert open(path, "rb").read() == (text if isinstance(text, bytes) else text.encode())


def test_a_directory_in_place_of_the_file_is_an_error_that_names_it(tmp_path):
    for use in (config.load, lambda path: config.store(path, "max_retries", "1")):
        with pytest.raises(BadFile, match=str(tmp_path)):
            use(str(tmp_path))
    with pytest.raises(BadFile, match="nowhere"):
        config.store(str(tmp_path / "nowhere" / "config.json"), "max_retries", "1")


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_file_is_replaced_whole_private_and_with_its_other_entries(path, umask):
    write(path, '{"max_retries": 7, "default-timeout": 9}')
    os.chmod(path, 0o640)
    before, old, new = os.umask(umask), open(path), path + ".new"
    try:
        config.store(path, "poll-interval-ms", "20")
        config.store(new, "poll-interval-ms", "20")
    finally:
        os.umask(before)
    changed = {"max_retries": 7, "job_timeout_s": 9, "poll_interval_ms": 20}
    assert config.load(path) == DEFAULTS | changed
    assert os.stat(path).st_mode & 0o777 == 0o640, "as it was"
    assert os.stat(new).st_mode & 0o777 == 0o600, "private at birth"
    with old:  # who had it open reads the old text to its end
        assert old.read() == '{"max_retries": 7, "default-timeout": 9}'


def test_the_disk_fails_while_a_setting_is_stored_and_the_old_file_stays(path, monkeypatch):
    config.store(path, "max_retries", "7")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *_: exec("raise OSError(28, 'No space left')"))
            with pytest.raises(BadFile, match="cannot be written: No space left"):
                config.store(path, "max_retries", "8")
    assert config.load(path)["max_retries"] == 7
    assert os.listdir(os.path.dirname(path)) == ["config.json"]


def test_of_many_who_store_at_once_none_undoes_another(path):
    start, names = threading.Barrier(len(RANGES)), [name for name, *_ in RANGES]

    def store(name: str) -> None:
        start.wait()
        config.store(path, name, "10")

    threads = [threading.Thread(target=store, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert config.load(path) == dict.fromkeys(names, 10) | LINES


# --- one job ---------------------------------------------------------------------------------


def check(**fields: Any) -> dict[str, Any]:
    return config.check_job({"command": "true"} | fields, DEFAULTS, "/here")


NOT_A_JOB = [
    ("", "not JSON"),
    ("nope", "not JSON"),
    ('{"command": "a"', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"command": NaN}', '"command" must be text, not NaN'),
    ('{"command": "a", "command": "b"}', '"command" is repeated'),
    ('"true"', 'a job is a JSON object, not "true"'),
    ("[1]", "not an array"),
    ("null", "not null"),
    ("true", "not true"),
    ("5", "not 5"),
    ("{}", 'needs a "command"'),
    ('{"command": ""}', '"command" is empty'),
    ('{"command": " \\n"}', '"command" is empty'),
    ('{"command": null}', '"command" must be text, not null'),
    ('{"command": ["ls"]}', '"command" must be text, not an array'),
    ('{"command": "a", "colour": 1}', 'unknown field "colour"'),
    ('{"command": "a", "timeout": 1, "timeout_s": 1}', "same field"),
]


def test_white_space_around_json_is_as_nothing(path):
    text = ' \n\t{"max_retries": 1}\r\n '
    assert config.parse_json(text) == {"max_retries": 1}
    with open(path, "w", encoding="utf-8-sig") as file:  # and a byte order mark
        file.write(text)
    assert config.load(path)["max_retries"] == 1
    with pytest.raises(BadInput, match=r"^not JSON: Extra data: line 2 column 4"):
        config.parse_json(" \n{} 1")


@pytest.mark.parametrize("text, words", NOT_A_JOB, ids=lambda text: text[:50])
def test_what_is_no_job_is_refused_in_one_line(text, words):
    with pytest.raises(BadInput) as refused:
        config.check_job(config.parse_json(text), DEFAULTS, "/here")
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


BAD_FIELDS = {  # as JSON; the message names the field
    "id command cwd run_at": r'"a\u0000" "a\ud800" true null [] {}',
    "id": r'"" "\u0020" "a\n" "a\u001b[2J" "a\u202e" 5 "%s"' % ("x" * 129),
    "priority max_retries": 'true "3" null [] 1.5 1.0 1e999',
    "priority": f"{2**63} {-(2**63)} {2**53 + 1}",
    "max_retries": f"-1 1001 {2**63} {10**400}",
    "timeout": 'true "3" null -1',
    "timeout_s backoff_base": f'true "3" null [] -1 -1e-9 1e999 {YEAR_S + 1} {2**63} {10**400}',
    "run_at": f'"" "soon" "2030-13-01" "25:00" "1960-01-01" -1 1e12 1e999 {2**63} {10**400}',
}


BAD_VALUES = [
    (field, value)
    for fields, values in BAD_FIELDS.items()
    for field in fields.split()
    for value in values.split()
]


@pytest.mark.parametrize("field, value", BAD_VALUES, ids=lambda text: text[:24])
def test_a_bad_value_is_refused_and_its_field_is_named(field, value):
    with pytest.raises(BadInput, match=f'^"{field}" ') as refused:
        check(**{field: json.loads(value)})
    assert len(str(refused.value)) < 200
    assert str(refused.value).isprintable()


def test_nan_is_refused_where_python_code_passes_it():
    for field in ("priority", "timeout", "backoff_base", "run_at"):
        with pytest.raises(BadInput, match=r"NaN|nan"):
            check(**{field: math.nan})


def test_settings_are_copied_into_the_job_unless_it_has_its_own():
    settings = DEFAULTS | {"max_retries": 7, "backoff_base": 1.5, "job_timeout_s": 60}
    job = config.check_job({"command": "true"}, settings, "/here")
    expected = dict(id=None, command="true", priority=0, run_at=None, max_retries=7)
    assert job == expected | dict(backoff_base=1.5, timeout_s=60, cwd="/here")
    own = dict(id="a", priority=-5, max_retries=0, backoff_base=0, timeout_s=0.5, cwd="/there")
    assert check(**own).items() >= own.items()
    assert check(timeout=30)["timeout_s"] == 30
    assert check(id="x" * 128, command="a\nb")["id"] == "x" * 128


def test_a_relative_directory_is_beside_the_caller_and_the_tilde_is_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for given_, found in (("sub/a", "/here/sub/a"), ("/abs", "/abs"), ("~/b", "/home/me/b")):
        assert check(cwd=given_)["cwd"] == found
    monkeypatch.setenv("HOME", os.fsdecode(b"/home/\xff"))
    with pytest.raises(BadInput, match=r"^.cwd. is not valid Unicode"):
        check(cwd="~/x")


FORMS_OF_NOON = """2030-01-31T12:00:00Z, 2030-01-31T12:00:00z, 2030-01-31T12:00:00.000Z,
    2030-01-31T12:00:00, 2030-01-31 12:00, 2030-01-31T14:30:00+02:30, 2030-01-31T00:00-12:00,
    2030-01-31T21:00:00+0900, 2030-01-31 10:30:00-0130, 2030-01-31 12:00:00+00,
    2030-01-31T14:00+02, 20300131T120000Z, 2030-01-31T12"""
NO_MOMENTS = """2030-01-31T12.5Z, 2030-01-31T12:30.5Z, 2030-01-31+05:00, 2030-01-31-05,
    2030-01-31x12:00, 2030-01-31T12:00:00.5.5Z, 203001311200, 2030-01-31T12:00+24:00,
    2030-0131, 2030-02-29, 2030-01-31T12:0000, 2030-01-31T12:00+02:60, \u0662030-01-31"""


def test_a_time_is_unix_seconds_or_iso_8601_and_utc_unless_it_says_otherwise(monkeypatch):
    monkeypatch.setenv("TZ", "XXX-9")  # where the caller lives changes nothing
    time.tzset()
    try:
        for text in [*map(str.strip, FORMS_OF_NOON.split(",")), 1896091200, NOON]:
            assert check(run_at=text)["run_at"] == NOON, text
        assert check(run_at="2030-01-31")["run_at"] == NOON - 43_200
        assert check(run_at="2030-01-31T12:00:00.250Z")["run_at"] == NOON + 0.25
        assert check(run_at="2030-01-31T12:00:00.5Z")["run_at"] == NOON + 0.5
        assert check(run_at="2030-01-31T12:00:00,5Z")["run_at"] == NOON + 0.5
        assert check(run_at="2030-01-31T12:00:00.250000999Z")["run_at"] == NOON + 0.25
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", [text.strip() for text in NO_MOMENTS.split(",")])
def test_what_only_looks_like_a_time_is_refused_and_not_taken_for_another(text):
    with pytest.raises(BadInput, match=r'^"run_at" .* is no (date|time)'):
        check(run_at=text)


def test_a_printed_record_pasted_back_is_taken_and_what_the_queue_sets_is_reported():
    given_by_queue = "state attempts exit_code last_error stdout stderr worker created_at"
    names = [*given_by_queue.split(), "updated_at", "started_at", "finished_at", "runs"]
    record = {"command": "true"} | dict.fromkeys(names, "whatever")
    ignored: set[str] = set()
    plain = {"command": "true"}
    jobs = list(config.check_jobs([(1, plain)], DEFAULTS, "/here", ignored))
    assert not ignored
    jobs += config.check_jobs([(2, record)], DEFAULTS, "/here", ignored)
    assert ignored == set(names)
    assert jobs == [(1, check()), (2, check())]


# --- many jobs -------------------------------------------------------------------------------


def entries(text: str) -> list[tuple[int, dict[str, Any]]]:
    """Read a file of jobs as `enqueue --file` does, the line of a bad one in front."""
    found = []
    for line, value in config.parse_entries(io.StringIO(text)):
        try:
            config.check_job(value, DEFAULTS, "/")
        except BadInput as error:
            raise BadInput(f"line {line}: {error}") from None
        found.append((line, value))
    return found


A, B = {"command": "a"}, {"command": "b"}


ENTRIES = {
    "": [],
    "\n \n": [],
    "\n[\n\n]\n": [],
    '{"command": "a"}\n\n  \n {"command": "b"}': [(1, A), (4, B)],
    '[{"command": "a"}, {"command": "b"}]': [(1, A), (1, B)],
    '\n [{\n"command": "a"}\n,\n\n{"command":\n"b"}\n]\n\n': [(2, A), (6, B)],
}


@pytest.mark.parametrize("text, found", ENTRIES.items())
def test_entries_are_one_a_line_or_an_array_and_each_has_its_line(text, found):
    assert entries(text) == found


BROKEN_ENTRIES = {
    '[{"command": "a"}] {"command": "b"}': 1,
    "[": 1,
    '[\n{"command": "a"}': 2,
    '[\n{"command": "a"},\n]': 3,
    '[\n{"command": "a"}\n{"command": "b"}]': 3,
    '{"command": "a"}\n{"command":\n"b"}': 2,
    '[\n\n{"command": "a", "command": "b"}]': 3,
}


@pytest.mark.parametrize("text, line", BROKEN_ENTRIES.items())
def test_entries_that_are_not_json_are_refused_with_their_line(text, line):
    with pytest.raises(BadInput, match=f"^line {line}: not JSON: "):
        entries(text)


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"])).map("a".__add__)
JOB = st.fixed_dictionaries({"command": TEXT}, optional={"priority": st.integers(-9, 9)})
BAD = st.sampled_from(
    r"""
    nope | 5 | {} | {"command": } | {"command": "a" "b"} | {"command": "a\u0000"}
    | {"command": "a", "command": "b"} | {"priority": NaN} | {"priority": 1.5}
    """.split("|")
).map(str.strip)


def lay_out(parts: list[tuple[str, int]], array: bool) -> tuple[str, list[int]]:
    """Return the text of a file, blank lines before each part, and the line of each."""
    text, lines = "[" if array else "", []
    for number, (part, gap) in enumerate(parts, 1):
        text += "\n" * gap
        lines.append(text.count("\n") + 1)
        text += part + ("," if array and number < len(parts) else "") + "\n"
    return text + ("]" if array else ""), lines


@given(st.lists(st.tuples(JOB, st.integers(0, 2))), BAD, st.booleans(), st.data())
def test_one_bad_entry_at_any_place_of_any_layout_is_named_by_its_line(jobs, bad, array, data):
    """As lines, or as a pretty-printed array."""
    parts = [(json.dumps(job, indent=2 if array else None), gap) for job, gap in jobs]
    text, lines = lay_out(parts, array)
    assert entries(text) == list(zip(lines, [job for job, _ in jobs]))
    place = data.draw(st.integers(0, len(parts)))
    text, lines = lay_out([*parts[:place], (bad, 1), *parts[place:]], array)
    with pytest.raises(BadInput, match=f"^line {lines[place]}: "):
        entries(text)
