"""Weights of ONNX files that are used in several ways: one parameter, one gradient, and none left frozen in silence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import cost
from analysis.check.measure import compare
from analysis.cost_model import predict
from analysis.onnx.file import Node
from analysis.onnx.host import HOST, MAX_ELEMENTS
from analysis.onnx.layers import Weight
from analysis.onnx.net import OnnxNet
from analysis.onnx.ops import TENSOR_OPS
from analysis.onnx.windows import padding_of
from lance_ref import Tensor, no_grad, trace, tune
from lance_ref.nn.tracing import record

onnx = pytest.importorskip("onnx")

from onnx_files import array, helper, model, save, weight  # noqa: E402

ROWS = ("batch", 16)


def tied(*middle: Any, second: Any = None) -> list[Any]:
    """x W, ReLU, then the same weight the other way round, then a head."""
    second = second or helper.make_node("Gemm", ["r", "w"], ["h"], transB=1)
    return [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        *middle,
        second,
        helper.make_node("Gemm", ["h", "v"], ["y"]),
    ]


TURNED = {
    "by an option": tied(),
    "by a node": tied(
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]), second=helper.make_node("MatMul", ["r", "t"], ["h"])
    ),
    "by two nodes and an option": tied(
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("Transpose", ["t"], ["u"]),
        second=helper.make_node("Gemm", ["r", "u"], ["h"], transB=1),
    ),
    "by shapes": tied(
        helper.make_node("Reshape", ["w", "s"], ["t"]),
        helper.make_node("Transpose", ["t"], ["u"], perm=[2, 1, 0]),
        helper.make_node("Squeeze", ["u", "one"], ["q"]),
        second=helper.make_node("MatMul", ["r", "q"], ["h"]),
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_weight_and_its_transpose_are_one_parameter(tmp_path: Path, name: str) -> None:
    """Two parameters (576 numbers for 320), each with a part of the gradient."""
    constants = [weight("w", 16, 16), weight("v", 16, 4, seed=1), array("s", [1, 16, 16]), array("one", [2])]
    file = save(tmp_path, model(TURNED[name], constants, ROWS))
    net = OnnxNet(file).to(np.float64)
    assert sum(p.size for p in net.parameters()) == 320
    tune(net, "all")
    x = np.random.default_rng(2).standard_normal((3, 16))
    w, v = (np.float64(onnx.numpy_helper.to_array(c)) for c in constants[:2])
    y = net(Tensor(x))
    np.testing.assert_allclose(y.data, np.maximum(x @ w, 0) @ w.T @ v)
    y.sum().backward()
    g = np.ones((3, 4)) @ v.T  # of h
    hidden = np.maximum(x @ w, 0)
    by_hand = x.T @ ((g @ w) * (hidden > 0)) + g.T @ hidden
    (shared,) = (p for p in net.parameters() if p.size == 256)
    assert shared.grad is not None
    np.testing.assert_allclose(shared.grad, by_hand.T)  # the parameter has the shape of the first layer's
    report = cost(str(file), batch=3, tune="all", method="bp")
    assert report.to_json()["totals"]["bp"]["parameters"] == 320
    assert sum(row.parameters for row in report.rows) == 320
    assert report.totals["bp"].flops["grad_weight"] == 2 * 3 * (256 + 256 + 64)
    assert compare(predict(str(file), 3, tune="all", methods=["bp", "lance"], ranks="0.5", with_weights=True)).agrees


def test_factors_of_a_weight_in_both_directions_are_one_set(tmp_path: Path) -> None:
    """LANCE and LoRA of the layer; its transpose is computed from the layer's weight."""
    file = save(tmp_path, model(tied(), [weight("w", 16, 16), weight("v", 16, 4)], ROWS))
    report = cost(str(file), batch=4, tune="all", method=["bp", "lance"], ranks="0.5")
    assert report.totals["lance"].subspace_bytes == 4 * (4 * 2 + 16 * 8)


