"""The style of every figure, with colours that colour-blind readers can tell apart, and how figures are saved."""

import io
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import findfont, get_font, get_font_names
from matplotlib.ticker import FixedLocator, NullLocator

from remoe.lab.text import short_name, visible

_MORE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Hiragino Sans GB", "Arial Unicode MS",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Emoji", "Segoe UI Symbol",
)  # fmt: skip
DIGITS = 9  # kept of a position, as a share of its figure
STYLE = {
    # DejaVu Sans comes with matplotlib, so that files are the same on every machine. The others, where there is one,
    # draw only the characters that it lacks.
    "font.family": ["DejaVu Sans", *(font for font in _MORE_FONTS if font in get_font_names())],
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "remoe",
}
NOTEBOOK_DPI = 110
GREY = "#777777"
MAX_LEGEND = 4  # most entries of a legend inside the axes; longer legends go outside

# Okabe and Ito's palette without its yellow, which is hard to see on white, and three more colours that also differ in
# lightness. Markers and dashes carry the same information a second time.
_COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A3E00", "#A6A6A6", "#5E3C99",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", "p")
_DASHES = ("-", "--", ":")


class Look(NamedTuple):
    """Colour, marker and line style that distinguish one run from the others."""

    color: str
    marker: str
    linestyle: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, by position; pass the same dict to all figures of a report to keep them consistent."""
    return {
        name: Look(_COLORS[i % 10], _MARKERS[i % 10], _DASHES[i // 10 % len(_DASHES)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def plain(text: str) -> str:
    """A name escaped so that matplotlib prints it literally, and shortened to fit.

    `$` starts no formula, `_` hides no legend entry, and a character that no font has is written as in Python.
    """
    letters = (letter if _drawable(letter) else letter.encode("unicode_escape").decode() for letter in visible(text))
    shown = short_name("".join(letters))
    return ("\u200a" if shown.startswith("_") else "") + shown.replace("$", r"\$")


@cache
def _drawable(letter: str) -> bool:
    return any(ord(letter) in charmap for charmap in _charmaps())


@cache
def _charmaps() -> list[dict[int, int]]:
    """The characters of the fonts in STYLE."""
    return [get_font(findfont(family)).get_charmap() for family in STYLE["font.family"]]


def legend_columns(names: Iterable[str], width: float) -> int:
    """Number of legend entries that fit side by side, at most six.

    Args:
        names: the entries.
        width: width of the figure in inches.
    """
    longest = max((width_in_letters(plain(text)) for text in names), default=0)
    return max(1, min(6, int(72 * width / (40 + 5 * longest))))  # points: 5 per letter, 40 for the line and the gaps


def width_in_letters(text: str) -> int:
    """In letters; a Chinese, Japanese or Korean character has the width of two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


class StyledFigure(Figure):
    """A figure that is drawn in STYLE, whoever draws it, and that a notebook shows without `pyplot`."""

    def draw(self, renderer: RendererBase) -> None:
        """Draws the figure; ticks are created only now, so the style must apply here too."""
        with mpl.rc_context(STYLE):
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        """What IPython shows."""
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=NOTEBOOK_DPI)
        return png.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes are in inches."""
    fig = StyledFigure(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    return fig


def label(ax: Axes, *, x: str = "", y: str = "", title: str = "") -> None:
    """Labels the axes; labels include units."""
    ax.set(xlabel=x, ylabel=y, title=title)


def number_axis(ax: Axes, axis: str, count: int) -> None:
    """Ticks for the layers or experts 0 .. count - 1, few enough to be legible."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if count / step <= 16 or step == 128)
    ticks = getattr(ax, f"{axis}axis")
    ticks.set_major_locator(FixedLocator(list(range(0, count, step))))
    ticks.set_minor_locator(NullLocator())


def quantity(value: float) -> str:
    """A number in words; at least a million with three significant digits and a unit: 16.1M."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if value >= 0.9995 * size:  # rounds to it with three digits
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def save(fig: Figure, path: Path | str) -> None:
    """Writes `path`.svg and `path`.png; the same figure gives the same bytes.

    Args:
        fig: the figure, whose layout is frozen.
        path: path without a suffix, in an existing folder.
    """
    write_svg(fig, f"{path}.svg")
    _print_png(fig, path)


def save_png(fig: Figure, path: Path | str) -> None:
    """Writes `path`.png, the same as `save` does."""
    _freeze_layout(fig)
    _print_png(fig, path)


def write_svg(fig: Figure, file: BinaryIO | str) -> None:
    """Writes the figure as SVG as `save` does."""
    _freeze_layout(fig)
    with _printing(fig):
        FigureCanvasSVG(fig).print_svg(file, metadata={"Date": None})


def _print_png(fig: Figure, path: Path | str) -> None:
    with _printing(fig):
        FigureCanvasAgg(fig).print_png(f"{path}.png", metadata={"Software": None})


def _freeze_layout(fig: Figure) -> None:
    # Run the layout only once: each run moves the axes by a rounding error, and the ids in the SVG hash positions.
    with mpl.rc_context(STYLE):
        fig.get_layout_engine().execute(fig)
    fig.set_layout_engine("none")
    _round_positions(fig)


@contextmanager
def _printing(fig: Figure) -> Iterator[None]:
    """For a method of a canvas, which draws the figure once; `savefig` would draw it twice, for a layout."""
    fig.set_dpi(STYLE["savefig.dpi"])
    with mpl.rc_context(STYLE):  # ticks are created when drawn, so the style must apply here too
        yield


def _round_positions(fig: Figure | SubFigure) -> None:
    """Rounds away the last digits of the layout, which its solver does not always reproduce."""
    for panel in fig.subfigs:
        panel.bbox_relative.p0, panel.bbox_relative.p1 = panel.bbox_relative.get_points().round(DIGITS)
        _round_positions(panel)
    for ax in fig.axes:
        ax.set_position(np.round(ax.get_position(original=True).bounds, DIGITS))
