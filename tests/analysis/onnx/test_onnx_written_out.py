"""What a network writes out itself stays as it is, and what a file cannot tell is said beside the numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
from torch_truth import exported, kept  # noqa: E402

from analysis.reports.predict import predict  # noqa: E402

tnn = torch.nn


class GeluByPowers(tnn.Module):
    """As GPT-2 writes it."""

    def forward(self, x: Any) -> Any:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class GeluByErf(tnn.Module):
    def forward(self, x: Any) -> Any:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Scale(tnn.Module):
    """A factor for each channel, of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = tnn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Any) -> Any:
        return x * self.gamma


class Copied(tnn.Module):
    """A map that is kept in both orders of its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.linear = tnn.LayerNorm(8), tnn.Conv2d(8, 8, 1), tnn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return self.conv(x) + self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def net(*layers: Any) -> Any:
    """Layers on maps of 8 channels, between a convolution with dropout and a classifier."""
    return tnn.Sequential(
        tnn.Conv2d(3, 8, 3), *layers, tnn.Dropout(0.1), tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(8, 5)
    )


def report_of(made: Any, folder: Path, **options: Any) -> Any:
    return predict(exported(made, torch.randn(2, 3, 8, 8), folder / "net.onnx", **options), 2, tune="all").report


def trained_as_a_file_is(made: Any) -> Any:
    layers = (tnn.Linear, tnn.Conv2d)
    for part in made.modules():
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(isinstance(part, layers))
    return made


@pytest.mark.parametrize("gelu", [GeluByPowers, GeluByErf])
def test_gelu_in_steps_keeps_what_its_steps_keep(gelu: Callable[[], Any], tmp_path: Path) -> None:
    """Joined to PyTorch's one operation it would keep a quarter; constants of 4 bytes are less than 1 %."""
    made, x = net(gelu()), torch.randn(2, 3, 8, 8)
    found = report_of(made, tmp_path).totals["bp"].activation_bytes["pytorch"]
    assert kept(made, x) <= found <= 1.01 * kept(made, x)


def test_gelu_by_tanh_in_steps_is_marked(tmp_path: Path) -> None:
    """A network may compute the same steps in a function of its own, of which no file tells."""
    report = report_of(net(GeluByPowers()), tmp_path)
    assert report.file_only
    assert "GELU by tanh, in steps" in report.remark


def test_a_factor_of_no_layer_is_marked(tmp_path: Path) -> None:
    """It does not train here; where it does, PyTorch keeps what it multiplies."""
    made, x = net(Scale()), torch.randn(2, 3, 8, 8)
    report = report_of(made, tmp_path)
    everything = kept(made, x)
    found = report.totals["bp"].activation_bytes["pytorch"]
    assert found == kept(trained_as_a_file_is(made), x) < everything
    assert report.file_only
    assert "1 of the stored arrays belong to no layer" in report.remark


@pytest.mark.parametrize("made", [lambda: net(), lambda: net(tnn.GroupNorm(2, 8)), lambda: net(tnn.Hardswish())])
def test_what_a_file_tells_is_not_marked(made: Callable[[], Any], tmp_path: Path) -> None:
    """Scales of norms and PyTorch's own operations need no mark."""
    report = report_of(made(), tmp_path)
    assert not report.file_only
    assert "belong to no layer" not in report.remark


STEPS: dict[str, tuple[Callable[[], Any], str]] = {
    "LogSigmoid": (tnn.LogSigmoid, "Log of a Sigmoid"),
    "Hardshrink": (tnn.Hardshrink, "Where of a comparison"),
    "Softshrink": (tnn.Softshrink, "Where of a comparison"),
    "Softsign": (tnn.Softsign, "Abs"),
    "ReflectionPad2d": (lambda: tnn.ReflectionPad2d(1), "Pad (reflect)"),
    "abs": (lambda: Of(torch.abs), "Abs"),
    "amax": (lambda: Of(lambda x: x - x.amax((2, 3), True)), "ReduceMax"),
    "var": (lambda: Of(lambda x: x / (1 + x.var(1, keepdim=True))), "a variance"),
    "maximum": (lambda: Of(lambda x: torch.maximum(x, x.flip(1))), "Max"),
}


class Of(tnn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


@pytest.mark.parametrize("name", STEPS)
def test_one_operation_of_pytorch_in_several_steps_is_marked(name: str, tmp_path: Path) -> None:
    """What PyTorch has as one operation, and a file or this library in steps, may keep other tensors."""
    make, words = STEPS[name]
    report = report_of(net(make()), tmp_path)
    assert report.file_only
    assert words in report.remark


class Norm(tnn.Module):
    """A layer norm of width 6, of the last dimension, as one step or as a network's own steps."""

    def __init__(self, steps: bool) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Any) -> Any:
        if not self.steps:
            return tnn.functional.layer_norm(x, (6,))
        difference = x - x.mean(-1, keepdim=True)
        return difference / torch.sqrt(difference.pow(2).mean(-1, keepdim=True) + 1e-5)


