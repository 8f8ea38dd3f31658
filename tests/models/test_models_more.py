"""ResNet-50 and MobileNetV3-Small: sizes and names of the originals, PyTorch's numbers, and what the new nets share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import check_live_bytes
from torch_twins import check_twin, losses, one_thread, perturb

from analysis.check.measure import compare
from analysis.check.torch_replay import flops, saved_bytes
from analysis.cost_model import predict
from analysis.rules import elementwise as elementwise_rules
from analysis.rules.account import account
from lance_ref import F, Tensor, calibrate, compress, models, nn, no_grad, record, tape, trace, tune
from lance_ref.nn import init

SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # options and input with which the nets run fast
    "alexnet-cl": ({}, (3, 32, 32)),
    "resnet50": ({}, (3, 32, 32)),
    "mobilenetv3-small": ({"width": 0.5}, (3, 32, 32)),
    "deit-tiny": ({"image_size": 32}, (3, 32, 32)),
}


def on_shapes(name: str, **options: Any) -> nn.Module:
    with init.shapes_only():
        return models.create(name, **options)


@pytest.mark.parametrize(("name", "parameters"), [("resnet50", 25_557_032), ("mobilenetv3-small", 2_542_856)])
def test_parameter_count_is_torchvisions(name: str, parameters: int) -> None:
    """A layer of another width, or with a bias too many, would be another network."""
    assert sum(p.size for p in on_shapes(name).parameters()) == parameters


@pytest.mark.parametrize(("name", "gmacs"), [("resnet50", 4.09), ("mobilenetv3-small", 0.06)])
def test_multiply_adds_are_the_published_ones(name: str, gmacs: float) -> None:
    """A stride in another place keeps the parameters but not the work (torchvision's figures, 224 pixels)."""
    records = trace(on_shapes(name), (1, 3, 224, 224))
    macs = sum(bill.cost.forward_macs for bill in account(records, None))
    assert round(macs / 1e9, 2) == gmacs


# ---- against PyTorch ------------------------------------------------------------------------


def resnet50_twin(torch: Any) -> Any:
    """ResNet-50 of 5 classes from torch.nn alone."""
    tnn = torch.nn

    class Block(tnn.Module):
        def __init__(self, a: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = tnn.Conv2d(a, width, 1, bias=False), tnn.BatchNorm2d(width)
            self.conv2 = tnn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.bn2 = tnn.BatchNorm2d(width)
            self.conv3, self.bn3 = tnn.Conv2d(width, 4 * width, 1, bias=False), tnn.BatchNorm2d(4 * width)
            if stride != 1 or a != 4 * width:
                conv = tnn.Conv2d(a, 4 * width, 1, stride, bias=False)
                self.downsample = tnn.Sequential(conv, tnn.BatchNorm2d(4 * width))

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.bn1(self.conv1(x)))
            y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
            return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class Twin(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = tnn.Conv2d(3, 64, 7, 2, padding=3, bias=False), tnn.BatchNorm2d(64)
            self.layer1 = tnn.Sequential(Block(64, 64, 1), Block(256, 64, 1), Block(256, 64, 1))
            self.layer2 = tnn.Sequential(Block(256, 128, 2), *(Block(512, 128, 1) for _ in range(3)))
            self.layer3 = tnn.Sequential(Block(512, 256, 2), *(Block(1024, 256, 1) for _ in range(5)))
            self.layer4 = tnn.Sequential(Block(1024, 512, 2), Block(2048, 512, 1), Block(2048, 512, 1))
            self.fc = tnn.Linear(2048, 5)

        def forward(self, x: Any) -> Any:
            x = tnn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    return Twin()


def mobilenetv3_twin(torch: Any) -> Any:
    """MobileNetV3-Small of 5 classes, without dropout, from torch.nn alone."""
    tnn = torch.nn

    class Squeeze(tnn.Module):
        def __init__(self, c: int, s: int) -> None:
            super().__init__()
            self.fc1, self.fc2 = tnn.Conv2d(c, s, 1), tnn.Conv2d(s, c, 1)

        def forward(self, x: Any) -> Any:
            y = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
            return x * tnn.functional.hardsigmoid(y)

    def conv(a: int, b: int, k: int, s: int, g: int, act: Any) -> Any:
        norm = tnn.BatchNorm2d(b, eps=0.001, momentum=0.01)
        layers = [tnn.Conv2d(a, b, k, s, (k - 1) // 2, groups=g, bias=False), norm]
        return tnn.Sequential(*layers, *([act()] if act else []))

    class Block(tnn.Module):
        def __init__(self, a: int, k: int, h: int, b: int, squeezed: int, act: Any, s: int) -> None:
            super().__init__()
            layers = [conv(a, h, 1, 1, 1, act)] if a != h else []
            layers += [conv(h, h, k, s, h, act), *([Squeeze(h, squeezed)] if squeezed else [])]
            self.block, self.adds = tnn.Sequential(*layers, conv(h, b, 1, 1, 1, None)), s == 1 and a == b

        def forward(self, x: Any) -> Any:
            return self.block(x) + x if self.adds else self.block(x)

    relu, hs = tnn.ReLU, tnn.Hardswish
    rows = [(16, 3, 16, 16, 8, relu, 2), (16, 3, 72, 24, 0, relu, 2), (24, 3, 88, 24, 0, relu, 1)]
    rows += [(24, 5, 96, 40, 24, hs, 2), (40, 5, 240, 40, 64, hs, 1), (40, 5, 240, 40, 64, hs, 1)]
    rows += [(40, 5, 120, 48, 32, hs, 1), (48, 5, 144, 48, 40, hs, 1), (48, 5, 288, 96, 72, hs, 2)]
    rows += [(96, 5, 576, 96, 144, hs, 1), (96, 5, 576, 96, 144, hs, 1)]

    class Twin(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [Block(*row) for row in rows]
            self.features = tnn.Sequential(conv(3, 16, 3, 2, 1, hs), *blocks, conv(96, 576, 1, 1, 1, hs))
            self.classifier = tnn.Sequential(tnn.Linear(576, 1024), hs(), tnn.Identity(), tnn.Linear(1024, 5))

        def forward(self, x: Any) -> Any:
            return self.classifier(self.features(x).mean((2, 3)))

    return Twin()


TWINS: dict[str, tuple[str, Callable[[Any], Any], dict[str, Any], int, bool]] = {
    "resnet50, training": ("resnet50", resnet50_twin, {}, 48, True),
    "mobilenetv3-small, training": ("mobilenetv3-small", mobilenetv3_twin, {"dropout": 0.0}, 64, True),
    "mobilenetv3-small, evaluation": ("mobilenetv3-small", mobilenetv3_twin, {}, 64, False),
}


@pytest.mark.parametrize("case", TWINS)
def test_equals_pytorch(case: str) -> None:
    """Logits, all gradients and running statistics: one stride, eps, name or shortcut off and they differ."""
    torch = pytest.importorskip("torch")
    name, make, options, size, training = TWINS[case]
    net = models.create(name, num_classes=5, rng=0, **options).train(training)
    perturb(net)
    x = np.random.default_rng(1).normal(size=(3, 3, size, size))
    check_twin(net, make(torch).train(training), x, np.array([0, 3, 4]))


def test_another_eps_is_caught() -> None:
    """Planted: PyTorch's default eps in one batch norm of MobileNetV3."""
    torch = pytest.importorskip("torch")
    net = models.create("mobilenetv3-small", num_classes=5, dropout=0.0, rng=0).eval()
    perturb(net)
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eps = 1e-5
    with pytest.raises(AssertionError, match="logits"):
        check_twin(net, mobilenetv3_twin(torch).eval(), np.ones((1, 3, 32, 32)), np.array([1]))


# ---- what they share ------------------------------------------------------------------------


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("name", SMALL)
def test_stages_are_forward_and_the_trace_is_the_run(name: str) -> None:
    """To the last bit; and from shapes alone the very records of a real run."""
    options, shape = SMALL[name]
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    whole, staged = (models.create(name, num_classes=3, rng=2, **options) for _ in range(2))
    y = Tensor(x)
    with no_grad():
        with record(whole) as real:
            out = whole(Tensor(x))
        for stage in staged.stages():
            y = stage(y)
        np.testing.assert_array_equal(y.data, out.data)
        assert out.data.dtype == np.float32
        assert trace(whole, (3, *shape)) == real


@pytest.mark.parametrize(("name", "lr"), [("resnet50", 1e-3), ("mobilenetv3-small", 0.1), ("deit-tiny", 0.02)])
def test_they_train(name: str, lr: float) -> None:
    """A batch of noise is learnt by heart in a few steps, all parameters together."""
    options, shape = SMALL[name]
    net = models.create(name, num_classes=4, rng=0, **options)
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    found = losses(net, x, np.arange(8) % 4, lr, 6)
    assert min(found[3:]) < 0.8 * found[0]


@pytest.mark.parametrize("name", SMALL)
def test_cost_model_measures_what_it_predicts(name: str) -> None:
    """Bytes and multiply-adds of bp and lance, PyTorch's bytes and FLOPs: no difference, all layers tuned."""
    _, shape = SMALL[name]
    tuned = {"alexnet-cl": "last:3", "resnet50": "last:2", "deit-tiny": "last:13"}.get(
        name, "all"
    )  # the others are like these
    prediction = predict(name, 2, shape[1], num_classes=5, tune=tuned, ranks="0.1", with_weights=True)
    with one_thread():
        comparison = compare(prediction)
    assert comparison.agrees, str(comparison)


@pytest.mark.parametrize("name", ["alexnet-cl", "mobilenetv3-small", "deit-tiny"])
def test_cost_of_training_every_parameter(name: str) -> None:
    """Norms, class token and positions too, and batch norm on the batch's statistics, against tape and PyTorch."""
    pytest.importorskip("torch")
    options, shape = SMALL[name]
    net = on_shapes(name, num_classes=5, **options)
    with record(net) as records:
        F.cross_entropy(net(Tensor.meta((3, *shape))), Tensor.meta((3,), np.int64))
    bills = account(records, None)
    with one_thread():
        assert [bill.pytorch_bytes for bill in bills] == saved_bytes(records)
    counted = flops(records)
    assert counted.forward == 2 * sum(bill.cost.forward_macs for bill in bills)
    assert counted.backward == 2 * sum(bill.cost.grad_input_macs + bill.cost.grad_weight_macs for bill in bills)
    real = models.create(name, num_classes=5, rng=0, **options)
    loss = F.cross_entropy(real(np.zeros((3, *shape), np.float32)), np.array([0, 1, 2]))
    assert sum(bill.tape_bytes for bill in bills) == tape(loss).total_bytes


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-7)])
def test_hardsigmoid_equals_pytorch(dtype: Any, tolerance: float) -> None:
    """Values and slopes, at the kinks too. PyTorch's slope of 1/6 is a float32, in float64 as well."""
    torch = pytest.importorskip("torch")
    values = np.concatenate([np.linspace(-7, 7, 57), [-3, 0, 3, -1e4, 1e4, np.nextafter(dtype(3), dtype(0))]])
    x = Tensor(values.astype(dtype), requires_grad=True)
    theirs = torch.tensor(x.data, requires_grad=True)
    out, expected = nn.Hardsigmoid()(x), torch.nn.functional.hardsigmoid(theirs)
    g = np.random.default_rng(0).uniform(1, 2, values.shape).astype(dtype)
    assert tape(out).total_bytes == -(-values.size // 8)
    out.backward(g)
    expected.backward(torch.tensor(g))
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(x.grad, theirs.grad.numpy(), rtol=tolerance)
    assert np.isnan(F.hardsigmoid(np.array([np.nan], dtype)).data).all()


def test_hardsigmoid_that_keeps_its_input_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the rule says that our hardsigmoid keeps x, as PyTorch's does, in place of one bit."""
    wrong = elementwise_rules.UNARY["hardsigmoid"]._replace(tape="x")
    monkeypatch.setitem(elementwise_rules.UNARY, "hardsigmoid", wrong)
    prediction = predict("mobilenetv3-small", 2, 32, num_classes=5, tune="all", methods=["bp"], with_weights=True)
    with one_thread():
        comparison = compare(prediction)
    assert {line.what for line in comparison.lines if not line.agrees} == {"tape bytes"}


@pytest.mark.parametrize("name", ["mobilenetv3-small", "deit-tiny"])
def test_lance_at_full_energy_is_backpropagation(name: str) -> None:
    """Calibration and compression reach 1x1 maps and tokens; with nothing cut the gradients are the same."""
    options, shape = SMALL[name]
    net = models.create(name, num_classes=3, rng=0, **options).to(np.float64)
    x, y = np.random.default_rng(0).normal(size=(4, *shape)), np.array([0, 1, 2, 0])
    tuning = tune(net, "last:4")
    gradients = []
    for compressed in (False, True):
        if compressed:
            compress(net, calibrate(net, [x], epsilon=1.0))
        net.eval().zero_grad()
        F.cross_entropy(net(x), y).backward()
        gradients.append([net.get_submodule(path).weight.grad for path in tuning.layers])
    for exact, got in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-8 * np.abs(exact).max())


@pytest.mark.parametrize("name", ["alexnet-cl", "mobilenetv3-small", "deit-tiny"])
def test_live_memory_is_what_the_tape_reports(name: str) -> None:
    """An array kept by attention, squeeze or batch norm that the report does not know would show in the process."""
    options, shape = SMALL[name]
    net = models.create(name, num_classes=5, rng=0, **options)
    x, y = np.random.default_rng(0).normal(size=(16, *shape)).astype(np.float32), Tensor(np.arange(16) % 5)
    report = check_live_bytes(lambda: F.cross_entropy(net(x.copy()), y), len(trace(net, x.shape)))
    assert report.total_bytes > 2e6


def test_names_of_mobilenetv3() -> None:
    """State dictionaries and selections would not carry over from torchvision."""
    net = on_shapes("mobilenetv3-small", num_classes=7)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert shapes["features.1.block.1.fc1.weight"] == (8, 16, 1, 1)
    assert shapes["features.4.block.2.fc2.bias"] == (96,)
    assert shapes["features.11.block.3.0.weight"] == (96, 576, 1, 1)
    assert shapes["features.12.0.weight"] == (576, 96, 1, 1)
    assert shapes["classifier.3.weight"] == (7, 1024)
    assert {(m.eps, m.momentum) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-3, 0.01)}
    assert [r.attributes["p"] for r in trace(net, (1, 3, 64, 64)) if r.op == "dropout"] == [0.2]


def test_initial_values_of_mobilenetv3() -> None:
    """As published: linear layers 0.01, He's for convolutions, biases and batch norm at 0 and 1."""
    net = models.create("mobilenetv3-small", num_classes=7, rng=0)
    state = net.state_dict()
    assert state["classifier.0.weight"].std() == pytest.approx(0.01, rel=0.02)
    assert state["features.12.0.weight"].std() == pytest.approx(np.sqrt(2 / 576), rel=0.02)
    zeros = [name for name in state if name.endswith("bias") or name.endswith("running_mean")]
    assert not any(state[name].any() for name in zeros)


BAD = [
    ("resnet50", {"num_classes": 0}, "num_classes is 0"),
    ("mobilenetv3-small", {"num_classes": 1.5}, "num_classes is 1.5"),
    ("mobilenetv3-small", {"width": -1}, "width is -1"),
    ("mobilenetv3-small", {"dropout": 2}, "p is 2"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    """An option out of range must be named, not fail inside a layer."""
    with pytest.raises(ValueError, match=message):
        models.create(name, **options)
