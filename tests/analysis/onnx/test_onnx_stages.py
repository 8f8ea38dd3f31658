"""Files as stages: the same numbers, checkpointing as measured, a frozen part run once, and what cannot be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from onnx_nets import CLASSES, PIXELS, export, torch_cnn, torch_vit  # noqa: E402
from torch_twins import one_thread  # noqa: E402

import lance_ref  # noqa: E402
from analysis.check.measure import compare  # noqa: E402
from analysis.cost_model import main  # noqa: E402
from analysis.onnx.net import OnnxNet  # noqa: E402
from analysis.reports.predict import predict  # noqa: E402
from lance_ref import F, Tensor, datasets  # noqa: E402
from lance_ref.train.features import frozen_stages  # noqa: E402

NETS = {"cnn": torch_cnn, "vit": torch_vit}


def file_of(name: str, folder: Path, **options: Any) -> str:
    file = folder / "net.onnx"
    file.write_bytes(export(torch, NETS[name](torch), **options))
    return str(file)


def run(net: OnnxNet, x: np.ndarray, stages: list[Any] | None) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Output and gradients of the net, or of its stages one after the other."""
    for parameter in net.parameters():
        parameter.grad = None
    value: Any = Tensor(x)
    for part in [net] if stages is None else stages:
        value = part(value)
    F.sum(value * value).backward()
    return value.data, [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("tune", ["all", "last:2", "last:1"])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_the_stages_in_a_row_are_the_network(name: str, dynamic: bool, tune: str, tmp_path: Path) -> None:
    """Outputs and all gradients, to the bit; every step of the file is in one stage."""
    net = OnnxNet(file_of(name, tmp_path, dynamic=dynamic)).eval()
    lance_ref.tune(net, tune)
    x = np.random.default_rng(0).standard_normal((2, 3, PIXELS, PIXELS)).astype(np.float32)
    net(x)
    remark, stages = net.remark, net.stages()
    assert len(stages) > 1
    assert net.remark == remark
    if tune != "all":  # what is frozen at the start is one stage, and the next one trains
        assert [any(p.requires_grad for p in stage.parameters()) for stage in stages[:2]] == [False, True]
    assert [step for stage in stages for step in stage.steps] == list(range(len(net.modules_by_step())))
    whole, parts = run(net, x, None), run(net, x, stages)
    np.testing.assert_array_equal(parts[0], whole[0])
    for ours, wanted in zip(parts[1], whole[1], strict=True):
        assert (ours is None) is (wanted is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("tune", ["all", "last:2"])
@pytest.mark.parametrize(("name", "batch"), [("cnn", 2), ("cnn", 3), ("vit", 2)])
def test_checkpointing_a_file_is_measured_as_predicted(name: str, batch: int, tune: str, tmp_path: Path) -> None:
    """Bytes, multiply-adds and the peak, of a file that is made for a batch of 2 as well."""
    with one_thread():
        prediction = predict(
            file_of(name, tmp_path, dynamic=False), batch, tune=tune, methods=["bp", "checkpoint"], with_weights=True
        )
        assert compare(prediction, peaks=True).agrees
    totals = prediction.report.totals
    assert totals["checkpoint"].flops["recompute"] > 0
    assert totals["checkpoint"].activation_bytes["tape"] < totals["bp"].activation_bytes["tape"]


def test_a_frozen_part_runs_once(tmp_path: Path) -> None:
    """Training with features in place of images gives the same weights, to rounding."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (20, PIXELS, PIXELS, 3), dtype=np.uint8)
    names = tuple(str(n) for n in range(CLASSES))
    data = datasets.Dataset("made up", "train", images, rng.integers(0, CLASSES, 20), names, "a test")
    file = file_of("cnn", tmp_path)
    weights = []
    for cached in (True, False):
        net = OnnxNet(file).eval()
        lance_ref.tune(net, "last:1")
        assert frozen_stages(net)[0] == 1
        lance_ref.fit(net, data, epochs=2, batch_size=4, cache_frozen=cached)
        weights.append([parameter.data.copy() for parameter in net.parameters() if parameter.requires_grad])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


class Branches(torch.nn.Module):
    """Two values go side by side all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: Any) -> Any:
        return (self.one(x) * self.other(x)).mean((2, 3))


class Stochastic(torch.nn.Module):
    """Leaves out whole samples at random, which nobody would see in a frozen part that runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        kept = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype).bernoulli_(0.8)
        return self.last(torch.relu(x * kept.div_(0.8))).mean((2, 3))


@pytest.mark.parametrize("make", [Branches, Stochastic])
def test_what_cannot_be_cut_has_no_stages(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cached, and checkpointing is refused in a line that says why."""
    file = tmp_path / "net.onnx"
    file.write_bytes(export(torch, make(), training=True))
    net = OnnxNet(str(file))
    lance_ref.tune(net, "last:1")
    assert not net.stages() or make is Branches
    assert frozen_stages(net)[0] == 0
    if make is Stochastic:
        with pytest.raises(SystemExit, match="2"):
            main(["--net", str(file), "--batch", "2", "--method", "checkpoint"])
        assert "stages() of the OnnxNet gives nothing" in capsys.readouterr().err
