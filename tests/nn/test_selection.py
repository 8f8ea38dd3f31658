"""Which layers train: exactly those asked for, the head always, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from analysis.check import torch_replay
from analysis.rules import norms as norm_rules
from analysis.rules.account import account
from lance_ref import F, Tensor, calibrate, compress, count_macs, models, nn, record, tape, tune
from lance_ref.models import convnet, mlp, resnet18
from lance_ref.nn import init


class Net(nn.Module):
    """Two convolutions with batch norm, a custom parameter, layer norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, rng=0), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, rng=1), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 5, rng=2)
        self.head = nn.Linear(5, 2, rng=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x)).mean((2, 3))
        return self.head(F.relu(self.hidden(self.norm(x))))


def training(net: nn.Module) -> list[str]:
    return [name for name, parameter in net.named_parameters() if parameter.requires_grad]


def frozen(net: nn.Module) -> list[bool]:
    return [module.frozen for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


HEAD = ["head.weight", "head.bias"]
HIDDEN = ["hidden.weight", "hidden.bias"]
BODY = ["body.0.weight", "body.0.bias"]
STEM = ["stem.0.weight", "stem.0.bias"]

SELECTIONS: list[tuple[Any, tuple[str, ...], list[str]]] = [
    ("head", (), HEAD),
    ("last:1", ("hidden",), HIDDEN + HEAD),
    ("last:2", ("body.0", "hidden"), BODY + HIDDEN + HEAD),
    ("last:3", ("stem.0", "body.0", "hidden"), STEM + BODY + HIDDEN + HEAD),
    ("all", ("stem.0", "body.0", "hidden"), STEM + BODY + HIDDEN + HEAD),
    ("stem*", ("stem.0",), STEM + HEAD),
    (["hidden", "s*0"], ("stem.0", "hidden"), STEM + HIDDEN + HEAD),
    (["head"], (), HEAD),
    (("*",), ("stem.0", "body.0", "hidden"), STEM + BODY + HIDDEN + HEAD),
]


@pytest.mark.parametrize(("selection", "layers", "names"), SELECTIONS, ids=[str(case[0]) for case in SELECTIONS])
def test_selection_trains_exactly_these(selection: Any, layers: tuple[str, ...], names: list[str]) -> None:
    """A layer too many costs memory that is not predicted; one too few does not learn."""
    net = Net()
    tuning = tune(net, selection)
    assert (tuning.layers, tuning.head) == (layers, "head")
    assert tuning.trained == (*layers, "head")
    assert training(net) == names
    assert frozen(net) == [True, True]
    assert net.tuning is tuning
    assert tuning.selection == (tuple(selection) if isinstance(selection, list) else selection)


def test_tuning_can_be_repeated() -> None:
    """A second selection must not add to the first."""
    net = Net()
    tune(net, "all", train_batchnorm=True)
    assert frozen(net) == [False, False]
    tune(net, "head")
    assert training(net) == HEAD
    assert frozen(net) == [True, True]


def test_batchnorm_trains_only_from_the_first_selected_layer_on() -> None:
    """A trained batch norm below the first trained layer would put the whole net on the tape."""
    net = Net()
    tune(net, ["body.0"], train_batchnorm=True)
    assert frozen(net) == [True, False]
    assert training(net) == [*BODY, "body.1.weight", "body.1.bias", *HEAD]
    tune(net, "head", train_batchnorm=True)
    assert frozen(net) == [True, True]


def test_batchnorm_without_running_statistics_cannot_be_frozen() -> None:
    """Frozen it would have no statistics to use; its weight and bias must still not train."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, rng=0), nn.BatchNorm2d(2, track_running_stats=False), nn.Conv2d(2, 2, 1, rng=0)
    )
    tune(net, "head")
    assert frozen(net) == [False]
    assert training(net) == ["2.weight", "2.bias"]


def test_nothing_below_the_first_trained_layer_is_on_the_tape() -> None:
    """Entries of frozen layers below would be memory that selection promises to save."""
    net = Net()
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 5)).astype(np.float32)
    tune(net, "last:1")
    report = tape(net(x).sum())
    paths = {entry.path for entry in [*report.entries, *report.parameters]}
    assert "hidden" in paths
    assert not {path for path in paths if path.startswith(("stem", "body", "norm"))}
    tune(net, "all")
    assert any(entry.path.startswith("stem") for entry in tape(net(x).sum()).entries)


def test_only_selected_layers_get_gradients() -> None:
    """requires_grad must mean a gradient after backward, and its absence none."""
    net = Net()
    tune(net, "last:1")
    F.cross_entropy(net(np.ones((2, 3, 5, 5), np.float32)), np.array([0, 1])).backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == HIDDEN + HEAD


def test_last_counts_the_downsample_convolutions() -> None:
    """The published figures count ResNet's 1x1 shortcuts in module order."""
    with init.shapes_only():
        net = resnet18()
    assert tune(net, "last:4").layers == ("layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2")
    assert net.tuning.head == "fc"


def test_single_layer_is_the_head() -> None:
    """A net with one layer has nothing but its head to train."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, rng=0))
    for selection in ("head", "all", "*"):
        tuning = tune(net, selection)
        assert (tuning.layers, tuning.head) == ((), "1")
    with pytest.raises(ValueError, match="only convolution or linear layer of this net is its head"):
        tune(net, "last:1")


def test_shared_weight_trains_with_its_twin() -> None:
    """A layer that shares its weight with a selected one trains: it must be listed, not forgotten."""
    net = nn.Sequential(*(nn.Linear(3, 3, rng=i) for i in range(4)))
    net._modules["0"].weight = net._modules["2"].weight
    assert tune(net, ["2"]).layers == ("0", "2")


BAD = [
    ("last:4", r"selection is 'last:4', expected last:n with n from 1 to 3"),
    ("last:0", r"n from 1 to 3"),
    ("last:-1", r"n from 1 to 3"),
    ("last:two", r"n from 1 to 3"),
    ("last:", r"n from 1 to 3"),
    ("last:²", r"n from 1 to 3"),
    ("last:" + "9" * 5000, r"n from 1 to 3"),
    ("features.*", r"'features\.\*' matches no convolution or linear layer; .*stem\.0, body\.0, hidden, head"),
    ("hiden", r"the nearest are hidden"),
    ("stem", r"for those inside it write 'stem\.\*'"),
    (["hidden", "nothing*"], r"'nothing\*' matches no"),
    ([], r"selection is \[\]"),
    ("", r"selection is ''"),
    ([3], r"selection is \[3\]"),
]


@pytest.mark.parametrize(("selection", "message"), BAD, ids=[str(case[0])[:20] for case in BAD])
def test_bad_selection_is_refused_before_any_change(selection: Any, message: str) -> None:
    """A typing error must name what came and what is allowed, in one line, and leave the net as it was."""
    net = Net()
    tune(net, "last:1")
    before, tuning = training(net), net.tuning
    with pytest.raises(ValueError, match=message) as caught:
        tune(net, selection)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert (training(net), net.tuning) == (before, tuning)


def test_names_in_errors_are_bounded() -> None:
    """ResNet has 21 layers; the message must stay one readable line."""
    with init.shapes_only(), pytest.raises(ValueError, match=r"and 15 before them") as caught:
        tune(resnet18(), "zzz*")
    assert len(str(caught.value)) < 250


def test_nets_without_layers_are_refused() -> None:
    """There is nothing to tune, and no head."""
    with pytest.raises(ValueError, match="no convolution or linear layer to tune, it is a Sequential"):
        tune(nn.Sequential(nn.ReLU()), "all")
    with pytest.raises(TypeError, match="net is a str"):
        tune("mobilenetv2", "all")  # type: ignore[arg-type]


@pytest.mark.parametrize("container", [list, tuple, lambda layers: dict(enumerate(layers))])
def test_layers_in_a_plain_container_are_refused(container: Any) -> None:
    """They would keep their gradients whatever is chosen, and no optimiser would see them; registered ones may stand
    in a list as well, and frozen ones anywhere."""
    net = Net()
    net.layers = container([nn.Linear(4, 3, rng=0), nn.Linear(3, 2, bias=False, rng=1)])
    with pytest.raises(ValueError, match=r"^layers of the Net is a \w+ with 3 parameters \(3x4, 3, 2x3\)") as caught:
        tune(net, "all")
    assert "\n" not in str(caught.value)
    deeper = nn.Sequential(net, nn.Linear(2, 2, rng=0))
    with pytest.raises(ValueError, match=r"^0\.layers of the Sequential"):
        tune(deeper, "all")
    alone = nn.Module()
    alone.layers = net.layers
    with pytest.raises(ValueError, match=r"^layers of the Module"):
        tune(alone, "all")
    net.layers = container([net.hidden, nn.Linear(4, 3, rng=0).requires_grad_(False)])
    assert tune(net, "last:1").layers == ("hidden",)


def test_tuning_is_fixed() -> None:
    """A record of what was decided must not change afterwards."""
    tuning = tune(mlp(), "all")
    assert tuning.layers == ("features.0", "features.2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        tuning.head = None  # type: ignore[misc]


def test_convnet_in_module_order() -> None:
    """Module order is the order of registration, which is that of execution here."""
    assert tune(convnet(), "all").trained == ("conv1", "conv2", "conv3", "classifier")


# ---- biases alone (TinyTL) -------------------------------------------------------------------


def test_bias_trains_the_biases_of_the_selected_layers_and_the_whole_head() -> None:
    """A weight that trained as well would put activations on the tape."""
    net = Net()
    tuning = tune(net, "last:2", parameters="bias")
    assert training(net) == ["body.0.bias", "hidden.bias", *HEAD]
    assert (tuning.layers, tuning.head, tuning.parameters) == (("body.0", "hidden"), "head", "bias")
    assert frozen(net) == [True, True]
    tune(net, "*", parameters="bias")
    assert training(net) == ["stem.0.bias", "body.0.bias", "hidden.bias", *HEAD]
    assert tune(net, "head", parameters="bias").layers == ()
    assert training(net) == HEAD
    assert tune(net, "last:1").parameters == "all"
    assert training(net) == HIDDEN + HEAD


def test_bias_with_train_batchnorm_trains_their_biases_on_frozen_statistics() -> None:
    """Statistics of the batch would keep the activation that training biases alone is there to save."""
    net = Net()
    tune(net, ["body.0"], train_batchnorm=True, parameters="bias")
    assert training(net) == ["body.0.bias", "body.1.bias", *HEAD]
    assert frozen(net) == [True, True]


def test_a_layer_without_bias_trains_that_of_the_batch_norm_behind_it() -> None:
    """In TinyTL's nets the convolutions have no bias; what adds to their channels is batch norm's."""
    net = models.create("mobilenetv2", num_classes=5, rng=0)
    tuning = tune(net, "last:3", parameters="bias")
    assert tuning.layers == ("features.17.conv.1.0", "features.17.conv.2", "features.18.0")
    assert training(net) == [
        "features.17.conv.1.1.bias",
        "features.17.conv.3.bias",
        "features.18.1.bias",
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    tune(net, "all", parameters="bias")
    assert [n for n in training(net) if not n.endswith("bias")] == ["classifier.1.weight"]
    assert len(training(net)) == 52 + 2
    with init.shapes_only():
        residual = resnet18()
    tune(residual, "last:2", parameters="bias")  # bn2 stands behind conv2, not before the shortcut's convolution
    assert training(residual)[:2] == ["layer4.1.bn1.bias", "layer4.1.bn2.bias"]


def test_selected_layers_without_any_bias_are_refused_before_any_change() -> None:
    """A selected layer that could not train must not be passed over in silence."""
    layers = [nn.Conv2d(2, 2, 1, bias=False, rng=0), nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False, rng=1)]
    net = nn.Sequential(*layers, nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 3, 1, rng=2))
    tune(net, "all")
    before, tuning = training(net), net.tuning
    with pytest.raises(ValueError, match=r"layer '0' has no bias, nor has a BatchNorm2d behind it; nor have 1 others"):
        tune(net, "all", parameters="bias")
    with pytest.raises(ValueError, match="parameters is 'weight', expected one of all, bias"):
        tune(net, "all", parameters="weight")
    assert (training(net), net.tuning) == (before, tuning)
    assert tune(net, "head", parameters="bias").layers == ()


def test_a_shared_bias_lists_both_layers() -> None:
    """A layer that shares its bias with a selected one trains with it."""
    net = nn.Sequential(*(nn.Linear(3, 3, rng=i) for i in range(4)))
    net._modules["0"].bias = net._modules["2"].bias
    assert tune(net, ["2"], parameters="bias").layers == ("0", "2")


def bias_step(net: nn.Module, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Records, tape and counted multiply-adds of one step."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with count_macs() as counter:
        with record(net) as records:
            loss = F.cross_entropy(net(x), np.arange(shape[0]) % 5)
        report = tape(loss)
        loss.backward()
    return list(records), report, counter


BIAS_NETS = [
    ("convnet", (2, 3, 16, 16), "all", 3),
    ("mobilenetv2", (2, 3, 32, 32), "last:6", 6),
    ("mobilenetv2", (2, 3, 32, 32), "all", 52),
]


@pytest.mark.parametrize(("name", "shape", "selection", "count"), BIAS_NETS)
def test_bias_only_layers_keep_no_input_and_cost_what_is_predicted(
    name: str, shape: tuple[int, ...], selection: str, count: int
) -> None:
    """Convolutions with biases of their own, and with batch norm's: tape and multiply-adds, layer by layer."""
    net = models.create(name, num_classes=5, rng=0)
    tuning = tune(net, selection, parameters="bias")
    assert len(tuning.layers) == count
    records, report, counter = bias_step(net, shape)
    assert {entry.path for entry in report.entries if entry.op in ("conv2d", "linear")} == {tuning.head}
    bills = account(records, tuning.head)
    for layer in [*tuning.trained, ""]:
        own = [bill for bill in bills if bill.record.path == layer]
        assert sum(bill.tape_bytes for bill in own) == report.by_layer().get(layer, 0)
        for kind in ("forward", "grad_input", "grad_weight"):
            assert sum(getattr(bill.cost, f"{kind}_macs") for bill in own) == counter.by_layer(layer)[kind]
    assert sum(bill.tape_bytes for bill in bills) == report.total_bytes
    assert counter.by_kind()["grad_weight"] == counter.by_layer(tuning.head)["grad_weight"]
    trained = [p for p in net.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


def test_bias_only_gradients_are_those_of_full_training() -> None:
    """With batch norm frozen the biases' gradients do not depend on what else trains."""
    grads = []
    for parameters in ("all", "bias"):
        net = Net()
        tune(net, "all", parameters=parameters)
        F.cross_entropy(net(np.ones((2, 3, 5, 5), np.float32)), np.array([0, 1])).backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert set(grads[1]) == {"stem.0.bias", "body.0.bias", "hidden.bias", *HEAD}
    for name, grad in grads[1].items():
        np.testing.assert_array_equal(grad, grads[0][name])


def test_pytorch_keeps_the_inputs_of_bias_only_layers_all_the_same() -> None:
    """The rule against PyTorch's own hooks: training biases alone saves it next to nothing."""
    pytest.importorskip("torch")
    kept = {}
    for parameters in ("all", "bias"):
        net = models.create("mobilenetv2", num_classes=5, rng=0)
        tuning = tune(net, "last:4", parameters=parameters)
        records, _, _ = bias_step(net, (2, 3, 32, 32))
        bills = account(records, tuning.head)
        assert [bill.pytorch_bytes for bill in bills] == torch_replay.saved_bytes(records)
        kept[parameters] = sum(bill.pytorch_bytes for bill in bills)
    assert kept["bias"] > 0.8 * kept["all"]
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, rng=0), nn.Flatten(), nn.Linear(4 * 9, 5, rng=1))
    tune(conv, "all", parameters="bias")  # only the bias, and the input needs no gradient
    records, _, _ = bias_step(conv, (2, 3, 5, 5))
    assert [bill.pytorch_bytes for bill in account(records, "2")] == torch_replay.saved_bytes(records)


