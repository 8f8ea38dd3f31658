"""An option that cannot change anything in a call is refused in one line, before any work; so are odd values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from analysis import cost, cost_model, plan, spectra
from analysis.ranks.choose import choose_ranks
from experiments.ledger import claims, explain

NET = ["--net", "mlp", "--batch", "4"]
VISION = ["--net", "mobilenetv2", "--batch", "2", "--tune", "last:1"]
BUDGET = ["--net", "convnet", "--budget", "1MiB", "--batch", "2"]
BP = ["--method", "bp"]

COST = {
    "epsilon without spectra": (
        [*NET, "--epsilon", "0.8"],
        "--epsilon has no effect here: no rank is chosen by energy",
    ),
    "epsilon beside ranks": ([*VISION, "--ranks", "0.5", "--epsilon", "0.8"], "ranks are from --ranks 0.5"),
    "epsilon beside ranks of all layers": (
        [*VISION, "--ranks", "features.18.0=1,1,1,1", "--epsilon", "0.8"],
        "--epsilon has no effect",
    ),
    "spectra beside ranks of all layers": (
        [*VISION, "--ranks", "features.18.0=1,1,1,1", "--spectra", "nowhere.json"],
        "--spectra has no effect",
    ),
    "epsilon without a method that has ranks": ([*VISION, *BP, "--epsilon", "0.8"], "it needs one of lance, "),
    "ranks without a method that has ranks": (
        [*NET, *BP, "--ranks", "0.5"],
        "--ranks has no effect here: it needs one",
    ),
    "spectra without a method that has ranks": ([*NET, *BP, "--spectra", "x"], "--spectra has no effect"),
    "ranks of the head alone": ([*NET, "--tune", "head", "--ranks", "0.5"], "no layer besides the head trains"),
    "epsilon of the head alone": ([*VISION[:4], "--tune", "head", "--epsilon", "0.5"], "no layer besides the head"),
    "patch": ([*NET, "--patch", "4"], "--patch has no effect here: it needs one of gradient-filter"),
    "ratio": ([*NET, "--ratio", "0.5"], "it needs one of sketch"),
    "segments": ([*NET, "--segments", "2"], "it needs one of checkpoint"),
    "micro-batch": ([*NET, "--micro-batch", "2"], "it needs one of micro-batch"),
    "lora-rank": ([*NET, "--lora-rank", "2"], "it needs one of lora"),
    "calibration-batches": ([*NET, *BP, "--calibration-batches", "2"], "lance, lance-mean-free, lance-center"),
    "protected": ([*NET, "--protected", "0.25"], "it needs --continual"),
    "image-size": ([*NET, "--input-shape", "20", "--image-size", "8"], "it needs no --input-shape"),
    "accounting": ([*NET, "--json", "--accounting", "tape"], "it needs --format table"),
    "accounting twice": ([*NET, "--accounting", "tape", "tape"], "expected each once"),
    "optimizer": ([*NET, "--format", "csv", "--optimizer", "adam"], "--optimizer has no effect"),
    "continual": ([*NET, "--format", "csv", "--continual", "3"], "CSV has the rows of the layers alone"),
    "calibration in CSV": ([*NET, "--format", "csv", "--calibration-batches", "3"], "CSV has the rows"),
    "the default, stated": ([*NET, "--patch", "2"], "--patch has no effect"),
    "batch of 31 digits": (["--net", "mlp", "--batch", "1" * 31], "at most 2147483647"),
    "epsilon nan": ([*VISION, "--epsilon", "nan"], "--epsilon is nan, expected a number in (0, 1]"),
    "figure of another kind": ([*NET, "--plot", "x.gif"], "expected a name that ends in .png or .svg"),
    "a billion tasks": ([*NET, "--continual", "1000000000000"], "at most 1000"),
    "huge image": ([*NET, "--image-size", "100000"], "at most 8192"),
    "one file for two": ([*NET, "--output", "x.png", "--plot", "x.png"], "which is the file of"),
}
PLAN = {
    "epsilon": ([*BUDGET, *BP, "--epsilon", "0.7"], "it needs one of lance, "),
    "ranks": ([*BUDGET, *BP, "--ranks", "0.5"], "--ranks has no effect"),
    "spectra": ([*BUDGET, *BP, "--spectra", "x"], "--spectra has no effect"),
    "patch": ([*BUDGET, *BP, "--patch", "2"], "--patch has no effect"),
    "ratio": ([*BUDGET, *BP, "--ratio", "0.5"], "--ratio has no effect"),
    "micro-batch": ([*BUDGET, *BP, "--micro-batch", "1"], "--micro-batch has no effect"),
    "lora-rank": ([*BUDGET, *BP, "--lora-rank", "1"], "--lora-rank has no effect"),
    "segments": ([*BUDGET, *BP, "--segments", "1"], "--segments has no effect"),
    "calibration": ([*BUDGET, *BP, "--calibration", "elsewhere"], "--calibration has no effect"),
    "layers": ([*BUDGET, "--method", "head-only", "--layers", "1"], "another method than head-only"),
    "shares": ([*BUDGET, "--method", "lora", "--shares", "parameters"], "a method whose fidelity is predicted"),
    "shares without spectra": ([*BUDGET, "--method", "lance", "--shares", "parameters"], "--shares has no effect"),
    "shares of the head": ([*BUDGET, "--method", "head-only", "--shares", "parameters"], "--shares has no effect"),
    "image-size": ([*BUDGET, "--input-shape", "3,32,32", "--image-size", "32"], "it needs no --input-shape"),
    "batch of 31 digits": ([*BUDGET[:4], "--batch", "1" * 31], "at most 2147483647"),
}
MEASURE = ["--net", "convnet", "--data", "digits", "--batch", "2", "--batches", "1", "--output", "s.json"]
SPECTRA = {
    "split of a folder": ([*MEASURE[:2], "--data", ".", *MEASURE[4:], "--split", "train"], "--split has no effect"),
    "image-size": ([*MEASURE, "--input-shape", "1,8,8", "--image-size", "8"], "it needs no --input-shape"),
    "mean alone": ([*MEASURE, "--mean", "0.5"], "expected both or none"),
    "std alone": ([*MEASURE, "--std", "0.5"], "expected both or none"),
    "mean of two channels": ([*MEASURE, "--mean", "0", "1", "--std", "1"], "expected 1 or 3 finite numbers"),
    "std of 0": ([*MEASURE, "--mean", "0", "--std", "0"], "--std is 0, expected a positive number"),
    "mean nan": ([*MEASURE, "--mean", "nan", "--std", "1"], "--mean is nan, expected a finite number"),
    "two sizes": ([*MEASURE, "--input-shape", "8,8"], "expected (C, H, W) or (N,)"),
    "seed": ([*MEASURE, "--seed", "-1"], "--seed is -1"),
}
TWICE = {"claim": (["--claim", "mobilenetv2-last2", "mobilenetv2-last2"], "expected each once")}
RUN_TWICE = {"run": (["--run", "small-batches", "small-batches"], "expected each once")}
CASES = [
    pytest.param(main, *case, id=f"{main.__module__.removeprefix('analysis.')}: {name}")
    for main, cases in (
        (cost_model.main, COST),
        (plan.main, PLAN),
        (spectra.main, SPECTRA),
        (explain.main, TWICE),
        (claims.main, RUN_TWICE),
    )
    for name, case in cases.items()
]


@pytest.mark.parametrize(("main", "arguments", "said"), CASES)
def test_it_is_refused(
    main: Callable[[Sequence[str]], int],
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on stderr, exit code 2, nothing on stdout, no file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    captured = capsys.readouterr()
    assert left.value.code == 2
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not captured.out
    assert not list(tmp_path.iterdir())


TWO = [*VISION[:4], "--tune", "last:2", "--epsilon", "0.8"]
ALLOWED = {
    "epsilon for the other layers": [*TWO, "--ranks", "features.18.0=1,1,1,1"],
    "epsilon beside an exact layer": [*TWO, "--ranks", "features.18.0=exact"],
    "patch": ["--net", "convnet", "--method", "gradient-filter", "--patch", "4"],
    "optimizer of a measurement": [*NET, "--input-shape", "20", "--format", "csv", "--measure", "--optimizer", "adam"],
    "image-size": ["--net", "convnet", "--image-size", "8", "--accounting", "tape", "paper"],
    "ratio beside other methods": [*NET, "--method", "bp", "sketch", "--ratio", "0.5"],
    "ranks of layers": ["--net", "convnet", "--ranks", "0.5"],
    "one mode left alone": [*VISION, "--ranks", "features.18.0=-,1,-,-"],
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_has_an_effect_is_taken(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same options where they matter."""
    assert cost_model.main(ALLOWED[name]) == 0
    assert capsys.readouterr().out


