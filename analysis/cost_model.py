"""Predict what one training step keeps and computes: ``python -m analysis.cost_model --net mobilenetv2``.

The command line; :func:`analysis.cost` gives the same in Python. Nothing runs: the net is traced on shapes alone.
With ``--measure`` one real step runs as well, and every number is compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.commands import cli, command_line
from analysis.commands.cli import (
    NET_HELP,
    InputSpec,
    any_file,
    check_effect,
    check_no_effect,
    check_once,
    chunk,
    count,
    data_set,
    few,
    figure_file,
    input_spec,
    pixels,
    share,
    share_below_one,
)
from analysis.commands.command_line import OneLineParser, run_command, run_main
from analysis.reports.predict import (
    DEFAULT_BASIS_BATCHES,
    DEFAULT_BATCH,
    DEFAULT_EPSILON,
    DEFAULT_METHODS,
    DEFAULT_PROTECTED,
    cost,
    is_torch_module,
    made_by,
    predict,
    predict_torch,
)
from analysis.reports.prediction import Prediction
from analysis.steps.methods import check_methods_heed, chosen_methods
from analysis.steps.register import add_settings, listed
from analysis.steps.settings import KNOWN, Settings

if TYPE_CHECKING:
    from analysis.reports.torch_report import TorchPrediction

__all__ = ["Prediction", "cost", "main", "parser", "predict"]

OF_TORCH = ("loss", "freeze", "autocast")
NOT_OF_TORCH = (
    "convention", "dtype", "optimizer", "continual", "protected", "basis_batches", "engine", "data",
    "chunk",
)  # fmt: skip
"""Options that mean nothing for a module of PyTorch."""
PANELS = ("tape", "macs", "batch", "frontier")


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.cost_model",
        description="Predict what one training step keeps in memory and computes, layer by layer. Nothing is trained: "
        "the shapes of the net are enough. Bytes are counted in three ways: paper (the inputs of the layers that "
        "train, as in papers), pytorch (all that PyTorch's autograd saves), tape (all that this library keeps).\n\n"
        "Example: lance-ref cost --net mobilenetv2 --method bp lance",
        epilog=f"{listed()}\n\n{command_line.nets_and_data(False)}",
        allow_abbrev=False,
    )
    p.add_argument("--net", required=True, help=f"{NET_HELP}. A torch.nn.Module is measured as it is")
    p.add_argument("--batch", type=count, default=DEFAULT_BATCH, help="images of one training step")
    p.add_argument("--image-size", type=pixels, help="height and width in pixels (224 for most nets)")
    p.add_argument(
        "--input-shape", type=input_spec, action="append",
        help="shape of one input, as 3,32,32 or 784, in place of --image-size; for a module of PyTorch also "
        "[name=]shape[:dtype], once for each input",
    )  # fmt: skip
    p.add_argument("--num-classes", type=count, help="number of classes (1000, or what a function of yours has)")
    p.add_argument(
        "--loss",
        help="for a torch.nn.Module: pkg.module:function, which takes the output (cross-entropy, or the outputs' sum)",
    )
    p.add_argument(
        "--freeze", action="append", metavar="GLOB",
        help="for a torch.nn.Module: parameters of these names do not train; may be given several times",
    )  # fmt: skip
    p.add_argument("--autocast", choices=["bfloat16", "float16"], help="for a torch.nn.Module: dtype of torch.autocast")
    p.add_argument(
        "--tune",
        nargs="+",
        help="layers that train besides the classifier: last:4 for the last four, all, head for none, or names with * "
        "for any letters (last:4, or all of a net that has fewer)",
    )
    p.add_argument(
        "--method", "--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD",
        help="what to compare: names of the list below, or all (bp lance)",
    )  # fmt: skip
    p.add_argument(
        "--epsilon", type=share, default=DEFAULT_EPSILON,
        help="share of the squared values that compressed activations keep; ranks follow from measured spectra (0.7)",
    )  # fmt: skip
    p.add_argument(
        "--ranks",
        help="ranks in place of --epsilon: a fraction of every size, as 0.25, or layer=r1,r2,r3,r4;layer=..., where - "
        "leaves a size as it is (from spectra, else 0.25)",
    )  # fmt: skip
    add_settings(p)
    p.add_argument("--spectra", help="file that lance-ref spectra wrote (the one that comes with the package, if any)")
    p.add_argument(
        "--accounting", nargs="+", default=["paper", "pytorch", "tape"], choices=["paper", "pytorch", "tape"],
        help="ways of counting bytes that the table shows (all three)",
    )  # fmt: skip
    p.add_argument(
        "--convention", default="flops", choices=["flops", "paper"],
        help="multiply-adds: flops counts all; paper counts forward pass and weight gradient of the layers that train "
        "(flops)",
    )  # fmt: skip
    p.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="type of activations and weights")
    p.add_argument(
        "--optimizer", default="sgd", choices=["sgd", "sgd-momentum", "adam"],
        help="optimiser, whose state counts in the peak of memory",
    )  # fmt: skip
    p.add_argument(
        "--chunk", type=chunk,
        help="images that run at a time, or auto; only for methods whose step this does not change (the whole batch)",
    )  # fmt: skip
    p.add_argument(
        "--continual", type=few, metavar="T", help="also print the cost of learning T tasks one after the other"
    )
    p.add_argument(
        "--protected", type=share_below_one, metavar="SHARE",
        help="with --continual: share of each layer's directions that the last task leaves alone "
        f"({DEFAULT_PROTECTED})",
    )  # fmt: skip
    p.add_argument(
        "--basis-batches", type=count, metavar="N",
        help=f"with --continual: batches from which these directions are found ({DEFAULT_BASIS_BATCHES})",
    )  # fmt: skip
    p.add_argument(
        "--engine", default="library", choices=["library", "device"],
        help="device: also print the RAM of programs for a small device, which take one image at a time (library)",
    )  # fmt: skip
    p.add_argument("--format", default="table", choices=["table", "json", "csv"], help="format of the result (table)")
    p.add_argument(
        "--json", dest="format", action="store_const", const="json", default=argparse.SUPPRESS,
        help="the same as --format json",
    )  # fmt: skip
    p.add_argument("--wide", action="store_true", help="print all columns, and the products of every layer")
    p.add_argument("--output", type=any_file, help="write the result to this file (the terminal)")
    p.add_argument("--plot", type=figure_file, metavar="FILE", help="draw a figure into this file, .png or .svg")
    p.add_argument(
        "--panels",
        nargs="+",
        choices=PANELS,
        help=f"with --plot: what it shows ({' '.join(PANELS)}; tape and macs of a PyTorch module)",
    )
    p.add_argument(
        "--measure", action="store_true", help="run one real step and compare every number; exit code 1 if one differs"
    )
    p.add_argument("--data", type=data_set, help=f"with --measure: images. {cli.DATA_HELP} (digits)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from analysis.commands.console import emit
    from analysis.reports.tables import drawn

    _check(options)
    prediction: Any
    net, title = made_by(options.net, options.num_classes)
    of_torch = is_torch_module(net)
    prediction = _predict_torch(options, net, title) if of_torch else _predict(options, net, title)
    if options.plot is not None:
        from analysis.reports.plots import OF_REPORTS, draw

        draw(prediction, options.plot, options.panels or (OF_REPORTS if of_torch else PANELS))
    comparison = None
    if options.measure and of_torch:
        from analysis.check.torch_measure import compare_module

        comparison = compare_module(prediction)
    elif options.measure:
        from analysis.check.measure import compare

        comparison = compare(prediction, options.data, peaks=True)
    report = prediction.report
    draw_report = drawn(report, options.accounting, options.wide)
    if options.engine == "device":
        from analysis.device.beside import with_programs

        draw_report = with_programs(draw_report, prediction, chosen_methods(options.method), options.optimizer)
    emit(
        draw_report, {"json": report.json_text, "csv": report.csv_text},
        options.format, options.output,
    )  # fmt: skip
    if comparison is None:
        return 0
    print(comparison, file=sys.stdout if options.format == "table" or options.output else sys.stderr)
    return 0 if comparison.agrees else 1


def _check(options: argparse.Namespace) -> None:
    """Options that change nothing beside the others are refused before the work."""
    check_methods_heed(options, chosen_methods(options.method))
    check_effect(options, "data", options.measure, "--measure, for which it names images")
    check_effect(options, "panels", options.plot is not None, "--plot, of which it names panels")
    for name in ("protected", "basis_batches"):
        check_effect(options, name, options.continual is not None, "--continual")
    check_effect(options, "image_size", options.input_shape is None, "no --input-shape, which states height and width")
    check_effect(options, "accounting", options.format == "table", "--format table, of which it chooses columns")
    for name in ("accounting", "panels"):
        if getattr(options, name) is not None:
            check_once(options, name)
    check_effect(options, "engine", options.format == "table", "--format table, beneath which it prints")
    check_effect(options, "wide", options.format == "table", "--format table, whose columns it shows")
    if options.format == "csv":
        check_no_effect(options, ("continual", "calibration_batches"), "CSV has the rows of the layers alone")
        check_effect(options, "optimizer", options.measure, "--measure, or a format that has the peak of memory")


def _check_ranks(options: argparse.Namespace, prediction: Prediction) -> None:
    """Options about ranks that decided about no layer, once it is known where the ranks come from."""
    if not prediction.step.tuned_layers:
        check_no_effect(options, ("epsilon", "ranks", "spectra"), "no layer besides the head trains")
    choice = prediction.choice
    if choice is not None and not choice.by_energy:
        check_no_effect(options, ("epsilon", "spectra"), f"no rank is chosen by energy; ranks are from {choice.source}")


def _predict(options: argparse.Namespace, net: Any, title: str) -> Prediction:
    check_no_effect(options, OF_TORCH, "it is for modules of PyTorch")
    prediction = predict(
        net, options.batch, options.image_size,
        _one_shape(options.input_shape), options.num_classes,
        _tune(options),
        options.method, options.epsilon, options.ranks,
        options.spectra, options.convention, options.dtype,
        with_weights=options.measure or options.engine == "device",
        settings=Settings(**{name: getattr(options, name) for name in KNOWN}),
        continual=options.continual,
        protected=DEFAULT_PROTECTED if options.protected is None else options.protected,
        basis_batches=DEFAULT_BASIS_BATCHES if options.basis_batches is None else options.basis_batches,
        optimizer=options.optimizer,
        chunk=options.chunk, title=title,
    )  # fmt: skip
    _check_ranks(options, prediction)
    return prediction


def _predict_torch(options: argparse.Namespace, module: Any, title: str) -> TorchPrediction:
    from analysis.torch_modules.losses import load_loss

    check_no_effect(options, NOT_OF_TORCH, f"net {title!r} is a module of PyTorch")
    loss = None if options.loss is None else load_loss(options.loss)
    return predict_torch(
        module, title, options.batch, options.image_size, options.input_shape, options.num_classes, _tune(options),
        options.method, options.epsilon, options.ranks, options.spectra,
        settings=Settings(**{name: getattr(options, name) for name in KNOWN}),
        loss=loss, freeze=options.freeze or (), autocast=options.autocast,
    )  # fmt: skip


def _tune(options: argparse.Namespace) -> Any:
    return options.tune[0] if options.tune and len(options.tune) == 1 else options.tune


def _one_shape(specs: Sequence[InputSpec] | None) -> tuple[int, ...] | None:
    """The shape of the only input that networks of this library have."""
    if specs is None:
        return None
    if len(specs) > 1 or specs[0].name is not None or specs[0].dtype is not None or not specs[0].shape:
        raise ValueError("--input-shape has names, dtypes or several inputs, which are for modules of PyTorch alone")
    return specs[0].shape


if __name__ == "__main__":
    sys.exit(run_main(main))
