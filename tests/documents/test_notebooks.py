"""The lessons are lessons, and print what they show; and what checks that would notice if they did not."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("*.ipynb"))

SETUP = "import course  # the set-up"
EXERCISE = """Double it.

<details><summary>Solution</summary>

```python
assert 2 * total == 84
assert course.check("1.3", {"matmul", "cross_entropy"})
```

</details>
"""
SUM = """total = 6 * 7
WIDTH = 7  # try: 8, 9
assert total == 42, "Six by seven is another number."
course.expect(WIDTH == 7, "The width is seven.")
print('first')
print('total', total)"""
WIDGET = "application/vnd.jupyter.widget-view+json"
DRAW = "import matplotlib.pyplot as plt\n\nfigure, axis = plt.subplots()"
SAVED_BY_A_PROGRAM = {"kernelspec": {"name": "python3"}, "language_info": {"name": "python", "version": "3.11.7"}}


def load_check() -> ModuleType:
    """``notebooks/check.py``, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("notebooks_check", NOTEBOOKS / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load_check()


def markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text, "id": f"m{abs(hash(text))}"[:16]}


def code(number: int, text: str, printed: str = "", result: str = "", tags: tuple[str, ...] = ()) -> dict[str, Any]:
    """A cell that was run, with what it printed and its result."""
    outputs: list[dict[str, Any]] = []
    if printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if result:
        data = {"text/plain": [result]}
        outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data})
    metadata = {"tags": list(tags)} if tags else {}
    cell = {"cell_type": "code", "execution_count": number, "metadata": metadata, "id": f"c{number}"}
    return {**cell, "source": text, "outputs": outputs}


