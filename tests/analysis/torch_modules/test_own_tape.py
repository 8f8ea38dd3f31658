"""What this library's tape keeps of the step of a PyTorch module: predicted, and measured in a real step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as TF  # noqa: E402
from torch_nets import MAPS, NETS, TOKENS, Attention, Checkpointed, Tied, between, plain, summed  # noqa: E402
from torch_twins import one_thread  # noqa: E402

import analysis  # noqa: E402
import lance_ref  # noqa: E402
from analysis.check.torch_measure import compare_module  # noqa: E402
from analysis.reports.predict import predict_torch  # noqa: E402
from analysis.rules.loss import loss_of  # noqa: E402
from analysis.steps.methods import METHODS  # noqa: E402
from analysis.torch_modules.inputs import Asked, read_specs  # noqa: E402
from analysis.torch_modules.methods import INSTEAD  # noqa: E402
from analysis.torch_modules.own_tape import RealStep, real_step, with_tape  # noqa: E402
from analysis.torch_modules.run import Run, watched_step  # noqa: E402
from analysis.torch_modules.step import TorchStep  # noqa: E402
from lance_ref.engine.tensor import Tensor  # noqa: E402

WITHOUT = {"1-d", "checkpoint", "reentrant checkpoint", "bag"}
"""Networks of the list of which there is no tape."""
RANDOM = {"dropout", "attention with dropout", "encoder"}
"""Those that draw random numbers, each library its own."""


def squared(output: Any) -> Any:
    """A loss whose gradient is another one for every number."""
    outputs = [output] if isinstance(output, torch.Tensor) else [output[0], *output[1]]
    return sum((each.pow(2).sum() for each in outputs[1:]), outputs[0].pow(2).sum())


def how_for(spec: Any, batch: int = 2, **options: Any) -> Run:
    return Run(Asked.of(batch, read_specs(spec, None), None, batch), **options)


def predicted(module: Any, how: Run) -> TorchStep:
    return with_tape(watched_step(module, "net", how), module, "net", how)


def check_equal(module: Any, how: Run, numbers: bool = True) -> RealStep:
    """The predicted tape is the measured one, module by module, and loss and gradients are PyTorch's."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = predicted(module, how)
        assert step.tape is not None, step.no_tape
        real = real_step(module, "net", how)
        ours = {path: n for path, n in step.bytes_by_path(tape=True).items() if n}
        assert ours == {path: n for path, n in lance_ref.tape(real.loss).by_layer().items() if n}
        if numbers:
            # PyTorch's hard sigmoid multiplies by a sixth in single precision
            np.testing.assert_allclose(real.loss.data, real.torch_loss.detach().numpy(), rtol=1e-6, atol=1e-12)
            real.loss.backward()
            real.torch_loss.backward()
            for path, (mine, theirs) in real.parameters.items():
                assert (mine.grad is None) == (theirs.grad is None), path
                if mine.grad is not None:
                    np.testing.assert_allclose(mine.grad, theirs.grad.numpy(), 1e-6, 1e-7, err_msg=path)
    return real


@pytest.mark.parametrize("name", [name for name in NETS if name not in WITHOUT])
def test_the_tape_of_a_real_step_is_the_predicted_one(name: str) -> None:
    """Layers, functions, in-place operations, tied weights, recurrent layers: bytes, loss and gradients."""
    make, spec = NETS[name]
    check_equal(make().double(), how_for(spec, loss=squared), numbers=name not in RANDOM)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_where_there_is_no_tape_the_reason_is_told(name: str) -> None:
    """The other columns stand."""
    make, spec = NETS[name]
    module = make()
    report = analysis.cost(module, batch=2, input_shape=spec, loss=summed, method="bp")
    assert set(report.totals["bp"].activation_bytes) == {"paper", "pytorch"}
    assert report.no_tape
    assert report.to_json()["notes"]["tape"] == f"none: {report.no_tape}"


def test_a_tape_by_hand() -> None:
    """2 images of 7: input, one bit for each of ReLU's 12 results, the second layer's input, and the loss."""
    step = predicted(nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)), how_for((7,)))
    assert step.bytes_by_path(tape=True) == {"0": 4 * 2 * 7, "1": 2, "2": 4 * 2 * 6, "(loss)": 4 * 2 * 4 + 2}
    assert step.bytes_by_path({"0", "2"}, tape=True) == {"1": 2, "(loss)": 34}


def test_what_does_not_train_keeps_less() -> None:
    """Frozen by name and by requires_grad, below the first layer that trains and above it."""
    net = between(nn.BatchNorm2d(4), nn.ReLU()).double()
    for freeze in (("0.*",), ("1.*",), ("*weight",), ("0.*", "1.*")):
        check_equal(net, how_for(MAPS, loss=summed, freeze=freeze))
    net[3].requires_grad_(False)
    check_equal(net, how_for(MAPS, loss=summed))
    check_equal(net, how_for(MAPS, loss=summed, tune="head"))
    net[3].requires_grad_(True)
    whole, part = (predicted(net, how_for(MAPS, loss=summed, freeze=freeze)) for freeze in ((), ("0.*", "1.*")))
    assert sum(part.bytes_by_path(tape=True).values()) < sum(whole.bytes_by_path(tape=True).values())


