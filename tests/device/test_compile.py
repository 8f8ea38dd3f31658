"""What the compiler takes, and what it refuses with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lance_ref import calibrate, device, models, nn, tune
from lance_ref import functional as F
from lance_ref.algebra.subspace import Subspace
from lance_ref.device.budget import parse_bytes
from lance_ref.engine.tensor import Tensor


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, rng=0), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3, rng=0))


def subspace(shape: Any = (2, 2, 4, 4), ranks: Any = (None, 1, None, None)) -> dict[str, Subspace]:
    return {"0": Subspace.random(shape, ranks, np.random.default_rng(0))}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "hosvd"}, ValueError, "method is 'hosvd', expected one of lance, bp, bias, head"),
        ({"update": "epoch"}, ValueError, "update is 'epoch'"),
        ({"train": "all"}, ValueError, "train is 'all'"),
        ({"forward": "fast"}, ValueError, "forward is 'fast'"),
        ({"momentum": 1}, ValueError, "momentum is 1"),
        ({"budget": "much"}, ValueError, "budget is 'much'"),
        ({"budget": 0}, ValueError, "budget is 0"),
        ({"method": "lance"}, ValueError, "calibration is none, but method 'lance' takes one"),
        ({"method": "bp", "calibration": subspace()}, ValueError, "calibration is given, but method 'bp' takes none"),
        (
            {"calibration": subspace((2, 2, 4, 5))},
            ValueError,
            r"calibrated with \(2, 4, 5\), but its input has \(2, 4, 4\)",
        ),
        ({"calibration": subspace(ranks=(1, 1, None, None))}, device.UnsupportedError, "compresses the batch mode"),
        ({"calibration": {"9": subspace()["0"]}}, ValueError, "layer '9', which the net does not run"),
        ({"input_shape": (2, 4)}, ValueError, r"input_shape is \(2, 4\), expected \(C, H, W\)"),
        ({"input_shape": (2, 4, -1)}, ValueError, "positive integers"),
        ({"input_shape": (2.0, 4, 4)}, ValueError, "positive integers"),
        ({"input_shape": (3, 4, 4)}, ValueError, "expected"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        device.compile(net(), **{"input_shape": (2, 4, 4), **options})


def test_something_else_than_a_net() -> None:
    with pytest.raises(TypeError, match="net is a int"):
        device.compile(3)  # type: ignore[arg-type]


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4, rng=0), nn.GELU(), nn.Linear(4, 2, rng=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


def test_an_operation_that_no_device_has() -> None:
    with pytest.raises(device.UnsupportedError, match="operation 'gelu' of layer 'act' cannot run on a device"):
        device.compile(Gelu(), input_shape=(4,))


def test_batch_statistics() -> None:
    with_norm = nn.Sequential(nn.Conv2d(2, 3, 3, rng=0), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2, rng=0))
    with pytest.raises(device.UnsupportedError, match="'batch_norm' of layer '1' uses the statistics of the batch"):
        device.compile(with_norm, input_shape=(2, 4, 4))
    with pytest.raises(device.UnsupportedError, match=r"layer 'bn1' uses the statistics"):
        device.compile(models.create("alexnet-cl", rng=0), input_shape=(3, 32, 32), tune="head", method="head")


def test_a_weight_that_is_not_finite() -> None:
    broken = net()
    broken[0].weight.data[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"parameter '0\.weight' contains NaN"):
        device.compile(broken, input_shape=(2, 4, 4))


def test_running_statistics_that_are_not_finite() -> None:
    broken = nn.Sequential(nn.Conv2d(2, 3, 3, rng=0), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2, rng=0))
    tune(broken, "head")
    broken[1].running_mean[0] = np.inf
    with pytest.raises(ValueError, match="layer '1' has running statistics that give NaN"):
        device.compile(broken, input_shape=(2, 4, 4))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4, rng=0), nn.Linear(4, 2, rng=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(F.relu(self.layer(x))))


def test_a_layer_that_trains_and_runs_twice() -> None:
    """Frozen it may run twice; training, its gradients would come from two places."""
    with pytest.raises(device.UnsupportedError, match=r"trains 'layer\.weight', which another operation uses too"):
        device.compile(Shared(), input_shape=(4,))
    shared = Shared()
    program = device.compile(shared, input_shape=(4,), tune="head")
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    np.testing.assert_allclose(program.logits(x), shared(Tensor(x)).data, rtol=1e-5)


def test_nothing_that_trains() -> None:
    frozen = net()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing that the output depends on trains"):
        device.compile(frozen, input_shape=(2, 4, 4))


def test_a_calibration_of_another_net() -> None:
    other = nn.Sequential(
        nn.Conv2d(2, 4, 3, rng=0), nn.ReLU(), nn.Conv2d(4, 4, 1, rng=0), nn.Flatten(), nn.Linear(16, 3, rng=0)
    )
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)
    calibration = calibrate(other, [x], layers=["0", "2"], modes=("channel",))
    with pytest.raises(ValueError, match="2"):
        device.compile(net(), calibration, (2, 4, 4))


def test_a_centred_calibration() -> None:
    x = np.random.default_rng(0).normal(1, 1, size=(2, 2, 4, 4)).astype(np.float32)
    calibration = calibrate(net(), [x], layers="0", modes=("channel",), center=True)
    with pytest.raises(device.UnsupportedError, match="center=True"):
        device.compile(net(), calibration, (2, 4, 4))


def test_the_net_keeps_its_mode() -> None:
    """Compiling leaves training and evaluation modes as they were, module by module."""
    mixed = net()
    mixed.eval()
    mixed[1].train()
    device.compile(mixed, input_shape=(2, 4, 4))
    assert [module.training for _, module in mixed.named_modules()] == [False, False, True, False, False]


def test_preprocessing_that_is_no_scale_and_shift() -> None:
    with pytest.raises(device.UnsupportedError, match="one scale and one shift"):
        device.compile(net(), input_shape=(2, 4, 4), preprocess=lambda pixels: pixels.transpose(0, 3, 1, 2) ** 2.0)


@pytest.mark.parametrize(("text", "nbytes"), [("1KiB", 1024), (" 2 mb ", 2_000_000), (7, 7), ("0.5KiB", 512)])
def test_bytes_as_people_write_them(text: Any, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "KiB", "-1", "1 PiB", 1.5, True, "0", None])
def test_bytes_that_are_none(text: Any) -> None:
    with pytest.raises(ValueError, match="expected a positive number of bytes"):
        parse_bytes(text)


def test_mcunet_fits() -> None:
    """The numbers of the README: MCUNet at 128 pixels, the last four layers and the head, eight directions."""
    mcunet = models.create("mcunet", num_classes=10, rng=0)
    layers = tune(mcunet, "last:4").layers
    sizes = {"batch": 201_432, "image": 142_000}
    shapes = {"blocks.12.project": (384, 4, 4), "blocks.13.expand": (96, 4, 4)}
    rng = np.random.default_rng(0)
    calibration = {
        path: Subspace.random((1, *shapes.get(path, (576, 4, 4))), (None, 8, None, None), rng) for path in layers
    }
    for update, nbytes in sizes.items():
        program = device.compile(mcunet, calibration, (3, 128, 128), update=update)
        assert program.ram_bytes == nbytes
        assert program.lower_bound_bytes == nbytes