BY_HAND = {
    "silu": (lambda x: x * torch.sigmoid(x), tnn.SiLU()),
    "hardswish": (lambda x: x * tnn.functional.hardsigmoid(x), tnn.Hardswish()),
    "hardswish of relu6": (lambda x: x * tnn.functional.relu6(x + 3) / 6, tnn.Hardswish()),
    "mish": (lambda x: x * torch.tanh(tnn.functional.softplus(x)), tnn.Mish()),
    "gelu": (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), tnn.GELU()),
    "layer norm": (Norm(steps=True), Norm(steps=False)),
    "relu": (lambda x: x.clamp(min=0), tnn.ReLU()),
    "1 / root": (lambda x: 1 / torch.sqrt(x * x + 1), Of(lambda x: torch.rsqrt(x * x + 1))),
}


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("name", BY_HAND)
def test_steps_of_a_networks_own_are_exact_or_marked(name: str, opset: int, tmp_path: Path) -> None:
    """One function of PyTorch, and the same written out: neither may be wrong by more than 1 % without a word."""
    for form in BY_HAND[name]:
        made, x = net(form if isinstance(form, tnn.Module) else Of(form)), torch.randn(2, 3, 8, 8)
        report = report_of(made, tmp_path, opset_version=opset)
        found = report.totals["bp"].activation_bytes["pytorch"]
        assert report.file_only or found == pytest.approx(kept(trained_as_a_file_is(made), x), rel=0.01)


@pytest.mark.parametrize("name", ["hardswish", "gelu", "layer norm", "relu"])
def test_one_function_of_pytorch_is_no_file_only(name: str, tmp_path: Path) -> None:
    """What the exporter writes as one operation stands there for what it is."""
    assert not report_of(net(BY_HAND[name][1]), tmp_path, opset_version=20).file_only


def test_a_gate_by_sigmoid_is_said_to_be_silu(tmp_path: Path) -> None:
    """A file does not tell nn.SiLU from x·sigmoid(x), which keeps both factors: it is counted as SiLU, and marked."""
    report = report_of(net(tnn.SiLU()), tmp_path)
    assert "x·sigmoid(x): taken for PyTorch's one operation" in report.remark
    assert report.file_only


NO_NORM = "no batch norm in this file"


def test_dropout_that_trains_says_nothing_of_norms_in_a_file_of_the_newer_exporter(tmp_path: Path) -> None:
    """That one folds norms even of a network that trains; of the older one such a dropout is proof that it did not."""
    import onnx

    file = exported(net(tnn.ReLU()), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    older = predict(file, 2, tune="all").report
    assert not older.file_only
    model = onnx.load(file)
    for node in model.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="[]")
    onnx.save(model, file)
    newer = predict(file, 2, tune="all").report
    assert newer.file_only
    assert NO_NORM in newer.remark
    assert "dropout" not in newer.remark
    assert newer.totals == older.totals


def test_a_training_export_of_the_newer_exporter_is_marked(tmp_path: Path) -> None:
    """MobileNetV2 exported so was 35 % low without a word."""
    pytest.importorskip("onnxscript")
    made = tnn.Sequential(tnn.Conv2d(3, 8, 3), tnn.BatchNorm2d(8), *net(tnn.ReLU())[1:]).train()
    file = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own: that the module trains
        torch.onnx.export(made, (torch.randn(2, 3, 8, 8),), file, dynamo=True, verbose=False)
    report = predict(file, 2, input_shape=(3, 8, 8), tune="all").report
    assert report.file_only
    assert NO_NORM in report.remark


