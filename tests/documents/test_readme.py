"""README and pages tell the truth: examples print what they say, commands and options exist, links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
PAGES.remove(ROOT / "docs" / "contents.md")
MARK = "---- block ----\n"
ALWAYS = {"--help", "-h"}
"""Options that every command has."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), flags=re.M | re.S)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def can_export() -> bool:
    """Whether PyTorch can write an ONNX file here."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "onnx"))


def runs_here(code: str) -> bool:
    return can_export() or not ("import torch" in code or "torch.onnx" in code or "model.onnx" in code)


# ---- examples ----------------------------------------------------------------------------------------------


def run_blocks(page: Path, folder: Path) -> list[tuple[str, str, str | None]]:
    """Run a page's Python blocks in one process and folder: code, what it printed, and the text block that follows.

    A block that begins with the name of a file, ``# my_net.py``, is written to that file instead.
    """
    pairs = re.findall(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", text_of(page), flags=re.M | re.S)
    wanted = []
    for code, expected in pairs:
        file = re.match(r"# (\w+\.py)\n", code)
        if file is not None:
            (folder / file[1]).write_text(code, encoding="utf-8")
        elif runs_here(code):
            wanted.append((code, expected or None))
    script = "".join(f"print({MARK!r}, end='')\n{code}" for code, _ in wanted)
    (folder / "blocks.py").write_text(script, encoding="utf-8")
    words = [sys.executable, "blocks.py"]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{name_of(page)}:\n{done.stderr}"
    printed = done.stdout.split(MARK)[1:]
    return [(code, out, expected) for (code, expected), out in zip(wanted, printed, strict=True)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    """To the letter, where a text block follows; commands that use the files of the page run in the same folder."""
    for code, printed, expected in run_blocks(page, tmp_path):
        assert expected is None or printed == expected, code
    own = [file.stem for file in tmp_path.glob("*.py")] + ["model.onnx"]
    for command in "".join(blocks(page, "sh")).splitlines():
        if any(re.search(rf"--net {re.escape(name)}\b", command) for name in own) and runs_here(command):
            words = [sys.executable, *shlex.split(command)[1:]]
            done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_pages_with_examples_are_found() -> None:
    """Not by accident none: these have blocks, and those of own networks write files that commands use."""
    having = {name_of(page) for page in PAGES if blocks(page, "python")}
    assert {"README.md", "docs/own_networks.md", "docs/own_method.md", "docs/conformance.md"} <= having


def test_a_wrong_output_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n", encoding="utf-8")
    assert [run[1:] for run in run_blocks(page, tmp_path)] == [("", None), ("2\n", "3\n")]


# ---- the first screen --------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    """One screen and a half: what is longer is not read, and belongs on a page."""
    assert len(text_of(README).splitlines()) <= 150


def test_the_first_example_is_short() -> None:
    """A first example of more than 12 lines is not read."""
    code = blocks(README, "python")[0].splitlines()
    assert len([line for line in code if line.strip()]) <= 12


def test_commands_are_stated_as_they_are_run() -> None:
    """The commands stand in the README as whole lines that do their own set-up."""
    commands = [line for block in blocks(README, "sh") for line in block.splitlines()]
    assert "python -m pip install -e . && python -m analysis.cost_model --net mobilenetv2" in commands
    assert "python -m pip install -e '.[test]' && python -m pytest" in commands
    assert "python -m pip install -e '.[docs]' && python -m docs" in commands


def test_the_printed_totals_are_todays(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README shows is, to the letter, how the output of the command begins."""
    from analysis.cost_model import main

    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--net", "mobilenetv2"]) == 0
    shown = next(block for block in blocks(README, "text") if "tape + factors" in block)
    assert capsys.readouterr().out.startswith(shown)
    assert "bp / lance" in shown


def test_the_page_of_methods_is_that_of_the_register() -> None:
    """After a change of an entry: python -m docs.methods."""
    from docs.methods import MARK, PAGE, tables

    assert text_of(PAGE).partition(MARK)[2] == tables()


def test_the_map_names_every_file_and_no_other() -> None:
    """By package, in the table below each package's heading."""
    named: set[str] = set()
    for part in re.split(r"^##+ ", text_of(ROOT / "docs" / "map.md"), flags=re.M)[1:]:
        folder = part.partition("\n")[0]
        named |= {f"{folder}/{name}" for name in re.findall(r"^\| `(\w+\.py)`", part, flags=re.M)}
    there = {
        path.relative_to(ROOT).as_posix()
        for package in ("lance_ref", "analysis", "experiments")
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("__")
    }
    assert named == there


# ---- commands ----------------------------------------------------------------------------------------------


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Modules of this repository that a page runs with ``python -m``, and the options that it gives them."""
    text = re.sub(r"\\\n\s*", " ", text_of(page))
    shell = [
        line for block in re.findall(r"^```sh\n(.*?)^```$", text, flags=re.M | re.S) for line in block.splitlines()
    ]
    inline = re.findall(r"`([^`]+)`", without_blocks(text))
    found = []
    for command in shell + [" ".join(words.split()) for words in inline]:
        ours = r"python -m ((?:lance_ref|analysis|experiments|benchmarks|docs)\b[\w.]*)([^&|]*)"
        for module, rest in re.findall(ours, command):
            found.append((module, re.findall(r"(?<=\s)--[a-z][\w-]*", rest)))
    return found


@cache
def help_of(module: str) -> str:
    """What ``python -m module --help`` prints, without a process of its own."""
    printed = io.StringIO()
    before, code = sys.argv, None
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported already
            runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    assert code == 0, module
    return printed.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    for module, options in commands(page):
        known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(module))) | ALWAYS
        assert set(options) <= known, f"python -m {module}: {sorted(set(options) - known)}"


def test_an_unknown_option_is_noticed() -> None:
    assert ("analysis.plan", ["--net", "--budget", "--image-size", "--num-classes"]) in commands(
        ROOT / "docs" / "planner.md"
    )
    assert "--no-such-option" not in help_of("analysis.plan")


# ---- links -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a link may name after ``#``: headings as GitHub makes them, and labels of this site."""
    text = without_blocks(text_of(page))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r"^\((\w+)\)=$", text, flags=re.M))


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a text on a page that lead to no file, to a file outside, or to no heading."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        known = file.is_file() and file.is_relative_to(ROOT)
        if not known or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, text_of(page)) == []


def test_a_broken_link_is_noticed() -> None:
    page = ROOT / "docs" / "planner.md"
    text = (
        "[a](nowhere.md) [b](notation.md#no-such-heading) [c](../README.md#lessons) [d](https://arxiv.org) [e](../docs)"
    )
    assert broken_links(page, text) == ["nowhere.md", "notation.md#no-such-heading", "../docs"]
