"""Optimisers, schedules and clipping: PyTorch's arithmetic, and no silent damage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lance_ref import F, Tensor, optim

SHAPES = [(3, 2), (4,), ()]
STEPS = 6

SGD_OPTIONS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov}
    for momentum, dampening, decay, nesterov in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True))
    if not nesterov or (momentum and not dampening)
]
ADAM_OPTIONS = [
    {"betas": betas, "eps": eps, "weight_decay": decay}
    for betas, eps, decay in itertools.product(((0.9, 0.999), (0.5, 0.7), (0.0, 0.0)), (1e-8, 1e-2), (0.0, 0.1))
]


def parameters(dtype: Any = np.float64, seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [Tensor(np.asarray(rng.normal(size=shape), dtype=dtype), requires_grad=True) for shape in SHAPES]


def gradients(dtype: Any = np.float64, seed: int = 1) -> list[list[np.ndarray | None]]:
    """Per step and parameter; the second parameter gets none in step 2."""
    rng = np.random.default_rng(seed)
    steps = [[np.asarray(rng.normal(size=shape), dtype=dtype) for shape in SHAPES] for _ in range(STEPS)]
    return [[None if (t, i) == (2, 1) else g for i, g in enumerate(grads)] for t, grads in enumerate(steps)]


def run(optimizer: optim.Optimizer, params: list[Tensor], steps: list[list[np.ndarray | None]]) -> None:
    for grads in steps:
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = None if grad is None else grad.copy()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "options"), [("SGD", o) for o in SGD_OPTIONS] + [("Adam", o) for o in ADAM_OPTIONS], ids=str
)
def test_same_path_as_pytorch(name: str, options: dict[str, Any]) -> None:
    """A wrong update rule, for any combination of options, would leave PyTorch's path."""
    torch = pytest.importorskip("torch")
    ours = parameters()
    theirs = [torch.nn.Parameter(torch.from_numpy(p.data.copy())) for p in ours]
    optimizer = getattr(optim, name)(ours, lr=0.05, **options)
    reference = getattr(torch.optim, name)(theirs, lr=0.05, **options)
    for grads in gradients():
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = None if grad is None else torch.from_numpy(grad.copy())
        reference.step()
        run(optimizer, ours, [grads])
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine.data, other.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: optim.Adam(p, lr=0.1)])
def test_float32_stays_float32(make: Any) -> None:
    """A Python float or float64 array in an update would silently double the memory."""
    params = parameters(np.float32)
    optimizer = make(params)
    run(optimizer, params, gradients(np.float32))
    assert {p.data.dtype for p in params} == {np.dtype(np.float32)}
    assert {b.dtype for buffers in optimizer.buffers.values() for b in buffers} == {np.dtype(np.float32)}


def test_hand_computed_momentum() -> None:
    """p = 1, g = 1, lr 0.5, momentum 0.5: v = 1, 1.5 and p = 0.5, -0.25; a lost buffer would give 0."""
    p = Tensor(np.array([1.0]), requires_grad=True)
    run(optim.SGD([p], lr=0.5, momentum=0.5), [p], [[np.array([1.0])]] * 2)
    assert p.data.tolist() == [-0.25]


def test_step_between_forward_and_backward_is_noticed() -> None:
    """An update that goes round the tape's version check would give a silently wrong gradient."""
    w = Tensor([2.0], requires_grad=True)
    loss = (w * w).sum()
    w.grad = np.ones(1, np.float32)
    optim.SGD([w], lr=0.1).step()
    with pytest.raises(RuntimeError, match="changed after the forward pass"):
        loss.backward()


def test_step_leaves_arrays_of_others_alone() -> None:
    """Writing into the array a parameter was made from would change the caller's data."""
    values, grad = np.ones(2, np.float32), np.ones(2, np.float32)
    w = Tensor(values, requires_grad=True)
    w.grad = grad
    optimizer = optim.SGD([w], lr=0.1, momentum=0.9)
    optimizer.step()
    optimizer.step()
    assert values.tolist() == [1.0, 1.0]
    assert grad.tolist() == [1.0, 1.0]
    assert w.data[0] != 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_gradient_is_refused_before_any_change(bad: float) -> None:
    """NaN or infinity would spread through the weights; a partial step would leave a half-updated net."""
    params = parameters()
    before = [p.data.copy() for p in params]
    optimizer = optim.Adam(params)
    for p in params:
        p.grad = np.ones(p.shape)
    params[1].grad[2] = bad  # type: ignore[index]
    with pytest.raises(ValueError, match=r"gradient of parameter 1 .*NaN or infinite"):
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        np.testing.assert_array_equal(p.data, old)
    assert optimizer.steps == [0, 0, 0]


