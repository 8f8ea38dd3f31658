"""The tables of ``methods.md``, from the register of methods: ``python -m docs.methods`` writes the page anew."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from analysis.steps.methods import METHODS
from analysis.steps.register import ENERGY, Method, exact
from analysis.steps.settings import Setting
from experiments.finetune.methods import methods
from lance_ref.io.whole_file import write_text

PAGE = Path(__file__).with_name("methods.md")
MARK = "<!-- from here on written by python -m docs.methods -->\n"


def tables() -> str:
    """Methods of the cost model and of the planner, then those of the fine-tuning experiment."""
    columns = (
        "method",
        "what it is",
        "settings (default)",
        "how much of the weight gradient of a layer that trains is kept",
    )
    step = [(f"`{name}`", of.about, _settings(of.settings), _kept(of)) for name, of in METHODS.items()]
    trained = [(f"`{name}`", of.about, _settings(of.settings)) for name, of in methods().items()]
    return (
        f"\n## In the cost model and the planner\n\n{_table(columns, step)}\n"
        "## In the fine-tuning experiment\n\n"
        "`METHOD@VALUE` sets the first setting of a method, as `lance@0.8`.\n\n"
        f"{_table(columns[:3], trained)}"
    )


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [columns, ["---"] * len(tuple(columns)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _settings(settings: Iterable[Setting]) -> str:
    return ", ".join(f"`{of.option}`" + (f" ({of.default:g})" if of.default is not None else "") for of in settings)


def _kept(method: Method) -> str:
    if method.fidelity == ENERGY:
        return "the share of the activation's energy that its directions keep"
    if isinstance(method.fidelity, str):
        return f"not predicted: {method.fidelity}"
    return "all of it" if method.fidelity is exact else "by a formula"


if __name__ == "__main__":
    write_text(PAGE, PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + tables())
