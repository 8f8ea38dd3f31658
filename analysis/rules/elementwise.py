"""Cost rules of everything that is not a matrix product.

``elementwise`` counts scalar operations: an addition, a multiplication, a comparison, a division, an
exponential each count 1; copying, indexing and scattering count 0. The backward part is counted only
for the gradients that are needed. Adding up the gradients of a value that is used twice is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from analysis.rules.layouts import is_basic_index
from analysis.rules.op_cost import Call, OpCost, Saved, bit_bytes, fresh, index_bytes, rule


class Unary(NamedTuple):
    """Scalar operations per element, and what is kept: input "x", "output", a bit or a byte each, or nothing."""

    forward: int
    backward: int
    tape: str | None
    pytorch: str | None


UNARY = {
    "neg": Unary(1, 1, None, None),
    "pow": Unary(1, 3, "x", "x"),  # g·e·x^(e−1)
    "exp": Unary(1, 1, "output", "output"),
    "sqrt": Unary(1, 2, "output", "output"),  # g / (2y)
    "tanh": Unary(1, 3, "output", "output"),  # g·(1 − y²)
    "sigmoid": Unary(4, 3, "output", "output"),  # 1/(1 + exp(−x));  g·y·(1 − y)
    "log": Unary(1, 1, "x", "x"),
    "erf": Unary(1, 5, "x", "x"),  # g·2/√π·exp(−x²)
    "gelu_tanh": Unary(9, 17, "x", "x"),  # ½x(1 + t), t = tanh(k(x + cx³));  g·(½(1 + t) + ½x(1 − t²)·k(1 + 3cx²))
    "gelu": Unary(5, 11, "x", "x"),  # ½x(1 + erf(x/√2));  g·(Φ(x) + x·φ(x))
    "hardswish": Unary(5, 6, "x", "x"),  # x·min(max(x + 3, 0), 6)/6;  g·(2x + 3)/6 inside (−3, 3)
    "hardsigmoid": Unary(4, 1, "bits", "x"),  # min(max(x + 3, 0), 6)/6;  g/6 inside (−3, 3)
    "silu": Unary(5, 9, "x", "x"),  # x·σ(x);  g·σ·(1 + x·(1 − σ))
    "mish": Unary(4, 15, "x", "x"),  # x·tanh(s), s = ln(1 + e^x);  g·(t + x·(1 − t²)·σ(x)), t and σ made again
    "softplus": Unary(4, 6, "x", "x"),  # ln(1 + e^(βx))/β;  g·σ(βx)
    "elu": Unary(3, 2, "output", "x"),  # x, or α·(e^x − 1);  g, or g·(y + α)
    "leaky_relu": Unary(2, 1, "bits", "x"),
    "relu": Unary(1, 1, "bits", "output"),
    "relu6": Unary(2, 1, "bits", "x"),
    "clip": Unary(2, 1, "bits", "x"),
    "fake_quantize": Unary(7, 1, "bits", "bytes"),  # /s, round, + z, between two bounds, − z, ·s
    "dropout": Unary(2, 1, "bits", "noise"),  # draw against p, scale;  PyTorch keeps the scaled noise as floats
    "softmax": Unary(5, 4, "output", "output"),  # max, −, exp, Σ, /;  y·(g − Σ g·y)
    "log_softmax": Unary(5, 4, "output", "output"),  # max, −, exp, Σ, −;  g − exp(y)·Σ g
}


def unary(call: Call) -> OpCost:
    """One input, one result of its shape."""
    costs, n = UNARY[call.record.op], call.n_out
    kept: dict[str, Callable[[], Saved]] = {
        "x": lambda: call.save_input("x", 0),
        "output": call.save_output,
        "bits": lambda: fresh("mask", bit_bytes(n)),
        "bytes": lambda: fresh("mask", n),
        "noise": lambda: fresh("noise", n * call.itemsize),
    }
    cost = OpCost(elementwise=costs.forward * n)
    if call.on_tape:
        cost.elementwise += costs.backward * n
        cost.tape = [kept[costs.tape]()] if costs.tape else []
        cost.pytorch = [kept[costs.pytorch]()] if costs.pytorch else []
    return cost


rule(*UNARY)(unary)


def _summed(call: Call, position: int) -> int:
    """Additions that fold the gradient of a broadcast input back to its shape."""
    return call.n_out if call.record.inputs[position].size < call.n_out else 0


@rule("add", "sub")
def add(call: Call) -> OpCost:
    cost = OpCost(elementwise=call.n_out)
    for position in (0, 1):
        if call.needs(position):
            negated = call.n_out if call.record.op == "sub" and position == 1 else 0
            cost.elementwise += negated + _summed(call, position)
    return cost


@rule("mul")
def mul(call: Call) -> OpCost:
    cost = OpCost(elementwise=call.n_out)
    for this, other in ((1, 0), (0, 1)):
        if call.needs(this):
            cost.elementwise += call.n_out + _summed(call, this)
            cost.tape.append(call.save_input("ab"[other], other))
    cost.pytorch = cost.tape[::-1]  # PyTorch lists the second operand first
    return cost


@rule("div")
def div(call: Call) -> OpCost:
    """∂a = g/b;  ∂b = −g·a/b² (four operations)."""
    cost = OpCost(elementwise=call.n_out)
    if call.on_tape:
        cost.tape.append(call.save_input("b", 1))
    if call.needs(0):
        cost.elementwise += call.n_out + _summed(call, 0)
    if call.needs(1):
        cost.elementwise += 4 * call.n_out + _summed(call, 1)
        cost.tape.append(call.save_input("a", 0))
    cost.pytorch = list(cost.tape)
    return cost


@rule("prelu")
def prelu(call: Call) -> OpCost:
    """x, or w·x: a comparison and a product. Backward the same for x; a product and a sum for w."""
    n = call.n_out
    cost = OpCost(elementwise=2 * n + 2 * n * call.needs(0) + 2 * n * call.needs(1))
    if call.on_tape:
        cost.tape.append(call.save_input("x", 0))
        cost.pytorch = [call.save_input("x", 0), call.save_input("weight", 1)]
    if call.needs(0):
        cost.tape.append(call.save_input("weight", 1))
    return cost


@rule("glu")
def glu(call: Call) -> OpCost:
    """a·σ(b): 5 for each result; backward σ again (4), g·σ, and ·(1 − σ)·a."""
    cost = OpCost(elementwise=5 * call.n_out)
    if call.on_tape:
        cost.elementwise += 8 * call.n_out
        cost.tape, cost.pytorch = [call.save_input("x", 0)], [call.save_input("x", 0)]
    return cost


@rule("where")
def where(call: Call) -> OpCost:
    """A choice for each result, and for each gradient. PyTorch keeps the condition as it is, a byte each."""
    cost = OpCost(elementwise=call.n_out)
    if call.on_tape:
        cost.tape = [fresh("mask", bit_bytes(call.n_in))]
        cost.pytorch = [call.save_input("condition", 0)]
    for position in (1, 2):
        if call.needs(position):
            cost.elementwise += call.n_out + _summed(call, position)
    return cost


@rule("embedding")
def embedding(call: Call) -> OpCost:
    """Rows are copied; their gradients are added up. PyTorch keeps the indices as they are."""
    cost = OpCost()
    if call.on_tape:
        cost.elementwise = call.n_out
        cost.tape = [fresh("indices", call.n_in * index_bytes(call.record.inputs[1].shape[0]))]
        cost.pytorch = [call.save_input("indices", 0)]
    return cost


@rule("interpolate")
def interpolate(call: Call) -> OpCost:
    """Nearest: copies, whose gradients are added up. Linear: two products and a sum along each axis, one by one."""
    attributes = call.record.attributes
    shape, work = list(call.record.inputs[0].shape), 0
    for axis, size in enumerate(attributes["size"], start=2):
        shape[axis] = size
        work += 3 * math.prod(shape)
    if attributes["mode"] == "nearest":
        return OpCost(elementwise=call.n_out if call.on_tape else 0)
    return OpCost(elementwise=work * (2 if call.on_tape else 1))


@rule("reshape", "permute", "concatenate", "pad")
def moved(call: Call) -> OpCost:
    """Copies and looks at the same memory: nothing computed, nothing kept."""
    return OpCost()


@rule("expand")
def expand(call: Call) -> OpCost:
    """A copy; backward adds up what was repeated."""
    return OpCost(elementwise=_summed(call, 0) if call.on_tape else 0)


@rule("index")
def index(call: Call) -> OpCost:
    """Slices keep nothing. Arrays of positions are kept; their gradient is scattered by adding.

    A record has one part for each dimension (None: a new one), an array as ``("array", its shape)``.
    PyTorch keeps positions as int64.
    """
    cost = OpCost()
    parts = call.record.attributes["index"]
    if not call.on_tape or is_basic_index(parts):
        return cost
    cost.elementwise = call.n_out
    sizes = iter(call.record.inputs[0].shape)
    for part in parts:
        size = 0 if part is None else next(sizes)
        if isinstance(part, tuple):
            count = math.prod(part[1])
            cost.tape.append(fresh("index", count * index_bytes(size)))
            cost.pytorch.append(fresh("index", count * 8))
    return cost


@rule("sum")
def sum_(call: Call) -> OpCost:
    return OpCost(elementwise=call.n_in)


@rule("mean")
def mean(call: Call) -> OpCost:
    return OpCost(elementwise=call.n_in + call.n_out + (call.n_out if call.on_tape else 0))


@rule("max")
def max_(call: Call) -> OpCost:
    """One comparison per element. Over everything, PyTorch keeps input and result; over a dim, positions."""
    cost = OpCost(elementwise=call.n_in)
    if call.on_tape:
        cost.tape = [fresh("argmax", call.n_out * index_bytes(call.n_in // call.n_out))]
        if call.record.attributes["dim"] is None:
            cost.pytorch = [call.save_input("x", 0), call.save_output()]
        else:
            cost.pytorch = [fresh("indices", call.n_out * 8)]
    return cost


@rule("var")
def var(call: Call) -> OpCost:
    """Mean, difference, square, sum, and one division; backward: the differences again, times a factor."""
    cost = OpCost(elementwise=4 * call.n_in + 2 * call.n_out)
    if call.on_tape:
        cost.elementwise += 3 * call.n_in
        cost.tape, cost.pytorch = [call.save_input("x", 0)], [call.save_input("x", 0)]
    return cost


@rule("cross_entropy")
def cross_entropy(call: Call) -> OpCost:
    """log-softmax (5 per logit) and the mean of B entries; backward (softmax − one-hot)/B: 2 per logit.

    PyTorch keeps the log-probabilities, the labels as int64, and one number for the sum of weights.
    """
    B, K = call.record.inputs[0].shape
    cost = OpCost(elementwise=5 * B * K + B)
    if call.on_tape:
        cost.elementwise += 2 * B * K
        cost.tape = [fresh("probabilities", B * K * call.itemsize), fresh("labels", B * index_bytes(K))]
        cost.pytorch = [
            fresh("log-probabilities", B * K * call.itemsize),
            fresh("labels", B * 8),
            fresh("total weight", call.itemsize),
        ]
    return cost


@rule("mse_loss")
def mse_loss(call: Call) -> OpCost:
    """(a − b)², summed; backward 2(a − b)/n, and its negative for b. PyTorch keeps both inputs."""
    n = max(value.size for value in call.record.inputs)
    cost = OpCost(elementwise=3 * n)
    if call.on_tape:
        cost.elementwise += n * (call.needs(0) + call.needs(1))
        cost.tape = [fresh("difference", n * call.itemsize)]
        cost.pytorch = [call.save_input("a", 0), call.save_input("b", 1)]
    return cost


@rule("max_pool2d", "max_pool3d")
def max_pool2d(call: Call) -> OpCost:
    """A comparison per place of a window. The greatest place is kept; PyTorch keeps it as int64, and the input."""
    window = math.prod(call.record.attributes["kernel_size"])
    cost = OpCost(elementwise=call.n_out * window)
    if call.on_tape:
        cost.elementwise += call.n_out
        cost.tape = [fresh("argmax", call.n_out * index_bytes(window))]
        cost.pytorch = [call.save_input("x", 0), fresh("indices", call.n_out * 8)]
    return cost


@rule("avg_pool2d", "avg_pool3d")
def avg_pool2d(call: Call) -> OpCost:
    """An addition per place of a window and a division per result, and the same back. PyTorch keeps the input."""
    each = math.prod(call.record.attributes["kernel_size"]) + 1
    return _pooled(call, call.n_out * each)


@rule("adaptive_avg_pool2d")
def adaptive_avg_pool2d(call: Call) -> OpCost:
    """As avg_pool2d; window i of n_out covers [⌊i·n/n_out⌋, ⌈(i+1)·n/n_out⌉). To 1×1 PyTorch takes the mean."""
    *_, H, W = call.record.inputs[0].shape
    H_out, W_out = call.record.attributes["output_size"]
    covered = [sum(-(-(i + 1) * n // m) - i * n // m for i in range(m)) for n, m in ((H, H_out), (W, W_out))]
    planes = call.n_out // (H_out * W_out)
    return _pooled(call, planes * math.prod(covered) + call.n_out, keeps=(H_out, W_out) != (1, 1))


def _pooled(call: Call, work: int, keeps: bool = True) -> OpCost:
    cost = OpCost(elementwise=work)
    if call.on_tape:
        cost.elementwise += work
        cost.pytorch = [call.save_input("x", 0)] if keeps else []
    return cost
