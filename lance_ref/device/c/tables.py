"""A program's tables in C: maps, layers, operations, segments and tiles.

Every function gives one struct of ``lance_table.h`` as a mapping of its fields to C expressions; :func:`struct` writes
it. Addresses are bytes from the start of the arena.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lance_ref.device.arena import PERSISTENT, Array
from lance_ref.device.c.constants import Constants, number, quantised
from lance_ref.device.graph import Graph, Node, Window
from lance_ref.device.instructions import Backward, Forward, SegmentPlan
from lance_ref.device.layers import Core, Input, Layer
from lance_ref.device.layout import DeviceLayout, Recipe
from lance_ref.device.segments import ELEMENTWISE

NONE = "LANCE_NONE"
KINDS = {
    "relu": "LANCE_RELU", "relu6": "LANCE_RELU6", "hardswish": "LANCE_HARDSWISH", "dropout": "LANCE_DROPOUT",
    "conv": "LANCE_DEPTHWISE", "max_pool": "LANCE_MAX_POOL", "avg_pool": "LANCE_AVG_POOL",
    "adaptive_pool": "LANCE_ADAPTIVE_POOL",
}  # fmt: skip
Fields = Mapping[str, Any]


def at(array: Array | None) -> str:
    """The address of an array's first number."""
    return NONE if array is None else str(array.offset + array.lead)


def struct(fields: Fields, indent: str = "    ") -> str:
    """``{.a = 1, .b = 2}``, with what is zero, false or NULL left out, in lines that are not too long."""
    parts = [f".{name} = {_expression(value)}" for name, value in fields.items() if value not in (0, None, False, "")]
    lines = [indent + "{"]
    for part in parts:
        if len(lines[-1]) + len(part) > 104:
            lines[-1] = lines[-1].rstrip()
            lines.append(indent + " ")
        lines[-1] += f"{part}, "
    return lines[0] + "".join(f"\n{line}" for line in lines[1:]).rstrip().removesuffix(",") + "}," if parts else ""


def _expression(value: Any) -> str:
    if isinstance(value, Window):
        pairs = {"kernel": value.kernel, "stride": value.stride, "dilation": value.dilation, "before": value.before}
        return "{" + ", ".join(f"{{{a}, {b}}}" for a, b in pairs.values()) + "}"
    if isinstance(value, tuple):
        return "{" + ", ".join(map(str, value)) + "}"
    if isinstance(value, Mapping):
        shown = [f".{k} = {_expression(v)}" for k, v in value.items() if v not in (0, None, False, "")]
        return "{" + ", ".join(shown) + "}"
    return "true" if value is True else str(value)


