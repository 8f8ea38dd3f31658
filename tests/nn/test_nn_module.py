"""Module: names, sharing, state, modes, dtype, hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lance_ref import Tensor, nn, trace


class Net(nn.Module):
    """Two branches that share a layer, a buffer, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, rng=0)
        self.norm = nn.BatchNorm2d(3)
        self.blocks = nn.Sequential(nn.Linear(3, 2, bias=False, rng=1), nn.ReLU())
        self.again = self.first
        self.scale = nn.Parameter(np.ones(2, np.float32))
        self.register_buffer("count", np.zeros((), np.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.again(self.first(x))) * self.scale


PARAMETERS = ["scale", "first.weight", "first.bias", "norm.weight", "norm.bias", "blocks.0.weight"]
BUFFERS = ["count", "norm.running_mean", "norm.running_var"]


def test_names_are_dotted_and_shared_modules_come_once() -> None:
    """In order of registration; a second name for a layer adds nothing."""
    net = Net()
    assert [name for name, _ in net.named_parameters()] == PARAMETERS
    assert [name for name, _ in net.named_buffers()] == BUFFERS
    assert [name for name, _ in net.named_modules()] == ["", "first", "norm", "blocks", "blocks.0", "blocks.1"]
    assert list(net.children()) == [net.first, net.norm, net.blocks, net.again]
    assert net.get_submodule("blocks.1") is net.blocks[1]
    assert net.get_submodule("") is net
    with pytest.raises(AttributeError, match=r"'blocks.2'.*Sequential has no child '2'"):
        net.get_submodule("blocks.2")


def test_a_parameter_in_two_modules_comes_once() -> None:
    """Tied weights: one name, one gradient."""
    net = nn.Sequential(nn.Linear(3, 3, rng=0), nn.Linear(3, 3, rng=1))
    net[1].weight = net[0].weight
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias", "1.bias"]


def test_state_goes_out_and_comes_back() -> None:
    """Copies, not views, of everything; loading restores every value and keeps dtypes."""
    net, other = Net(), Net()
    state = net.state_dict()
    assert sorted(state) == sorted(PARAMETERS + BUFFERS)
    for parameter in other.parameters():
        parameter.data = parameter.data + 1
    other.count = np.array(5)
    assert isinstance(other.count, np.ndarray)
    other.load_state_dict({name: value.astype(np.float64) for name, value in state.items()})
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
        assert value.dtype == state[name].dtype
    state["scale"][:] = 9
    assert (net.scale.data == 1).all()


def test_loading_checks_before_it_changes() -> None:
    """A wrong shape or name in the last entry must not leave half a state behind."""
    net = Net()
    before = net.state_dict()
    other = {name: value + 1 for name, value in before.items()}
    with pytest.raises(ValueError, match=r"state_dict\['norm.running_var'\] has shape \(4,\), expected \(3,\)"):
        net.load_state_dict({**other, "norm.running_var": np.ones(4)})
    del other["scale"]
    with pytest.raises(KeyError, match=r"missing \['scale'\], unexpected \['extra'\]"):
        net.load_state_dict({**other, "extra": np.ones(1)})
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    net.load_state_dict({**other, "extra": np.ones(1)}, strict=False)
    np.testing.assert_array_equal(net.count, 1)
    np.testing.assert_array_equal(net.scale.data, 1)


def test_modes_and_gradients_reach_every_child() -> None:
    """train, eval, requires_grad_ and zero_grad go all the way down and return the net."""
    net = Net()
    assert net.eval() is net
    assert not any(module.training for module in net.modules())
    assert all(module.training for module in net.train().modules())
    net(np.ones((4, 3), np.float32)).sum().backward()
    assert net.first.weight.grad is not None
    net.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())
    net.requires_grad_(False)
    assert not net(np.ones((4, 3), np.float32)).requires_grad


def test_to_converts_what_is_floating() -> None:
    """Parameters, statistics and gradients become float64, the counter stays an integer."""
    net = Net()
    net(np.ones((4, 3), np.float32)).sum().backward()
    net.to(np.float64)
    assert {p.dtype for p in net.parameters()} == {np.dtype(np.float64)}
    assert net.first.weight.grad is not None
    assert net.first.weight.grad.dtype == np.float64
    assert (net.norm.running_mean.dtype, net.count.dtype) == (np.float64, np.int64)
    assert net(np.ones((4, 3))).dtype == np.float64
    with pytest.raises(TypeError, match="dtype is int32, expected float32 or float64"):
        net.to(np.int32)


