"""The folder: files that are the same for every network, tables, constants, images and expected numbers."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lance_ref.device.arena import PERSISTENT, Array
from lance_ref.device.c.constants import dequantised
from lance_ref.device.c.expected import Runs, expected, image_file
from lance_ref.device.c.tables import Tables
from lance_ref.device.graph import Graph
from lance_ref.device.layout import Recipe

FILES = Path(__file__).parent / "files"
WEIGHTS = ("float32", "int8")
MARK = "lance_net.h"
"""A folder that has this file is an earlier export, and may be replaced."""


class Source(Runs, Protocol):
    """What a program gives to its export."""

    graph: Graph
    recipe: Recipe

    @property
    def flash(self) -> Mapping[str, np.ndarray]: ...
    def with_weights(self, change: Callable[[np.ndarray], np.ndarray]) -> Source: ...


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    folder : Path
    ram_bytes : int
        The arena, all that the library has in RAM but its stack.
    state_bytes : int
        The part of it that was learned.
    flash_bytes : int
        Weights, factors and other constants; without tables and code.
    """

    folder: Path
    ram_bytes: int
    state_bytes: int
    flash_bytes: int


def export(
    program: Source, folder: str | os.PathLike[str], weights: str, images: np.ndarray, labels: np.ndarray, lr: float,
    passes: int, batch: int, ram_section: str | None = None, flash_section: str | None = None,
) -> Exported:  # fmt: skip
    """Write a program as C; see :meth:`lance_ref.device.Program.export_c`. The program must be one that may change."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    if program.graph.dtype != np.float32:
        raise ValueError(f"the program computes in {program.graph.dtype}, expected float32 for an export to C")
    target = _target(folder)
    if weights == "int8":
        program = program.with_weights(dequantised)
    layout = program.layout
    state: dict[Array, np.ndarray] = {a: program.value(a) for a in layout.arrays if a.kind in PERSISTENT}
    tables = Tables(program.graph, program.recipe, layout, program.flash, state, weights == "int8")
    source = tables.source() + tables.pixels() + "\n"
    sections = {"RAM": ram_section, "FLASH": flash_section}
    header = tables.header({"PASSES": str(passes), "BATCH": str(batch), "RATE": f"{lr:.9g}f"})
    constants = tables.constants
    pixel_bytes = 0 if program.recipe.pixels is None else 8 * program.graph.shapes[0][0]
    state_bytes = sum(array.nbytes for array in layout.arrays if array.is_state)
    done = Exported(target, layout.ram_bytes, state_bytes, constants.nbytes + pixel_bytes)
    written = {
        MARK: _header(MARK, [*_arena_lines(layout.ram_bytes), header, *map(_section, sections.items())]),
        "lance_net.c": f'#include "lance_table.h"\n{source}',
        "lance_weights.h": _header("lance_weights.h", ['#include "lance_table.h"', *constants.declarations()]),
        "lance_weights.c": "\n".join(['#include "lance_weights.h"', *constants.definitions(), ""]),
        "expected.txt": expected(program, images, labels, lr),
    }  # fmt: skip
    numbers = {"RAM": done.ram_bytes, "STATE": done.state_bytes, "FLASH": done.flash_bytes}
    _write(target, written, image_file(images, labels), numbers)
    return done


def _arena_lines(nbytes: int) -> list[str]:
    return ["#ifndef LANCE_ARENA_BYTES", f"#define LANCE_ARENA_BYTES {nbytes}", "#endif"]


def _section(item: tuple[str, str | None]) -> str:
    name, section = item
    return f"#define LANCE_{name}" + (f' __attribute__((section("{section}")))' if section else "")


def _header(name: str, lines: list[str]) -> str:
    guard = name.upper().replace(".", "_")
    return "\n".join([f"#ifndef {guard}", f"#define {guard}", *lines, "#endif", ""])


def _target(folder: str | os.PathLike[str]) -> Path:
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to export to")
    if target.exists() and any(target.iterdir()) and not (target / MARK).exists():
        raise FileExistsError(f"{folder} has files that are no export, expected a new or an empty folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist")
    return target


def _write(target: Path, written: Mapping[str, str], images: bytes, numbers: Mapping[str, int]) -> None:
    """All files under a temporary name, which then becomes the folder: it is there whole or not at all."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.unfinished")
    old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
    try:
        shutil.copytree(FILES, temporary, ignore=shutil.ignore_patterns("__pycache__"))
        readme = (temporary / "README.md").read_text(encoding="utf-8")
        for name, number in numbers.items():
            readme = readme.replace(f"@{name}@", f"{number:,}")
        for name, text in {**written, "README.md": readme}.items():
            shown = f"/* clang-format off */\n{text}" if name.endswith((".c", ".h")) else text
            (temporary / name).write_text(shown, encoding="utf-8", newline="\n")
        (temporary / "images.bin").write_bytes(images)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
