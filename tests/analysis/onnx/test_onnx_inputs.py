"""Files with several inputs and outputs, integers among them; what the loss is; and what a file cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import cost
from analysis.check.measure import compare
from analysis.commands.console import as_text
from analysis.onnx.net import OnnxNet
from analysis.reports.predict import predict
from analysis.reports.tables import drawn
from lance_ref import Tensor, no_grad

onnx = pytest.importorskip("onnx")
from onnx_files import FLOAT, array, helper, model, save, weight  # noqa: E402

INT64 = onnx.TensorProto.INT64


def encoder(batch: Any = "batch") -> Any:
    """Tokens and their mask to features of every token, and a score of the first."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Cast", ["mask"], ["m"], to=FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["w"]),
        helper.make_node("Mul", ["e", "w"], ["masked"]),
        helper.make_node("MatMul", ["masked", "a.weight"], ["h"]),
        helper.make_node("Relu", ["h"], ["features"]),
        helper.make_node("Gather", ["features", "zero"], ["first"], axis=1),
        helper.make_node("Gemm", ["first", "b.weight"], ["score"], transB=1),
    ]
    inputs = [helper.make_tensor_value_info(name, INT64, [batch, "length"]) for name in ("ids", "mask")]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("features", "score")]
    constants = [weight("table", 50, 6), weight("a.weight", 6, 8), weight("b.weight", 3, 8)]
    constants += [array("last", [-1]), array("zero", 0)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_tokens_and_a_mask_to_two_outputs(tmp_path: Path) -> None:
    """Numbers of ONNX's own evaluator for both outputs; a table of vectors keeps its indices alone."""
    from onnx.reference import ReferenceEvaluator

    file = save(tmp_path, encoder())
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 50, (4, 7)), rng.integers(0, 2, (4, 7))
    net = OnnxNet(file)
    with no_grad():
        found = net(ids, mask)
    expected = ReferenceEvaluator(onnx.load(file)).run(None, {"ids": ids, "mask": mask})
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.data, theirs, rtol=1e-5, atol=1e-6)
    with no_grad():
        np.testing.assert_array_equal(net(ids)[0].data, net(ids, np.ones_like(mask))[0].data)  # ones if not given
    with pytest.raises(ValueError, match=r"3 inputs are given, expected 2: 'ids', 'mask'"):
        net(ids, mask, mask)
    with pytest.raises(TypeError, match="input 'ids' has dtype float32, expected int64"):
        net(ids.astype(np.float32), mask)


def test_the_loss_of_two_outputs_is_their_sum(tmp_path: Path) -> None:
    """Both cost, a real step agrees, and the report says what the loss is."""
    file = save(tmp_path, encoder())
    prediction = predict(str(file), 4, input_shape=(7,), tune="all", methods=["bp"], with_weights=True)
    flops = prediction.report.totals["bp"].flops
    assert flops["forward"] == 2 * (4 * 7 * 6 * 8 + 4 * 8 * 3)
    assert [bill.record.op for bill in prediction.bills["bp"]][-3:] == ["sum", "sum", "add"]
    assert "the loss is the sum of all numbers of all outputs" in prediction.report.remark
    assert compare(prediction).agrees


@pytest.mark.parametrize("shape", [(2, 5), (5,), (2, 3, 4)])
def test_outputs_of_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Cross-entropy of (batch, classes), the sum of everything of any other."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Reshape", ["h", "shape"], ["y"])]
    constants = [weight("w", 4, int(np.prod(shape))), array("shape", (-1, *shape))]
    prediction = predict(str(save(tmp_path, model(nodes, constants))), 6, tune="all", methods=["bp"], with_weights=True)
    classes = len(shape) == 1
    assert prediction.bills["bp"][-1].record.op == ("cross_entropy" if classes else "sum")
    assert prediction.report.num_classes == (5 if classes else 0)
    assert ("the loss is the sum" in prediction.report.remark) is not classes
    assert compare(prediction).agrees


def test_an_open_size_that_no_input_tells_is_an_error(tmp_path: Path) -> None:
    """Not a guess."""
    content = encoder()
    content.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "other"
    with pytest.raises(ValueError, match="input 'mask' has open sizes"):
        OnnxNet(save(tmp_path, content))(Tensor(np.zeros((2, 3), np.int64)))


def test_an_input_that_nothing_reads_is_none(tmp_path: Path) -> None:
    """Exporters leave them there."""
    content = model([helper.make_node("Gemm", ["x", "w"], ["y"])], [weight("w", 4, 3)])
    content.graph.input.append(helper.make_tensor_value_info("z", FLOAT, ["batch", 9]))
    assert [value.name for value in OnnxNet(save(tmp_path, content)).graph.inputs] == ["x"]


