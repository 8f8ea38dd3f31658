"""Do the lessons still print what they show? ``python notebooks/check.py [--write] [NOTEBOOK ...]``

Runs notebooks (by default all of this folder) from the top, offline and without external data, and compares
what their cells print with the outputs that are committed. Text must be equal; of a figure only its being there
is compared, as pixels depend on fonts. A cell tagged ``varies`` (times, last digits) must run, but may print
anything. Python blocks in ``<details>``, the solutions of exercises, run after the last cell, in order.

With ``--write`` the fresh outputs replace the committed ones, without times of execution. With ``--try`` each lesson
runs once for every value that it proposes behind a number (``# try: 0.5, 0.9``), and has to reach its end.
Exits with 1 if anything differs, raises or takes too long.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
VARIES = "varies"
"""Tag of a cell whose output is not compared."""
SECONDS = 120
"""A lesson may take this long on two cores."""
CELL_LINES = 25
"""A longer cell is not read, unless it is folded."""
FOLDED = "hide-input"
"""Tag of a cell whose code is folded, in JupyterLab and on the site: drawing, and helpers."""
CHECKED = "LANCE_REF_LESSON_CHECKED"
"""Set while a lesson is checked: ``course.expect`` raises, and ``course.explore`` draws without sliders."""
TRY = re.compile(r"^(\w+(?:, \w+)*) = (.+?)  # try: (.+)$", re.M)
"""A number that the reader may change, and values to change it to."""

Cell = Mapping[str, Any]
Notebook = Mapping[str, Any]


def read(path: Path) -> dict[str, Any]:
    """The notebook of a file, as JSON."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def source(cell: Cell) -> str:
    """The text of a cell; a file may keep it as a list of lines."""
    return "".join(cell["source"])


def code_cells(notebook: Notebook) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def solutions(notebook: Notebook) -> list[str]:
    """Python blocks inside of ``<details>``, in order."""
    prose = "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    hidden = "\n".join(re.findall(r"<details>.*?</details>", prose, flags=re.S))
    return re.findall(r"^```python\n(.*?)^```$", hidden, flags=re.M | re.S)


# ---- without running anything ---------------------------------------------------------


def structure_faults(notebook: Notebook) -> list[str]:
    """What a lesson lacks, one line each: a question, the cell that installs, exercises, outputs, an answer.

    Parameters
    ----------
    notebook : mapping
        As :func:`read` gives it.
    """
    cells, code = notebook["cells"], code_cells(notebook)
    if not code:
        return ["there is no code"]
    faults = []
    title = source(cells[0]).lstrip().partition("\n")[0]
    if cells[0]["cell_type"] != "markdown" or not re.fullmatch(r"# \d+\. .*\?", title):
        faults.append(f"the title is {title!r}, expected '# <number>. <question>?'")
    if "You need:" not in source(cells[0]):
        faults.append("the first cell does not say what one needs ('You need: …')")
    if not re.fullmatch(r"import course(  # .*)?", source(code[0]).strip()):
        faults.append("the first code cell is not the line 'import course', which is the set-up")
    for number, cell in enumerate(code, 1):
        lines = len(source(cell).splitlines())
        if lines > CELL_LINES and FOLDED not in cell["metadata"].get("tags", []):
            faults.append(f"code cell {number} has {lines} lines, expected at most {CELL_LINES}")
        if cell["execution_count"] != number:
            faults.append(f"code cell {number} was run as number {cell['execution_count']}: run all from the top")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                faults.append(f"code cell {number} shows an error: {output['ename']}: {output['evalue']}")
            elif output.get("name") == "stderr":
                faults.append(f"code cell {number} shows text on stderr: {''.join(output['text']).strip()[:80]!r}")
        faults += [f"code cell {number} {fault}" for fault in cell_faults(cell)]
    faults += exercise_faults(notebook)
    if notebook != normalised(notebook):
        faults.append("it has metadata of the program that saved it: 'python notebooks/check.py --write' removes them")
    if not re.search(r"^## The answer$", source(cells[-1]), flags=re.M):
        faults.append("the last cell is not '## The answer'")
    return faults


def cell_faults(cell: Cell) -> Iterator[str]:
    """What is wrong with one code cell."""
    text = source(cell)
    if "plt.subplots" in text and FOLDED not in cell["metadata"].get("tags", []):
        yield f"draws a figure and is not folded (tag {FOLDED!r})"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield f"asserts {ast.unparse(node.test)!r} without a sentence that says what it means if that fails"
    if any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in cell["outputs"]):
        yield "shows a widget, which is of no use without a kernel"


