"""Recomputed segments: the gradients of plain backpropagation bit by bit, from the segment's input alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import recompute_nets
from helpers import check_live_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_ref import F, Tensor, count_macs, manual_seed, nn, no_grad, record, tape, trace, tune
from lance_ref.engine.random import Draws, as_generator
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.stores import Exact

LABELS = np.array([0, 2, 1])


def images(dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 2, *recompute_nets.SIZE)).astype(dtype)


def two_steps(net: Module, dtype: Any, grad: bool) -> dict[str, Any]:
    """Everything that two training steps leave behind: loss, gradients, buffers, random state."""
    manual_seed(7)
    left: dict[str, Any] = {}
    for step in range(2):
        x = Tensor(images(dtype, step), requires_grad=grad)
        loss = F.cross_entropy(net(x) + 0.1 * x.mean(), LABELS)  # the input is used outside as well
        loss.backward()
        left |= {f"loss {step}": loss.data, f"input {step}": x.grad}
        left |= {f"{name} {step}": parameter.grad for name, parameter in net.named_parameters()}
        left |= {f"{name} {step}": array.copy() for name, array in net.named_buffers()}
        left[f"random {step}"] = str(as_generator().bit_generator.state)
        left |= {f"random {p} {step}": str(m.rng.bit_generator.state) for p, m in dropouts(net).items()}
    return left


def dropouts(net: Module) -> dict[str, Any]:
    return {path: m for path, m in net.named_modules() if isinstance(m, nn.Dropout) and m.rng is not None}


def assert_identical(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name] is not None, name
            assert found[name].dtype == value.dtype, name
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            assert found[name] == value, name


@pytest.mark.usefixtures("unfused")
@given(
    recompute_nets.plans(),
    recompute_nets.tunings(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["float32", "float64"]),
)
@settings(max_examples=40)
def test_any_net_trains_as_without_recomputation(
    plan: list[Any], tuning: dict[str, Any], grad: bool, lance: bool, dtype: str
) -> None:
    """Nested segments, residuals, dropout, batch norm, LANCE, frozen layers: every number the same, bit by bit."""
    results = []
    for recompute in (False, True):
        net = recompute_nets.net(plan, recompute).to(dtype)
        tune(net, **tuning)
        if lance:
            recompute_nets.compress_at_random(net, len(LABELS), dtype)
        results.append(two_steps(net, dtype, grad))
    assert_identical(results[1], results[0])


# ---- planted faults: the comparison above must catch them ------------------------------------


def differs(plan: list[Any]) -> bool:
    plain, again = (two_steps(recompute_nets.net(plan, recompute), np.float32, True) for recompute in (False, True))
    try:
        assert_identical(again, plain)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", ["dropout", "shared dropout"])
def test_planted_new_dropout_masks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A second run that draws other masks differentiates another function."""
    plan = [("segment", [("conv", 0), (name, 1), ("conv", 2)])]
    assert not differs(plan)

    @contextmanager
    def nothing(draws: Draws) -> Iterator[None]:
        yield

    monkeypatch.setattr(Draws, "again", nothing)
    assert differs(plan)


def test_planted_statistics_updated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running statistics that see each batch twice."""
    plan = [("segment", [("conv", 0), ("norm", 1), ("conv", 2)])]
    assert not differs(plan)
    restoring = nn.Module.modules
    monkeypatch.setattr(
        nn.Module, "modules", lambda self: (m for m in restoring(self) if not isinstance(m, nn.BatchNorm2d))
    )
    assert differs(plan)


# ---- what is kept ----------------------------------------------------------------------------


def block(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6, rng=seed), nn.Tanh(), nn.Linear(6, 6, rng=seed + 1), nn.Tanh())


def test_the_tape_holds_the_segments_input_once() -> None:
    """With the input kept by a neighbour as well, its buffer is billed once; parameters are no activations."""
    x = Tensor(np.ones((5, 6), np.float32), requires_grad=True)
    report = tape(nn.Recompute(block())(x))
    assert [(e.op, e.what, e.nbytes) for e in report.entries] == [("recompute", "segment input", 5 * 6 * 4)]
    assert report.parameter_bytes == 2 * (6 * 6 + 6) * 4
    y = F.exp(x)  # keeps its result, which is the segment's input
    assert tape(nn.Recompute(block())(y)).total_bytes == 5 * 6 * 4


def test_what_stays_alive_is_what_the_tape_reports() -> None:
    """Anything else that held the activations of the first run would show in the interpreter's own count."""
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((512, 64)).astype(np.float32))
    net = nn.Recompute(nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, rng=i), nn.Dropout(0.5)) for i in range(6))))
    head = nn.Linear(64, 64, rng=9)
    report = check_live_bytes(lambda: head(F.exp(net(F.exp(x)))).sum(), 16)
    assert report.total_bytes == 2 * 512 * 64 * 4  # the inputs of the segment and of the head


