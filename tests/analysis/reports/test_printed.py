"""What is printed: orders of contraction are those of the stores, growth is called growth, no option is passed over."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from analysis import cost
from analysis.cost_model import main
from analysis.reports.tables import change, explain, render
from lance_ref import Subspace
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.stores import Lance


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


def test_growth_is_called_growth() -> None:
    """Where LANCE takes more memory, that is said, first, and never as shrinking by a number below one."""
    assert change(0.5).startswith("grows 2.00 times")
    report = cost("mobilenetv3-small", batch=8, method=["bp", "lance"])
    (sentence, *_) = explain(report)
    ratio = report.totals["bp"].activation_bytes["tape"] / report.totals["lance"].tape_and_factors
    assert ("grows" in sentence) == (ratio < 0.98)
    assert not re.search(r"shrinks? (by )?0\.", sentence)


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
