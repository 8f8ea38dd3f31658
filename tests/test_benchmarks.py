"""The benchmark runs, writes what it prints, and times the same work on both sides."""

from __future__ import annotations

import cProfile
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cost_model, layers
from lance_ref import count_macs, trace
from lance_ref.activations import EXACT


def test_a_quick_run_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One small layer: every side has its seconds, and the file says where it comes from."""
    output = tmp_path / "layers.json"
    name = "1x1 160-960 at 7"
    assert layers.main(["--batch", "2", "--repeats", "2", "--layers", name, "--output", str(output)]) == 0
    document = json.loads(output.read_text(encoding="utf-8"))
    assert {"command", "versions", "machine"} <= set(document)
    (row,) = document["rows"]
    assert row["layer"] == name
    assert {"bp", "lance"} <= set(row["seconds"])
    assert all(0 < side["min"] <= side["median"] <= side["max"] for side in row["seconds"].values())
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", layers.LAYERS)
def test_a_step_is_a_whole_step(name: str) -> None:
    """Forward and both gradients run: three times the multiply-adds of the layer."""
    geometry = layers.geometry_of(name, 1)
    with count_macs() as counter:
        layers.our_step(geometry, EXACT)()
    _, C_out, H_out, W_out = geometry.output_shape
    _, width, k_h, k_w = geometry.weight_shape
    macs = C_out * H_out * W_out * width * k_h * k_w
    kinds = counter.by_kind()
    assert (kinds["forward"], kinds["grad_input"], kinds["grad_weight"]) == (macs, macs, macs)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line."""
    assert layers.main(["--repeats", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- the cost model beside other counters ----------------------------------------------------


def test_the_counters_count_the_same_net() -> None:
    """What is timed on PyTorch's side has our net's parameters, and forward and backward the FLOPs of ours."""
    torch = pytest.importorskip("torch")
    twin = cost_model.pytorch_net(torch, "meta")
    theirs = sorted(tuple(p.shape) for p in twin.parameters())
    assert theirs == sorted(p.shape for p in cost_model.our_net().parameters())
    sides = cost_model.peers(2)
    # PyTorch's counter forgets groups in the weight gradient, which is a factor in the depthwise layers
    records = trace(cost_model.our_net().train(), (2, 3, cost_model.SIZE, cost_model.SIZE))
    depthwise = [r for r in records if r.op == "conv2d" and r.attributes["groups"] > 1]
    forgotten = sum(
        2 * r.output.size * math.prod(r.inputs[1].shape[1:]) * (r.attributes["groups"] - 1) for r in depthwise
    )
    assert len(depthwise) == 17
    assert sides["flop counter"]() == cost_model.ours(2, "bp")() + forgotten


def test_a_run_writes_medians_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every side has its seconds and its count, and the ratio is that of the medians."""
    monkeypatch.setattr(cost_model, "CHAIN", (10, 20))
    monkeypatch.setattr(cost_model, "command_seconds", lambda repeats: {"wall_min": 1.0, "cpu_min": 1.0})
    monkeypatch.setattr(cost_model, "peers", lambda batch: {"another": lambda: sum(range(10**6))})
    output = tmp_path / "cost_model.json"
    assert cost_model.main(["--batch", "2", "--repeats", "1", "--output", str(output)]) == 0
    document = json.loads(output.read_text(encoding="utf-8"))
    assert {"command", "versions", "machine", "peers"} <= set(document)
    medians = {name: of["cpu_median"] for name, of in document["seconds"].items()}
    assert document["times_ours"] == {"another": medians["another"] / medians["ours, bp"]}
    assert document["flops"]["ours, bp"] == document["flops"]["ours, all"] > 0
    assert {"chain of 10 operations", "batch 4096, 224 pixels"} <= set(document["growth"])


def test_the_cost_grows_as_the_operations_do() -> None:
    """Function calls, which no load of the machine changes: linear in the operations, the same at any size."""

    def calls(run: Callable[[], object]) -> int:
        run()
        profile = cProfile.Profile()
        profile.runcall(run)
        return sum(entry.callcount for entry in profile.getstats())

    one, five = calls(cost_model.chain(200)), calls(cost_model.chain(1000))
    assert five < 5.1 * one
    small, large = calls(cost_model.ours(1, "bp", 64)), calls(cost_model.ours(4096, "bp"))
    assert abs(large - small) < 0.02 * small


def test_a_report_of_every_method_takes_few_calls() -> None:
    """The time of a report is that of its function calls; a check on them that no load of the machine disturbs."""
    run = cost_model.ours(128, "all", tune="last:4")
    run()
    profile = cProfile.Profile()
    profile.runcall(run)
    assert sum(entry.callcount for entry in profile.getstats()) < 300_000


def test_bad_counts_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line."""
    with pytest.raises(SystemExit) as ended:
        cost_model.main(["--repeats", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
