"""Sets of layers, one by one, against all sets."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import pytest

import lance_ref
from analysis.plan import main
from analysis.planner.costs import Costs, Device
from analysis.planner.options import Option
from analysis.planner.search import Finder, finder_for, search
from analysis.planner.sets import best_set, with_sets
from lance_ref import Tensor, nn

SHAPE = (3, 8, 8)
OPTIONS = (Option("bp"), Option("int8"), Option("lance", fraction=Fraction(1, 4)))


class Narrowing(nn.Module):
    """Five layers of different sizes before the head, so that the cheapest are not the last."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 4, 20, 6, 24, 12)
        self.layers = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1, rng=i) for i, (a, b) in enumerate(pairwise(sizes))))
        self.head = nn.Linear(12, 5, rng=9)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = lance_ref.F.relu(layer(x))
        return self.head(x.mean((2, 3)))


def finder_of(device: Device, budget: int) -> Finder:
    return finder_for(Costs(Narrowing(), "net", SHAPE, device), (2,), budget, None, "parameters", None)


def all_sets(finder: Finder, option: Option) -> dict[tuple[str, ...], tuple[int, float]]:
    """Bytes and worth of every set of layers."""
    layers = finder.costs.layers
    sets = [of for n in range(1, len(layers) + 1) for of in combinations(layers, n)]
    worth = {path: finder.worth(option, path, 2, option.method != "lance") for path in layers}
    return {of: (finder.costs.memory(option, of, 2).total, sum(worth[path] for path in of)) for of in sets}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_best_of_all_sets(option: Option) -> None:
    """For what is kept, at every budget: no set that fits is worth more."""
    device = Device("kept", "flash", "elsewhere", "sgd-momentum")
    known = all_sets(finder_of(device, 0), option)
    for budget in sorted({total for total, _ in known.values()})[::3]:
        finder = finder_of(device, budget)
        like = search(finder.costs, [option], (2,), budget).rows[0]
        last = like.best or like.next
        assert last is not None
        found = best_set(finder, last)
        assert found is not None
        assert found.memory.total <= budget
        most = max(worth for total, worth in known.values() if total <= budget)
        assert known[found.paths][1] == pytest.approx(most, abs=1e-12), budget
        assert found.layers == len(found.paths)


def test_the_sum_of_the_layers_is_what_is_kept() -> None:
    """From the first layer on, what each adds is the same whichever others train."""
    finder = finder_of(Device("kept"), 0)
    layers = finder.costs.layers
    for option in OPTIONS:
        kept = {of: finder.costs.kept(option, of, 2) for n in range(1, 6) for of in combinations(layers, n)}
        adds = {path: kept[layers] - kept[tuple(p for p in layers if p != path)] for path in layers}
        for of, total in kept.items():
            assert total == kept[of[:1]] + sum(adds[path] for path in of[1:]), (option.name, of)
            assert total == finder.costs.memory(option, of, 2).training


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_sets_fit_by_their_peak(option: Option) -> None:
    """Where the peak decides, the set fits, and is worth no less than the last layers that fit."""
    device = Device(calibration="elsewhere")
    known = all_sets(finder_of(device, 0), option)
    totals = sorted({total for total, _ in known.values()})
    better = 0
    for budget in totals[:: len(totals) // 6]:
        finder = finder_of(device, budget)
        rows = search(finder.costs, [option], (2,), budget).rows
        (row,) = with_sets(finder, list(rows))
        assert row.best is not None, budget
        assert row.best.fits
        paths = row.best.paths or finder.costs.trains(row.best.layers)[0]
        assert known[paths][0] == row.best.memory.total <= budget
        last = rows[0].best
        if last is not None:
            assert known[paths][1] >= known[finder.costs.trains(last.layers)[0]][1]
            better += known[paths][1] > known[finder.costs.trains(last.layers)[0]][1]
        else:
            better += 1
    assert better, "no set was better than the last layers"


def test_sets_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The answer says that they are chosen, the document names them, the code trains them."""
    asked = ["--net", "convnet", "--num-classes", "10", "--input-shape", "1,16,16", "--batch", "2", "--method", "bp"]
    asked += ["--engine", "library", "--shares", "parameters"]

    def document(budget: int) -> dict[str, Any]:
        assert main([*asked, "--budget", f"{budget}B", "--tune", "best", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    chosen = 0
    for budget in range(200 * 1024, 300 * 1024, 20 * 1024):
        found = document(budget)
        best = found["rows"][0]["best"]
        if best is not None and best["paths"]:
            chosen += 1
            assert "chosen one by one" in found["answer"]
            space: dict[str, Any] = {}
            exec(compile(found["code"], "pasted", "exec"), space)
            assert list(space["net"].tuning.layers) == best["paths"]
    assert chosen, "no budget had a set"