def test_nothing_is_kept_where_nothing_trains() -> None:
    """A frozen segment whose input needs no gradient is not run again, and no input is held for it."""
    net = nn.Recompute(block())
    net.requires_grad_(False)
    out = net(np.ones((5, 6), np.float32))
    assert not out.requires_grad
    assert tape(out).entries == []
    with no_grad():
        assert not nn.Recompute(block())(Tensor(np.ones((5, 6), np.float32), requires_grad=True)).requires_grad


def test_a_frozen_segment_passes_gradients_to_its_input() -> None:
    """Frozen parameters get none."""
    net = nn.Recompute(block())
    net.requires_grad_(False)
    x = Tensor(np.ones((5, 6), np.float32), requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_segment_that_hands_its_input_through_is_no_segment() -> None:
    """Identity, or dropout in evaluation: the very tensor, with the history it had."""
    x = F.exp(Tensor(np.ones((2, 3), np.float32), requires_grad=True))
    assert nn.Recompute(nn.Identity())(x) is x
    assert nn.Recompute(nn.Dropout(0.5)).eval()(x) is x


class CountingStore(Exact):
    """Exact, and says how often it saved."""

    name = "counting"

    def __init__(self) -> None:
        self.saves = 0

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        self.saves += 1
        return super().save(activation)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "saves": self.saves}


def test_a_store_inside_saves_in_the_second_run_alone() -> None:
    """A warm start or a random sketch must advance once per step; and the record tells what this step found."""
    inner = nn.Recompute(nn.Sequential(nn.Linear(6, 6, rng=2)))
    net = nn.Recompute(nn.Sequential(nn.Linear(6, 6, rng=1), inner))
    stores = {path: CountingStore() for path in ("0", "1.0")}
    for path, store in stores.items():
        net.get_submodule(path).store = store
    with record(net) as records:
        out = net(np.ones((5, 6), np.float32)).sum()
    assert [store.saves for store in stores.values()] == [0, 0]
    out.backward()
    assert [store.saves for store in stores.values()] == [1, 1]
    outer = records[0].attributes["records"]
    assert [r.op for r in outer] == ["linear", "recompute"]
    nested = outer[1].attributes["records"]
    assert [r.attributes["store"]["saves"] for r in (outer[0], nested[0])] == [1, 1]
    assert nested[0].inputs[0] == outer[0].output  # values keep the numbers of the first run


def test_several_inputs() -> None:
    """Each input is kept, and gets its own gradient."""

    class Gate(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.tanh(a) * F.sigmoid(b) + a

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((3, 4)) for _ in range(2)]
    gradients = []
    for gate in (Gate(), nn.Recompute(Gate())):
        a, b = (Tensor(array, requires_grad=True) for array in arrays)
        gate(a, b).sum().backward()
        gradients.append((a.grad, b.grad))
    np.testing.assert_array_equal(gradients[0], gradients[1])
    a = Tensor(arrays[0], requires_grad=True)
    assert [e.what for e in tape(nn.Recompute(Gate())(a, Tensor(arrays[1]))).entries] == [
        "segment input 0", "segment input 1",
    ]  # fmt: skip


# ---- the second run --------------------------------------------------------------------------


def test_changes_of_mode_and_seed_between_the_passes_do_not_reach_the_second_run() -> None:
    """net.eval() or manual_seed() before backward() would give other masks and statistics."""
    plan = [("segment", [("conv", 0), ("norm", 0), ("shared dropout", 1), ("conv", 2)])]
    grads = []
    for disturb in (False, True):
        net = recompute_nets.net(plan)
        manual_seed(3)
        loss = F.cross_entropy(net(images()), LABELS)
        if disturb:
            net.eval()
            manual_seed(11)
        loss.backward()
        assert all(module.training != disturb for module in net.modules())
        grads.append([parameter.grad for parameter in net.parameters()])
    for plain, disturbed in zip(*grads, strict=True):
        np.testing.assert_array_equal(plain, disturbed)


def test_backward_may_run_inside_no_grad() -> None:
    """The second run needs a tape even there."""
    net = nn.Recompute(block())
    out = net(np.ones((2, 6), np.float32)).sum()
    with no_grad():
        out.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_the_second_run_is_booked_as_recompute_for_the_layers_that_spend_it() -> None:
    """5·6·6 multiply-adds each; a segment within a segment runs three times."""
    net = nn.Recompute(nn.Sequential(nn.Linear(6, 6, rng=0), nn.Recompute(nn.Sequential(nn.Linear(6, 6, rng=1)))))
    with count_macs() as counter:
        net(Tensor(np.ones((5, 6), np.float32), requires_grad=True)).sum().backward()
    expected = {"forward": 180, "grad_input": 180, "grad_weight": 180}
    for path, times in (("0", 1), ("1.0", 2)):
        counted = {kind: macs for kind, macs in counter.by_layer(path).items() if macs}
        assert counted == {**expected, "recompute": times * 180}


