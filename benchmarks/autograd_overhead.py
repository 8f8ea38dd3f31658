"""What the tape costs where the arithmetic costs nothing: ``python -m benchmarks.autograd_overhead``.

Three things: microseconds of one operation, forward and backward, on tensors of a few numbers (a chain of a hundred
of them, then one backward pass), beside PyTorch's; a step of the 784-100-100-10 net at batch 10, beside PyTorch's; and
the first call, in processes of their own: loading Numba and compiling every kernel with an empty cache, with the cache
that this filled, and without Numba.

"the tape alone" is an operation that hands its input through: all of its time is overhead. The overhead of the others
is their time without that of NumPy's own calls for result and gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.commands.command_line import run_main
from benchmarks import steps
from benchmarks.side_by_side import Side, Table, Target, number, parser, peer, run, span, timed
from lance_ref import F, Tensor
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.engine.autograd import Function, Node
from lance_ref.engine.tensor import Shape

CHAIN, QUICK_CHAIN = 100, 3
MLP = "mlp"


class HandThrough(Function):
    """y = x, as an operation of its own."""

    op = "hand_through"
    returns_view = True

    @staticmethod
    def output_shape(*inputs: Tensor, **attributes: Any) -> Shape:
        return inputs[0].shape

    @staticmethod
    def forward(ctx: Node, *inputs: np.ndarray, **attributes: Any) -> np.ndarray:
        return inputs[0]

    @staticmethod
    def backward(ctx: Node, grad_output: np.ndarray) -> tuple[np.ndarray | None, ...]:
        return (grad_output,)


@dataclass(frozen=True)
class Operation:
    """One operation with a weight, on (2, 2) matrices.

    Attributes
    ----------
    apply : callable
        (functions, x, weight) -> result, on our tensors and functions or PyTorch's.
    bare : callable
        (x, weight, grad_output): NumPy's own calls for the result and both gradients, and nothing else.
    """

    apply: Callable[[Any, Any, Any], Any]
    bare: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]


OPERATIONS = {
    "add": Operation(lambda functions, x, w: x + w, lambda x, w, g: x + w),
    "mul": Operation(lambda functions, x, w: x * w, lambda x, w, g: (x * w, g * w, g * x)),
    "relu": Operation(lambda functions, x, w: functions.relu(x), lambda x, w, g: (np.maximum(x, 0), g * (x > 0))),
    "matmul": Operation(lambda functions, x, w: x @ w, lambda x, w, g: (x @ w, g @ w.T, x.T @ g)),
    "linear": Operation(lambda functions, x, w: functions.linear(x, w), lambda x, w, g: (x @ w.T, g @ w, g.T @ x)),
}
ALONE = Operation(lambda functions, x, w: HandThrough.apply(x), lambda x, w, g: None)


# ---- one operation -----------------------------------------------------------------------


def chain(operation: Operation, functions: Any, x: Any, w: Any, length: int) -> Side:
    """So many of the operation in a row, and one backward pass, with our tensors or PyTorch's."""

    def forward_and_backward() -> None:
        x.grad = w.grad = None
        y = x
        for _ in range(length):
            y = operation.apply(functions, y, w)
        y.sum().backward()

    return forward_and_backward


def bare_chain(operation: Operation, length: int) -> Side:
    """NumPy's calls of the chain."""
    x, w, g = np.ones((3, 2, 2), np.float32)

    def calls() -> None:
        for _ in range(length):
            operation.bare(x, w, g)

    return calls


def sides_of(operation: Operation, length: int) -> dict[str, Side]:
    """Ours, the bare calls, and PyTorch's where it is installed and has such an operation."""
    ones, halves = np.ones((2, 2), np.float32), np.full((2, 2), 0.5, np.float32)  # products neither grow nor overflow
    x, w = Tensor(ones, requires_grad=True), Tensor(halves, requires_grad=True)
    sides = {"ours": chain(operation, F, x, w, length), "bare": bare_chain(operation, length)}
    torch = peer("torch") if operation is not ALONE else None
    if torch is not None:
        tensors = [torch.from_numpy(array.copy()).requires_grad_() for array in (ones, halves)]
        sides["pytorch"] = chain(operation, torch.nn.functional, tensors[0], tensors[1], length)
    return sides


