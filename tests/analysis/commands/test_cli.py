"""`python -m analysis.cost_model`: the published figures, the formats, and one line for every bad input."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_case import CASE, RANKS, ROOT, run_json

from analysis.cost_model import cost, main
from analysis.reports.report import ACCOUNTINGS, FLOP_KINDS
from analysis.reports.tables import reductions, render


def test_ranks_for_some_layers_leave_the_others_to_the_spectra(capsys: pytest.CaptureFixture[str]) -> None:
    """One layer's ranks stated: the others' are those of the spectra, and the source line says both."""
    plain = run_json(capsys, "--net", "mobilenetv2", "--tune", "last:2")
    stated = run_json(capsys, "--net", "mobilenetv2", "--tune", "last:2", "--ranks", "features.18.0=64,128,2,2")
    ranks = [
        {row["name"]: row["methods"]["lance"]["ranks"] for row in report["layers"] if row["tuned"]}
        for report in (plain, stated)
    ]
    assert ranks[1] == {**ranks[0], "features.18.0": [64, 128, 2, 2]}
    assert stated["ranks_from"] == f"--ranks features.18.0=64,128,2,2; all other layers: {plain['ranks_from']}"


@pytest.mark.parametrize("net", ["convnet", "mlp"])
def test_a_net_of_few_layers_needs_no_option(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there are fewer than four layers besides the head, all of them train by default."""
    assert run_json(capsys, "--net", net) == run_json(capsys, "--net", net, "--tune", "all")


# ---- published figures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "tune", "paper_bytes"),
    [
        ("mobilenetv2", "last:2", 16_056_320),
        ("mobilenetv2", "last:4", 30_105_600),
        ("mobilenetv2", "all", 1_732_075_520),  # 1651.836 MiB
        ("resnet18", "last:2", 12_845_056),  # 12.25 MiB
        ("resnet18", "last:4", 32_112_640),  # 30.625
        ("resnet18", "all", 558_759_936),  # 532.875
        ("resnet34", "last:2", 12_845_056),  # 12.25
        ("resnet34", "last:4", 25_690_112),  # 24.5
    ],
)
def test_published_activation_memory(capsys: pytest.CaptureFixture[str], net: str, tune: str, paper_bytes: int) -> None:
    """The papers' tables at batch 64, to the byte."""
    report = run_json(capsys, "--net", net, "--batch", "64", "--tune", tune, "--method", "bp")
    assert report["totals"]["bp"]["activation_bytes"]["paper"] == paper_bytes


def test_the_main_case(capsys: pytest.CaptureFixture[str]) -> None:
    """Batch 128, ten classes, last two: the papers' bytes, PyTorch's 100.79 MiB, and our tape under 2 MiB."""
    totals = run_json(capsys, *CASE, "--ranks", RANKS)["totals"]
    assert totals["bp"]["activation_bytes"]["paper"] == 32_112_640
    assert totals["bp"]["activation_bytes"]["pytorch"] / 2**20 == pytest.approx(100.79, rel=0.01)
    # cores (64·160 + 64·128)·2·2; bits of ReLU6 128·1280·49/8; the head's input 128·1280; dropout's bits
    # 128·1280/8; scales 320 + 1280; probabilities 128·10 and labels of one byte
    tape = (10_240 + 8_192) * 4 * 4 + 1_003_520 + 655_360 + 20_480 + 1_600 * 4 + 1_280 * 4 + 128
    assert totals["lance"]["activation_bytes"]["tape"] == tape == 1_985_920 < 2 * 2**20
    # 128·64 + 960·160 + 2·7·2, and 128·64 + 320·128 + 2·7·2
    assert totals["lance"]["subspace_bytes"] == (161_820 + 49_180) * 4
    assert totals["lance"]["activation_bytes"]["pytorch"] == totals["bp"]["activation_bytes"]["pytorch"] - 31_817_728


