"""The step of a PyTorch module by this library's own operations: every function that runs there runs here as well.

PyTorch hands each function that a module calls to :class:`Translation`, which runs its counterpart
(:data:`lance_ref.convert.functions.FUNCTIONS`, the table of :func:`lance_ref.from_torch`) on tensors of ours, of the
same shapes. What needs no gradient and has no counterpart becomes a constant of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.torch_modules.watch import tensors_in
from lance_ref import functional as F
from lance_ref.convert.functions import FUNCTIONS
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.recording import OpRecord, Recorder, Value
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Parameter

if TYPE_CHECKING:
    from analysis.torch_modules.watch import Watch
    from lance_ref.stores import ActivationStore

    Stores = Mapping[str, tuple[ActivationStore, tuple[int, ...]]]


class TranslationError(ValueError):
    """Why a step has no counterpart in this library, in a clause."""


def _same(x: Any, *_: Any, **__: Any) -> Any:
    """What changes no number; another dtype, or a gradient cut off, is found by comparison with PyTorch's result."""
    return x


METHODS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("to", "float", "double", "type_as", "clone", "detach", "data", "requires_grad"), _same),
    "T": lambda x: F.permute(x, range(x.ndim)[::-1]), "mT": lambda x: F.transpose(x, -2, -1),
    "rsub": lambda x, other: other - x, "reciprocal": lambda x: 1 / x,
    **dict.fromkeys(("rdiv", "rtruediv"), lambda x, other: other / x),
}  # fmt: skip
"""Methods and operators of PyTorch's tensors that a traced graph does not show, beside :data:`FUNCTIONS`."""
WITH_INTEGERS = frozenset(
    ("embedding", "where", "masked_fill", "scaled_dot_product_attention", "cross_entropy", "getitem")
)
"""Functions that take tensors of integers or Booleans beside floating ones."""
COMPRESSED = frozenset(("linear", "conv2d", "addmm"))
"""Functions of the layers that methods compress."""
WITH_NUMBERS = frozenset(("add", "sub", "mul", "div", "truediv"))
"""Functions whose integers become floating numbers, as they do in PyTorch: constants of the step."""
LISTED = 4
"""Reasons that are told."""


