"""Figures as inline SVG whose colours follow the page, light or dark.

Matplotlib draws with stand-in colours; each is then replaced by a CSS variable of the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polyrank.errors import printable

INK, GRID = "#010203", "#010204"
SERIES = [f"#0102{10 + index:02x}" for index in range(8)]
_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)"} | {
    colour: f"var(--s{index})" for index, colour in enumerate(SERIES)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "polyrank",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx")
Line = tuple[Sequence[float], Sequence[float]]


def curve(
    x_label: str, lines: Mapping[str, Line], level: tuple[str, float] | None = None, whole: bool = True
) -> Markup:
    """Lines by name, each (x, y); ``level`` is a dashed horizontal line with its name.

    Args:
        whole: whether x counts something, such as rounds.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(x_label)
        for place, (name, (x, y)) in enumerate(lines.items()):
            colour, dashes = _colour(place), _again(_DASHES, place)
            look: Any = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 3.5}
            axes.plot(x, y, label=name, linewidth=1.8, **look)
        if level is not None:
            axes.axhline(level[1], color=INK, linestyle="--", linewidth=1, label=level[0])
        if whole:
            _integer_ticks(axes, max((max(x, default=1) for x, _ in lines.values()), default=1))
        return _svg(figure, axes)


def bars(x_label: str, x: Sequence[float], stacks: Mapping[str, Sequence[float]]) -> Markup:
    """Stacked bars, one stack part per name."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(x_label)
        bottom = [0.0] * len(x)
        for place, (name, heights) in enumerate(stacks.items()):
            colour, hatch = _colour(place), _again(_HATCHES, place)
            axes.bar(x, heights, bottom=bottom, color=colour, hatch=hatch, label=name, width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        _integer_ticks(axes, max(x, default=1))
        return _svg(figure, axes)


def label_histogram(
    clients: Sequence[str], labels: Sequence[str], counts: Sequence[Sequence[int]], most: int = 60
) -> Markup:
    """A bar per client, divided by label; at most ``most`` clients are drawn.

    With more labels than colours, neighbours in label order share one.
    """
    shown = list(range(min(len(clients), most)))
    group = -(-len(labels) // len(SERIES))
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(6.4, 1.4 + 0.2 * len(shown)))
        axes = figure.add_subplot()
        left = [0] * len(shown)
        for index, first in enumerate(range(0, len(labels), group)):
            widths = [sum(counts[row][first : first + group]) for row in shown]
            last = min(first + group, len(labels)) - 1
            name = labels[first] if group == 1 else f"{labels[first]} .. {labels[last]}"
            axes.barh(shown, widths, left=left, color=SERIES[index], label=name, height=0.75)
            left = [low + width for low, width in zip(left, widths, strict=True)]
        axes.set_yticks(shown, [printable(clients[row], 24) for row in shown])
        axes.invert_yaxis()
        left_out = f" (the first {len(shown)} of {len(clients)} clients)" if len(shown) < len(clients) else ""
        axes.set_xlabel(f"train texts{left_out}")
        axes.margins(y=0.01)
        return _svg(figure, axes)


def spans(x_label: str, names: Sequence[str], stacks: Mapping[str, Sequence[float]]) -> Markup:
    """A horizontal bar per name, one part of it per stack, one after the other."""
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(6.4, 1.4 + 0.2 * len(names)))
        axes = figure.add_subplot()
        rows, left = range(len(names)), [0.0] * len(names)
        for (stack, widths), colour in zip(stacks.items(), SERIES, strict=False):
            axes.barh(rows, widths, left=left, color=colour, label=stack, height=0.75)
            left = [low + width for low, width in zip(left, widths, strict=True)]
        axes.set_yticks(rows, [name[:40] for name in names], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)
        axes.margins(y=0.01)
        return _svg(figure, axes)


def heat_map(x_label: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    """A row per name and a column per round, from 1; the fuller the colour, the larger the count.

    Args:
        counts: one sequence per round, in the order of the names.
    """
    most = max(max(column) for column in counts)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(6.4, 0.9 + 0.2 * len(names)))
        axes = figure.add_subplot()
        for round_, column in enumerate(counts, 1):
            for row, count in enumerate(column):
                alpha = count / most
                axes.barh(row, 1, left=round_ - 0.5, height=1, color=SERIES[0], alpha=alpha, linewidth=0)
        axes.set_yticks(range(len(names)), list(names), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{x_label} (full colour: {most})")
        axes.margins(0)
        _integer_ticks(axes, len(counts))
        return _svg(figure, axes)


def _colour(place: int) -> str:
    return SERIES[place % len(SERIES)]


def _again(looks: Sequence[str], place: int) -> str:
    """What tells a series from an earlier one of its colour."""
    return looks[place // len(SERIES) % len(looks)]


def _axes(x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    return figure, axes


def _integer_ticks(axes: Axes, last: float) -> None:
    if last <= 1:  # a run of one round
        axes.set_xlim(0, 2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _svg(figure: Figure, axes: Axes) -> Markup:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, [printable(n, 40) for n in names], loc="upper left", ncols=4, fontsize=9)
    legend_inches = 0.12 + 0.19 * (1 + (len(names) - 1) // 4)
    for bar in axes.patches:
        bar.set_in_layout(False)  # none reaches beyond the axes, and to look at each takes half of the time
    target = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names in any script
        figure.tight_layout(rect=(0, 0, 1, 1 - legend_inches / figure.get_figheight()))
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text)