# ---- what a file cannot tell ------------------------------------------------------------------

IMAGES = ("batch", 3, 8, 8)


def chain(*middle: Any, bias: bool = False, constants: Any = ()) -> Any:
    """A convolution, nodes from ``h`` to ``g``, the mean of each map, and a linear layer."""
    inputs = ["x", "a.weight", *["a.bias"] * bias]
    nodes = [
        helper.make_node("Conv", inputs, ["h"]),
        *middle,
        helper.make_node("GlobalAveragePool", ["g"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "b.weight"], ["y"], transB=1),
    ]
    stored = [weight("a.weight", 6, 3, 3, 3), weight("b.weight", 5, 6), *constants]
    return model(nodes, [*stored, *([weight("a.bias", 6)] if bias else [])], IMAGES)


RELU = [helper.make_node("Relu", ["h"], ["g"])]
NORMED = [
    helper.make_node("BatchNormalization", ["h", "s", "s", "s", "s"], ["n"]), helper.make_node("Relu", ["n"], ["g"])
]  # fmt: skip
TRAINING = [
    helper.make_node("BatchNormalization", ["h", "s", "s", "s", "s"], ["n", "mean", "var"], training_mode=1),
    helper.make_node("Relu", ["n"], ["g"]),
]
DROPPED = [helper.make_node("Relu", ["h"], ["d"]), helper.make_node("Dropout", ["d", "half", "yes"], ["g"])]
STATISTICS = (array("s", np.ones(6), np.float32),)
DROP = (array("half", 0.5, np.float32), array("yes", True, bool))

FILES: dict[str, tuple[Any, str]] = {
    "folded, with a bias": (chain(*RELU, bias=True), "no batch norm in this file"),
    "folded, its bias dropped": (chain(*RELU), "no batch norm in this file"),
    "a norm, not training": (chain(*NORMED, constants=STATISTICS), "no dropout in this file"),
    "training, with norm": (chain(*TRAINING, constants=STATISTICS), ""),
    "training, never a norm": (chain(*DROPPED, constants=DROP), ""),
    "linear": (
        model(
            [
                helper.make_node("Gemm", ["x", "a"], ["h"]),
                *RELU,
                helper.make_node("Gemm", ["g", "b"], ["y"]),
            ],
            [weight("a", 4, 6), weight("b", 6, 3)],
        ),
        "no batch norm in this file",
    ),
    "leaky": (
        chain(
            TRAINING[0], helper.make_node("LeakyRelu", ["n"], ["g"]), constants=STATISTICS
        ),
        "LeakyRelu: the file does not say whether in place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_cannot_tell_is_marked_in_the_totals(name: str, tmp_path: Path) -> None:
    """By what stands behind a layer, not by its bias; not where the file shows that it was exported as it trains."""
    content, words = FILES[name]
    report = cost(str(save(tmp_path, content)), batch=2, tune="all", methods=["bp"])
    text = " ".join(as_text(drawn(report, ("paper", "pytorch", "tape"))).split())
    assert ("pytorch (file)" in text) is bool(words)
    assert words in text
    assert report.file_only is bool(words)
    assert ("pytorch" in report.to_json()["notes"]) is bool(words)


def test_a_norm_beside_a_folded_one(tmp_path: Path) -> None:
    """One that could not be folded does not stand for those that were."""
    middle = [
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("BatchNormalization", ["r", "s", "s", "s", "s"], ["g"]),
    ]
    report = cost(str(save(tmp_path, chain(*middle, constants=STATISTICS))), batch=2, tune="all", methods=["bp"])
    assert "no batch norm behind one convolution of this file" in report.remark


def test_a_batch_norm_whose_scale_is_computed(tmp_path: Path) -> None:
    """Frozen statistics that nothing trains, and a scale that is made of a stored one."""
    from onnx.reference import ReferenceEvaluator

    middle = [
        helper.make_node("Exp", ["scale"], ["s"]),
        helper.make_node("BatchNormalization", ["h", "s", "shift", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["g"]),
    ]
    constants = [weight(name, 6, seed=i) for i, name in enumerate(("scale", "shift", "mean"))]
    constants.append(array("var", np.linspace(0.5, 2, 6), np.float32))
    file = save(tmp_path, chain(*middle, constants=constants))
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    with no_grad():
        found = OnnxNet(file)(x).data
    np.testing.assert_allclose(found, ReferenceEvaluator(onnx.load(file)).run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)
    prediction = predict(str(file), 2, tune="all", methods=["bp"], with_weights=True)
    assert "batch_norm" in {bill.record.op for bill in prediction.bills["bp"]}
    assert compare(prediction).agrees
