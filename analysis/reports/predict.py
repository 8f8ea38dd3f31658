"""What one training step of a net keeps and computes: :func:`cost` gives the report, :func:`predict` also its parts.

Nothing runs: the net is traced on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from analysis.commands.names import shown
from analysis.reports.prediction import Asked, Prediction, predict_step
from analysis.steps.methods import chosen_methods
from analysis.steps.settings import Settings

if TYPE_CHECKING:
    from analysis.reports.report import Continual, Report
    from analysis.reports.torch_report import TorchPrediction
    from analysis.steps.nets import TracedStep
    from analysis.torch_modules.inputs import Spec
    from lance_ref.nn.module import Module

DEFAULT_METHODS = ("bp", "lance")
DEFAULT_BATCH = 128
DEFAULT_EPSILON = 0.7
MOST_TASKS = 1000
DEFAULT_PROTECTED = 0.5
DEFAULT_BASIS_BATCHES = 10
LARGEST = 2**31 - 1
"""The largest count of any kind; a larger one is a slip of the keyboard."""
TorchModule = Any
"""A torch.nn.Module; PyTorch need not be there."""


def cost(
    net: str | Module | TracedStep | TorchModule,
    *,
    batch: int | None = None,
    method: str | Sequence[str] | None = None,
    image_size: int | None = None,
    input_shape: Spec | Sequence[Spec] | None = None,
    num_classes: int | None = None,
    tune: str | Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    epsilon: float = 0.7,
    ranks: str | None = None,
    spectra: str | None = None,
    convention: str = "flops",
    dtype: str | None = None,
    continual: int | None = None,
    protected: float = DEFAULT_PROTECTED,
    basis_batches: int = DEFAULT_BASIS_BATCHES,
    optimizer: str = "sgd",
    chunk: int | str | None = None,
    inputs: Any = None,
    loss: Callable[[Any], Any] | None = None,
    freeze: Sequence[str] = (),
    autocast: str | None = None,
    **settings: Any,
) -> Report:
    """The cost of one training step: what ``python -m analysis.cost_model`` prints, as a value.

    Parameters
    ----------
    net : str, Module, TracedStep or torch.nn.Module
        A name of ``lance_ref.models.names()`` (``mobilenetv2@0.35``: of that width), ``pkg.module:factory``, or a net,
        which is tuned in place and left in training mode; or a step that was traced already
        (:func:`analysis.steps.nets.trace_step`). A module of PyTorch, given or made by a factory, stays as it is: its
        mode and its ``requires_grad`` say what is trained, and PyTorch says what that keeps.
    batch : int, optional
        Images of a step, 128 by default; a traced step has its own, and its own shapes, dtype and tuning.
    method : str or sequence of str, optional
        Names of :data:`analysis.steps.methods.METHODS`, or ``"all"``; "bp" and "lance" by default.
    num_classes : int, optional
        For names, 1000 by default, and for factories that take it; a net that has another number is an error.
    input_shape : sequence of int, optional
        (C, H, W) or (N,), without the batch; in place of ``image_size``. For a module of PyTorch also several inputs,
        each a shape or ``"[name=]shape[:dtype]"``.
    tune : str or sequence of str, optional
        As for :func:`lance_ref.tune`; by default the last four layers, or all of a net that has fewer.
    methods : sequence of str, optional
        The same as ``method``.
    epsilon : float
        Energy threshold in (0, 1], for ranks from spectra.
    ranks, spectra : str, optional
        A fraction or ``"layer=r1,r2,r3,r4;layer=…"``, or a file of spectra; see :mod:`analysis.ranks.choose`.
    convention : {"flops", "paper"}
        "paper": multiply-adds of forward and weight gradient of the tuned layers alone, the head left
        out, the projection billed B·C·H·W·Σr, the weight gradient in the papers' order.
    dtype : {"float32", "float64"}, optional
        A net is converted to it, in place; by default a net's own, and float32 for names.
    continual : int, optional
        T, at least 2: also bill learning T tasks one after the other (:mod:`analysis.reports.continual_bill`).
    protected : float
        Share in [0, 1) of each layer's directions that is protected while the last task is learned.
    basis_batches : int
        Batches from which protected directions are found.
    optimizer : {"sgd", "sgd-momentum", "adam"}
        Whose state and temporaries count at the peak of memory.
    chunk : int or "auto", optional
        Most images that go forward and backward at a time, as ``chunk`` of :func:`lance_ref.fit`. The batch of a method
        that mixes its images stays whole, and the report says so.
    inputs : tensor, tuple or dict, optional
        Of a module of PyTorch: an example, in place of ``input_shape`` and ``batch``.
    loss : callable, optional
        Of a module of PyTorch: from its output to one number. By default the module's own loss if the output has one,
        cross-entropy of a (batch, classes) output, else the sum of all outputs.
    freeze : sequence of str
        Of a module of PyTorch: globs of names of parameters that do not train.
    autocast : {"bfloat16", "float16"}, optional
        Of a module of PyTorch: the dtype of ``torch.autocast``.
    **settings
        Of the methods: :data:`analysis.steps.settings.KNOWN`.

    Raises
    ------
    ValueError, TypeError, LookupError, OSError
        In one line that names what came and what is allowed.

    Examples
    --------
    >>> report = cost("mobilenetv2", batch=64, tune="last:2", method="bp")
    >>> report.totals["bp"].activation_bytes["paper"]
    16056320
    """
    if method is not None and methods is not None:
        raise ValueError(f"method is {method!r} and methods are {methods!r}, expected one of them")
    asked = next((given for given in (method, methods) if given is not None), DEFAULT_METHODS)
    made, title = made_by(net, num_classes)
    if is_torch_module(made):
        check_no_option(continual=continual, dtype=dtype, chunk=chunk)
        return predict_torch(
            made, title, batch, image_size, input_shape, num_classes, tune, asked, epsilon, ranks, spectra,
            settings=Settings(**settings), inputs=inputs, loss=loss, freeze=freeze, autocast=autocast,
        ).report  # fmt: skip
    for name, value in (("inputs", inputs), ("loss", loss), ("freeze", freeze or None), ("autocast", autocast)):
        if value is not None:
            raise TypeError(f"{name} is for modules of PyTorch, and net is {shown(net)}")
    return predict(
        made, batch, image_size, input_shape, num_classes, tune, asked, epsilon, ranks, spectra,  # type: ignore[arg-type]
        convention, dtype, settings=Settings(**settings), continual=continual, protected=protected,
        basis_batches=basis_batches, optimizer=optimizer, chunk=chunk, title=title,
    ).report  # fmt: skip


def made_by(net: Any, num_classes: int | None) -> tuple[Any, str]:
    """What a ``pkg.module:factory`` gives, or the net itself, and what it is called."""
    from analysis.steps.nets import from_factory

    if not isinstance(net, str):
        return net, type(net).__name__
    return (net if net.endswith(".onnx") or ":" not in net else from_factory(net, num_classes)), net


def is_torch_module(net: Any) -> bool:
    """Whether this is a network of PyTorch."""
    from analysis.steps import nets

    return nets.is_torch_module(net)


def check_no_option(**given: Any) -> None:
    """Raise ValueError for an argument that means nothing for a module of PyTorch."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is {shown(value)}, which has no effect on a module of PyTorch")


