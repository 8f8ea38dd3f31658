"""Cost rules of HOSVD and ASI: hand-worked integers, and exactly what a real step keeps and computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries

import lance_ref
from analysis.check.measure import MAC_KINDS
from analysis.rules.account import Billed, account
from analysis.rules.stores import tucker
from lance_ref import nn
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.stores import ActivationStore, Asi, Hosvd

DTYPES = st.sampled_from([np.float32, np.float64])


def layer_of(g: Any, dtype: Any) -> nn.Module:
    """A layer with this geometry."""
    if isinstance(g, LinearGeometry):
        return nn.Linear(g.weight_shape[1], g.weight_shape[0], rng=0).to(dtype)
    C_out, width, *kernel = g.weight_shape
    return nn.Conv2d(width * g.groups, C_out, kernel, g.stride, g.padding, g.dilation, g.groups, rng=0).to(dtype)


def step(g: Any, store: ActivationStore, dtype: Any, relu: bool = False) -> tuple[list[Billed], dict[str, Any]]:
    """The bills of one real step through a layer with this store, and what was measured of it."""
    net = nn.Sequential(layer_of(g, dtype), nn.Tanh())
    net[0].store = store
    x = arrays(g, 0, dtype)[0]
    x = lance_ref.Tensor(np.maximum(x, 0) if relu else x, requires_grad=True)
    with lance_ref.count_macs() as counter:
        with lance_ref.record(net) as records:
            loss = net(x).sum()
        kept = lance_ref.tape(loss).by_layer()
        loss.backward()
    measured: dict[str, Any] = {"tape": kept.get("0", 0), "factors": store.factor_bytes}
    measured.update({kind: counter.by_layer("0")[kind] for kind in MAC_KINDS})
    return account(list(records), None), measured


def predicted(bills: list[Billed]) -> dict[str, Any]:
    of_layer = [bill for bill in bills if bill.record.path == "0"]
    totals = {"tape": sum(b.tape_bytes for b in of_layer), "factors": sum(b.subspace_bytes for b in of_layer)}
    return totals | {kind: sum(getattr(b.cost, f"{kind}_macs") for b in of_layer) for kind in MAC_KINDS}


def agree(g: Any, store: ActivationStore, dtype: Any, relu: bool = False) -> None:
    """Two steps, the second of them warm: every number as predicted."""
    for _ in range(2):
        bills, measured = step(g, store, dtype, relu)
        assert predicted(bills) == measured


# ---- exactly what runs, on random layers -----------------------------------------------------


@given(g=conv_geometries(), epsilon=st.sampled_from([0.2, 0.5, 0.7, 0.9, 0.99, 1.0]), dtype=DTYPES, relu=st.booleans())
@settings(max_examples=80)
def test_hosvd_of_any_convolution(g: ConvGeometry, epsilon: float, dtype: Any, relu: bool) -> None:
    """Groups, stride, padding, dilation; ranks that the step itself chose, full ones among them."""
    agree(g, Hosvd(epsilon), dtype, relu)


@given(g=linear_geometries(), epsilon=st.sampled_from([0.2, 0.5, 0.7, 0.9, 0.99, 1.0]), dtype=DTYPES)
@settings(max_examples=80)
def test_hosvd_of_any_linear_layer(g: LinearGeometry, epsilon: float, dtype: Any) -> None:
    """Matrices share a Gram; tokens do not."""
    agree(g, Hosvd(epsilon), dtype)


@given(g=conv_geometries(), dtype=DTYPES, modes=st.sets(st.sampled_from(["batch", "channel", "height"]), min_size=1))
@settings(max_examples=30)
def test_hosvd_of_some_modes(g: ConvGeometry, dtype: Any, modes: set[str]) -> None:
    """Modes that are not selected are not looked at."""
    agree(g, Hosvd(0.8, modes=sorted(modes)), dtype)


def test_a_large_layer_in_blocks() -> None:
    """Unfoldings that do not fit the workspace are multiplied block by block, at the same count."""
    g = ConvGeometry((12, 60, 28, 28), (8, 60, 1, 1))
    agree(g, Hosvd(0.6), np.float64)
    agree(g, Asi((3, 7, 5, 2)), np.float64)


def test_a_layer_that_runs_twice_is_billed_for_both_calls() -> None:
    """Each call has ranks of its own, and its core and factors on the tape."""
    layer = nn.Linear(6, 6, rng=0)
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh())
    layer.store = store = Hosvd(0.9)
    scales = np.array([9, 1, 1, 1, 1, 1])  # one direction has most of the energy, until tanh evens it out
    x = lance_ref.Tensor((np.random.default_rng(0).standard_normal((9, 6)) * scales).astype(np.float32))
    with lance_ref.count_macs() as counter, lance_ref.record(net) as records:
        loss = net(x).sum()
    bills = [bill for bill in account(list(records), None) if bill.record.op == "linear"]
    assert len(bills) == 2
    assert bills[0].cost.ranks != bills[1].cost.ranks == store.ranks
    assert sum(b.tape_bytes for b in bills) == lance_ref.tape(loss).by_op()["linear"]
    assert sum(b.cost.decomposition_macs for b in bills) == counter.by_kind()["decomposition"]


# ---- integers by hand ------------------------------------------------------------------------


def test_hosvd_of_a_convolution_by_hand() -> None:
    """(8, 6, 5, 7), ranks (3, 5, full, 4), each Gram 1680·n and eigenvectors 9n³/2."""
    macs = tucker.hosvd_macs((8, 6, 5, 7), (3, 5, None, 4), (True,) * 4)
    grams = 1680 * (8 + 6 + 5 + 7)
    assert macs == grams + 2304 + 972 + 562 + 1543 == 49_061
    without_height = tucker.hosvd_macs((8, 6, 5, 7), (3, 5, None, 4), (True, True, False, True))
    assert without_height == 49_061 - 1680 * 5 - 562


@pytest.mark.parametrize(
    ("shape", "ranks", "macs"),
    [
        # one Gram of the smaller side, 60·4 and 9·64/2; then 60·2 and the QR of (15, 2): 2·15·4 − 16/3
        ((4, 15), (3, 2), 240 + 288 + 120 + 114),
        ((15, 4), (2, 3), 240 + 288 + 120 + 114),
        # the smaller side alone, the larger alone
        ((4, 15), (3, None), 240 + 288),
        ((4, 15), (None, 2), 240 + 288 + 120 + 114),
        # rank 5 above the 4 that the smaller side has: the larger Gram as well, 60·15 and 9·3375/2
        ((4, 15), (3, 5), 240 + 288 + 900 + 15187),
        # a square matrix has two Grams
        ((4, 4), (3, 2), 2 * (64 + 288)),
        # the first larger than the other two together: 48·4 and 288, 48·2, QR 2·12·4 − 16/3; 48·2 + 36 each
        ((12, 2, 2), (2, 1, 1), 192 + 288 + 96 + 90 + 2 * (96 + 36)),
    ],
)
def test_hosvd_takes_the_smaller_side(shape: tuple[int, ...], ranks: tuple[int | None, ...], macs: int) -> None:
    """Gram, eigenvectors, product and QR of tall and wide unfoldings, worked out."""
    assert tucker.hosvd_macs(shape, ranks, [r is not None for r in ranks]) == macs


def test_asi_by_hand() -> None:
    """(8, 6, 5, 7), ranks (3, 5, full, 4): V and A V at 1680·r each; QR 144 − 18, 300 − 83⅓, 224 − 42⅔."""
    macs = tucker.asi_macs((8, 6, 5, 7), (3, 5, None, 4))
    assert macs == 2 * 1680 * (3 + 5 + 4) + 126 + 216 + 181 == 40_843


def test_bytes_by_hand() -> None:
    """Core 3·5·5·4 and factors 8·3 + 6·5 + 7·4, in float32; none beside the tape; the papers count the same."""
    g = ConvGeometry((8, 6, 5, 7), (4, 3, 3, 2), groups=2)
    for store in (Hosvd(ranks=(3, 5, 5, 4)), Asi((3, 5, 5, 4))):
        bill = step(g, store, np.float32)[0][0]
        kept = 4 * (300 + 24 + 30 + 28)
        assert bill.tape_bytes == kept
        assert (bill.cost.paper_bytes, bill.cost.subspace_bytes) == (kept, 0)
        assert sum(s.storage.nbytes for s in bill.cost.pytorch if not s.storage.is_parameter) == kept
        assert bill.cost.ranks == (3, 5, None, 4)
        assert bill.cost.projection_macs == 1680 * 3 + 630 * 4 + 360 * 5  # batch, width, channel


def test_at_full_rank_it_costs_what_backpropagation_costs() -> None:
    """The input stays on the tape, unpacked and uncopied; no decomposition, no projection."""
    g = ConvGeometry((8, 6, 5, 7), (4, 3, 3, 2), groups=2)
    exact = step(g, lance_ref.stores.EXACT, np.float32)[0][0]
    for store in (Hosvd(1.0), Hosvd(ranks=g.input_shape), Asi(g.input_shape)):
        bill = step(g, store, np.float32)[0][0]
        assert bill.tape_bytes == exact.tape_bytes == 4 * 8 * 6 * 5 * 7
        assert bill.pytorch_bytes == exact.pytorch_bytes
        assert bill.cost.paper_bytes == exact.cost.paper_bytes
        assert (bill.cost.grad_weight_macs, bill.cost.projection_macs, bill.cost.decomposition_macs) == (
            exact.cost.grad_weight_macs,
            0,
            0,
        )


def test_ranks_that_no_step_has_chosen_are_an_error() -> None:
    """A trace knows no ranks of a store that chooses them: never a zero. Given ranks need no step."""
    net = nn.Sequential(nn.Linear(6, 5, rng=0), nn.Tanh())
    net[0].store = Hosvd(0.7)
    records = lance_ref.trace(net, (8, 6))
    with pytest.raises(ValueError, match="layer '0': the ranks of its 'hosvd' store"):
        account(records, None)
    for store in (Hosvd(ranks=(3, 6)), Asi((3, 6))):
        net[0].store = store
        bill = account(lance_ref.trace(net, (8, 6)), None)[0]
        assert bill.cost.ranks == (3, None)
        assert bill.cost.paper_bytes == 4 * (3 * 6 + 8 * 3)


# ---- planted faults: each must make a prediction differ ---------------------------------------


def differences(g: Any, store: ActivationStore) -> set[str]:
    bills, measured = step(g, store, np.float32)
    told = predicted(bills)
    return {what for what in measured if told[what] != measured[what]}


@pytest.mark.parametrize(
    "fault", ["no eigenvectors", "no QR", "one product for two", "forgotten Gram", "shared everywhere"]
)
def test_planted_faults_in_the_decomposition(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a decomposition left out or doubled is seen by a layer that has it."""
    conv, matrix = ConvGeometry((8, 6, 5, 7), (4, 3, 3, 2), groups=2), LinearGeometry((4, 15), (3, 15))
    g: Any = conv
    store: ActivationStore = Hosvd(ranks=(3, 5, None, 4))
    right_hosvd, right_asi = tucker.hosvd_macs, tucker.asi_macs
    if fault == "no eigenvectors":
        monkeypatch.setattr(tucker, "eigenvector_macs", lambda n: 0)
    elif fault == "no QR":
        g, store = matrix, Asi((3, 2))
        monkeypatch.setattr(tucker, "orthonormal_macs", lambda n, r: 0)
    elif fault == "one product for two":
        store = Asi((3, 5, None, 4))
        monkeypatch.setattr(tucker, "asi_macs", lambda shape, ranks: right_asi(shape, ranks) - 1680 * 3)
    elif fault == "forgotten Gram":
        monkeypatch.setattr(
            tucker, "hosvd_macs", lambda shape, ranks, found: right_hosvd(shape, ranks, (*found[:3], False))
        )
    else:
        g, store = LinearGeometry((4, 15), (3, 15)), Hosvd(ranks=(3, 2))
        monkeypatch.setattr(
            tucker,
            "hosvd_macs",
            lambda shape, ranks, found: right_hosvd(shape, ranks, found) + right_hosvd(shape, (3, None), (True, False)),
        )
    assert differences(g, store) == {"decomposition"}


def test_planted_factor_that_is_forgotten_or_kept_for_nothing() -> None:
    """A factor missing from the tape, and an identity kept for a mode of full rank, both show in the bytes."""
    g = ConvGeometry((8, 6, 5, 7), (4, 3, 3, 2), groups=2)
    store = Hosvd(ranks=(3, 5, 5, 4))
    bills, measured = step(g, store, np.float32)
    record = bills[0].record
    for wrong in ((3, 5, None, None), (3, 5, 4, 4)):
        attributes = {**record.attributes, "store": {**record.attributes["store"], "ranks": wrong}}
        changed = account([replace(record, attributes=attributes), *(b.record for b in bills[1:])], None)
        assert predicted(changed)["tape"] != measured["tape"]
    assert predicted(bills) == measured


def test_planted_fault_in_the_store_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that keeps its factors twice, on the tape and beside it, disagrees with the rule."""
    monkeypatch.setattr(Asi, "factor_bytes", property(lambda store: sum(U.nbytes for U in store.state().values())))
    assert differences(LinearGeometry((4, 15), (3, 15)), Asi((3, 2))) == {"factors"}
