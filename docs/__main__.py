"""Build the site and open it: ``python -m docs [--no-open] [--output FOLDER]``

Warnings are errors. The site is static: it can be opened from its folder, without a server and without a network.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRA = "python -m pip install -e '.[docs]'"


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs", description="Build the site and open it in a browser.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="folder (default: build/site)")
    parser.add_argument("--no-open", action="store_true", help="build only")
    options = parser.parse_args(arguments)
    try:
        from sphinx.cmd.build import build_main
    except ImportError:
        parser.exit(2, f"{parser.prog}: error: Sphinx is not installed: {EXTRA}\n")
    output = options.output.resolve()
    flags = ["--fail-on-warning", "--keep-going", "--quiet", "--jobs", "auto", "--conf-dir", str(ROOT / "docs")]
    folders = ["--doctree-dir", str(output.with_name(output.name + "-doctrees")), str(ROOT), str(output)]
    code = build_main([*flags, *folders])
    if code == 0:
        print(output / "index.html")
        if not options.no_open:
            webbrowser.open((output / "index.html").as_uri())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
