"""LANCE's closed formulas against integers worked out by hand; every size is different."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.rules import tucker_costs
from analysis.rules.tucker_costs import ConvSizes

# input (8, 6, 5, 7), weight (4, 6/2, 3, 2), output (8, 4, 3, 6)
SIZES = ConvSizes(B=8, C_in=6, size=(5, 7), C_out=4, size_out=(3, 6), kernel=(3, 2), groups=2)
SHAPE = SIZES.input_shape


def test_exact_convolution_counts_every_size_once() -> None:
    """A forgotten C_in, kernel side or group would show: 8·4·(3·6)·(6/2)·(3·2)."""
    assert SIZES.macs == 10_368


def test_core_and_factors() -> None:
    """3·5·2·4 elements kept; factors 8·3 + 6·5 + 5·2 + 7·4."""
    assert tucker_costs.core_elements(SHAPE, (3, 5, 2, 4)) == 120
    assert tucker_costs.factor_elements(SHAPE, (3, 5, 2, 4)) == 92


def test_a_mode_left_alone_has_no_factor_and_keeps_its_size() -> None:
    assert tucker_costs.core_shape(SHAPE, (3, None, 2, None)) == (3, 6, 2, 7)
    assert tucker_costs.factor_elements(SHAPE, (3, None, 2, None)) == 34
    assert tucker_costs.projection_macs(SHAPE, (None, None, None, None)) == 0


def test_projection_takes_the_cheapest_order() -> None:
    """Height 1680·2, batch 672·3, width 252·4, channel 144·5; the order 0..3 would take 10,080."""
    assert tucker_costs.projection_macs(SHAPE, (3, 5, 2, 4), "separable") == 3360 + 2016 + 1008 + 720


def test_projection_of_small_maps_takes_height_and_width_as_one() -> None:
    """The map of 35 places to 8: batch 1680·3, map 630·8, channel 144·5 (1/3 − 1/8, 1/8 − 1/35, 1/5 − 1/6)."""
    assert tucker_costs.projection_macs(SHAPE, (3, 5, 2, 4)) == 5040 + 5040 + 720


def test_projection_as_the_paper_bills_it() -> None:
    """1680·(3 + 5 + 2 + 4), and a mode left alone adds nothing."""
    assert tucker_costs.paper_projection_macs(SHAPE, (3, 5, 2, 4)) == 23_520
    assert tucker_costs.paper_projection_macs(SHAPE, (3, None, 2, None)) == 8_400


@pytest.mark.parametrize(
    ("ranks", "papers", "separable"),
    [
        # Z1 8·4·18·3, Z2 120·7 + 210·5, Z3 3·4·18·5·6, dW 24·5·3  |  576·3 + 216·8 + 288·6, 24·5·24, 360
        ((3, 5, 2, 4), 1728 + 1890 + 6480 + 360, 5184 + 2880 + 360),
        # channels left alone: Z2 144·7 + 252·5, Z3 3·4·18·3·6, no dW  |  5184, 24·3·24
        ((3, None, 2, 4), 1728 + 2268 + 3888, 5184 + 1728),
        # batch left alone: Z2 320·7 + 560·5, Z3 8·4·18·5·6  |  576·8 + 768·6, 24·5·64
        ((None, 5, 2, 4), 5040 + 17_280 + 360, 9216 + 7680 + 360),
        # height left alone, its factor the identity: Z2 300·7  |  1728 + 1728 + 288·15, 24·5·60
        ((3, 5, None, 4), 1728 + 2100 + 6480 + 360, 7776 + 7200 + 360),
        # nothing compressed but the channels: Z3 8·4·18·5·6  |  576·15 + 2880·... , see below
        ((None, 5, None, None), 17_280 + 360, None),
    ],
)
def test_both_orders_of_the_weight_gradient(ranks: tuple[int | None, ...], papers: int, separable: int | None) -> None:
    """Each order against its hand-worked sum; auto takes the cheaper."""
    if separable is None:
        # rows to 3·5, columns to 2·7: 576·14 + 1344·15 (the other way round 576·15 + 1440·14); 24·5·(8·5·7)
        separable = 8064 + 20_160 + 33_600 + 360
    assert tucker_costs.conv_weight_gradient_macs(SIZES, ranks, "papers") == papers
    assert tucker_costs.conv_weight_gradient_macs(SIZES, ranks, "separable") == separable
    in_one = tucker_costs.conv_separable_macs(SIZES, ranks, one_product=True)
    assert tucker_costs.conv_weight_gradient_macs(SIZES, ranks) <= min(papers, in_one)


def test_one_product_for_the_map_of_an_output_gradient() -> None:
    """Batch 576·3, then 18 places to 6·8 = 48: 216·48; 24·5·24; 24·5·3. Not with 9·10 numbers."""
    assert tucker_costs.conv_separable_macs(SIZES, (3, 5, 2, 4), one_product=True) == 1728 + 10_368 + 2880 + 360
    assert tucker_costs.contraction(SIZES, (3, 5, 3, 5), True) == ((8, 4, 3, 6), (3, None, 9, 10))


@pytest.mark.parametrize(
    ("expanded", "macs"),
    [
        # core (3, 5, 2, 4), batch to 8: 120·8; G's height and width 9216; its group's rows of U_2: 24·5·64, 360
        ((0,), 960 + 9216 + 7680 + 360),
        # channels to 6, each output then sees three: 120·6, 5184, 24·3·24
        ((1,), 720 + 5184 + 1728),
        # channels 720, then batch 144·8 (the other order takes 960 + 320·6): 9216, 24·3·64
        ((0, 1), 720 + 1152 + 9216 + 4608),
    ],
)
def test_modes_put_back_in_the_core(expanded: tuple[int, ...], macs: int) -> None:
    """By hand; of these 1,680 / 4 = 420 elements may be put back, 3·6·2·4 = 144 and 8·6·2·4 = 384 among them."""
    assert tucker_costs.conv_separable_macs(SIZES, (3, 5, 2, 4), expanded) == macs
    # the map of G as one mode, 18 to 48; the papers' order takes 7884 where channels are left alone
    assert tucker_costs.conv_cheapest(SIZES, (3, 5, 1, 2)) == (180 + 1728 + 2592 + 432, "separable", (1,))
    assert tucker_costs.conv_cheapest(SIZES, (3, None, 1, 2)) == (1728 + 2592 + 432, "separable", ())


def test_a_core_put_back_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the activation, or the limit: else the whole activation might be formed again."""
    assert tucker_costs.conv_cheapest(SIZES, (3, 5, 5, 7))[2] == ()  # 3·6·5·7 = 630
    monkeypatch.setattr(tucker_costs, "EXPANDED_ELEMENTS", 143)
    assert tucker_costs.conv_cheapest(SIZES, (3, 5, 2, 4))[2] == ()


