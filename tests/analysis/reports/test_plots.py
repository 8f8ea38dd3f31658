"""The figure of a report: its numbers are the report's, its file is whole or not there, series differ in grayscale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from analysis import cost
from analysis.cost_model import Prediction, main, predict
from analysis.ranks.choose import choose_ranks
from analysis.reports import plot_data, plots
from analysis.reports.plot_data import Point, at_batch, energy_frontier, reduction_by_batch, undominated
from analysis.reports.plots import draw
from analysis.reports.report import Report, reductions
from lance_ref import Tensor, nn

CASE: dict[str, Any] = {"batch": 8, "num_classes": 10, "tune": "last:2"}


@pytest.fixture(name="prediction", scope="module")
def _prediction() -> Prediction:
    return predict("convnet", methods=["bp", "lance", "checkpoint"], **CASE)


@pytest.fixture(name="report", scope="module")
def _report(prediction: Prediction) -> Report:
    return prediction.report


# ---- the numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3, 100])
def test_bars_of_the_tape_add_up(report: Report, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Folding small operations into one bar loses no byte, and the papers' share is that of the totals."""
    monkeypatch.setattr(plots, "MOST_ROWS", limit)
    rows = plots.tape_rows(report, ["bp", "lance"])
    assert len(rows) == min(limit + 1, 7)  # conv2, relu, pooling, conv3, relu, the head, the loss
    for k, method in enumerate(("bp", "lance")):
        kept = report.totals[method].activation_bytes
        assert sum(bars[k].tape for _, bars in rows) == kept["tape"]
        assert sum(bars[k].paper for _, bars in rows) == kept["paper"]
    assert rows[0][0] == "conv2 conv2d"
    assert rows[0][1][0] == plots.Bar(8 * 16 * 16 * 16 * 4, 8 * 16 * 16 * 16 * 4)


class SharedInput(nn.Module):
    """Three layers of one input, which is kept once, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 4, rng=i) for i in range(3))
        self.head = nn.Linear(4, 2, rng=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) + self.b(x) + self.c(x))


def test_what_is_more_than_the_whole_is_not_called_a_part(prediction: Prediction) -> None:
    """Three layers share an input: the papers count it three times, the tape keeps it once."""

    def legend(of: Prediction) -> str:
        (axes,) = draw(of, panels=["tape"]).axes
        return axes.get_legend().get_texts()[-1].get_text()

    shared = predict(SharedInput(), batch=8, input_shape=(32,), tune="all", methods="bp")
    kept = shared.report.totals["bp"].activation_bytes
    assert kept["paper"] == 3 * 8 * 32 * 4 > kept["tape"]
    assert legend(shared) == "what the papers count, a shared input for each of its layers (3.00 KiB)"
    assert legend(prediction).startswith("of it, what the papers count (")


def test_the_largest_operations_are_the_ones_shown(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two bars and a rest, the two are the largest, in order of execution."""
    monkeypatch.setattr(plots, "MOST_ROWS", 2)
    (a, _), (b, _), (rest, _) = plots.tape_rows(report, ["bp"])
    kept = {row.name: row.methods["bp"].activation_bytes["tape"] for row in report.rows if "bp" in row.methods}
    largest = sorted(kept, key=lambda name: -kept[name])[:2]
    assert {a.split()[0], b.split()[0]} == set(largest)
    assert rest == "(5 other operations)"


def test_reductions_by_batch_are_those_of_the_reports() -> None:
    """Each point is the report at that batch size, for ranks from spectra as well."""
    case = {"tune": "last:2", "image_size": 224}
    found = reduction_by_batch(predict("mobilenetv2", 8, methods=["bp", "lance"], **case), "lance", (2, 8))
    for batch in (2, 8):
        totals = cost("mobilenetv2", batch=batch, **case).totals
        assert found[batch] == reductions(totals["bp"], totals["lance"])


def test_stated_ranks_stay_as_far_as_the_batch_allows() -> None:
    """A batch rank of 6 is 6 at a batch of 16 and 2 at a batch of 2; the other modes keep theirs."""
    prediction = predict("mlp", 8, tune="all", ranks="features.0=6,5;features.2=exact")
    found = reduction_by_batch(prediction, "lance", (2, 8, 16))
    for batch, rank in ((2, 2), (8, 6), (16, 6)):
        assert found[batch]["paper"] == (784 + 100) * batch / (5 * rank + 100 * batch)


