"""LANCE without the mean and LANCE centred, in the cost model: predicted, and measured on a real step."""

from __future__ import annotations

import json

import pytest

from analysis.cost_model import cost, main
from analysis.ranks.choose import mean_free

CASE = ["--net", "convnet", "--image-size", "16", "--batch", "4", "--num-classes", "5"]


def test_predicted_equals_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Every byte and multiply-add of both, beside plain LANCE, at full rank and at a fraction."""
    for ranks in ("1", "0.3"):
        methods = ["lance", "lance-mean-free", "lance-center"]
        assert main([*CASE, "--method", *methods, "--ranks", ranks, "--measure"]) == 0
        printed = capsys.readouterr().out
        assert "no difference" in printed
        assert "lance-center" in printed


def test_what_they_add() -> None:
    """conv3 of (2, 32, 4, 4) to 64 channels, 3x3: one direction fewer; a mean of 32 numbers and its gradient."""
    methods = ["bp", "lance", "lance-mean-free", "lance-center"]
    report = cost("convnet", batch=2, input_shape=(3, 16, 16), tune="conv3", methods=methods, ranks="conv3=2,32,4,4")
    row = json.loads(report.json_text())
    layer = next(each for each in row["layers"] if each["name"] == "conv3")["methods"]
    assert layer["lance-mean-free"]["ranks"] == [2, 31, 4, 4]
    assert layer["lance"]["subspace_bytes"] - layer["lance-mean-free"]["subspace_bytes"] == 32 * 4
    assert layer["lance-center"]["subspace_bytes"] - layer["lance"]["subspace_bytes"] == 32 * 4
    more = layer["lance-center"]["flops"]["grad_weight"] - layer["lance"]["flops"]["grad_weight"]
    assert more == 2 * (64 * 4 * 4 * 3 + 64 * 4 * 3 * 3 + 64 * 32 * 3 * 3)


def test_nothing_is_left_of_one_channel() -> None:
    """A layer of one input channel has its mean and nothing else."""
    with pytest.raises(ValueError, match="layer 'a' has one channel"):
        mean_free({"a": (2, 1, 1, 1)}, {"a": (4, 1, 8, 8)})