class Translation:
    """The functions of one forward pass, run by this library's operations.

    Parameters
    ----------
    module : torch.nn.Module
        Its parameters become parameters, and its floating buffers parameters that do not train.
    inputs : sequence of torch.Tensor
        That need gradients, if any does.
    watch : Watch
        Knows which module runs.
    real : bool
        Whether our tensors have numbers: those of PyTorch's.
    stores : mapping of str to (ActivationStore, tuple of int), optional
        By path of a layer: what is kept of its input, and in which shape methods see that. Default: every input is kept
        as it is.

    Attributes
    ----------
    records : list of OpRecord
        What ran.
    missing : dict of str to list of str
        Why there is no translation, each reason with the places in which it was found; empty where there is one.
    """

    def __init__(
        self, module: Any, inputs: Sequence[Any], watch: Watch, real: bool, stores: Stores | None = None
    ) -> None:
        self.watch, self.real, self.stores = watch, real, stores or {}
        self.missing: defaultdict[str, list[str]] = defaultdict(list)
        self._recorder = Recorder({})
        self.records: list[OpRecord] = self._recorder.records
        # by identity of a tensor: itself, ours, and how often it had been written into then
        self._known: dict[int, tuple[Any, Tensor, int]] = {}
        self._looks: defaultdict[int, set[int]] = defaultdict(set)  # by storage: the floating tensors that are known
        self._alive: list[Any] = []  # whose identity nobody else may get
        self._own: set[int] = set()
        try:
            for tensor in (*module.parameters(), *module.buffers()):
                self._own.add(id(tensor))
                self._enter(tensor, self._parameter(tensor) if tensor.is_floating_point() else self._constant(tensor))
            for tensor in inputs:
                if tensor.requires_grad:
                    self._enter(tensor, self._constant(tensor).requires_grad_())
        except TranslationError as error:
            self.missing.setdefault(str(error), [])

    # ---- listening -----------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the ``with`` block every function of PyTorch runs here, too."""
        from torch.overrides import TorchFunctionMode

        translation = self

        class Mode(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return translation._ran(func, args, kwargs or {})

        before = state.recorder, state.path, state.module_paths
        state.recorder, state.module_paths = self._recorder, {}  # layers made here run under the path that is set
        try:
            with Mode():
                yield
        finally:
            state.recorder, state.path, state.module_paths = before

    def _ran(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = name_of(func)
        function = METHODS.get(name) or FUNCTIONS.get(name)
        tensors = list(tensors_in((args, kwargs)))
        versions = [tensor._version for tensor in tensors]
        try:  # before the function runs, which may write into what it is given
            given = None if self.missing or function is None else self._ours((args, kwargs))
        except TranslationError as error:
            given = error
        result = func(*args, **kwargs)
        if name == "requires_grad":  # of a leaf, whose switch is looked at where it is used
            return result
        results = list(tensors_in(result))
        written = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
        try:
            if any(tensor.requires_grad for tensor in (*results, *written) if id(tensor) not in self._own):
                self._differentiable(name, function, given, result, written)
            elif getattr(func, "__name__", "") == "__set__":
                raise TranslationError(f".{name} of a tensor is set")
            else:
                for tensor in written:
                    self._forget(tensor)
                floating = all(t.is_floating_point() for t in (*tensors, *results))
                if results and floating and function is not None and isinstance(given, tuple):
                    self._constants(function, given, result)
        except TranslationError as error:
            self.missing[str(error)].append(self.watch.place or "the module itself")
        return result

    def _differentiable(self, name: str, function: Any, given: Any, result: Any, written: Sequence[Any]) -> None:
        """A function whose result has a gradient: its counterpart runs, and must give the same shapes."""
        if function is None:
            raise TranslationError(f"{name} has no counterpart among this library's operations")
        if self.missing:
            return
        if isinstance(given, TranslationError):
            raise TranslationError(f"{name}: {given}")
        self._check_hooks()
        args, kwargs = given
        integers = [t.dtype for t in _ours_in(given) if t.dtype.kind != "f"]
        if integers and name in WITH_NUMBERS:
            dtype = next(t.dtype for t in _ours_in(given) if t.dtype.kind == "f")
            args, kwargs = (_floating(each, dtype) for each in given)
        elif integers and name not in WITH_INTEGERS:
            raise TranslationError(f"{name} takes a tensor of {integers[0]}, expected floating numbers")
        other = [t for t in written if t is not result and id(t) not in self._own]
        if other:
            raise TranslationError(f"{name} writes into a tensor that is not its result")
        try:
            made = self._compressed(name, function, args, kwargs)
        except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise TranslationError(f"{name}: {' '.join(str(error).split())}") from None
        self._pair(made, result, name)

    def _constants(self, function: Any, given: Any, result: Any) -> None:
        """The same for what needs no gradient; where there is no counterpart, the result is a constant later on."""
        count = len(self.records)
        try:
            self._pair(self._run(function, *given), result, "it")
        except Exception:  # arguments that our function does not take: then it is none of ours
            del self.records[count:]

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        import torch

        state.path = self.watch.place
        with nullcontext() if torch.is_grad_enabled() else no_grad():
            return function(*args, **kwargs)

    def _compressed(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """The same with the store of the layer that runs, if it has one, and its input as methods see it."""
        store, shape = self.stores.get(self.watch.place, (None, ())) if name in COMPRESSED else (None, ())
        if store is None:
            return self._run(function, args, kwargs)
        if name == "addmm":
            bias, x, weight = args
            return self._run(F.linear, (F.reshape(x, shape), F.transpose(weight, 0, 1), bias), {"store": store})
        x, *others = args
        return self._run(function, (F.reshape(x, shape), *others), {**kwargs, "store": store})

    def _check_hooks(self) -> None:
        import torch

        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks[0] != self.watch.keep:
            raise TranslationError("it runs under hooks on what autograd keeps, as torch.utils.checkpoint sets them")

    # ---- tensors -------------------------------------------------------------------------------

    def of(self, tensor: Any) -> Tensor:
        """Our tensor in the place of one of PyTorch's.

        Raises TranslationError for one that nobody knows and that needs a gradient, or that changed behind our back.
        """
        known = self._known.get(id(tensor))
        if known is not None and known[2] != tensor._version:
            if id(tensor) in self._own:
                self._enter(tensor, known[1])
            elif tensor.requires_grad:
                raise TranslationError("a tensor was written into through another one that looks at its memory")
            else:
                self._forget(tensor)
                known = None
        if known is None:
            if tensor.requires_grad:
                raise TranslationError(_from_nowhere(tensor))
            strided = str(tensor.layout) == "torch.strided"
            if tensor.is_floating_point() and strided and self._looks[_storage(tensor)]:
                raise TranslationError("a constant looks at memory that another tensor looks at as well")
            self._enter(tensor, self._constant(tensor))
        found = self._known[id(tensor)][1]
        if found.requires_grad != tensor.requires_grad:
            if not tensor.is_leaf or not found.is_leaf:
                raise TranslationError(_from_nowhere(tensor))
            found.requires_grad_(bool(tensor.requires_grad))
        return found

    def value_of(self, tensor: Any) -> Value:
        """Our tensor as the records have it."""
        return self._recorder.value(self.of(tensor))

    def _ours(self, value: Any) -> Any:
        """The same arguments with our tensors in place of PyTorch's, in tuples, lists and dictionaries too."""
        import torch

        if isinstance(value, torch.Tensor):
            return self.of(value)
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(self._ours(each) for each in value)
        if isinstance(value, Mapping):
            return {name: self._ours(each) for name, each in value.items()}
        return value

    def _pair(self, made: Any, result: Any, name: str) -> None:
        """Our results stand in the places of PyTorch's from here on; one that is None has no counterpart."""
        import torch

        if isinstance(result, torch.Tensor) and isinstance(made, Tensor):
            if self.stores and made.shape != tuple(result.shape):  # of a linear layer on tokens
                made = F.reshape(made, tuple(result.shape))
            ours = made.shape, str(made.dtype), made.requires_grad
            theirs = tuple(result.shape), str(result.dtype).removeprefix("torch."), result.requires_grad
            if ours != theirs:
                kinds = [f"{shape} {dtype}{' with a gradient' * needed}" for shape, dtype, needed in (theirs, ours)]
                raise TranslationError(f"{name} gives {kinds[0]}, and its counterpart {kinds[1]}")
            self._enter(result, made)
        elif isinstance(result, (tuple, list)) and isinstance(made, (tuple, list)) and len(made) == len(result):
            for ours, theirs in zip(made, result, strict=True):
                self._pair(ours, theirs, name)
        elif made is not None and result is not None:
            raise TranslationError(f"{name} gives other results than its counterpart")

    def _enter(self, tensor: Any, ours: Tensor) -> None:
        self._known[id(tensor)] = tensor, ours, tensor._version
        if tensor.is_floating_point():
            self._looks[_storage(tensor)].add(id(tensor))

    def _forget(self, tensor: Any) -> None:
        """A constant that was written into is another one; what belongs to the module stays."""
        if id(tensor) in self._known and id(tensor) not in self._own:
            self._alive.append(self._known.pop(id(tensor))[0])
            self._looks[_storage(tensor)].discard(id(tensor))

    def _constant(self, tensor: Any) -> Tensor:
        name = str(tensor.dtype).removeprefix("torch.")
        if str(tensor.layout) != "torch.strided":
            raise TranslationError(f"a tensor is {tensor.layout}, expected a dense one")
        if (tensor.is_floating_point() and name not in ("float32", "float64")) or tensor.is_complex():
            raise TranslationError(f"a tensor has dtype {name}, expected float32 or float64")
        if self.real:
            return Tensor(np.array(tensor.detach().cpu().numpy(), order="C"))  # packed, as on shapes alone
        return Tensor.meta(tuple(tensor.shape), name)

    def _parameter(self, tensor: Any) -> Parameter:
        ours = self._constant(tensor)
        made = Parameter(ours.data) if self.real else Parameter.meta_parameter(ours.shape, ours.dtype)
        made.requires_grad_(bool(tensor.requires_grad))
        return made

    def why_not(self) -> str:
        """The reasons in one clause each, with the first place of each; empty where there is a translation."""
        told = []
        for reason, places in list(self.missing.items())[:LISTED]:
            several = dict.fromkeys(places)
            more = f" and {len(several) - 1} more" if len(several) > 1 else ""
            told.append(f"{reason} (in {next(iter(several))}{more})" if several else reason)
        more = f"; and {len(self.missing) - LISTED} more" if len(self.missing) > LISTED else ""
        return "; ".join(told) + more


def name_of(func: Any) -> str:
    """What a function, method, operator or attribute of a tensor is called, without what says how it is written.

    Operators of other packages, and functions that are not PyTorch's, have the name of their package before them.

    >>> import operator
    >>> name_of(operator.__getitem__), name_of(len), name_of(name_of)
    ('getitem', 'len', 'analysis.torch_modules.translate.name_of')
    """
    name = str(getattr(func, "__name__", func))
    if isinstance(func, FunctionType) and func.__module__.partition(".")[0] != "torch":
        return f"{func.__module__}.{name}"
    if type(func).__module__ == "torch._ops":
        return str(func)
    if name in ("__get__", "__set__"):  # of an attribute, whose descriptor knows what it is called
        name = str(getattr(func.__self__, "__name__", name))
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _from_nowhere(tensor: Any) -> str:
    return (
        f"a tensor of shape {tuple(tensor.shape)} with a gradient comes from no function of PyTorch, but for instance "
        "from a torch.autograd.Function, compiled code, or a checkpoint"
    )


def _floating(value: Any, dtype: Any) -> Any:
    """Arguments with integers as floating numbers."""
    if isinstance(value, Tensor) and value.dtype.kind != "f":
        return Tensor.meta(value.shape, dtype) if value.is_meta else Tensor(value.data.astype(dtype))
    if isinstance(value, (tuple, list)):
        return type(value)(_floating(each, dtype) for each in value)
    return {name: _floating(each, dtype) for name, each in value.items()} if isinstance(value, Mapping) else value


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


def _ours_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _ours_in(each)
    elif isinstance(value, Mapping):
        yield from _ours_in(tuple(value.values()))