def test_the_main_case_with_shipped_spectra(capsys: pytest.CaptureFixture[str]) -> None:
    """No option but the net: ranks come from the shipped spectra, and the table says so."""
    report = run_json(capsys, "--net", "mobilenetv2")
    assert (report["batch"], report["image_size"], report["num_classes"]) == (128, 224, 1000)
    assert report["tuned_layers"] == [
        "features.17.conv.0.0", "features.17.conv.1.0", "features.17.conv.2", "features.18.0",
    ]  # fmt: skip
    assert report["ranks_from"].startswith("spectra shipped as analysis/data/mobilenetv2_224.json at epsilon 0.7")
    assert list(report["totals"]) == ["bp", "lance"]
    ranks = {row["name"]: row["methods"]["lance"]["ranks"] for row in report["layers"] if row["tuned"]}
    assert list(ranks) == report["tuned_layers"]
    assert all(len(r) == 4 for r in ranks.values())
    full = run_json(capsys, "--net", "mobilenetv2", "--epsilon", "1")
    full_ranks = [row["methods"]["lance"]["ranks"] for row in full["layers"] if row["tuned"]]
    assert full_ranks == [row["input_shape"] for row in full["layers"] if row["tuned"]]


# ---- the report ----------------------------------------------------------------------------


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """The documented keys, no more and no less, and totals that are the sums of the rows."""
    report = run_json(capsys, *CASE, "--ranks", "0.25")
    assert list(report) == [
        "schema", "net", "batch", "image_size", "num_classes", "dtype", "convention", "tuned_layers", "ranks_from",
        "layers", "totals", "units", "settings", "calibration", "notes", "chunks", "optimizer", "peak",
        "continual",
    ]  # fmt: skip
    assert report["schema"] == 1
    assert report["units"]["flops"] == "FLOPs"
    names = [row["name"] for row in report["layers"]]
    assert len(set(names)) == len(names)
    for row in report["layers"]:
        assert list(row) == [
            "name", "op", "input_shape", "output_shape", "weight_shape", "parameters", "tuned", "methods",
        ]  # fmt: skip
    for method, total in report["totals"].items():
        rows = [row["methods"][method] for row in report["layers"] if method in row["methods"]]
        for part, keys in (("activation_bytes", ACCOUNTINGS), ("flops", (*FLOP_KINDS, "total"))):
            assert list(total[part]) == list(keys)
            for key in keys:
                assert total[part][key] == sum(row[part][key] for row in rows)
        for key in ("subspace_bytes", "elementwise"):
            assert total[key] == sum(row[key] for row in rows)
        assert all(row["flops"]["total"] == sum(row["flops"][kind] for kind in FLOP_KINDS) for row in rows)
        assert all(any([*row["activation_bytes"].values(), *row["flops"].values(), row["elementwise"]]) for row in rows)


def test_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    """One convolution's row, worked by hand: B 2, 160 -> 960 channels, 1x1 on 2x2 (64 pixels)."""
    report = run_json(capsys, "--net", "mobilenetv2", "--batch", "2", "--image-size", "64", "--ranks", "0.5")
    row = next(row for row in report["layers"] if row["name"] == "features.17.conv.0.0")
    macs = 2 * 960 * 4 * 160
    assert row["input_shape"] == [2, 160, 2, 2]
    assert row["output_shape"] == [2, 960, 2, 2]
    assert row["weight_shape"] == [960, 160, 1, 1]
    assert row["parameters"] == 153_600
    assert row["tuned"] is True
    assert row["methods"]["bp"] == {
        "ranks": None,
        "activation_bytes": {"paper": 5120, "pytorch": 5120, "tape": 5120},
        "subspace_bytes": 0,
        "flops": {
            "forward": 2 * macs,
            "grad_input": 0,
            "grad_weight": 2 * macs,
            "projection": 0,
            "decomposition": 0,
            "recompute": 0,
            "total": 4 * macs,
        },
        "elementwise": 0,
    }
    lance = row["methods"]["lance"]
    assert lance["ranks"] == [1, 80, 1, 1]
    assert lance["activation_bytes"] == {"paper": 320, "pytorch": 320, "tape": 320}
    assert lance["subspace_bytes"] == (2 + 160 * 80 + 2 + 2) * 4
    # the map of four places to 1 and the batch to 1 (1280·1, 320·1), then 160·80
    assert lance["flops"]["projection"] == 2 * (1280 + 320 + 12_800)
    assert lance["elementwise"] == 2 * (1280 + 80)  # squares, for the share of energy kept