def test_a_layer_that_shares_its_weight_with_an_earlier_operation_is_a_layer(tmp_path: Path) -> None:
    """The addition reads the weight first; the product behind it must train all the same."""
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    net = OnnxNet(save(tmp_path, model(nodes, [weight("w", 4, 4)], (4, 4))))
    records = trace(net, (4, 4))
    assert [r.op for r in records] == ["permute", "add", "linear"]
    assert len(list(net.parameters())) == 1


GEMMS: dict[str, tuple[dict[str, Any], list[str], list[Any]]] = {
    "alpha": ({"alpha": 0.5}, ["x", "w"], [weight("w", 6, 4)]),
    "alpha and a bias": ({"alpha": 0.5}, ["x", "w", "b"], [weight("w", 6, 4), weight("b", 4, seed=1)]),
    "beta": ({"beta": 3.0, "transB": 1}, ["x", "w", "b"], [weight("w", 4, 6), weight("b", 1, 4, seed=1)]),
    "beta of a number": ({"beta": 3.0}, ["x", "w", "b"], [weight("w", 6, 4), array("b", [2.0], np.float32)]),
    "a bias for each row": ({"beta": 0.5}, ["x", "w", "b"], [weight("w", 6, 4), weight("b", 6, 1, seed=1)]),
    "a matrix beside": ({}, ["x", "w", "b"], [weight("w", 6, 4), weight("b", 6, 4, seed=1)]),
    "x turned": ({"transA": 1}, ["x", "w"], [weight("w", 6, 4)]),
    "weight first": ({"alpha": 2.0}, ["w", "x"], [weight("w", 4, 6)]),
    "weight first, both turned": (
        {"transA": 1, "transB": 1, "beta": 2.0},
        ["w", "x", "b"],
        [weight("w", 6, 4), weight("b", 4, 1, seed=1)],
    ),
    "weight first, a row beside": ({"beta": 2.0}, ["w", "x", "b"], [weight("w", 4, 6), weight("b", 6, seed=1)]),
}