def test_gradient_of_another_shape_or_dtype_is_refused() -> None:
    """Broadcasting a wrong gradient, or a float32 one, would go unnoticed."""
    w = Tensor(np.ones((2, 2)), requires_grad=True)
    optimizer = optim.SGD([w], lr=0.1)
    w.grad = np.ones(2)
    with pytest.raises(ValueError, match=r"parameter 0 .*shape \(2, 2\).* has shape \(2,\)"):
        optimizer.step()
    w.grad = np.ones((2, 2), np.float32)
    with pytest.raises(TypeError, match="float32, expected float64"):
        optimizer.step()


def test_buffer_of_another_dtype_is_refused() -> None:
    """After net.to(float64) a float32 buffer would be mixed in silently."""
    w = Tensor(np.ones(2, np.float32), requires_grad=True)
    optimizer = optim.SGD([w], lr=0.1, momentum=0.9)
    w.grad = np.ones(2, np.float32)
    optimizer.step()
    w.data, w.grad = w.data.astype(np.float64), np.ones(2)
    with pytest.raises(TypeError, match=r"momentum_buffer of parameter 0 .*after net\.to"):
        optimizer.step()


def test_zero_grad_forgets_gradients() -> None:
    """Gradients of the last step would add up with the next ones."""
    params = parameters()
    for p in params:
        p.grad = np.ones(p.shape)
    optim.SGD(params, lr=0.1).zero_grad()
    assert [p.grad for p in params] == [None, None, None]