def test_planted_rule_that_keeps_the_input_for_a_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm rule that takes a trained bias for a trained weight."""
    net = models.create("mobilenetv2", num_classes=5, rng=0)
    tuning = tune(net, "last:2", parameters="bias")
    records, report, _ = bias_step(net, (2, 3, 32, 32))
    assert sum(bill.tape_bytes for bill in account(records, tuning.head)) == report.total_bytes
    monkeypatch.setattr(norm_rules, "_affine_needs", lambda call: (call.needs(2), call.needs(2)))
    assert sum(bill.tape_bytes for bill in account(records, tuning.head)) != report.total_bytes


def test_calibration_after_bias_only_tuning_says_that_there_is_nothing_to_compress() -> None:
    """A store on a layer whose weight does not train would never be used."""
    net = Net()
    x = np.random.default_rng(0).standard_normal((4, 3, 5, 5)).astype(np.float32)
    tune(net, "last:1")
    calibration = calibrate(net, [x])
    tune(net, "last:1", parameters="bias")
    with pytest.raises(ValueError, match="no weight of the tuned layers trains, only biases"):
        calibrate(net, [x])
    plain = tape(net(x).sum()).total_bytes
    assert compress(net, calibration) == ["hidden"]
    assert tape(net(x).sum()).total_bytes == plain
    tune(net, "last:2", parameters="bias")
    net.get_submodule("body.0").weight.requires_grad_()  # by hand: one layer trains whole after all
    assert list(calibrate(net, [x])) == ["body.0"]
