"""``examples/lance_in_one_file.py`` is what it says: NumPy alone, short, and the library's numbers."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lance_ref import Calibration, Tensor, calibrate, compress, datasets, nn, optim
from lance_ref import functional as F

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "lance_in_one_file.py"
PLACES = {"1": "0", "2": "2", "3": "5"}
"""Layers of the example, and of the same network in the library."""


@pytest.fixture(scope="module")
def one_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lance_in_one_file", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parameters(one_file: ModuleType) -> dict[str, np.ndarray]:
    return dict(one_file.initial_parameters(np.random.default_rng(3), np.float64))


@pytest.fixture(scope="module")
def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = datasets.batches(datasets.load("digits", "train"), 64, rng=0)
    return [(x.astype(np.float64), y) for x, y in list(pairs)[:5]]


def library_net(parameters: dict[str, np.ndarray]) -> nn.Sequential:
    """The network of the example, with its parameters."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, rng=0),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, rng=0),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10, rng=0),
    )
    net.to("float64")
    for here, there in PLACES.items():
        layer = net.get_submodule(there)
        layer.weight.data, layer.bias.data = parameters["W" + here].copy(), parameters["b" + here].copy()
    return net


def calibrated(net: nn.Module, batches: list[tuple[np.ndarray, np.ndarray]]) -> Calibration:
    return calibrate(net, [x for x, _ in batches[:4]], layers=["2"], epsilon=0.95)


def test_it_needs_numpy_alone_and_is_short() -> None:
    source = FILE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 200
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported == {"numpy", "pathlib", "sys"}


def test_its_equations_are_those_of_the_page() -> None:
    """Numbers (1) to (10), once each and in order; the page numbers the same equations."""
    numbers = re.findall(r'(?:# |""")\((\d+)\)  ', FILE.read_text(encoding="utf-8"))
    assert sorted(map(int, numbers)) == list(range(1, 11))
    page = (ROOT / "docs" / "what_lance_is.md").read_text(encoding="utf-8")
    assert re.findall(r"\\tag\{(\d+)\}", page) == [str(number) for number in range(1, 11)]


def test_factors_and_core_are_the_librarys(
    one_file: ModuleType, parameters: dict[str, np.ndarray], batches: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    net = library_net(parameters)
    subspace = calibrated(net, batches)["2"]
    factors = one_file.calibrate((one_file.forward(parameters, x)[0] for x, _ in batches[:4]), 0.95)
    for ours, theirs in zip(factors, subspace.factors, strict=True):
        assert theirs is not None
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-10)  # signs of directions are arbitrary

    A = one_file.forward(parameters, batches[4][0])[0]
    np.testing.assert_allclose(A, net[1](net[0](Tensor(batches[4][0]))).data, atol=1e-12)
    compress(net, {"2": subspace})
    core = net.get_submodule("2").store.save(A)["core"]
    np.testing.assert_allclose(one_file.project(A, subspace.factors), core, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compressed", [False, True])
def test_gradients_and_a_step_are_the_librarys(
    compressed: bool,
    one_file: ModuleType,
    parameters: dict[str, np.ndarray],
    batches: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """All six gradients of a batch, and the parameters after one step of :func:`train`."""
    net = library_net(parameters)
    factors = None
    if compressed:
        calibration = calibrated(net, batches)
        factors = calibration["2"].factors
        compress(net, calibration)
    x, labels = batches[4]
    gradients, kept = one_file.gradients(parameters, x, labels, factors)
    assert kept.shape == (calibration["2"].core_shape if compressed else (64, 16, 8, 8))

    optimizer = optim.SGD(net.parameters(), lr=one_file.RATE)
    F.cross_entropy(net(x), labels).backward()
    for here, there in PLACES.items():
        layer = net.get_submodule(there)
        np.testing.assert_allclose(gradients["W" + here], layer.weight.grad, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(gradients["b" + here], layer.bias.grad, rtol=1e-10, atol=1e-10)

    order = np.random.default_rng(0).permutation(64)  # that of `train`; the batch mode has a row for each image
    optimizer.zero_grad()
    F.cross_entropy(net(x[order]), labels[order]).backward()
    optimizer.step()
    after, _ = one_file.train(parameters, x, labels, 1, np.random.default_rng(0), factors)
    for here, there in PLACES.items():
        layer = net.get_submodule(there)
        np.testing.assert_allclose(after["W" + here], layer.weight.data, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(after["b" + here], layer.bias.data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (5, 2, 2), (2, 2, 0)])
def test_the_weight_gradient_is_that_of_the_projected_activation(
    kernel: int, stride: int, padding: int, one_file: ModuleType
) -> None:
    """In the order of the papers, for other kernels than that of the network, against the activation put together."""
    rng = np.random.default_rng(kernel)
    factors = [np.linalg.qr(rng.standard_normal((n, r)))[0] for n, r in ((4, 2), (3, 2), (8, 5), (6, 3))]
    S = rng.standard_normal((2, 2, 5, 3))
    A = np.einsum("ijkl,bi,cj,hk,wl->bchw", S, *factors)
    size = [(n + 2 * padding - kernel) // stride + 1 for n in (8, 6)]
    G = rng.standard_normal((4, 5, *size))
    expected = one_file.correlate(G, one_file.pad(A, padding), kernel, stride)
    ours = one_file.weight_gradient(S, factors, G, kernel, stride, padding)
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_the_command_prints_bytes_and_accuracy() -> None:
    """From another folder than its own, with the digits by an argument; LANCE is close to backpropagation."""
    digits = ROOT / "lance_ref" / "datasets" / "digits.npz"
    done = subprocess.run([sys.executable, FILE, digits], capture_output=True, text=True, cwd=FILE.parent)
    assert done.returncode == 0, done.stderr
    exact, core = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", done.stdout)[:2])
    assert exact == 64 * 16 * 8 * 8 * 4
    assert core < exact / 20
    page = (ROOT / "docs" / "what_lance_is.md").read_text(encoding="utf-8")
    assert "".join(done.stdout.splitlines(keepends=True)[:2]) in page  # accuracies may differ in the last digit
    before, backpropagation, lance = map(float, re.findall(r"([\d.]+)%", done.stdout))
    assert before < lance - 5
    assert backpropagation - 5 < lance <= 100
