"""Modules: parameters with names, and a forward pass that knows its own path."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from lance_ref.engine.state import state
from lance_ref.engine.tensor import FLOATS, Shape, Tensor
from lance_ref.fused.deferral import deferring

Self = TypeVar("Self", bound="Module")
_structure = itertools.count(1)
_latest_structure = 0  # changes whenever any module gains or loses a child


class _Walked:
    """What a walk through a module found, remembered until any module gains or loses a child.

    Attributes
    ----------
    structure : int
        The number of the structure that was walked through.
    below : list of (path, module)
        Every module below this one, each once.
    paths : dict of identity to path
        Of this module and those below.
    """

    __slots__ = ("below", "paths", "structure")

    def __init__(self) -> None:
        self.structure = 0
        self.below: list[tuple[str, Module]] = []
        self.paths: dict[int, str] = {}

    def __reduce__(self) -> tuple[type[_Walked], tuple[()]]:
        """A copy of a module has other modules below it, and must not take over what a walk through this one found."""
        return _Walked, ()


class Parameter(Tensor):
    """A tensor that a module owns: requires gradients, and is counted apart from the tape."""

    __slots__ = ()
    is_parameter = True

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)

    @staticmethod
    def meta_parameter(shape: Shape, dtype: Any = np.float32) -> Parameter:
        """A parameter with a shape and no data (see :func:`lance_ref.nn.init.shapes_only`)."""
        parameter = Parameter.__new__(Parameter)
        parameter._init_meta(shape, np.dtype(dtype))
        parameter.requires_grad_()
        return parameter


class Module:
    """Base class of all layers and networks; the names are PyTorch's.

    Assigning a :class:`Parameter` or a :class:`Module` to an attribute registers it. Call the
    module (not ``forward``) with an ndarray or a Tensor.
    """

    def __init__(self) -> None:
        self.__dict__["_parameters"] = OrderedDict()
        self.__dict__["_modules"] = OrderedDict()
        self.__dict__["_buffers"] = OrderedDict()
        self.__dict__["_pre_hooks"] = []
        self.__dict__["_walked"] = _Walked()
        self.training = True

    # ---- registration ----------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        registries = self.__dict__
        if "_modules" not in registries:
            raise AttributeError(f"call super().__init__() before setting {name!r} on a {type(self).__name__}")
        if not isinstance(value, (Parameter, Module)):
            if name in registries["_buffers"]:
                registries["_buffers"][name] = np.asarray(value)
                return
            if name not in registries["_parameters"] and name not in registries["_modules"]:
                super().__setattr__(name, value)  # properties of a subclass included
                return
        own = "_parameters" if isinstance(value, Parameter) else "_modules" if isinstance(value, Module) else None
        for registry in ("_parameters", "_modules", "_buffers"):  # whatever had this name before is replaced
            if registry != own and registries[registry].pop(name, None) is not None and registry == "_modules":
                _structure_changed()
        registries.pop(name, None)
        if isinstance(value, Parameter):
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._modules[name] = value
            _structure_changed()
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for registry in ("_parameters", "_modules", "_buffers"):
            if registry in own and name in own[registry]:
                return own[registry][name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        for registry in ("_parameters", "_modules", "_buffers"):
            if name in self.__dict__[registry]:
                del self.__dict__[registry][name]
                _structure_changed()
                return
        super().__delattr__(name)

    def register_buffer(self, name: str, array: np.ndarray) -> None:
        """Register an array that is saved with the module but never trained, such as running statistics."""
        self.__dict__.pop(name, None)
        self._buffers[name] = np.asarray(array)

    def add_module(self, name: str, module: Module) -> None:
        """Register a child under any name, for instance ``"0"``."""
        if not isinstance(module, Module):
            raise TypeError(f"module {name!r} is a {type(module).__name__}, expected a Module")
        setattr(self, name, module)

    # ---- walking ---------------------------------------------------------------------

    def named_modules(self, prefix: str = "", _seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        """(path, module) for this module and all below it, in order of registration, each once."""
        if not prefix and _seen is None:
            yield "", self
            yield from self._known_modules().below
            return
        seen = set() if _seen is None else _seen
        waiting: list[tuple[str, Module]] = [(prefix, self)]
        while waiting:
            path, module = waiting.pop()
            if module is not self and type(module).named_modules is not Module.named_modules:
                yield from module.named_modules(path, seen)  # it wraps another one
            elif id(module) not in seen:
                seen.add(id(module))
                yield path, module
                below = f"{path}." if path else ""
                waiting += [(below + name, child) for name, child in reversed(module._modules.items())]

    def modules(self) -> Iterator[Module]:
        for _, module in self.named_modules():
            yield module

    def children(self) -> Iterator[Module]:
        yield from self._modules.values()

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter), a shared parameter once, under its first name."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield (f"{path}.{name}" if path else name), parameter

    def parameters(self) -> Iterator[Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def named_buffers(self) -> Iterator[tuple[str, np.ndarray]]:
        for path, module in self.named_modules():
            for name, array in module._buffers.items():
                yield (f"{path}.{name}" if path else name), array

    def get_submodule(self, path: str) -> Module:
        """The module at a dotted path, ``""`` for this one."""
        module = self._named()
        for name in path.split(".") if path else []:
            child = module._child(name)
            if child is None:
                raise AttributeError(f"no module {path!r}: {type(module).__name__} has no child {name!r}")
            module = child._named()
        return module

    def set_submodule(self, path: str, module: Module) -> None:
        """Put another module in the place of the one at a dotted path, which has to be there."""
        self.get_submodule(path)
        above, _, name = path.rpartition(".")
        self.get_submodule(above).add_module(name, module)

    def _child(self, name: str) -> Module | None:
        """The module one step down a path."""
        return self._modules.get(name)

    def _named(self) -> Module:
        """The module that a path which ends here means: this one, or what it wraps without a name of its own."""
        return self

    # ---- state -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers by dotted name."""
        arrays = {name: parameter.data.copy() for name, parameter in self.named_parameters()}
        arrays.update((name, array.copy()) for name, array in self.named_buffers())
        return arrays

    def load_state_dict(self, state_dict: Mapping[str, np.ndarray], strict: bool = True) -> None:
        """Copy arrays into parameters and buffers; checks everything before it changes anything.

        Raises
        ------
        KeyError
            If names are missing or (with ``strict``) unexpected.
        ValueError
            If an array has another shape than the module's own.
        """
        parameters = dict(self.named_parameters())
        buffers = dict(self.named_buffers())
        own: dict[str, Any] = {**parameters, **buffers}
        missing = sorted(set(own) - set(state_dict))
        unexpected = sorted(set(state_dict) - set(own))
        if strict and (missing or unexpected):
            raise KeyError(f"state_dict does not fit: missing {missing}, unexpected {unexpected}")
        common = [name for name in own if name in state_dict]
        owners = {name: self.get_submodule(name.rpartition(".")[0]) for name in common}
        arrays = {n: owner.own_array(n.rpartition(".")[2], np.asarray(state_dict[n])) for n, owner in owners.items()}
        for name, array in arrays.items():
            if array.shape != own[name].shape:
                raise ValueError(f"state_dict[{name!r}] has shape {array.shape}, expected {own[name].shape}")
        for name, array in arrays.items():
            if name in parameters:
                parameters[name].data = array.astype(parameters[name].dtype)  # astype copies
            else:
                path, _, key = name.rpartition(".")
                owner = self.get_submodule(path)
                owner._buffers[key] = array.astype(buffers[name].dtype)

    def own_array(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array of a state dict in the shape in which this module keeps it; most keep it as it is."""
        return array

    def train(self: Self, mode: bool = True) -> Self:
        for module in self.modules():
            module.training = mode
        return self

    def eval(self: Self) -> Self:
        return self.train(False)

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def to(self: Self, dtype: Any) -> Self:
        """Convert all floating parameters and buffers to float32 or float64, in place."""
        dtype = np.dtype(dtype)
        if dtype not in FLOATS:
            raise TypeError(f"dtype is {dtype}, expected float32 or float64")
        for module in self.modules():
            for parameter in module._parameters.values():
                if parameter.is_meta:
                    parameter._dtype = dtype
                else:
                    parameter.data = parameter.data.astype(dtype)
                parameter.grad = None if parameter.grad is None else parameter.grad.astype(dtype)
            for name, array in module._buffers.items():
                if array.dtype in FLOATS:
                    module._buffers[name] = array.astype(dtype)
        return self

    # ---- running ---------------------------------------------------------------------

    def forward(self, *inputs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def register_forward_pre_hook(self, hook: Callable[[Module, tuple[Tensor, ...]], None]) -> Callable[[], None]:
        """Have ``hook(module, inputs)`` called before every forward; returns what removes it again."""
        self._pre_hooks.append(hook)
        return lambda: self._pre_hooks.remove(hook)

    def __call__(self, *inputs: Any) -> Tensor:
        if state.module_paths is None:
            with deferring():  # what it returns is computed when the block ends
                return self._call(inputs)
        return self._call(inputs)

    def _call(self, inputs: tuple[Any, ...]) -> Tensor:
        tensors = tuple([Tensor(x) if isinstance(x, np.ndarray) else x for x in inputs])
        outer_paths, outer_path = state.module_paths, state.path
        if outer_paths is None:
            state.module_paths = self._known_modules().paths
        paths = state.module_paths or {}
        state.path = paths.get(id(self), outer_path)
        try:
            if self._pre_hooks:
                for hook in tuple(self._pre_hooks):
                    hook(self, tensors)
            return self.forward(*tensors)
        finally:
            state.path, state.module_paths = outer_path, outer_paths

    def _known_modules(self) -> _Walked:
        """The modules below this one, and their paths."""
        walked = self._walked
        if walked.structure != _latest_structure:
            found = list(self.named_modules(_seen=set()))
            walked.below = [(path, module) for path, module in found if module is not self]
            walked.paths = {id(module): path for path, module in found}
            walked.structure = _latest_structure
        return walked

    # ---- printing --------------------------------------------------------------------

    def extra_repr(self) -> str:
        return ""

    def __repr__(self) -> str:
        if not self._modules:
            return f"{type(self).__name__}({self.extra_repr()})"
        lines = [f"  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self._modules.items()]
        return f"{type(self).__name__}({self.extra_repr()}\n" + "\n".join(lines) + "\n)"


def _structure_changed() -> None:
    global _latest_structure
    _latest_structure = next(_structure)
