"""Multiply-adds of PyTorch's operations, worked by hand, with all sizes different."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from analysis.torch_modules.products import GRADIENTS, PRODUCTS


class Shaped(NamedTuple):
    """All that a rule reads of a tensor."""

    shape: tuple[int, ...]


def shaped(*shapes: tuple[int, ...]) -> list[Any]:
    return [Shaped(shape) for shape in shapes]


def convolution(x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> list[Any]:
    n = len(x) - 2
    given = {"stride": [1] * n, "padding": [0] * n, "dilation": [1] * n, "transposed": False, **options}
    return [*shaped(x, weight), None, given["stride"], given["padding"], given["dilation"], given["transposed"], [0], 1]


@pytest.mark.parametrize(
    ("name", "arguments", "macs"),
    [
        ("aten.mm", shaped((2, 3), (3, 5)), 30),
        ("aten.addmm", shaped((5,), (2, 3), (3, 5)), 30),
        ("aten.bmm", shaped((7, 2, 3), (7, 3, 5)), 210),
        ("aten.baddbmm", shaped((7, 2, 5), (7, 2, 3), (7, 3, 5)), 210),
        ("aten._grouped_mm", shaped((6, 8), (3, 8, 4), (3,)), 6 * 8 * 4),
        ("aten._grouped_mm", shaped((8, 6), (6, 4), (3,)), 6 * 8 * 4),
        ("aten._grouped_mm", shaped((3, 5, 8), (8, 6), (3,)), 5 * 8 * 6),
        ("aten.mv", shaped((2, 3), (3,)), 6),
        ("aten.dot", shaped((3,), (3,)), 3),
        # 2 images, 4 outputs of 3 channels (2 groups), kernel 3x2, output 6x7
        ("aten.convolution", convolution((2, 6, 8, 8), (4, 3, 3, 2)), 2 * 4 * 6 * 7 * 3 * 3 * 2),
        ("aten.convolution", convolution((2, 6, 9), (4, 6, 3), stride=[2], padding=[1]), 2 * 4 * 5 * 6 * 3),
        ("aten.convolution", convolution((1, 2, 5, 6, 7), (3, 2, 2, 2, 2), dilation=[1, 2, 3]), 3 * 4 * 4 * 4 * 2 * 8),
        # transposed: published reports
        ("aten.convolution", convolution((2, 4, 8, 8), (4, 6, 4, 4), stride=[2, 2], transposed=True), 49152),
        ("aten.convolution", convolution((2, 4, 8, 8), (4, 1, 3, 3), transposed=True), 4608),
        ("aten.convolution", convolution((2, 6, 8, 8), (6, 2, 2, 2), transposed=True), 6144),
        ("aten.convolution", convolution((1, 32, 1, 1), (32, 1, 3, 3), transposed=True), 288),
        # 2 images, 3 heads, 5 queries and 7 keys of 4 numbers, values of 6
        (
            "aten._scaled_dot_product_flash_attention_for_cpu",
            shaped((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
            2 * 3 * 5 * 7 * (4 + 6),
        ),
        ("aten.mkldnn_rnn_layer", shaped((5, 2, 3), (16, 3), (16, 4)), 5 * 2 * (48 + 64)),
    ],
)
def test_products_by_hand(name: str, arguments: list[Any], macs: int) -> None:
    """A size that is left out or taken twice changes the number."""
    assert PRODUCTS[name](arguments) == macs


@pytest.mark.parametrize("mask", [(True, True), (False, True), (True, False)])
def test_gradients_of_a_convolution_with_groups(mask: tuple[bool, bool]) -> None:
    """PyTorch's counter forgets the groups of the weight gradient."""
    x, weight, _, *others = convolution((2, 6, 8, 8), (4, 3, 3, 3), padding=[0, 0], stride=[2, 2])
    forward = 2 * 4 * 3 * 3 * 3 * 9  # 2 images, 4 outputs, 3x3 places, 3 channels, 9 of a kernel
    arguments = [Shaped((2, 4, 3, 3)), x, weight, [4], *others, (*mask, True)]
    found = GRADIENTS["aten.convolution_backward"](arguments)
    assert found == {"grad_input": forward * mask[0], "grad_weight": forward * mask[1]}


def test_gradients_of_attention() -> None:
    """The scores are computed again; then come two products with the values' width and two with the keys'."""
    shapes = shaped((2, 3, 5, 6), (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6))
    found = GRADIENTS["aten._scaled_dot_product_flash_attention_for_cpu_backward"](shapes)
    assert found == {"recompute": 2 * 3 * 5 * 7 * 4, "grad_input": 2 * 3 * 5 * 7 * (2 * 4 + 2 * 6)}
