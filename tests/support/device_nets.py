"""Small random networks of every operation that a device program has, and the library's own step."""

from __future__ import annotations

from typing import Any

import numpy as np

from lance_ref import compress, nn, tune
from lance_ref import functional as F
from lance_ref.algebra.subspace import Subspace
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.selection import weighted_layers
from lance_ref.nn.tracing import trace


class Residual(nn.Module):
    """x + body(x), or shortcut(x) + body(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut, self.last = shortcut or nn.Identity(), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x) + self.shortcut(x))


def activation(rng: np.random.Generator) -> nn.Module:
    return [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Identity][rng.integers(4)]()


def conv(rng: np.random.Generator, C_in: int, C_out: int, size: int, **fixed: Any) -> list[nn.Module]:
    """A convolution of any geometry, perhaps with a frozen batch norm."""
    kernel = int(rng.choice([k for k in (1, 2, 3, 5) if k <= size]))
    groups = int(rng.choice([g for g in (1, 1, 1, 2, C_in) if C_in % g == 0 and C_out % g == 0]))
    options = {
        "kernel_size": kernel, "stride": int(rng.integers(1, 3)), "padding": int(rng.integers(0, kernel)),
        "dilation": 2 if 2 * (kernel - 1) < size and rng.random() < 0.3 else 1, "groups": groups,
    } | fixed  # fmt: skip
    has_norm = rng.random() < 0.4
    layer = nn.Conv2d(C_in, C_out, bias=bool(rng.random() < 0.7), rng=rng, **options)
    if not has_norm:
        return [layer]
    norm = nn.BatchNorm2d(C_out)
    norm.weight.data = rng.uniform(0.5, 1.5, C_out).astype(np.float32)
    norm.bias.data = rng.normal(size=C_out).astype(np.float32)
    norm.running_mean[:] = rng.normal(size=C_out)
    norm.running_var[:] = rng.uniform(0.5, 2, C_out)
    return [layer, norm]


def random_net(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and the shape of its input; every operation comes up within a few dozen seeds."""
    rng = np.random.default_rng(seed)
    shape = C, H, W = int(rng.integers(1, 4)), int(rng.integers(6, 12)), int(rng.integers(6, 12))
    layers: list[nn.Module] = []
    for _ in range(int(rng.integers(1, 5))):
        size = min(H, W)
        kind = rng.choice(["conv", "inverted", "pool", "residual", "depthwise"])
        if kind == "conv":
            C_out = int(rng.integers(1, 4)) * 2
            layers += [*conv(rng, C, C_out, size), activation(rng)]
        elif kind == "inverted":
            hidden, k = C * int(rng.integers(1, 4)), 3
            block = nn.Sequential(
                *conv(rng, C, hidden, size, kernel_size=1, stride=1, padding=0, groups=1, dilation=1), activation(rng),
                *conv(rng, hidden, hidden, size, kernel_size=k, stride=1, padding=1, groups=hidden, dilation=1),
                activation(rng), *conv(rng, hidden, C, size, kernel_size=1, stride=1, padding=0, groups=1, dilation=1),
            )  # fmt: skip
            layers.append(Residual(block) if rng.random() < 0.6 else block)
        elif kind == "pool" and size >= 4:
            layers.append(
                [
                    nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, 1),
                    nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, 2, ceil_mode=True),
                ][rng.integers(5)]
            )  # fmt: skip
        elif kind == "residual":
            same = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
            body = nn.Sequential(
                *conv(rng, C, C + 1, size, **same, groups=1),
                activation(rng),
                *conv(rng, C + 1, C, size, **same, groups=1),
            )
            shortcut = nn.Sequential(*conv(rng, C, C, size, kernel_size=1, stride=1, padding=0, dilation=1, groups=1))
            layers.append(Residual(body, shortcut if rng.random() < 0.5 else None, activation(rng)))
        elif kind == "depthwise":
            layers += [*conv(rng, C, C, size, groups=C), activation(rng)]
        C, H, W = trace(nn.Sequential(*layers), (2, *shape))[-1].output.shape[1:] if layers else shape
    ending = rng.choice(["global", "grid", "flat", "linear"])
    if ending in ("global", "grid"):
        n = 1 if ending == "global" else 2
        layers += [nn.AdaptiveAvgPool2d(n), nn.Flatten(), nn.Linear(C * n * n, 3, rng=rng)]
    elif ending == "flat":
        layers += [nn.Flatten(), nn.Linear(C * H * W, 3, rng=rng)]
    else:
        layers += [nn.Flatten(), nn.Linear(C * H * W, 5, rng=rng), nn.ReLU(), nn.Linear(5, 3, bias=False, rng=rng)]
    return nn.Sequential(*layers), shape