@pytest.mark.parametrize("name", GEMMS)
def test_every_gemm_with_a_stored_matrix_is_a_layer(tmp_path: Path, name: str) -> None:
    """Options that make it another operation left its weight frozen; numbers are those of ONNX's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    options, inputs, constants = GEMMS[name]
    content = model([helper.make_node("Gemm", inputs, ["y"], **options)], constants, (6, 6))
    net = OnnxNet(save(tmp_path, content))
    x = np.random.default_rng(1).standard_normal((6, 6)).astype(np.float32)
    with no_grad():
        np.testing.assert_allclose(
            net(x).data, ReferenceEvaluator(content).run(None, {"x": x})[0], rtol=1e-5, atol=1e-5
        )
    assert tune(net, "all").head == next(path for path, _ in net.named_modules() if path)
    linear = [r for r in trace(net, (6, 6)) if r.op == "linear"]
    assert [r.inputs[1].requires_grad for r in linear] == [True]


LEFT = [helper.make_node("MatMul", ["w", "x"], ["a"]), helper.make_node("Add", ["a", "b"], ["y"])]


def test_a_product_with_the_weight_on_the_left_is_a_layer(tmp_path: Path) -> None:
    """W x + b: with its bias, trained, and its bytes those that run."""
    from onnx.reference import ReferenceEvaluator

    nodes = [
        *LEFT[:1],
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("ReduceMean", ["c"], ["y"], axes=[2]),
    ]
    nodes[-1] = helper.make_node("ReduceMean", ["c"], ["y"], axes=[2], keepdims=0)
    content = model(nodes, [weight("w", 5, 4), weight("b", 5, 1, seed=1)], ("batch", 4, 7))
    file = save(tmp_path, content)
    net = OnnxNet(file)
    x = np.random.default_rng(1).standard_normal((3, 4, 7)).astype(np.float32)
    with no_grad():
        np.testing.assert_allclose(
            net(x).data, ReferenceEvaluator(content).run(None, {"x": x})[0], rtol=1e-5, atol=1e-5
        )
    tune(net, "all")
    assert [p.requires_grad for p in net.parameters()] == [True, True]
    step = predict(str(file), 3, tune="all", methods=["bp"], with_weights=True)
    assert step.report.totals["bp"].flops["grad_weight"] == 2 * 3 * 5 * 4 * 7
    assert compare(step).agrees


def test_stored_weights_that_are_no_layers_are_named(tmp_path: Path) -> None:
    """A matrix for each head: `all` would leave it frozen; layers by name train as ever."""
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Flatten", ["b"], ["f"]),
        helper.make_node("Gemm", ["f", "v"], ["y"]),
    ]
    constants = [array("s", [-1, 2, 1, 8]), weight("w", 2, 8, 3), weight("v", 6, 4)]
    file = str(save(tmp_path, model(nodes, constants, ROWS)))
    with pytest.raises(ValueError, match=r"'matmul' multiplies with a stored weight of shape \(2, 8, 3\)"):
        cost(file, batch=2, tune="all", method="bp")
    assert cost(file, batch=2, tune="head", method="bp").totals["bp"].flops["grad_weight"] == 2 * 2 * 6 * 4


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    """No node makes it."""
    content = model([helper.make_node("Gemm", ["x", "w"], ["y"])], [weight("w", 16, 4)], ROWS)
    content.graph.output.append(helper.make_tensor_value_info("x", 1, None))
    with pytest.raises(ValueError, match="has no node that makes its output 'x'"):
        OnnxNet(save(tmp_path, content))


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum"])
@pytest.mark.parametrize("given", ["left out", "empty", "as numbers"])
@pytest.mark.parametrize("noop", [0, 1])
@pytest.mark.parametrize("keepdims", [0, 1, None])
def test_a_reduction_over_no_axes(tmp_path: Path, op: str, given: str, noop: int, keepdims: int | None) -> None:
    """Without axes all of them, unless the node says that this means none; dimensions are kept unless it says not."""
    constants = {"left out": [], "empty": [array("e", [])], "as numbers": [array("e", [-1])]}[given]
    inputs = ["x", *(["e"] if constants else [])]
    content = model(
        [helper.make_node(op, inputs, ["y"], noop_with_empty_axes=noop, keepdims=keepdims)], constants, (2, 3), 18
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    function = {"ReduceMean": np.mean, "ReduceSum": np.sum}[op]
    axes = (1,) if given == "as numbers" else None
    expected = x if noop and axes is None else function(x, axis=axes, keepdims=keepdims != 0)
    with no_grad():
        np.testing.assert_allclose(OnnxNet(save(tmp_path, content))(x).data, expected)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceProd"])
@pytest.mark.parametrize(("noop", "target"), [(0, [6]), (1, [2, 3])])
def test_a_reduction_of_a_shape_over_no_axes(tmp_path: Path, op: str, noop: int, target: list[int]) -> None:
    """The same rule for numbers that are computed with beforehand."""
    pieces = {"ReduceSum": [1, 5], "ReduceProd": [2, 3]}[op]
    pieces = pieces if not noop else [2, 3]
    nodes = [
        helper.make_node(op, ["p", "e"], ["t"], noop_with_empty_axes=noop, keepdims=1),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    content = model(nodes, [array("p", pieces), array("e", [])], (6,), 18)
    x = np.arange(6, dtype=np.float32)
    assert OnnxNet(save(tmp_path, content))(x).shape == tuple(target)


HEAD = [helper.make_node("Gemm", ["x", "v"], ["s"])]
ENDS: dict[str, tuple[list[Any], int, bool]] = {
    "Softmax": ([helper.make_node("Softmax", ["s"], ["y"])], 17, True),
    "LogSoftmax": ([helper.make_node("LogSoftmax", ["s"], ["y"], axis=1)], 17, True),
    "older Softmax": ([helper.make_node("Softmax", ["s"], ["y"])], 9, True),
    "Log": ([helper.make_node("Softmax", ["s"], ["p"]), helper.make_node("Log", ["p"], ["y"])], 17, True),
    "looks": (
        [
            helper.make_node("Reshape", ["s", "four"], ["i"]),
            helper.make_node("Softmax", ["i"], ["p"], axis=1),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Identity", ["f"], ["y"]),
        ],
        17,
        True,
    ),
    "not over the classes": (
        [
            helper.make_node("Reshape", ["s", "pairs"], ["i"]),
            helper.make_node("Softmax", ["i"], ["p"], axis=2),
            helper.make_node("Flatten", ["p"], ["y"]),
        ],
        17,
        False,
    ),
    "over the batch": ([helper.make_node("Softmax", ["s"], ["y"], axis=0)], 17, False),
    "read twice": (
        [helper.make_node("Softmax", ["s"], ["p"]), helper.make_node("Add", ["p", "p"], ["y"])], 17, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_softmax_before_the_loss_is_left_out(tmp_path: Path, name: str) -> None:
    """Cross-entropy has its own; what is left out is said, and an evaluation gives what the file says."""
    from onnx.reference import ReferenceEvaluator

    nodes, opset, left_out = ENDS[name]
    constants = [weight("v", 16, 4), array("four", [-1, 4, 1, 1]), array("pairs", [-1, 2, 2])]
    content = model([*HEAD, *nodes], constants, ROWS, opset)
    file = save(tmp_path, content)
    prediction = predict(str(file), batch=5, tune="all", methods="bp")
    report, ops = prediction.report, [bill.record.op for bill in prediction.bills["bp"]]
    assert ("softmax" in ops or "log_softmax" in ops) is not left_out
    assert ("at the end of this file is left out" in report.remark) is left_out
    assert ("at the end" in report.to_json()["notes"]["net"]) is left_out
    if left_out:
        plain = save(tmp_path, model([helper.make_node("Gemm", ["x", "v"], ["y"])], constants, ROWS), "plain.onnx")
        without = cost(str(plain), batch=5, tune="all", method="bp").totals["bp"]
        assert report.totals["bp"].activation_bytes == without.activation_bytes
        assert report.totals["bp"].elementwise == without.elementwise
        assert compare(predict(str(file), 5, tune="all", methods=["bp"], with_weights=True)).agrees
    x = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
    with no_grad():
        expected = ReferenceEvaluator(content).run(None, {"x": x})[0]
        np.testing.assert_allclose(OnnxNet(file).eval()(x).data, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("axis", "opset", "left_out"), [(0, 17, False), (1, 12, True), (1, 13, False), (2, 12, False)])
def test_whether_a_softmax_is_over_the_scores_of_one_input(
    tmp_path: Path, axis: int, opset: int, left_out: bool
) -> None:
    """(4, 2, 2): 4 inputs with 4 scores each are not told apart by their number alone."""
    nodes = [
        *HEAD,
        helper.make_node("Reshape", ["s", "pairs"], ["i"]),
        helper.make_node("Softmax", ["i"], ["p"], axis=axis),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    file = save(tmp_path, model(nodes, [weight("v", 16, 4), array("pairs", [-1, 2, 2])], ROWS, opset))
    ops = [bill.record.op for bill in predict(str(file), batch=4, tune="all", methods="bp").bills["bp"]]
    assert ("softmax" in ops) is not left_out


def test_softmax_before_operator_set_13_is_over_all_that_follows(tmp_path: Path) -> None:
    """(2, 3, 4) with axis 1: over 12 numbers; since then over 3. Without an axis it was 1, and is now the last."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    for given, opset, axes in ((1, 12, (1, 2)), (1, 13, (1,)), (None, 12, (1, 2)), (None, 13, (2,))):
        node = helper.make_node("Softmax", ["x"], ["y"], axis=given)
        net = OnnxNet(save(tmp_path, model([node], [], (2, 3, 4), opset)))
        powers = np.exp(x)
        with no_grad():
            np.testing.assert_allclose(net.eval()(x).data, powers / powers.sum(axis=axes, keepdims=True), rtol=1e-5)


