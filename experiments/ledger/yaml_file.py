"""The two lists that people edit by hand, published figures and claims: read with care, every mistake in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any


def load_entries(
    path: str | os.PathLike[str], kind: type, sources_required: bool = True
) -> tuple[dict[str, dict[str, str]], list[dict[str, Any]]]:
    """Sources by name, and entries as written, of a YAML file with these two keys.

    An entry will become a dataclass ``kind``: its fields are the keys that are known, and those without a default are
    required. With ``sources_required`` each entry's ``source`` must name one of the sources. Every mistake is a
    ValueError, in one line that names the file and the entry.
    """
    import yaml

    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or set(document) != {"sources", "entries"}:
        raise ValueError(f"{path} must be a mapping with the keys sources and entries")
    sources, entries = document["sources"], document["entries"]
    if not isinstance(sources, dict) or not isinstance(entries, list):
        raise ValueError(f"{path}: sources must be a mapping and entries a list")
    for name, source in sources.items():
        if not isinstance(source, dict) or not {"paper", "url"} <= set(source):
            raise ValueError(f"{path}: source {name!r} must have paper and url")
    seen: set[str] = set()
    for entry in entries:
        _check(path, entry, kind, seen)
        if sources_required and entry["source"] not in sources:
            raise ValueError(f"{path}, {entry['id']}: source {entry['source']!r} is not one of {', '.join(sources)}")
    return sources, entries


def _check(path: Path, entry: Any, kind: type, seen: set[str]) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        raise ValueError(f"{path}: every entry must be a mapping with an id, one is {str(entry)[:60]!r}")
    known = {field.name: field for field in fields(kind)}
    required = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    if missing := required - set(entry):
        raise ValueError(f"{path}, {entry['id']}: {', '.join(sorted(missing))} missing")
    if unknown := set(entry) - set(known):
        raise ValueError(f"{path}, {entry['id']}: unknown keys {', '.join(sorted(unknown))}")
    if entry["id"] in seen:
        raise ValueError(f"{path}: the id {entry['id']} is there twice")
    seen.add(entry["id"])


def choose(what: str, asked: Sequence[str], known: Mapping[str, Any]) -> list[Any]:
    """Those of the entries that were asked for, or all; LookupError for an unknown id, with those that are like it."""
    from difflib import get_close_matches

    for name in asked:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"do you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
            raise LookupError(f"unknown {what} {name!r}, {hint}")
    return [known[name] for name in asked or known]
