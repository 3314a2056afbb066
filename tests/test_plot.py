"""Figures: which are as wide as a phone, by their smallest text."""

import pytest

from labkit import plot


def drawn(width, **text):
    fig, ax = plot.figure(width=width)
    ax.plot([1, 2], [3, 4])
    if text:
        ax.text(1, 3, **text)
    return plot.show(fig, name="fig-x", caption="A line.", alt="A line that rises from three to four.")


def classes(figure):
    *_, meta = figure._repr_mimebundle_()
    return meta["lab_figure"]["image"].get("classes", "")


@pytest.mark.parametrize(
    ("width", "text", "expected"),
    [
        (7.0, {}, "lab-fits"),  # labels of 10 points
        (8.0, {}, ""),
        (7.0, dict(s="small", fontsize=8), ""),
        (7.0, dict(s=" ", fontsize=8), "lab-fits"),
        (7.0, dict(s="hidden", fontsize=8, visible=False), "lab-fits"),
        (5.0, dict(s="small", fontsize=8), "lab-fits"),
        (2.0, dict(s="tiny", fontsize=5), ""),  # it is not enlarged
    ],
)
def test_what_can_be_read_on_a_phone(width, text, expected):
    assert classes(drawn(width, **text)) == expected


def test_a_heat_map_keeps_its_colours_as_well():
    fig, _ = plot.figure()
    figure = plot.show(fig, name="fig-x", caption="A line.", alt="A line that rises from three to four.", keep=True)
    assert classes(figure) == "lab-keep lab-fits"
