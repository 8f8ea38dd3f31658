"""Networks from ONNX files: FLOPs as PyTorch counts them, bytes as of the same net written here, numbers that agree."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import CLASSES, NEWER, PIXELS, Cnn, Vit, export, torch_cnn, torch_vit
from torch_twins import one_thread

from analysis.cost_model import cost, main, predict
from analysis.onnx.net import OnnxNet
from analysis.plan import main as plan
from analysis.steps.nets import build, input_shape_for
from lance_ref import Tensor, calibrate, compress, no_grad, trace, tune
from lance_ref.nn.module import Module

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

NETS = {
    "cnn": (torch_cnn, Cnn),
    "vit": (torch_vit, Vit),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The networks as files of operator sets with and without GELU and layer normalisation, and for training."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    cnn, vit = torch_cnn(torch), torch_vit(torch)
    with one_thread():
        contents = {
            "cnn": export(torch, cnn),
            "cnn-training": export(torch, cnn, training=True),
            "cnn-fixed": export(torch, cnn, dynamic=False),
            "vit": export(torch, vit, opset=20),
            "vit-training": export(torch, vit, training=True),
            "vit-13": export(torch, vit, opset=13),
            "vit-fused": export(torch, torch_vit(torch, fused=True)),
            "vit-fixed": export(torch, vit, dynamic=False, batch=1),
        }
    for name, content in contents.items():
        (folder / f"{name}.onnx").write_bytes(content)
    return {name: folder / f"{name}.onnx" for name in contents}


def flops(net: Module, batch: int) -> int:
    """Forward FLOPs of a trace, by the cost rules."""
    from analysis.rules.account import account

    records = trace(net, (batch, 3, PIXELS, PIXELS))
    return 2 * sum(bill.cost.forward_macs for bill in account(records, None))


def counted(net: Any, batch: int) -> int:
    """Forward FLOPs of a PyTorch module, by its own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with one_thread(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(batch, 3, PIXELS, PIXELS))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", ["cnn", "cnn-training", "cnn-fixed", "vit", "vit-training", "vit-13", "vit-fused"])
def test_forward_flops_are_those_of_pytorchs_counter(files: dict[str, Path], name: str) -> None:
    """A convolution or product that is lost, doubled or given another geometry on the way through the file.

    (The counter knows no attention in one kernel on a CPU; it is counted on the net that has it in two products.)
    """
    net = torch_cnn(torch) if name.startswith("cnn") else torch_vit(torch)
    assert flops(OnnxNet(files[name], with_weights=False), 3) == counted(net, 3)


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("cnn-training", "last:2"),
        ("cnn-training", "all"),
        ("vit", "last:3"),
        ("vit", "all"),
        ("vit-training", "all"),
        ("vit-13", "all"),
        ("vit-13", "head"),
    ],
)
def test_costs_are_those_of_the_same_net_written_here(files: dict[str, Path], name: str, tuned: str) -> None:
    """A byte more or less under any accounting, other FLOPs of any kind, another choice of layers."""
    ours = predict(NETS[name[:3]][1](), 3, input_shape=(3, PIXELS, PIXELS), tune=tuned, methods=["bp"])
    read = predict(str(files[name]), 3, tune=tuned, methods=["bp"])
    assert read.report.totals["bp"].activation_bytes == ours.report.totals["bp"].activation_bytes
    assert read.report.totals["bp"].flops == ours.report.totals["bp"].flops
    assert read.report.totals["bp"].elementwise == ours.report.totals["bp"].elementwise
    assert read.step.num_classes == ours.step.num_classes == CLASSES
    assert read.step.tuned_layers == ours.step.tuned_layers


@pytest.mark.parametrize("name", ["cnn", "cnn-fixed", "vit", "vit-training", "vit-13", "vit-fused", "vit-fixed"])
def test_numbers_are_those_of_onnxs_own_evaluator(files: dict[str, Path], name: str) -> None:
    """A transposed weight, a wrong axis, a swapped operand: the same shapes, other values."""
    from onnx.reference import ReferenceEvaluator

    batch = 1 if name == "vit-fixed" else 2
    x = np.random.default_rng(0).standard_normal((batch, 3, PIXELS, PIXELS)).astype(np.float32)
    net = OnnxNet(files[name]).eval()
    with no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (expected,) = ReferenceEvaluator(onnx.load(files[name])).run(None, {"x": x})
        assert np.abs(net(x).data - expected).max() <= 1e-5 * np.abs(expected).max()
        double = net.to(np.float64)(x.astype(np.float64)).data
    assert np.abs(double - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["cnn-training", "vit-13"])
