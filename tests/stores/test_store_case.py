"""The test case of activation stores: plain backpropagation passes it, and each planted fault fails in one test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.check.store_case import GEOMETRIES, StoreTestCase
from analysis.steps.methods import METHODS
from analysis.steps.settings import TunedLayer
from lance_ref.algebra.basis import Basis
from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.stores import EXACT, ActivationStore, Exact, Sketch


class TestExact(StoreTestCase):
    """The store of every layer that is not told otherwise."""

    def make(self, layer: TunedLayer) -> Exact:
        return Exact()

    def exactly(self, layer: TunedLayer) -> Exact:
        return EXACT


def seed_of(layer: TunedLayer) -> int:
    """As the register has it."""
    return int(layer.rng.integers(2**31))


class CopyCase(StoreTestCase):
    """A copy of the random sketch, in which faults are planted."""

    method = "sketch"
    store: type[Sketch] = Sketch

    def __init_subclass__(cls, store: type[Sketch] = Sketch, **options: Any) -> None:
        cls.store = store
        cls.wrong = {"ratio is 2": lambda: store(2)}
        super().__init_subclass__(**options)

    def make(self, layer: TunedLayer) -> ActivationStore:
        store: Any = self.store(layer.settings.ratio, seed_of(layer))
        store.features, store.dtype = layer.shape[1 if len(layer.shape) == 4 else -1], layer.dtype
        return store

    def exactly(self, layer: TunedLayer) -> ActivationStore:
        return self.store(1.0, seed_of(layer))


class KeepsMore(Sketch):
    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        return {**super().save(activation), "unused": np.zeros(3)}


class ForgetsTheHalf(Sketch):
    def weight_gradient(self, saved: Mapping[str, np.ndarray], grad: np.ndarray, geometry: Geometry) -> np.ndarray:
        return 2 * super().weight_gradient(saved, grad, geometry)


class WrongInputGradient(Sketch):
    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
        return geometry.input_gradient(weight, grad_output) * weight.dtype.type(1 + 1e-6)


class SavesNoState(Sketch):
    def state(self) -> dict[str, np.ndarray]:
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        ActivationStore.load_state(self, state)


class TakesAnyState(Sketch):
    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.sketch.step = int(np.max(state["step"]))


class ChecksNoSetting(Sketch):
    def __init__(self, ratio: float, seed: int = 0) -> None:
        super().__init__(min(ratio, 1.0), seed)


class SaysMore(Sketch):
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "seed": self.sketch.seed}


class HidesNaN(Sketch):
    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        return super().save(activation if np.isfinite(activation).all() else np.nan_to_num(activation))


class TakesMemory(Sketch):
    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        saved = super().save(activation)
        np.concatenate([activation, activation])
        return saved


class ChangesTheActivation(Sketch):
    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        saved = super().save(activation)
        activation[0] = 0
        return saved


class NamesABasis(Sketch):
    def basis(self, groups: int, forward: str = "auto") -> Basis:
        channels = self.features // groups
        return Basis(np.full((groups, channels, 1), channels**-0.5, self.dtype), forward=forward)


class SaysItTakesImages(Sketch):
    by_image = True


FAULTS = {
    Sketch: None,
    KeepsMore: "test_bytes_and_multiply_adds_are_those_predicted",
    ForgetsTheHalf: "test_a_store_that_loses_nothing_gives_backpropagations_weight_gradient",
    WrongInputGradient: "test_input_gradient_and_output_are_backpropagations",
    SavesNoState: "test_a_saved_state_goes_on_bit_by_bit",
    TakesAnyState: "test_a_wrong_state_is_refused",
    ChecksNoSetting: "test_wrong_settings_are_named",
    SaysMore: "test_the_register_says_what_the_store_says",
    HidesNaN: "test_numbers_that_are_not_finite_are_refused_or_carried",
    TakesMemory: "test_memory_is_at_most_what_is_predicted",
    ChangesTheActivation: "test_the_activation_stays_as_it_was",
    SaysItTakesImages: "test_weight_gradients_of_images_add_up_where_it_is_said",
    NamesABasis: "test_gradients_lie_in_the_basis_that_the_store_names",
}


def its_tests(case: StoreTestCase) -> dict[str, Any]:
    """The tests that pytest would run."""
    found = {name: getattr(case, name) for name in dir(case) if name.startswith("test_")}
    return {name: test for name, test in found.items() if test is not None}


@pytest.mark.parametrize("store", FAULTS, ids=lambda store: store.__name__)
def test_each_fault_fails_in_exactly_one_test(store: type[Sketch]) -> None:
    """The copy passes as it is; a fault is named with the layer where it showed."""

    class Planted(CopyCase, store=store):
        pass

    failed = {}
    for name, test in its_tests(Planted()).items():
        try:
            test()
        except Exception as error:
            failed[name] = error
    assert set(failed) == ({FAULTS[store]} if FAULTS[store] else set()), failed
    for name, error in failed.items():
        assert isinstance(error, AssertionError)
        assert name == "test_wrong_settings_are_named" or error.__notes__[0].startswith("layer: ")


def test_every_test_of_the_case_has_a_fault() -> None:
    """A test that never fails would be no test."""
    assert set(FAULTS.values()) - {None} == set(its_tests(StoreTestCase()))


def test_the_layers_are_of_every_kind() -> None:
    """What a store may treat in another way is in the list, in both dtypes and with ranks of every kind."""
    convolutions = [g for g in GEOMETRIES.values() if isinstance(g, ConvGeometry)]
    for holds in (
        lambda g: g.stride != (1, 1) and g.padding != ((0, 0), (0, 0)),
        lambda g: g.dilation != (1, 1),
        lambda g: g.groups > 1 and not g.is_depthwise,
        lambda g: g.is_depthwise,
        lambda g: g.weight_shape[2:] == (1, 1),
        lambda g: g.weight_shape[2] % 2 == 0 and g.weight_shape[3] % 2 == 0,
    ):
        assert any(holds(g) for g in convolutions)
    linear = [g for g in GEOMETRIES.values() if isinstance(g, LinearGeometry)]
    assert {len(g.input_shape) for g in linear} == {2, 3}
    cases = list(TestExact().cases())
    assert {case.name for case in cases if case.dtype == np.float32} == set(GEOMETRIES)
    assert len(cases) == 2 * len(GEOMETRIES)
    for kind in (lambda r, n: r is None, lambda r, n: r == 1 < n, lambda r, n: 1 < (r or 0) < n, lambda r, n: r == n):
        assert any(kind(r, n) for c in cases for r, n in zip(c.ranks, c.geometry.input_shape, strict=True))


def test_a_class_that_claims_nothing_is_not_tested_for_it() -> None:
    """No test passes by comparing nothing."""

    class Nothing(StoreTestCase):
        exact_input, peak_rule = False, False

    class Something(Nothing):
        exact_input = True

        def exactly(self, layer: TunedLayer) -> None:
            return None

    left = set(its_tests(StoreTestCase())) - set(its_tests(Nothing()))
    assert left == {
        "test_input_gradient_and_output_are_backpropagations",
        "test_a_store_that_loses_nothing_gives_backpropagations_weight_gradient",
        "test_wrong_settings_are_named",
        "test_the_register_says_what_the_store_says",
        "test_memory_is_at_most_what_is_predicted",
    }
    assert "test_input_gradient_and_output_are_backpropagations" in its_tests(Something())
    with pytest.raises(AssertionError, match=r"exactly\(\) gives a store for no layer"):
        Something().test_a_store_that_loses_nothing_gives_backpropagations_weight_gradient()
    with pytest.raises(NotImplementedError, match="Nothing does not say how its store is made"):
        Nothing().test_the_activation_stays_as_it_was()


def test_every_registered_store_has_a_case() -> None:
    """Each method that makes stores is the method of a test class in this folder."""
    written = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    stores = {name: entry.make for name, entry in METHODS.items() if entry.make is not None}
    tested = {make for name, make in stores.items() if re.search(f'method[^=]* = "{name}"', written)}
    assert {name for name, make in stores.items() if make not in tested} == set()
