"""Cost rules of GradientFilter, Quantized, Sketch and LANCE's options: predicted equals executed; hand integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries, ranks_for

import lance_ref
from analysis.rules import account
from analysis.rules.op_cost import OpCost
from analysis.rules.stores import gradient_filter, quantized, sketch, tucker
from lance_ref import F, Subspace, Tensor, count_macs, nn, tape
from lance_ref.algebra.frame import Frame, feature_mode
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.nn.module import Parameter
from lance_ref.stores import ActivationStore, GradientFilter, Lance, Quantized, Sketch

KINDS = ("forward", "grad_input", "grad_weight", "projection", "decomposition")
EXAMPLES = 150  # about half of them convolutions
layers = st.one_of(conv_geometries(), linear_geometries())
dtypes = st.sampled_from([np.float32, np.float64])
ratios = st.sampled_from([0.1, 1 / 8, 0.3, 0.5, 1.0])


def step(
    g: Any, store: ActivationStore, dtype: Any, needs: tuple[bool, bool] = (True, True)
) -> tuple[OpCost, dict[str, int]]:
    """The predicted cost of one layer, and what its real step kept and executed; ``needs``: (x, weight)."""
    x, weight, _ = arrays(g, 0, dtype)
    leaf, parameter = Tensor(x, requires_grad=needs[0]), Parameter(weight, requires_grad=needs[1])
    with count_macs() as counter, lance_ref.record() as records:
        if isinstance(g, LinearGeometry):
            out = F.linear(leaf, parameter, store=store)
        else:
            out = F.conv2d(leaf, parameter, None, g.stride, g.padding, g.dilation, g.groups, store=store)
        loss = out.sum()
        measured = {"tape": tape(loss).total_bytes}
        loss.backward()
    assert set(counter.by_kind()) >= set(KINDS)
    measured |= {kind: counter.by_kind()[kind] for kind in KINDS} | {"factors": store.factor_bytes}
    layer, _ = account.account(records, head=None)
    return replace(layer.cost, tape=list(layer.cost.tape)), measured | {"billed tape": layer.tape_bytes}


def differences(cost: OpCost, measured: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(predicted, measured) of everything that does not agree."""
    pairs = {kind: (getattr(cost, f"{kind}_macs"), measured[kind]) for kind in KINDS}
    pairs["tape"] = (measured["billed tape"], measured["tape"])
    pairs["factors"] = (cost.subspace_bytes, measured["factors"])
    return {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}


@settings(max_examples=EXAMPLES)
@given(
    data=st.data(),
    g=layers,
    dtype=dtypes,
    bits=st.sampled_from([None, 8, 4]),
    ratio=st.one_of(st.none(), ratios),
    order=st.sampled_from(["auto", "papers", "separable"]),
    centred=st.booleans(),
)
def test_lance_costs_what_is_predicted(
    data: Any, g: Any, dtype: Any, bits: int | None, ratio: float | None, order: str, centred: bool
) -> None:
    """Any ranks, with codes or a sketch or both or neither, centred or not, in every order of contraction."""
    ranks = data.draw(ranks_for(g.input_shape))
    subspace = Subspace.random(g.input_shape, ranks, np.random.default_rng(0))
    if centred:
        subspace = replace(subspace, frame=Frame(None, np.ones(g.input_shape[feature_mode(g.input_shape)])))
    batch_mode = "calibrated" if ratio is None else "sketch"
    assert not differences(*step(g, Lance(subspace, order, dtype, bits, batch_mode, ratio), dtype))


def test_the_mean_by_hand() -> None:
    """x (8, 6, 9, 7), w (4, 3, 3, 2), y (8, 4, 5, 6): 4·5·6·2 + 4·5·3·2 + 4·3·2·3 multiply-adds, 6 numbers of mean."""
    plain = Subspace.random(HAND.input_shape, (None, 2, None, None), np.random.default_rng(0))
    centred = replace(plain, frame=Frame(None, np.ones(6)))
    (before, measured), (after, _) = (step(HAND, Lance(space), np.float32) for space in (plain, centred))
    assert after.grad_weight_macs - before.grad_weight_macs == 240 + 120 + 72
    assert after.subspace_bytes - before.subspace_bytes == 24
    assert measured["tape"] == 4 * 8 * 2 * 9 * 7


