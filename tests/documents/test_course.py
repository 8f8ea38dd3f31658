"""What the lessons share: set-up, findings, sliders, and checks that take right answers and refuse wrong ones."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lance_ref.fused.deferral import enabled

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package beside the notebooks, imported as a notebook imports it; all is as before afterwards."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(NOTEBOOKS))
        patch.setenv("LANCE_REF_FUSE", "0")
        patch.setenv("OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS", "1"))
        patch.delenv("LANCE_REF_LESSON_CHECKED", raising=False)
        enabled.cache_clear()  # what this process read of the variable once holds for all tests that follow
        yield importlib.import_module("course")
    enabled.cache_clear()


# ---- right and wrong answers -----------------------------------------------------------


def value(data: np.ndarray, pull: Callable[..., Any], kept: dict[str, np.ndarray]) -> SimpleNamespace:
    """What an operation of lesson 1 returns, as far as the check looks at it."""
    return SimpleNamespace(data=data, pull=pull, kept=kept)


def tanh(a: Any) -> SimpleNamespace:
    output = np.tanh(a.data)
    return value(output, lambda g, kept: (g * (1 - kept["output"] ** 2),), {"output": output})


def tanh_without_g(a: Any) -> SimpleNamespace:
    output = np.tanh(a.data)
    return value(output, lambda g, kept: (1 - kept["output"] ** 2,), {"output": output})


def tanh_off_the_tape(a: Any) -> SimpleNamespace:
    output = np.tanh(a.data)
    return value(output, lambda g, kept: (g * (1 - output**2),), {})


def unfolded(order: str) -> Callable[[np.ndarray, int], np.ndarray]:
    return lambda tensor, mode: np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1, order=order)  # type: ignore[call-overload]


def batch_rank(v: float, m: float, n: int, epsilon: float) -> int:
    return 1 + max(0, int(np.ceil((epsilon * n * (v + m) - v - n * m) / v)))


def front(points: dict[str, tuple[float, float]]) -> set[str]:
    def dominated(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] >= a[1] and b != a for b in points.values())

    return {name for name, point in points.items() if not dominated(point)}


def free_directions(K: np.ndarray, M: np.ndarray, r: int) -> np.ndarray:
    N = np.linalg.qr(M, mode="complete")[0][:, M.shape[1] :]
    return N @ np.linalg.eigh(N.T @ K @ N)[1][:, ::-1][:, :r]


def by_key(key: Callable[[int, int], float]) -> Callable[[list[int], list[int]], list[int]]:
    return lambda shape, ranks: sorted(range(len(shape)), key=lambda mode: key(shape[mode], ranks[mode]))


def arena(nbytes: int) -> SimpleNamespace:
    return SimpleNamespace(ram_bytes=nbytes, ram={"gradients": nbytes // 2, "maps": 10, "trained weights": nbytes // 3})


ANSWERS: dict[str, tuple[Any, list[tuple[Any, str]]]] = {
    "1.1": (tanh, [(tanh_without_g, "ignores the gradient"), (tanh_off_the_tape, "nothing is kept")]),
    "1.2": (131_072, [(262_144, "FLOPs"), (4096, "pixels"), (7, "times a"), (1.5, "not a whole number")]),
    "1.3": ({"matmul", "cross_entropy"}, [({"matmul", "relu", "cross_entropy"}, "mask"), ("relu", "expected a set")]),
    "2.1": (1024, [(32_768, "whole input"), (8192, "a byte")]),
    "2.2": (524_288, [(16_384, "one bit")]),
    "2.3": ("factors", [("tape", "one image"), ("both", "expected 'tape' or 'factors'")]),
    "3.1": (unfolded("F"), [(unfolded("C"), "last remaining mode"), (lambda t, mode: t, "the shape")]),
    "3.2": (5, [(10, "twice"), (3, "squares"), ("x", "expected a whole number")]),
    "3.3": (15, [(14, "0.875"), (16, "0.94")]),
    "4.1": (9216, [(1152, "8 bytes"), (4608, "float64")]),
    "4.2": (batch_rank, [(lambda v, m, n, e: n, "it gives 8")]),
    "4.3": (
        lambda G, S, U1, U2: G.T @ U1 @ S @ U2.T,
        [
            (lambda G, S, U1, U2: G.T @ U1 @ S, "the shape"),
            (lambda G, S, U1, U2: -G.T @ U1 @ S @ U2.T, "numbers are not"),
        ],
    ),
    "5.1": ((-1, 0), [((2, 0), "exact gradient"), ((-1, -1), "projected channels"), ((1,), "expected two numbers")]),
    "5.2": ((-4, 2), [((1, 0), "no eigenvector"), ((0, 0), "no direction")]),
    "5.3": (("no", "yes"), [(("yes", "yes"), "single draw"), (("no", "no"), "mean"), ("no", "expected two words")]),
    "6.1": (65_536, [(65_344, "two numbers"), (79_360, "8 bits"), (13_824, "codes alone")]),
    "6.2": (2, [(3, "divide"), (4, "10,132")]),
    "6.3": (front, [(set, "not on the front"), (lambda points: {"b"}, "is on the front")]),
    "7.1": (12_160, [(1600, "tape alone"), (24_160, "does not need M")]),
    "7.2": (-0.4472, [(0, "gradient itself"), (1, "√5"), (3, "multiply")]),
    "7.3": (
        free_directions,
        [(lambda K, M, r: np.linalg.eigh(K)[1][:, :r], "along M"), (lambda K, M, r: M, "the shape")],
    ),
    "8.1": (199_872, [(196_608, "input alone"), (221_376, "a byte")]),
    "8.2": (lambda a, c, f: int(f // (a - c)) + 1, [(lambda a, c, f: int(f // (a - c)), "not smaller yet")]),
    "8.3": (3840, [(92_160, "dense"), (15_360, "bytes")]),
    "9.1": (1_382_400, [(460_800, "forward pass alone"), (2_764_800, "FLOPs"), (5_529_600, "own group")]),
    "9.2": (
        by_key(lambda n, r: 1 / n - 1 / r),
        [(by_key(lambda n, r: r), "would do"), (lambda s, r: [0], "each of the modes")],
    ),
    "9.3": (lambda once, ours, theirs: -(-once // (theirs - ours)), [(lambda o, a, b: o // (b - a), "by hand")]),
    "10.1": (2, [(4, "21 KiB"), (1, "larger one")]),
    "10.2": (4032, [(960, "as well"), (2496, "gradient")]),
    "10.3": (0.857375, [(0.95, "fewer"), (0.85, "multiplies"), (2, "1 − ηλ")]),
    "10.4": (16, [(4, "signs"), (96, "at most")]),
    "10.5": ("no", [("yes", "statistics")]),
    "11.1": (arena(200_000), [(arena(300_000), "37.0 KiB too much"), (5, "expected a program")]),
    "11.2": ((1.5, 1.500001), [((1.5, 1.6), "the same weights")]),
    "11.3": (0.7, [(0.45, "head alone"), (70, "between 0 and 1")]),
}


@pytest.mark.parametrize("number", ANSWERS)
def test_a_check_takes_right_answers_and_says_what_is_off_with_wrong_ones(number: str, course: Any) -> None:
    """A check that takes everything teaches nothing; one that refuses a right answer is worse."""
    right, wrong = ANSWERS[number]
    verdict = course.check(number, right)
    assert verdict, verdict
    assert re.fullmatch(rf"{re.escape(number)}: (right|reached: .+)", repr(verdict))
    for answer, words in wrong:
        verdict = course.check(number, answer)
        assert not verdict, answer
        assert words in repr(verdict)
    assert repr(course.check(number, None)) == f"{number}: no answer yet"


def test_every_exercise_of_a_lesson_is_in_the_table(course: Any) -> None:
    """Else a new exercise would have a check that nobody has tried."""
    asked = set()
    for path in NOTEBOOKS.glob("*.ipynb"):
        asked |= set(re.findall(r'course\.check\(\\"(\d+\.\d+)\\"', path.read_text(encoding="utf-8")))
    assert asked == set(ANSWERS)


def test_a_function_without_a_body_is_no_answer_and_one_that_raises_is_a_wrong_one(course: Any) -> None:
    assert repr(course.check("4.3", lambda *_: None)) == "4.3: no answer yet"
    assert "it raises ZeroDivisionError: " in repr(course.check("9.3", lambda *_: 1 // 0))
    with pytest.raises(ValueError, match=r"no exercise '1\.9'"):
        course.check("1.9", 3)
    with pytest.raises(ValueError, match="no exercise 'x'"):
        course.check("x", 3)


# ---- findings, sliders, set-up ----------------------------------------------------------


def test_a_finding_that_does_not_hold_is_a_line_for_a_reader_and_an_error_for_the_check(
    course: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    course.expect(True, "One is one.")
    assert capsys.readouterr().out == ""
    course.expect(np.bool_(False), "One is two.")
    assert capsys.readouterr().out == "With your numbers this is no longer so: One is two.\n"
    monkeypatch.setenv("LANCE_REF_LESSON_CHECKED", "1")
    with pytest.raises(AssertionError, match="One is two"):
        course.expect(False, "One is two.")


def test_a_slider_draws_once_while_lessons_are_checked(course: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No widget is committed: without a kernel it would be a grey box."""
    drawn: list[float] = []
    monkeypatch.setenv("LANCE_REF_LESSON_CHECKED", "1")
    assert course.explore(lambda epsilon: drawn.append(epsilon), epsilon=(0.95, 0.5)) is None
    assert drawn == [0.95]
    with pytest.raises(ValueError, match="'epsilon' has no values"):
        course.explore(drawn.append, epsilon=())


