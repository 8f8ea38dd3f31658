"""The AlexNet of gradient projection: its layers, its heads, and batch norm that remembers nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch_twins import check_twin, losses, perturb

from lance_ref import F, Tensor, models, nn, no_grad, trace, tune
from lance_ref.nn import init

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 3, 32, 32)).astype(np.float32)
Y = np.arange(6) % 5


def test_layers_and_sizes() -> None:
    """Another map or width would be another network than the one whose accuracies are published."""
    with init.shapes_only():
        net = models.create("alexnet-cl", num_classes=10, heads=10)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    weights = {name: shape for name, shape in shapes.items() if not name.startswith("bn")}
    assert weights == {
        "conv1.weight": (64, 3, 4, 4),
        "conv2.weight": (128, 64, 3, 3),
        "conv3.weight": (256, 128, 2, 2),
        "fc1.weight": (2048, 1024),
        "fc2.weight": (2048, 2048),
        **{f"fc3.{t}.weight": (10, 2048) for t in range(10)},
    }
    assert sum(p.size for p in net.parameters()) == 6_499_328 + 2 * (64 + 128 + 256 + 2048 + 2048) + 10 * 20_480
    sides = [r.output.shape[-1] for r in trace(net, (2, 3, 32, 32)) if r.op in ("conv2d", "max_pool2d")]
    assert sides == [29, 14, 12, 6, 5, 2]
    assert not list(net.named_buffers())  # no running statistics


def test_order_of_operations() -> None:
    """Dropout after pooling, or of another probability, would regularise otherwise."""
    with init.shapes_only():
        net = models.create("alexnet-cl")
    seen = [(r.op, r.attributes.get("p")) for r in trace(net, (2, 3, 32, 32)) if r.op != "reshape"]
    expected: list[tuple[str, Any]] = []
    for p in (0.2, 0.2, 0.5):
        expected += [("conv2d", None), ("batch_norm", None), ("relu", None), ("dropout", p), ("max_pool2d", None)]
    for _ in range(2):
        expected += [("linear", None), ("batch_norm", None), ("relu", None), ("dropout", 0.5)]
    assert seen == [*expected, ("linear", None)]


def torch_twin(torch: Any, classes: int, heads: int) -> Any:
    """The same without dropout, from torch.nn alone; the last head runs."""

    class Twin(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, (a, b, k) in enumerate([(3, 64, 4), (64, 128, 3), (128, 256, 2)], 1):
                self.add_module(f"conv{i}", torch.nn.Conv2d(a, b, k, bias=False))
                self.add_module(f"bn{i}", torch.nn.BatchNorm2d(b, track_running_stats=False))
            for i, a in enumerate([1024, 2048], 1):
                self.add_module(f"fc{i}", torch.nn.Linear(a, 2048, bias=False))
                self.add_module(f"bn{i + 3}", torch.nn.BatchNorm1d(2048, track_running_stats=False))
            self.fc3 = torch.nn.ModuleList(torch.nn.Linear(2048, classes, bias=False) for _ in range(heads))

        def forward(self, x: Any) -> Any:
            for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
                x = torch.max_pool2d(torch.relu(bn(conv(x))), 2)
            x = torch.relu(self.bn4(self.fc1(x.flatten(1))))
            return self.fc3[-1](torch.relu(self.bn5(self.fc2(x))))

    return Twin()


def test_equals_pytorch() -> None:
    """One layer wired otherwise, or a gradient that goes astray, and logits or gradients differ."""
    torch = pytest.importorskip("torch")
    net = models.create("alexnet-cl", num_classes=5, rng=0)
    net.drop1.p = net.drop2.p = 0.0
    perturb(net)
    check_twin(net, torch_twin(torch, 5, 1), X, Y)


def test_the_selected_head_runs_and_learns_alone() -> None:
    """Training task 1 must not touch the classifier of task 0, nor may its answers come from it."""
    net = models.create("alexnet-cl", num_classes=5, heads=3, rng=0).eval()
    assert net.head == 0
    with no_grad():
        first = net(X).data
        net.head = 2
        third = net(X).data
        features = nn.Sequential(*net.stages()[:-1])(Tensor(X)).data
    assert np.abs(third - first).max() > 0.1
    np.testing.assert_array_equal(third, features @ net.fc3[2].weight.data.T)
    net.head = np.int64(1)
    F.cross_entropy(net(X), Y).backward()
    assert [head.weight.grad is None for head in net.fc3] == [True, False, True]


def test_stages_follow_the_head() -> None:
    """Stages taken once must run the head that is selected later, and hold them all."""
    net = models.create("alexnet-cl", num_classes=5, heads=2, rng=0).eval()
    stages = net.stages()
    assert len(stages) == 6
    held = [id(p) for stage in stages for p in stage.parameters()]
    assert held == [id(p) for p in net.parameters()]
    for head in (0, 1):
        net.head = head
        x = Tensor(X)
        with no_grad():
            for stage in stages:
                x = stage(x)
            np.testing.assert_array_equal(x.data, net(X).data)


@pytest.mark.parametrize("head", [-1, 2, 1.0, True, "1", None])
def test_a_head_that_is_not_there_is_refused(head: Any) -> None:
    """A wrong task would be trained or judged with another task's classifier."""
    with init.shapes_only():
        net = models.create("alexnet-cl", heads=2)
    with pytest.raises(ValueError, match=r"head is .*expected an integer from 0 to 1"):
        net.head = head
    assert net.head == 0
    for option in ("heads", "num_classes"):
        with pytest.raises(ValueError, match=f"{option} is 0, expected a positive integer"):
            models.create("alexnet-cl", **{option: 0})


