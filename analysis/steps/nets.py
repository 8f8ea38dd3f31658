"""From a name on the command line to a net, and to the op records of one training step."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import numpy as np

import lance_ref
from analysis.commands.memory import check_memory
from analysis.commands.names import plain
from analysis.peak.lifetimes import Lifetimes, watched
from analysis.rules.loss import is_scores, loss_of, outputs_of
from analysis.rules.recompute import flatten
from lance_ref import models
from lance_ref.engine.recording import OpRecord
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import shapes_only
from lance_ref.nn.module import Module
from lance_ref.nn.selection import not_registered, weighted_layers

T = TypeVar("T")

DEFAULT_IMAGE_SIZE = 224
DEFAULT_NUM_CLASSES = 1000
"""Classes of built-in nets by default; a user's factory has a default of its own."""
DEFAULT_TUNE_LAYERS = 4
DEFAULT_TUNE = f"last:{DEFAULT_TUNE_LAYERS}"
MAX_WIDTH = 16
_NOT_THE_USERS = (
    *(f"{folder}{os.sep}" for folder in (*lance_ref.__path__, os.path.dirname(os.path.dirname(__file__)))),
    sysconfig.get_path("stdlib") + os.sep,
)


class CannotRunError(ValueError):
    """A net that does not run on an input of the shape that was asked for."""


@dataclass(frozen=True)
class TracedStep:
    """One training step of a net as its op records, the loss last."""

    net: Module  #: Tuned as asked for.
    name: str
    input_shape: tuple[int, ...]  #: Without the batch.
    num_classes: int  #: Outputs of the net; 0 where it does not give (batch, classes) and the loss is a sum.
    records: list[OpRecord]
    tuned_layers: tuple[str, ...]  #: Layers that train, the head left out.
    head: str | None  #: The classifier, which always trains.
    #: When the tensors of the forward pass are given back: the same for every batch size and selection.
    lifetimes: Lifetimes
    samples: int = 1
    #: What methods make of the step, by method and settings: made once (:meth:`remember`).
    derived: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave when it was first asked for this."""
        if key not in self.derived:
            self.derived[key] = make()
        found: T = self.derived[key]
        return found

    @property
    def batch(self) -> int:
        """Samples of the step."""
        return self.samples

    @property
    def dtype(self) -> str:
        """The dtype of the activations."""
        return self.records[-1].output.dtype


def input_shape_for(name: str, image_size: int | None, given: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of one input: what was given, else RGB of the image size, else what suits the net."""
    if given is not None:
        return tuple(given)
    if name.endswith(".onnx"):
        from analysis.onnx.file import input_shape, read_graph
        from analysis.onnx.net import check_operations

        graph = read_graph(name)
        check_operations(graph)  # who gives a shape for nothing has worked for nothing
        return input_shape(graph, image_size)
    if image_size is not None:
        return (3, image_size, image_size)
    base = name.partition("@")[0]
    return models.find(base).input_shape if base in models.names() else (3, DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE)


def build(name: str, num_classes: int | None, input_shape: tuple[int, ...], without_weights: bool) -> Module:
    """A built-in net, what ``pkg.module:factory`` returns, or the network in an ONNX file.

    A factory is called with ``num_classes=`` if that is given and it takes it, else with nothing; a Module of that name
    is taken as it is, and one of PyTorch is converted (:func:`lance_ref.from_torch`). ``mobilenetv2@0.35`` has 0.35
    times the channels. Without ``num_classes`` a built-in net has :data:`DEFAULT_NUM_CLASSES`; it is made for
    ``input_shape`` where it must be, and without weights its parameters have shapes only. Raises ValueError, in one
    line, where there is no such net or factory, the factory failed, what it returned is no Module, or parts of a module
    of PyTorch have no counterpart, which are all listed.
    """
    if name.endswith(".onnx"):
        from analysis.onnx.net import OnnxNet

        return OnnxNet(name, with_weights=not without_weights)
    if ":" in name:
        made = from_factory(name, num_classes)
        return converted(made, name) if is_torch_module(made) else made
    base, at, width = name.partition("@")
    if base not in models.names():
        known = ", ".join(models.names())
        raise ValueError(f"unknown net {name!r}, expected one of {known}, pkg.module:factory, or a file.onnx")
    options: dict[str, Any] = {"num_classes": DEFAULT_NUM_CLASSES if num_classes is None else num_classes}
    options |= models.NETS[base].options_for(input_shape)
    if at:
        options["width"] = _width(name, base, width)
    with shapes_only():
        net = models.create(base, **options)
    if without_weights:
        return net
    check_memory(sum(p.size * p.dtype.itemsize for p in net.parameters()), f"the weights of net {name!r}")
    return models.create(base, **options)


