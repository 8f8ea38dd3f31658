"""The trace: the same records from shapes alone as from a real run, at no cost."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from op_cases import CASES, Case

from lance_ref import F, Tensor, models, nn, record, trace
from lance_ref.nn import init


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_alone_give_the_records_of_a_real_run(case: Case, dtype: Any) -> None:
    """Shape, dtype, gradients and attributes of every operation; a cost model may trust either."""
    for wanted in range(len(case.shapes) + 1):  # all, and each input without gradients in turn
        needs = [i != wanted for i in range(len(case.shapes))]
        arrays = case.arrays(dtype)
        with record() as real:
            out = case.function(*(Tensor(a, requires_grad=n) for a, n in zip(arrays, needs, strict=True)))
        with record() as traced:
            meta = case.function(
                *(Tensor.meta(a.shape, dtype, requires_grad=n) for a, n in zip(arrays, needs, strict=True))
            )
        assert traced == real
        assert {r.op for r in real} >= {case.op}
        assert meta.is_meta
        assert (meta.shape, meta.dtype, meta.requires_grad) == (out.shape, out.dtype, out.requires_grad)


class Attention(nn.Module):
    """A user's own module, made of functions and operators, without any registration."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24, rng=0)
        self.out = nn.Linear(8, 8, rng=1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (self.qkv(self.norm(x)).reshape(B, L, 3, 2, 4)[:, :, i].transpose(1, 2) for i in range(3))
        scores = F.softmax(q @ k.transpose(2, 3) / 2.0, -1)
        return x + self.drop(self.out((scores @ v).transpose(1, 2).reshape(B, L, 8)))


NETS = {
    "a user's own": (Attention, (2, 5, 8)),
    "convnet": (lambda: models.create("convnet", num_classes=10), (2, 3, 8, 8)),
    "mobilenetv2": (lambda: models.create("mobilenetv2", num_classes=10), (2, 3, 32, 32)),
    "resnet18": (lambda: models.create("resnet18", num_classes=10), (2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_a_net_traces_as_it_runs(name: str, training: bool) -> None:
    """Whole networks, training and evaluation; tracing changes neither weights nor statistics nor seeds."""
    make, shape = NETS[name]
    net = make().train(training)
    before = net.state_dict()
    generator = init.as_generator().bit_generator.state
    traced = trace(net, shape)
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    assert init.as_generator().bit_generator.state == generator
    with record(net) as real:
        net(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    assert traced == real
    assert all(
        value.parameter is None or value.parameter in dict(net.named_parameters()) for r in real for value in r.inputs
    )


def test_a_large_batch_costs_nothing() -> None:
    """ResNet-34 at batch 4096 and 224 pixels: 1.2 TB of activations, described in a moment, in under 4 MB."""
    with init.shapes_only():
        net = models.create("resnet34", num_classes=1000)
    trace(net, (1, 3, 224, 224))
    tracemalloc.start()
    try:
        records = trace(net, (4096, 3, 224, 224))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    start = time.process_time()
    trace(net, (4096, 3, 224, 224))
    assert time.process_time() - start < 1
    assert sum(r.op == "conv2d" for r in records) == 36
    assert records[0].output.shape == (4096, 64, 112, 112)
    assert records[0].output.nbytes == 4096 * 64 * 112 * 112 * 4
    assert records[-1].output.shape == (4096, 1000)


def test_paths_name_the_layer_that_ran() -> None:
    """Nested modules, a module called twice, and operations of forward() itself."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3, rng=0), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x)) + x

    records = trace(Twice(), (2, 3))
    assert [(r.op, r.path) for r in records] == [
        ("linear", "block.0"),
        ("relu", "block.1"),
        ("linear", "block.0"),
        ("relu", "block.1"),
        ("add", ""),
    ]
    weights = [r.inputs[1] for r in records if r.op == "linear"]
    assert weights[0] == weights[1]
    assert weights[0].parameter == "block.0.weight"
    assert records[-1].inputs == (records[3].output, records[0].inputs[0])


def test_a_path_survives_an_error() -> None:
    """After a failed forward pass the next one starts from the root again."""
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3, rng=0)))
    with pytest.raises(ValueError, match="linear: x has shape"):
        trace(net, (2, 4))
    with record() as records:
        F.relu(np.ones(3))
    assert records[0].path == ""
    assert [r.path for r in trace(net, (2, 3))] == ["0.0"]


def test_shared_parameters_have_one_name_and_one_id() -> None:
    """A cost model counts tied weights once."""
    net = nn.Sequential(nn.Linear(3, 3, rng=0), nn.Linear(3, 3, rng=1))
    net[1].weight = net[0].weight
    first, second = trace(net, (2, 3))
    assert first.inputs[1] == second.inputs[1]
    assert first.inputs[1].parameter == "0.weight"
    assert first.inputs[2].id != second.inputs[2].id


def test_gradients_in_a_trace_follow_the_parameters() -> None:
    """Below the first trained layer nothing needs a gradient; above it the activations do."""
    net = nn.Sequential(nn.Linear(3, 3, rng=0), nn.Linear(3, 3, rng=1), nn.Linear(3, 3, rng=2))
    net.requires_grad_(False)
    net[1].weight.requires_grad_()
    records = trace(net, (2, 3))
    assert [tuple(value.requires_grad for value in r.inputs) for r in records] == [
        (False, False, False),
        (False, True, False),
        (True, False, False),
    ]
    assert [r.output.requires_grad for r in records] == [False, True, True]


def test_the_dtype_is_the_nets() -> None:
    """float64 nets trace in float64 by themselves."""
    net = nn.Sequential(nn.Linear(3, 2, rng=0))
    assert trace(net, (1, 3))[0].output.dtype == "float32"
    assert trace(net.to(np.float64), (1, 3))[0].output.dtype == "float64"
    assert trace(nn.ReLU(), (1, 3), np.float64)[0].output.dtype == "float64"
    with pytest.raises(TypeError, match=r"float32.*float64"):
        trace(net, (1, 3), np.float32)


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.data.max() > 0 else x


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: trace(LooksAtValues(), (2, 3)), RuntimeError, "looks at values cannot be traced"),
        (lambda: trace(F.relu, (2, 3)), TypeError, "net is a function, expected a lance_ref.nn.Module"),
        (lambda: trace(nn.ReLU(), ()), ValueError, r"input_shape is \(\), expected positive integers"),
        (lambda: trace(nn.ReLU(), (2, 0)), ValueError, r"input_shape is \(2, 0\)"),
        (lambda: trace(nn.ReLU(), (2, -3)), ValueError, "positive integers"),
        (lambda: trace(nn.ReLU(), (2.0, 3)), ValueError, "positive integers"),
        (lambda: trace(nn.ReLU(), (2, 3), np.int64), TypeError, "int64"),
    ],
)
def test_what_cannot_be_traced_is_explained(call: Any, error: type[Exception], says: str) -> None:
    """With the reason, not with a missing attribute somewhere inside."""
    with pytest.raises(error, match=says):
        call()


def test_a_tensor_that_changes_is_told_anew_under_its_number() -> None:
    """Values are remembered by tensor; what is remembered must not outlive a change."""
    x = Tensor(np.ones(3, np.float32))
    with record() as records:
        F.relu(x)
        F.relu(x)
        x.requires_grad_()
        F.relu(x)
        x.requires_grad_(False)
        x.data = np.ones(3)
        F.relu(x)
    values = [r.inputs[0] for r in records]
    assert values[0] is values[1]
    assert [value.id for value in values] == [0, 0, 0, 0]
    assert [value.requires_grad for value in values] == [False, False, True, False]
    assert [value.dtype for value in values] == ["float32", "float32", "float32", "float64"]
    assert [value.nbytes for value in values] == [12, 12, 12, 24]