def test_a_slider_moves_where_ipywidgets_is_there(course: Any) -> None:
    pytest.importorskip("ipywidgets")
    drawn: list[tuple[float, int]] = []
    widget = course.explore(lambda epsilon, rank: drawn.append((epsilon, rank)), epsilon=(0.95, 0.5), rank=(2, 1, 3))
    epsilon, rank = widget.children[:2]
    assert (epsilon.value, rank.value) == (0.95, 2)
    assert list(rank.options) == [1, 2, 3]
    widget.update()
    rank.value = 3
    assert drawn[-1] == (0.95, 3)


def test_the_set_up_selects_the_plain_forward_pass_and_names_what_is_missing(tmp_path: Path) -> None:
    """``import course`` says it before ``lance_ref`` is imported; without a checkout it asks for a clone."""
    program = (
        "import os, sys; import course; assert os.environ['LANCE_REF_FUSE'] == '0'; "
        "assert not any(name.split('.')[0] == 'lance_ref' for name in sys.modules); "
        "course.importlib.util.find_spec = lambda name: None; "
        f"course.set_up(course.Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=NOTEBOOKS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: lance_ref is not installed")
    assert "clone the repository" in last


def test_the_running_example_is_small_and_learns(course: Any) -> None:
    net, (images, labels) = course.network(), course.batch(32)
    assert images.shape == (32, 1, 8, 8)
    assert labels.shape == (32,)
    assert sum(p.data.nbytes for p in net.parameters()) == 103_464
    learned = course.network(epochs=1)
    assert any(
        not np.array_equal(a, b) for a, b in zip(net.state_dict().values(), learned.state_dict().values(), strict=True)
    )
