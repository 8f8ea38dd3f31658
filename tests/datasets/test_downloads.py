"""Downloads: the published files become the right images, and a bad source changes nothing.

All servers are on this machine; the published addresses are replaced, never asked.
"""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_files import COARSE, FILES, FINE, IMAGES, encoded

from lance_ref import datasets
from lance_ref.datasets import dataset as dataset_module
from lance_ref.datasets import fetch

# ---- a server on this machine -------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; ``server.fault`` says what goes wrong."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.requests.append(self.path)
        content = server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        if server.fault == "corrupted":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(200)
        announced = 2**40 if server.fault == "huge" else len(content) + (1000 if server.fault == "truncated" else 0)
        if server.fault != "endless":
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(content)
        try:
            while server.fault == "endless":
                self.wfile.write(bytes(2**16))
        except OSError:
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        server: Any = running
        server.files, server.fault, server.requests = {}, "", []
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            running.shutdown()
            thread.join()


def checksum(content: bytes) -> str:
    return f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


def publish(monkeypatch: pytest.MonkeyPatch, name: str, url: str, files: dict[str, bytes]) -> None:
    """Have a data set's published files come from ``url``, pinned to these contents."""
    source = datasets.SOURCES[name]
    assert source.published is not None
    assert set(files) == set(source.published.checksums)
    here = replace(source.published, url=url, checksums={key: checksum(content) for key, content in files.items()})
    monkeypatch.setitem(datasets.SOURCES, name, replace(source, published=here))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no folder of data, downloads allowed."""
    monkeypatch.setenv("LANCE_REF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("LANCE_REF_DATA", raising=False)
    monkeypatch.delenv("LANCE_REF_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def served(server: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All data sets, in small, at the server's address."""
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    for name, source in datasets.SOURCES.items():
        if source.published is not None:
            publish(monkeypatch, name, url, FILES[source.published.folder])
            server.files.update(FILES[source.published.folder])
    return server


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---- what comes is what was published -----------------------------------------------------


def test_cifar10_comes_from_the_binary_version(served: Any) -> None:
    """A byte off in a record, planes read as pixels, or batches out of order would give noise."""
    train, test = datasets.load("cifar10", "train"), datasets.load("cifar10", "test")
    assert (train.name, train.class_names) == ("CIFAR-10", ("airplane", "automobile", "bird"))
    np.testing.assert_array_equal(train.images, IMAGES[:10])
    assert train.labels.tolist() == [1, 2, 2, 2, 0, 2, 1, 2, 2, 2]
    np.testing.assert_array_equal(test.images, IMAGES[10:11])
    assert test.labels.tolist() == [1]


def test_cifar100_has_fine_and_coarse_labels(served: Any) -> None:
    """The first byte is the superclass, the second the class; exchanged they would look plausible."""
    fine, coarse = datasets.load("cifar100"), datasets.load("cifar100_coarse")
    assert (fine.class_names, coarse.class_names) == (tuple(FINE), tuple(COARSE))
    assert (fine.labels.tolist(), coarse.labels.tolist()) == ([2, 0, 1], [1, 0, 1])
    np.testing.assert_array_equal(fine.images, IMAGES[:3])
    np.testing.assert_array_equal(coarse.images, IMAGES[:3])
    assert datasets.load("cifar100", "test").labels.tolist() == [2]
    assert served.requests == ["/cifar-100-binary.tar.gz"]  # one file for both, downloaded once
    assert datasets.load("cifar100", image_size=8, limit=2).images.shape == (2, 8, 8, 3)


def test_mnist_comes_from_idx_files(served: Any) -> None:
    """Train and test are different files, and labels must go with their images."""
    train, test = datasets.load("mnist"), datasets.load("mnist", "test", channels=3)
    np.testing.assert_array_equal(train.images[..., 0], IMAGES[:5, ..., 0])
    assert (train.labels.tolist(), test.labels.tolist()) == ([5, 0, 4, 1, 9], [7, 2])
    np.testing.assert_array_equal(test.images[..., 2], IMAGES[5:7, ..., 0])


def test_eurosat_is_split_by_number(served: Any) -> None:
    """Without an official split ours must be the same everywhere: every fifth by number, none on both sides."""
    train, test = datasets.load("eurosat", "train"), datasets.load("eurosat", "test")
    assert train.class_names == ("Forest", "River")
    assert test.images[:, 0, 0, 0].tolist() == [5, 10, 105, 110]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [*(n + 100 * c for c in (0, 1) for n in (1, 2, 3, 4, 6, 7, 8, 9))]