def test_a_real_step_agrees_with_the_prediction(
    files: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A net from a file that runs otherwise than it is traced, with LANCE as without."""
    arguments = ["--net", str(files[name]), "--batch", "2", "--tune", "last:2", "--ranks", "0.5", "--measure"]
    assert main(arguments) == 0
    assert "no difference" in capsys.readouterr().out


def test_a_net_from_a_file_is_calibrated_and_compressed_like_any_other(files: dict[str, Path]) -> None:
    """Paths with dots of their own must be found again."""
    net = OnnxNet(files["cnn-training"])
    x = np.random.default_rng(0).standard_normal((4, 3, PIXELS, PIXELS)).astype(np.float32)
    tune(net, "last:1")
    compress(net, calibrate(net, [x], epsilon=0.9))
    assert net.get_submodule("features.5").store.name == "lance"


@pytest.mark.parametrize(
    ("name", "missing"), [("cnn", True), ("cnn-training", False), ("vit", False), ("vit-13", False)]
)
def test_a_file_without_batch_norm_says_so(
    files: dict[str, Path], name: str, missing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where an exporter may have folded it into the convolutions, the tape is too small; tables and JSON tell."""
    words = "no batch norm in this file: exporters fold it into the convolutions"
    arguments = ["--net", str(files[name]), "--tune", "last:1", "--batch", "2", "--method", "bp"]
    assert main(arguments) == 0
    assert (words in capsys.readouterr().out) == missing
    assert main([*arguments, "--format", "json"]) == 0
    assert (words in capsys.readouterr().out) == missing
    assert plan(["--net", str(files[name]), "--budget", "1MiB", "--batch", "2", "--layers", "1", "--method", "bp"]) == 0
    out, _, code = capsys.readouterr().out.partition("To run the first of them:\n")
    assert (words in out) == missing
    space: dict[str, Any] = {}
    exec(compile(code, "pasted", "exec"), space)  # the network of the file trains as the planner says
    assert len(space["net"].tuning.layers) == 1


def test_layers_have_pytorchs_names(files: dict[str, Path]) -> None:
    """``--tune`` goes by them; the weights of products that the exporter transposed have none, their nodes do."""
    for name, net in (("cnn-training", torch_cnn(torch)), ("vit", torch_vit(torch))):
        theirs = {n for n, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
        read = trace(OnnxNet(files[name], with_weights=False), (1, 3, PIXELS, PIXELS))
        assert {r.path for r in read if r.op in ("conv2d", "linear")} == theirs
    paths = [record.path for record in read]
    assert "blocks.1.attn.softmax" in paths
    assert "blocks.0.mlp.1.gelu" in paths


def test_erf_and_taken_apart_norms_are_one_operation_again(files: dict[str, Path]) -> None:
    """Operator set 13 has neither GELU nor layer normalisation: node by node they would keep several arrays."""
    kinds = Counter(node.op_type for node in onnx.load(files["vit-13"]).graph.node)
    assert kinds["Erf"] == 2
    assert kinds["LayerNormalization"] == kinds["Gelu"] == 0
    ops = Counter(r.op for r in trace(OnnxNet(files["vit-13"], False), (2, 3, PIXELS, PIXELS)))
    assert (ops["gelu"], ops["layer_norm"], ops["linear"], ops["erf"], ops["sqrt"]) == (2, 5, 9, 0, 0)


def test_a_fixed_batch_is_replaced_where_every_value_grows_with_it(files: dict[str, Path]) -> None:
    """Shapes with a batch written out; the class token that was repeated when the file was made."""
    assert OnnxNet(files["cnn-fixed"]).graph.input_shape == (2, 3, PIXELS, PIXELS)
    for name in ("cnn", "vit"):
        reports = [cost(str(files[n]), batch=5, tune="last:2", methods=["bp"]) for n in (name, f"{name}-fixed")]
        assert reports[0].totals["bp"].flops == reports[1].totals["bp"].flops
        assert reports[0].totals["bp"].activation_bytes == reports[1].totals["bp"].activation_bytes


def test_the_newer_exporter_writes_the_same_net() -> None:
    """Other node names, scopes as metadata, weights turned round and in a file beside."""
    from onnx.reference import ReferenceEvaluator

    read = predict(str(NEWER), 3, tune="all", methods=["bp"])
    ours = predict(Vit(), 3, input_shape=(3, PIXELS, PIXELS), tune="all", methods=["bp"])
    assert read.report.totals["bp"].activation_bytes == ours.report.totals["bp"].activation_bytes
    assert read.report.totals["bp"].flops == ours.report.totals["bp"].flops
    assert read.step.tuned_layers == ours.step.tuned_layers
    x = np.random.default_rng(1).standard_normal((2, 3, PIXELS, PIXELS)).astype(np.float32)
    with no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (expected,) = ReferenceEvaluator(onnx.load(NEWER)).run(None, {"x": x})
        assert np.abs(OnnxNet(NEWER)(x).data - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_hook_takes_shape_and_weights_from_the_file(files: dict[str, Path]) -> None:
    """Another default shape, or a trace that loads weights it does not need."""
    name = str(files["cnn"])
    assert input_shape_for(name, None, None) == (3, PIXELS, PIXELS)
    assert input_shape_for(name, 32, None) == (3, 32, 32)
    assert input_shape_for(name, None, (3, 8, 8)) == (3, 8, 8)
    assert all(p.is_meta for p in build(name, 10, (3, PIXELS, PIXELS), True).parameters())
    assert not any(p.is_meta for p in build(name, 10, (3, PIXELS, PIXELS), False).parameters())
    assert predict(name, 2, 32, methods=["bp"]).step.records[0].inputs[0].shape == (2, 3, 32, 32)


def test_one_step_trains_the_file(files: dict[str, Path]) -> None:
    """Weights that are read-only, or shared with the file's buffer, could not be written."""
    net = OnnxNet(files["vit-13"])
    tune(net, "all")
    logits = net(Tensor(np.ones((2, 3, PIXELS, PIXELS), np.float32)))
    (logits * logits).sum().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(trained) == 20
    for parameter in trained:
        assert parameter.grad is not None
        parameter.data -= 0.1 * parameter.grad
