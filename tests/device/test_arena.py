"""Placing arrays, and the arithmetic of windows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lance_ref.device.arena import Array, live_bytes, place
from lance_ref.device.graph import Window
from lance_ref.device.windows import needed, reach, size_of

arrays = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 9), st.integers(0, 9), st.sampled_from([np.uint8, np.float32])),
    min_size=1, max_size=12,
)  # fmt: skip


def made(sizes: list[tuple[int, int, int, type]]) -> list[Array]:
    return [Array(str(i), (n,), np.dtype(t), "maps", min(a, b), max(a, b)) for i, (n, a, b, t) in enumerate(sizes)]


@given(arrays)
def test_arrays_that_live_together_lie_apart(sizes: list[tuple[int, int, int, type]]) -> None:
    placed = made(sizes)
    total = place(placed)
    assert total >= max(live_bytes(placed, 10))
    assert total == max(a.offset + a.nbytes for a in placed)
    for i, a in enumerate(placed):
        assert a.offset % a.dtype.itemsize == 0
        for b in placed[:i]:
            assert not a.meets(b) or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset


def test_live_bytes_by_hand() -> None:
    """Three bytes from 0 to 1, five from 1 to 2: 3, 8, 5."""
    assert live_bytes(made([(3, 0, 1, np.uint8), (5, 1, 2, np.uint8)]), 3) == [3, 8, 5]


def test_an_array_over_another_begins_where_it_begins() -> None:
    """The pair goes where neither meets another: the follower lives longer than what it is written over."""
    image, output, later = made([(10, 0, 1, np.uint8), (6, 2, 3, np.uint8), (4, 3, 4, np.uint8)])
    image.over, image.lead = output, 2
    place([image, output, later])
    assert image.offset == output.offset
    assert later.offset >= output.offset + 6 or later.offset + 4 <= output.offset


windows = st.builds(
    Window, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)), st.tuples(st.integers(0, 3), st.integers(0, 3)),
)  # fmt: skip


@given(windows, st.integers(4, 9), st.integers(4, 9), st.data())
def test_a_part_of_the_input_is_all_that_a_part_of_the_output_sees(
    window: Window, H: int, W: int, data: st.DataObject
) -> None:
    """By loops over every place and kernel place: what is read, what padding is, and that the halo is large enough."""
    spans = []
    for axis, n in enumerate((H, W)):
        outputs = (
            n + 2 * window.before[axis] - window.dilation[axis] * (window.kernel[axis] - 1) - 1
        ) // window.stride[axis] + 1
        outputs = max(outputs, 1)
        start = data.draw(st.integers(0, outputs - 1))
        spans.append((start, data.draw(st.integers(start + 1, outputs))))
    output = (spans[0], spans[1])
    source = (needed(window, 0, output[0], H), needed(window, 1, output[1], W))
    x = np.arange(1.0, H * W + 1).reshape(H, W)
    part = x[slice(*source[0]), slice(*source[1])]
    seen = reach(window, output, source).seen(part)
    by_taps = np.zeros_like(seen)
    for p, q, written, read in reach(window, output, source).taps:
        by_taps[(*written, p, q)] = part[read]
    for i, y in enumerate(range(*output[0])):
        for j, z in enumerate(range(*output[1])):
            for p in range(window.kernel[0]):
                for q in range(window.kernel[1]):
                    row = y * window.stride[0] - window.before[0] + p * window.dilation[0]
                    column = z * window.stride[1] - window.before[1] + q * window.dilation[1]
                    value = x[row, column] if 0 <= row < H and 0 <= column < W else 0.0
                    assert seen[i, j, p, q] == by_taps[i, j, p, q] == value
    assert size_of(source) == part.shape
