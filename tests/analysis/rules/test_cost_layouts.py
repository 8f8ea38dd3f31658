"""Which values share memory: strides through views against NumPy's own, names, and what backward reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.rules.account import account, row_names
from analysis.rules.layouts import (
    Layout,
    Memory,
    Storage,
    backward_reaches,
    is_basic_index,
    packed_strides,
    reshape_strides,
)
from analysis.rules.op_cost import COUNTS, Call, OpCost
from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.autograd import Tensor
from lance_ref.engine.recording import OpRecord, Value
from lance_ref.nn.tracing import record, trace


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    """A permuted, perhaps sliced array and another shape for it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    array = np.arange(math.prod(shape), dtype=np.int8).reshape(shape)
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    if draw(st.booleans()):
        array = array[:: draw(st.sampled_from([1, 2]))]
    factors: list[int] = []
    rest = array.size
    while rest > 1:
        factor = draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        factors.append(factor)
        rest //= factor
    ones = draw(st.integers(0, 2))
    return array, tuple(draw(st.permutations(factors + [1] * ones)))


@given(reshapes())
def test_reshape_views_exactly_where_numpy_does(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    """Taking a copy for a view bills too little, a view for a copy too much."""
    array, shape = case
    reshaped = array.reshape(shape)
    strides = reshape_strides(array.shape, array.strides, shape)
    assert (strides is not None) == np.shares_memory(reshaped, array)
    if strides is not None:
        same = [s for n, s in zip(shape, strides, strict=True) if n > 1]
        assert same == [s for n, s in zip(shape, reshaped.strides, strict=True) if n > 1]


def test_reshape_to_another_number_of_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers of elements differ"):
        reshape_strides((2, 3), (3, 1), (5,))


def test_a_slice_keeps_the_whole_storage() -> None:
    """Half an array keeps the whole buffer alive."""
    layout = Layout(Storage(96), (4, 6), packed_strides((4, 6)))
    part = layout.indexed((slice(1, 4, 2), None, 3))
    assert part.storage is layout.storage
    assert part.shape == (2, 1)
    assert part.strides[0] == 12


def test_basic_and_array_indices_are_told_apart() -> None:
    assert is_basic_index((0, slice(None), None))
    assert not is_basic_index((0, ("array", (3,))))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in ("exp", "tanh", "sigmoid", "relu", "relu6", "hardswish", "gelu")},
    "add": lambda x: x + x,
    "mul": lambda x: x * 2.0,
    "dropout": lambda x: F.dropout(x, 0.5),
    "softmax": lambda x: F.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "concatenate": lambda x: F.concatenate([x, x], 0),
}


@pytest.mark.parametrize("dims", list(permutations(range(3))))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_keep_the_order_of_axes_where_the_model_says_so(dims: tuple[int, ...], name: str) -> None:
    """Whether a later reshape copies depends on it."""
    x = Tensor(np.random.default_rng(0).uniform(0.1, 1, (2, 3, 4)).astype(np.float32), requires_grad=True)
    with record() as records:
        y = FUNCTIONS[name](x.permute(*dims))
    memory = Memory()
    layouts = [memory.follow(entry) for entry in records]
    assert tuple(s * 4 for s in layouts[-1].strides) == y.data.strides


def test_a_value_that_nobody_uses_is_not_reached() -> None:
    """A branch that does not lead to the loss has no backward."""
    with record() as records:
        x = Tensor.meta((2, 3), requires_grad=True)
        F.exp(x)
        F.relu(x).sum()
    assert [(r.op, reached) for r, reached in zip(records, backward_reaches(records), strict=True)] == [
        ("exp", False), ("relu", True), ("sum", True),
    ]  # fmt: skip


def _step(net: nn.Module) -> list[OpRecord]:
    with record(net) as records:
        F.cross_entropy(net(Tensor.meta((2, 4))), Tensor.meta((2,), np.int64))
    return list(records)


def test_names_are_unique_and_are_layer_paths() -> None:
    """One operation in a layer: its path. Several: path/op. Repeats are numbered. The loss is last."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.fc(F.relu(self.fc(x))) + x))

    names = row_names(_step(Net()))
    assert names == ["fc", "(root)/relu", "fc#2", "(root)/add", "(root)/relu#2", "head", "loss"]


def test_an_empty_trace_costs_nothing() -> None:
    assert account([], None) == []


def test_frozen_layers_below_the_first_trained_one_keep_nothing() -> None:
    """The first layer's input needs no gradient: neither it nor its weight is on the tape."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for position in (0, 2):
        net.get_submodule(str(position)).requires_grad_(False)
    bills = account(_step(net), head="4")
    assert [bill.tape_bytes for bill in bills] == [0, 0, 0, 0, 2 * 4 * 4, 2 * 2 * 4 + 2]
    assert not any(bill.tuned for bill in bills)
    assert len(trace(net, (2, 4))) == 5


def test_a_record_that_was_followed_already_keeps_its_place() -> None:
    """Taken in twice, its result is not in two places."""
    with record() as records:
        F.neg(Tensor.meta((2, 3)))
    memory = Memory()
    assert memory.follow(records[0]) is memory.follow(records[0])


def test_who_is_tuned_by_hand() -> None:
    """A frozen layer and the head are not; the papers count the input of the one between them alone."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    with record(net) as records:
        F.cross_entropy(net(Tensor.meta((4, 6))), Tensor.meta((4,), np.int64))
    bills = account(list(records), "2")
    assert [bill.tuned for bill in bills] == [False, True, False, False]
    assert [bill.paper_bytes for bill in bills] == [0, 4 * 6 * 4, 0, 0]
    assert account(list(records), "2", repeats=3)[0].cost.forward_macs == 3 * bills[0].cost.forward_macs > 0


def test_names_of_rows_by_hand() -> None:
    """The operation where a path has several, a number from the second call on."""
    calls = [("a", "linear"), ("a", "linear"), ("b", "add"), ("b", "mul"), ("", "neg"), ("", "cross_entropy")]
    records = [OpRecord(op, path, (), Value.__new__(Value), {}) for path, op in calls]
    assert row_names(records) == ["a", "a#2", "b/add", "b/mul", "(root)/neg", "loss"]


def test_calls_off_the_tape_and_repeated_costs() -> None:
    """Where backward does not come through nothing needs a gradient; operations count as often as they run."""
    with record() as records:
        F.neg(Tensor.meta((2, 3), requires_grad=True))
    memory = Memory()
    inputs = (memory.of(records[0].inputs[0]),)
    for on_tape in (True, False):
        assert Call(records[0], inputs, memory.follow(records[0]), on_tape).needs(0) is on_tape
    once = OpCost(**{name: i + 1 for i, name in enumerate(COUNTS)}, paper_bytes=5, subspace_bytes=7)
    thrice = once.repeated(3)
    with record() as frozen:
        F.neg(Tensor.meta((2, 3)))
    assert (backward_reaches(records), backward_reaches(frozen)) == ([True], [False])
    assert [getattr(thrice, name) for name in COUNTS] == [3 * (i + 1) for i in range(len(COUNTS))]
    assert (thrice.paper_bytes, thrice.subspace_bytes) == (5, 7)