def _width(name: str, base: str, text: str) -> float:
    if not models.NETS[base].has_widths:
        several = [known for known, net in models.NETS.items() if net.has_widths]
        raise ValueError(f"net is {name!r}, but only {' and '.join(sorted(several))} come in several widths")
    try:
        width = float(text)
    except ValueError:
        width = math.nan
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"net is {name!r}, expected {base}@WIDTH with a number above 0, up to {MAX_WIDTH}")
    return width


def from_factory(name: str, num_classes: int | None) -> Any:
    """What ``pkg.module:factory`` gives: a network of this library, or one of PyTorch.

    Raises ValueError, in one line, where there is no such factory, it failed, or what it gave is neither.
    """
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"net is {name!r}, expected pkg.module:factory")
    if module_name.endswith(".py"):
        dotted = ".".join(PurePath(module_name).with_suffix("").parts)
        raise ValueError(f"net is {name!r}, expected the name of a module, not of its file: {dotted}:{factory_name}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules of the current folder
    try:
        factory: Any = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        hint = f"; {TORCH_HINT}" if getattr(error, "name", None) == "torch" else ""
        raise ValueError(f"net {name!r} cannot be imported: {said_by(error)}{hint}") from None
    except RAISED as error:
        raise ValueError(f"net {name!r}: importing {module_name} raised {said_by(error)}{place(error)}") from None
    net = factory
    if not isinstance(factory, Module) and not is_torch_module(factory):
        if not callable(factory):
            raise ValueError(f"net {name!r} is a {type(factory).__name__}, expected a function that returns a Module")
        try:
            takes = num_classes is not None and _takes_num_classes(factory)
            net = factory(num_classes=num_classes) if takes else factory()
        except RAISED as error:
            raise ValueError(f"net {name!r}: the factory raised {said_by(error)}{place(error)}") from None
    if is_torch_module(net):
        return net
    try:
        check_module(net, "the factory returned")
    except TypeError as error:
        raise ValueError(f"net {name!r}: {error}") from None
    return net


def converted(module: Any, name: str) -> Module:
    """A module of PyTorch as a net of this library; ValueError lists what has no counterpart."""
    try:
        return lance_ref.from_torch(module)
    except ValueError as error:
        raise ValueError(f"net {name!r}: {error}; `lance-ref cost` takes the module as it is") from None


TORCH_HINT = "PyTorch is not installed, which a torch.nn.Module needs: python -m pip install -e '.[torch]'"
RAISED = (Exception, SystemExit, GeneratorExit)
"""What code of a user may raise, all that is not meant for us (an interruption is)."""


def is_torch_module(net: Any) -> bool:
    """Whether this is a network of PyTorch; PyTorch itself is not asked, and need not be there."""
    return any((c.__module__, c.__name__) == ("torch.nn.modules.module", "Module") for c in type(net).__mro__)


def check_module(net: Any, came: str) -> None:
    """Raise TypeError unless this is a network of the library, with what all of them have; ``came`` says from where."""
    if is_torch_module(net):
        raise TypeError(
            f"{came} a torch.nn.Module ({type(net).__name__}), which `lance-ref cost` and analysis.cost() take as it "
            "is. Here a lance_ref.nn.Module is expected: export it with "
            "torch.onnx.export(net, (x,), 'net.onnx', training=torch.onnx.TrainingMode.TRAINING, "
            "do_constant_folding=False, dynamo=False) and give the file"
        )
    if not isinstance(net, Module):
        kind = f"the class {net.__name__}" if isinstance(net, type) else f"a {type(net).__name__}"
        raise TypeError(f"{came} {kind}, expected a lance_ref.nn.Module")
    for path, module in _modules_within(net):
        if not {"_modules", "_parameters", "_buffers"} <= set(vars(module)):
            raise TypeError(f"{came} a {type(module).__name__} whose __init__ does not call super().__init__(){path}")


def _modules_within(net: Module) -> list[tuple[str, Module]]:
    """The network, and the modules right below it."""
    return [("", net), *((f", in {name!r}", m) for name, m in vars(net).get("_modules", {}).items())]


def remark(net: Module) -> str:
    """What a reader of a table must know of the net itself, in a sentence; empty for most."""
    return str(getattr(net, "remark", ""))


SUM_OF_OUTPUTS = "the loss is the sum of all numbers of all outputs: this net does not give (batch, classes)"
"""What a report says where no cross-entropy is there."""


def _takes_num_classes(factory: Any) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def said_by(error: BaseException) -> str:
    try:
        text = plain(" ".join(str(error).split()))[:500]
    except Exception:  # an exception of a user that cannot even be shown
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(error: BaseException) -> str:
    """The line of the user's code that raised the error: the last one outside of our packages and installed ones."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*_NOT_THE_USERS, "<")) and "site-packages" not in frame.filename
    ]
    return f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""


def check_classes(name: str, asked: int | None, found: int) -> None:
    """Raise ValueError if another number of classes was asked for than the net gives."""
    if asked is not None and asked != found:
        raise ValueError(f"num_classes is {asked}, but net {name!r} gives {found}, whatever is asked for")


def trace_step(
    net: Module, name: str, input_shape: tuple[int, ...], batch: int, tune: str | Sequence[str] | None, dtype: str
) -> TracedStep:
    """Tune a net and trace its forward pass and loss, on shapes alone: cross-entropy, else the sum of outputs.

    Without a ``tune``, what the register of networks says trains: the last four layers, or all of a net that has fewer.

    Raises ValueError or TypeError if the selection fits nothing, the input does not fit the net, it gives no floating
    tensor, or parameters get gradients that ``net.parameters()`` does not give.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}, expected float32 or float64")
    if batch < 1 or not input_shape or min(input_shape) < 1:
        raise ValueError(f"batch is {batch} and input shape {input_shape}, expected positive integers")
    net.to(dtype)
    net.train()
    if tune is None:
        known = models.NETS.get(name.partition("@")[0])
        tune = DEFAULT_TUNE if known is None else known.tune
        if tune == DEFAULT_TUNE and len(weighted_layers(net)) <= DEFAULT_TUNE_LAYERS:
            tune = "all"
    tuning = lance_ref.tune(net, tune)
    records, classes, ends = step_records(net, name, input_shape, batch, dtype)
    _check_registered(net, name, records)
    if not records[-1].output.requires_grad:
        raise ValueError(f"net {name!r}: nothing that the loss depends on is trained by tune {tune!r}")
    return TracedStep(net, name, input_shape, classes, records, tuning.layers, tuning.head, ends, batch)