def test_depthwise_is_groups_equal_to_channels() -> None:
    """C_in/g = 1: the last product shrinks with the groups, the correlation with r2 does not."""
    sizes = ConvSizes(B=8, C_in=6, size=(5, 7), C_out=6, size_out=(3, 4), kernel=(3, 2), groups=6)
    # Z1 8·6·12·3, Z2 1890, Z3 3·6·12·5·6, dW 6·6·5·1
    assert tucker_costs.conv_papers_macs(sizes, (3, 5, 2, 4)) == 1728 + 1890 + 6480 + 180


@pytest.mark.parametrize(
    ("shape", "ranks", "macs"),
    [
        ((8, 6), (3, 2), 8 * 5 * 3 + 3 * 5 * 2 + 5 * 2 * 6),
        ((8, 6), (None, 2), 8 * 5 * 2 + 5 * 2 * 6),
        ((8, 6), (3, None), 8 * 5 * 3 + 3 * 5 * 6),
        ((8, 6), (None, None), 8 * 5 * 6),
        # tokens first: 8·7·5·2 to (8, 2, 5), then batch 80·3; batch first would take 840 + 210
        ((8, 7, 6), (3, 2, 4), 560 + 240 + 3 * 2 * 5 * 4 + 5 * 4 * 6),
        # fewer rows than features: the core's features first; in the papers' order 2·5·4 + 5·4·6
        ((2, 6), (None, 4), 2 * 4 * 6 + 2 * 5 * 6),
    ],
)
def test_linear_weight_gradient(shape: tuple[int, ...], ranks: tuple[int | None, ...], macs: int) -> None:
    """Batch, token and feature each compressed or left alone, five outputs."""
    assert tucker_costs.linear_weight_gradient_macs(shape, 5, ranks) == macs


def test_the_papers_order_of_a_linear_layer() -> None:
    """What published figures are compared with does not change with the order that runs."""
    assert tucker_costs.linear_weight_gradient_macs((2, 6), 5, (None, 4), "papers") == 2 * 5 * 4 + 5 * 4 * 6
    with pytest.raises(ValueError, match="order is 'separable', expected 'papers' or 'auto'"):
        tucker_costs.linear_weight_gradient_macs((2, 6), 5, (None, 4), "separable")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9) | st.none()), min_size=1, max_size=4))
def test_mode_products_equal_products_that_run(modes: list[tuple[int, int | None]]) -> None:
    """The formula is the least of what really running every order takes, sizes read off the arrays."""
    shape, ranks = tuple(n for n, _ in modes), tuple(r for _, r in modes)
    totals = []
    for order in permutations([mode for mode, rank in enumerate(ranks) if rank is not None]):
        array, total = np.ones(shape), 0
        for mode in order:
            n, r = array.shape[mode], ranks[mode]
            assert r is not None
            array = np.moveaxis(np.tensordot(array, np.ones((n, r)), (mode, 0)), -1, mode)
            total += array.size * n
        totals.append(total)
    assert tucker_costs.mode_products_macs(shape, ranks) == min(totals)


def test_full_rank_costs_no_less_than_its_core() -> None:
    """At full rank nothing is saved: the core is as large as the activation."""
    assert tucker_costs.core_elements(SHAPE, SHAPE) == math.prod(SHAPE)


def test_wrong_number_of_ranks_is_refused() -> None:
    """A forgotten mode must not be taken for one that is left alone."""
    with pytest.raises(ValueError, match="one for each mode"):
        tucker_costs.projection_macs(SHAPE, (3, 5, 2))


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'papers', 'separable' or 'auto'"):
        tucker_costs.conv_weight_gradient_macs(SIZES, (3, 5, 2, 4), "fastest")
