"""When what was put off runs, and with which values; everything else is as if it had run at once."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from lance_ref import Tensor, count_macs, nn, no_grad, record, tape
from lance_ref import functional as F
from lance_ref.engine.state import state
from lance_ref.fused import deferral, execute
from lance_ref.fused.pending import Pending
from lance_ref.nn.module import Module

X = np.random.default_rng(0).standard_normal((4, 3, 6, 5)).astype(np.float32)


def block(C_in: int = 3, C_out: int = 3, seed: int = 0) -> nn.Sequential:
    norm = nn.BatchNorm2d(C_out)
    norm.running_var[:] = np.linspace(0.5, 2, C_out)
    norm.running_mean[:] = np.linspace(-1, 1, C_out)
    return nn.Sequential(nn.Conv2d(C_in, C_out, 1, bias=False, rng=seed), norm, nn.ReLU6())


def frozen(net: Module) -> Module:
    return net.requires_grad_(False).eval()


def one_by_one(net: Any, *inputs: Any) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferral, "enabled", lambda: False)
        result: np.ndarray = net(*inputs).data
    return result


def close(got: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


class Seen(Module):
    """Two blocks; calls ``look`` with what lies between them."""

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.first, self.second, self.look = block(), block(seed=1), look

    def forward(self, x: Tensor) -> Tensor:
        between = self.first(x)
        self.look(between)
        return self.second(between)


def test_what_a_call_returns_is_a_tensor_with_values() -> None:
    """A result that is computed when it is looked at, perhaps after the weights have changed."""
    net = frozen(nn.Sequential(block(), block(seed=1)))
    y = net(X)
    expected = one_by_one(net, X)
    net[0][0].weight.data[:] = 0
    assert type(y) is Tensor
    assert not y.requires_grad
    close(y.data, expected)


def test_nothing_runs_before_it_is_looked_at() -> None:
    """Operations that run at once are not joined."""
    kinds = []
    frozen(Seen(lambda t: kinds.append((type(t), t.shape, t.dtype, t.is_meta, t.requires_grad))))(X)
    assert kinds == [(Pending, (4, 3, 6, 5), np.float32, False, False)]


@pytest.mark.parametrize(
    "look",
    [lambda t: t.data, repr, lambda t: t.numpy(), lambda t: t.detach(), copy.copy, copy.deepcopy, lambda t: t + 1.0],
    ids=["data", "repr", "numpy", "detach", "copy", "deepcopy", "operator"],
)
def test_looking_computes(look: Any) -> None:
    """Whatever looks at the values finds them, and the tensor is a plain one from then on."""
    found = []
    net = frozen(Seen(lambda t: found.append((t, look(t), type(t)))))
    y = net(X)
    ((between, _, kind),) = found
    assert kind is Tensor
    close(between.data, one_by_one(net.first, X))
    close(y.data, one_by_one(net, X))


def test_what_stays_named_is_there_after_the_call() -> None:
    """A tensor that a forward puts aside, to be looked at later."""
    kept: list[Tensor] = []
    net = frozen(Seen(kept.append))
    net(X)
    assert type(kept[0]) is Tensor
    close(kept[0].data, one_by_one(net.first, X))


def test_hooks_see_values() -> None:
    """Calibration looks at what layers take in."""
    net, seen = frozen(nn.Sequential(block(), block(seed=1))), []
    remove = net[1][0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].data.copy()))
    net(X)
    remove()
    close(seen[0], one_by_one(net[0], X))


def test_changed_weights_and_statistics_count() -> None:
    """A fold that was remembered from the call before would be a wrong number without a word."""
    net = frozen(nn.Sequential(block(), block(seed=1)))
    net(X)
    for change in (
        lambda: net[0][0].weight.data.__imul__(2),
        lambda: setattr(net[0][0].weight, "data", net[0][0].weight.data + 1),
        lambda: net[0][1].running_mean.__iadd__(1),
        lambda: setattr(net[0][1], "running_var", np.full(3, 3.0, np.float32)),
        lambda: net[1][1].weight.data.__imul__(-1),
        lambda: net[1][1].bias.data.__iadd__(1),
        lambda: setattr(net[1][1], "eps", 0.5),
    ):
        before = net(X).data
        change()
        after = net(X).data
        assert not np.allclose(before, after, rtol=1e-3)
        close(after, one_by_one(net, X))


def test_writing_through_a_tensor_comes_after_what_was_put_off() -> None:
    """The batch, changed in place by the forward that has used it."""

    class Writes(Seen):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x[0] = 100.0
            return self.second(y)

    net = frozen(Writes(None))
    expected = one_by_one(net, X.copy())
    close(net(X.copy()).data, expected)


def test_errors_come_from_the_layer_that_is_called() -> None:
    """Shapes are checked at the call, and with the same words."""

    class Asks(Seen):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            with pytest.raises(ValueError, match=r"expected \(C_out, 3, k_h, k_w\)|C_in"):
                F.conv2d(y, np.ones((2, 5, 1, 1), np.float32))
            return self.second(y)

    frozen(Asks(None))(X)
    with pytest.raises(ValueError, match="BatchNorm2d: x has shape"):
        frozen(nn.Sequential(nn.Conv2d(3, 4, 1, rng=0), nn.BatchNorm2d(3)))(X)


def test_after_an_error_what_was_called_is_there() -> None:
    """A forward that is left by an exception, as hooks do that have seen enough."""
    kept: list[Tensor] = []

    class EnoughError(Exception):
        pass

    def look(tensor: Tensor) -> None:
        kept.append(tensor)
        raise EnoughError

    net = frozen(Seen(look))
    with pytest.raises(EnoughError):
        net(X)
    close(kept[0].data, one_by_one(net.first, X))
    assert state.deferral is None
    close(frozen(nn.Sequential(block(), block(seed=1)))(X).data, one_by_one(net.second, kept[0]))


def test_after_an_interruption_it_says_so() -> None:
    """Ctrl-C stops at once; nobody then takes zeros for values."""
    kept: list[Tensor] = []

    def look(tensor: Tensor) -> None:
        kept.append(tensor)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frozen(Seen(look))(X)
    with pytest.raises(RuntimeError, match=r"shape \(4, 3, 6, 5\) has no data: .* interrupted"):
        _ = kept[0].data


def test_the_error_of_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that fails would leave its images as they were in memory."""

    def fails(*arguments: Any) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr(execute.steps, "run", fails)
    with pytest.raises(MemoryError, match="no room"):
        frozen(nn.Sequential(block(), block(seed=1)))(np.ones((64, 3, 32, 32), np.float32))