def _check_registered(net: Module, name: str, records: Sequence[OpRecord]) -> None:
    """Raise ValueError if parameters get gradients and are not the net's: their layers are somewhere it cannot see."""
    known = {parameter for parameter, _ in net.named_parameters()}
    used = [value for record in flatten(records) if record.output.requires_grad for value in record.inputs]
    stray = {v.id: v.shape for v in used if v.parameter is not None and v.requires_grad and v.parameter not in known}
    if stray:
        raise ValueError(f"net {name!r} computes with {not_registered(list(stray.values()))}")


class Traced(NamedTuple):
    """A forward pass and its loss: the records, the number of classes (0: none), and when tensors are given back."""

    records: list[OpRecord]
    classes: int
    lifetimes: Lifetimes


def step_records(net: Module, name: str, input_shape: tuple[int, ...], batch: int, dtype: str) -> Traced:
    """Trace a forward pass and its loss (:func:`analysis.rules.loss.loss_of`), on shapes alone.

    Raises
    ------
    CannotRunError
        If the input does not fit the net.
    ValueError
        If it gives no floating tensor.
    """
    x = Tensor.meta((batch, *input_shape), getattr(net, "input_dtype", dtype))
    labels = Tensor.meta((batch,), np.int64)
    with watched(net) as watcher:
        try:
            logits = net(x)
        except RAISED as error:  # a user's forward() may raise anything
            words = str(error) if isinstance(error, (ValueError, TypeError, RuntimeError)) else said_by(error)
            raise CannotRunError(
                f"net {name!r} cannot run on an input of shape {(batch, *input_shape)}: {words}{place(error)}"
            ) from None
        if not outputs_of(logits):
            raise ValueError(f"net {name!r} gives a {type(logits).__name__}, expected floating Tensors")
        classes: int = logits.shape[1] if is_scores(logits, batch) else 0
        loss = loss_of(logits, labels)
        del logits
        ends = dict(watcher.ends)  # before the input, the labels and the loss go
    del loss
    return Traced(watcher.records, classes, ends)
