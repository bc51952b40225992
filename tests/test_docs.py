"""The documents say what is: what they name exists, and the transcript is what is printed."""

from __future__ import annotations

import inspect
import re

import mutants
import pytest
from conftest import ROOT
from demo import SCENES

import config
import database
import queuectl
import worker

README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "design.md").read_text()
COMMANDS = {
    " ".join((*before, name)): command
    for before, group in [
        ((), queuectl.cli),
        (("worker",), queuectl.worker),
        (("dlq",), queuectl.dlq),
    ]
    for name, command in group.commands.items()
}
GROUPS = ("worker", "dlq")


def options(command) -> set[str]:
    return {word for parameter in command.params for word in parameter.opts if word[0] == "-"}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in GROUPS])
def test_every_command_and_option_is_in_the_readme(name):
    rows = [row for row in README.splitlines() if row.startswith("|") and f"`{name}" in row]
    assert rows, f"no row for {name}"
    for option in options(COMMANDS[name]) - {"--json", "--cwd", "--id", "--help"}:
        assert any(option in row for row in rows) or option == "--limit", (name, option)
    knows_json = "--json" in options(COMMANDS[name])
    assert any("* |" in row for row in rows) == knows_json, name


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_says_what_it_does(name):
    text = COMMANDS[name].help
    assert text and text[0].isupper() and text.splitlines()[0].strip().endswith((".", ";", ","))


def test_every_option_in_the_readme_exists():
    known = {word for command in COMMANDS.values() for word in options(command)}
    known |= options(queuectl.cli) | {"--help"}
    text = re.sub(r"^python3 -m venv .*$|^.*pip install.*$", "", README, flags=re.MULTILINE)
    recipes = text.partition("## Past one machine")[2].partition("\n## ")[0]
    for block in re.findall(r"```sh\n.*?```", recipes, re.DOTALL):  # full of others' options
        text = text.replace(block, "")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