class RandomGraph(nn.Module):
    """Maps of one size, added, convolved and activated in any order; some are used several times, some never."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        C, count = int(rng.integers(2, 5)), int(rng.integers(2, 8))
        fixed = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
        makers = {
            "act": lambda: activation(rng),
            "conv": lambda: nn.Sequential(*conv(rng, C, C, 5, **fixed, groups=1)),
            "depthwise": lambda: nn.Sequential(*conv(rng, C, C, 5, **fixed, groups=C)),
            "pool": lambda: nn.MaxPool2d(3, 1, 1),
        }
        self.stem = nn.Conv2d(2, C, 3, padding=1, rng=rng)
        self.plan: list[tuple[int, int | None]] = []
        for k in range(1, count + 1):
            kind = rng.choice([*makers, "add"])
            a, b = int(rng.integers(max(0, k - 2), k)), int(rng.integers(0, k))
            self.plan.append((a, b if kind == "add" else None))
            self.add_module(f"m{k}", nn.Identity() if kind == "add" else makers[kind]())
        self.end = max(1, count - int(rng.integers(0, 2)))
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 3, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for k, (a, b) in enumerate(self.plan, 1):
            values.append(self.get_submodule(f"m{k}")(values[a]) if b is None else values[a] + values[b])
        logits = self.head(self.flatten(self.pool(values[self.end])))
        F.relu(logits)  # without effect
        return logits


def random_calibration(
    net: nn.Module, shape: tuple[int, ...], layers: Any, rng: np.random.Generator, batch: int
) -> dict[str, Subspace]:
    """Random subspaces of random modes for these layers."""
    modules = weighted_layers(net)
    inputs = {r.path: r.inputs[0].shape for r in trace(net, (batch, *shape)) if r.op in ("conv2d", "linear")}
    found = {}
    for path in layers:
        if path in modules and path in inputs:
            ranks = [None if rng.random() < 0.4 else int(rng.integers(1, n + 1)) for n in inputs[path][1:]]
            found[path] = Subspace.random(inputs[path], (None, *ranks), rng)
    return found


Case = tuple[nn.Module, tuple[int, ...], Any, np.ndarray, np.ndarray]


def case(seed: int, method: str, dtype: Any = np.float64) -> Case:
    """A net whose layers are chosen, a calibration or None, images and labels."""
    rng = np.random.default_rng(seed + 1000)
    net, shape = random_net(seed)
    net.to(dtype)
    selection = "head" if method == "head" else "all" if rng.random() < 0.4 else f"last:{int(rng.integers(1, 4))}"
    if len(weighted_layers(net)) == 1:
        selection = "head"
    elif selection.startswith("last"):
        selection = f"last:{min(int(selection[5:]), len(weighted_layers(net)) - 1)}"
    tuning = _biases(net, selection) if method == "bias" else tune(net, selection)
    B = 3
    calibration = random_calibration(net, shape, tuning.layers, rng, B) if method == "lance" else None
    return net, shape, calibration, rng.normal(size=(B, *shape)).astype(dtype), rng.integers(0, 3, B)


def _biases(net: nn.Module, selection: str) -> Any:
    try:
        return tune(net, selection, parameters="bias")
    except ValueError:  # a layer without a bias
        return tune(net, "head")


def library_step(
    net: nn.Module, calibration: Any, x: np.ndarray, y: np.ndarray, lr: float
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss, and the weights after one step of SGD with the library."""
    if calibration:
        compress(net, calibration)
    net.train()
    loss = F.cross_entropy(net(Tensor(x)), y)
    loss.backward()
    new = {
        n: p.data - x.dtype.type(lr) * p.grad
        for n, p in net.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    return loss.item(), new
