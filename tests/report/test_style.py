"""The look of the reports is public, as a style sheet of matplotlib."""

import itertools

import matplotlib.style
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from optax_stability._report._drawing import _axes

NAME = "optax_stability.report"
# Viénot, Brettel & Mollon 1999: linear RGB as it is seen without red (protanopia) and
# without green (deuteranopia) cones.
WITHOUT_RED = ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1))
WITHOUT_GREEN = ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1))
LEAST = 0.15  # of the distance from black to white, in sRGB


def seen(color, matrix):
    """A colour as someone sees it who has this colour vision, in sRGB."""
    linear = np.array(to_rgb(color)) ** 2.2
    return np.clip(np.array(matrix) @ linear, 0, 1) ** (1 / 2.2)


def test_pictures_of_ones_own_have_the_colours_of_the_reports():
    with matplotlib.style.context(["default", NAME]):
        axes = Figure().add_subplot()
        drawn = [axes.plot([0, 1])[0].get_color() for _ in range(4)]
    assert drawn == [_axes.BLUE, _axes.ORANGE, _axes.INK, _axes.GREY]


def test_the_colours_are_told_apart_without_colour_vision():
    colors = _axes.BLUE, _axes.ORANGE, _axes.INK, _axes.GREY
    for matrix in (np.eye(3), WITHOUT_RED, WITHOUT_GREEN):
        for one, other in itertools.combinations(colors, 2):
            apart = np.linalg.norm(seen(one, matrix) - seen(other, matrix))
            assert apart > LEAST * np.sqrt(3), (one, other)
    red, green = "#d62728", "#2ca02c"  # of matplotlib's default
    apart = np.linalg.norm(seen(red, WITHOUT_GREEN) - seen(green, WITHOUT_GREEN))
    assert apart < LEAST * np.sqrt(3)