def test_momentum_of_batch_norm_is_that_of_what_is_kept(tmp_path: Path) -> None:
    """ONNX's momentum weighs the old mean, ours the new one."""
    nodes = [helper.make_node("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"], momentum=0.8)]
    constants = [
        array(n, values, np.float32) for n, values in zip("gbmv", ([1, 1], [0, 0], [5, 5], [1, 1]), strict=True)
    ]
    net = OnnxNet(save(tmp_path, model(nodes, constants, ("batch", 2))))
    net(np.array([[0, 1], [2, 3]], np.float32))
    (module,) = (m for m in net.modules() if hasattr(m, "running_mean"))
    np.testing.assert_allclose(module.running_mean, [0.8 * 5 + 0.2 * 1, 0.8 * 5 + 0.2 * 2])


def test_what_ran_is_what_was_traced(tmp_path: Path) -> None:
    """Looks at weights are operations of the trace and of the run alike."""
    net = OnnxNet(save(tmp_path, model(TURNED["by an option"], [weight("w", 16, 16), weight("v", 16, 4)], ROWS)))
    traced = [(r.op, r.path) for r in trace(net, (2, 16))]
    with record(net) as ran:
        net(np.zeros((2, 16), np.float32))
    assert [(r.op, r.path) for r in ran] == traced


