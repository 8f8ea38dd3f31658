"""compress and restore: stores on and off the right layers, all checks before any change."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from lance_ref import F, Subspace, calibrate, compress, nn, restore, tape
from lance_ref.stores import EXACT, Lance


def small_net(dtype: Any = np.float32, channels: int = 4) -> nn.Sequential:
    rng = np.random.default_rng(0)
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, rng=rng),
        nn.ReLU(),
        nn.Conv2d(channels, 6, 1, groups=2, rng=rng),
        nn.Flatten(),
        nn.Linear(6 * 9, 3, rng=rng),
    ).to(dtype)


def images(dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, 2, 5, 5)).astype(dtype)


def stores(net: nn.Module) -> dict[str, Any]:
    return {path: module.store for path, module in net.named_modules() if hasattr(module, "store")}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compress_puts_a_store_of_the_layers_dtype(dtype: Any) -> None:
    """Each calibrated layer gets its own Lance with its own subspace, order and dtype; the others stay Exact."""
    net = small_net(dtype)
    calibration = calibrate(net, [images(dtype)], layers=["0", "2"])
    assert compress(net, calibration, order="separable") == ["0", "2"]
    for path in ("0", "2"):
        store = stores(net)[path]
        assert isinstance(store, Lance)
        assert (store.shape, store.order, store.dtype) == (calibration[path].shape, "separable", dtype)
        for U, own in zip(calibration[path].factors, store.factors, strict=True):
            np.testing.assert_array_equal(own, U.astype(dtype))
    assert stores(net)["4"] is EXACT


def test_a_net_keeps_no_factors_but_those_of_its_dtype() -> None:
    """Beside the float32 factors that are billed, the calibration's in float64 would be twice as many bytes."""
    net = small_net(np.float32)
    calibration = calibrate(net, [images(np.float32)])
    compress(net, calibration)
    watched = [weakref.ref(U) for path in calibration for U in calibration[path].factors]
    assert any(watched)
    del calibration
    gc.collect()
    assert not any(reference() is not None for reference in watched)


def test_some_of_the_calibrated_layers() -> None:
    """layers= takes globs of calibrated layers; the rest are not touched."""
    net = small_net()
    calibration = calibrate(net, [images()])
    assert compress(net, calibration, layers="[24]") == ["2", "4"]
    assert [store is EXACT for store in stores(net).values()] == [True, False, False]
    assert compress(net, calibration, layers=["0"]) == ["0"]
    assert not any(store is EXACT for store in stores(net).values())


def test_restore_takes_every_store_off() -> None:
    """Says which layers were compressed; a second restore has nothing to do; the tape is the old one."""
    net, x = small_net(), images()
    before = tape(F.mse_loss(net(x), np.zeros((4, 3), np.float32))).total_bytes
    compress(net, calibrate(net, [x], epsilon=0.5), layers=["0", "4"])
    assert tape(F.mse_loss(net(x), np.zeros((4, 3), np.float32))).total_bytes < before
    assert restore(net) == ["0", "4"]
    assert restore(net) == []
    assert all(store is EXACT for store in stores(net).values())
    assert tape(F.mse_loss(net(x), np.zeros((4, 3), np.float32))).total_bytes == before


def test_a_plain_mapping_of_subspaces_will_do() -> None:
    """Measurements use random factors of given ranks, without any data."""
    net = small_net()
    space = Subspace.random((4, 2, 5, 5), (3, 1, 2, 2), np.random.default_rng(0))
    assert compress(net, {"0": space}) == ["0"]
    loss = F.mse_loss(net(images()), np.zeros((4, 3), np.float32))
    assert tape(loss).by_layer()["0"] == 4 * 3 * 1 * 2 * 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unknown layer", r"no convolution or linear layer '7'.*\(4, 6\).*'0', '2', '4'"),
        ("not a layer with weights", r"no convolution or linear layer '1'.*\(4, 4, 3, 3\)"),
        ("other channels", r"'2'.*\(4, 4, 3, 3\).*Conv2d.*\(6, 4, 1, 1\) takes \(B, 8, H, W\)"),
        ("other kind", r"'4'.*\(4, 6, 3, 3\).*Linear.*\(3, 54\) takes \(B, 54\)"),
        ("tokens", r"'4'.*\(4, 2, 53\).*Linear.*takes \(B, L, 54\)"),
        ("order", "order is 'fast'"),
        ("glob", "'9' matches no calibrated layer, expected one of '0', '2', '4'"),
    ],
)
def test_nothing_changes_unless_everything_fits(fault: str, message: str) -> None:
    """The first layer is always fine: if any other is not, it must stay Exact as well."""
    net, rng = small_net(channels=8 if fault == "other channels" else 4), np.random.default_rng(0)
    calibration: dict[str, Subspace] = dict(calibrate(small_net(), [images()]))
    options: dict[str, Any] = {}
    if fault == "unknown layer":
        calibration["7"] = Subspace.random((4, 6), (1, 1), rng)
    elif fault == "not a layer with weights":
        calibration["1"] = calibration["2"]
    elif fault == "other kind":
        calibration["4"] = Subspace.random((4, 6, 3, 3), (1, 1, 1, 1), rng)
    elif fault == "tokens":
        calibration["4"] = Subspace.random((4, 2, 53), (1, 1, 1), rng)
    elif fault == "order":
        options["order"] = "fast"
    elif fault == "glob":
        options["layers"] = ["0", "9"]
    with pytest.raises(ValueError, match=message):
        compress(net, calibration, **options)
    assert all(store is EXACT for store in stores(net).values())