def predict_torch(
    module: TorchModule,
    title: str,
    batch: int | None = None,
    image_size: int | None = None,
    input_shape: Spec | Sequence[Spec] | None = None,
    num_classes: int | None = None,
    tune: str | Sequence[str] | None = None,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    epsilon: float = DEFAULT_EPSILON,
    ranks: str | None = None,
    spectra: str | None = None,
    settings: Settings | None = None,
    inputs: Any = None,
    loss: Callable[[Any], Any] | None = None,
    freeze: Sequence[str] = (),
    autocast: str | None = None,
) -> TorchPrediction:
    """As :func:`cost`, for a module of PyTorch, with what a measurement needs beside the report."""
    from analysis.reports.torch_report import TorchAsked, predict_module
    from analysis.torch_modules.inputs import Asked as AskedInputs
    from analysis.torch_modules.inputs import read_specs
    from analysis.torch_modules.run import AUTOCAST, Run, check_torch

    check_torch()
    theirs = dict.fromkeys(("input_shape", "dtype", "continual")) | {"convention": "", "optimizer": ""}
    _check_types("", {**locals(), **theirs, "protected": DEFAULT_PROTECTED, "basis_batches": DEFAULT_BASIS_BATCHES})
    _check(Asked(epsilon, ranks, spectra))
    _check_positive(batch=batch, num_classes=num_classes, image_size=image_size)
    if isinstance(freeze, str):
        freeze = (freeze,)
    if autocast is not None and autocast not in AUTOCAST:
        raise ValueError(f"autocast is {shown(autocast)}, expected one of {', '.join(AUTOCAST)}")
    names = chosen_methods(methods if isinstance(methods, str) else list(methods))
    specs = read_specs(input_shape, image_size) if inputs is None or input_shape is not None else ()
    how = Run(AskedInputs.of(batch, specs, inputs, DEFAULT_BATCH), loss, tune, tuple(freeze), autocast)
    given = Settings() if settings is None else settings
    return predict_module(module, title, how, TorchAsked(names, epsilon, ranks, spectra, given, num_classes))


