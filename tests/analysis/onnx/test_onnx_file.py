"""ONNX files that nobody should trust: one line and exit code 2 for each, and never a value from outside the folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.cost_model import main
from analysis.onnx.file import MAX_NODES, Node, count_nodes, input_shape, read_graph
from analysis.onnx.host import MAX_ELEMENTS, evaluate, new_shape
from analysis.onnx.net import OnnxNet
from analysis.onnx.tensor import read_constant
from lance_ref import Tensor, no_grad, trace, tune

onnx = pytest.importorskip("onnx")
from onnx_files import array, helper, mlp, model, numpy_helper, save, weight  # noqa: E402


def message(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command line says when it refuses: one line on stderr, exit code 2, nothing on stdout."""
    with pytest.raises(SystemExit) as leaving:
        main(["--net", *map(str, arguments), "--batch", "2", "--method", "bp"])
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


# ---- what works ----------------------------------------------------------------------------


def test_the_command_line_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The input shape comes from the file, the batch from the option."""
    assert main(["--net", str(save(tmp_path, mlp())), "--batch", "5", "--method", "bp", "--format", "json"]) == 0
    assert '"forward": 420' in capsys.readouterr().out  # 2·5·(4·6 + 6·3)


def test_values_beside_the_file_are_read_from_there(tmp_path: Path) -> None:
    """A wrong offset, or weights read where shapes are enough."""
    net = mlp()
    expected = [numpy_helper.to_array(t) for t in net.graph.initializer]
    onnx.save_model(net, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    parameters = OnnxNet(tmp_path / "net.onnx").parameters()
    for parameter, values in zip(parameters, expected, strict=True):
        np.testing.assert_array_equal(parameter.data, values)
    (tmp_path / "net.data").unlink()
    assert len(trace(OnnxNet(tmp_path / "net.onnx", with_weights=False), (2, 4))) == 3
    with pytest.raises(ValueError, match=r"values of 'a.weight' in 'net.data', which does not exist"):
        OnnxNet(tmp_path / "net.onnx")


def test_types_of_half_the_digits_are_floating(tmp_path: Path) -> None:
    """bfloat16 is none of NumPy's kinds; integers are not floating."""
    for kind, floating in (("BFLOAT16", True), ("FLOAT16", True), ("DOUBLE", True), ("INT8", False), ("BOOL", False)):
        tensor = helper.make_tensor("t", getattr(onnx.TensorProto, kind), [2], [1, 0])
        assert read_constant(tmp_path / "net.onnx", tensor).is_floating is floating