def test_second_backward() -> None:
    """An error without retain_graph, as everywhere; with it the segment runs once more and gradients add up."""
    net = nn.Recompute(block())
    out = net(np.ones((2, 6), np.float32)).sum()
    out.backward(retain_graph=True)
    first = [parameter.grad for parameter in net.parameters()]
    out.backward()
    for parameter, once in zip(net.parameters(), first, strict=True):
        np.testing.assert_array_equal(parameter.grad, 2 * once)
    with pytest.raises(RuntimeError, match="already consumed by a backward"):
        out.backward()


@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_a_changed_parameter_is_noticed(name: str) -> None:
    """Any parameter of the segment: the second run would not be that of the first, whichever it is."""
    net = nn.Recompute(block())
    net.requires_grad_(False)
    dict(net.named_parameters())["0.bias"].requires_grad_()
    out = net(np.ones((2, 6), np.float32)).sum()
    with no_grad():
        dict(net.named_parameters())[name][0] = 1.0
    with pytest.raises(RuntimeError, match=f"parameter '{name}' saved for backward was changed"):
        out.backward()


def test_a_changed_input_is_noticed() -> None:
    """The kept input is the caller's own buffer."""
    net, x = nn.Recompute(block()), Tensor(np.ones((2, 6), np.float32))
    out = net(x).sum()
    x[0, 0] = 2.0
    with pytest.raises(RuntimeError, match="tensor 'segment input' saved for backward was changed"):
        out.backward()


class Smuggler(nn.Module):
    """Keeps an intermediate tensor, or uses one from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: Any = None
        self.outside: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.inside = F.exp(x)
        return self.inside * 2.0 if self.outside is None else self.inside * self.outside


def test_tensors_do_not_pass_beside_input_and_result() -> None:
    """Their gradients would silently be lost; in both directions that is an error."""
    x, segment = Tensor(np.ones((2, 3), np.float32), requires_grad=True), Smuggler()
    out = nn.Recompute(segment)(x)
    with pytest.raises(RuntimeError, match="made inside a Recompute, which keeps its result alone"):
        (out + segment.inside).sum().backward()
    segment.outside = F.exp(x)
    with pytest.raises(RuntimeError, match="came from outside of the segment; make it an input"):
        nn.Recompute(segment)(x)


def test_a_forward_that_does_not_repeat_is_refused() -> None:
    """Its gradient would be that of another function than the loss was computed with."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.tanh(x) if self.calls % 2 else F.exp(x)

    out = nn.Recompute(Moody())(Tensor(np.ones(3), requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="was not a repetition of the first"):
        out.backward()
    net = nn.Recompute(block())
    out = net(np.ones((2, 6), np.float32)).sum()
    net.get_submodule("0").requires_grad_(False)
    with pytest.raises(RuntimeError, match="may not be changed before backward"):
        out.backward()


def test_after_an_error_everything_is_as_before() -> None:
    """A segment that fails must not leave the library in a state in which nothing is kept."""
    with pytest.raises(ValueError, match="linear: x has shape"):
        nn.Recompute(block())(np.ones((2, 5), np.float32))
    with record() as records:
        out = F.exp(Tensor(np.ones(3), requires_grad=True))
    assert [r.op for r in records] == ["exp"]
    assert tape(out).total_bytes == 24


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.Recompute(F.relu), TypeError, "segment is a function, expected a Module"),
    (lambda: nn.Recompute(block())(), TypeError, "called without inputs"),
    (lambda: nn.Recompute(block())([1.0]), TypeError, "input 0 is a list, expected a Tensor"),
    (lambda: nn.checkpoint_sequential(block(), 5), ValueError, "segments is 5, expected an integer from 1 to 4"),
    (lambda: nn.checkpoint_sequential(block(), 0), ValueError, "segments is 0"),
    (lambda: nn.checkpoint_sequential(block(), 2.0), ValueError, r"segments is 2\.0"),  # type: ignore[arg-type]
    (lambda: nn.checkpoint_sequential(nn.ReLU(), 1), TypeError, "net is a ReLU, expected a Sequential"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "says"), BAD)