def test_paper_convention(capsys: pytest.CaptureFixture[str]) -> None:
    """Multiply-adds of forward and weight gradient of the tuned layers, the projection B·C·H·W·Σr."""
    report = run_json(capsys, *CASE, "--ranks", RANKS, "--convention", "paper")
    last, before = 128 * 1280 * 49 * 320, 128 * 320 * 49 * 960
    assert report["totals"]["bp"]["flops"] == {
        "forward": last + before, "grad_input": 0, "grad_weight": last + before, "projection": 0,
        "decomposition": 0, "recompute": 0,
        "total": 2 * (last + before),
    }  # fmt: skip
    # Z1 + Z2 + Z3 + dW of each
    weight = (128 * 320 * 49 * 64 + 64 * 160 * (2 * 2 * 7 + 2 * 7 * 7) + 64 * 320 * 49 * 160 + 320 * 160 * 960) + (
        128 * 1280 * 49 * 64 + 64 * 128 * (2 * 2 * 7 + 2 * 7 * 7) + 64 * 1280 * 49 * 128 + 1280 * 128 * 320
    )
    projection = 128 * 960 * 49 * (64 + 160 + 4) + 128 * 320 * 49 * (64 + 128 + 4)
    assert report["totals"]["lance"]["flops"] == {
        "forward": last + before, "grad_input": 0, "grad_weight": weight, "projection": projection,
        "decomposition": 0, "recompute": 0,
        "total": last + before + weight + projection,
    }  # fmt: skip


def test_csv_has_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Flat names, one line a row, the numbers of the JSON."""
    arguments = [*CASE, "--ranks", RANKS]
    report = run_json(capsys, *arguments)
    assert main([*arguments, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == [row["name"] for row in report["layers"]]
    by_name = {row["name"]: row for row in rows}
    assert by_name["features.18.0"]["methods.lance.ranks"] == "64x128x2x2"
    assert sum(int(row["methods.lance.activation_bytes.tape"]) for row in rows) == 1_985_920


def test_table_shows_factors_sum_reductions_and_meaning() -> None:
    """The printed totals show tape, factors and their sum, a reduction for each, and one sentence."""
    report = cost("mobilenetv2", num_classes=10, tune="last:2", ranks=RANKS)
    text = render(report)
    ratios = reductions(report.totals["bp"], report.totals["lance"])
    assert f"ranks from: --ranks {RANKS}" in text
    assert re.search(r"lance +1\.894 +0\.805 +2\.699 +[0-9.,]+ +[0-9.]+ +0\.281 +70\.443 ", text)
    assert re.search(r"bp / lance +17\.02x +11\.95x +[0-9.]+x +[0-9.]+x +108\.89x +1\.43x", text)
    assert ratios["bp pytorch / tape"] == pytest.approx(105_682_948 / 1_985_920)
    assert "What it means:" in text


def test_table_adds_up_with_what_it_folds() -> None:
    """Rows that keep nothing, or run forward only, are folded into one line; their sums are not lost."""
    report = cost("convnet", batch=2, tune="last:1", ranks="0.5")
    text = render(report, wide=True)
    folded = next(line for line in text.splitlines() if "forward only" in line)
    forward = 2 * (2 * 16 * 32 * 32 * 27 + 2 * 32 * 16 * 16 * 144)
    assert f"{forward / 1e6:,.3f}" in folded


def test_a_layer_that_keeps_one_number_is_pointed_out() -> None:
    """Rank 1 in every mode is a great saving that learns little; the table must not be proud of it."""
    rank_one = RANKS.replace("64,160,2,2", "1,1,1,1")
    text = " ".join(render(cost("mobilenetv2", num_classes=10, tune="last:2", ranks=rank_one)).split())
    assert "Mind the ranks: features.17.conv.2 would keep one number" in text
    assert "Mind the ranks" not in render(cost("mobilenetv2", num_classes=10, tune="last:2", ranks=RANKS))


def test_accounting_chooses_the_printed_columns() -> None:
    report = cost("mobilenetv2", num_classes=10, tune="last:2", ranks=RANKS)
    text = render(report, ["tape"], wide=True)
    assert "bp tape" in text
    assert "bp paper" not in text
    assert "bp pytorch" not in text


def test_assumed_ranks_say_so_and_what_to_give_instead(capsys: pytest.CaptureFixture[str]) -> None:
    """Without spectra: a quarter of each mode, said in `ranks_from` and in the table."""
    report = run_json(capsys, "--net", "resnet18", "--batch", "6", "--tune", "last:1")
    row = next(row for row in report["layers"] if row["tuned"])
    assert row["methods"]["lance"]["ranks"] == [2, 128, 2, 2]  # of (6, 512, 7, 7)
    assert main(["--net", "resnet18", "--batch", "6", "--tune", "last:1"]) == 0
    for text in (report["ranks_from"], " ".join(capsys.readouterr().out.split())):
        assert "assumed: a quarter of each mode" in text
        assert "--ranks" in text
        assert "--spectra" in text


def test_float64_doubles_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Bits and labels aside, every kept number takes twice as much."""
    arguments = ["--net", "resnet18", "--batch", "4", "--tune", "last:1", "--method", "bp"]
    paper = [
        run_json(capsys, *arguments, "--dtype", dtype)["totals"]["bp"]["activation_bytes"]["paper"]
        for dtype in ("float32", "float64")
    ]
    assert paper[1] == 2 * paper[0] > 0


