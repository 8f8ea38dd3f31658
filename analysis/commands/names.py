"""Names that come from files and from users, made fit to be printed: a terminal obeys nothing that is in them."""

from __future__ import annotations

import os

_SHOWN = 80  # characters of a name that an error shows


def plain(text: object) -> str:
    """A text on one line without control characters: what cannot be printed is written as Python would escape it.

    >>> plain("layer\\x1b[31m\\n2"), plain("größe")
    ('layer\\\\x1b[31m\\\\n2', 'größe')
    """
    whole = str(text)
    if whole.isprintable():  # nearly always
        return whole
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in whole)


def shown(name: object) -> str:
    """A name as an error shows it: quoted, on one line, not too long; of a long path the file's name stays.

    >>> shown("conv1"), shown("/data/" + "x" * 100 + "/net.onnx")
    ("'conv1'", "'/data/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxx/net.onnx'")
    """
    whole = str(name)
    if len(whole) > _SHOWN:
        half = (_SHOWN - 3) // 2
        tail = max(half, min(len(os.path.basename(whole)), _SHOWN))
        whole = f"{whole[: max(_SHOWN - 3 - tail, 8)]}...{whole[-tail:]}"
    return ascii(whole) if not whole.isprintable() else repr(whole)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; a KeyError without its quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
