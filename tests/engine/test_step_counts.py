"""What a training step executes and allocates is what it did when ``step_counts.json`` was written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import buffers, counts
from benchmarks.steps import Case
from lance_ref.algebra import geometry

FILE = Path(__file__).parents[1] / "data" / "step_counts.json"
COMMAND = "python -m benchmarks.counts --output tests/data/step_counts.json"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("case", counts.CASES, ids=lambda case: case.net)
def test_counts_are_the_recorded_ones(case: Case, recorded: dict[str, Any]) -> None:
    """One multiply-add, buffer or copy more in a step of any store, and it is said where."""
    names = {f"{case.net}, {method}" for method in counts.METHODS}
    of_case = {**recorded, "counts": {name: of for name, of in recorded["counts"].items() if name in names}}
    lines = counts.differences(counts.count_all([case]), of_case)
    told = "\n".join(lines)
    assert not lines, f"the counts of a step have changed; if that is meant: {COMMAND}\n{told}"


def test_every_count_is_of_a_case(recorded: dict[str, Any]) -> None:
    """A net or method that is no longer counted would stay in the file unseen."""
    expected = {f"{case.net}, {method}" for case in counts.CASES for method in counts.METHODS}
    assert set(recorded["counts"]) == expected


def test_a_copy_more_is_caught(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A needless copy of an output gradient changes no result, but this."""
    grouped = geometry.ConvGeometry._grouped
    monkeypatch.setattr(geometry.ConvGeometry, "_grouped", lambda *args: grouped(*args).copy())
    case = Case("convnet", 8, image_size=16)
    before = {name: of for name, of in recorded["counts"].items() if name == "convnet, bp"}
    here = {"libraries": counts.libraries(), "counts": before}
    lines = counts.differences({"convnet, bp": counts.count_step(case, "bp")}, here)
    assert [line.split(": ")[1].split()[0] for line in lines] == list(counts.ALLOCATED)
    assert all("(+" in line for line in lines)


def test_what_other_libraries_may_change(recorded: dict[str, Any]) -> None:
    """With other versions fewer buffers are no difference, more are; multiply-adds always count."""
    now = copy.deepcopy(recorded["counts"])
    now["mlp, bp"]["buffers"] -= 1
    now["mlp, lance"]["copies"] += 1
    now["mlp, asi"]["forward multiply-adds"] += 1
    older = {**recorded, "libraries": {**counts.libraries(), "numpy": "2.0"}}
    assert [line.split(": ")[0] for line in counts.differences(now, older)] == ["mlp, asi", "mlp, lance"]
    elsewhere = {**recorded, "libraries": {**counts.libraries(), "system": "Plan 9"}}
    assert [line.split(": ")[0] for line in counts.differences(now, elsewhere)] == ["mlp, asi"]
    same = {**recorded, "libraries": counts.libraries()}
    assert counts.differences(now, same) == [
        f"mlp, asi: forward multiply-adds {now['mlp, asi']['forward multiply-adds'] - 1:,} -> "
        f"{now['mlp, asi']['forward multiply-adds']:,} (+1)",
        f"mlp, bp: buffers {now['mlp, bp']['buffers'] + 1} -> {now['mlp, bp']['buffers']} (-1)",
        f"mlp, lance: copies {now['mlp, lance']['copies'] - 1} -> {now['mlp, lance']['copies']} (+1)",
    ]


# ---- the counter -----------------------------------------------------------------------------


def test_buffers_by_hand() -> None:
    """Every way to a new buffer counts once with its bytes, views and small arrays do not."""
    with buffers.count_buffers() as counted:
        a = np.ones((16, 32))  # 4096 bytes
        b = np.zeros((16, 32), np.float32)  # 2048 bytes
        c = a @ a.T  # 2048 bytes
        np.add(a, 1, out=a)
        assert a.T[0, 0] == a[3:].reshape(-1)[0] == a.ravel()[0]
        np.ones(127)  # 1016 bytes
    assert (counted.count, counted.nbytes, counted.copies) == (3, 4096 + 2048 + 2048, 0)
    assert b.nbytes == c.nbytes


@pytest.mark.parametrize(
    "copying",
    [
        lambda a: a.copy(),
        lambda a: np.array(a),
        lambda a: a.T.reshape(-1),
        lambda a: a.T.ravel(),
        lambda a: a.flatten(),
        lambda a: np.ascontiguousarray(a.T),
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(np.int64),
    ],
)  # fmt: skip
def test_a_copy_is_counted_as_one(copying: Any) -> None:
    """Whatever function makes it; the same functions without a need for a copy give none."""
    a = np.ones((16, 32))
    with buffers.count_buffers() as counted:
        copying(a)
        np.ascontiguousarray(a)
        a.reshape(-1)
        a.astype(np.float64, copy=False)
        a * 2
    assert (counted.copies, counted.copied_bytes) == (1, 4096)
    assert counted.count == 2


def test_counting_ends_with_the_block_even_after_an_error() -> None:
    """Arrays that were made inside live on and are freed afterwards; nothing more is counted."""
    kept: list[Any] = []

    def fail() -> None:
        with buffers.count_buffers() as counted:
            kept.extend([counted, *(np.ones(1000) for _ in range(3))])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    counted = kept[0]
    kept.append(np.ones(1000))
    kept.clear()
    assert counted.count == 3
    with buffers.count_buffers(), pytest.raises(RuntimeError, match="in use"), buffers.count_buffers():
        pass