def test_effects_are_effects(capsys: pytest.CaptureFixture[str]) -> None:
    """In the README's example ε changes ranks; where it is refused it would not have."""
    kept = [cost("mobilenetv2", batch=2, tune="last:2", epsilon=e).totals["lance"] for e in (0.7, 0.9)]
    assert kept[0] != kept[1]
    kept = [cost("resnet18", batch=2, tune="last:2", epsilon=e).totals["lance"] for e in (0.7, 0.9)]
    assert kept[0] == kept[1]
    assert plan.main([*BUDGET, "--method", "lance", "bp", "--shares", "parameters", "--json"]) == 0
    assert "in proportion" in json.loads(capsys.readouterr().out)["fidelity"]


@pytest.mark.parametrize("text", ["a=-,-", "a=-,-;b=1,1", "b=1,1;a= - , -"])
def test_ranks_that_leave_every_mode_alone_are_refused(text: str) -> None:
    """It would be called lance and keep everything, with no word."""
    with pytest.raises(ValueError, match=r"which compresses nothing; write a=exact for that"):
        choose_ranks({"a": (8, 5), "b": (8, 4)}, "net", (5,), 0.7, text, None)


def test_a_number_too_large_for_anything_is_refused_in_python() -> None:
    """Before memory is asked for."""
    with pytest.raises(ValueError, match=r"batch is 1000000000000, expected a positive integer, at most 2147483647"):
        cost("mlp", batch=10**12)
