"""A network of ours beside the same network made of torch.nn: names, outputs, gradients, running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lance_ref import F, Tensor, nn


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the ``with`` block PyTorch uses one: several wait for each other for seconds where cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def perturb(net: nn.Module, seed: int = 0) -> None:
    """Move biases, norms and running statistics from their start, where they are 0 or 1 and could be exchanged."""
    rng = np.random.default_rng(seed)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data + rng.normal(0, 0.1, parameter.shape).astype(parameter.dtype)
    for name, array in net.named_buffers():
        array[:] = rng.uniform(0.5, 2, array.shape) if name.endswith("running_var") else rng.normal(0, 0.1, array.shape)


def load(twin: Any, net: nn.Module) -> None:
    """Give the torch network our values, name by name: every name and shape must fit."""
    import torch

    state = {name: torch.from_numpy(array) for name, array in net.state_dict().items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing


def check_twin(net: nn.Module, twin: Any, x: np.ndarray, y: np.ndarray, tolerance: float = 1e-7) -> None:
    """Logits, the gradients of all parameters and of the input, and running statistics, in float64.

    No entry may differ by more than ``tolerance`` times the largest of its array: the sums of a deep net add up in
    another order, and batch norm over few values makes much of that.
    """
    import torch

    net.to(np.float64).requires_grad_()
    twin.double()
    load(twin, net)
    image, theirs = Tensor(x.astype(np.float64), requires_grad=True), torch.tensor(x, dtype=torch.float64)
    theirs.requires_grad_()
    logits = net(image)
    F.cross_entropy(logits, y).backward()
    with one_thread():
        expected = twin(theirs)
        torch.nn.functional.cross_entropy(expected, torch.from_numpy(y)).backward()
    _close("logits", logits.data, expected, tolerance)
    _close("input", image.grad, theirs.grad, tolerance)
    gradients, buffers = {name: p.grad for name, p in twin.named_parameters()}, dict(twin.named_buffers())
    assert sorted(gradients) == sorted(name for name, _ in net.named_parameters())
    floor = 1e-6 * max(gradient.abs().max().item() for gradient in gradients.values())
    for name, parameter in net.named_parameters():  # floor: a shift that batch norm takes away has gradient 0
        _close(name, parameter.grad, gradients[name], tolerance, floor)
    for name, array in net.named_buffers():
        _close(name, array, buffers[name], tolerance)


def _close(name: str, ours: Any, theirs: Any, tolerance: float, floor: float = 0.0) -> None:
    assert isinstance(ours, np.ndarray), f"{name} has no gradient"
    expected = theirs.detach().numpy()
    largest = max(np.abs(expected).max(), floor)
    assert largest > 0, f"{name} is zero everywhere: nothing is compared"
    assert ours.shape == expected.shape, f"{name}: shape {ours.shape}, expected {expected.shape}"
    error = np.abs(ours - expected).max()
    assert error <= tolerance * largest, f"{name} is off by {error:.3g}, its largest entry is {largest:.3g}"


def losses(net: nn.Module, x: np.ndarray, y: np.ndarray, lr: float, steps: int) -> list[float]:
    """Loss on one batch before each of so many steps of SGD with momentum."""
    from lance_ref import optim

    optimizer = optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(net(x), y)
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found
