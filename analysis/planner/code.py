"""Python that runs a candidate, to be pasted: the net, what trains, how it is kept, and the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.planner.options import Option

if TYPE_CHECKING:
    from analysis.planner.search import Candidate, Plan

STORES = {
    "int8": "Quantized(8)",
    "int4": "Quantized(4)",
    "sketch": "Sketch({ratio!r})",
    "gradient-filter": "GradientFilter({patch!r})",
}
CALIBRATED = {"lance": "", "lance-mean-free": "mean_free=True", "lance-center": "center=True"}
PLAIN = ("bp", "head-only", "bias-only", "micro-batch")
OPTIMIZERS = {
    "sgd": "SGD(trained, lr=0.05)",
    "sgd-momentum": "SGD(trained, lr=0.05, momentum=0.9)",
    "adam": "Adam(trained, lr=1e-3)",
}


def code_for(
    candidate: Candidate,
    plan: Plan,
    net: str,
    input_shape: tuple[int, ...],
    classes: int,
    dtype: str,
    optimizer: str,
) -> str:
    """A script that runs a candidate of a plan; empty for a method that it is not written for.

    ``input_shape`` is without the batch. Images and labels are random numbers there, to be replaced. The script of a
    built-in network imports nothing but ``lance_ref``.
    """
    option = candidate.option
    made = _net(net, input_shape, classes)
    train = _device(candidate, input_shape, optimizer) if option.update else _library(candidate, optimizer)
    if not train:
        return ""
    images = max(candidate.batch, 8) if option.update else candidate.batch
    lines = [
        "import numpy as np",
        "import lance_ref",
        *_imports(option),
        *(["from analysis.steps.nets import build"] if made.startswith("build") else []),
        "",
        "# with random weights: use pretrained=True, or your own weights" if made.startswith("lance") else "",
        f"net = {made}",
        *([f"net.to(np.{dtype})"] if dtype != "float32" else []),
        f"lance_ref.tune(net, {_selection(candidate, plan)})",
        "# put your own images and labels here, in the scale that the net expects",
        "rng = np.random.default_rng(0)",
        f"shape = ({images}, {', '.join(map(str, input_shape))})",
        f"images = rng.normal(size=shape).astype(np.{dtype})",
        f"labels = rng.integers(0, {classes}, {images})",
        "",
        *train,
    ]
    return "\n".join(lines) + "\n"


def _net(name: str, input_shape: tuple[int, ...], classes: int) -> str:
    from lance_ref import models

    base, _, width = name.partition("@")
    if base not in models.names():
        return f"build({name!r}, None, {input_shape}, without_weights=False)"
    given = [f'"{base}"', f"num_classes={classes}", *([f"width={width}"] if width else [])]
    if len(input_shape) == 1:
        given.append(f"in_features={input_shape[0]}")
    elif input_shape[0] != 3:
        given.append(f"in_channels={input_shape[0]}")
    return f"lance_ref.models.create({', '.join(given)})"


def _selection(candidate: Candidate, plan: Plan) -> str:
    n = candidate.layers
    paths = candidate.paths or (plan.paths[-n:] if n and plan.every and plan.paths != plan.every else ())
    selection = f'"last:{n}"' if n else '"head"'
    if paths:
        lines = "".join(f"    {path!r},\n" for path in paths)
        selection = f"[\n{lines}]"
    return selection + (', parameters="bias"' if candidate.option.method == "bias-only" else "")


def _imports(option: Option) -> list[str]:
    if option.method in STORES:
        return [f"from lance_ref.stores import {STORES[option.method].partition('(')[0]}"]
    return ["from lance_ref import device"] if option.update else []


def _library(candidate: Candidate, optimizer: str) -> list[str]:
    option = candidate.option
    lines = []
    if option.method in CALIBRATED:
        told = [f"epsilon={option.epsilon:g}"] if option.epsilon is not None else []
        told += ['modes=("channel", "height", "width")'] if option.by_image else []
        told += [CALIBRATED[option.method]] if CALIBRATED[option.method] else []
        batches = "[images]" if candidate.at_a_time == candidate.batch else f"[images[:{candidate.at_a_time}]]"
        if option.elsewhere:
            lines.append("# on another machine, or from a file: calibration.save(name), Calibration.load(name)")
        lines += ["calibration = lance_ref.calibrate(", f"    {', '.join(['net', batches, *told])},", ")"]
        if option.fraction is not None:
            lines += [
                f"share = {float(option.fraction):g}  # of each mode",
                "shapes = {path: calibration[path].shape for path in calibration}",
                "ranks = {p: [int(np.ceil(share * n)) for n in of] for p, of in shapes.items()}",
                *(["ranks = {p: [None, *of[1:]] for p, of in ranks.items()}"] if option.by_image else []),
                "calibration = calibration.with_ranks(ranks)",
            ]
        more = f", core_bits={option.core_bits}" if option.core_bits else ""
        more += ', update="subspace"' if option.in_subspace else ""
        lines.append(f"lance_ref.compress(net, calibration{more})")
    elif option.method in STORES:
        store = STORES[option.method].format(ratio=option.settings.ratio, patch=option.settings.patch)
        lines.append(f"lance_ref.attach(net, lambda path, layer: {store})")
    elif option.method not in PLAIN:
        return []
    part = option.settings.micro_batch if option.method == "micro-batch" else candidate.at_a_time
    step = ["loss = lance_ref.F.cross_entropy(net(images), labels)", "loss.backward()"]
    if part is not None and part < candidate.batch:
        step = [
            f"for start in range(0, {candidate.batch}, {part}):",
            f"    part = slice(start, start + {part})",
            "    loss = lance_ref.F.cross_entropy(net(images[part]), labels[part])",
            f"    (loss * {part / candidate.batch!r}).backward()",
        ]
    return [
        *lines,
        "trained = [p for p in net.parameters() if p.requires_grad]",
        f"optimizer = lance_ref.optim.{OPTIMIZERS[optimizer]}",
        "for step in range(2):  # over the batches of your data",
        *(f"    {line}" for line in ("optimizer.zero_grad()", *step, "optimizer.step()")),
    ]


def _device(candidate: Candidate, input_shape: tuple[int, ...], optimizer: str) -> list[str]:
    option = candidate.option
    lines, more = [], [f'update="{option.update}"']
    if option.method == "lance":
        n = option.directions
        mean_free = ", mean_free=True" if input_shape[0] > 1 else ""  # nothing is left of one channel
        lines = [
            f'options = dict(modes=("channel",){mean_free})',
            "calibration = lance_ref.calibrate(net, [images], **options)",
            "ranks = {",
            f"    path: (None, {n}, *[None] * (len(calibration[path].shape) - 2))",
            f"    for path in calibration if calibration[path].shape[1] > {n}",
            "}",
            "calibration = calibration.with_ranks(ranks)",
            "calibration = {path: calibration[path] for path in ranks}",
        ]
        more = ["calibration", f"input_shape={input_shape}", *more]
    else:
        method = {"bp": "bp", "bias-only": "bias", "head-only": "head"}[option.method]
        more = [f"input_shape={input_shape}", *more, f'method="{method}"']
    if optimizer == "sgd-momentum":
        more.append("momentum=0.9")
    lines += [
        "program = device.compile(",
        *(f"    {argument}," for argument in ("net", *more, f"budget={candidate.memory.total}")),
        ")",
        'print(f"{program.ram_bytes:,} bytes of RAM")',
        "for step in range(2):  # over the batches of your data",
        "    program.step(images, labels, lr=0.004)",
        "program.load_into(net)",
    ]
    return lines
