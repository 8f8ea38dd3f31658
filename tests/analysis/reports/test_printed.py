"""What is printed: every number of the JSON stands in the text whole, and growth is called growth."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import cost
from analysis.commands import shipped
from analysis.cost_model import main
from analysis.reports.tables import change, explain, render
from analysis.steps.methods import METHODS
from lance_ref import Subspace, models
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.stores import Lance

CASES = [(net, count) for net in models.names() for count in (1, 4)] + [("mobilenetv2", 15), ("mlp", 9)]


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))


@pytest.mark.parametrize(("net", "count"), CASES)
def test_no_digit_is_cut_off(net: str, count: int) -> None:
    """Totals of every method and, where the tables of layers have them, the bytes of every layer."""
    report = cost(net, batch=2, method=list(METHODS)[:count])
    shown = numbers(render(report, wide=True))
    totals = report.to_json()["totals"]
    for method, of in totals.items():
        wanted = [f"{n / 2**20:,.3f}" for n in of["activation_bytes"].values()]
        wanted += [f"{of['flops']['total'] / 1e9:,.3f}", f"{of['activation_bytes']['tape']:,}"]
        if of["flops"]["total"]:
            wanted.append(f"{of['flops']['total'] / 1e6:,.3f}")
        if report.totals[method].subspace_bytes:
            wanted.append(f"{report.totals[method].subspace_bytes:,}")
        assert set(wanted) <= shown, method
    for row in report.rows:
        for cost_ in row.methods.values():
            assert f"{cost_.activation_bytes['tape']:,}" in shown or not cost_.activation_bytes["tape"], row.name


def test_a_wide_report_says_the_order_of_every_compressed_convolution() -> None:
    """The orders are those that the stores themselves name; a narrow report is silent about them."""
    report = cost("mobilenetv2", batch=16)
    said = " ".join(render(report, wide=True).split())
    for row in report.rows:
        ranks = row.methods["lance"].ranks
        if row.op == "conv2d" and ranks is not None and row.weight_shape is not None:
            assert row.name in said.split("lance's weight gradients.")[1]
            geometry = ConvGeometry(row.input_shape, row.weight_shape, groups=row.input_shape[1] // row.weight_shape[1])
            if row.weight_shape[2:] == (3, 3):
                geometry = dataclasses.replace(geometry, padding=((1, 1), (1, 1)))
            store = Lance(Subspace.random(row.input_shape, ranks, np.random.default_rng(0)))
            of_store = store.order_for(geometry).replace("channel", "channels")
            assert re.search(rf"\b{of_store}: [^;:]*{re.escape(row.name)}", said)
    assert "Order of contraction" not in render(report)


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_a_narrow_pipe_or_terminal_cuts_nothing(columns: str) -> None:
    """The table is as wide as it must be, whatever COLUMNS says."""
    command = [
        sys.executable,
        "-m",
        "analysis.cost_model",
        "--net",
        "mobilenetv2",
        "--method",
        "bp",
        "head-only",
        "lance",
        "--wide",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": columns}, check=True)
    assert "65,643.856" in done.stdout
    assert "…" not in done.stdout


def test_growth_is_called_growth() -> None:
    """Where LANCE takes more memory, that is said, first, and never as shrinking by a number below one."""
    assert change(0.5).startswith("grows 2.00 times")
    report = cost("mobilenetv3-small", batch=8, method=["bp", "lance"])
    (sentence, *_) = explain(report)
    ratio = report.totals["bp"].activation_bytes["tape"] / report.totals["lance"].tape_and_factors
    assert ("grows" in sentence) == (ratio < 0.98)
    assert not re.search(r"shrinks? (by )?0\.", sentence)


@pytest.mark.parametrize("what", ["folder", "file in it"])
def test_a_folder_of_that_name_where_the_command_runs_changes_nothing(tmp_path: Path, what: str) -> None:
    """Shipped spectra are found beside the code."""
    (tmp_path / "analysis").mkdir()
    if what == "file in it":
        (tmp_path / "analysis" / "data").mkdir()
    command = [sys.executable, "-m", "analysis.cost_model", "--net", "mobilenetv2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["ranks_from"].startswith("spectra shipped as analysis/data/mobilenetv2_224.json")


def test_a_shipped_file_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never other ranks in its place."""
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mobilenetv2_224\.json is missing, which is a part of the package"):
        cost("mobilenetv2", batch=3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--net", "convnet", "--epsilon", "0.8"], "--epsilon has no effect here: no rank is chosen by energy"),
        (
            ["--net", "convnet", "--method", "bp", "--epsilon", "0.8"],
            "--epsilon has no effect here: it needs one of lance, ",
        ),
        (["--net", "mobilenetv2", "--ranks", "0.5", "--epsilon", "0.8"], "--epsilon has no effect here"),
        (["--net", "convnet", "--patch", "4"], "--patch has no effect here: it needs one of gradient-filter"),
        (["--net", "convnet", "--lora-rank", "8"], "--lora-rank has no effect"),
        (["--net", "convnet", "--method", "bp", "--ranks", "0.5"], "--ranks has no effect"),
        (["--net", "convnet", "--ranks", "conv2=-,-,-,-"], "which compresses nothing; write conv2=exact"),
        (["--net", "convnet", "--batch", "1" + "0" * 30], "expected a positive integer, at most 2147483647"),
        (["--net", "convnet", "--continual", "1000000000000"], "expected a positive integer, at most 1000"),
        (["--net", "convnet", "--plot", "x.gif"], "--plot is 'x.gif', expected a name that ends in .png or .svg"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[Any]
) -> None:
    """Not passed over: one line and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
