"""Files that come with the package, found beside the code that reads them; and whether the code is all of one package.

The working directory stands first in the search path of ``python -m``. A folder of it named ``analysis`` or
``lance_ref`` must neither hide our data nor lend us its modules.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
"""The folder of our packages."""
PACKAGES = ("analysis", "experiments", "lance_ref")


def shipped(name: str, package: str = "analysis") -> Path:
    """A file in the folder ``data`` of a package of ours.

    Raises FileNotFoundError if it is missing: nothing may take its place.
    """
    path = ROOT / package / "data" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which is a part of the package lance-ref: install it again")
    return path


def pass_over_folders() -> None:
    """Pass over folders named as a package of ours without an ``__init__.py``.

    Python takes them for a package in parts. Runs when this module is imported, which is before anything is taken
    from ``lance_ref``.
    """
    for package in PACKAGES:
        module = sys.modules.get(package)
        if module is None:
            spec = find_spec(package)
            if spec is not None and spec.origin is None:
                _load(package)
        elif getattr(module, "__file__", None) is None:
            module.__path__ = [str(ROOT / package)]


def check_own_packages() -> None:
    """Raise ImportError if a module of ``analysis`` or ``lance_ref`` was imported from elsewhere."""
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        if package in PACKAGES and not _is_ours(module):
            raise ImportError(
                f"{module.__file__} is in the way: Python takes it for {name} of the package lance-ref, which is in "
                f"{ROOT}. Run the command in another folder, or by its name: lance-ref"
            )


def _load(package: str) -> None:
    """Import a package of ours by its place."""
    folder = ROOT / package
    spec = spec_from_file_location(package, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} cannot be imported")
    sys.modules[package] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package])


def _is_ours(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or any(Path(file).resolve().is_relative_to(ROOT / package) for package in PACKAGES)


pass_over_folders()