def test_wrong_arguments_are_named(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    """What came, and what was expected."""
    with pytest.raises(error, match=says):
        call()


def test_a_result_that_is_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x

    with pytest.raises(TypeError, match="the segment returned a tuple"):
        nn.Recompute(Pair())(np.ones(3))


# ---- names and traces ------------------------------------------------------------------------


def wrappings(plan: list[Any]) -> tuple[Module, Module]:
    return recompute_nets.net(plan, False), recompute_nets.net(plan, True)


PLAN = [("segment", [("conv", 0), ("norm", 0), ("segment", [("conv", 1), ("relu", 0)]), ("dropout", 3)])]


def test_paths_are_those_of_the_net_without_segments() -> None:
    """Selections, checkpoints and calibrations of a net stay valid when segments are put into it."""
    plain, wrapped = wrappings(PLAN)
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    assert list(weighted_layers(plain)) == list(weighted_layers(wrapped)) == ["0", "1.0.0", "1.0.2.0", "4"]
    assert tune(plain, "last:2") == tune(wrapped, "last:2")
    assert isinstance(wrapped.get_submodule("1.0.2.0"), nn.Conv2d)
    assert isinstance(wrapped.get_submodule("1.0"), nn.Sequential)
    with pytest.raises(AttributeError, match=r"no module '1\.9'"):
        wrapped.get_submodule("1.9")


@pytest.mark.parametrize("wrap", [nn.Recompute, lambda m: nn.Sequential(nn.Recompute(nn.Recompute(m)))])
def test_a_state_dict_is_loaded_into_the_segment(wrap: Callable[[Module], Module]) -> None:
    """Parameters and buffers of a layer that is itself the segment, nested or at the root."""
    source = nn.BatchNorm2d(2)
    source(np.random.default_rng(0).standard_normal((3, 2, 2, 2)).astype(np.float32))
    target = nn.BatchNorm2d(2)
    net = wrap(target)
    prefix = "" if isinstance(net, nn.Recompute) else "0."
    net.load_state_dict({prefix + name: array for name, array in source.state_dict().items()})
    np.testing.assert_array_equal(target.running_mean, source.running_mean)
    assert list(dict(net.named_buffers())) == [f"{prefix}running_mean", f"{prefix}running_var"]


@pytest.mark.parametrize("training", [True, False])
def test_shapes_alone_give_the_records_of_a_real_run(training: bool) -> None:
    """One record for the segment with those of the inner layers inside, also where nothing is on the tape."""
    net = recompute_nets.net(PLAN).train(training)
    for selection in ("all", "head"):
        tune(net, selection)
        traced = trace(net, (3, 2, *recompute_nets.SIZE))
        with record(net) as real:
            net(images())
        assert traced == real
        assert [r.op for r in real] == ["conv2d", "recompute", "adaptive_avg_pool2d", "reshape", "linear"]
        segment = real[1]
        assert segment.path == "1.0"
        ops = ["conv2d", "batch_norm", "recompute"] + ["dropout"] * training
        assert [r.op for r in segment.attributes["records"]] == ops
        assert segment.attributes["records"][2].attributes["records"][0].path == "1.0.2.0"
        assert segment.output.requires_grad == (selection == "all")
    with record(net) as heard, no_grad():
        net(images())
    assert [r.op for r in heard] == [r.op for r in real]


def test_checkpoint_sequential_groups_the_children() -> None:
    """Seven children in three segments: 3, 2 and 2 of them, under their old names, with the same gradients."""
    children = [*block(0), *block(2)][:7]
    net = nn.Sequential(*children)
    grouped = nn.checkpoint_sequential(net, 3)
    assert isinstance(grouped, nn.Sequential)
    assert [type(child) for child in grouped] == [nn.Recompute] * 3
    assert [len(next(iter(child.children()))) for child in grouped] == [3, 2, 2]
    assert list(grouped.state_dict()) == list(net.state_dict())
    assert grouped.get_submodule("5") is children[5]
    outer = nn.Sequential(nn.Linear(6, 6, rng=9), grouped)
    assert list(weighted_layers(outer)) == ["0", "1.0", "1.2", "1.4", "1.6"]
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    grads = []
    for module in (net, grouped):
        module.zero_grad()
        out = module(x)
        grads.append(([p.grad for p in module.parameters()], tape(out).total_bytes))
        out.sum().backward()
        grads[-1] = ([p.grad for p in module.parameters()], grads[-1][1])
    for plain, again in zip(grads[0][0], grads[1][0], strict=True):
        np.testing.assert_array_equal(plain, again)
    assert grads[1][1] == 3 * 5 * 6 * 4  # the inputs of the segments


def test_stages_of_a_grouped_net_are_its_segments() -> None:
    """Who runs a net stage by stage must not lose the recomputation."""
    grouped = nn.checkpoint_sequential(block(), 2)
    assert grouped.stages() == list(grouped)


def test_a_segment_called_twice_is_two_segments() -> None:
    """Each call keeps its own input; the parameters' gradients add up in the order of plain backpropagation."""
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    grads = []
    for wrap in (lambda m: m, nn.Recompute):
        net = wrap(block())
        out = net(net(x))
        out.sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for plain, again in zip(*grads, strict=True):
        np.testing.assert_array_equal(plain, again)