def test_flowers_take_the_official_parts(served: Any) -> None:
    """Picture numbers count from 1, labels too; one off would pair each picture with another flower."""
    train, test = (datasets.load("flowers102", split, image_size=4) for split in ("train", "test"))
    assert (train.images[:, 0, 0, 0].tolist(), train.labels.tolist()) == ([20, 30], [0, 101])
    assert (test.images[:, 0, 0, 0].tolist(), test.labels.tolist()) == ([10, 40], [76, 76])
    assert (len(train.class_names), train.class_names[76]) == (102, "077")
    assert datasets.load("flowers102", "train", image_size=(4, 6), limit=1).images.shape == (1, 4, 6, 3)
    with pytest.raises(ValueError, match=r"differ in size: give image_size"):
        datasets.load("flowers102")


def test_pinned_checksums_are_well_formed() -> None:
    """A checksum cut short would refuse every download, and one without an algorithm would be ignored."""
    for published in datasets.PUBLISHED.values():
        assert published.url.startswith("https://")
        assert published.url.endswith("/")
        for value in published.checksums.values():
            assert value is None or re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", value)
    for name in ("split100", "notmnist"):
        assert datasets.SOURCES[name].published is None


# ---- where files are looked for -----------------------------------------------------------


def test_second_load_asks_nobody(served: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set would be fetched anew by every run, and be gone without a network."""
    datasets.load("mnist")
    assert len(served.requests) == 4
    assert files_below(cache) == sorted(f"mnist/{name}" for name in FILES["mnist"])
    monkeypatch.setenv("LANCE_REF_OFFLINE", "1")
    assert len(datasets.load("mnist", "test")) == 2
    assert len(served.requests) == 4


def test_folder_of_data_comes_first(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the user has must be used before anything is fetched, under its own name."""
    monkeypatch.setenv("LANCE_REF_DATA", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "cifar10_jpeg.zip", "w") as archive:
        archive.writestr("train/a/0.png", encoded(3))
    assert datasets.load("cifar10").name == "CIFAR-10 (JPEG q75 copy)"
    (tmp_path / "cifar100").mkdir()
    for name, content in FILES["cifar100"].items():
        (tmp_path / "cifar100" / name).write_bytes(content)
    assert len(datasets.load("cifar100")) == 3
    assert len(datasets.load("cifar100_coarse", data_dir=tmp_path)) == 3
    assert served.requests == []
    assert len(datasets.load("mnist")) == 5  # not in the folder
    assert len(served.requests) == 4


def test_changed_file_in_the_folder_is_refused(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged copy that the user put there must not be read, nor be passed over in silence."""
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "cifar100" / "cifar-100-binary.tar.gz").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"cifar-100-binary\.tar\.gz: its checksum is not md5:"):
        datasets.load("cifar100", data_dir=tmp_path)


def test_data_dir_is_the_only_place(served: Any, tmp_path: Path) -> None:
    """Who names a folder must not get something else."""
    with pytest.raises(FileNotFoundError, match=r"cifar-100-binary\.tar\.gz of http.*put it into .*cifar100"):
        datasets.load("cifar100", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar10_jpeg\.zip: put it at .*data_dir"):
        datasets.load("cifar10", data_dir=tmp_path)
    assert served.requests == []


def test_damaged_cache_is_mended(served: Any, cache: Path) -> None:
    """A cached file that lost bytes would break every run until someone deletes it."""
    datasets.load("cifar100")
    path = cache / "cifar100" / "cifar-100-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:-5])
    assert len(datasets.load("cifar100")) == 3
    assert path.read_bytes() == FILES["cifar100"][path.name]


# ---- bad sources --------------------------------------------------------------------------

FAULTS = {
    "corrupted": "does not have the checksum md5:",
    "truncated": "broke off before the end",
    "huge": "1099511627776 bytes announced, at most",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_download_leaves_nothing_behind(served: Any, cache: Path, fault: str) -> None:
    """Half a file under the right name would be read by the next run; a damaged one must not replace another."""
    datasets.load("mnist")
    before = {name: (cache / name).read_bytes() for name in files_below(cache)}
    served.fault = fault
    with pytest.raises(FileNotFoundError, match=FAULTS[fault]) as caught:
        datasets.load("cifar100")
    message = str(caught.value)
    assert "\n" not in message
    assert f"put it at {cache / 'cifar100' / 'cifar-100-binary.tar.gz'}" in message
    assert "cifar-100-binary.tar.gz: fetch it by hand" in message
    assert {name: (cache / name).read_bytes() for name in files_below(cache)} == before
    served.fault = ""
    assert len(datasets.load("cifar100")) == 3


def test_bad_download_keeps_the_earlier_file(served: Any, cache: Path) -> None:
    """A cached file that does not fit is still the user's until a better one is there."""
    path = cache / "cifar100" / "cifar-100-binary.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"an older edition")
    served.fault = "truncated"
    with pytest.raises(FileNotFoundError, match="broke off"):
        datasets.load("cifar100")
    assert path.read_bytes() == b"an older edition"
    assert files_below(cache) == ["cifar100/cifar-100-binary.tar.gz"]


def test_endless_download_is_stopped(served: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never ends would fill the disk."""
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", 2**20)
    served.fault = "endless"
    with pytest.raises(FileNotFoundError, match=r"\d+ bytes came, at most 1048576"):
        datasets.load("cifar100")
    assert files_below(cache) == []


def test_missing_address_is_named(served: Any, cache: Path) -> None:
    """An address that moved must be told from a broken network."""
    served.files.clear()
    with pytest.raises(FileNotFoundError, match="answered with HTTP status 404") as caught:
        datasets.load("mnist")
    assert "\n" not in str(caught.value)
    assert files_below(cache) == []


def test_no_server_fails_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the user waits for an error that says what to do, not for minutes."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        publish(monkeypatch, "cifar10", f"http://127.0.0.1:{closed.getsockname()[1]}/", FILES["cifar10"])
        start = time.monotonic()
        with pytest.raises(FileNotFoundError) as caught:
            datasets.load("cifar10")
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert re.search(r"cifar10_jpeg\.zip: .*LANCE_REF_DATA.*cifar-10-binary\.tar\.gz: fetch it by hand", message)
    assert message.endswith("(not downloaded: cannot connect)")
    assert "\n" not in message


def test_offline_asks_nobody(served: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that must not reach out would do so."""
    monkeypatch.setenv("LANCE_REF_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="not downloaded: LANCE_REF_OFFLINE is set"):
        datasets.load("cifar100")
    assert served.requests == []
    assert not cache.exists()


def test_file_without_checksum_is_not_downloaded(served: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be checked must be fetched by the user, and is then taken as it is."""
    source = datasets.SOURCES["cifar100"]
    assert source.published is not None
    published = replace(source.published, checksums={"cifar-100-binary.tar.gz": None})
    monkeypatch.setitem(datasets.SOURCES, "cifar100", replace(source, published=published))
    with pytest.raises(FileNotFoundError, match="no checksum is known for it"):
        datasets.load("cifar100")
    assert served.requests == []
    (cache / "cifar100").mkdir(parents=True)
    (cache / "cifar100" / "cifar-100-binary.tar.gz").write_bytes(FILES["cifar100"]["cifar-100-binary.tar.gz"])
    assert len(datasets.load("cifar100")) == 3


def test_cache_that_cannot_be_written_is_one_line(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path through a file is no folder; the error must still say what to fetch."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LANCE_REF_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match="fetch it by hand") as caught:
        datasets.load("cifar100")
    assert "\n" not in str(caught.value)


def test_local_only_sets_say_so(cache: Path) -> None:
    """A data set without a published address must not pretend to be downloadable."""
    with pytest.raises(FileNotFoundError, match=r"split100_32_jpeg\.zip: put it into a folder") as caught:
        datasets.load("split100")
    assert "http" not in str(caught.value)


def test_downloads_print_nothing(served: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Output that a script reads must not hold notes on downloads; a bar belongs to terminals only."""
    datasets.load("mnist")
    assert capfd.readouterr() == ("", "")


def test_terminal_gets_a_bar(served: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Minutes of silence look like a hang."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    datasets.load("cifar100")
    out, err = capsys.readouterr()
    assert out == ""
    assert "cifar-100-binary.tar.gz" in err


def test_memory_is_checked_for_downloads(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image_size times 50,000 images must be refused, not attempted."""
    monkeypatch.setattr(dataset_module, "MAX_BYTES", 1000)
    for name in ("cifar10", "mnist", "flowers102"):
        with pytest.raises(ValueError, match="more than 1000"):
            datasets.load(name, image_size=300)


def test_readers_are_those_of_the_names() -> None:
    """CIFAR's three sets share one reader and differ in its last argument alone."""
    kinds = {name: published.read for name, published in datasets.PUBLISHED.items() if name.startswith("cifar")}
    for name, read in kinds.items():
        assert isinstance(read, partial)
        assert read.keywords == {"kind": name}