# ---- by hand: input (8, 6, 9, 7), weight (4, 6/2, 3, 2), output (8, 4, 5, 6) -------------------------

HAND = ConvGeometry((8, 6, 9, 7), (4, 3, 3, 2), (2, 1), ((1, 1), (0, 0)), groups=2)


def predicted(g: Any, store: ActivationStore, dtype: Any = np.float32) -> dict[str, int]:
    """Bytes and multiply-adds of the rule alone."""
    cost, measured = step(g, store, dtype)
    kinds = {kind: getattr(cost, f"{kind}_macs") for kind in KINDS[1:]}
    return {"tape": measured["billed tape"], **{kind: macs for kind, macs in kinds.items() if macs}}


def test_gradient_filter_by_hand() -> None:
    """Patches of 4: ⌈5/4⌉·⌈6/4⌉ = 4 a map; 6 channels, 4 outputs of 3 inputs each."""
    assert HAND.output_shape == (8, 4, 5, 6)
    products = 8 * 4 * 4 * 3
    assert predicted(HAND, GradientFilter(4)) == {
        "tape": 8 * 6 * 4 * 4,
        "grad_input": products,
        "grad_weight": products,
    }
    dilated = ConvGeometry((2, 3, 9, 8), (5, 3, 3, 2), padding=((4, 4), (1, 0)), dilation=(4, 1))
    # 5 × 4 patches of 2; the kernel's three rows reach two patches far each, its two columns fall in one
    assert predicted(dilated, GradientFilter(2)) == {
        "tape": 2 * 3 * 20 * 4,
        "grad_input": 2 * 20 * 5 * 3 * 3,
        "grad_weight": 2 * 20 * 5 * 3,
    }
    tokens = LinearGeometry((2, 7, 3), (5, 3))
    assert predicted(tokens, GradientFilter(3)) == {
        "tape": 2 * 3 * 3 * 4,
        "grad_input": 2 * 3 * 15,
        "grad_weight": 2 * 3 * 15,
    }


def test_quantized_by_hand() -> None:
    """3024 entries, 6 channels; the exact products, 8·4·30·3·6."""
    products = {"grad_input": 17_280, "grad_weight": 17_280}
    assert predicted(HAND, Quantized(8)) == {"tape": 3024 + 2 * 6 * 4, **products}
    assert predicted(HAND, Quantized(4), np.float64) == {"tape": 1512 + 2 * 6 * 8, **products}


def test_sketch_by_hand() -> None:
    """r = 2 of 8: 2·378 floats and 8 bytes; 3024·2; 2·(2·8·4 − ⅔·8 → 58); G 960·2, then a quarter of 17 280."""
    assert predicted(HAND, Sketch(0.25)) == {
        "tape": 2 * 378 * 4 + 8,
        "grad_input": 17_280,
        "grad_weight": 1920 + 4320,
        "projection": 6048,
        "decomposition": 2 * 58,
    }


def test_lance_with_options_by_hand() -> None:
    """Ranks (sketch of 2, 5, 2, 4) of 80 entries, one range: 80 + 2·4 + 8 bytes; each product worked out."""
    subspace = Subspace.random(HAND.input_shape, (3, 5, 2, 4), np.random.default_rng(0))
    store = Lance(subspace, "papers", core_bits=8, batch_mode="sketch", batch_ratio=0.25)
    # height 3024·2, batch 672·2, width 168·4, channel 96·5
    projection = 6048 + 1344 + 672 + 480
    # Z1 960·2; Z2 width 80·7 first, then 140·9; Z3 2·4·30·5·6; dW 24·5·3
    grad_weight = 1920 + 560 + 1260 + 7200 + 360
    assert predicted(HAND, store) == {
        "tape": 80 + 8 + 8,
        "grad_input": 17_280,
        "grad_weight": grad_weight,
        "projection": projection,
        "decomposition": 2 * 58,
    }
    assert store.factor_bytes == 4 * (6 * 5 + 9 * 2 + 7 * 4)
    alone = Lance(subspace, core_bits=4)
    assert predicted(HAND, alone, np.float32)["tape"] == 3 * 5 * 2 * 4 // 2 + 2 * 4


