"""The tests that every activation store has to pass, for the stores of this library and for those of other packages.

A test class inherits :class:`StoreTestCase` and says how its store is made; pytest finds the rest. Every test goes over
the same layers: convolutions with stride and padding, dilated, grouped, depthwise, of one place and of even kernels,
transposed ones and those of volumes, and linear layers of two and of three modes, each in float32 and float64, with
ranks of its own.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

import lance_ref
from analysis.peak.lifetimes import watched
from analysis.peak.memory import peak
from analysis.rules.account import account
from analysis.steps.methods import METHODS
from analysis.steps.settings import Settings, TunedLayer
from lance_ref import functional as F
from lance_ref.algebra.basis import Basis
from lance_ref.algebra.convolution import Convolution
from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.algebra.magnitude import NotFiniteError
from lance_ref.algebra.volumes import TransposedGeometry, VolumeGeometry
from lance_ref.engine.tensor import Tensor
from lance_ref.functional.convolution import Update
from lance_ref.nn.module import Module, Parameter
from lance_ref.stores import EXACT, ActivationStore

MAC_KINDS = ("forward", "grad_input", "grad_weight", "projection", "decomposition")
PEAK_SHARE = 0.05
"""The share by which the memory may exceed the prediction, because of Python's own objects."""

GEOMETRIES: Mapping[str, Geometry] = {
    "strided": ConvGeometry((6, 4, 9, 7), (5, 4, 3, 2), (2, 1), ((1, 1), (0, 1))),
    "dilated": ConvGeometry((5, 3, 9, 8), (4, 3, 3, 2), padding=((4, 4), (1, 0)), dilation=(4, 1)),
    "dilated and strided": ConvGeometry((3, 2, 11, 12), (4, 2, 2, 3), (1, 2), ((0, 2), (3, 1)), (2, 3)),
    "grouped": ConvGeometry((8, 6, 9, 7), (4, 3, 3, 2), (2, 1), ((1, 1), (0, 0)), groups=2),
    "depthwise": ConvGeometry((6, 8, 6, 5), (8, 1, 3, 3), padding=((1, 1), (1, 1)), groups=8),
    "depthwise, two outputs a channel": ConvGeometry((4, 3, 8, 7), (6, 1, 3, 2), (2, 3), ((1, 0), (0, 2)), groups=3),
    "pointwise": ConvGeometry((7, 6, 5, 4), (3, 6, 1, 1)),
    "pointwise, strided": ConvGeometry((5, 4, 6, 7), (6, 4, 1, 1), (2, 2)),
    "even kernel": ConvGeometry((4, 5, 8, 6), (7, 5, 2, 4), padding=((1, 0), (2, 1))),
    "kernel as large as the map": ConvGeometry((5, 3, 4, 3), (6, 3, 4, 3)),
    "map of many places": ConvGeometry((3, 4, 14, 12), (5, 4, 3, 3), padding=((1, 1), (1, 1))),
    "single image": ConvGeometry((1, 3, 5, 4), (2, 3, 2, 2), (1, 2)),
    "transposed": TransposedGeometry((6, 4, 5, 3), (4, 5, 4, 3), (2, 1), ((1, 1), (0, 0)), output_padding=(1, 0)),
    "transposed, grouped": TransposedGeometry((5, 6, 3, 4), (6, 2, 2, 3), (1, 3), dilation=(2, 1), groups=3),
    "transposed, of one channel": TransposedGeometry((4, 3, 6, 5), (3, 1, 3, 2), (2, 2), ((1, 1), (2, 2)), groups=3),
    "transposed, of one place": TransposedGeometry((4, 5, 3, 6), (5, 2, 1, 1)),
    "volumes": VolumeGeometry((4, 3, 5, 7, 6), (5, 3, 3, 2, 1), (2, 1, 1), ((1, 1), (0, 0), (1, 1))),
    "volumes, grouped": VolumeGeometry((3, 4, 6, 5, 4), (6, 2, 2, 3, 2), dilation=(2, 1, 1), groups=2),
    "volumes of one place": VolumeGeometry((2, 5, 3, 4, 6), (3, 5, 1, 1, 1)),
    "matrix": LinearGeometry((9, 7), (5, 7)),
    "wide matrix": LinearGeometry((4, 15), (3, 15)),
    "tall matrix": LinearGeometry((15, 4), (2, 4)),
    "tokens": LinearGeometry((6, 5, 7), (4, 7)),
    "many tokens": LinearGeometry((2, 11, 4), (3, 4)),
}
"""The layers of the tests by name; no two sizes of a layer are alike where that can be."""

