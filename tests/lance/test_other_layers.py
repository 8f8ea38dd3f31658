"""Nets with transposed convolutions, volumes and recurrent layers: what LANCE and its rivals do, or refuse by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import analysis
import lance_ref
from analysis.check.measure import compare
from analysis.reports.predict import predict
from lance_ref import F, Subspace, Tensor, attach, calibrate, compress, nn, restore, tape, tune
from lance_ref.algebra.modes import multi_mode_product
from lance_ref.continual import feature_gram
from lance_ref.lance.planning import gradient_errors
from lance_ref.lance.recalibration import measure_energy
from lance_ref.nn.lora import add_lora
from lance_ref.nn.module import Module
from lance_ref.stores import Asi, GradientFilter, Hosvd, Lance, Quantized, Sketch


class Decoder(nn.Sequential):
    """A convolution halves the map, transposed ones of one and of two groups double it; a head."""

    shape = (3, 8, 6)

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, 2, 1, rng=0), nn.ReLU(), nn.ConvTranspose2d(6, 4, 4, 2, 1, rng=1), nn.ReLU(),
            nn.ConvTranspose2d(4, 6, (3, 2), (1, 2), groups=2, rng=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(720, 3, rng=3),
        )  # fmt: skip


class Video(nn.Sequential):
    """Two convolutions of volumes, the second of two groups, with a pool between."""

    shape = (2, 5, 6, 4)

    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 6, 3, padding=1, rng=0), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(6, 4, (2, 3, 1), groups=2, rng=1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3, rng=2),
        )  # fmt: skip


class Words(nn.Module):
    """A recurrent layer on sequences; its ``hh`` runs at every step."""

    shape = (7, 6)

    def __init__(self, kind: Any = nn.LSTM) -> None:
        super().__init__()
        self.rnn, self.head = kind(6, 5, batch_first=True, bidirectional=True, rng=0), nn.Linear(10, 3, rng=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


NETS: dict[str, Callable[[], Any]] = {
    "transposed": Decoder,
    "volumes": Video,
    "LSTM": Words,
    "GRU": lambda: Words(nn.GRU),
}


def data(net: Any, count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that tell their class by their mean, so that a net can learn it."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    x = rng.standard_normal((count, *net.shape)) * 0.3 + (labels - 1).reshape(-1, *[1] * len(net.shape))
    return x.astype(np.float32), labels


def gradients(net: Module, x: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    net.zero_grad()
    F.cross_entropy(net(x), labels).backward()
    return {name: p.grad.copy() for name, p in net.named_parameters() if p.grad is not None}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> Any:
    return NETS[request.param]()


def test_full_rank_is_backpropagation(net: Any) -> None:
    """Every layer of the net, in float64; an ``hh`` layer keeps a core for each step."""
    net.to(np.float64)
    x, labels = data(net)
    x = x.astype(np.float64)
    tune(net, "all")
    expected = gradients(net, x, labels)
    compressed = compress(net, calibrate(net, [x], epsilon=1.0))
    assert compressed == list(net.tuning.layers)
    for name, grad in gradients(net, x, labels).items():
        np.testing.assert_allclose(grad, expected[name], rtol=1e-10, atol=1e-10, err_msg=name)


def test_a_core_gives_the_gradient_of_what_it_stands_for(net: Any) -> None:
    """As the layer sees it in a net: the exact gradient of the projected input; input gradients stay exact."""
    net.to(np.float64)
    x, labels = data(net)
    x = x.astype(np.float64)
    tune(net, "all")
    samples = lance_ref.sample_gradients(net, [(x, labels)])
    calibration = calibrate(net, [x], epsilon=0.7)
    compress(net, calibration)
    found = gradients(net, x, labels)
    for path, calls in samples.items():
        factors = calibration[path].factors
        expected = 0
        for call in calls:
            core = multi_mode_product(call.activation, [None if U is None else U.T for U in factors])
            projected = multi_mode_product(core, factors)
            expected = expected + call.geometry.weight_gradient(projected, call.grad_output)
        np.testing.assert_allclose(found[f"{path}.weight"], expected, rtol=1e-9, atol=1e-11, err_msg=path)


def test_it_learns_while_it_is_compressed(net: Any) -> None:
    """``fit`` brings the loss down, and each compressed layer keeps less than its input."""
    x, labels = data(net, 24)
    tune(net, "all")
    compress(net, calibrate(net, [x[:8]], epsilon=0.9, modes=("channel", "depth", "height", "width")))
    before = float(F.cross_entropy(net(x), labels).data)
    lance_ref.fit(net, (x, labels), epochs=12, batch_size=8, lr=0.2, progress=False)
    assert float(F.cross_entropy(net(x), labels).data) < 0.8 * before
    assert restore(net) == list(net.tuning.layers)


@pytest.mark.parametrize("method", ["bp", "lance", "lance-center", "hosvd", "asi", "int8", "int4", "sketch"])
def test_costs_are_those_measured(net: Any, method: str) -> None:
    """Bytes on the tape, multiply-adds by kind and layer, what PyTorch keeps; and the peak of memory."""
    prediction = predict(net, 4, tune="all", with_weights=True, input_shape=net.shape, methods=[method], ranks="0.5")
    comparison = compare(prediction, peaks=True)
    assert prediction.report.methods == (method,)
    assert comparison.agrees, str(comparison)


@pytest.mark.parametrize("make", [
    lambda path, layer: Hosvd(0.8), lambda path, layer: Quantized(8), lambda path, layer: Sketch(0.5),
])  # fmt: skip
def test_rivals_train_every_layer(net: Any, make: Any) -> None:
    """Stores of their own, one for each layer; each layer has a gradient of the right size afterwards."""
    x, labels = data(net)
    tune(net, "all")
    expected = gradients(net, x, labels)
    assert attach(net, make) == list(net.tuning.layers)
    found = gradients(net, x, labels)
    assert found.keys() == expected.keys()
    assert all(np.isfinite(grad).all() for grad in found.values())


@pytest.mark.parametrize("options", [
    {"core_bits": 8}, {"batch_mode": "sketch", "batch_ratio": 0.5}, {"order": "papers"},
    {"order": "separable"},
])  # fmt: skip
@pytest.mark.parametrize("make", [Decoder, Video])
def test_options_of_compress(make: Any, options: dict[str, Any]) -> None:
    """Codes, sketches and orders come near to the gradient without them, or are unbiased and finite."""
    net = make()
    x, labels = data(net)
    tune(net, "all")
    calibration = calibrate(net, [x], epsilon=1.0)
    expected = gradients(net, x, labels)
    compress(net, calibration, **options)
    for name, grad in gradients(net, x, labels).items():
        if "batch_mode" in options:
            assert np.isfinite(grad).all()
        else:
            close = 0.1 if "core_bits" in options else 1e-4
            assert np.linalg.norm(grad - expected[name]) <= close * np.linalg.norm(expected[name]) + 1e-6, name


@pytest.mark.parametrize(("make", "path", "names"), [
    (Decoder, "2", ("batch", "channel", "height", "width")),
    (Video, "3", ("batch", "channel", "depth", "height", "width")),
])  # fmt: skip
def test_calibration_and_its_file(make: Any, path: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """Modes have their names, ``modes`` chooses among them, and a file gives the same subspaces back."""
    net = make()
    x, _ = data(net)
    tune(net, "all")
    calibration = calibrate(net, [x], modes=("depth", "height"))
    assert calibration[path].mode_names == names
    assert [name for name, r in zip(names, calibration[path].ranks, strict=True) if r is not None] == [
        name for name in names if name in ("depth", "height")
    ]
    calibration.save(tmp_path / "calibration.npz")
    loaded = lance_ref.Calibration.load(tmp_path / "calibration.npz")
    assert loaded[path].ranks == calibration[path].ranks
    loaded.check(net)


LAYERS = [(Decoder, "2", "ConvTranspose2d", "conv_transpose2d"), (Video, "3", "Conv3d", "conv3d")]


def _attached_by_hand(net: Any, path: str) -> None:
    net.get_submodule(path).store = GradientFilter(2)
    net(data(net)[0])


def _predicted(net: Any, **options: Any) -> None:
    analysis.cost(net, batch=4, input_shape=net.shape, tune="all", ranks="0.5", **options)


REFUSED: dict[str, tuple[Callable[[Any, str], Any], str]] = {
    "gradient filter": (
        lambda net, path: attach(net, lambda path, layer: GradientFilter(2), layers=path),
        "layer '{path}': gradient-filter takes the inputs of linear and conv2d, not of {op}",
    ),
    "gradient filter by hand": (
        _attached_by_hand, "layer {path}: gradient-filter takes the inputs of linear and conv2d, not of {op}"
    ),
    "gradient filter, predicted": (
        lambda net, path: analysis.cost(net, batch=4, input_shape=net.shape, tune="all", method="gradient-filter"),
        "is a {op}, whose input gradient-filter does not compress",
    ),
    "a subspace": (
        lambda net, path: compress(net, calibrate(net, [data(net)[0]]), layers=path, update="subspace"),
        "layer '{path}' is a {kind}, expected a Conv2d or Linear to train in a subspace",
    ),
    "a subspace, predicted": (
        lambda net, path: _predicted(net, method="lance", update="subspace"), "is a {op}, which trains in no subspace"
    ),
    "LoRA": (lambda net, path: add_lora(net, [path], 2), "layers names '{path}', .*{kind}"),
    "protected directions": (
        lambda net, path: feature_gram(net, [data(net)[0]], layers=path),
        "layer '{path}' is a {kind}, whose directions are not protected",
    ),
    "task subspaces, predicted": (
        lambda net, path: _predicted(net, continual=2), "is a {op}, whose directions no learner protects"
    ),
    "another number of channels": (
        lambda net, path: compress(net, {path: _random((4, 5, *net.shape[1:]))}),
        r"layer '{path}' was calibrated .*\(4, 5, .*but this net's {kind}",
    ),
    "another number of modes": (
        lambda net, path: compress(net, {path: _random((4, 6))}), r"layer '{path}' was calibrated .*\(4, 6\), but"
    ),
}  # fmt: skip


def _random(shape: tuple[int, ...]) -> Subspace:
    return Subspace.random(shape, [1] * len(shape), np.random.default_rng(0))


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize(("make", "path", "kind", "op"), LAYERS)
def test_refusals_name_the_layer(what: str, make: Any, path: str, kind: str, op: str) -> None:
    """What has no meaning there, or nobody has worked out, is refused before anything is changed."""
    net = make()
    tune(net, "all")
    call, words = REFUSED[what]
    with pytest.raises(ValueError, match=words.format(path=path, kind=kind, op=op)):
        call(net, path)


def test_lora_leaves_them_out_and_other_methods_take_them() -> None:
    """Of all methods the gradient filter alone is left out, and a note says why; LoRA adapts nothing here."""
    report = analysis.cost(Decoder(), batch=4, input_shape=Decoder.shape, tune="all", methods="all", ranks="0.5")
    assert "layer '2' is a conv_transpose2d" in report.notes["gradient-filter"]
    assert {"lance", "hosvd", "asi", "int8", "sketch"} <= set(report.methods)
    (row,) = [row for row in report.rows if row.name == "2"]
    assert row.methods["lance"].ranks == (2, 3, 2, 2)


def test_an_asi_layer_goes_on_from_its_last_step() -> None:
    """Five modes with ranks; the state has one factor for each mode that is compressed."""
    net = Video()
    x, labels = data(net)
    tune(net, "last:1")
    attach(net, lambda path, layer: Asi((4, 3, 2, 2, 2)))
    gradients(net, x, labels)
    assert {name: U.shape for name, U in net[3].store.state().items()} == {
        "factor_0": (8, 4), "factor_1": (6, 3), "factor_3": (3, 2)
    }  # fmt: skip
    assert isinstance(net[3].store, Asi)


def test_ranks_within_a_budget() -> None:
    """The planner of ranks takes layers of every kind."""
    net = Decoder()
    x, labels = data(net)
    tune(net, "all")
    calibration = calibrate(net, [x])
    plan = lance_ref.plan_ranks(calibration, 3072)
    plan.apply(net, calibration)
    report = tape(F.cross_entropy(net(x), labels))
    cores = sum(entry.nbytes for entry in report.entries if entry.what == "core")
    assert 1024 < cores <= 3072
    assert all(isinstance(net[i].store, Lance) for i in (0, 2, 4))


@pytest.mark.parametrize(("make", "path", "kind", "op"), LAYERS)
def test_the_planner_knows_the_error_of_every_rank(make: Any, path: str, kind: str, op: str) -> None:
    """With the channels alone compressed all ranks follow from one projection, along the weight's input channels."""
    net = make().to(np.float64)
    x, labels = data(net)
    samples = lance_ref.sample_gradients(net, [(x.astype(np.float64), labels)], layers=["0", path])
    calibration = calibrate(net, [x.astype(np.float64)], layers=["0", path], modes=("channel",))
    for layer, calls in samples.items():
        space, n = calibration[layer], calls[0].geometry.input_shape[1]
        bases = [None if U is None else calibration.grams_of(layer).basis(1)[1] for U in space.factors]
        candidates = [(None, r, *[None] * (len(space.shape) - 2)) for r in range(1, n + 1)]
        found = gradient_errors(space, bases, candidates, calls)
        for r, error in zip(range(1, n + 1), found, strict=True):
            g, U = calls[0].geometry, np.asarray(bases[1])[:, :r]
            projected = multi_mode_product(calls[0].activation, [None, U @ U.T, *[None] * (len(space.shape) - 2)])
            lost = g.weight_gradient(calls[0].activation - projected, calls[0].grad_output)
            np.testing.assert_allclose(error, np.square(lost).sum(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("make", [Decoder, Video])
def test_recalibration_renews_every_kind_of_layer(make: Any) -> None:
    """Images of another kind keep little in the old subspaces; each layer that is renewed keeps its ranks."""
    net = make()
    x, labels = data(net, 16)
    tune(net, "all")
    calibration = calibrate(net, [np.abs(x[:8])], epsilon=0.8, modes=("channel", "depth", "height", "width"))
    compress(net, calibration)
    reference = measure_energy(net, [np.abs(x[:8])])
    assert all(0 < kept <= 1 for kept in reference.values())
    ranks = {path: net.get_submodule(path).store.ranks for path in reference}
    watching = lance_ref.Recalibrator(calibration, dict.fromkeys(reference, 1.0), share=1.0, window=1, batches=1)
    lance_ref.fit(net, (-np.abs(x), labels), epochs=3, batch_size=8, on_step=watching, progress=False)
    assert {event.layer for event in watching.events} == set(reference)
    assert {path: net.get_submodule(path).store.ranks for path in reference} == ranks
