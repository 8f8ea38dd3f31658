"""The folder of the kit: ``cases.json``, and one ``.npz`` file of arrays for each case.

A folder may come from anywhere: nothing in it is unpickled, and checksums are compared before anything is used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_ref.conformance.case import FORMAT, FUNCTIONS, SEED, TOLERANCES, VERSION, Case, Check
from lance_ref.conformance.layer_cases import layer_cases
from lance_ref.conformance.subspace_cases import subspace_cases
from lance_ref.io.npz import load_npz, save_npz
from lance_ref.io.whole_file import SEAL, read_bytes, sealed, unsealed, write_text

INDEX = "cases.json"
MAX_INDEX_BYTES = 16 * 2**20
MAX_CASE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Kit:
    """All cases, and how near a result must come by the dtype of its case."""

    cases: list[Case]
    tolerances: Mapping[str, float]


@functools.cache
def make_kit() -> Kit:
    """The kit of this version, computed from the definitions (once in a process; its arrays are read-only)."""
    return Kit([*layer_cases(), *subspace_cases()], TOLERANCES)


# ---- writing -------------------------------------------------------------------------------------


def write_kit(directory: str | os.PathLike[str]) -> Kit:
    """Write the kit, whole or not at all, the same bytes every time.

    Parameters
    ----------
    directory : path
        A folder that is not there yet, is empty, or holds an earlier kit and nothing else, which is then replaced.

    Raises
    ------
    ValueError
        If ``directory`` is anything else.
    OSError
        If it cannot be written; what was there is intact.
    """
    target = Path(os.path.realpath(directory))
    _check_target(target, directory)
    kit = make_kit()
    token = secrets.token_hex(4)
    new, old = (target.with_name(f".{target.name}.{token}.{what}") for what in ("new", "old"))
    try:
        new.mkdir()
        entries = []
        for case in kit.cases:
            name = f"{case.name}.npz"
            save_npz(new / name, case.arrays)
            entries.append(_entry(case, name, hashlib.sha256((new / name).read_bytes()).hexdigest()))
        write_text(new / INDEX, _document(kit, entries))
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return kit


def _check_target(target: Path, given: str | os.PathLike[str]) -> None:
    """Refuse to replace anything but a kit."""
    text = repr(os.fspath(given))
    if not target.exists():
        if not target.parent.is_dir():
            raise ValueError(f"DIR is {text}, but there is no folder {str(target.parent)!r}")
        return
    if not target.is_dir():
        raise ValueError(f"DIR is {text}, a file; expected a folder, new, empty, or of an earlier kit")
    names = {path.name for path in target.iterdir()}
    if not names:
        return
    try:
        document = json.loads(_index_bytes(target))
        known = {INDEX, *(entry["file"] for entry in document["cases"])} if document["format"] == FORMAT else set()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        known = set()
    if names - known:
        raise ValueError(
            f"DIR is {text}, which holds {min(names - known)!r}; expected a folder, new, empty, or of an earlier kit"
        )


def _entry(case: Case, file: str, digest: str) -> dict[str, Any]:
    checks = [{"function": c.function, "arguments": c.arguments, "expected": c.expected} for c in case.checks]
    about = {"name": case.name, "about": case.about, "dtype": case.dtype}
    return {**about, "file": file, "sha256": digest, "checks": checks}


def _document(kit: Kit, entries: list[dict[str, Any]]) -> str:
    """The text of ``cases.json``, one line for each check."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "seed": SEED,
        "tolerances": dict(kit.tolerances),
    }
    head[SEAL] = sealed({**head, "cases": entries})[SEAL]
    lines = ["{", *(f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()), '"cases": [']
    for entry in entries:
        facts = ", ".join(f"{json.dumps(key)}: {_text(entry[key])}" for key in entry if key != "checks")
        checks = ",\n".join(f"  {_text(check)}" for check in entry["checks"])
        lines.append(f' {{{facts}, "checks": [\n{checks}\n ]}}{"," if entry is not entries[-1] else ""}')
    return "\n".join([*lines, "]", "}", ""])


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---- reading -------------------------------------------------------------------------------------