def measure_operations(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """Microseconds of each operation: ours, what of it is overhead, and PyTorch's."""
    length = QUICK_CHAIN if options.quick else CHAIN
    print("microseconds of an operation, forward and backward, on (2, 2) matrices")
    table = Table("operation", "ours", "overhead", "pytorch", "/ pytorch", "min-max", first=16)
    rows, overheads = {}, {}
    for name, operation in {"the tape alone": ALONE, **OPERATIONS}.items():
        timings = timed(sides_of(operation, length), options.repeats)
        rows[name] = {side: timing.as_json() for side, timing in timings.items()}
        medians = {side: 1e6 * timing.median / length for side, timing in timings.items()}
        overheads[name] = medians["ours"] - medians["bare"]
        theirs = medians.get("pytorch")
        table.row(
            name,
            number(medians["ours"]),
            number(overheads[name]),
            number(theirs),
            number(theirs and medians["ours"] / theirs),
            span(rows[name]["ours"], unit=1e-6 * length),
        )
    targets = [Target(f"microseconds of overhead, {name}", overhead, 15) for name, overhead in overheads.items()]
    return {"chain": length, "seconds_of_a_chain": rows, "overhead_microseconds": overheads}, targets


# ---- a small net -------------------------------------------------------------------------


def measure_step(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """A step of the small net: backpropagation here and in PyTorch."""
    case = steps.CASES[MLP]
    timings = steps.times(case, ("bp", "pytorch"), options.repeats)
    print(f"microseconds of a step of the {MLP} (784-100-100-10), batch {case.batch}")
    table = Table("side", "median", "min-max", first=16)
    for name, timing in timings.items():
        table.row(name, number(1e6 * timing.median), span(timing.as_json(), unit=1e-6))
    targets = []
    if "pytorch" in timings:
        ratio = timings["bp"].median / timings["pytorch"].median
        targets.append(Target(f"time of a step / PyTorch, {MLP}", ratio, case.limit))
    return {name: timing.as_json() for name, timing in timings.items()}, targets


# ---- the first call ----------------------------------------------------------------------


def first_call(**environment: str) -> dict[str, Any]:
    """What :mod:`benchmarks.first_call` reports from a process with this environment, and its seconds as a whole."""
    command, start = [sys.executable, "-m", "benchmarks.first_call"], time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed with {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "process": time.perf_counter() - start}


def measure_first_call(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """Three processes: with an empty cache, with the one that it filled, and without Numba."""
    runs = {"without Numba": {"LANCE_REF_NUMBA": "0"}}
    print("seconds of the first call of every kernel, in a process of its own")
    table = Table("", "import", "first", "second", "process", first=16)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if numba_enabled() and not options.quick:
            cached = {"LANCE_REF_NUMBA": "1", "NUMBA_CACHE_DIR": folder}
            runs = {"empty cache": cached, "filled cache": cached, **runs}
        for name, environment in runs.items():
            of = found[name] = first_call(**environment)
            keys = ("loading_numba", "first_call", "second_call", "process")
            table.row(name, *(number(of[key]) for key in keys))
    targets = []
    for name, of in found.items():
        if of["numba"] and of["not_reached"]:
            raise RuntimeError(f"kernels that the first call does not reach: {', '.join(of['not_reached'])}")
        if name == "empty cache":
            seconds = of["loading_numba"] + of["first_call"]
            targets.append(Target("seconds of compiling every kernel with an empty cache", seconds, 10))
    return found, targets


def measure(options: argparse.Namespace) -> dict[str, Any]:
    operations, of_operations = measure_operations(options)
    step, of_step = measure_step(options)
    first, of_first = measure_first_call(options)
    found = {"operations": operations, "step": step, "first_call": first}
    return {**found, "targets": [*of_operations, *of_step, *of_first]}


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parser("benchmarks.autograd_overhead", __doc__, repeats=9), arguments, measure, peers=("torch",))


if __name__ == "__main__":
    sys.exit(run_main(main))
