"""Ctrl-C in a command, and plug-ins: functions of ``lance_ref.io`` without importing all of ``lance_ref``."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lance_ref.io.plugins import load_plugins
    from lance_ref.io.stopping import STOPPED, command, keep, left_to_parent, run, stopping
else:
    ROOT = Path(__file__).resolve().parents[2]  # whatever lies in the folder where a command runs

    def _load(name: str) -> Any:
        """The one module of that name; ``import`` would run the package's ``__init__`` first, which takes a second."""
        if name not in sys.modules:
            spec = spec_from_file_location(name, ROOT / f"{name.replace('.', '/')}.py")
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    _module = _load("lance_ref.io.stopping")
    STOPPED, keep, left_to_parent = _module.STOPPED, _module.keep, _module.left_to_parent
    command, run, stopping = _module.command, _module.run, _module.stopping
    load_plugins = _load("lance_ref.io.plugins").load_plugins

__all__ = ["STOPPED", "command", "keep", "left_to_parent", "load_plugins", "run", "stopping"]
