"""The layers of the kit: convolutions of every geometry, linear layers of two and three modes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref.conformance import definitions
from lance_ref.conformance.case import Case, Numbers

Ranks = tuple[int | None, ...]
NONE = ((0, 0), (0, 0))


@dataclass(frozen=True)
class Layer:
    """One layer: its input, the size of its weight, and the ranks that LANCE keeps."""

    name: str
    about: str
    input_shape: tuple[int, ...]
    weight: tuple[int, ...]  #: (C_out, k_h, k_w) of a convolution, (O,) of a linear layer.
    ranks: Ranks
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = NONE
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def geometry(self) -> dict[str, Any]:
        """As it stands in the JSON."""
        width = self.input_shape[-1] if len(self.weight) == 1 else self.input_shape[1] // self.groups
        shapes = {"input_shape": list(self.input_shape), "weight_shape": [self.weight[0], width, *self.weight[1:]]}
        if len(self.weight) == 1:
            return {"kind": "linear", **shapes, "output_shape": [*self.input_shape[:-1], self.weight[0]]}
        sizes = zip(self.input_shape[2:], self.padding, self.dilation, self.weight[1:], self.stride, strict=True)
        output_size = [(n + sum(zeros) - d * (k - 1) - 1) // s + 1 for n, zeros, d, k, s in sizes]
        return {
            "kind": "conv",
            **shapes,
            "output_shape": [self.input_shape[0], self.weight[0], *output_size],
            "stride": list(self.stride),
            "padding": [list(sides) for sides in self.padding],
            "dilation": list(self.dilation),
            "groups": self.groups,
        }


LAYERS: Sequence[Layer] = (
    Layer("conv_plain", "3×2 kernel, nothing else", (2, 3, 6, 5), (4, 3, 2), (1, 2, 3, 2)),
    Layer("conv_1x1", "1×1 kernel", (3, 4, 3, 2), (5, 1, 1), (2, 3, 2, 1)),
    Layer("conv_1x1_stride", "1×1 kernel with a stride", (2, 3, 5, 4), (4, 1, 1), (1, 2, 2, 2), (2, 3)),
    Layer("conv_stride", "another stride for height and width", (2, 3, 7, 8), (2, 3, 3), (1, 2, 2, 3), (2, 3)),
    Layer("conv_stride_leftover", "last rows that no kernel reaches", (2, 2, 8, 6), (3, 3, 3), (1, 2, 3, 2), (3, 2)),
    Layer("conv_padding", "more zeros for width", (2, 3, 4, 5), (3, 3, 3), (1, 2, 2, 2), padding=((1, 1), (2, 2))),
    Layer(
        "conv_padding_sides", "four different sides",
        (2, 2, 4, 5), (3, 3, 2), (1, 2, 3, 2), padding=((1, 0), (3, 2)),
    ),
    Layer("conv_dilation", "dilation of 2 and 3", (2, 2, 6, 8), (3, 2, 3), (1, 1, 2, 3), dilation=(2, 3)),
    Layer("conv_tall_kernel", "4×1 kernel", (2, 3, 6, 3), (2, 4, 1), (1, 2, 2, 2)),
    Layer("conv_wide_kernel", "1×3 kernel", (2, 3, 3, 6), (2, 1, 3), (1, 2, 2, 2)),
    Layer(
        "conv_kernel_beyond_image", "a kernel larger than the image",
        (2, 2, 2, 3), (3, 4, 5), (1, 2, 1, 2), padding=((2, 1), (1, 2)),
    ),
    Layer("conv_one_place", "an output of one pixel", (3, 2, 3, 4), (4, 3, 4), (2, 1, 2, 2)),
    Layer("conv_one_image", "a batch of one", (1, 3, 5, 4), (2, 3, 3), (1, 2, 2, 2), padding=((1, 1), (1, 1))),
    Layer(
        "conv_groups", "two groups, the channels compressed across them",
        (2, 6, 5, 4), (4, 3, 3), (1, 4, 2, 2), groups=2,
    ),
    Layer(
        "conv_groups_channels_alone", "three groups, the channels left alone",
        (2, 6, 4, 5), (3, 2, 3), (1, None, 2, 2), groups=3,
    ),
    Layer(
        "conv_everything", "groups, strides, dilations and four paddings together",
        (3, 4, 8, 7), (6, 3, 2), (2, 3, 4, 3), (2, 1), ((1, 2), (0, 1)), (1, 2), 2,
    ),
    Layer("conv_depthwise", "depthwise", (2, 4, 6, 5), (4, 3, 3), (1, 2, 2, 3), (2, 1), ((1, 1), (1, 1)), groups=4),
    Layer(
        "conv_depthwise_multiplier", "depthwise, two outputs a channel",
        (2, 3, 5, 5), (6, 3, 2), (1, 2, 2, 2), groups=3,
    ),
    Layer("conv_batch_alone", "the batch mode left alone", (3, 3, 4, 5), (2, 3, 2), (None, 2, 2, 2)),
    Layer("conv_channel_only", "the channel mode compressed alone", (3, 4, 4, 3), (2, 2, 2), (None, 2, None, None)),
    Layer("conv_space_only", "height and width compressed alone", (2, 3, 5, 6), (2, 3, 3), (None, None, 2, 3)),
    Layer("conv_batch_only", "the batch mode compressed alone", (4, 2, 4, 3), (3, 2, 2), (2, None, None, None)),
    Layer("conv_width_alone", "the width left alone", (3, 3, 4, 5), (2, 2, 3), (2, 2, 2, None), (1, 2)),
    Layer("conv_nothing", "no mode compressed: plain backpropagation", (2, 3, 4, 4), (3, 3, 3), (None,) * 4),
    Layer("conv_rank_one", "rank 1 in every mode", (3, 4, 5, 4), (3, 3, 3), (1, 1, 1, 1), padding=((1, 1), (1, 1))),
    Layer(
        "conv_full_rank", "full rank, the factors not symmetric: backpropagation's gradient from a rotated core",
        (3, 4, 5, 6), (2, 3, 3), (3, 4, 5, 6), (1, 2), ((1, 1), (0, 1)),
    ),
    Layer(
        "conv_equal_sizes", "every size is 4, so that exchanged modes or axes show in values alone",
        (4, 4, 4, 4), (4, 3, 3), (4, 4, 4, 4), padding=((1, 1), (1, 1)),
    ),
    Layer("linear", "(B, I)", (5, 6), (4,), (3, 2)),
    Layer("linear_feature_only", "the feature mode compressed alone", (4, 6), (3,), (None, 3)),
    Layer("linear_batch_only", "the batch mode compressed alone", (5, 4), (3,), (2, None)),
    Layer("linear_equal_sizes", "B = I = O at full rank", (4, 4), (4,), (4, 4)),
    Layer("linear_nothing", "no mode compressed", (3, 5), (2,), (None, None)),
    Layer("linear_one_sample", "a batch of one", (1, 6), (4,), (1, 3)),
    Layer("linear_tokens", "(B, L, I)", (3, 5, 6), (4,), (2, 3, 2)),
    Layer("linear_tokens_batch_alone", "tokens, the batch mode left alone", (3, 4, 5), (2,), (None, 2, 3)),
    Layer("linear_tokens_feature_only", "tokens, the feature mode alone", (2, 4, 6), (3,), (None, None, 2)),
    Layer("linear_tokens_equal_sizes", "B = L = I = O at full rank", (4, 4, 4), (4,), (4, 4, 4)),
)  # fmt: skip


def layer_cases() -> Iterator[Case]:
    """Every layer in both dtypes."""
    for layer in LAYERS:
        for dtype in ("float32", "float64"):
            yield layer_case(layer, dtype)


def layer_case(layer: Layer, dtype: str) -> Case:
    """One layer: its three products, LANCE's core and weight gradient, and what they cost."""
    geometry, numbers = layer.geometry(), Numbers(layer.name)
    case = Case(f"{layer.name}.{dtype}", layer.about, dtype)
    inputs: dict[str, np.ndarray] = {}

    def given(name: str, value: np.ndarray) -> dict[str, str]:
        inputs[name] = value.astype(dtype)
        reference = case.array(name, inputs[name])
        inputs[name] = inputs[name].astype(np.float64)  # for the definitions: the numbers that the adapter gets
        return reference

    activation = given("activation", numbers.array(*layer.input_shape))
    weight = given("weight", numbers.array(*geometry["weight_shape"]))
    bias = given("bias", numbers.array(layer.weight[0]))
    grad_output = given("grad_output", numbers.array(*geometry["output_shape"]))
    factors = [
        None if r is None else given(f"factor_{mode}", numbers.orthonormal(n, r))
        for mode, (n, r) in enumerate(zip(layer.input_shape, layer.ranks, strict=True))
    ]
    A, W, b, G = (inputs[name] for name in ("activation", "weight", "bias", "grad_output"))
    U = [inputs.get(f"factor_{mode}") for mode in range(A.ndim)]

    arguments = {"activation": activation, "weight": weight, "bias": bias, "geometry": geometry}
    case.expect_array("forward", arguments, definitions.forward(A, W, b, geometry))
    arguments = {"weight": weight, "grad_output": grad_output, "geometry": geometry}
    case.expect_array("input_gradient", arguments, definitions.input_gradient(W, G, geometry))
    arguments = {"grad_output": grad_output, "geometry": geometry}
    case.expect_array("bias_gradient", arguments, definitions.bias_gradient(G, geometry))

    projection = {"activation": activation, "factors": factors}
    S = definitions.project(A, U)
    case.expect_array("project", projection, S)
    core = given("core", S)
    gradient = {"core": core, "factors": factors, "grad_output": grad_output, "geometry": geometry}
    dW = definitions.weight_gradient(definitions.expand(inputs["core"], U), G, geometry)
    case.expect_array("weight_gradient", gradient, dW)

    case.expect_exactly("saved_bytes", projection, math.prod(S.shape) * np.dtype(dtype).itemsize)
    case.expect_exactly("projection_macs", projection, definitions.projection_macs(A.shape, U))
    for order in ("papers", "separable") if geometry["kind"] == "conv" else (None,):
        macs = definitions.weight_gradient_macs(U, geometry, order)
        case.expect_exactly("weight_gradient_macs", {**gradient, "order": order}, macs)
    return case