def test_vector_input(capsys: pytest.CaptureFixture[str]) -> None:
    """--input-shape N, for nets of vectors: three linear layers, the first two tuned."""
    report = run_json(capsys, "--net", "mlp", "--input-shape", "20", "--batch", "8", "--tune", "all", "--ranks", "0.5")
    assert report["image_size"] is None
    assert report["layers"][0]["input_shape"] == [8, 20]
    assert report["layers"][0]["methods"]["lance"]["ranks"] == [4, 10]


def test_head_only_keeps_the_heads_input(capsys: pytest.CaptureFixture[str]) -> None:
    """The baseline: no tuned layer, so the papers' count is 0, and the tape is the head's."""
    report = run_json(capsys, "--net", "resnet18", "--batch", "4", "--tune", "head", "--num-classes", "10")
    assert report["tuned_layers"] == []
    assert report["totals"]["bp"]["activation_bytes"]["paper"] == 0
    assert report["totals"]["bp"]["activation_bytes"]["tape"] == 4 * 512 * 4 + 4 * 10 * 4 + 4


# ---- peaks, tasks, colours -----------------------------------------------------------------


def test_the_peak_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    """What is alive with each method, by optimiser: gradients of 20-100-100-1000 with biases, and Adam's two copies."""
    trained = 4 * (20 * 100 + 100 + 100 * 100 + 100 + 100 * 1000 + 1000)
    arguments = [
        "--net",
        "mlp",
        "--input-shape",
        "20",
        "--batch",
        "8",
        "--method",
        "bp",
        "micro-batch",
    ]
    plain, adam = (run_json(capsys, *arguments, "--optimizer", name) for name in ("sgd", "adam"))
    assert (plain["optimizer"], adam["optimizer"]) == ("sgd", "adam")
    for report, state in ((plain, 0), (adam, 2 * trained)):
        for peak in report["peak"].values():
            assert peak["parameters_bytes"] == peak["gradients_bytes"] == trained
            assert peak["optimizer_state_bytes"] == state
            assert peak["peak_bytes"] == max(peak[f"{part}_bytes"] for part in ("forward", "backward", "optimizer"))
            part = peak["peak_moment"].replace("optimiser", "optimizer")
            assert peak["peak_bytes"] == peak[f"{part}_bytes"]
            assert peak["peak_at"]
    # gradients, and the update of a block of the largest parameter; what the parts of a batch come to is the same
    assert plain["peak"]["bp"]["optimizer_bytes"] >= trained + 4 * 2**16
    # the second part finds the gradients of the first, the only part of bp finds none
    assert plain["peak"]["micro-batch"]["forward_bytes"] > trained > plain["peak"]["bp"]["forward_bytes"]
    assert main([*arguments, "--optimizer", "adam"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"The peak of a step with bp (and micro-batch )?is [0-9.]+ MiB, in the \w+( pass)? \([a-z.0-9]+\)\. The grad",
        text,
    )


def test_tasks_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    """--continual: a second table and the bills of every learner and task; without it there is neither."""
    arguments = ["--net", "mlp", "--input-shape", "20", "--batch", "8", "--tune", "all"]
    assert run_json(capsys, *arguments)["continual"] is None
    tasks = ["--continual", "3", "--protected", "0.25", "--basis-batches", "4"]
    found = run_json(capsys, *arguments, *tasks)["continual"]
    assert (found["tasks"], found["protected"], found["basis_batches"]) == (3, 0.25, 4)
    bills = {(bill["learner"], bill["task"]): bill for bill in found["bills"]}
    assert set(bills) == {(learner, t) for learner in ("finetune", "gpm", "lance") for t in range(3)}
    last = bills["gpm", 2]
    assert last["beside_bytes"] == 4 * (20 * 5 + 100 * 25)  # a quarter of 20 and of 100 directions
    assert main([*arguments, *tasks]) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out[out.index("Learning 3 tasks") :].splitlines() if line.startswith("gpm"))
    sizes = [last[name] for name in ("tape_bytes", "beside_bytes", "ram_bytes", "flash_bytes", "total_bytes")]
    work = [last["step_macs"], last["between_macs"], sum(bills["gpm", t]["between_macs"] for t in range(3))]
    assert row[1:] == [f"{n / 2**20:,.3f}" for n in sizes] + [f"{n / 1e9:,.3f}" for n in work]


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("1", False)])
def test_colours_in_a_terminal(monkeypatch: pytest.MonkeyPatch, no_color: str | None, coloured: bool) -> None:
    """Rich tables in a terminal; NO_COLOR takes the colours out and leaves the table."""
    for name in ("FORCE_COLOR", "COLORTERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["--net", "mlp", "--batch", "2"]) == 0
    text = terminal.getvalue()
    assert bool(re.search(r"\x1b\[(?:\d;)*(?:3|4|9)\d", text)) is coloured
    assert "bp / lance" in text
    assert "─" in text


@pytest.mark.parametrize("forced", ["NO_COLOR", "FORCE_COLOR"])
def test_a_pipe_gets_plain_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, forced: str
) -> None:
    """Without a terminal there is no control sequence, whatever the environment says."""
    monkeypatch.setenv(forced, "1")
    assert main(["--net", "mlp", "--batch", "2"]) == 0
    assert "\x1b" not in capsys.readouterr().out


