"""How the house is built: which file may import, start, print what; and what lies at the top."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Queue

import config

ARROWS = {  # which of our own files each may import
    "queuectl": {"worker", "dashboard", "database", "config"},
    "worker": {"database", "config"},
    "dashboard": {"database"},
    "database": set(),
    "config": set(),
}
AT_THE_TOP = set(
    "queuectl.py worker.py database.py config.py config.json dashboard.py dashboard.html"
    " design.md README.md requirements.txt tests".split()
)
STARTS_PROCESSES = {"subprocess", "multiprocessing", "pty", "concurrent", "asyncio"}
OF_PROCESSES = re.compile(  # attributes of os, and what is imported from it
    r"kill|killpg|forkpty|fork|system|popen|exec[lv]\w*|spawn\w+|posix_spawnp?|pidfd_open|setsid"
)
HEAVY = set(  # what `enqueue` has no use for
    "multiprocessing http.server subprocess statistics tempfile random asyncio".split()
)


def rooms() -> list[str]:
    return sorted(path.stem for path in ROOT.glob("*.py"))


def tree(room: str) -> ast.Module:
    return ast.parse((ROOT / f"{room}.py").read_text())


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the full names of all that is imported anywhere below, inside functions too."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "a relative import"
            yield found.module


def top_names(room: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(tree(room))}


def os_uses(room: str) -> set[str]:
    """Return the names of the module os that a file uses."""
    used = set()
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used |= {node.attr} if node.value.id == "os" else set()
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "posix"):
            used |= {alias.name for alias in node.names}
    return used


def without_main(module: ast.Module) -> list[ast.stmt]:
    """Return the statements of a file but for `if __name__ == "__main__":`."""
    return [
        node
        for node in module.body
        if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    ]


def prints(statements: list[ast.stmt]) -> set[str]:
    """Return in what ways these statements can write to the terminal."""
    found = set()
    for node in (each for statement in statements for each in ast.walk(statement)):
        if isinstance(node, ast.Name) and node.id in ("print", "input", "click"):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sys":
            found |= {node.attr} & {"stdout", "stderr", "__stdout__", "__stderr__"}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "os.write":
            found |= {"os.write"} if ast.unparse(node.args[0]) in ("1", "2") else set()
    return found


def functions(room: str) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a file and the methods of its classes, public ones."""
    for node in tree(room).body:
        body = node.body if isinstance(node, ast.ClassDef) else [node]
        for each in body:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                if not each.name.startswith("_") or each.name == "__init__":
                    yield each


@pytest.mark.parametrize("room", rooms())
def test_imports_run_down_the_list(room: str) -> None:
    ours = top_names(room) & {*rooms(), *ARROWS}
    assert ours <= ARROWS[room], f"{room}.py imports {ours - ARROWS[room]}"


@pytest.mark.parametrize("room", rooms())
def test_click_is_the_only_package(room: str) -> None:
    foreign = top_names(room) - {*rooms(), *sys.stdlib_module_names}
    assert foreign <= ({"click"} if room == "queuectl" else set())
    assert "importlib" not in top_names(room), "an import that this test would not see"
    assert "__import__" not in (ROOT / f"{room}.py").read_text()


@pytest.mark.parametrize("room", rooms())
def test_only_the_memory_knows_sqlite(room: str) -> None:
    assert ("sqlite3" in top_names(room)) == (room == "database")


@pytest.mark.parametrize("room", rooms())
def test_only_the_hands_start_or_end_processes(room: str) -> None:
    used = top_names(room) & STARTS_PROCESSES
    used |= {name for name in os_uses(room) if OF_PROCESSES.fullmatch(name)}
    if room == "worker":
        assert used == {"kill", "setsid", "subprocess", "multiprocessing"}
    else:
        assert used == set()


@pytest.mark.parametrize("room", rooms())
def test_only_the_face_prints(room: str) -> None:
    found = prints(without_main(tree(room)))
    if room == "queuectl":
        assert found >= {"click", "stdout"}, "then this test sees nothing"
    else:
        assert found == set()
    if room == "database":
        assert prints(tree(room).body) == {"print"}, "python3 database.py says what it has made"


@pytest.mark.parametrize("words", [["--command", "true"], ['{"command": "true"}'], ["-"]], ids=str)
def test_enqueue_loads_only_what_it_needs(queue: Queue, words: list[str]) -> None:
    def loaded(*arguments: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *arguments],
            input='{"command": "true"}',
            capture_output=True,
            text=True,
            env=queue.environment,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.M))

    os.mkdir(queue.path + ".run", 0o700)  # as if workers had been here: the bell is looked for
    found = loaded(str(ROOT / "queuectl.py"), "enqueue", *words)
    assert {"click", "sqlite3", "database", "config"} <= found, "then this test sees nothing"
    here_anyway = loaded("-c", "import click, sqlite3")  # some versions of click load more
    assert found & HEAVY <= here_anyway, (found & HEAVY) - here_anyway


def test_nothing_else_lies_at_the_top() -> None:
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or "queuectl.py" not in done.stdout.splitlines():
        pytest.skip("not a git checkout")
    names = {name.partition("/")[0] for name in done.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= AT_THE_TOP


@pytest.mark.parametrize("every, code", [("1", 1), ("", 0)])
def test_where_all_parts_are_installed_a_skip_is_a_failure(
    tmp_path: Path, every: str, code: int
) -> None:
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it(): pytest.skip('why')\n")
    words = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider"]
    env = os.environ | {"QUEUECTL_TEST_ALL": every, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, "why" in done.stdout) == (code, bool(code)), done.stdout


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]), ids=lambda path: path.name
)
def test_lines_are_no_longer_than_100(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("room", rooms())
def test_public_functions_have_type_hints(room: str) -> None:
    bare = []
    for function in functions(room):
        of = function.args
        arguments = [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg]
        hints = [each.annotation for each in arguments if each and each.arg not in ("self", "cls")]
        hints += [function.returns] if function.name != "__init__" else []
        bare += [function.name] if None in hints else []
    assert bare == []
    assert list(functions(room)), "then this test sees nothing"


def test_the_settings_file_holds_the_defaults() -> None:
    defaults = {key: setting.default for key, setting in config.SETTINGS.items()}
    text = (ROOT / "config.json").read_text()
    assert text == json.dumps(defaults, indent=2) + "\n"
