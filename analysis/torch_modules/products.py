"""Multiply-adds of PyTorch's operations, from shapes alone: one function for each that multiplies.

Operations are known by the names that PyTorch's dispatcher gives them, for instance ``aten.addmm``. A function gets the
operation's arguments, of which it reads shapes, and gives multiply-adds: one number for a product of which the caller
knows the purpose, or a number for each purpose where one operation computes several gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Product = Callable[[Sequence[Any]], int]
Gradients = Callable[[Sequence[Any]], dict[str, int]]


def matrices(first: int) -> Product:
    """The product of two matrices, or of two batches of them, which are the arguments from ``first`` on.

    (.., m, k) times (.., k, n) takes Π(..)·m·k·n.
    """

    def macs(arguments: Sequence[Any]) -> int:
        a, b = arguments[first], arguments[first + 1]
        return math.prod(a.shape) * int(b.shape[-1])

    return macs


def grouped(arguments: Sequence[Any]) -> int:
    """Products of groups of rows with a matrix for each group (experts), or of the columns of one matrix with each."""
    a, b = arguments[:2]
    rows = a.shape[-2:] if len(a.shape) == 3 and len(b.shape) == 2 else a.shape
    return math.prod(rows) * int(b.shape[-1])


def vector(first: int) -> Product:
    """A matrix, or a vector, times a vector: as many multiply-adds as the first of the two has elements."""
    return lambda arguments: math.prod(arguments[first].shape)


def convolution(arguments: Sequence[Any]) -> int:
    """Any number of dimensions, with groups, and transposed."""
    x, weight, transposed = arguments[0], arguments[1], arguments[6]
    return convolution_macs(x.shape, weight.shape, bool(transposed), output_places(arguments))


def convolution_macs(x: Sequence[int], weight: Sequence[int], transposed: bool, places: int) -> int:
    """B·places·(elements of the weight): every element of the weight is used once for each place and image.

    Places are those of the output, of a transposed convolution those of the input. The weight is (C_out, C_in/g, ..),
    or transposed (C_in, C_out/g, ..): in both cases the groups are in its size already.

    >>> convolution_macs((2, 6, 8, 8), (4, 3, 3, 3), False, 6 * 6)  # 2·36 places, 4 outputs of 3 channels and 9 places
    7776
    >>> convolution_macs((2, 4, 8, 8), (4, 6, 4, 4), True, 8 * 8)
    49152
    """
    return int(x[0]) * places * math.prod(weight)


def output_places(arguments: Sequence[Any]) -> int:
    """Places of one channel at which a weight is applied: of the output, or of a transposed convolution's input.

    ⌊(n + 2·padding − dilation·(k − 1) − 1)/stride⌋ + 1 in every dimension.
    """
    x, weight, _, stride, padding, dilation, transposed = arguments[:7]
    if transposed:
        return math.prod(x.shape[2:])
    numbers = [_each(values, len(x.shape) - 2) for values in (stride, padding, dilation)]
    sizes = zip(x.shape[2:], weight.shape[2:], *numbers, strict=True)
    return math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


def _each(values: Sequence[int], count: int) -> list[int]:
    """One number for every dimension; a list of one number stands for all of them."""
    return list(values) * count if len(values) == 1 else list(values)


def convolution_gradients(arguments: Sequence[Any]) -> dict[str, int]:
    """Gradients of input and weight, those that are asked for: each takes as many multiply-adds as the forward pass.

    ``convolution_backward(grad, x, weight, bias sizes, stride, padding, dilation, transposed, .., mask)``.
    """
    _, x, weight, _, stride, padding, dilation, transposed = arguments[:8]
    wanted = arguments[10]
    macs = convolution([x, weight, None, stride, padding, dilation, transposed])
    return {"grad_input": macs * bool(wanted[0]), "grad_weight": macs * bool(wanted[1])}


def attention(arguments: Sequence[Any]) -> int:
    """Scores and weighted sum, B·heads·L·S·(E + E_v), whether or not a mask leaves out some of them."""
    scores, values = _attention(*arguments[:3])
    return scores + values


def attention_gradients(arguments: Sequence[Any]) -> dict[str, int]:
    """The scores once more, then four products: gradients of values, probabilities, queries and keys."""
    scores, values = _attention(*arguments[1:4])
    return {"recompute": scores, "grad_input": 2 * scores + 2 * values}


def _attention(query: Any, key: Any, value: Any) -> tuple[int, int]:
    return math.prod(query.shape) * int(key.shape[-2]), math.prod(query.shape[:-1]) * math.prod(value.shape[-2:])


def recurrent_layer(arguments: Sequence[Any]) -> int:
    """All steps of an LSTM layer in oneDNN, one direction: x (T, B, I), weights (4H, I) and (4H, H)."""
    x, weight, recurrent = arguments[:3]
    return math.prod(x.shape[:2]) * (math.prod(weight.shape) + math.prod(recurrent.shape))


def recurrent_layer_gradients(arguments: Sequence[Any]) -> dict[str, int]:
    """Gradients of what goes in, and of both weights."""
    macs = recurrent_layer(arguments)
    return {"grad_input": macs, "grad_weight": macs}


_ATTENTION = (
    "aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention",
)  # fmt: skip

PRODUCTS: Mapping[str, Product] = {
    "aten.mm": matrices(0), "aten.bmm": matrices(0), "aten.addmm": matrices(1), "aten.baddbmm": matrices(1),
    "aten.addbmm": matrices(1), "aten._scaled_mm": matrices(0), "aten._int_mm": matrices(0),
    "aten._grouped_mm": grouped,
    "aten.mv": vector(0), "aten.addmv": vector(1), "aten.dot": vector(0), "aten.vdot": vector(0),
    "aten.convolution": convolution, "aten._convolution": convolution, "aten.mkldnn_rnn_layer": recurrent_layer,
    **dict.fromkeys(_ATTENTION, attention),
}  # fmt: skip
"""Operations that are one product, or the products of one forward pass."""

GRADIENTS: Mapping[str, Gradients] = {
    "aten.convolution_backward": convolution_gradients,
    "aten.mkldnn_rnn_layer_backward": recurrent_layer_gradients,
    **{f"{name}_backward": attention_gradients for name in _ATTENTION},
}
"""Operations that compute several gradients."""

ACTIVATION: Mapping[str, int] = {
    "aten.mm": 0, "aten.bmm": 0, "aten.mv": 0, "aten.addmm": 1, "aten.baddbmm": 1, "aten.convolution": 0,
    "aten._convolution": 0,
}  # fmt: skip
"""Which argument is the input of a layer, where the operation is that of a layer."""

UNCOUNTED = frozenset({
    "aten._trilinear", "aten._cdist_forward", "aten._fft_r2c", "aten._fft_c2c", "aten._fft_c2r", "aten.linalg_inv_ex",
    "aten.linalg_solve_triangular", "aten._linalg_solve_ex", "aten._linalg_svd", "aten._linalg_eigh",
    "aten.linalg_cholesky_ex", "aten.linalg_qr", "aten.linalg_lu_factor_ex", "aten.miopen_rnn", "aten._cudnn_rnn",
})  # fmt: skip
"""Operations of ATen that multiply and add, for which nobody wrote a function here: a report names them."""