def predict(
    net: str | Module | TracedStep,
    batch: int | None = None,
    image_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    tune: str | Sequence[str] | None = None,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    epsilon: float = 0.7,
    ranks: str | None = None,
    spectra: str | None = None,
    convention: str = "flops",
    dtype: str | None = None,
    with_weights: bool = False,
    settings: Settings | None = None,
    continual: int | None = None,
    protected: float = DEFAULT_PROTECTED,
    basis_batches: int = DEFAULT_BASIS_BATCHES,
    optimizer: str = "sgd",
    chunk: int | str | None = None,
    title: str | None = None,
) -> Prediction:
    """As :func:`cost`, with what a measurement and the figures need beside the report."""
    _check_types(net, locals())
    asked = Asked(epsilon, ranks, spectra, convention, optimizer, Settings() if settings is None else settings, chunk)
    names = chosen_methods(methods if isinstance(methods, str) else list(methods))
    _check(asked)
    step = _step(net, batch, image_size, input_shape, num_classes, tune, dtype, with_weights, title)
    return predict_step(step, names, asked, _bill_tasks(step, continual, protected, basis_batches))


_INTEGERS = ("batch", "image_size", "num_classes", "continual", "basis_batches")
_TEXTS = ("ranks", "spectra", "convention", "dtype", "optimizer")