# ---- in a network, and planted faults --------------------------------------------------------------


@pytest.mark.parametrize("core_bits", [None, 4])
def test_a_trace_at_another_batch_size_predicts_the_real_step(core_bits: int | None) -> None:
    """Nothing has run with that batch yet: the rules know a sketch's rank from the ratio, not from a step."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, rng=0), nn.Conv2d(6, 8, 1, rng=1), nn.Flatten(), nn.Linear(128, 4, rng=2))
    x = np.random.default_rng(0).standard_normal((24, 3, 6, 6)).astype(np.float32)
    calibration = lance_ref.calibrate(net, [x[:8]], epsilon=0.8, layers=["0", "1"])
    lance_ref.compress(net, calibration, core_bits=core_bits, batch_mode="sketch", batch_ratio=0.25)
    net[3].store = Sketch(0.2)
    bills = account.account(lance_ref.trace(net, x.shape), head=None)
    predicted = {bill.record.path: bill.tape_bytes for bill in bills}
    with count_macs() as counter:
        out = net(x)
        kept = tape(out).by_layer()
        out.sum().backward()
    for path in ("0", "1", "3"):
        (cost,) = (bill.cost for bill in bills if bill.record.path == path)
        assert predicted[path] == kept[path]
        assert {kind: getattr(cost, f"{kind}_macs") for kind in KINDS} == {
            kind: counter.by_layer(path)[kind] for kind in KINDS
        }


@pytest.mark.parametrize("store", [GradientFilter(2), Quantized(4), Sketch(0.5)], ids=lambda store: store.name)
def test_pytorch_would_keep_the_same_arrays(store: ActivationStore) -> None:
    """The papers' column counts what stands for the input; PyTorch's the tape's arrays and the weight."""
    cost, _ = step(HAND, store, np.float32)
    kept = [saved for saved in cost.tape if not saved.storage.is_parameter]
    in_pytorch = [saved for saved in cost.pytorch if not saved.storage.is_parameter]
    assert Counter((s.what, s.storage.nbytes) for s in kept) == Counter((s.what, s.storage.nbytes) for s in in_pytorch)
    assert cost.paper_bytes == sum(saved.storage.nbytes for saved in kept)


@pytest.mark.parametrize(
    ("store", "module", "attribute", "wrong", "what"),
    [
        (GradientFilter(2), gradient_filter, "conv_grid", lambda call: gradient_filter.Grid(8, 1, False), "grad_input"),
        (
            GradientFilter(2),
            gradient_filter,
            "conv_grid",
            lambda call: gradient_filter.Grid(8 * 9, 6, False),
            "grad_input",
        ),
        (Quantized(4), quantized, "codes", lambda call, n, ranges, bits: (quantized.fresh("codes", n),), "tape"),
        (Sketch(0.3), sketch, "directions", lambda n, ratio: max(1, int(ratio * n)), "projection"),
        (Sketch(0.3), sketch, "drawing_macs", lambda n, r: tucker.orthonormal_macs(n, r), "decomposition"),
    ],
    ids=["patches of one image", "kernel not summed", "a byte for 4 bits", "rounded down", "drawn once"],
)
def test_planted_faults_are_caught(
    store: ActivationStore, module: Any, attribute: str, wrong: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that forgets something differs from what runs, in the number that it is about."""
    g = ConvGeometry((9, 4, 5, 6), (2, 4, 3, 2), padding=((1, 1), (0, 1)))
    assert not differences(*step(g, store, np.float32))
    monkeypatch.setattr(module, attribute, wrong)
    assert what in differences(*step(g, store, np.float32))
