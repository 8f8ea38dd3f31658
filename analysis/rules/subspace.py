"""What it costs that a layer trains in a subspace, W = s·W_0 + D ×₂ Q: formulas of shapes alone.

The record of such a layer has the inputs (x, D, [bias], W_0, s), and an attribute ``update``. Sizes: D has r numbers
where the weight has C_in/g, or K = C_in·k_h·k_w of a patch.

merged      W is written down, C_out·C_in/g·k_h·k_w·r multiply-adds, forward and, where the input has a gradient, again
factored    two narrow layers beside the product with W_0: Qᵀ to r channels of each group, and D

Nothing of it is taken from the library, which counts what really ran.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from analysis.rules.layouts import Layout, Storage, packed_strides
from analysis.rules.op_cost import Call, weight_of
from lance_ref.engine.recording import OpRecord, Value


def rank_of_update(rank: int, width: int, groups: int, centred: bool) -> int | None:
    """r of a layer whose channels or features have a factor of that rank; None where D would not be smaller.

    ``width`` is the number of channels of a group. Of one group without a mean Q is the factor; otherwise the basis of
    a group's rows, with the mean as one more.

    >>> rank_of_update(3, 8, 1, False), rank_of_update(3, 8, 2, True), rank_of_update(3, 3, 2, False)
    (3, 4, None)
    """
    r = min(rank + centred, width)
    return r if r < width else None


def own_basis(groups: int, centred: bool) -> bool:
    """Whether Q is the factor of the store itself, so that nothing more is kept."""
    return groups == 1 and not centred


def update_of(record: OpRecord) -> Mapping[str, Any] | None:
    """What the record says of its update; None for a layer whose whole weight trains."""
    return record.attributes.get("update")


def narrow_macs(record: OpRecord) -> int:
    """Multiply-adds of the two narrow layers, from the input to the output."""
    x, weight, out = record.inputs[0].shape, weight_of(record).shape, record.output.shape
    r, kernel = record.attributes["update"]["rank"], math.prod(weight[2:])
    if record.op == "linear":
        return math.prod(x[:-1]) * r * (x[-1] + weight[0])
    if record.attributes["update"]["patches"]:
        return math.prod(out) // weight[0] * r * (math.prod(weight[1:]) + weight[0])
    return math.prod(x) * r + math.prod(out) * r * kernel


def merging_macs(record: OpRecord) -> int:
    """Multiply-adds of writing the weight down."""
    return int(math.prod(weight_of(record).shape) * record.attributes["update"]["rank"])


def is_merged(record: OpRecord) -> bool:
    """Whether the output is computed from W: as ``forward`` says, by default if that takes no more multiply-adds."""
    way = record.attributes["update"]["forward"]
    return bool(way == "merged" or (way == "auto" and merging_macs(record) <= narrow_macs(record)))


def extra_macs(record: OpRecord) -> int:
    """Multiply-adds beside those of the whole weight, of the output and again of the input gradient."""
    return merging_macs(record) if is_merged(record) else narrow_macs(record)


def basis_elements(channels: int, groups: int, rank: int, r: int, centred: bool) -> int:
    """Numbers beside the factors: Q (C_in·r in all), the factor in its coordinates (g·r·rank), and the mean in them.

    >>> basis_elements(12, 2, 3, 4, True), basis_elements(12, 1, 3, 3, False)  # 48 + 24 + 8
    (80, 0)
    """
    if own_basis(groups, centred):
        return 0
    return channels * r + groups * r * rank + groups * r * centred


def of_update(call: Call) -> Call:
    """The layer D on Qᵀ x, whose weight gradient is that of the update, with the store in its coordinates.

    Its output, and so the output gradient, is that of the layer itself.
    """
    record, update = call.record, call.record.attributes["update"]
    x, store, r = record.inputs[0], record.attributes["store"], update["rank"]
    groups, feature = record.attributes.get("groups", 1), 1 if len(x.shape) >= 4 else len(x.shape) - 1
    shape = _with(x.shape, feature, groups * r)
    if own_basis(groups, bool(store.get("centred"))):
        store = {**store, "ranks": _with(store["ranks"], feature, None)}
    attributes = {**{name: value for name, value in record.attributes.items() if name != "update"}, "store": store}
    inputs = (replace(x, shape=shape), *record.inputs[1:-2])
    layouts = (Layout(Storage(0), shape, packed_strides(shape)), *call.inputs[1:-2])
    return replace(call, record=replace(record, inputs=inputs, attributes=attributes), inputs=layouts)


def with_update(record: OpRecord, r: int, D: Value, decay: Value) -> OpRecord:
    """The record of a layer whose whole weight trains, as that of one that trains in a subspace."""
    x, weight, *bias = record.inputs
    attributes = {**record.attributes, "update": {"rank": r, "patches": False, "forward": "auto"}}
    inputs = (x, D, *bias, replace(weight, requires_grad=False), decay)
    return replace(record, inputs=inputs, attributes=attributes)


def _with(sizes: Sequence[Any], position: int, value: Any) -> tuple[Any, ...]:
    return (*sizes[:position], value, *sizes[position + 1 :])