def test_every_setting_is_in_the_readme_with_its_default_and_range():
    section = README.partition("## Settings")[2].partition("\n## ")[0]
    for key, setting in config.SETTINGS.items():
        row = next(row for row in section.splitlines() if row.startswith(f"| `{key}`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if setting.kind is str:
            assert cells[1:3] == ["empty", "a line"], key
            continue
        assert float(cells[1]) == setting.default, key
        assert cells[2].startswith(f"{setting.low:g} to"), key


def test_every_function_and_table_in_design_md_exists():
    text = DESIGN.partition("## Why is this line here?")[0]
    for name in re.findall(r"`(?:Supervisor\.)?([a-z_]+)`", text):
        places = (database, worker, worker.Supervisor, config)
        sql = " ".join(database.SCHEMA) + " ".join(database.STATES)
        words = {
            "bell",
            "set",
            "setsid",
            "rowcount",
            "synchronous",
            "timeout",
            "rsync",
            "enqueue",
        } | {"subprocess", "waitpid", "flock"}
        known = any(hasattr(place, name) for place in places) or name in sql or name in words
        assert known or name in config.SETTINGS, name


@pytest.mark.parametrize("state", database.STATES)
def test_every_state_is_explained(state):
    assert f"`{state}`" in README and state in DESIGN


def test_what_explain_shows_in_design_md_is_what_it_shows(queue):
    """The same functions, effects and statements in the same order; numbers of lines may differ."""
    queue.run("enqueue", "--command", "echo hi", check=0)
    said = queue.run("worker", "start", "--drain", "--explain", check=0).stderr
    rest = iter([re.sub(r" +", " ", line) for line in said.splitlines()])
    names = "claim|finish|hand_in|next_due_at"
    shown = re.findall(rf"^    ((?:{names}):.*(?:\n {{20,}}.*)*)", DESIGN, re.MULTILINE)
    assert len(shown) == 12
    for line in shown:
        where, _, text = re.sub(r"\s+", " ", line).partition(" ")
        parts = [re.escape(part) for part in re.sub(r"\d+\.\d{3}", "#", text).split("...")]
        wanted = where.partition(":")[0] + r":\d+ [\d.]+ ms " + ".*".join(parts)
        wanted = wanted.replace(r"\#", r"\d+\.\d{3}").replace("#", r"\d+\.\d{3}")
        assert any(re.search(wanted, each) for each in rest), line


def test_the_life_of_a_job_in_design_md_is_that_of_its_functions():
    arrows = re.findall(r"^    (\S+) --> (\S+): (\w+)", DESIGN, re.MULTILINE)
    assert {state for each in arrows for state in each[:2]} == {*database.STATES, "[*]"}
    assert {name for *_, name in arrows} == set(
        "enqueue claim finish cancel retry_dead prune".split()
    )
    assert all(hasattr(database, name) for *_, name in arrows)


def test_the_table_of_guards_is_that_of_the_mutants():
    section = DESIGN.partition("## Why is this line here?")[2].partition("\n## ")[0]
    shown = [row for row in section.splitlines() if row.startswith("| `")]

    def cell(text: str) -> str:
        return text.replace("|", r"\|")

    def code(text: str) -> str:
        return f"`{cell(text)}`" if text else "nothing"

    assert shown == [f"| {code(m.old)} | {code(m.new)} | {cell(m.why)} |" for m in mutants.table()]


def test_the_files_that_the_documents_name_are_there():
    for name in set(re.findall(r"`([a-z_]+\.(?:py|md|json|txt))`", README + DESIGN)):
        assert (ROOT / name).exists(), name


def test_the_transcript_has_the_shape_of_what_is_printed(queue):
    """The README's first command, less the installation, prints what the README shows."""
    line = next(line for line in README.splitlines() if line.startswith("python3 -m venv"))
    job = line.partition("-qr requirements.txt && ")[2].replace("python3 queuectl.py", "$q")
    shown = README.partition("It prints:\n\n```\n")[2].partition("\n```")[0]
    import subprocess
    import sys

    queue.configure()
    script = f'q() {{ {sys.executable} {ROOT}/queuectl.py "$@"; }}\n{job.replace("$q", "q")}'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=queue.environment, timeout=60
    )
    assert done.returncode == 0, done.stderr

    def shape(text: str) -> list[str]:
        text = re.sub(
            r"\d\d:\d\d:\d\d|pid \d+ +| on \S+;|\bw\d\b|\d+(\.\d+)? m?s\b|\d+\.\d+", "#", text
        )
        return sorted(re.sub(r" +", " ", text).splitlines())

    assert shape(done.stdout) == shape(shown)


EXERCISES = DESIGN.partition("\n## Exercises")[2].partition("\n## ")[0].split("\n### ")[1:]


@pytest.mark.parametrize("text", EXERCISES, ids=lambda text: text.partition("\n")[0])
def test_an_exercise_changes_a_line_that_is_there_and_says_what_to_run(text):
    changes = re.findall(r"\*\*Change\*\* in `(\S+)` of `(\S+)`: `(.+)` becomes (.+)\.\n", text)
    assert changes and text.count("**Change**") == len(changes)
    assert text.count("**Run**") == text.count("*What one sees*") == len(changes)
    for name, file, old, new in changes:
        put = "" if new == "nothing" else new.strip("`")
        mutants.changed(mutants.Mutant(file, old, put, "", ""))  # raises if it is not there, once
        place = {"database.py": database, "worker.py": worker}[file]
        for part in name.split("."):
            place = getattr(place, part)
        source = str(place).replace("\n", "") if name == "SCHEMA" else inspect.getsource(place)
        assert old.strip('",') in source


def test_there_are_five_exercises_and_what_they_tell_to_run_is_there():
    assert len(EXERCISES) == 5
    for scene in re.findall(r"queuectl\.py demo (\w+)", DESIGN):
        assert scene in SCENES