def test_hooks_see_the_inputs_until_removed() -> None:
    """Before forward, in order; removing one leaves the others."""
    seen: list[Any] = []
    layer = nn.ReLU()
    remove = layer.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0].shape)))
    layer.register_forward_pre_hook(lambda module, inputs: seen.append("second"))
    layer(np.ones(3, np.float32))
    assert seen == [(layer, (3,)), "second"]
    remove()
    layer(np.ones(3, np.float32))
    assert seen[2:] == ["second"]


def test_replacing_an_attribute_replaces_the_registration() -> None:
    """A layer set to None, a parameter replaced, a child deleted: nothing stale stays behind."""
    net = Net()
    net.scale = nn.Parameter(np.zeros(2, np.float32))
    assert (dict(net.named_parameters())["scale"].data == 0).all()
    net.norm = None
    assert "norm.weight" not in dict(net.named_parameters())
    del net.blocks
    assert [name for name, _ in net.named_modules()] == ["", "first"]
    with pytest.raises(AttributeError, match="Net has no attribute 'blocks'"):
        _ = net.blocks


def test_a_replaced_child_keeps_its_place() -> None:
    """A layer put in place of another would otherwise run last, and the network silently be another one."""
    net = nn.Sequential(nn.Linear(3, 3, rng=0), nn.ReLU(), nn.Linear(3, 2, rng=1))
    setattr(net, "1", nn.Tanh())
    assert [type(child).__name__ for child in net] == ["Linear", "Tanh", "Linear"]
    assert net(np.ones((1, 3), np.float32)).shape == (1, 2)
    net[0].weight = nn.Parameter(np.zeros((3, 3), np.float32))
    assert list(dict(net[0].named_parameters())) == ["weight", "bias"]


def test_using_a_module_before_super_init_is_explained() -> None:
    """The usual beginner's mistake gets a sentence, not a KeyError."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.ReLU()

    with pytest.raises(AttributeError, match=r"super\(\).__init__\(\) before setting 'layer'"):
        Broken()


def test_forward_must_be_defined() -> None:
    """The error names the class."""

    class Empty(nn.Module):
        pass

    with pytest.raises(NotImplementedError, match="Empty does not define forward"):
        Empty()(np.ones(1, np.float32))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_is_a_net_of_its_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before = [(r.op, r.path) for r in trace(net, (2, 3))]  # the net knows its paths from now on
    twin = copied(net)
    assert [(r.op, r.path) for r in trace(twin, (2, 3))] == before
    both = nn.Sequential(net, twin)
    weights = [r.inputs[1] for r in trace(both, (2, 3)) if r.op == "linear"]
    assert [value.parameter for value in weights] == ["0.0.weight", "1.0.weight"]
    assert weights[0].id != weights[1].id


def test_a_shallow_copy_is_the_same_value() -> None:
    """Its array and its node are those of the original: a trace goes on through it, and so does a backward pass."""

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, rng=0)

        def forward(self, x: Tensor) -> Tensor:
            return copy.copy(self.layer(x)).relu()

    net = Copies()
    linear, relu = trace(net, (2, 3))
    assert relu.inputs[0].id == linear.output.id
    net(Tensor(np.ones((2, 3), np.float32))).sum().backward()
    assert net.layer.weight.grad is not None


def test_a_walk_sees_every_change() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    net = nn.Sequential(inner, nn.ReLU())
    assert [path for path, _ in net.named_modules()] == ["", "0", "0.0", "1"]
    inner.add_module("1", nn.ReLU())
    assert [path for path, _ in net.named_modules()] == ["", "0", "0.0", "0.1", "1"]
    delattr(inner, "0")
    assert [path for path, _ in net.named_modules()] == ["", "0", "0.1", "1"]
    assert [path for path, _ in net.named_modules("net")] == ["net", "net.0", "net.0.1", "net.1"]
