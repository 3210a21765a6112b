"""Panels and legends of figures in the sizes of a paper's columns."""

import textwrap
from typing import NamedTuple

from runs.files import paper_style

COLUMN, PAGE = 3.3, 6.9  # inches: widths of one column of a paper, and of both
LETTER = 0.07  # inches, more than the mean width of a letter
MOST_COLUMNS = 8  # of a legend


def make_panels(count: int, columns: int, width: float, height: float, **shared):
    """Return a figure and the axes of `count` panels in rows of `columns`, each width x height inches."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update(paper_style())
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def wrapped(text: str, figure) -> str:
    """Break a text into lines as wide as the figure."""
    return textwrap.fill(text, int(figure.get_figwidth() / LETTER))


def short_number(value: float, _position=None) -> str:
    """Return a number as the ticks of a cost show it: 0.5, 200, 50k, 2M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):g}{letter}"
    return f"{value:,.9g}"


def log_locator(values: list[float]):
    """Return a locator of ticks for a logarithmic axis of these values: more in a decade where they span about one."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5) if max(values) > 12 * min(values) else (1, 1.5, 2, 3, 5, 7))


class Mark(NamedTuple):
    color: tuple
    marker: str


class Section(NamedTuple):
    title: str
    entries: dict[str, Mark]


class Columns(NamedTuple):
    """Entries of a legend in columns of equal length; every section begins a column."""

    handles: list
    labels: list[str]
    titles: list[int]  # numbers of the entries that head a section
    count: int


def in_columns(sections: list[tuple[str, list, list[str]]], rows: int) -> Columns:
    """Arrange sections (title, handles, labels) in columns of so many rows; 0: all in one. An empty title takes no entry."""
    from matplotlib.lines import Line2D

    handles, labels, titles = [], [], []
    for title, of_section, names in sections:
        if title:
            titles.append(len(labels))
        of_section = [Line2D([], [], alpha=0)] * bool(title) + of_section
        names = [title] * bool(title) + names
        blank = -len(names) % rows if rows else 0
        handles += of_section + [Line2D([], [], alpha=0)] * blank
        labels += names + [""] * blank
    return Columns(handles, labels, titles, len(labels) // rows if rows else 1)


def legend_below(figure, handles: list, labels: list[str]):
    """Add a legend below the axes, in as many columns as fit; the figure becomes taller by it. Long labels are wrapped."""
    return legend_of_parts(figure, [("", handles, labels)])


def legend_of_sections(figure, sections: list[Section]):
    """Add a legend of sections, each in columns of its own, under their titles."""
    from matplotlib.lines import Line2D

    parts = []
    for title, entries in sections:
        handles = [Line2D([], [], color=mark.color, marker=mark.marker, ls="") for mark in entries.values()]
        parts.append((title, handles, list(entries)))
    return legend_of_parts(figure, parts)


def legend_of_parts(figure, sections: list[tuple[str, list, list[str]]]):
    """Add the legend of sections (title, handles, labels) with as few rows as fit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()  # measures texts
    sections = [(title, handles, [wrapped(label, figure) for label in labels]) for title, handles, labels in sections]
    longest = sum(len(labels) + bool(title) for title, _, labels in sections)
    for rows in [*sorted({-(-longest // columns) for columns in range(1, MOST_COLUMNS + 1)}), 0]:
        parts = in_columns(sections, rows)
        if parts.count > MOST_COLUMNS:
            continue
        legend = figure.legend(parts.handles, parts.labels, loc="outside lower center", ncols=parts.count)
        for number in parts.titles:
            legend.get_texts()[number].set_fontweight("bold")
        box = legend.get_window_extent(renderer)
        if box.width < 0.97 * figure.bbox.width or not rows:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, 1.03 * box.width / figure.dpi), height + box.height / figure.dpi)
    return legend