LARGE: Mapping[str, Geometry] = {
    "large matrix": LinearGeometry((1200, 400), (32, 400)),
    "large convolution": ConvGeometry((16, 24, 28, 28), (20, 24, 3, 3), padding=((1, 1), (1, 1))),
    "large transposed": TransposedGeometry((16, 24, 16, 16), (24, 12, 4, 4), (2, 2), ((1, 1), (1, 1))),
    "large volumes": VolumeGeometry((8, 12, 8, 16, 16), (10, 12, 3, 3, 3), padding=((1, 1), (1, 1), (1, 1))),
}
"""Layers of which one activation takes more than a MiB, so that Python's own objects do not count."""


@dataclass(frozen=True)
class Case:
    """One layer of the tests."""

    name: str  #: A key of :data:`GEOMETRIES`, or of :data:`LARGE`.
    geometry: Geometry
    dtype: np.dtype[Any]
    ranks: tuple[int | None, ...]  #: One for each mode of the input: none, 1, half of the mode, or all of it.

    def layer(self) -> TunedLayer:
        """What a method is told of the layer; its random numbers are the same at every call."""
        rng = np.random.default_rng(0)
        return TunedLayer(self.name, self.geometry.input_shape, self.dtype, self.ranks, Settings(), rng)

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Activation, weight and output gradient."""
        rng, g = np.random.default_rng(seed), self.geometry
        x, weight, grad_output = (
            rng.standard_normal(shape).astype(self.dtype) for shape in (g.input_shape, g.weight_shape, g.output_shape)
        )
        return x, weight, grad_output

    def call(self, x: Tensor, weight: Tensor, store: ActivationStore, update: Update | None = None) -> Tensor:
        """The output of the layer."""
        g = self.geometry
        if isinstance(g, LinearGeometry):
            return F.linear(x, weight, store=store, update=update)
        if isinstance(g, (TransposedGeometry, VolumeGeometry)):
            sides = [before for before, _ in g.padding]
            if isinstance(g, VolumeGeometry):
                return F.conv3d(x, weight, None, g.stride, sides, g.dilation, g.groups, store=store)
            sizes = g.stride, sides, g.output_padding, g.groups, g.dilation
            return F.conv_transpose2d(x, weight, None, *sizes, store=store)
        assert isinstance(g, ConvGeometry)
        return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups, store=store, update=update)

    def update(self, basis: Basis, trains: bool = True) -> Update:
        """A random D and s = 1."""
        shape = basis.update_shape(self.geometry.weight_shape)
        D = np.random.default_rng(3).standard_normal(shape).astype(self.dtype)
        return Update(Parameter(D, trains), Parameter(np.ones((), self.dtype), trains), basis)

    def basis(self, store: ActivationStore, forward: str = "auto") -> Basis | None:
        """The directions in which a layer with this store may train; None where it trains as it is."""
        if isinstance(self.geometry, (TransposedGeometry, VolumeGeometry)):
            return None
        found = store.basis(getattr(self.geometry, "groups", 1), forward)
        return found if found is not None and found.pays(self.geometry.weight_shape) else None

    @contextmanager
    def named(self) -> Iterator[None]:
        """Whatever is raised inside says which layer it was."""
        try:
            yield
        except Exception as error:
            error.add_note(f"layer: {self.name}, {self.dtype}, ranks {self.ranks}: {self.geometry}")
            raise


class Step(NamedTuple):
    """What came out of one real step of a layer; ``differences``: (predicted, measured) of what does not agree."""

    output: np.ndarray
    grad_input: np.ndarray | None
    grad_weight: np.ndarray | None
    differences: dict[str, tuple[int, int]]


def real_step(
    case: Case,
    store: ActivationStore,
    needs: tuple[bool, bool] = (True, True),
    seed: int = 0,
    basis: Basis | None = None,
) -> Step:
    """One forward and backward pass of a layer, counted; ``needs``: whether input and weight need a gradient.

    With a ``basis`` D trains in place of the weight, and ``grad_weight`` is its gradient.
    """
    x, weight, grad_output = case.arrays(seed)
    leaf, parameter = Tensor(x, requires_grad=needs[0]), Parameter(weight, requires_grad=needs[1] and basis is None)
    update = None if basis is None else case.update(basis, needs[1])
    trained = parameter if update is None else update.weight
    with lance_ref.count_macs() as counter, lance_ref.record() as records:
        out = case.call(leaf, parameter, store, update)
        kept = lance_ref.tape(out).total_bytes
        out.backward(grad_output)
    (bill,) = account(list(records), head=None)
    counted = counter.by_kind()
    pairs = {f"{kind} multiply-adds": (getattr(bill.cost, f"{kind}_macs"), counted[kind]) for kind in MAC_KINDS}
    pairs["bytes on the tape"] = bill.tape_bytes, kept
    pairs["bytes of factors"] = (bill.cost.subspace_bytes if needs[1] else store.factor_bytes), store.factor_bytes
    different = {what: (predicted, found) for what, (predicted, found) in pairs.items() if predicted != found}
    return Step(out.data, leaf.grad, trained.grad, different)


def memory(case: Case, store: ActivationStore, basis: Basis | None = None) -> tuple[tuple[int, int], tuple[int, int]]:
    """(predicted, measured) bytes at the peak of the forward pass, and of the backward pass, of a layer that trains."""
    x, weight, grad_output = case.arrays()
    leaf, parameter = Tensor(x), Tensor(weight, requires_grad=basis is None)
    update = None if basis is None else case.update(basis)
    with watched(Module()) as watcher:  # compiles loops as well
        out = case.call(leaf, parameter, store, update)
        ends = dict(watcher.ends)
    out.backward(grad_output)
    for trained in (parameter, *([] if update is None else update[:2])):
        trained.grad = None
    del out
    predicted = peak(list(watcher.records), lifetimes=ends)
    held = x.nbytes + weight.nbytes
    carried = sum(array.nbytes for array in store.state().values())  # until new arrays take their place
    tracemalloc.start()
    try:
        out = case.call(leaf, parameter, store, update)
        forward = tracemalloc.get_traced_memory()[1]
        gradient = grad_output.copy()
        tracemalloc.reset_peak()
        out.backward(gradient)
        backward = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return (predicted.forward_bytes, held + carried + forward), (predicted.backward_bytes, held + backward)


def require(holds: bool, message: str) -> None:
    """Raise AssertionError with the message; this module is nobody's test file, so ``assert`` would say nothing."""
    if not holds:
        raise AssertionError(message)