def test_another_batch_leaves_the_net_as_it_was() -> None:
    """Modes and flags are put back, and a net that was changed in the meantime is not taken for the old one."""
    step = predict("convnet", 4).step
    step.net.eval()
    again = at_batch(step, 2)
    assert not any(module.training for module in step.net.modules())
    assert again.batch == 2
    assert [r.op for r in again.records] == [r.op for r in step.records]
    for parameter in step.net.parameters():
        parameter.requires_grad_(True)
    flags = [[v.requires_grad for v in r.inputs] for r in at_batch(step, 2).records]
    assert flags == [[v.requires_grad for v in r.inputs] for r in step.records]
    step.net.relu = nn.GELU()
    with pytest.raises(ValueError, match="was changed after"):
        at_batch(step, 2)


def test_the_frontier_by_hand() -> None:
    """One layer of a net of vectors, half of each mode: core 4x10, factors 8x4 and 20x10; all of it: rank (8, 20)."""
    prediction = predict("mlp", 8, input_shape=(20,), tune="features.0", ranks="0.5")
    found = energy_frontier(prediction)
    assert found.source is None
    assert found.chosen is not None
    half = next(point for point in found.points if point.setting == 0.5)
    assert found.chosen.bytes == half.bytes == found.bp_bytes + 4 * (4 * 10 - 8 * 20 + 8 * 4 + 20 * 10)
    assert (half.at_least, half.at_most) == (0.5, 0.5)
    assert found.points[-1].bytes == found.bp_bytes + 4 * (8 * 8 + 20 * 20)
    totals = prediction.report.totals
    assert found.chosen.bytes == totals["lance"].tape_and_factors
    assert found.bp_bytes == totals["bp"].tape_and_factors


def test_the_frontier_from_spectra() -> None:
    """Thresholds keep what they promise in every mode, the bounds are in order, and more bytes keep more."""
    prediction = predict("mobilenetv2", 8, tune="last:2")
    found = energy_frontier(prediction)
    assert found.source is not None
    assert found.source.startswith("torchvision") or "images of" in found.source
    settings = [point.setting for point in found.points]
    assert settings == sorted(settings)
    assert all(point.at_most >= point.setting for point in found.points)
    assert all(0 <= point.at_least <= point.at_most <= 1 + 1e-12 for point in found.points)
    assert found.chosen is not None
    at_seventy = next(point for point in found.points if point.setting == 0.7)
    assert (found.chosen.bytes, found.chosen.at_most) == (at_seventy.bytes, at_seventy.at_most)
    shapes = {name: row.input_shape for row in prediction.report.rows if (name := row.name) and row.tuned}
    assert choose_ranks(shapes, "mobilenetv2", (3, 224, 224), 0.7, None, None).ranks == prediction.ranks["lance"]


def test_dominated_points_are_dropped() -> None:
    """More bytes for no more energy is no part of a frontier."""
    best, wasteful, all_of_it = Point(0.9, 20, 0.6, 0.9), Point(0.5, 30, 0.1, 0.5), Point(1.0, 40, 1.0, 1.0)
    assert undominated([wasteful, all_of_it, best]) == (best, all_of_it)


# ---- the figure ------------------------------------------------------------------------------


@pytest.mark.parametrize("panels", [["tape"], ["macs", "batch"], ["tape", "macs", "batch", "frontier"]])
def test_panels_are_those_asked_for(prediction: Prediction, monkeypatch: pytest.MonkeyPatch, panels: list[str]) -> None:
    """One set of axes for each, with a title, a unit on every axis, and text that stays within the figure."""
    monkeypatch.setattr(plot_data, "BATCHES", (1, 8))
    figure = draw(prediction, panels=panels)
    figure.draw_without_rendering()
    assert len(figure.axes) == len(panels)
    for axes in figure.axes:
        assert axes.get_title(loc="left")
        assert any(unit in axes.get_xlabel() for unit in ("KiB", "MiB", "multiply-adds", "images"))
        box, tight = figure.bbox, axes.get_tightbbox()
        assert tight is not None
        assert box.x0 - 2 <= tight.x0 <= tight.x1 <= box.x1 + 2
        assert box.y0 - 2 <= tight.y0 <= tight.y1 <= box.y1 + 2


