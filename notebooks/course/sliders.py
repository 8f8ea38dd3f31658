"""Sliders where a kernel and ipywidgets are at hand; the same figure, standing still, where they are not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from course.claims import checked


def explore(draw: Callable[..., Any], **choices: Sequence[Any]) -> Any:
    """Draw a figure that depends on numbers, with a slider for each of them.

    While ``notebooks/check.py`` runs a lesson, and where ipywidgets is not installed, the figure is drawn once. So a
    committed lesson has a picture and no widget, which would be of no use without a kernel.

    Parameters
    ----------
    draw : callable
        Takes the numbers by name, draws, and shows the figure.
    **choices : sequence
        For each number the values of its slider; the first of them is where it begins.

    Returns
    -------
    object or None
        The widget, if there is one.

    Raises
    ------
    ValueError
        If a slider has no values.
    """
    for name, values in choices.items():
        if len(values) == 0:
            raise ValueError(f"the slider {name!r} has no values, expected at least one")
    if checked() or importlib.util.find_spec("ipywidgets") is None:
        draw(**{name: values[0] for name, values in choices.items()})
        return None
    import ipywidgets

    sliders = {
        name: ipywidgets.SelectionSlider(options=sorted(values), value=values[0], continuous_update=False)
        for name, values in choices.items()
    }
    widget = ipywidgets.interactive(draw, **sliders)
    from IPython.display import display

    display(widget)
    return widget