class StoreTestCase:
    """What holds for every activation store, as tests; inherit it, and say how the store is made.

    Tests that a class makes no claim for are not there: without :meth:`exactly`, for example, nothing is compared with
    backpropagation's weight gradient.

    Attributes
    ----------
    method : str, optional
        Name of the store's entry in the register of methods. Default: the store is in none.
    exact_input : bool
        Whether the input gradient is backpropagation's, bit by bit. Default: True.
    wrong : mapping of str to callable
        What must raise ValueError or TypeError, by words that the message must contain, the setting's name among them:
        ``{"bits is 3": lambda: Quantized(3)}``. Default: none.
    peak_rule : bool
        Whether :mod:`analysis.peak.stores` has a rule for the store. Default: True.

    Examples
    --------
    >>> from lance_ref.stores import Quantized
    >>> class TestEightBits(StoreTestCase):
    ...     method = "int8"
    ...     wrong = {"bits is 3": lambda: Quantized(3)}
    ...     def make(self, layer):
    ...         return Quantized(8)
    >>> TestEightBits().test_bytes_and_multiply_adds_are_those_predicted()
    """

    method: str | None = None
    exact_input: bool = True
    wrong: ClassVar[Mapping[str, Callable[[], object]]] = {}
    peak_rule: bool = True

    def make(self, layer: TunedLayer) -> ActivationStore:
        """A new store for a layer; the same one whenever it is called for the same layer."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its store is made: make(layer)")

    def exactly(self, layer: TunedLayer) -> ActivationStore | None:
        """A store that loses nothing, at full rank for example; None for a layer where that is not claimed."""
        return None

    def takes(self, geometry: Geometry) -> bool:
        """Whether the store can serve such a layer. Default: any; say here what it leaves out of its ``ops``."""
        return True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        claims = {
            "test_input_gradient_and_output_are_backpropagations": cls.exact_input,
            "test_a_store_that_loses_nothing_gives_backpropagations_weight_gradient": (
                cls.exactly is not StoreTestCase.exactly
            ),
            "test_wrong_settings_are_named": bool(cls.wrong),
            "test_the_register_says_what_the_store_says": cls.method is not None,
            "test_memory_is_at_most_what_is_predicted": cls.peak_rule,
        }
        for name, claimed in claims.items():
            if name not in cls.__dict__:  # None is no test, for pytest or for anybody
                setattr(cls, name, getattr(StoreTestCase, name) if claimed else None)

    def cases(self, geometries: Mapping[str, Geometry] = GEOMETRIES, dtypes: Sequence[str] = "fd") -> Iterator[Case]:
        """The layers of the tests that the store takes."""
        for name, geometry in geometries.items():
            for dtype in dtypes:
                rng = np.random.default_rng([*name.encode(), ord(dtype)])
                ranks = tuple([None, 1, (n + 1) // 2, n][rng.integers(4)] for n in geometry.input_shape)
                if self.takes(geometry):
                    yield Case(name, geometry, np.dtype(dtype), ranks)

    # ---- the tests ---------------------------------------------------------------------------

    def test_bytes_and_multiply_adds_are_those_predicted(self) -> None:
        """The cost rule says exactly what two real steps keep and compute, and those of a layer that trains in part."""
        for case in self.cases():
            with case.named():
                store = self.make(case.layer())
                for needs in ((True, True), (True, True), (True, False), (False, True)):
                    found = real_step(case, store, needs).differences
                    told = [f"{what}: predicted {have:,}, found {want:,}" for what, (have, want) in found.items()]
                    require(not told, f"needs {needs}: {'; '.join(told)}")

    def test_the_activation_stays_as_it_was(self) -> None:
        """The layers behind compute with the same array."""
        for case in self.cases():
            with case.named():
                store, (x, _, grad_output) = self.make(case.layer()), case.arrays()
                before = x.copy()
                saved = store.save_for(x, case.geometry)
                np.testing.assert_array_equal(x, before, "the activation after save")
                store.weight_gradient(saved, grad_output, case.geometry)
                np.testing.assert_array_equal(x, before, "the activation after the weight gradient was made")

    def test_input_gradient_and_output_are_backpropagations(self) -> None:
        """Bit by bit: neither needs anything of what a store keeps."""
        for case in self.cases():
            with case.named():
                found, expected = real_step(case, self.make(case.layer())), real_step(case, EXACT)
                np.testing.assert_array_equal(found.output, expected.output, "output")
                np.testing.assert_array_equal(found.grad_input, expected.grad_input, "input gradient")

    def test_a_store_that_loses_nothing_gives_backpropagations_weight_gradient(self) -> None:
        """To rounding, which is measured by the sizes of what is summed."""
        compared = 0
        for case in self.cases():
            with case.named():
                store = self.exactly(case.layer())
                if store is None:
                    continue
                compared += 1
                g, (x, _, grad_output) = case.geometry, case.arrays()
                expected = g.weight_gradient(x, grad_output)
                found = store.weight_gradient(store.save_for(x.copy(), g), grad_output, g)
                rounding = 100 * np.finfo(case.dtype).eps * g.weight_gradient(abs(x), abs(grad_output)).max()
                error = np.abs(found - expected).max()
                require(error <= rounding, f"the weight gradient is off by {error:.3g}, of rounding is {rounding:.3g}")
        require(compared > 0, "exactly() gives a store for no layer")

    def test_weight_gradients_of_images_add_up_where_it_is_said(self) -> None:
        """``by_image``: the weight gradient of a batch is the sum of those of its images, to rounding."""
        for case in self.cases():
            with case.named():
                store, g, (x, _, grad_output) = self.make(case.layer()), case.geometry, case.arrays()
                if not store.by_image:
                    continue
                expected = store.weight_gradient(store.save_for(x, g), grad_output, g)
                one, found = replace(g, input_shape=(1, *g.input_shape[1:])), np.zeros_like(expected)
                for image, of_image in zip(np.split(x, len(x)), np.split(grad_output, len(x)), strict=True):
                    found += store.weight_gradient(store.save_for(image.copy(), one), of_image, one)
                rounding = 100 * np.finfo(case.dtype).eps * g.weight_gradient(abs(x), abs(grad_output)).max()
                error = np.abs(found - expected).max()
                require(error <= rounding, f"the images' sum is off by {error:.3g}, of rounding is {rounding:.3g}")

    def test_gradients_lie_in_the_basis_that_the_store_names(self) -> None:
        """A layer may train in it: the gradient of D is that of the weight in coordinates, at the cost predicted."""
        for case in self.cases():
            for forward in ("merged", "factored"):
                with case.named():
                    store = self.make(case.layer())
                    basis = case.basis(store, forward)
                    if basis is None:
                        continue
                    whole = real_step(case, self.make(case.layer())).grad_weight
                    assert whole is not None
                    rounding = 100 * np.sqrt(whole.size) * np.finfo(case.dtype).eps * np.abs(whole).max()
                    beside = np.abs(basis.expand(basis.coordinates(whole), whole.shape) - whole).max()
                    require(beside <= rounding, f"the weight gradient has {beside:.3g} outside of the basis")
                    for needs in ((True, True), (True, False), (False, True)):
                        step = real_step(case, store, needs, basis=basis)
                        told = [f"{what}: predicted {n:,}, found {m:,}" for what, (n, m) in step.differences.items()]
                        require(not told, f"in the subspace, {forward}, needs {needs}: {'; '.join(told)}")
                    store = self.make(case.layer())  # one that has random numbers draws those of the first step
                    basis = case.basis(store, forward)
                    assert basis is not None
                    D = real_step(case, store, basis=basis).grad_weight
                    error = np.abs(D - basis.coordinates(whole)).max()
                    require(
                        error <= rounding, f"the gradient of D is off by {error:.3g}, of rounding is {rounding:.3g}"
                    )

    def test_wrong_settings_are_named(self) -> None:
        """Each is a ValueError or a TypeError that says which setting it is about."""
        for words, make in self.wrong.items():
            try:
                make()
            except (ValueError, TypeError) as error:
                require(words in str(error), f"the error says {str(error)!r}, expected {words!r} in it")
            else:
                require(False, f"nothing was raised, expected an error that says {words!r}")

    def test_a_saved_state_goes_on_bit_by_bit(self) -> None:
        """A new store with the state of another one takes the same next step."""
        for case in self.cases():
            with case.named():
                old, g = self.make(case.layer()), case.geometry
                for seed in range(2):
                    old.save_for(case.arrays(seed)[0], g)
                new = self.make(case.layer())
                new.load_state({name: array.copy() for name, array in old.state().items()})
                results = []
                for store in (old, new):
                    x, _, grad_output = case.arrays(2)
                    saved = store.save_for(x, g)
                    results.append({**saved, "the weight gradient": store.weight_gradient(saved, grad_output, g)})
                require(list(results[0]) == list(results[1]), f"kept were {list(results[0])} and {list(results[1])}")
                for name, array in results[0].items():
                    np.testing.assert_array_equal(results[1][name], array, f"{name} of the step after loading a state")

    def test_a_wrong_state_is_refused(self) -> None:
        """An unknown name and an array of another shape are ValueErrors, and nothing is changed by them."""
        for case in self.cases():
            with case.named():
                store = self.make(case.layer())
                store.save_for(case.arrays()[0], case.geometry)
                state = {name: array.copy() for name, array in store.state().items()}
                wrong = {"an unknown name": {**state, "an unknown name": np.zeros(3)}}
                for name, array in state.items():
                    wrong[f"{name} of another shape"] = {**state, name: np.ones((*array.shape, 2))}
                for what, bad in wrong.items():
                    try:
                        store.load_state(bad)
                    except ValueError:
                        after = store.state()
                        require(after.keys() == state.keys(), f"{what}: refused, but the state was changed")
                        for name, array in state.items():
                            np.testing.assert_array_equal(after[name], array, f"{what}: refused, but {name} changed")
                    else:
                        require(False, f"{what}: the state was taken, expected a ValueError")

    def test_the_register_says_what_the_store_says(self) -> None:
        """The description of the register, from which costs are predicted, is that of a store that was made."""
        entry = METHODS[str(self.method)]
        for case in self.cases():
            with case.named():
                require(entry.make is not None, f"method {self.method!r} has no store")
                made, said = self.make(case.layer()).describe(), entry.make(case.layer()).describe()  # type: ignore[misc]
                require(said == made, f"the store of method {self.method!r} says {said}, that of this test {made}")
                if entry.describe is not None:
                    said = entry.describe(case.layer())
                    require(said == made, f"the register says {said}, the store {made}")

    def test_numbers_that_are_not_finite_are_refused_or_carried(self) -> None:
        """A NaN or an infinity in the activation is a NotFiniteError, or shows in the weight gradient."""
        for case in self.cases():
            for bad in (np.nan, np.inf, -np.inf):
                with case.named(), np.errstate(all="ignore"):
                    g, (x, _, grad_output) = case.geometry, case.arrays()
                    place = tuple(n // 2 for n in x.shape)
                    gradients = []
                    for value in (1, 2, bad):
                        x[place] = value
                        store = self.make(case.layer())
                        try:
                            gradients.append(store.weight_gradient(store.save_for(x, g), grad_output, g))
                        except NotFiniteError:
                            require(value is bad, f"{value} in the activation was refused")
                    if np.array_equal(gradients[0], gradients[1]) or len(gradients) == 2:
                        continue  # nothing is computed from that place, or what is bad was refused
                    hidden = np.isfinite(gradients[-1]).all()
                    require(not hidden, f"{bad} in the activation at {place}, and nothing of it in the gradient")

    def test_memory_is_at_most_what_is_predicted(self) -> None:
        """While it saves, and while it makes the weight gradient; convolutions where their compiled loops are on."""
        for case in self.cases(LARGE, "f"):
            with case.named():
                if isinstance(case.geometry, Convolution) and not numba_enabled():
                    continue
                store = self.make(case.layer())
                for forward in (None, "merged", "factored"):
                    basis = None if forward is None else case.basis(store, forward)
                    if basis is None and forward is not None:
                        continue
                    for moment, (predicted, found) in zip(
                        ("forward", "backward"), memory(case, store, basis), strict=True
                    ):
                        most = (1 + PEAK_SHARE) * predicted
                        way = "" if forward is None else f"in the subspace, {forward}, "
                        require(found <= most, f"{way}{moment}: predicted {predicted:,} bytes, found {found:,}")