def test_drawn_bars_are_the_multiply_adds(prediction: Prediction, report: Report) -> None:
    """Stacked to the total of each method, in millions, half the FLOPs; recomputation is one of the kinds."""
    (axes,) = draw(prediction, panels=["macs"]).axes
    drawn = sum(patch.get_width() for patch in axes.patches)
    assert drawn == pytest.approx(sum(cost.flops["total"] for cost in report.totals.values()) / 2e6)
    legend = axes.get_legend()
    assert legend is not None
    assert "recompute" in [text.get_text() for text in legend.get_texts()]


def test_series_differ_without_colour() -> None:
    """Any two kinds of work, and the two methods of the tape, differ in lightness, or in hatching."""

    def lightness(color: str) -> float:
        return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114)))

    looks = [(lightness(style["color"]), style.get("hatch")) for style in plots.KINDS.values()]
    looks_of_tape = [(lightness(color), None) for color in (plots.BEFORE, plots.AFTER)]
    for group in (looks, [*looks_of_tape, (lightness(plots.PAPER), "///")]):
        for i, (light, hatch) in enumerate(group):
            assert all(abs(light - other) > 0.1 or hatch != h for other, h in group[i + 1 :])
    markers = [(style["marker"], style.get("linestyle")) for style in plots.LINES.values()]
    assert len(set(markers)) == len(markers)


def test_what_cannot_be_drawn_is_said_in_its_panel() -> None:
    """The classifier alone: there are no ranks, and the other panels are there all the same."""
    figure = draw(predict("convnet", batch=2, tune="head", methods="bp"), panels=["tape", "frontier"])
    assert "no layer but the classifier is tuned" in figure.axes[1].texts[0].get_text()


def test_assumed_ranks_are_called_that(prediction: Prediction) -> None:
    """Without spectra the frontier is one of fractions, and says so."""
    (axes,) = draw(prediction, panels=["frontier"]).axes
    assert axes.get_title(loc="left") == "No spectra: fractions of the ranks assumed"


def test_a_notebook_shows_the_figure(prediction: Prediction) -> None:
    """A PNG without pyplot."""
    data = draw(prediction, panels=["macs"])._repr_png_()  # type: ignore[attr-defined]
    assert data.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"panels": ["tape", "disk"]}, "panels are"),
        ({"panels": ["tape", "tape"]}, "each once"),
        ({"panels": []}, "panels are"),
        ({"method": "asi"}, "method is 'asi', expected one of the report's: bp, lance, checkpoint"),
        ({"path": "figure.pdf"}, "expected a name ending in .png or .svg"),
    ],
)
def test_bad_options_are_named(prediction: Prediction, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(prediction, **options)


# ---- the file --------------------------------------------------------------------------------

ARGUMENTS = ["--net", "convnet", "--batch", "2", "--tune", "last:1", "--panels", "tape", "macs"]


@pytest.mark.parametrize("name", ["figure.png", "figure.svg"])
def test_the_command_writes_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    """A picture 1260 pixels wide, or an SVG; the report is printed as ever."""
    assert main([*ARGUMENTS, "--plot", str(tmp_path / name)]) == 0
    assert "Totals" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name.endswith(".png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] == 1260
            assert picture.convert("L").getextrema()[1] == 255  # white stays white
    else:
        assert "</svg>" in (tmp_path / name).read_text()


def test_a_figure_that_fails_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there before is there still, and no part of a new file."""
    target = tmp_path / "figure.png"
    target.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(SystemExit) as exit_info:
        main([*ARGUMENTS, "--plot", str(target)])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith("error: disk is full\n")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert target.read_text() == "before"


@pytest.mark.parametrize("panel", plots.PANELS)
def test_the_figures_of_the_readme_are_small_and_there(panel: str) -> None:
    """900 pixels wide, under 80 kB each."""
    path = Path(__file__).parents[3] / "experiments" / "results" / f"cost_mobilenetv2_{panel}.png"
    assert path.stat().st_size < 80_000
    with Image.open(path) as picture:
        assert picture.size[0] == 896
