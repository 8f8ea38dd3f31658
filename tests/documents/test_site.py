"""The built site in a real browser: formulas and figures are there, nothing is cut off, the console is clean.

The site is that of ``LANCE_REF_SITE``, else of ``build/site``: ``python -m docs`` makes it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("LANCE_REF_SITE", ROOT / "build" / "site"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1400,1000"),
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # nothing but the server below
    *("--enable-logging=stderr", "--virtual-time-budget=20000", "--timeout=60000", "--dump-dom"),
]
NOTE = '"[PST]: '
"""So begins what the theme notes in the console: the mode of its colours, the place of its side bar."""

PROBE = """<!doctype html><meta charset="utf-8"><title>probe</title><link rel="icon" href="data:,">
<iframe id="page" style="width:{width}px; height:900px; border:0"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("page");
const seen = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const images = [...page.querySelectorAll(".bd-article img")];
  images.forEach(image => image.loading = "eager");
  return {{
    title: page.title,
    formulas: [...page.querySelectorAll("mjx-container")].filter(box => box.querySelector("svg")).length,
    sources: page.querySelectorAll(".math").length,
    errors: page.querySelectorAll("mjx-merror, [data-mml-node=merror]").length,
    images: images.length,
    missing: images.filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
    width: page.documentElement.scrollWidth,
    elsewhere: view.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith(location.origin) && !name.startsWith("data:")),
  }};
}};
frame.onload = () => setInterval(() => document.getElementById("found").textContent = JSON.stringify(seen()), 500);
frame.src = "{page}";
</script>
"""


class Handler(SimpleHTTPRequestHandler):
    """The files of the site, and under ``/probe`` a page that looks at one of them."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if address.path != "/probe":
            super().do_GET()
            return
        asked = {name: values[0] for name, values in parse_qs(address.query).items()}
        body = PROBE.format(**asked).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Browser:
    """Opens pages of a folder."""

    program: str
    server: ThreadingHTTPServer
    profile: Path

    def look(self, page: str, width: int) -> tuple[dict[str, Any], list[str]]:
        """What stands on a page, and what it wrote to the console."""
        host, port = self.server.server_address[:2]
        words = [self.program, *FLAGS, f"--user-data-dir={self.profile}"]
        address = f"http://{host}:{port}/probe?page={page}&width={width}"
        done = subprocess.run([*words, address], capture_output=True, text=True, timeout=180)
        found = re.search(r'<pre id="found">(\{.*?\})</pre>', done.stdout, flags=re.S)
        assert found, f"{page} did not load:\n{done.stderr[-2000:]}"
        seen: dict[str, Any] = json.loads(unescape(found[1]))
        return seen, [line for line in done.stderr.splitlines() if "CONSOLE" in line and NOTE not in line]


def served(folder: Path, profile: Path) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Browser(program, server, profile)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (SITE / "index.html").is_file():
        pytest.skip(f"no site in {SITE}: python -m docs")
    yield from served(SITE, tmp_path_factory.mktemp("profile"))


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize(
    ("page", "formulas", "images"),
    [
        ("docs/what_lance_is.html", 25, 1),
        ("docs/continual.html", 0, 2),
        ("notebooks/04_lance_by_hand.html", 20, 5),
    ],
)
def test_a_page_in_the_browser(page: str, formulas: int, images: int, width: int, browser: Browser) -> None:
    """Formulas are drawn, figures have loaded, nothing is wider than the window, and all of it came from the site."""
    seen, console = browser.look(page, width)
    assert console == []
    assert seen["formulas"] == seen["sources"] >= formulas
    assert seen["errors"] == 0
    assert seen["images"] >= images
    assert seen["missing"] == []
    assert seen["width"] <= width
    assert seen["elsewhere"] == []


def test_the_first_page_is_found() -> None:
    """``index.html`` leads to it, and it lists the sections."""
    if not (SITE / "index.html").is_file():
        pytest.skip(f"no site in {SITE}: python -m docs")
    first = re.search(r"url=([\w./]+)", (SITE / "index.html").read_text(encoding="utf-8"))
    assert first
    text = (SITE / first[1]).read_text(encoding="utf-8")
    for section in ("understand", "use", "lessons", "results", "reference", "project"):
        assert f'href="docs/{section}.html"' in text


@pytest.mark.parametrize(
    "name",
    [
        "autograd.Function",
        "geometry.ConvGeometry",
        "planning.plan_ranks",
        "conformance.Case",
        "features",
        "continual.GPM",
    ],
)
def test_what_the_front_door_does_not_name_is_in_the_reference(name: str) -> None:
    """Modules that are not in ``lance_ref.__all__`` have pages: the reference is made from the packages."""
    if not (SITE / "index.html").is_file():
        pytest.skip(f"no site in {SITE}: python -m docs")
    module, _, thing = name.partition(".")
    index = (SITE / "genindex.html").read_text(encoding="utf-8")
    assert re.search(rf'"docs/reference/lance_ref\.(\w+\.)*{module}(\.\w+)*\.html#[\w.-]*{thing}"', index), name


def test_the_cost_model_from_python_is_in_the_reference() -> None:
    if not (SITE / "index.html").is_file():
        pytest.skip(f"no site in {SITE}: python -m docs")
    page = (SITE / "docs" / "reference" / "analysis.html").read_text(encoding="utf-8")
    assert re.search(r'href="analysis\.[\w.]*html#analysis\.[\w.]*cost"', page)
    assert re.search(r'href="lance_ref\.[\w.]+html#lance_ref\.[\w.]+\.trace"', page)  # a reference by an alias


def test_faults_are_noticed(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A lost figure, a page that is too wide, an error in the console, a file from the network, a formula not drawn."""
    page = """<!doctype html><meta charset="utf-8"><title>bad</title><link rel="icon" href="data:,">
    <div class="bd-article"><img src="nothing.png"><div style="width: 900px">wide</div><span class="math">x</span></div>
    <script src="https://cdn.example.org/x.js"></script><script>console.error("wrong")</script>"""
    (tmp_path / "bad.html").write_text(page, encoding="utf-8")
    for browser in served(tmp_path, tmp_path_factory.mktemp("profile")):
        seen, console = browser.look("bad.html", 400)
        assert any("wrong" in line for line in console)
        assert seen["formulas"] < seen["sources"]
        assert len(seen["missing"]) == 1
        assert seen["width"] > 400
        assert seen["elsewhere"] == ["https://cdn.example.org/x.js"]