def _check_types(net: Any, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument of :func:`predict` of a kind that it cannot be, before anything is done with it.

    None means the default where there is one; a number of NumPy is as good as one of Python.
    """
    from numbers import Integral, Real

    from analysis.steps.nets import TracedStep, check_module

    if not isinstance(net, (str, TracedStep)):
        check_module(net, "net is")
    kinds: dict[str, tuple[Any, str]] = dict.fromkeys(_INTEGERS, (Integral, "an integer"))
    kinds |= dict.fromkeys(_TEXTS, (str, "a string")) | dict.fromkeys(("epsilon", "protected"), (Real, "a number"))
    optional = {"batch", "image_size", "num_classes", "continual", "ranks", "spectra", "dtype"}
    for name, (kind, expected) in kinds.items():
        value = arguments[name]
        if value is None and name in optional:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is {shown(value)}, a {type(value).__name__}, expected {expected}")
    for name, kind, expected in (
        ("input_shape", Integral, "integers"),
        ("tune", str, "strings"),
        ("methods", str, "strings"),
    ):
        value = arguments[name]
        if value is None or (isinstance(value, str) and kind is str):
            continue
        try:
            items = None if isinstance(value, (str, bytes, dict)) else list(value)
        except TypeError:
            items = None
        if items is None or any(not isinstance(each, kind) or isinstance(each, bool) for each in items):
            raise TypeError(f"{name} is {shown(value)}, a {type(value).__name__}, expected a sequence of {expected}")


def _check(asked: Asked) -> None:
    """Raise ValueError for what no net can have, before it is traced."""
    from analysis.reports.report import CONVENTIONS, OPTIMIZERS

    if asked.convention not in CONVENTIONS:
        raise ValueError(f"convention is {asked.convention!r}, expected one of {', '.join(CONVENTIONS)}")
    if not 0 < asked.epsilon <= 1:
        raise ValueError(f"epsilon is {asked.epsilon}, expected a number in (0, 1]")
    if asked.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {asked.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    if asked.chunk is not None:
        from lance_ref.train.chunks import check_chunk

        check_chunk(asked.chunk)


def _bill_tasks(step: TracedStep, tasks: int | None, protected: float, basis_batches: int) -> Continual | None:
    """The cost of learning ``tasks`` tasks; None where none were asked for."""
    if tasks is None:
        return None
    if not 1 <= tasks <= MOST_TASKS:
        raise ValueError(f"continual is {tasks}, expected a number of tasks from 1 to {MOST_TASKS}")
    from analysis.reports.continual_bill import bills
    from analysis.reports.report import Continual

    found = bills(step, tasks, protected, basis_batches=basis_batches)
    return Continual(tasks, protected, basis_batches, tuple(found))


def _step(
    net: str | Module | TracedStep,
    batch: int | None,
    image_size: int | None,
    input_shape: Sequence[int] | None,
    num_classes: int | None,
    tune: str | Sequence[str] | None,
    dtype: str | None,
    with_weights: bool,
    title: str | None = None,
) -> TracedStep:
    """The plain step: the given one, or the traced step of a net."""
    from analysis.steps.nets import DEFAULT_NUM_CLASSES, TracedStep, build, check_classes, input_shape_for, trace_step
    from lance_ref import models

    if isinstance(net, TracedStep):
        check_classes(net.name, num_classes, net.num_classes)
        own = {"batch": net.batch, "input_shape": net.input_shape, "dtype": net.dtype, "image_size": None, "tune": None}
        asked = {"batch": batch, "input_shape": input_shape, "dtype": dtype, "image_size": image_size, "tune": tune}
        for name, value in asked.items():
            if value is not None and (tuple(value) if name == "input_shape" else value) != own[name]:  # type: ignore[arg-type]
                raise ValueError(f"{name} is {value!r}, but the step of net {net.name!r} was traced already")
        return net
    _check_positive(batch=batch, num_classes=num_classes, image_size=image_size)
    if title is None:
        title = net if isinstance(net, str) else type(net).__name__
    shape = input_shape_for(title, image_size, input_shape)
    if isinstance(net, str) and net.partition("@")[0] in models.names() and not with_weights:
        asked_tune = tune if tune is None or isinstance(tune, str) else tuple(tune)
        asked_dtype = "float32" if dtype is None else dtype
        classes = DEFAULT_NUM_CLASSES if num_classes is None else num_classes
        return _named_step(net, classes, shape, DEFAULT_BATCH if batch is None else batch, asked_tune, asked_dtype)
    module = build(net, num_classes, shape, not with_weights) if isinstance(net, str) else net
    if dtype is None:
        dtype = (
            "float32"
            if isinstance(net, str) or ":" in title
            else str(next((p.dtype for p in net.parameters()), "float32"))
        )
    step = trace_step(module, title, shape, DEFAULT_BATCH if batch is None else batch, tune, dtype)
    check_classes(title, num_classes, step.num_classes)
    return step


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and not 1 <= number <= LARGEST:
            limit = f", at most {LARGEST}" if number > LARGEST else ""
            raise ValueError(f"{name} is {number}, expected a positive integer{limit}")


@lru_cache(maxsize=16)
def _named_step(
    name: str,
    num_classes: int,
    input_shape: tuple[int, ...],
    batch: int,
    tune: str | tuple[str, ...] | None,
    dtype: str,
) -> TracedStep:
    """The plain step of a net of ours, on shapes alone: traced once, the net left alone from then on."""
    from analysis.steps.nets import build, trace_step

    return trace_step(build(name, num_classes, input_shape, True), name, input_shape, batch, tune, dtype)