def load_kit(directory: str | os.PathLike[str]) -> Kit:
    """Read a folder that :func:`write_kit` wrote.

    Raises
    ------
    ValueError
        One line that names the file and what is wrong with it.
    OSError
        If a file cannot be read.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"DIR is {os.fspath(directory)!r}, expected a folder that --write made")
    index = folder / INDEX
    data = _index_bytes(folder)
    try:
        document = json.loads(data)
        version = document.get("version") if isinstance(document, dict) and document.get("format") == FORMAT else None
        if (type(version), version) != (int, VERSION):
            raise ValueError(f'expected an object with "format": "{FORMAT}", "version": {VERSION}')
        document = unsealed(document, "the index", "write the kit again with --write")
        tolerances = {dtype: _tolerance(document["tolerances"][dtype]) for dtype in TOLERANCES}
        entries = [_checked_entry(entry) for entry in document["cases"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"no entry {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{index}: {message}") from None
    return Kit([_load_case(folder, entry) for entry in entries], tolerances)


def _index_bytes(folder: Path) -> bytes:
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{index}: no such file; expected a folder that --write made")
    return read_bytes(index, MAX_INDEX_BYTES)


def _tolerance(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"a tolerance is {value!r}, expected a number in (0, 1)")
    return float(value)


def _checked_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """One case of the index, its fields of the right types."""
    for key in ("name", "about", "dtype", "file", "sha256"):
        if not isinstance(entry[key], str):
            raise ValueError(f"{key!r} is {entry[key]!r}, expected text")
    if entry["dtype"] not in TOLERANCES:
        raise ValueError(f"case {entry['name']!r} has dtype {entry['dtype']!r}, expected one of {tuple(TOLERANCES)}")
    file = entry["file"]
    if Path(file).name != file or "\\" in file or "\0" in file:
        raise ValueError(f"case {entry['name']!r} has file {file!r}, expected a name without a folder")
    for check in entry["checks"]:
        if check["function"] not in FUNCTIONS:
            raise ValueError(f"case {entry['name']!r} has function {check['function']!r}, expected one of {FUNCTIONS}")
        if not isinstance(check["arguments"], dict) or not isinstance(check["expected"], dict):
            raise ValueError(f"case {entry['name']!r}: arguments and expected must be objects")
    return entry


def _load_case(folder: Path, entry: dict[str, Any]) -> Case:
    path = folder / entry["file"]
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but {INDEX} names it")
    digest = hashlib.sha256(read_bytes(path, MAX_CASE_BYTES)).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(f"{path}: its SHA-256 is {digest}, expected {entry['sha256']}")
    case = Case(entry["name"], entry["about"], entry["dtype"], load_npz(path, MAX_CASE_BYTES))
    for check in entry["checks"]:
        case.checks.append(Check(check["function"], check["arguments"], check["expected"]))
    for check in case.checks:
        try:
            check_expected(case, check.expected)
            resolve(case, check.arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / INDEX}: case {case.name!r}, {check.function}: wrong entry: {error}") from None
    return case


def resolve(case: Case, value: Any) -> Any:
    """Arguments with copies of the arrays that they refer to."""
    if isinstance(value, dict):
        if set(value) == {"array"}:
            return case.arrays[value["array"]].copy()
        return {key: resolve(case, item) for key, item in value.items()}
    return [resolve(case, item) for item in value] if isinstance(value, list) else value


def check_expected(case: Case, expected: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless an expectation has what its kind needs."""
    kind = expected["kind"]
    if kind == "list":
        for item in expected["value"]:
            if item is not None:
                check_expected(case, item)
    elif kind == "array":
        resolve(case, expected["value"]).astype(expected["dtype"])
    elif kind == "basis":
        n, m = resolve(case, expected["projector"]).shape
        if n != m or not 0 <= int(expected["rank"]) <= n:
            raise ValueError(f"a projector of shape {(n, m)} and rank {expected['rank']}")
    elif kind == "numbers":
        if not all(math.isfinite(number) for number in expected["value"].values()):
            raise ValueError(f"numbers {expected['value']}")
    elif kind != "integer" or not isinstance(expected["value"], int):
        raise ValueError(f"kind {kind!r} with value {expected.get('value')!r}")
