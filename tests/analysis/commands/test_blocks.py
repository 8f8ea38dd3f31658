"""Wide tables are whole at any width, and what chance decides is said beside the numbers."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.commands import chance
from analysis.commands.console import blocks, paragraph
from experiments.continual import report as continual_report
from experiments.finetune import report as finetune_report

WORD = st.text("abc,.0123456789", min_size=1, max_size=12)


@given(st.integers(1, 8), st.integers(0, 4), st.integers(40, 200), st.data())
def test_every_cell_is_whole_at_any_width(columns: int, rows: int, across: int, data: st.DataObject) -> None:
    """Read back from the blocks the table is what it was, and no line is wider than asked."""
    table = data.draw(
        st.lists(st.lists(WORD, min_size=columns, max_size=columns), min_size=rows + 1, max_size=rows + 1)
    )
    text = blocks(table[0], table[1:], across)
    assert all(len(line) <= across for line in text.splitlines())
    parts = [[line.split() for line in part.splitlines()] for part in text.split("\n\n")]
    for i, row in enumerate(table):
        assert row == [parts[0][i][0], *(cell for part in parts for cell in part[i][1:])]
        assert {part[i][0] for part in parts} == {row[0]}


def test_blocks_fill_the_line() -> None:
    """A column goes below only when it does not fit: 3 + 2 + 5 characters fit into 10, not into 9."""
    assert blocks(["net", "bytes"], [["mlp", "12"]], 10) == "net  bytes\nmlp     12"
    assert blocks(["net", "a", "b"], [["mlp", "1", "2"]], 9) == "net  a  b\nmlp  1  2"
    assert blocks(["net", "a", "b"], [["mlp", "1", "2"]], 8) == "net  a\nmlp  1\n\nnet  b\nmlp  2"


def test_a_column_wider_than_the_line_is_whole() -> None:
    """Nothing is cut even where nothing fits."""
    assert "1234567890" in blocks(["net", "x"], [["a-long-name-of-a-net", "1234567890"]], 12)
    assert paragraph("123456789012 1", 5) == "123456789012\n1"


def _finetune_row(seconds: float, accuracy: float = 0.5) -> finetune_report.Row:
    macs = dict.fromkeys(finetune_report.KINDS, 123_456_789)
    seed = {
        "accuracy": accuracy, "images": 360, "tape_bytes": 12_345_678, "predicted_tape_bytes": 12_345_678,
        "layer_bytes": {"conv": 23_456_789}, "paper_bytes": 34_567_890, "factor_bytes": 45_678_901, "macs": macs,
        "predicted_macs": macs, "time_ratio": 1.65, "step_seconds": seconds, "cosines": {}, "energy_kept": {},
    }  # fmt: skip
    return finetune_report.Row("papers", "lance-planned-channels", 0.2, (seed,))


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_tables_of_experiments_are_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cell of the fine-tuning table stands in the text, and lines keep to the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    row = _finetune_row(0.5)
    finetune_report.show([row])
    out = capsys.readouterr().out
    words = re.split(r" {2,}|\n", out)
    assert set(finetune_report.cells(row)) <= set(words)
    assert set(finetune_report.COLUMNS) <= {word.strip() for word in words}
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= columns


def test_short_timings_are_not_stated(capsys: pytest.CaptureFixture[str]) -> None:
    """The median of milliseconds is noise; of long steps it is stated."""
    cells = dict(zip(finetune_report.COLUMNS, finetune_report.cells(_finetune_row(0.099)), strict=True))
    assert cells["time / bp"] == "too short"
    assert "1.65" in finetune_report.cells(_finetune_row(0.1))
    finetune_report.show([_finetune_row(0.01)])
    assert "Chance: 360 test images, 1 seed." in capsys.readouterr().out


def test_the_margin_by_hand() -> None:
    """Half right of 96 images, one seed: (48 + 2)/100 = 1/2, variance 1/400, and twice that for a difference."""
    assert chance.share_variance(0.5, 96) == 0.0025
    assert chance.share_variance(1.0, 96) == pytest.approx(0.98 * 0.02 / 100)
    assert chance.margin([[0.5], [0.5]], 96) == pytest.approx(1.96 * math.sqrt(0.005))
    # two seeds each: variances 0.0002 and 0, their mean 0.0001, over 2 seeds
    both = chance.margin([[0.49, 0.51], [0.5, 0.5]], 96)
    assert both == pytest.approx(1.96 * math.sqrt(2 * (0.0025 + 0.00005)))
    uneven = chance.margin([[0.5], [0.49, 0.51]], 96)  # the fewest seeds count
    assert uneven == pytest.approx(1.96 * math.sqrt(2 * (0.0025 + 0.0002)))


def test_the_sentence_names_images_seeds_and_margin() -> None:
    """With one seed it says that the seed is not in the margin."""
    one, two = chance.sentence([[0.5], [0.5]], 96), chance.sentence([[0.5, 0.5]] * 2, 96)
    assert "96 test images, 1 seed. " in one
    assert "less than 13.9 points" in one
    assert "what another seed changes comes on top" in one
    assert "2 seeds" in two
    assert "on top" not in two


def test_seconds_of_short_continual_runs_are_not_stated() -> None:
    """Below ten seconds the load of the machine decides."""

    def row(seconds: float) -> continual_report.Row:
        return continual_report.Row("gpm", ({"tasks": [{"seconds": seconds}, {"seconds": seconds}]},))

    assert continual_report._seconds(row(4.9)) == "too short"
    assert continual_report._seconds(row(5.0)) == "10.0"