def test_the_mode_of_norms_and_dropout_is_the_modules_own() -> None:
    """Frozen statistics keep the scale alone; dropout in evaluation keeps nothing."""
    net = between(nn.BatchNorm2d(4), nn.Dropout(0.5)).double().eval()
    check_equal(net, how_for(MAPS, loss=summed))
    frozen = predicted(net, how_for(MAPS, loss=summed, freeze=("1.*",))).bytes_by_path(tape=True)
    assert frozen["1"] == 8 * 4
    assert "2" not in frozen
    assert predicted(net.train(), how_for(MAPS, loss=summed)).bytes_by_path(tape=True)["2"] == -(-2 * 4 * 81 // 8)


@pytest.mark.parametrize("needed", [True, False])
def test_inputs_may_need_a_gradient(needed: bool) -> None:
    """A weight that does not train is needed for the gradient of the input, and what lies between is kept."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    net[0].requires_grad_(False)
    x = torch.rand(2, 5, dtype=torch.float64, requires_grad=needed)
    how = Run(Asked.of(None, (), x, 2), summed)
    check_equal(net, how)
    first = "1" if needed else "2"  # tanh keeps its result for the input's gradient, which is the last layer's input
    assert predicted(net, how).bytes_by_path(tape=True) == {first: 8 * 2 * 4}


class Both(nn.Module):
    """Keeps its input, and the same numbers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(())), nn.Linear(12, 3)

    def forward(self, x: Any) -> Any:
        return self.head(x.flatten(1)) + (x * self.scale).sum()


def test_an_example_lies_as_it_likes() -> None:
    """An input whose axes lie in another order is packed before it is used: its row is a look at the same memory."""
    x = torch.rand(2, 3, 4, dtype=torch.float64).transpose(1, 2)
    how = Run(Asked.of(None, (), x, 2), squared)
    check_equal(Both().double(), how)
    assert predicted(Both().double(), how).bytes_by_path(tape=True)["head"] == 8 * 2 * 12


def test_tied_weights_are_parameters_once() -> None:
    """The table is no activation of the last layer."""
    step = predicted(Tied(), how_for("7:int64", loss=summed))
    assert step.bytes_by_path(tape=True) == {"table": 2 * 7, "head": 4 * 2 * 7 * 6}


# ---- what has no tape ------------------------------------------------------------------------


class Applied(nn.Module):
    """A linear layer, and a function behind it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6), function

    def forward(self, x: Any) -> Any:
        return self.function(self.layer(x))


class Twice(torch.autograd.Function):
    """Of a user."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return 2 * grad


def through_a_view(x: Any) -> Any:
    y = x * 2
    y[0].add_(1)
    return y * y


def by_index(x: Any) -> Any:
    y = x * 2
    y[:, 0] = 1
    return y


def replaced(x: Any) -> Any:
    y = torch.ones(2, 6)
    y.data = torch.zeros(2, 6)
    return x * y


@torch.library.custom_op("own_tape::linear", mutates_args=())
def linear_of_a_user(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


linear_of_a_user.register_fake(torch.empty_like)
linear_of_a_user.register_autograd(lambda ctx, grad: 3 * grad)


def half_of_it(x: Any) -> Any:
    return x.bfloat16().float()


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (
            lambda: Applied(lambda x: x.cumsum(1)),
            {},
            "cumsum has no counterpart among this library's operations (in the module itself)",
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 6), nn.LogSigmoid()),
            {},
            "log_sigmoid has no counterpart among this library's operations (in 1)",
        ),
        (lambda: Applied(Twice.apply), {}, "comes from no function of PyTorch"),
        (lambda: Applied(through_a_view), {}, "written into through another one"),
        (lambda: Applied(by_index), {}, "setitem has no counterpart"),
        (lambda: Applied(replaced), {}, ".data of a tensor is set"),
        (lambda: Applied(lambda x: x.double()), {}, "double gives (2, 6) float64 with a gradient, and its counterpart"),
        (lambda: Applied(lambda x: x.detach() * x), {}, "a constant looks at memory"),
        (lambda: Applied(torch.ops.own_tape.linear), {}, "own_tape.linear has no counterpart"),
        (lambda: Applied(half_of_it), {}, "bfloat16 has no counterpart"),
        (lambda: Applied(lambda x: x * x.detach().double().sum()), {}, "mul: mul: inputs have"),
        (lambda: nn.Linear(6, 6).bfloat16(), {}, "dtype bfloat16, expected float32 or float64"),
        (lambda: nn.Linear(6, 6), {"autocast": "bfloat16"}, "torch.autocast computes in bfloat16"),
        (lambda: Applied(lambda x: TF.interpolate(x[None], 4, mode="area")), {}, "mode is 'area'"),
        (
            lambda: nn.Sequential(nn.Linear(6, 8), Checkpointed(False)),
            {},
            "as torch.utils.checkpoint sets them (in 1.body.0)",
        ),
    ],
)
def test_a_wrong_number_is_never_printed(make: Any, options: dict[str, Any], words: str) -> None:
    """Each of these would be some bytes off, or wrong without a word."""
    step = predicted(make(), how_for((6,), loss=summed, **options))
    assert step.tape is None
    assert words in step.no_tape
    assert step.kept