# ---- measuring and starting ----------------------------------------------------------------


def test_measure_agrees_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    """Predicted beside measured, on the bundled digits scaled up."""
    assert main(["--net", "convnet", "--batch", "4", "--tune", "last:1", "--ranks", "0.5", "--measure"]) == 0
    out = capsys.readouterr().out
    assert "Predicted beside measured" in out
    assert "no difference" in out


def test_measure_exits_1_on_a_difference(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction that is wrong by one multiply-add must not pass."""
    from analysis.rules import tucker_costs

    right = tucker_costs.projection_macs
    monkeypatch.setattr(tucker_costs, "projection_macs", lambda shape, ranks, *order: right(shape, ranks) + 1)
    assert main(["--net", "convnet", "--batch", "4", "--tune", "last:1", "--ranks", "0.5", "--measure"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_measure_keeps_json_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """With --format json, stdout is one JSON object; the comparison goes to stderr."""
    arguments = ["--net", "convnet", "--batch", "4", "--tune", "head", "--method", "bp", "--measure"]
    assert main([*arguments, "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["net"] == "convnet"
    assert "no difference" in captured.err


def test_measure_on_a_folder_of_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--data with a folder: real pictures of any size, fewer than a batch."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(tmp_path / kind / "one.png")
    arguments = ["--net", "convnet", "--batch", "3", "--tune", "head", "--method", "bp", "--measure"]
    assert main([*arguments, "--data", str(tmp_path)]) == 0
    assert "one step on 3 images" in capsys.readouterr().out


def seconds_of_children() -> float:
    """Of the processor, which other processes do not lengthen."""
    spent = os.times()
    return spent.children_user + spent.children_system


def test_help_is_quick() -> None:
    """--help must not import the numerical libraries; the best of three, in seconds of the processor."""
    times = []
    for _ in range(3):
        start = seconds_of_children()
        command = [sys.executable, "-m", "analysis.cost_model", "--help"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        times.append(seconds_of_children() - start)
    assert min(times) < 0.5
    probe = (
        "import sys, analysis.cost_model as c; c.parser(); print({'numpy', 'lance_ref', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