def test_looks_are_the_same_if_they_show_the_same() -> None:
    """Three permutations in a row, and there and back through other shapes."""
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    stored = Weight.of(values, "w")
    for dims in itertools.permutations(range(3)):
        look = stored.permuted(dims).permuted((1, 2, 0))
        np.testing.assert_array_equal(look.constant.load(), values.transpose(dims).transpose(1, 2, 0))
        assert look is stored.permuted(tuple(dims[d] for d in (1, 2, 0)))
    assert stored.reshaped((6, 4)).reshaped((24,)).reshaped((2, 3, 4)) is stored
    assert stored.reshaped((1, 6, 4)).permuted((2, 1, 0)).reshaped((4, 6)) is stored.reshaped((6, 4)).permuted((1, 0))
    parameter = stored.permuted((2, 0, 1)).reshaped((8, 3)).make_parameter(True)
    look = stored.permuted((1, 0, 2)).tensor(True)
    np.testing.assert_array_equal(look.data, values.transpose(1, 0, 2))
    look.sum().backward()
    np.testing.assert_array_equal(parameter.grad, np.ones((8, 3)))  # every look trains the one parameter


def test_a_product_whose_weight_is_another_layers_keeps_its_bias(tmp_path: Path) -> None:
    """x W, then the transpose with a bias of its own."""
    from onnx.reference import ReferenceEvaluator

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("MatMul", ["a", "t"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    content = model(nodes, [weight("w", 16, 5), weight("b", 16, seed=1)], ROWS)
    net = OnnxNet(save(tmp_path, content))
    assert sum(p.size for p in net.parameters()) == 96
    x = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    with no_grad():
        np.testing.assert_allclose(net(x).data, ReferenceEvaluator(content).run(None, {"x": x})[0], rtol=1e-4)


@pytest.mark.parametrize("op", ["Gather", "Concat"])
def test_shape_arithmetic_is_refused_before_it_takes_memory(op: str) -> None:
    """Arrays that are small, and a result that is not: looked up again and again, or joined with themselves."""
    many = np.zeros(MAX_ELEMENTS - 1, np.int64)
    inputs = {"Gather": [np.zeros((2000, 1000)), many[:2000]], "Concat": [many, many]}[op]
    node = Node(op, "", "", ("a", "b"), ("y",), {"axis": 0})
    with pytest.raises(ValueError, match=f"expected at most {MAX_ELEMENTS} elements"):
        HOST[op](node, inputs)


def test_scales_that_do_not_fit_a_weight_are_refused(tmp_path: Path) -> None:
    """They would be repeated: a small file, a large array."""
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = [array("q", np.ones((1, 16)), np.int8), array("s", np.ones(16), np.float32)]
    with pytest.raises(ValueError, match="16 scales or zero points for axis 0"):
        OnnxNet(save(tmp_path, model(nodes, constants, ("batch", 1), 21)))


CLIP = [array("low", -1, np.float32), array("six", 6, np.float32), array("zero", 0, np.float32)]
SINGLE: dict[str, tuple[Any, list[Any]]] = {
    "clip from below zero": (helper.make_node("Clip", ["x", "low", "six"], ["y"]), CLIP),
    "clip without an upper bound": (helper.make_node("Clip", ["x", "low"], ["y"]), CLIP),
    "relu6": (helper.make_node("Clip", ["x", "zero", "six"], ["y"]), CLIP),
    "gelu": (helper.make_node("Gelu", ["x"], ["y"]), []),
    "gelu by tanh": (helper.make_node("Gelu", ["x"], ["y"], approximate="tanh"), []),
    "all axes turned round": (helper.make_node("Transpose", ["x"], ["y"]), []),
    "pads": (helper.make_node("Pad", ["x", "p"], ["y"]), [array("p", [0, 0, 1, 2, 0, 0, 3, 4])]),
    "pads of two axes": (
        helper.make_node("Pad", ["x", "p", "", "a"], ["y"]), [array("p", [1, 2, 3, 0]), array("a", [-1, 1])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_one_operation_as_onnx_computes_it(tmp_path: Path, name: str) -> None:
    """Values on an image of four different sizes, within, at and beyond the bounds."""
    from onnx.reference import ReferenceEvaluator

    node, constants = SINGLE[name]
    content = model([node], constants, (2, 3, 4, 5), 20)
    x = (4 * np.random.default_rng(0).standard_normal((2, 3, 4, 5))).astype(np.float32)
    with no_grad():
        found = OnnxNet(save(tmp_path, content)).eval()(x).data
    np.testing.assert_allclose(found, ReferenceEvaluator(content).run(None, {"x": x})[0], rtol=1e-5, atol=1e-6)


def test_paddings_by_hand() -> None:
    """Begins come before ends; SAME reaches as far as a dilated kernel; a dilated pool is refused."""

    def of(op: str = "Conv", **attributes: Any) -> Node:
        return Node(op, "n", "", ("x", "w"), ("y",), attributes, 17)

    assert padding_of(of(pads=(1, 2, 3, 4)), (7, 8), (3, 2), (1, 1), (1, 1)) == ((1, 3), (2, 4))
    same = of(auto_pad="SAME_UPPER")
    assert padding_of(same, (7, 8), (3, 2), (1, 1), (2, 3)) == ((2, 2), (1, 2))
    assert padding_of(same, (7, 8), (3, 2), (2, 3), (1, 1)) == ((1, 1), (0, 0))
    assert padding_of(of(auto_pad="SAME_LOWER"), (7, 8), (3, 2), (1, 1), (1, 1)) == ((1, 1), (1, 0))
    with pytest.raises(ValueError, match="dilations are not 1"):
        TENSOR_OPS["MaxPool"](of("MaxPool", kernel_shape=(2, 2), dilations=(2, 1)), [Tensor(np.zeros((1, 1, 4, 4)))])


def test_negative_pads_take_away(tmp_path: Path) -> None:
    """At the front of one axis and at the end of another, beside zeros at other ends."""
    node = helper.make_node("Pad", ["x", "p"], ["y"])
    net = OnnxNet(save(tmp_path, model([node], [array("p", [0, 0, -1, 0, 0, 1, 2, -2])], (2, 3, 4, 5))))
    x = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    expected = np.pad(x[:, :, 1:, :3], ((0, 0), (0, 1), (0, 2), (0, 0)))
    with no_grad():
        np.testing.assert_array_equal(net(x).data, expected)
