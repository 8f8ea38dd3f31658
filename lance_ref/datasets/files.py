"""Decoding images, and reading them from zip archives: one at a time and with bounds."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lance_ref.datasets.dataset import check_memory, size_pair, spread
from lance_ref.io.opening import open_zip

if TYPE_CHECKING:
    from PIL import Image

MAX_FILE_BYTES = 32 * 1024**2
"""Largest encoded image that is read."""

MAX_DIRECTORY_BYTES = 32 * 1024**2
"""Largest table of contents of an archive: some 300,000 images."""

MAX_PIXELS = 64 * 1024**2
"""Largest image that is decoded: 64 Mi pixels."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""What the decoder may try, whatever the file's name says."""


def decode(encoded: bytes, where: str, image_size: tuple[int, int] | None, channels: int = 3) -> np.ndarray:
    """One JPEG, PNG, BMP or WebP file as uint8 (H, W, C); its declared size is checked before it is decoded.

    It is cut to the aspect ratio of ``image_size`` (height, width) around the centre, if that is given, then resized
    bilinearly. ``channels`` are 1 for grey or 3 for RGB. A file that is too large, damaged or no image, or has more
    than 8 bits a channel, is a ValueError that begins with ``where``.

    Notes
    -----
    A camera's note on which side is up (EXIF orientation) is followed; where the notes are damaged, and the pixels are
    not, the image is taken as it lies.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, where our own bound is lower, and of notes that are damaged
            file = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width}x{file.height} pixels, at most {MAX_PIXELS} are read")
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {file.mode}, expected 8 bits a channel")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.load()
            picture = _upright(file).convert("RGB" if channels == 3 else "L")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: refused: {error}") from None
    except UnidentifiedImageError:  # its own message holds an address in memory
        raise ValueError(f"{where}: not a readable image: none of {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, MemoryError) as error:
        raise ValueError(f"{where}: not a readable image: {error}") from None
    if image_size is not None and (picture.height, picture.width) != image_size:
        picture = _fit(picture, image_size)
    return np.asarray(picture, dtype=np.uint8).reshape(picture.height, picture.width, channels)


def _upright(picture: Image.Image) -> Image.Image:
    """A loaded picture, turned as its EXIF orientation says if that can be read."""
    from PIL import ExifTags, Image

    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever the parser stumbles over: the pixels are there
        return picture
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE, 6: turn.ROTATE_270,
        7: turn.TRANSVERSE, 8: turn.ROTATE_90,
    }  # fmt: skip
    if not isinstance(orientation, int) or orientation not in turns:
        return picture
    return picture.transpose(turns[orientation])


def _fit(picture: Image.Image, image_size: tuple[int, int]) -> Image.Image:
    """The largest central part with the aspect ratio of ``image_size``, resized to it."""
    from PIL import Image

    height, width = image_size
    scale = min(picture.width / width, picture.height / height)
    part_width, part_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (picture.width - part_width) // 2, (picture.height - part_height) // 2
    part = picture.crop((left, top, left + part_width, top + part_height))  # resize(box=...) would look outside it
    return part.resize((width, height), Image.Resampling.BILINEAR)


def read_zip(
    path: Path, split: str, image_size: int | tuple[int, int] | None, limit: int | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images, labels and class names of ``<split>/<class>/<file>`` in a zip archive.

    Members are taken in sorted order; a class's index is the position of its name among the sorted
    names of all splits. Only the members that ``limit`` leaves are read and decoded. What is damaged or too large is a
    ValueError that names archive and member.
    """
    with image_archive(path) as archive:
        parts = {name: name.split("/") for name in archive.namelist() if name.lower().endswith(EXTENSIONS)}
        pictures = {name: part for name, part in parts.items() if len(part) == 3}
        class_names = tuple(sorted({part[1] for part in pictures.values()}))
        positions = {name: index for index, name in enumerate(class_names)}
        members = [(name, positions[part[1]]) for name, part in sorted(pictures.items()) if part[0] == split]
        if not members:
            raise ValueError(f"{path}: no images under {split}/<class>/")
        images, labels = read_zip_members(archive, path, members, image_size, limit)
    return images, labels, class_names


@contextmanager
def image_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive of images; raises ValueError, naming it, if it is none, or has too many entries."""
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(open_zip(path, MAX_DIRECTORY_BYTES))
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable zip archive: {str(error).removeprefix(f'{path}: ')}") from None
        yield archive


def read_zip_members(
    archive: zipfile.ZipFile,
    path: Path,
    members: Sequence[tuple[str, int]],
    image_size: int | tuple[int, int] | None,
    limit: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 3) and labels int64 (N,) of these (member, label) pairs, as ``limit`` spreads them."""
    labels = np.array([label for _, label in members], dtype=np.int64)
    chosen = spread(labels, limit)
    names = [members[i][0] for i in chosen]
    encoded = ((f"{path}: member {name}", _read_member(archive, path, name)) for name in names)
    return decode_all(encoded, len(names), None if image_size is None else size_pair(image_size)), labels[chosen]


def decode_all(
    encoded: Iterable[tuple[str, bytes]], count: int, size: tuple[int, int] | None, channels: int = 3
) -> np.ndarray:
    """Images uint8 (N, H, W, channels) of (what errors call it, file) pairs, ``count`` of them.

    Without a ``size`` all must be as large as the first; the memory is checked as soon as that is known.
    """
    images: np.ndarray | None = None
    for row, (where, file) in enumerate(encoded):
        image = decode(file, where, size, channels)
        if images is None:
            check_memory(count, image.shape[:2], channels)
            images = np.empty((count, *image.shape), dtype=np.uint8)
        if image.shape != images.shape[1:]:
            (height, width), (first, across) = image.shape[:2], images.shape[1:3]
            raise ValueError(f"{where}: {height}x{width} pixels, the first image has {first}x{across}: give image_size")
        images[row] = image
    assert images is not None
    return images


def _read_member(archive: zipfile.ZipFile, path: Path, member: str) -> bytes:
    declared = archive.getinfo(member).file_size
    if declared > MAX_FILE_BYTES:
        raise ValueError(f"{path}: member {member}: declares {declared} bytes, at most {MAX_FILE_BYTES} are read")
    try:
        with archive.open(member) as file:
            return file.read(declared)
    except Exception as error:  # BadZipFile, OSError, and each decompressor's own (zlib.error, LZMAError)
        raise ValueError(f"{path}: member {member}: damaged: {error}") from None
