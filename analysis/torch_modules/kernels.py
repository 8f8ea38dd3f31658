"""Where shapes alone give other results than the real kernels of a CPU: results as the kernels make them.

PyTorch computes shapes with functions of their own ("meta" functions), which differ from the kernels in three places:
the dtype of the statistics of normalisations, an index of ``EmbeddingBag``, and the workspace that an LSTM layer of
oneDNN keeps, whose size only the kernel knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from analysis.torch_modules.shortcuts import shortcut


def run_on_shapes(name: str, func: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The result of an operation on tensors without data, as the kernel would have made it."""
    if name == "aten._grouped_mm":  # whose function of shapes knows the kernels of GPUs alone
        return _grouped(*arguments)
    result = shortcut(name, func, arguments, options)
    if result is not None:
        return result
    result = func(*arguments, **options)
    mend = MENDED.get(name)
    return result if mend is None else mend(arguments, result)


def _grouped(a: Any, b: Any, ends: Any = None, *_: Any) -> Any:
    """Rows of a matrix times one matrix of several each, or the matrix of products of such groups."""
    if a.ndim == b.ndim == 2:
        return a.new_empty((ends.shape[0], a.shape[0], b.shape[1]))
    return a.new_empty((*a.shape[:-1], b.shape[-1]) if a.ndim == 2 or b.ndim == 3 else (a.shape[1], b.shape[-1]))


def _statistics(first: int) -> Callable[[Sequence[Any], Any], Any]:
    """Mean and inverse deviation have the dtype of the weights where that is another than the input's.

    ``first`` is the position of the weight, behind which the bias stands.
    """

    def mend(arguments: Sequence[Any], result: Any) -> Any:
        weight = next((each for each in arguments[first : first + 2] if each is not None), None)
        if weight is None or weight.dtype == arguments[0].dtype:
            return result
        output, *statistics = result
        return (output, *(each.to(weight.dtype) for each in statistics))

    return mend


def _embedding_bag(arguments: Sequence[Any], result: Any) -> Any:
    """The bag of every index is written into an array with room for one more."""
    output, bags, *others = result
    count = bags.shape[0]
    return (output, bags.new_empty((count + 1,))[:count] if count else bags, *others)


def _recurrent_layer(arguments: Sequence[Any], result: Any) -> Any:
    """With the workspace of the real kernel, which is asked for it."""
    output, h, c, workspace = result
    x, *weights = arguments[:5]
    sizes = tuple(tuple(each.shape) for each in (x, *weights, *arguments[5:7]))
    count = _workspace_elements(sizes, x.dtype, tuple(arguments[8]), *arguments[9:16])
    return output, h, c, workspace.new_empty((count,))


@lru_cache(maxsize=64)
def _workspace_elements(sizes: tuple[tuple[int, ...], ...], dtype: Any, *options: Any) -> int:
    """Elements of the workspace that the kernel keeps for tensors of these sizes: it runs once on zeros."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        tensors = [torch.zeros(size, dtype=dtype) for size in sizes]
        batch_sizes, *others = options
        kept = torch.ops.aten.mkldnn_rnn_layer(*tensors, False, list(batch_sizes), *others)[3]
    if kept is None:  # of a layer that is not differentiated
        return 0
    return int(kept.untyped_storage().nbytes() // kept.element_size())


MENDED: Mapping[str, Any] = {
    "aten.native_batch_norm": _statistics(1),
    "aten._native_batch_norm_legit": _statistics(1),
    "aten.native_group_norm": _statistics(1),
    "aten.native_layer_norm": _statistics(2),
    "aten._embedding_bag": _embedding_bag,
    "aten.mkldnn_rnn_layer": _recurrent_layer,
}
"""By the name of the operation."""
