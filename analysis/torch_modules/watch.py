"""Watching PyTorch while a module trains for one step: every operation, and every tensor that autograd keeps.

An operation belongs to the module that runs it. In the backward pass PyTorch says which node of its graph runs; the
node has the number of the forward operation that made it, and that operation's module is known.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from analysis.torch_modules.kernels import run_on_shapes
from analysis.torch_modules.products import ACTIVATION, GRADIENTS, PRODUCTS, UNCOUNTED
from analysis.torch_modules.step import Seen, Storage

OWN_NAMESPACES = ("aten.", "prim.", "prims.", "profiler.", "_c10d_functional.")


class Watch:
    """What happened in one step of a module; :meth:`forward` and :meth:`backward` say which part runs.

    Parameters
    ----------
    module : torch.nn.Module
        A copy that nobody else uses: hooks are put on it and stay there.
    trained : collection of str
        Paths of the layers whose inputs are told apart from what else is kept.
    on_shapes : bool
        Whether tensors have no data, so that results are corrected as in :mod:`analysis.torch_modules.kernels`.
    """

    def __init__(self, module: Any, trained: Iterable[str], on_shapes: bool) -> None:
        self.on_shapes, self.trained = on_shapes, frozenset(trained)
        self.macs: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.itemsizes: dict[str, int] = {}  # of the trained layers' inputs
        self.uncounted: dict[str, None] = {}
        self._stack: list[str] = []
        self._in_backward = False
        self._names: dict[Any, str] = {}  # of operations, by the operation
        self._places: dict[int, str] = {}  # path of every node of the graph, by its number
        self._order: list[int] = []
        self._weighted: dict[int, bool] = {}  # whether a node multiplied with a weight
        # storages by identity: those of parameters and buffers, of what is computed from these alone, and of inputs
        self._own = {_identity(t): _storage(t) for t in (*module.parameters(), *module.buffers())}
        self._derived = dict(self._own)
        self._inputs: dict[tuple[str, int], Any] = {}
        self._kept: dict[int, Any] = {}
        self._holders: defaultdict[int, list[str]] = defaultdict(list)
        self._modules: dict[str, dict[str, Any]] = {}
        self._parameters: dict[str, int] = {}
        for path, part in module.named_modules():
            self._hook(path, part)

    # ---- modules -----------------------------------------------------------------------------------

    def _hook(self, path: str, part: Any) -> None:
        def before(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._stack.append(path)
            if self._in_backward:
                return
            seen = self._modules.setdefault(path, {"kind": type(part).__name__, "shapes": [], "outputs": []})
            seen["shapes"].append(next((tuple(t.shape) for t in tensors_in((args, kwargs))), ()))

        def after(_: Any, args: tuple[Any, ...], output: Any) -> None:
            if not self._stack or self._stack.pop() != path:
                raise RuntimeError(f"module {path!r} ended while another one ran, which threads of its own may do")
            if not self._in_backward:
                self._modules[path]["outputs"].append(next((tuple(t.shape) for t in tensors_in(output)), ()))

        own = sum(parameter.numel() for parameter in part.parameters(recurse=False))
        self._parameters[path] = own
        part.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        part.register_forward_hook(after, always_call=True)  # checkpoints stop a second pass by an exception

    @property
    def place(self) -> str:
        """Path of the module that runs."""
        return self._stack[-1] if self._stack else ""

    @contextmanager
    def inside(self, path: str) -> Iterator[None]:
        """What runs in the ``with`` block belongs to this path."""
        self._stack.append(path)
        try:
            yield
        finally:
            self._stack.pop()

    # ---- what is kept ------------------------------------------------------------------------------

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward pass, and the loss."""
        import torch

        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor))
            stack.enter_context(self._mode())
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The backward pass."""
        self._in_backward, self._order = True, sorted(self._places)
        with self._mode():
            yield

    def keep(self, tensor: Any) -> Any:
        """Called with every tensor that autograd keeps; gives it as it is."""
        path = self.place
        for part in _parts(tensor):
            key = _identity(part)
            self._kept.setdefault(key, _storage(part))
            if path not in self._holders[key]:
                self._holders[key].append(path)
        return tensor

    def kept(self) -> tuple[Storage, ...]:
        """Every storage that autograd keeps, parameters and buffers left out, in order of the first to keep it."""
        return tuple(
            Storage(int(storage.nbytes()), tuple((path, (path, key) in self._inputs) for path in self._holders[key]))
            for key, storage in self._kept.items()
            if key not in self._own
        )

    def modules(self) -> tuple[Seen, ...]:
        """Every module that ran, in order of the first call."""
        return tuple(
            Seen(
                path, of["kind"], of["shapes"][0], (of["outputs"] or [()])[0], self._parameters[path], len(of["shapes"])
            )
            for path, of in self._modules.items()
        )

    def shapes(self, path: str) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes of input and output of a module, in all of its calls."""
        of = self._modules[path]
        return set(zip(of["shapes"], of["outputs"], strict=False))

    # ---- what is computed --------------------------------------------------------------------------

    def _mode(self) -> Any:
        from torch.utils._python_dispatch import TorchDispatchMode

        watch = self

        class Mode(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
            """Every operation comes through here, those of autograd included."""

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return watch._ran(self, func, args, kwargs or {})

        return Mode()

    def _ran(self, mode: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = self._names.get(func) or self._named(func)
        if name == "prim.device":
            return func(*args, **kwargs)
        if name == "(composite)":  # where no gradient is asked for, these arrive in one piece
            with mode:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = run_on_shapes(name, func, args, kwargs) if self.on_shapes else func(*args, **kwargs)
        self._account(name, args, kwargs, result)
        return result

    def _named(self, func: Any) -> str:
        import torch

        name = str(getattr(func, "overloadpacket", func))
        if isinstance(func, torch._ops.OpOverload) and name not in PRODUCTS and not name.startswith("prim."):
            in_pieces = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
            name = "(composite)" if in_pieces else name
        return self._names.setdefault(func, name)

    def _account(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        import torch

        again = self._in_backward and (bool(self._stack) or torch.is_grad_enabled())
        if self._in_backward and not again:
            self._account_gradient(name, args)
            return
        number = torch.autograd._get_sequence_nr() - 1
        path = self._stack[-1] if self._stack else self._place() if again else ""
        self._places.setdefault(number, path)
        if again:
            self._order = []  # the places that are known have changed
        tensors = list(tensors_in((args, kwargs)))
        if tensors and all(_identity(tensor) in self._derived for tensor in tensors):
            self._derived.update((_identity(each), _storage(each)) for each in tensors_in(result))
        if name not in PRODUCTS:
            if name in UNCOUNTED or not name.startswith((*OWN_NAMESPACES, "(")):
                self.uncounted.setdefault(name)
            return
        self.macs[path, "recompute" if again else "forward"] += PRODUCTS[name](args)
        self._weighted.setdefault(number, any(_identity(tensor) in self._derived for tensor in tensors))
        if path in self.trained and name in ACTIVATION:
            x = args[ACTIVATION[name]]
            self._inputs[path, _identity(x)] = _storage(x)
            self.itemsizes[path] = x.element_size()

    def _account_gradient(self, name: str, args: Sequence[Any]) -> None:
        if name in GRADIENTS:
            path = self._place()
            for kind, macs in GRADIENTS[name](args).items():
                if macs:
                    self.macs[path, kind] += macs
        elif name in PRODUCTS:
            with_weight = any(_identity(tensor) in self._derived for tensor in tensors_in(args))
            kind = "grad_weight" if self._weighted.get(self._number(), False) and not with_weight else "grad_input"
            self.macs[self._place(), kind] += PRODUCTS[name](args)

    def _number(self) -> int:
        """Of the node of the graph that runs; of one that no operation made, the nearest before it."""
        import torch

        node = torch._C._current_autograd_node()
        if node is None:
            return -1
        number = int(node._sequence_nr())
        if number in self._places:
            return number
        if not self._order:
            self._order = sorted(self._places)
        at = bisect_right(self._order, number)
        return self._order[at - 1] if at else -1

    def _place(self) -> str:
        return self._places.get(self._number(), "")


def _storage(tensor: Any) -> Any:
    return tensor.untyped_storage()


def _identity(tensor: Any) -> int:
    """The same for all views of one storage, as long as somebody holds the storage."""
    return int(tensor.untyped_storage()._cdata)


def _parts(tensor: Any) -> tuple[Any, ...]:
    """The dense tensors of which a tensor consists: itself, for most; none where there is only a place for one."""
    if tensor is None:
        return ()
    if tensor.is_sparse:
        return tensor._indices(), tensor._values()
    return (tensor,)


def tensors_in(value: Any) -> Iterator[Any]:
    """All tensors with a storage, in order, in lists and dictionaries too."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