class Tables:
    """The tables of a program.

    Parameters
    ----------
    graph, recipe, layout
        Of the program.
    flash : dict of str to array
        Its constants by name.
    state : dict of Array to array
        What was learned until now.
    in_int8 : bool
        Whether frozen weights are stored in int8.
    """

    def __init__(
        self, graph: Graph, recipe: Recipe, layout: DeviceLayout, flash: Mapping[str, np.ndarray],
        state: Mapping[Array, np.ndarray], in_int8: bool,
    ) -> None:  # fmt: skip
        self.graph, self.recipe, self.layout, self.state, self.in_int8 = graph, recipe, layout, state, in_int8
        self.flash = flash
        self.constants = Constants()
        instructions: list[Forward] = [*(layout.tiles[0] if layout.tiles else []), *layout.forward]
        self.plans: list[SegmentPlan] = [instruction.plan for instruction in instructions]
        self.backward: dict[int, Backward] = {id(step.plan): step for step in layout.backward}
        self.layers: dict[Node, int] = {}
        for plan in self.plans:
            for node in plan.segment.nodes:
                if node.conv is not None:
                    self.layers[node] = len(self.layers)
        self.operations: list[tuple[SegmentPlan, Node]] = []

    # ---- the files ------------------------------------------------------------------------------

    def source(self) -> str:
        """``lance_net.c``"""
        self.operations = []
        segments = [struct(self.segment(plan)) for plan in self.plans]  # numbers the operations
        operations = [struct(self.operation(plan, node)) for plan, node in self.operations]
        parts = [
            '#include "lance_weights.h"', self.arena(), _table("lance_map", "maps", map(struct, self.maps())),
            _table("lance_layer", "layers", (self.named_layer(node) for node in self.layers)),
            _table("lance_operation", "operations", operations or ["    {0},"]),
            _table("lance_segment", "segments", segments), self.tiles(), self.graves(),
        ]  # fmt: skip
        return "\n".join(parts)

    def header(self, options: Mapping[str, str]) -> str:
        """``lance_net.h``: sizes and options."""
        layout, g = self.layout, self.graph
        C, H, W = g.shapes[0]
        rows, columns = self._tile_parts()
        sizes = {
            "STATE_BYTES": sum(array.nbytes for array in layout.arrays if array.is_state),
            "IMAGE_AT": at(layout.image), "IMAGE_NUMBERS": C * H * W, "CLASSES": g.shapes[g.output][0],
            "OUTPUT": g.output, "SEGMENTS": len(self.plans), "TILED": layout.choice.tiled,
            "TILED_MAPS": max(len(rows[0]) if rows else 1, 1), "TILE_ROWS": len(rows), "TILE_COLUMNS": len(columns),
            "LAYERS": len(self.layers), "MOMENTUM": number(self.recipe.momentum), **options,
        }  # fmt: skip
        draws = [array for array in layout.arrays if array.dtype == np.uint32]
        flags = {
            "PIXELS": self.recipe.pixels is not None, "INT8": self.in_int8, "AT_ONCE": not self.recipe.has_sums,
            "EACH_IMAGE": self.recipe.update == "image",
        }  # fmt: skip
        if draws:
            sizes |= {"DRAWS_AT": at(draws[0]), "DRAWS_START": f"{int(self.state[draws[0]][0])}u"}
        lines = [f"#define LANCE_{name} {value}" for name, value in sizes.items()]
        lines += [f"#define LANCE_{name}" for name, value in flags.items() if value]
        return "\n".join(lines)

    def arena(self) -> str:
        """What lies where, for people."""
        lines = ["\n/* The arena:", f" * {'from':>8} {'to':>8}  alive"]
        for array in sorted(self.layout.arrays, key=lambda array: (array.offset, array.first)):
            shape = " x ".join(map(str, array.shape))
            always = "always" if array.kind in PERSISTENT else f"{array.first}-{array.last}"
            name = f"{array.name}, {shape}"
            lines.append(f" * {array.offset:8} {array.offset + array.nbytes:8}  {always:8} {_plain(name)}")
        return "\n".join([*lines, " */"])

    # ---- structs --------------------------------------------------------------------------------

    def maps(self) -> Iterator[Fields]:
        places, gradients = self.plans[0].maps, self.plans[0].gradients
        for n, (C, H, W) in sorted(self.graph.shapes.items()):
            array = places.get(n)
            form = "LANCE_WHOLE"
            if array is not None and array.dtype == np.uint8:
                form = "LANCE_BYTES"
            elif array is not None and array.kind == "tiles":
                form = "LANCE_TILE"
            elif array is not None and array.rows_first:
                form = "LANCE_ROWS_FIRST"
            gradient = gradients.get(n)
            yield {
                "C": C, "H": H, "W": W, "form": form, "at": at(array),
                "gradient": at(gradient if gradient is not None and gradient.offset >= 0 else None),
            }  # fmt: skip

    def named_layer(self, node: Node) -> str:
        assert node.conv is not None
        return f"    /* {self.layers[node]}: {_plain(node.conv.path)} */\n" + struct(self.layer(node))

    def layer(self, node: Node) -> Fields:
        layer, conv = self._layer(node), node.conv
        assert conv is not None
        path = conv.path
        trained = layer.change if layer.change is not None else layer.weight
        gradients = layer.gradients
        fields: dict[str, Any] = {
            "C_in": conv.weight.shape[1] * conv.groups, "C_out": len(conv.weight), "groups": conv.groups,
            "is_linear": conv.is_linear, "window": conv.window, "input": layer.input_size,
            "output": layer.output_size,
        }  # fmt: skip
        if layer.weight is None and self.in_int8:
            codes, unit = quantised(conv.weight)
            fields |= {"W0": self.constants.add(f"{path}.weight", codes)}
            fields |= {"unit": self.constants.add(f"{path}.weight unit", unit)}
        elif layer.weight is None:
            fields |= {"W0": self._constant(f"{path}.weight")}
        return fields | {
            "shift": self._constant(f"{path}.shift"), "weight_scale": self._constant(f"{path} weight scale"),
            "bias_scale": self._constant(f"{path} bias scale"),
            "W": at(layer.weight), "D": at(layer.change), "bias": at(layer.bias),
            "gradient": at(gradients.get(trained)) if trained is not None else NONE,
            "bias_gradient": at(gradients.get(layer.bias)) if layer.bias is not None else NONE,
            "W_start": self._start(layer.weight), "D_start": self._start(layer.change),
            "bias_start": self._start(layer.bias), "is_merged": layer.is_merged,
            "projected": at(layer.projected), "returned": at(layer.returned), "kept": self.kept(node, layer),
        }  # fmt: skip

    def kept(self, node: Node, layer: Layer) -> Fields:
        """What a layer keeps of its input."""
        kept, path = layer.keeps, layer.conv.path
        nothing = {"at": NONE, "half": NONE, "expanded": NONE}
        if isinstance(kept, Core):
            scratch = kept.scratch
            return {
                "how": "LANCE_KEEP_CORE", "at": at(kept.array), "directions": kept.array.shape[0],
                "h": kept.array.shape[1], "w": kept.array.shape[2], "U": self._constant(f"{path} U"),
                "Uh": self._constant(f"{path} U_h"), "Uw": self._constant(f"{path} U_w"),
                "half": at(scratch[0] if scratch else None),
                "expanded": at(scratch[1] if len(scratch) > 1 else None), "at_once": kept.is_expanded,
            }  # fmt: skip
        if isinstance(kept, Input):
            if kept.is_copy:
                return {**nothing, "how": "LANCE_KEEP_INPUT", "at": at(kept.array)}
            return {**nothing, "how": "LANCE_KEEP_SOURCE", "at": node.inputs[0]}
        return nothing

    def operation(self, plan: SegmentPlan, node: Node) -> Fields:
        mask, source = plan.masks.get(node), node.inputs[0]
        is_inner = node.op not in ELEMENTWISE
        p = float(node.attributes.get("p", 0)) if node.op == "dropout" else 0.0
        return {
            "kind": KINDS[node.op], "input": source, "output": node.output,
            "layer": self.layers.get(node, NONE), "room": at(plan.channels[node.output]) if is_inner else NONE,
            "mask": at(mask), "mask_bytes": 0 if mask is None else mask.shape[1] * mask.dtype.itemsize,
            "reaches": source in self.graph.needs_gradient, "step": at(plan.steps.get(source)),
            "window": node.conv.window if node.conv is not None else node.window,
            "counts_padding": bool(node.attributes.get("count_include_pad", False)),
            "threshold": f"{int(min(p * 2.0**32, 2.0**32 - 1))}u" if p else 0,
            "raised": number(1 / (1 - p)) if 0 < p < 1 else 0,
        }  # fmt: skip

    def segment(self, plan: SegmentPlan) -> Fields:
        s, needs = plan.segment, self.graph.needs_gradient
        first = len(self.operations)
        self.operations += [(plan, node) for node in s.body]
        middle = len(self.operations)
        self.operations += [(plan, node) for node in s.post]
        before_tail = [node.output for node in (s.head, *s.body) if node is not None]
        inner = before_tail[-1] if before_tail else s.source
        learns = id(plan) in self.backward
        is_first = plan.is_first_use
        return {
            "source": s.source, "output": s.output, "residual": NONE if s.residual is None else s.residual,
            "is_in_place": s.residual is not None and plan.maps[s.residual] is plan.maps[s.output],
            "head": NONE if s.head is None else self.layers[s.head],
            "tail": NONE if s.tail is None else self.layers[s.tail],
            "made": 0 if s.head is None else s.head.output, "inner": inner, "end": s.end,
            "body": first, "body_end": middle, "post": middle, "post_end": len(self.operations),
            "copy": NONE if s.head is not None else at(plan.channels.get(s.source)),
            "room": NONE if s.head is None else at(plan.channels[s.head.output]),
            "learns": learns, "reaches": learns and inner in needs,
            "clears_source": learns and is_first.get(s.source, False) and s.residual != s.source,
            "sets_residual": s.residual is not None and is_first.get(s.residual, False),
            "step": at(plan.steps.get(inner)),
        }  # fmt: skip

    def tiles(self) -> str:
        """The rows and columns of every map that each row of tiles and each column of tiles needs."""
        lines = []
        for name, parts in zip(("rows", "columns"), self._tile_parts(), strict=True):
            lines.append(f"\nLANCE_FLASH const lance_range lance_tile_{name}[][LANCE_TILED_MAPS] = {{")
            lines += ["    {" + ", ".join(f"{{{a}, {b}}}" for a, b in part) + "}," for part in parts] or ["    {{0}},"]
            lines.append("};")
        return "\n".join(lines)

    def _tile_parts(self) -> tuple[list[Any], list[Any]]:
        layout = self.layout
        spans = [tile[0].spans for tile in layout.tiles]
        if not spans:
            return [], []
        numbers = range(max(max(part) for part in spans) + 1)
        both = []
        for axis in (0, 1):
            seen = [[tuple(span.get(n, ((0, 0), (0, 0)))[axis]) for n in numbers] for span in spans]
            both.append([part for i, part in enumerate(seen) if part not in seen[:i]])
        return both[0], both[1]

    def graves(self) -> str:
        """What is dead after each instruction, for builds that overwrite it."""
        end = len(self.layout.times) - 1
        lines = ["\n#ifdef LANCE_POISON", "const lance_grave lance_graves[] = {"]
        count = 0
        for array in self.layout.arrays:
            lives_on = 0 if array.over is None else array.over.nbytes
            if array.last < end and array.nbytes > lives_on:
                lines.append(f"    {{{array.last}, {array.offset + lives_on}, {array.nbytes - lives_on}}},")
                count += 1
        lines += [] if count else ["    {0},"]
        return "\n".join([*lines, "};", f"const int lance_grave_count = {count};", "#endif\n"])

    # ---- constants ------------------------------------------------------------------------------

    def _layer(self, node: Node) -> Layer:
        return self.plans[0].layers[node]

    def _constant(self, name: str) -> str | None:
        return self.constants.add(name, np.asarray(self.flash[name], np.float32)) if name in self.flash else None

    def _start(self, array: Array | None) -> str | None:
        """What an array starts with, if that is not zero."""
        if array is None or not self.state[array].any():
            return None
        return self.constants.add(f"{array.name} at the start", self.state[array])

    def pixels(self) -> str:
        """How bytes become numbers."""
        if self.recipe.pixels is None:
            return ""
        values = {"scale": self.recipe.pixels.scale, "shift": self.recipe.pixels.shift}
        return "\n" + "\n".join(
            f"LANCE_FLASH const float lance_pixel_{name}[] = {{{', '.join(map(number, array.tolist()))}}};"
            for name, array in values.items()
        )


def _table(kind: str, name: str, rows: Any) -> str:
    return "\n".join([f"\nLANCE_FLASH const {kind} lance_{name}[] = {{", *rows, "};"])


def _plain(text: str) -> str:
    return text.replace("*/", "* /").encode("ascii", "replace").decode()


__all__ = ["Fields", "Sequence", "Tables", "at", "struct"]