def test_every_operation_that_is_missing_is_named() -> None:
    """What stands behind the first is looked at too, and one operation is told once."""
    none = "has no counterpart among this library's operations"
    layers = [nn.Linear(6, 6), *(nn.LogSigmoid() for _ in range(5)), nn.Hardshrink()]
    step = predicted(nn.Sequential(*layers), how_for((6,), loss=summed))
    assert step.no_tape == f"log_sigmoid {none} (in 1 and 4 more); hardshrink {none} (in 6)"
    others = [nn.Softsign(), nn.SELU(), nn.CELU()]
    step = predicted(nn.Sequential(*layers, *others), how_for((6,), loss=summed))
    assert step.no_tape.endswith("; and 1 more")


def test_a_constant_that_is_written_into_is_another_one() -> None:
    """A mask that is drawn and scaled in place, as networks drop whole samples."""

    def dropped(x: Any) -> Any:
        mask = x.new_empty((x.shape[0], 1)).bernoulli_(0.5)
        mask.div_(0.5)
        return x * mask

    check_equal(Applied(dropped).double(), how_for((6,), loss=summed))


# ---- methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["groups", "on maps", "attention", "tokens", "twice"])
def test_methods_keep_what_is_predicted(name: str) -> None:
    """Cores, codes and sums in the place of the inputs of convolutions, linear layers, and those on maps."""
    layer = nn.Linear(16, 16)
    twice = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(16, 4))
    nets = {
        **NETS,
        "twice": (lambda: twice, TOKENS),
        "tokens": (lambda: nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)), TOKENS),
    }
    make, spec = nets[name]
    methods = [method for method in METHODS if method not in INSTEAD]
    prediction = predict_torch(make(), name, 4, input_shape=spec, methods=methods, ranks="0.5", loss=summed)
    kept = {method: total.activation_bytes["tape"] for method, total in prediction.report.totals.items()}
    with one_thread():
        comparison = compare_module(prediction)
    assert comparison.agrees, str(comparison)
    assert {line.method for line in comparison.lines if line.what == "tape bytes"} == set(methods)
    if name in ("groups", "tokens"):
        assert kept["lance"] < kept["bp"]


# ---- conversion ------------------------------------------------------------------------------


def converted_tape(module: Any, x: Any) -> int:
    """Of a step of the converted network."""
    net = lance_ref.from_torch(module)
    loss = loss_of(net(Tensor(x.numpy())), Tensor(np.zeros(len(x), np.int64)))
    return lance_ref.tape(loss).total_bytes


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_network_keeps_the_same(training: bool) -> None:
    """`from_torch` and the translation run the same operations."""
    nets = [
        (plain(), (3, 16, 16)), (between(nn.Hardswish(), nn.MaxPool2d(2), nn.BatchNorm2d(4)), MAPS),
        (Attention(), TOKENS), (Attention(causal=True), TOKENS),
    ]  # fmt: skip
    for module, shape in nets:
        module.train(training)
        step = predicted(module, how_for(shape))
        assert step.tape is not None
        assert sum(each.nbytes for each in step.tape) == converted_tape(copy.deepcopy(module), torch.rand(2, *shape))


VISION = {
    "torchvision.models": (
        "resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet0_5",
        "alexnet", "regnet_x_400mf", "densenet121",
    ),
    "timm": ("resnetv2_50", "mobilenetv3_small_050", "tinynet_e", "repvgg_a0"),
}  # fmt: skip


@pytest.mark.parametrize(("package", "name"), [(package, name) for package, names in VISION.items() for name in names])
def test_published_networks_keep_the_same_converted(package: str, name: str) -> None:
    """The printed tape is that of a real step of `from_torch(module)`."""
    from experiments.corpus.networks import define_operations_without_kernels

    define_operations_without_kernels()
    pytest.importorskip(package.partition(".")[0])
    if package == "timm":
        import timm

        module = timm.create_model(name, num_classes=10)
    else:
        import torchvision

        module = getattr(torchvision.models, name)(num_classes=10)
    with one_thread():
        step = predicted(module.train(), how_for((3, 64, 64)))
        assert step.tape is not None, step.no_tape
        assert sum(each.nbytes for each in step.tape) == converted_tape(module, torch.rand(2, 3, 64, 64))