def test_a_layer_that_stands_twice_is_called_twice(tmp_path: Path) -> None:
    """Costs per call, one parameter; another bias makes another layer on the same weight, which trains with it."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "w", "b"], ["g"], transB=1),
        helper.make_node("Gemm", ["g", "w", "c"], ["f"], transB=1),
        helper.make_node("Gemm", ["f", "v"], ["y"], transB=1),
    ]
    constants = [weight("w", 4, 4), weight("b", 4), weight("c", 4), weight("v", 3, 4)]
    net = OnnxNet(save(tmp_path, model(nodes, constants)))
    records = trace(net, (2, 4))
    assert [r.op for r in records] == ["linear"] * 4
    assert records[0].path == records[1].path != records[2].path
    assert len({r.inputs[1].id for r in records}) == 2
    assert len(list(net.parameters())) == 4
    assert tune(net, "last:1").layers == (records[0].path, records[2].path)


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    """Files that other programs joined."""
    net = mlp()
    nodes = list(net.graph.node)
    del net.graph.node[:]
    net.graph.node.extend(nodes[::-1])
    assert [n.op for n in read_graph(save(tmp_path, net)).nodes] == ["Gemm", "Relu", "Gemm"]


def test_what_the_output_does_not_need_is_left_out(tmp_path: Path) -> None:
    """A branch that nobody reads would be billed, or refused for an operation that never matters."""
    dead = helper.make_node("NonMaxSuppression", ["h"], ["nobody"])
    net = mlp(helper.make_node("Relu", ["h"], ["g"]), dead)
    assert len(read_graph(save(tmp_path, net)).nodes) == 3


IMAGE = ("batch", 3, 6, 7)
OPERATIONS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "Sub": (("batch", 4), [helper.make_node("Sub", ["c", "x"], ["y"])], [weight("c", 4)]),
    "Div by a number": (("batch", 4), [helper.make_node("Div", ["x", "c"], ["y"])], [array("c", [2.5], np.float32)]),
    "Pow": (("batch", 4), [helper.make_node("Pow", ["x", "c"], ["y"])], [array("c", 2.0, np.float32)]),
    "Clip between": (
        ("batch", 4),
        [helper.make_node("Clip", ["x", "a", "b"], ["y"])],
        [array("a", -0.5, np.float32), array("b", 0.25, np.float32)],
    ),
    "HardSigmoid": (("batch", 4), [helper.make_node("HardSigmoid", ["x"], ["y"])], []),
    "HardSwish": (("batch", 4), [helper.make_node("HardSwish", ["x"], ["y"])], []),
    "Sigmoid": (("batch", 4), [helper.make_node("Sigmoid", ["x"], ["y"])], []),
    "Erf": (("batch", 4), [helper.make_node("Erf", ["x"], ["y"])], []),
    "Softmax": (IMAGE, [helper.make_node("Softmax", ["x"], ["y"], axis=1)], []),
    "ReduceMean": (IMAGE, [helper.make_node("ReduceMean", ["x"], ["y"], axes=[-1, 2], keepdims=0)], []),
    "MaxPool, unequal sides": (
        IMAGE,
        [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 2], pads=[0, 0, 1, 1])],
        [],
    ),
    "MaxPool, ceil": (
        IMAGE,
        [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)],
        [],
    ),
    "AveragePool": (
        IMAGE,
        [helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[1, 2], pads=[1, 1, 1, 1])],
        [],
    ),
    "GlobalAveragePool": (IMAGE, [helper.make_node("GlobalAveragePool", ["x"], ["y"])], []),
    "Conv, groups": (
        IMAGE,
        [
            helper.make_node(
                "Conv", ["x", "w", "b"], ["y"], group=3, dilations=[2, 1], strides=[1, 2], pads=[2, 0, 1, 1]
            )
        ],
        [weight("w", 6, 1, 2, 3), weight("b", 6)],
    ),
    "Conv, same": (
        IMAGE,
        [helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER")],
        [weight("w", 2, 3, 2, 2)],
    ),
    "BatchNormalization": (
        IMAGE,
        [helper.make_node("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"], epsilon=0.01)],
        [weight(n, 3, seed=i) for i, n in enumerate("gbm")] + [array("v", [1, 2, 3], np.float32)],
    ),
    "LayerNormalization, no bias": (
        IMAGE,
        [helper.make_node("LayerNormalization", ["x", "g"], ["y"], axis=-2)],
        [weight("g", 6, 7)],
    ),
    "Gemm, all options": (
        ("batch", 4),
        [helper.make_node("Gemm", ["x", "w", "c"], ["y"], alpha=0.5, beta=2.0)],
        [weight("w", 4, 3), weight("c", 3)],
    ),
    "MatMul of images": (IMAGE, [helper.make_node("MatMul", ["x", "w"], ["y"])], [weight("w", 3, 7, 2)]),
    "MatMul, weight on the left": (IMAGE, [helper.make_node("MatMul", ["w", "x"], ["y"])], [weight("w", 5, 6)]),
    "Concat": (IMAGE, [helper.make_node("Concat", ["x", "x"], ["y"], axis=-1)], []),
    "Split": (
        IMAGE,
        [helper.make_node("Split", ["x", "s"], ["a", "y"], axis=3)],
        [array("s", [2, 5])],
    ),
    "Slice": (
        IMAGE,
        [helper.make_node("Slice", ["x", "s", "e", "a", "t"], ["y"])],
        [array("s", [-1, 1]), array("e", [-(2**62), 2**62]), array("a", [3, 2]), array("t", [-2, 1])],
    ),
    "Gather, several": (IMAGE, [helper.make_node("Gather", ["x", "i"], ["y"], axis=2)], [array("i", [[0, 2], [5, 2]])]),
    "Gather, one": (IMAGE, [helper.make_node("Gather", ["x", "i"], ["y"], axis=3)], [array("i", -1)]),
    "Pad": (
        IMAGE,
        [helper.make_node("Pad", ["x", "p", "v"], ["y"])],
        [array("p", [0, 0, 1, 2, 0, 0, 0, 3]), array("v", 0.5, np.float32)],
    ),
    "Transpose": (IMAGE, [helper.make_node("Transpose", ["x"], ["y"])], []),
    "Unsqueeze and Squeeze": (
        IMAGE,
        [helper.make_node("Unsqueeze", ["x", "a"], ["h"]), helper.make_node("Squeeze", ["h", "b"], ["y"])],
        [array("a", [1, -1]), array("b", [1])],
    ),
    "Flatten": (IMAGE, [helper.make_node("Flatten", ["x"], ["y"], axis=2)], []),
    "Shape arithmetic": (
        IMAGE,
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "i"], ["B"]),
            helper.make_node("Unsqueeze", ["B", "i"], ["b"]),
            helper.make_node("Concat", ["b", "r"], ["t"], axis=0),
            helper.make_node("Reshape", ["x", "t"], ["y"]),
        ],
        [array("i", 0), array("r", [-1])],
    ),
    "Quantize and Dequantize": (
        ("batch", 4),
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        [array("s", 0.1, np.float32), array("z", 3, np.int8)],
    ),
    "a quantized weight": (
        IMAGE,
        [
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
            helper.make_node("Conv", ["x", "w"], ["y"]),
        ],
        [
            array("q", np.arange(-6, 6).reshape(2, 3, 2, 1), np.int8),
            array("s", [0.5, 2], np.float32),
            array("z", [0, 0], np.int8),
        ],
    ),
    "half precision": (
        ("batch", 4),
        [helper.make_node("Cast", ["x"], ["h"], to=1), helper.make_node("Add", ["h", "w"], ["y"])],
        [weight("w", 4)],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_onnxs_own_numbers(tmp_path: Path, name: str) -> None:
    """An axis, default or argument that is read in another way than the standard says."""
    from onnx.reference import ReferenceEvaluator

    shape, nodes, constants = OPERATIONS[name]
    net = model(nodes, constants, shape, opset=21 if "uantize" in name else 17)
    x = np.random.default_rng(1).standard_normal((2, *shape[1:])).astype(np.float32)
    (expected,) = ReferenceEvaluator(net).run(None, {"x": x})
    ours = OnnxNet(save(tmp_path, net)).eval()
    with no_grad():
        given = ours(Tensor(x)).data
    assert given.shape == expected.shape
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)
    assert trace(ours, x.shape)[-1].output.shape == expected.shape


def test_a_negative_padding_takes_away(tmp_path: Path) -> None:
    """(ONNX's own evaluator refuses it.)"""
    net = model([helper.make_node("Pad", ["x", "p"], ["y"])], [array("p", [0, -1, 0, 2])])
    x = np.array([[1, 2, 3, 4]], np.float32)
    assert OnnxNet(save(tmp_path, net))(x).data.tolist() == [[2, 3, 4, 0, 0]]


def test_older_operator_sets_take_arguments_as_attributes(tmp_path: Path) -> None:
    """Squeeze, Slice, Clip, Pad, Dropout and Softmax before they had inputs: others' defaults would be taken."""
    nodes = [
        helper.make_node("Unsqueeze", ["h"], ["a"], axes=[2]),
        helper.make_node("Slice", ["a"], ["b"], starts=[1], ends=[9], axes=[1]),
        helper.make_node("Clip", ["b"], ["c"], min=0.0, max=6.0),
        helper.make_node("Pad", ["c"], ["d"], pads=[0, 1, 0, 0, 0, 0]),
        helper.make_node("Squeeze", ["d"], ["e"], axes=[2]),
        helper.make_node("Dropout", ["e"], ["f", "mask"], ratio=0.25),
        helper.make_node("Softmax", ["f"], ["g"]),
    ]
    records = trace(OnnxNet(save(tmp_path, mlp(*nodes, opset=9)), with_weights=False), (2, 4))
    shapes = [r.output.shape for r in records[1:-1]]
    assert shapes == [(2, 6, 1), (2, 5, 1), (2, 5, 1), (2, 6, 1), (2, 6), (2, 6), (2, 6)]
    assert [r.op for r in records[3:7]] == ["relu6", "pad", "reshape", "dropout"]
    assert records[6].attributes["p"] == 0.25


def gelu(*order: str) -> list[Any]:
    """½·h·(1 + erf(h/√2)) from ``h`` to ``g``, the factors in this order."""
    product = [helper.make_node("Mul", [order[0], order[1]], ["m"]), helper.make_node("Mul", ["m", order[2]], ["g"])]
    return [
        helper.make_node("Div", ["h", "root"], ["s"]),
        helper.make_node("Erf", ["s"], ["e"]),
        helper.make_node("Add", ["one", "e"], ["a"]),
        *product,
    ]


GELU_NUMBERS = tuple(
    array(n, v, np.float32) for n, v in (("root", 2**0.5), ("one", 1), ("half", 0.5), ("third", 1 / 3))
)


@pytest.mark.parametrize("order", [("h", "a", "half"), ("a", "half", "h"), ("h", "half", "a"), ("half", "h", "a")])
def test_gelu_is_recognised_in_every_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    """Exporters write the three factors in their own order."""
    net = OnnxNet(save(tmp_path, mlp(*gelu(*order), constants=GELU_NUMBERS)))
    assert [r.op for r in trace(net, (2, 4))] == ["linear", "gelu", "linear"]


def steps(text: str) -> list[Any]:
    """Nodes from lines like ``d = Sub h u``; of a mean, after the name, the axis."""
    nodes = []
    for line in filter(None, map(str.strip, text.split(";"))):
        output, _, op, *inputs = line.split()
        op, _, axis = op.partition(":")
        nodes.append(helper.make_node(op, inputs, [output], **({"axes": [int(axis)]} if axis else {})))
    return nodes


LIKE_GELU = {
    "another factor": "s = Div h root; e = Erf s; a = Add one e; m = Mul h a; g = Mul m third",
    "erf + 2": "s = Div h root; e = Erf s; a = Add two e; m = Mul h a; g = Mul m half",
    "another root": "s = Div h two; e = Erf s; a = Add one e; m = Mul h a; g = Mul m half",
    "a divisor as a factor": "s = Mul h root; e = Erf s; a = Add one e; m = Mul h a; g = Mul m half",
    "a divisor divided": "s = Div root h; e = Erf s; a = Add one e; m = Mul h a; g = Mul m half",
    "another value": "z = Neg h; s = Div h root; e = Erf s; a = Add one e; m = Mul z a; g = Mul m half",
    "half of another value": "z = Neg h; s = Div h root; e = Erf s; a = Add one e; t = Mul z half; g = Mul t a",
    "s is read": "s = Div h root; e = Erf s; a = Add one e; m = Mul h a; n = Mul m half; g = Add n s",
    "e is read": "s = Div h root; e = Erf s; a = Add one e; m = Mul h a; n = Mul m half; g = Add n e",
    "a is read": "s = Div h root; e = Erf s; a = Add one e; m = Mul h a; n = Mul m half; g = Add n a",
    "m is read": "s = Div h root; e = Erf s; a = Add one e; m = Mul h a; n = Mul m half; g = Add n m",
    "the half is read": "s = Div h root; e = Erf s; a = Add one e; t = Mul h half; n = Mul t a; g = Add n t",
}
NORM = {
    "u": "ReduceMean:-1 h", "d": "Sub h u", "p": "Pow d two", "v": "ReduceMean:-1 p", "w": "Add v eps",
    "r": "Sqrt w", "q": "Div d r", "k": "Mul q gain", "g": "Add k shift",
}  # fmt: skip


def norm(**changes: str) -> str:
    """A layer norm from ``h`` to ``g``, some of its steps changed, others in front."""
    return "; ".join(f"{name} = {step}" for name, step in ({"z": "Neg h"} | NORM | changes).items())


LIKE_NORM = {
    "a fourth power": norm(p="Pow d four"),
    "difference of another value": norm(d="Sub z u"),
    "mean of another value": norm(u="ReduceMean:-1 z"),
    "means over the batch": norm(u="ReduceMean:0 h", v="ReduceMean:0 p"),
    "a mean over the batch": norm(v="ReduceMean:0 p"),
    "a negative epsilon": norm(w="Add v minus"),
    "the quotient turned round": norm(q="Div r d"),
    "a shift of another size": norm(g="Add k one"),
    **{f"{name} is read": norm(g="Add k shift").replace("g = ", "n = ") + f"; g = Add n {name}" for name in "udpvwrqk"},
}
NUMBERS = (
    *GELU_NUMBERS,
    *(array(n, v, np.float32) for n, v in (("two", 2), ("four", 4), ("eps", 0.3), ("minus", -1e-3))),
    *(array(n, v, np.float32) for n, v in (("gain", [1, 2, 3, 4, 5, 6]), ("shift", [3, 2, 1, 0, 1, 2]))),
)


@pytest.mark.parametrize("name", [*LIKE_GELU, *LIKE_NORM])
def test_what_only_looks_like_a_group_is_none(tmp_path: Path, name: str) -> None:
    """Another number or value, or one on the way that somebody else reads: node by node, and the right numbers."""
    from onnx.reference import ReferenceEvaluator

    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    content = mlp(*steps((LIKE_GELU | LIKE_NORM)[name]), constants=NUMBERS, opset=16)
    net = OnnxNet(save(tmp_path, content))
    assert {"gelu", "layer_norm"}.isdisjoint(r.op for r in trace(net, (2, 4)))
    with no_grad():
        np.testing.assert_allclose(
            net(x).data, ReferenceEvaluator(content).run(None, {"x": x})[0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("square", ["Pow d two", "Mul d d"])
@pytest.mark.parametrize("sum_", ["Add v eps", "Add eps v"])
@pytest.mark.parametrize("opset", [16, 17])
def test_a_layer_norm_in_nine_nodes_is_one(tmp_path: Path, square: str, sum_: str, opset: int) -> None:
    """With its own epsilon; from operator set 17 on an exporter writes one node, and nine are the network's own."""
    from onnx.reference import ReferenceEvaluator

    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    content = mlp(*steps(norm(p=square, w=sum_)), constants=NUMBERS, opset=opset)
    net = OnnxNet(save(tmp_path, content))
    assert ("layer_norm" in [r.op for r in trace(net, (2, 4))]) is (opset < 17)
    assert net.file_only
    with no_grad():
        np.testing.assert_allclose(
            net(x).data, ReferenceEvaluator(content).run(None, {"x": x})[0], rtol=1e-4, atol=1e-5
        )


def test_a_product_that_is_read_twice_keeps_its_bias_apart(tmp_path: Path) -> None:
    """Joining it with the addition would lose what the other reader gets."""
    nodes = [
        helper.make_node("MatMul", ["h", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["g"]),
    ]
    net = OnnxNet(save(tmp_path, mlp(*nodes, constants=(weight("w", 6, 6), weight("b", 6)))))
    assert [r.op for r in trace(net, (2, 4))] == ["linear", "linear", "add", "add", "linear"]


# ---- what does not -------------------------------------------------------------------------


def external(location: str, offset: str = "0", length: str = "96") -> Callable[[onnx.ModelProto], None]:
    def change(net: onnx.ModelProto) -> None:
        tensor = net.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=value)

    return change


def circle(net: onnx.ModelProto) -> None:
    net.graph.node[1].op_type = "Add"
    net.graph.node[1].input.append("back")
    net.graph.node.append(helper.make_node("Identity", ["g"], ["back"]))


def cut(net: onnx.ModelProto) -> None:
    net.graph.initializer[0].raw_data = net.graph.initializer[0].raw_data[:-1]


def huge(net: onnx.ModelProto) -> None:
    net.graph.initializer[0].ClearField("raw_data")
    net.graph.initializer[0].dims[0] = 2**50


def some(net: onnx.ModelProto) -> None:
    net.graph.initializer[0].ClearField("raw_data")
    net.graph.initializer[0].dims[0] = 500


def setter(path: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(net: onnx.ModelProto) -> None:
        *way, last = path.split(".")
        place: Any = net.graph
        for step in way:
            place = place[int(step)] if step.isdigit() else getattr(place, step)
        if isinstance(value, list):
            del getattr(place, last)[:]
            getattr(place, last).extend(value)
        else:
            setattr(place, last, value)

    return change


REFUSED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "an absolute path": (external("/etc/passwd"), "outside its folder: refused"),
    "a path upwards": (external("../secret.data"), "outside its folder: refused"),
    "a path upwards on the way": (external("below/../../secret.data"), "outside its folder: refused"),
    "a link to the outside": (external("link.data"), "outside its folder: refused"),
    "a folder": (external("below"), "which ends before them"),
    "a device": (external("/dev/zero"), "outside its folder: refused"),
    "beyond the end": (external("here.data", "8"), "which ends before them"),
    "a negative offset": (external("here.data", "-8"), "expected a file, offset and length"),
    "another length": (external("here.data", "0", "95"), "has 95 bytes for 'a.weight', expected 96"),
    "no location": (external(""), "expected a file, offset and length"),
    "a circle": (circle, "has nodes in a circle"),
    "values cut off": (cut, "with 95 bytes, expected 96"),
    "a value too many": (
        lambda net: setattr(net.graph.initializer[0], "raw_data", bytes(97)),
        "with 97 bytes, expected 96",
    ),
    "values missing": (huge, "without its values"),
    "most values missing": (some, "without its values"),
    "a negative size": (setter("initializer.0.dims", [-6, 4]), "of shape (-6, 4)"),
    "an unknown type": (setter("initializer.0.data_type", 99), "of unknown type 99"),
    "strings": (setter("initializer.0.data_type", 8), "of strings"),
    "nothing makes it": (setter("node.1.input", ["nowhere"]), "reads 'nowhere', which nothing makes"),
    "a node makes a weight": (setter("node.1.output", ["a.weight"]), "has two sources for value 'a.weight'"),
    "a node makes the input": (setter("node.1.output", ["x"]), "has two sources for value 'x'"),
    "two make it": (setter("node.1.output", ["y"]), "has two sources for value 'y'"),
    "no node": (setter("node", []), "contains no graph"),
    "no such output": (setter("output.0.name", "z"), "no node that makes its output 'z'"),
    "unknown operations": (setter("node.1.op_type", "Loop"), "no cost rule for Loop; there are rules for Abs, Add,"),
    "another domain": (setter("node.1.domain", "com.x"), "no cost rule for com.x.Relu"),
    "a weight of another size": (setter("initializer.3.dims", [3, 1]), "Gemm node 'y'"),
    "an attribute of another kind": (
        setter("node.0.attribute", [helper.make_attribute("alpha", "yes")]),
        "Gemm node 'h'",
    ),
}


def test_nodes_of_a_file_that_ends_too_early_are_not_counted() -> None:
    """The graph says how long it is, and is not."""
    content = mlp().SerializeToString()
    assert count_nodes(content) == 3
    graph = content.index(b"net")  # the graph's name follows its nodes: all that is cut off here lies within the graph
    for end in (graph, graph + 10, len(content) // 2):
        with pytest.raises(EOFError, match="it ends in the middle of a field"):
            count_nodes(content[:end])


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, a hang, a number from a damaged file, or a read outside of the folder."""
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "secret.data").write_bytes(bytes(96))
    (folder / "here.data").write_bytes(bytes(96))
    os.symlink(tmp_path / "secret.data", folder / "link.data")
    net = mlp()
    change, expected = REFUSED[case]
    change(net)
    assert expected in message(capsys, save(folder, net))


def test_an_absolute_path_is_refused_in_the_folder_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a file could not be moved."""
    values = tmp_path.resolve() / "here.data"
    values.write_bytes(bytes(96))
    net = mlp()
    external(str(values))(net)
    assert "outside its folder: refused" in message(capsys, save(tmp_path, net))


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        (None, [], "the rank of its input is unknown, expected an input shape"),
        (("batch", "features"), [], "its input has shape (?, ?), expected an input shape in place of it"),
        (("batch", "channels", 4), [], "its input has shape (?, ?, 4), expected an input shape in place of it"),
        (("batch", 4), ["--input-shape", "5"], "expected (..., 4)"),
        (("batch", 4), ["--input-shape", "3,4,4"], "expected 2 dimensions"),
    ],
)
def test_an_input_that_does_not_fit_is_one_line(
    tmp_path: Path, shape: Any, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guess in place of what the file leaves open."""
    assert expected in message(capsys, save(tmp_path, mlp(shape=shape)), *options)


def test_a_size_of_zero_is_an_open_one_and_operator_sets_are_onnxs(tmp_path: Path) -> None:
    """Some exporters write 0 for the batch; the number of another domain's set says nothing about ONNX's."""
    net = mlp(shape=(0, 4), opset=12)
    net.opset_import.append(helper.make_opsetid("com.x", 20))
    graph = read_graph(save(tmp_path, net))
    assert graph.input_shape == (None, 4)
    assert {node.opset for node in graph.nodes} == {12}


def reshaping(op: str, shape: tuple[int, ...], given: list[int] | None, **attributes: Any) -> tuple[int, ...]:
    return new_shape(Node(op, "", "", ("x", "s"), ("y",), attributes), shape, [None, given and np.array(given)])


def test_new_shapes_by_hand() -> None:
    """Zeros that stand for a size or for zero, axes from the end, several new ones."""
    assert reshaping("Reshape", (4, 3), [3, 0]) == (3, 3)
    assert reshaping("Reshape", (0, 3), [3, 0], allowzero=1) == (3, 0)
    assert reshaping("Flatten", (2, 3, 4), None, axis=-1) == (6, 4)
    assert reshaping("Flatten", (2, 3, 4), None, axis=0) == (1, 24)
    assert reshaping("Flatten", (2, 3, 4), None) == (2, 12)
    assert reshaping("Unsqueeze", (2, 3), [0, -1]) == (1, 2, 3, 1)
    assert reshaping("Unsqueeze", (2, 3), [-2]) == (2, 1, 3)
    assert reshaping("Squeeze", (1, 2, 1), None) == (2,)
    assert reshaping("Squeeze", (1, 2, 1), [-1]) == (1, 2)
    with pytest.raises(ValueError, match="are not all of size 1"):
        reshaping("Squeeze", (1, 2, 1), [0, 1])


def host(op: str, *x: Any, outputs: int = 1, **attributes: Any) -> list[np.ndarray]:
    names = tuple(map(str, range(max(len(x), outputs))))
    return evaluate(Node(op, "", "", names[: len(x)], names[:outputs], attributes, 18), list(x))


def test_numbers_that_are_computed_beforehand() -> None:
    """Against ONNX's own words: integers are cut towards zero, slices go backwards, parts are rounded up."""
    assert host("Div", np.array([7, -7, 7]), np.array([2, 2, -2]))[0].tolist() == [3, -3, -3]
    row = np.arange(5)
    for starts, ends, steps, expected in (
        ([4], [-(2**31)], [-1], [4, 3, 2, 1, 0]), ([4], [-4], [-2], [4, 2]), ([-2], [2**31 - 1], [1], [3, 4]),
    ):  # fmt: skip
        found = host("Slice", row, np.array(starts), np.array(ends), None, np.array(steps))[0]
        assert found.tolist() == expected
    assert [part.tolist() for part in host("Split", row, outputs=2, num_outputs=2)] == [[0, 1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"split is \(2, 2\) into 2 outputs, of size 5"):
        host("Split", row, np.array([2, 2]), outputs=2)
    (whole,) = host("Constant", value_ints=(1, 2))
    assert (whole.dtype, whole.tolist()) == (np.int64, [1, 2])
    (broken,) = host("Constant", value_floats=(0.5, 2.0))
    assert (broken.dtype, broken.tolist()) == (np.float32, [0.5, 2.0])
    most = np.array([MAX_ELEMENTS])
    assert host("ConstantOfShape", most)[0].size == MAX_ELEMENTS
    with pytest.raises(ValueError, match="expected at most"):
        host("ConstantOfShape", most + 1)


def test_an_unknown_rank_takes_the_shape_that_is_given(tmp_path: Path) -> None:
    """Files without shapes are common; with one from outside they are complete."""
    file = save(tmp_path, mlp(shape=None))
    assert read_graph(file).input_shape is None
    assert main(["--net", str(file), "--batch", "2", "--method", "bp", "--input-shape", "4", "--format", "csv"]) == 0


def test_all_operations_without_a_rule_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One at a time is a long afternoon; one on a shape alone has a rule, on activations not."""
    nodes = [
        helper.make_node("GridSample", ["h"], ["a"]),
        helper.make_node("NonZero", ["a"], ["b"]),
        helper.make_node("Det", ["b"], ["g"]),
    ]
    net = mlp(*nodes)
    assert "no cost rule for Det, GridSample, NonZero; there are" in message(capsys, save(tmp_path, net))


@pytest.mark.parametrize(("batch", "kind"), [(2, onnx.TensorProto.INT64)])
def test_an_input_of_integers_is_one_line(
    tmp_path: Path, batch: int, kind: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token numbers as if they were pixels."""
    assert "linear: x has dtype int64, expected float32 or float64" in message(capsys, save(tmp_path, mlp(kind=kind)))


def test_a_batch_that_cannot_be_replaced_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of several images folded into one: fine for the batch of the file, wrong for every other."""
    fold = helper.make_node("Reshape", ["h", "s"], ["a"])
    back = helper.make_node("Reshape", ["a", "t"], ["g"])
    net = mlp(fold, back, shape=(4, 4), constants=(array("s", [1, 2, 12]), array("t", [-1, 6])))
    file = save(tmp_path, net)
    assert main(["--net", str(file), "--batch", "4", "--method", "bp", "--format", "csv"]) == 0
    capsys.readouterr()
    assert "the file is made for a batch of 4" in message(capsys, file)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("ConstantOfShape", ["big"], ["c"]), helper.make_node("Add", ["h", "c"], ["g"])],
        [helper.make_node("Expand", ["one", "big"], ["c"]), helper.make_node("Add", ["h", "c"], ["g"])],
        [helper.make_node("Range", ["zero", "end", "step"], ["c"]), helper.make_node("Add", ["h", "c"], ["g"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_a_file_cannot_ask_for_much_memory(
    tmp_path: Path, nodes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A few bytes that stand for terabytes."""
    constants = (
        array("big", [2**20, 2**20]),
        array("one", [1]),
        array("zero", 0),
        array("end", 2**60),
        array("step", 1),
    )
    assert f"expected at most {MAX_ELEMENTS} elements" in message(
        capsys, save(tmp_path, mlp(*nodes, constants=constants))
    )


def test_a_million_nodes_are_refused_before_they_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each empty node takes two bytes in the file and a hundred in memory."""
    nodes = b"\x0a\x00" * 1_000_000
    size, length = len(nodes), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    content = b"\x3a" + length + bytes([size]) + nodes
    assert count_nodes(content) == MAX_NODES + 1
    assert "has more than 100000 nodes" in message(capsys, save(tmp_path, content))


def test_a_file_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, empty, a text, a folder."""
    assert "does not exist" in message(capsys, tmp_path / "missing.onnx")
    assert "contains no graph" in message(capsys, save(tmp_path, b""))
    assert "is no ONNX file, or damaged" in message(capsys, save(tmp_path, b"once upon a time"))
    (tmp_path / "folder.onnx").mkdir()
    assert "is not a file" in message(capsys, tmp_path / "folder.onnx")


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_is_a_value_error_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut at any byte, or with any bytes changed: never another exception."""
    content = bytearray(mlp().SerializeToString())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = save(tmp_path_factory.getbasetemp(), bytes(content))
    said = ""
    try:
        trace(OnnxNet(file), (2, *input_shape(file)))
    except ValueError as error:
        said = str(error)
    assert "\n" not in said


def test_hostile_names_do_no_harm(tmp_path: Path) -> None:
    """A weight called ``training`` or ``_modules`` would take a module apart; brackets would colour a table."""
    nodes = [
        helper.make_node("Gemm", ["x", "training.weight"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "_modules.weight"], ["g"], transB=1),
        helper.make_node("Gemm", ["g", "[red]\n.weight"], ["f"], transB=1),
        helper.make_node("Add", ["f", "forward"], ["y"]),
    ]
    names = ("training.weight", "_modules.weight", "[red]\n.weight")
    net = OnnxNet(save(tmp_path, model(nodes, [*(weight(n, 4, 4) for n in names), weight("forward", 4)])))
    assert net.train().training is True
    paths = [record.path for record in trace(net, (2, 4))]
    assert paths == ["onnx.training", "onnx._modules", "_red_", "add"]
    assert sum(p.size for p in net.parameters()) == 52


def test_a_long_chain_is_no_recursion(tmp_path: Path) -> None:
    """Two thousand operations, one behind the other: more than Python may nest."""
    chain = [helper.make_node("Relu", [f"v{i}" if i else "h"], [f"v{i + 1}"]) for i in range(2000)]
    chain[-1].output[0] = "g"
    assert len(trace(OnnxNet(save(tmp_path, mlp(*chain)), with_weights=False), (2, 4))) == 2002


def test_without_the_package_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ImportError from deep inside."""
    file = save(tmp_path, mlp())
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert "needs the package onnx: python -m pip install -e '.[onnx]' in the checkout" in message(capsys, file)
