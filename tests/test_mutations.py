"""The list of planted faults fits the code, and the script that plants them sees what it should."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mutations import LIST, ROOT, Mutation, chosen, main, read_list

LEAST = 150


def test_the_list_fits_the_code() -> None:
    """Every old text is there exactly once and is changed; with the fault a module is still Python."""
    found, problems = read_list(), []
    for mutation in found:
        source = (ROOT / mutation.path).read_text(encoding="utf-8")
        try:
            planted = mutation.planted(source)
            if planted == source:
                problems.append(f"{mutation}: changes nothing")
            if mutation.path.endswith(".py"):
                ast.parse(planted, mutation.path)
        except (ValueError, SyntaxError) as error:
            problems.append(f"{mutation}: {error}")
        if not mutation.why or not (mutation.equivalent or mutation.tests):
            problems.append(f"{mutation.path}: {mutation.old!r} has no reason or no tests")
    assert not problems, "\n".join(problems)
    assert len(found) >= LEAST
    twice = [m for m, n in Counter((m.path, m.old, m.new) for m in found).items() if n > 1]
    assert not twice
    assert sum(m.equivalent for m in found) <= len(found) / 10


def test_the_tests_of_the_list_exist() -> None:
    """Each test that is named is a file, or a function or class in it."""
    missing, found = [], {}
    for name in sorted({test for mutation in read_list() for test in mutation.tests}):
        file, *parts = name.split("::")
        if file not in found:
            tree = ast.parse((ROOT / file).read_text()) if (ROOT / file).is_file() else None
            found[file] = {node.name for node in ast.walk(tree) if hasattr(node, "name")} if tree else None
        names = found[file]
        if names is None or any(re.sub(r"\[.*", "", part) not in names for part in parts):
            missing.append(name)
    assert not missing


# ---- the script, on a project of three functions ---------------------------------------------

MODULE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef slow(n):\n    return n > 0\n"
TESTS = (
    "import os, time\nfrom pkg.mod import add, slow, sub\n\n"
    "def test_add():\n    assert add(2, 3) == 5\n\n"
    "def test_weak():\n    assert sub(3, 0) == 3\n\n"
    "def test_slow():\n    while not slow(1):\n"
    "        open(os.environ['NOTE'], 'w').close()\n        time.sleep(0.05)\n"
)


def entry(file: str, old: str, new: str, *rest: str) -> str:
    return "\n".join([f'[["{file}"]]', f"old = '{old}'", f"new = '{new}'", *rest, ""])


SUM = entry("pkg/mod.py", "a + b", "a * b", "tests = 'tests/test_mod.py::test_add'", "why = 'sum'")
WEAK = entry("pkg/mod.py", "a - b", "a + b", "tests = 'tests/test_mod.py::test_weak'", "why = 'weak'")
SLOW = entry("pkg/mod.py", "n > 0", "n < 0", "tests = 'tests/test_mod.py::test_slow'", "why = 'slow'")
SAME = entry("pkg/other.py", "1 + 2", "2 + 1", "equivalent = 'addition commutes'")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working tree with the script, a module, and its tests."""
    root = tmp_path / "project"
    for folder in ("pkg", "tests/data", "tmp"):
        (root / folder).mkdir(parents=True)
    (root / "pkg" / "mod.py").write_text(MODULE)
    (root / "pkg" / "other.py").write_text("THREE = 1 + 2\n")
    (root / "tests" / "test_mod.py").write_text(TESTS)
    shutil.copy(Path(__file__).with_name("mutations.py"), root / "tests")
    return root


def start(root: Path, entries: str, *arguments: str) -> subprocess.Popen[str]:
    (root / "tests" / "data" / "mutations.toml").write_text(entries)
    temporary = root.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    env = {
        **os.environ,
        "TMPDIR": str(temporary),
        "NOTE": str(root.parent / "note"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the project needs none, and Hypothesis takes half a second to import
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "tests/mutations.py", *arguments]
    return subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background of a shell
    )  # fmt: skip


def finish(root: Path, entries: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code and outputs; checks that the tree is as it was and that no temporary file is left."""
    process = start(root, entries, *arguments)
    out, err = process.communicate(timeout=120)
    assert_untouched(root)
    return process.returncode, out, err


def assert_untouched(root: Path) -> None:
    assert (root / "pkg" / "mod.py").read_text() == MODULE
    assert not list((root.parent / "temporary").iterdir())


def test_killed_alive_and_equivalent(project: Path) -> None:
    """Each fault is told apart; one that lives is shown and makes the exit code 1."""
    code, out, err = finish(project, SUM + WEAK + SAME, "--jobs", "2")
    assert (code, err) == (1, "")
    assert "killed pkg/mod.py: sum" in out
    assert "alive: pkg/mod.py: weak\n  - 'a - b'\n  + 'a + b'\n  tests/test_mod.py::test_weak" in out
    assert out.endswith("1 of 2 killed (50.0 %), 1 alive, 1 equivalent\n")
    code, out, err = finish(project, SUM + WEAK + SAME, "pkg/other.py")
    assert (code, err) == (0, "")
    assert out.endswith("0 of 0 killed, 0 alive, 1 equivalent\n")


def test_a_test_that_fails_anyway_kills_nothing(project: Path) -> None:
    """Tests that fail without a fault would kill everything: refused before any is planted."""
    (project / "tests" / "test_mod.py").write_text(TESTS.replace("== 5", "== 6"))
    code, out, err = finish(project, SUM)
    assert code == 2
    assert "the tests do not pass without a fault" in err
    assert "killed" not in out


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C as on POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing_behind(how: signal.Signals, project: Path) -> None:
    """One line and 130; the tests that ran are ended, the copy is removed."""
    note = project.parent / "note"
    process = start(project, SLOW)
    for _ in range(1200):
        if note.exists():
            break
        time.sleep(0.05)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "mutations.py: stopped; nothing is left behind\n")
    assert_untouched(project)
    note.unlink()
    time.sleep(0.3)
    assert not note.exists()  # nobody writes any more


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """One line and 2 before anything is copied."""
    for arguments, says in ((["--jobs", "0"], "--jobs is 0"), (["LICENSE"], "no fault in LICENSE is listed")):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert says in message
        assert len(message.splitlines()) == 1
    for arguments in (["--jobs", "two"], ["--job"], ["--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_paths_choose_and_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """A file takes its own faults, a folder those of the files in it; ``--list`` plants none."""
    every = read_list()
    file = next(mutation.path for mutation in every if "/" in mutation.path)
    assert {m.path for m in chosen(every, [str(ROOT / file)])} == {file}
    folder = Path(file).parts[0]
    assert {m.path for m in chosen(every, [str(ROOT / folder)])} == {
        m.path for m in every if m.path.startswith(f"{folder}/")
    }
    assert main(["--list", str(ROOT / file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == sum(m.path == file for m in every)


def test_an_entry_without_its_parts_is_named(tmp_path: Path) -> None:
    """A forgotten reason or a misspelt name says what is there and what was expected."""
    path = tmp_path / "list.toml"
    path.write_text("[['a.py']]\nold = '1'\nnew = '2'\ntest = 'x'\n")
    with pytest.raises(ValueError, match=r"list.toml: an entry of a.py has \['new', 'old', 'test'\], expected"):
        read_list(path)
    with pytest.raises(ValueError, match=r"a.py has '1' 2 times, expected once"):
        Mutation("a.py", "1", "2", ("t",), "why", False).planted("11")
    assert LIST.is_file()