def exercise_faults(notebook: Notebook) -> Iterator[str]:
    """What a lesson lacks for the reader to do something: statements in code, predictions, numbers, exercises."""
    code, hidden = [source(cell) for cell in code_cells(notebook)], solutions(notebook)
    if not any("assert " in text for text in code):
        yield "nothing is asserted"
    if not any("**Predict" in source(cell) for cell in notebook["cells"]):
        yield "nothing is to be predicted ('**Predict before you run.** …')"
    if not any(TRY.search(text) for text in code):
        yield "no number is proposed for changing ('NAME = 3  # try: 1, 5')"
    pattern = r'course\.check\("(\d+\.\d+)"'
    asked, solved = (set(re.findall(pattern, "\n".join(texts))) for texts in (code, hidden))
    if not solved:
        yield "there is no exercise with a hidden solution (a Python block in <details>)"
    for number in sorted(asked ^ solved):
        yield f"exercise {number} has no {'solution that is checked' if number in asked else 'cell to write into'}"


def proposals(notebook: Notebook) -> dict[str, list[Any]]:
    """The numbers that a reader may change, and the values that the lesson proposes for each."""
    found = {}
    for cell in code_cells(notebook):
        for name, _, values in TRY.findall(source(cell)):
            found[name] = list(ast.literal_eval(f"[{values}]"))
    return found


def with_changes(notebook: Notebook, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook with other numbers: ``changes`` says which name is given which value."""
    changed: dict[str, Any] = json.loads(json.dumps(notebook))

    def replaced(match: re.Match[str]) -> str:
        return f"{match[1]} = {changes[match[1]]!r}" if match[1] in changes else match[0]

    for cell in changed["cells"]:
        if cell["cell_type"] == "code":
            cell["source"] = TRY.sub(replaced, source(cell))
    return changed


# ---- running ---------------------------------------------------------------------------


def kernel_environment(checked: bool = True) -> dict[str, str]:
    """The environment of a fresh machine: no folder of data, no cache, no network for data sets.

    Operations run one by one, so that last digits and bytes do not depend on which of them are joined.
    """
    left_out = ("LANCE_REF_DATA", CHECKED)
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {CHECKED: "1"} if checked else {}
    cache = str(FOLDER / "no-such-cache")
    return {**environment, "LANCE_REF_OFFLINE": "1", "LANCE_REF_CACHE": cache, "LANCE_REF_FUSE": "0"}


def execute(notebook: Notebook, folder: Path = FOLDER, checked: bool = True) -> tuple[dict[str, Any], list[str], float]:
    """Run all cells, then all solutions, in one fresh kernel.

    Parameters
    ----------
    notebook : mapping
    folder : Path
        Where the kernel starts.
    checked : bool
        Whether findings that do not hold are errors; without it solutions, which know the lesson's numbers, do not run.

    Returns
    -------
    fresh : dict
        The notebook with fresh outputs, without the solutions.
    faults : list of str
        Solutions that raise.
    seconds : float
        What it took, the start of the kernel included: by the clock, or of the processor where that is less.

    Raises
    ------
    RuntimeError
        If a cell raises or takes three times :data:`SECONDS`; says which, and what.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    work = nbformat.reads(json.dumps(notebook), as_version=4)
    runnable = [cell for cell in work.cells if cell.cell_type == "code"]
    for cell in runnable:
        cell.execution_count, cell.outputs = None, []
    hidden = [nbformat.v4.new_code_cell(text, metadata={"tags": ["raises-exception"]}) for text in solutions(notebook)]
    hidden = hidden if checked else []
    cells = len(work.cells)
    work.cells += hidden
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(work, timeout=3 * SECONDS, kernel_name="python3", resources=place)
    start, spent = time.perf_counter(), _children_seconds()
    try:
        client.execute(env=kernel_environment(checked))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        last = max((n for n, cell in enumerate(runnable, 1) if cell.execution_count is not None), default=1)
        what = (errors_of(runnable[last - 1]) or [one_line(str(error))])[0]
        raise RuntimeError(f"code cell {last} fails: {what}") from error
    clock, processor = time.perf_counter() - start, _children_seconds() - spent
    seconds = min(clock, processor) if processor > 0 else clock  # others may use the machine as well
    faults = [f"solution {n} fails: {error}" for n, cell in enumerate(hidden, 1) for error in errors_of(cell)]
    del work.cells[cells:]
    return normalised(work), faults, seconds


def errors_of(cell: Cell) -> list[str]:
    """What a cell raised, on one line, with the line of the cell that raised it; nothing if it went well."""
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            traceback = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(output["traceback"]))
            lines = re.findall(r"^-+> *\d+ (.*)$", traceback, flags=re.M)
            where = f" (in {lines[0].strip()!r})" if lines else ""
            found.append(one_line(f"{output['ename']}: {output['evalue']}").rstrip(": ") + where)
    return found


def one_line(text: str) -> str:
    return " ".join(text.split())


