"""The networks that the documents name: a step of each is the library's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_nets import library_step, random_calibration
from test_program import differ

from lance_ref import device, models, nn, tune

NETS: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "mcunet": ((3, 32, 40), "last:4", {}),
    "mobilenetv2": ((3, 33, 40), "last:4", {"width": 0.1, "dropout": 0.0}),
    "mobilenetv2 same": ((3, 32, 32), "last:7", {"width": 0.1, "dropout": 0.0, "padding": "same"}),
    "resnet8": ((3, 16, 20), "all", {}),
    "convnet": ((3, 16, 16), "all", {}),
    "alexnet-cl": ((3, 32, 32), "head", {}),
    "mlp": ((64,), "all", {"in_features": 64}),
}


@pytest.mark.parametrize("name", NETS)
def test_a_step_of_a_named_net(name: str) -> None:
    shape, selection, options = NETS[name]
    net = models.create(name.split()[0], num_classes=4, rng=0, **options)
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and not module.track_running_stats:  # alexnet-cl: of its own statistics
            parent = net.get_submodule(path.rpartition(".")[0]) if "." in path else net
            setattr(parent, path.rpartition(".")[2], type(module)(module.num_features))
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    net.to(np.float64)
    layers = tune(net, selection).layers
    rng = np.random.default_rng(0)
    calibration = random_calibration(net, shape, layers, rng, 2) or None
    x, y = rng.normal(size=(2, *shape)), rng.integers(0, 4, 2)
    program = device.compile(net, calibration, shape, poison=True)
    loss = program.step(x, y, 0.01)
    want_loss, want = library_step(net, calibration, x, y, 0.01)
    assert loss == pytest.approx(want_loss, rel=1e-11)
    assert differ(program.weights(), want) < 1e-12
    assert program.ram_bytes <= 1.05 * program.lower_bound_bytes