class Statistics(tnn.Module):
    """Few places to a channel, so that its mean and deviation count."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm, self.out = tnn.Conv2d(3, channels, 3), tnn.BatchNorm2d(channels), tnn.Linear(channels, 5)

    def forward(self, x: Any) -> Any:
        return self.out(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(("batch", "marked"), [(2, True), (64, False)])
def test_statistics_of_the_batch_that_count_are_told(batch: int, marked: bool, tmp_path: Path) -> None:
    """A file exported as it trains takes those of the batch, of which PyTorch keeps two numbers a channel."""
    made, x = Statistics(16), torch.randn(batch, 3, 8, 8)
    report = predict(exported(made, x, tmp_path / "net.onnx"), batch, tune="all").report
    found = report.totals["bp"].activation_bytes["pytorch"]
    made.train()
    missing = kept(trained_as_a_file_is(made), x) - found
    assert missing == 2 * 16 * 4
    assert report.file_only is marked
    assert ("128 bytes more" in report.remark) is marked


def test_a_value_that_may_be_copied_is_marked(tmp_path: Path) -> None:
    """An export has no contiguous(), so that one of two copies is missing."""
    report = report_of(net(Copied()), tmp_path)
    assert report.file_only
    assert "contiguous()" in report.remark


@pytest.mark.parametrize("scaled", [True, False])
def test_queries_that_may_be_copied_are_marked(scaled: bool, tmp_path: Path) -> None:
    """Whisper scales its queries and copies them, so that attention's result lies otherwise; the export has no copy."""

    class Heads(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.out = tnn.Linear(8, 8), tnn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            tokens = x.flatten(2).transpose(1, 2)
            B, L, _ = tokens.shape
            q = self.query(tokens) * 0.5 if scaled else self.query(tokens)
            q = q.view(B, L, 4, 2).transpose(1, 2)
            q = q.contiguous() if scaled else q
            mixed = tnn.functional.scaled_dot_product_attention(q, q, q, scale=1.0 if scaled else None)
            return self.out(mixed.transpose(1, 2).reshape(B, L, 8)).transpose(1, 2).reshape(x.shape)

    report = report_of(net(Heads()), tmp_path)
    assert ("scaled before attention" in report.remark) is scaled
    assert report.file_only is scaled


class Normed(tnn.Module):
    """Tables of words and places, and two norms whose fresh weights are the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.query = tnn.Embedding(11, 8), tnn.LayerNorm(8), tnn.Linear(8, 8)
        self.second, self.out = tnn.LayerNorm(8), tnn.Linear(8, 5)
        tnn.init.zeros_(self.query.bias)

    def forward(self, ids: Any, mask: Any) -> Any:
        places = torch.cumsum(mask, dim=1) * mask
        chosen = torch.gather(places, 1, ids % 4)
        x = self.first(self.words(ids) + self.words(chosen))
        return self.out(self.second(self.query(x)).mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_integers_are_summed_and_chosen_and_equal_weights_are_not_one(training: bool, tmp_path: Path) -> None:
    """A plain export stores equal rows once: they stay parameters of their own modules, and FLOPs are PyTorch's."""
    made = Normed()
    file = str(tmp_path / "net.onnx")
    inputs = (torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64))
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            made.train(training), inputs, file, dynamo=False, training=mode, do_constant_folding=not training
        )
    prediction = predict(file, 2, tune="all", methods="bp")
    kept_by = {row.path: row.methods["bp"].activation_bytes["pytorch"] for row in prediction.report.rows}
    norms = [path for path in ("first", "second") if kept_by[path]]
    assert norms == ["second"]
    flops = prediction.report.totals["bp"].flops
    query, out = 2 * 2 * 6 * 64, 2 * 2 * 8 * 5
    assert (flops["forward"], flops["grad_weight"], flops["grad_input"]) == (query + out, query + out, out)


def test_scores_that_attention_computes_again_are_told(tmp_path: Path) -> None:
    """PyTorch's kernel for the CPU takes that many FLOPs more, 2·B·heads·L²·E."""

    class Mixed(tnn.Module):
        def forward(self, x: Any) -> Any:
            q = x.flatten(2).transpose(1, 2).reshape(x.shape[0], 36, 4, 2).transpose(1, 2)
            mixed = tnn.functional.scaled_dot_product_attention(q, q, q)
            return mixed.transpose(1, 2).reshape(x.shape[0], 36, 8).transpose(1, 2).reshape(x.shape)

    remark = report_of(net(Mixed()), tmp_path).remark
    assert f"{2 * 2 * 4 * 36 * 36 * 2:,} FLOPs that are not counted here" in remark


def model_of(nodes: list[Any], initializers: list[Any], shape: list[Any], folder: Path) -> str:
    """A file with input x of this shape and output y."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initializers,
    )  # fmt: skip
    file = str(folder / "net.onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), file)
    return file


def test_shape_arithmetic_that_doubles_is_followed_once(tmp_path: Path) -> None:
    """Sixty sums of a value with itself have 2⁶⁰ ways through them; what is behind each value is asked once."""
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Shape", ["x"], ["s0"]), helper.make_node("Cast", ["s0"], ["c0"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Mul", [f"c{i}", f"c{i}"], [f"c{i + 1}"]) for i in range(60)]
    nodes += [helper.make_node("ReduceMax", ["c60"], ["top"], keepdims=0), helper.make_node("Mul", ["x", "top"], ["z"])]
    nodes.append(helper.make_node("MatMul", ["z", "w"], ["y"]))
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [0.5] * 12)
    report = predict(model_of(nodes, [weight], [2, 4], tmp_path), 2, tune="all", methods="bp").report
    assert report.totals["bp"].flops["forward"] == 2 * 2 * 4 * 3


def test_masks_of_any_size_are_shapes_alone(tmp_path: Path) -> None:
    """A comparison of 2²⁸ elements makes no array of them."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["m"]),
        helper.make_node("Where", ["m", "x", "zero"], ["z"]),
        helper.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4096, 3], [0.5] * 3 * 4096)
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    file = model_of(nodes, [weight, zero], ["n", 4096], tmp_path)
    report = predict(file, 2**16, tune="all", methods="bp").report
    assert report.totals["bp"].flops["forward"] == 2 * 2**16 * 4096 * 3


def test_a_weight_that_is_filled_with_one_number_is_never_made(tmp_path: Path) -> None:
    """100 million of them, as the light files of ONNX's own tests have."""
    from onnx import TensorProto, helper

    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [25088, 4096])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    report = predict(model_of(nodes, [shape], [1, 25088], tmp_path), 1, tune="all", methods="bp").report
    assert report.totals["bp"].flops["forward"] == 2 * 25088 * 4096