def test_batch_norm_uses_the_batch_in_evaluation_too() -> None:
    """With running statistics that nobody kept, an old task would be judged by numbers of the newest."""
    net = models.create("alexnet-cl", num_classes=5, rng=0).eval()
    with no_grad():
        together, apart = net(X).data[:3], net(X[:3]).data
        np.testing.assert_array_equal(net(X).data[:3], together)  # and draws no dropout masks
    assert np.abs(together - apart).max() > 1e-3


def test_it_trains() -> None:
    """A batch of noise is learnt by heart in a few steps, dropout and all; the seed fixes the run."""
    runs = [losses(models.create("alexnet-cl", num_classes=5, rng=3), X, Y, 0.02, 5) for _ in range(2)]
    assert runs[0][-1] < 0.5 * runs[0][0]
    assert runs[0] == runs[1]


def test_tuning_counts_its_layers() -> None:
    """With one head it is a classifier like the others."""
    net = models.create("alexnet-cl", rng=0)
    assert tune(net, "last:2").layers == ("fc1", "fc2")
    assert net.tuning.head == "fc3.0"
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "fc1.weight",
        "fc2.weight",
        "fc3.0.weight",
    ]


# ---- batch norm of vectors ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4)])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_1d_equals_pytorch(shape: tuple[int, ...], tracked: bool) -> None:
    """Statistics over another axis than the channels, in training or evaluation."""
    torch = pytest.importorskip("torch")
    ours = nn.BatchNorm1d(3, track_running_stats=tracked).to(np.float64)
    theirs = torch.nn.BatchNorm1d(3, track_running_stats=tracked).double()
    for mode in (True, False):
        x = np.random.default_rng(mode).normal(1, 2, shape)
        a, b = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
        y, expected = ours.train(mode)(a), theirs.train(mode)(b)
        np.testing.assert_allclose(y.data, expected.detach().numpy(), rtol=1e-10, atol=1e-12)
        g = np.random.default_rng(2).normal(size=shape)
        y.backward(g)
        expected.backward(torch.tensor(g))
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-8, atol=1e-10)


def test_batch_norm_1d_refuses_images_and_2d_vectors() -> None:
    """Each names itself and the shape that it expects."""
    with pytest.raises(ValueError, match=r"BatchNorm1d: x has shape \(2, 3, 4, 4\), expected \(B, 3\) or \(B, 3, L\)"):
        nn.BatchNorm1d(3)(np.zeros((2, 3, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"BatchNorm2d: x has shape \(2, 3\), expected \(B, 3, H, W\)"):
        nn.BatchNorm2d(3)(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="BatchNorm1d: num_features is 0"):
        nn.BatchNorm1d(0)


def test_tuning_freezes_batch_norm_of_vectors() -> None:
    """One that went on learning statistics would undo what a frozen layer below it means."""
    net = nn.Sequential(nn.Linear(4, 3, rng=0), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2, rng=1))
    tune(net, "head")
    assert net[1].frozen
    net.train()(np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(net[1].running_mean, np.zeros(3))