def normalised(notebook: Notebook) -> dict[str, Any]:
    """The notebook without times, versions and execution metadata: the same run gives the same file."""
    plain: dict[str, Any] = json.loads(json.dumps(notebook))
    plain["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "name": "python", "pygments_lexer": "ipython3"},
    }
    for cell in plain["cells"]:
        tags = cell["metadata"].get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
        if tags and FOLDED in tags:
            cell["metadata"]["jupyter"] = {"source_hidden": True}
    return plain


# ---- comparing -------------------------------------------------------------------------


def output_faults(committed: Notebook, fresh: Notebook) -> list[str]:
    """Where the outputs of two runs of the same cells differ, one line each with both texts.

    Parameters
    ----------
    committed, fresh : mapping
        The same cells with their outputs.
    """
    faults = []
    pairs = zip(code_cells(committed), code_cells(fresh), strict=True)
    for number, (old, new) in enumerate(pairs, 1):
        if VARIES in old["metadata"].get("tags", []):
            continue
        for kind, before, now in differences(old, new):
            faults.append(f"code cell {number}, {kind}: committed {before!r}, but it gives {now!r}")
    return faults


def differences(old: Cell, new: Cell) -> Iterator[tuple[str, str, str]]:
    """Kind, old and new of each output of a cell that differs; of printed text, the first line that does."""
    before, now = printed(old).splitlines(), printed(new).splitlines()
    for i in range(max(len(before), len(now))):
        was, is_now = ("".join(lines[i : i + 1]) for lines in (before, now))
        if was != is_now or (i >= len(before)) != (i >= len(now)):
            yield f"line {i + 1}", was, is_now
            break
    shown_before, shown_now = displayed(old), displayed(new)
    if shown_before != shown_now:
        yield "results", "; ".join(shown_before), "; ".join(shown_now)


def printed(cell: Cell) -> str:
    """What a cell printed, in one piece, however the kernel cut it."""
    return "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")


def displayed(cell: Cell) -> list[str]:
    """Each result or figure of a cell: its text, and the kinds of data beside it."""
    shown = []
    for output in cell["outputs"]:
        if output["output_type"] in ("execute_result", "display_data"):
            kinds = sorted(kind for kind in output["data"] if kind != "text/plain")
            shown.append(" ".join(["".join(output["data"].get("text/plain", "")), *kinds]))
    return shown


def _children_seconds() -> float:
    """Of the processor, by all processes that this one has started and seen end; 0 where that is not told."""
    try:
        import resource
    except ImportError:
        return 0.0
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def check(path: Path) -> tuple[list[str], float]:
    """All faults of one file, and the seconds that its run took (0 if the structure was wrong)."""
    committed = read(path)
    faults = structure_faults(committed)
    if faults:
        return faults, 0.0
    try:
        fresh, faults, seconds = execute(committed, path.parent)
    except RuntimeError as error:
        return [str(error)], 0.0
    faults += output_faults(committed, fresh)
    if seconds > SECONDS:
        faults.append(f"it took {seconds:.0f} s, expected at most {SECONDS}")
    return faults, seconds


def write(path: Path) -> tuple[list[str], float]:
    """Run a notebook and put the fresh outputs in its place, whole or not at all; structure faults and seconds."""
    from lance_ref.io.whole_file import write_text

    try:
        fresh, faults, seconds = execute(read(path), path.parent)
    except RuntimeError as error:
        return [f"not written: {error}"], 0.0
    if faults:
        return [f"not written: {fault}" for fault in faults], seconds
    write_text(path, json.dumps(fresh, indent=1, ensure_ascii=False) + "\n")
    return structure_faults(fresh), seconds


def try_numbers(path: Path) -> tuple[list[str], float]:
    """Run a lesson once for every value that it proposes; which of them halt it, and the seconds of all runs."""
    committed, faults, total = read(path), [], 0.0
    for name, values in proposals(committed).items():
        for value in values:
            try:
                total += execute(with_changes(committed, {name: value}), path.parent, checked=False)[2]
            except RuntimeError as error:
                faults.append(f"with {name} = {value!r}, {error}")
    return faults, total


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python notebooks/check.py", description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="files; by default all of this folder")
    parser.add_argument("--write", action="store_true", help="replace the committed outputs by fresh ones")
    parser.add_argument("--try", action="store_true", dest="change", help="run with every value that a lesson proposes")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.notebooks if not path.is_file()]
    if missing:
        parser.exit(2, f"{parser.prog}: error: no such file: {', '.join(missing)}\n")
    failed = False
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        run = write if options.write else try_numbers if options.change else check
        faults, seconds = run(path)
        failed |= bool(faults)
        good = {write: "written", try_numbers: "runs with other numbers", check: "as committed"}[run]
        print(f"{path.name}: {'FAILED' if faults else good} ({seconds:.1f} s)", flush=True)
        for fault in faults:
            print(f"  {fault}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