BAD_SETTINGS = [
    (optim.SGD, {"lr": -0.1}, "lr is -0.1"),
    (optim.SGD, {"lr": float("nan")}, "lr is nan"),
    (optim.SGD, {"lr": "fast"}, "lr is 'fast'"),
    (optim.SGD, {"lr": 0.1, "momentum": -1}, "momentum is -1"),
    (optim.SGD, {"lr": 0.1, "weight_decay": float("inf")}, "weight_decay is inf"),
    (optim.SGD, {"lr": 0.1, "nesterov": True}, "nesterov needs momentum"),
    (optim.SGD, {"lr": 0.1, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs momentum"),
    (optim.Adam, {"betas": (0.9, 1.0)}, "beta2 is 1.0"),
    (optim.Adam, {"betas": 0.9}, "betas is 0.9"),
    (optim.Adam, {"betas": (0.9, 0.99, 0.999)}, "expected a pair of numbers"),
    (optim.Adam, {"eps": -1e-8}, "eps is -1e-08"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD_SETTINGS, ids=[case[2] for case in BAD_SETTINGS])
def test_bad_settings_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    """A setting out of range would train in the wrong direction or not at all."""
    with pytest.raises(ValueError, match=message):
        kind(parameters(), **options)
    with pytest.raises(TypeError, match="nesterov is 'no', expected True or False"):
        optim.SGD(parameters(), momentum=0.9, nesterov="no")  # type: ignore[arg-type]


def test_bad_parameters_are_refused() -> None:
    """An empty list (a used-up generator) would train nothing; a tensor given twice would move twice."""
    w = Tensor([1.0], requires_grad=True)
    with pytest.raises(ValueError, match="params is empty"):
        optim.SGD([], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[1\] is given twice"):
        optim.SGD([w, w], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[0\] is the result of an operation"):
        optim.SGD([w * 2.0], lr=0.1)
    with pytest.raises(TypeError, match="single Tensor"):
        optim.SGD(w, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"params\[0\] is a dict"):
        optim.SGD([{"params": [w]}], lr=0.1)  # type: ignore[list-item]


@pytest.mark.parametrize(
    "make", [lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), lambda p: optim.Adam(p, lr=0.1)]
)
def test_state_goes_through_a_file(make: Any, tmp_path: Path) -> None:
    """A resumed run would leave the path of an uninterrupted one if any state were lost."""
    whole, first = parameters(), parameters()
    steps = gradients()
    run(make(whole), whole, steps)
    optimizer = make(first)
    run(optimizer, first, steps[:3])
    np.savez(tmp_path / "state.npz", **optimizer.state_dict())
    second = [Tensor(p.data, requires_grad=True) for p in first]
    resumed = make(second)
    resumed.lr = 99
    with np.load(tmp_path / "state.npz", allow_pickle=False) as arrays:
        resumed.load_state_dict(arrays)
    assert resumed.lr == 0.1
    for name in resumed.settings:  # a flag comes back as one
        assert type(getattr(resumed, name)) is type(getattr(optimizer, name))
    run(resumed, second, steps[3:])
    for p, q in zip(whole, second, strict=True):
        np.testing.assert_array_equal(p.data, q.data)


def test_state_is_a_copy() -> None:
    """Writing into a saved or a loaded state would change the optimiser, if they shared arrays."""
    params = parameters()
    optimizer = optim.Adam(params)
    run(optimizer, params, gradients()[:1])
    before = optimizer.state_dict()
    for array in optimizer.state_dict().values():
        array[...] = 0.5
    loaded = optimizer.state_dict()
    optimizer.load_state_dict(loaded)
    for array in loaded.values():
        array[...] = 0.5
    after = optimizer.state_dict()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_bad_state_is_refused_before_any_change() -> None:
    """A state of another optimiser or net would be half loaded."""
    params = parameters()
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9)
    run(optimizer, params, gradients()[:1])
    good = optimizer.state_dict()
    bad_states = [
        (KeyError, "missing", {k: v for k, v in good.items() if k != "lr"}),
        (KeyError, "unexpected", {**good, "exp_avg.0": np.ones(SHAPES[0])}),
        (KeyError, "unexpected", {**good, "momentum_buffer.3": np.ones(2)}),
        (ValueError, r"momentum_buffer\.0.*shape \(2,\)", {**good, "momentum_buffer.0": np.ones(2)}),
        (ValueError, "finite", {**good, "momentum_buffer.0": np.full(SHAPES[0], np.nan)}),
        (ValueError, "finite", {**good, "momentum_buffer.0": np.ones(SHAPES[0], complex)}),
        (ValueError, "lr is -1", {**good, "lr": np.asarray(-1.0)}),
        (ValueError, "steps", {**good, "steps": np.asarray([1, -1, 0])}),
        (ValueError, "steps", {**good, "steps": np.asarray([1, 0.5, 0])}),
        (ValueError, r"steps.*shape \(2,\), expected \(3,\)", {**good, "steps": np.asarray([1, 1])}),
        (ValueError, "nesterov", {**good, "nesterov": np.asarray(1.0), "momentum": np.asarray(0.0)}),
    ]
    for kind, message, state in bad_states:
        with pytest.raises(kind, match=message):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    for name, array in good.items():
        np.testing.assert_array_equal(after[name], array)
    assert optimizer.nesterov is False


SCHEDULES = [
    ("CosineAnnealingLR", {"T_max": 7}),
    ("CosineAnnealingLR", {"T_max": 4, "eta_min": 0.01}),
    ("StepLR", {"step_size": 3}),
    ("StepLR", {"step_size": 1, "gamma": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULES, ids=str)
def test_schedule_as_in_pytorch(name: str, options: dict[str, Any]) -> None:
    """A schedule off by one epoch, or wrong after its end, would leave PyTorch's rates."""
    torch = pytest.importorskip("torch")
    optimizer = optim.SGD(parameters(), lr=0.3)
    reference_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    ours = getattr(optim.lr_scheduler, name)(optimizer, **options)
    theirs = getattr(torch.optim.lr_scheduler, name)(reference_optimizer, **options)
    assert ours.get_last_lr() == theirs.get_last_lr()
    for _ in range(18):
        reference_optimizer.step()
        ours.step()
        theirs.step()
        assert optimizer.lr == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)


def test_schedule_by_hand() -> None:
    """Cosine over 4 epochs from 1: half way exactly 0.5, at the end exactly eta_min."""
    optimizer = optim.SGD(parameters(), lr=1.0)
    schedule = optim.CosineAnnealingLR(optimizer, T_max=4)
    rates = []
    for _ in range(4):
        schedule.step()
        rates.append(optimizer.lr)
    assert rates[1] == pytest.approx(0.5)
    assert rates[3] == 0.0


def test_schedule_state_resumes() -> None:
    """A resumed schedule would start over at the base rate."""
    optimizer = optim.SGD(parameters(), lr=0.8)
    schedule = optim.StepLR(optimizer, 2, gamma=0.5)
    for _ in range(5):
        schedule.step()
    fresh = optim.SGD(parameters(), lr=0.1)
    resumed = optim.StepLR(fresh, 2, gamma=0.5)
    resumed.load_state_dict(schedule.state_dict())
    assert fresh.lr == optimizer.lr == pytest.approx(0.2)
    resumed.step()
    assert fresh.lr == pytest.approx(0.1)
    resumed.load_state_dict(optim.StepLR(optim.SGD(parameters(), lr=0.8), 2).state_dict())  # before the first epoch
    assert (resumed.last_epoch, fresh.lr) == (0, 0.8)


def test_bad_schedules_are_refused() -> None:
    """A period of zero would divide by zero in the middle of a run."""
    optimizer = optim.SGD(parameters(), lr=0.1)
    with pytest.raises(ValueError, match="T_max is 0"):
        optim.CosineAnnealingLR(optimizer, 0)
    with pytest.raises(ValueError, match="eta_min is -1"):
        optim.CosineAnnealingLR(optimizer, 3, eta_min=-1)
    with pytest.raises(ValueError, match=r"step_size is 1\.5"):
        optim.StepLR(optimizer, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma is nan"):
        optim.StepLR(optimizer, 1, gamma=float("nan"))
    with pytest.raises(TypeError, match="optimizer is a str"):
        optim.StepLR("sgd", 1)  # type: ignore[arg-type]


def test_clipping_is_exported_and_bounds_the_norm() -> None:
    """optim.clip_grad_norm_ must be the clipping by the norm over all parameters."""
    params = [Tensor(np.zeros(2), requires_grad=True), Tensor(np.zeros(1), requires_grad=True)]
    params[0].grad, params[1].grad = np.array([2.0, 3.0]), np.array([6.0])  # norm 7
    assert float(optim.clip_grad_norm_(params, 3.5)) == pytest.approx(7.0)
    np.testing.assert_allclose(params[0].grad, [1.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(params[1].grad, [3.0], rtol=1e-6)


@pytest.mark.parametrize("make", [lambda p, lr: optim.SGD(p, lr=lr, momentum=0.9), lambda p, lr: optim.Adam(p, lr=lr)])
def test_learning_needs_the_learning_rate(make: Any) -> None:
    """A least-squares fit must come down a hundredfold, and stay where it is with lr = 0."""
    rng = np.random.default_rng(0)
    x, target = Tensor(rng.normal(size=(20, 3))), Tensor(rng.normal(size=(20, 3)) @ np.zeros((3, 1)) + 1.0)

    def final_loss(lr: float) -> float:
        w, b = Tensor(np.ones((3, 1)), requires_grad=True), Tensor(np.zeros(1), requires_grad=True)
        optimizer = make([w, b], lr)
        for _ in range(120):
            optimizer.zero_grad()
            loss = F.mse_loss(x @ w + b, target)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert final_loss(0.05) < 0.01 * final_loss(0.0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_first_momentum_is_no_view_of_the_gradient(nesterov: bool) -> None:
    """Gradients that are zeroed or added up in place between steps must leave the momentum alone."""
    w = Tensor(np.zeros(2), requires_grad=True)
    optimizer = optim.SGD([w], lr=1.0, momentum=0.5, nesterov=nesterov)
    w.grad = np.array([1.0, 2.0])
    optimizer.step()
    w.grad[:] = 100
    np.testing.assert_array_equal(optimizer.buffers["momentum_buffer"][0], [1.0, 2.0])