def tiny() -> dict[str, Any]:
    """A lesson of four code cells, as it would be committed."""
    cells = [
        markdown("# 1. What is six by seven?\n\nYou need: to count. **Predict before you run.** It is even."),
        code(1, SETUP),
        code(2, SUM, "first\ntotal 42\n"),
        code(3, "total + 1", result="43"),
        code(4, "import time\n\nprint(time.time())", "1.5\n", tags=("varies",)),
        code(5, 'course.check("1.3", None)', result="1.3: no answer yet"),
        markdown(EXERCISE),
        markdown("## The answer\n\nIt is 42."),
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    plain: dict[str, Any] = check.normalised(notebook)
    return plain


def run_check(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(NOTEBOOKS / "check.py"), *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def saved(folder: Path, notebook: dict[str, Any]) -> Path:
    if not (folder / "course").exists():
        (folder / "course").symlink_to(NOTEBOOKS / "course", target_is_directory=True)
    path = folder / "lesson.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_lessons_are_lessons(path: Path) -> None:
    """A committed lesson asks a question, installs only if needed, was run from the top, and shows no error."""
    assert check.structure_faults(check.read(path)) == []


def test_there_are_lessons() -> None:
    """Looking in the wrong folder would pass for want of lessons."""
    assert {"01_autograd_from_nothing", "02_where_the_bytes_are", "03_tensors_in_their_own_bases"} <= {
        path.stem for path in LESSONS
    }


def test_the_tiny_lesson_has_no_structure_faults() -> None:
    """The next test would show nothing if the lesson that it spoils were faulty before."""
    assert check.structure_faults(tiny()) == []


@pytest.mark.parametrize(
    ("cell", "changes", "fault"),
    [
        (0, {"source": "# 1. Six by seven\n\nYou need: to count. **Predict**"}, "the title is"),
        (0, {"source": "# 1. What is six by seven?\n\n**Predict**"}, "what one needs"),
        (0, {"source": "# 1. What is six by seven?\n\nYou need: to count."}, "nothing is to be predicted"),
        (1, {"source": "import course\nimport numpy"}, "is not the line 'import course'"),
        (2, {"execution_count": 7}, "was run as number 7"),
        (2, {"execution_count": None}, "was run as number None"),
        (2, {"source": SUM + "\ntotal" * 100}, "code cell 2 has 106 lines"),
        (
            2,
            {"source": SUM.replace("assert total == 42,", "print(42,").replace('number."', 'number.")')},
            "is asserted",
        ),
        (2, {"source": SUM.replace(', "Six by seven is another number."', "")}, "asserts 'total == 42' without"),
        (2, {"source": SUM.replace("  # try: 8, 9", "")}, "no number is proposed"),
        (3, {"source": DRAW}, "draws a figure and is not folded"),
        (3, {"outputs": [{"output_type": "error", "ename": "NameError", "evalue": "x", "traceback": []}]}, "NameError"),
        (3, {"outputs": [{"output_type": "stream", "name": "stderr", "text": ["a warning"]}]}, "stderr: 'a warning'"),
        (3, {"outputs": [{"output_type": "display_data", "data": {WIDGET: {}}}]}, "shows a widget"),
        (3, {"metadata": {"collapsed": False}}, "metadata of the program that saved it"),
        (5, {"source": "pass"}, "exercise 1.3 has no cell to write into"),
        (6, {"source": EXERCISE.replace("1.3", "1.2")}, "exercise 1.2 has no cell"),
        (7, {"source": "That was it."}, "not '## The answer'"),
    ],
)
def test_each_structure_fault_is_named(cell: int, changes: dict[str, Any], fault: str) -> None:
    """A rule that cannot fail is no rule: one planted fault for each, and nothing else is reported."""
    notebook = tiny()
    notebook["cells"][cell].update(changes)
    faults = check.structure_faults(notebook)
    assert fault in faults[0]
    assert len(faults) == 1 + (fault == "exercise 1.2 has no cell")  # and 1.3 has no solution


def test_no_exercise_and_no_solution() -> None:
    """A lesson without exercises is a lecture."""
    notebook = tiny()
    notebook["cells"][5]["source"], notebook["cells"][6]["source"] = "pass", "Double it."
    (fault,) = check.structure_faults(notebook)
    assert "no exercise with a hidden solution" in fault


def test_a_notebook_that_a_program_saved_again_is_a_fault() -> None:
    """JupyterLab writes its version and its state into a lesson as soon as it is open for two minutes."""
    (fault,) = check.structure_faults({**tiny(), "metadata": SAVED_BY_A_PROGRAM})
    assert "check.py --write" in fault


def test_wrong_outputs_are_found_and_varying_ones_left_alone() -> None:
    """A changed number, a line too few, a changed result or a lost figure is a fault; a time is not."""
    assert check.output_faults(tiny(), tiny()) == []

    changed = tiny()
    changed["cells"][4]["outputs"][0]["text"] = ["99.0\n"]  # tagged
    assert check.output_faults(changed, tiny()) == []

    changed = tiny()
    changed["cells"][2]["outputs"][0]["text"] = ["first\n", "total 41\n"]
    (fault,) = check.output_faults(changed, tiny())
    assert fault == "code cell 2, line 2: committed 'total 41', but it gives 'total 42'"

    changed = tiny()
    changed["cells"][2]["outputs"][0]["text"] = ["first\n"]
    (fault,) = check.output_faults(changed, tiny())
    assert "line 2: committed ''" in fault

    changed = tiny()
    changed["cells"][3]["outputs"][0]["data"]["text/plain"] = ["44"]
    (fault,) = check.output_faults(changed, tiny())
    assert fault == "code cell 3, results: committed '44', but it gives '43'"


def test_of_a_figure_only_its_presence_counts() -> None:
    """Pixels depend on fonts; whether there is a figure does not."""
    with_figure = tiny()
    picture = {"text/plain": ["<Figure size 10x10 with 1 Axes>"], "image/png": "abc"}
    with_figure["cells"][2]["outputs"].append({"output_type": "display_data", "metadata": {}, "data": picture})
    other_pixels = copy.deepcopy(with_figure)
    other_pixels["cells"][2]["outputs"][-1]["data"]["image/png"] = "xyz"
    assert check.output_faults(with_figure, other_pixels) == []
    (fault,) = check.output_faults(with_figure, tiny())
    assert "image/png" in fault


def test_printed_text_is_compared_in_one_piece() -> None:
    """A kernel may send one print in two messages; that is no difference."""
    cut = tiny()
    cut["cells"][2]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": "first\nto"},
        {"output_type": "stream", "name": "stdout", "text": "tal 42\n"},
    ]
    assert check.output_faults(cut, tiny()) == []


def test_a_wrong_number_and_a_wrong_solution_fail_the_run(tmp_path: Path) -> None:
    """The whole way, in a real kernel: a committed number that its cell does not print, a solution that raises."""
    notebook = tiny()
    notebook["cells"][2]["outputs"][0]["text"] = ["first\n", "total 41\n"]
    notebook["cells"][6]["source"] += EXERCISE.replace("84", "85")
    done = run_check(saved(tmp_path, notebook))
    assert done.returncode == 1, done.stderr
    status, *faults = [line.strip() for line in done.stdout.splitlines()]
    assert status.startswith("lesson.ipynb: FAILED")
    assert faults == [
        "solution 2 fails: AssertionError (in 'assert 2 * total == 85')",
        "code cell 2, line 2: committed 'total 41', but it gives 'total 42'",
    ]


def test_write_puts_the_fresh_outputs_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After --write the file has the outputs of the run, and a structure fault still fails the command."""
    notebook = tiny()
    notebook["cells"][2]["outputs"][0]["text"] = ["first\n", "total 41\n"]
    path = saved(tmp_path, notebook)
    monkeypatch.setattr(check, "execute", lambda notebook, folder: (check.normalised(tiny()), [], 1.0))
    assert check.main(["--write", str(path)]) == 0
    assert check.output_faults(check.read(path), tiny()) == []
    path = saved(tmp_path, {**notebook, "cells": notebook["cells"][:-1]})
    monkeypatch.setattr(check, "execute", lambda notebook, folder: (check.normalised(notebook), [], 1.0))
    assert check.main(["--write", str(path)]) == 1


def test_what_is_written_has_no_times_or_versions() -> None:
    """Else every run would change every notebook, and a change of an output would drown in it."""
    notebook = tiny()
    notebook["metadata"] = {"language_info": {"name": "python", "version": "3.11.7"}, "widgets": {}}
    notebook["cells"][4]["metadata"]["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    notebook["cells"][2]["metadata"]["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    plain = check.normalised(notebook)
    assert [cell["metadata"] for cell in plain["cells"]] == [{}, {}, {}, {}, {"tags": ["varies"]}, {}, {}, {}]
    assert set(plain["metadata"]) == {"kernelspec", "language_info"}
    assert "3.11.7" not in json.dumps(plain)


def test_nothing_is_written_if_a_cell_or_a_solution_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a run in place of a good lesson would be committed by the next who is in a hurry."""

    def raises(notebook: dict[str, Any], folder: Path) -> Any:
        raise RuntimeError("code cell 2 fails: NameError: name 'x' is not defined")

    path = saved(tmp_path, tiny())
    before = path.read_bytes()
    monkeypatch.setattr(check, "execute", raises)
    assert check.main(["--write", str(path)]) == 1
    monkeypatch.setattr(check, "execute", lambda notebook, folder: (tiny(), ["solution 1 fails: KeyError: 'y'"], 1.0))
    assert check.main(["--write", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "not written: code cell 2 fails: NameError" in printed
    assert "not written: solution 1 fails: KeyError" in printed
    assert path.read_bytes() == before
    assert list(tmp_path.glob("*.*")) == [path]


def test_a_missing_file_is_one_line() -> None:
    """Misspelt names are the user's most frequent mistake."""
    done = run_check(Path("no_such.ipynb"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no_such.ipynb" in done.stderr


def test_a_finding_is_an_error_only_while_lessons_are_checked(tmp_path: Path) -> None:
    """With another number the lesson runs to its end and says what is no longer so; else a wrong finding fails."""
    assert check.proposals(tiny()) == {"WIDTH": [8, 9]}
    changed = check.with_changes(tiny(), {"WIDTH": 8})
    assert "WIDTH = 8\n" in check.source(changed["cells"][2])
    assert changed["cells"][3] == tiny()["cells"][3]
    path = saved(tmp_path, changed)
    fresh, faults, _ = check.execute(check.read(path), tmp_path, checked=False)
    assert faults == []
    assert "With your numbers this is no longer so: The width is seven." in check.printed(fresh["cells"][2])
    with pytest.raises(RuntimeError, match=r"code cell 2 fails: AssertionError: this finding .* The width is seven"):
        check.execute(check.read(path), tmp_path)


def test_try_runs_every_proposed_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command names the value that halts a lesson, and goes on with the others."""
    ran = []

    def execute(notebook: dict[str, Any], folder: Path, checked: bool) -> Any:
        (width,) = (line for line in check.source(notebook["cells"][2]).splitlines() if line.startswith("WIDTH ="))
        ran.append(width)
        if width == "WIDTH = 9":
            raise RuntimeError("code cell 3 fails: KeyError: 9")
        return notebook, [], 1.0

    monkeypatch.setattr(check, "execute", execute)
    faults, seconds = check.try_numbers(saved(tmp_path, tiny()))
    assert ran == ["WIDTH = 8", "WIDTH = 9"]
    assert faults == ["with WIDTH = 9, code cell 3 fails: KeyError: 9"]
    assert seconds == 1.0


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_run_all_survives_other_numbers(path: Path) -> None:
    """The reader changes what the lesson proposes, and reaches the end; here the first proposal for every number."""
    lesson = check.read(path)
    changes = {name: values[0] for name, values in check.proposals(lesson).items()}
    fresh, _, _ = check.execute(check.with_changes(lesson, changes), NOTEBOOKS, checked=False)
    assert [cell["execution_count"] for cell in check.code_cells(fresh)][-1] == len(check.code_cells(lesson))


def test_the_committed_solution_of_the_project_reaches_all_three_checks() -> None:
    """The end of the course has to be reachable: the step fits, it is the right one, and the network learns."""
    (project,) = NOTEBOOKS.glob("11_*.ipynb")
    assert len(check.solutions(check.read(project))) == 3
    faults, _ = check.check(project)
    assert faults == []