def test_recorders_and_segments_run_at_once() -> None:
    """A trace of a real run lists every operation; a recomputed segment runs as it does the second time."""
    net = frozen(nn.Sequential(block(), nn.Recompute(block(seed=1))))
    with record(net) as records:
        y = net(X)
    inner = [r.op for r in records[-1].attributes["records"]]
    assert [r.op for r in records] == ["conv2d", "batch_norm", "relu6", "recompute"]
    assert inner == ["conv2d", "batch_norm", "relu6"]
    close(y.data, net(X).data)


def test_the_tape_holds_what_it_held() -> None:
    """A layer that trains keeps its input, and nothing of what came before."""
    net = nn.Sequential(block(), nn.Conv2d(3, 2, 1, rng=2))
    net[0].requires_grad_(False)
    net.eval()
    found = tape(net(X).sum())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferral, "enabled", lambda: False)
        assert str(tape(net(X).sum())) == str(found)


def test_what_is_never_used_is_computed_and_counted() -> None:
    """A branch that goes nowhere: the bill of a net has its multiply-adds."""

    class Idle(Seen):
        def forward(self, x: Tensor) -> Tensor:
            self.first(x)
            return self.second(x)

    net = frozen(Idle(None))
    with count_macs() as counter:
        net(X)
    assert dict(counter.macs) == {("first.0", "forward"): 4 * 30 * 9, ("second.0", "forward"): 4 * 30 * 9}


def test_batches_of_two_sizes_in_one_call() -> None:
    """Images that are not as many as the others do not come into one pass."""

    class Two(Seen):
        def forward(self, x: Tensor) -> Tensor:
            few = x[:2]
            of_all, of_few = self.second(self.first(x)), self.second(self.first(few))
            return of_all.mean(0) + of_few.mean(0)

    net = frozen(Two(None))
    close(net(Tensor(X)).data, one_by_one(net, Tensor(X)))


def test_overflow_warns_as_before() -> None:
    """A result that is infinite comes with NumPy's warning, a right one without."""
    net = frozen(nn.Sequential(nn.Conv2d(3, 3, 1, rng=0), nn.Conv2d(3, 3, 1, rng=0), nn.ReLU()))
    with pytest.warns(RuntimeWarning, match="overflow|invalid"):
        net(np.full((2, 3, 4, 4), 3e38, np.float32))
    relu6 = frozen(nn.Sequential(block(), block(seed=1)))
    with np.errstate(all="ignore"):
        assert np.isnan(relu6(np.full((2, 3, 4, 4), np.nan, np.float32)).data).all()


def test_no_grad_fuses_what_trains() -> None:
    """Evaluation of a net whose parameters train."""
    net = nn.Sequential(block(), block(seed=1)).eval()
    with no_grad(), pytest.MonkeyPatch.context() as patch:
        ran = []
        original = deferral.execute
        patch.setattr(deferral, "execute", lambda *a: ran.append(len(a[0].groups)) or original(*a))
        close(net(X).data, one_by_one(net, X))
    assert ran == [2]


@pytest.mark.parametrize(("setting", "answer"), [("0", "False"), ("1", "True")])
def test_the_switch(setting: str, answer: str) -> None:
    """LANCE_REF_FUSE."""
    assert _asked(setting) == (answer, "")


def test_another_value_is_an_error() -> None:
    """A typing error that would silently mean either."""
    out, error = _asked("yes")
    assert out == ""
    assert "ValueError: LANCE_REF_FUSE is 'yes', expected 0 or 1" in error


def _asked(setting: str) -> tuple[str, str]:
    code = "from lance_ref.fused.deferral import enabled; print(enabled())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"LANCE_REF_FUSE": setting}, capture_output=True, text=True, check=False
    )
    return run.stdout.strip(), run.stderr
