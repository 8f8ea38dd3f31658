"""Plug-ins: modules of other packages that register networks, operations and methods when they are imported.

A package names its module in ``pyproject.toml``, and whatever is installed is loaded::

    [project.entry-points."lance_ref.plugins"]
    theirs = "their_package.for_lance_ref"

A module that is not installed is named by the environment: ``LANCE_REF_PLUGINS=their_module,another``.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache

GROUP, VARIABLE = "lance_ref.plugins", "LANCE_REF_PLUGINS"


@cache
def load_plugins() -> None:
    """Import every plug-in, once a process; modules that ``LANCE_REF_PLUGINS`` names may lie in the current folder.

    Raises
    ------
    ImportError
        If one cannot be imported: in one line, which, who names it, and why.
    """
    from importlib.metadata import entry_points

    wanted = {point.module: f"entry point {point.name!r} of {GROUP}" for point in entry_points(group=GROUP)}
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if named and "" not in sys.path:
        sys.path.insert(0, "")
    for name, origin in (wanted | dict.fromkeys(named, VARIABLE)).items():
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split())
            cause = f"{type(error).__name__}: {said}" if said else type(error).__name__
            raise ImportError(f"plug-in {name!r} ({origin}) cannot be imported: {cause}") from error
