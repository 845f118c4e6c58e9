"""Figures made of HTML alone: drawn with the page, light, in the colours of the text around.

They are no SVG because Streamlit takes that out of pages. Each is a <figure> whose picture has a name for
those who cannot see it; points and bars tell their values on hover, lines differ in their marks as well.
"""

import html
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from viewer.markup import number, percent, readable_text

# of middle lightness: 3 to 1 against light and dark paper
_SERIES = ("#0d8275", "#b8620f", "#7a5ab8", "#3b78c2", "#b5476b")
_MARKS = ("circle", "diamond", "square", "triangle", "cross")
_FLAT = 1.5
"""Per cent of the height under which a line is drawn as level."""
Row = dict[Hashable, Any]

STYLE = """<style>
.js-figs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:1.25rem 2rem}
.js-fig{margin:0;min-width:0} .js-fig i{font-style:normal}
.js-fig figcaption{font-weight:600;font-size:.9rem;margin:0 0 .6rem;display:flex;flex-wrap:wrap;
  gap:.1rem 1rem;min-height:1.4em}
.js-key{font-weight:400;font-size:.8rem;white-space:nowrap} .js-key>i{position:relative;display:inline-block;
  width:1.4rem;height:.6em}
.js-key>i::before{content:"";position:absolute;left:0;right:0;top:calc(50% - 1px);border-top:2px solid}
.js-plot{position:relative;height:9rem;margin:0 .6rem 2.4rem 2.9rem;font-size:.72rem;line-height:1;
  font-variant-numeric:tabular-nums}
.js-plot>*{position:absolute} .js-y{left:0;right:0;border-top:1px solid rgba(128,128,128,.28)}
.js-y span{position:absolute;right:calc(100% + .4rem);top:-.5em;white-space:nowrap}
.js-x{top:calc(100% + .5rem);transform:translateX(-50%)} .js-axis{top:calc(100% + 1.5rem);left:0;right:0;
  text-align:center}
.js-line{inset:0} .js-line>*{position:absolute}
.js-up{background:linear-gradient(to top left,transparent calc(50% - 1px),currentColor calc(50% - 1px),
  currentColor calc(50% + 1px),transparent calc(50% + 1px))}
.js-down{background:linear-gradient(to top right,transparent calc(50% - 1px),currentColor calc(50% - 1px),
  currentColor calc(50% + 1px),transparent calc(50% + 1px))}
.js-level{height:2px;margin-top:-1px;background:currentColor}
.js-dot{width:7px;height:7px;margin:-3.5px 0 0 -3.5px;background:currentColor;box-sizing:border-box}
.js-key .js-dot{position:absolute;left:50%;top:50%} .js-circle{border-radius:50%}
.js-diamond{transform:rotate(45deg)} .js-triangle{clip-path:polygon(50% 0,100% 100%,0 100%);
  width:9px;height:9px;margin:-5px 0 0 -4.5px}
.js-cross{clip-path:polygon(35% 0,65% 0,65% 35%,100% 35%,100% 65%,65% 65%,65% 100%,35% 100%,35% 65%,0 65%,
  0 35%,35% 35%);width:9px;height:9px;margin:-4.5px 0 0 -4.5px}
.js-error{width:7px;margin-left:-3.5px;border:solid currentColor;border-width:1.5px 0;
  background:linear-gradient(currentColor,currentColor) center/1.5px 100% no-repeat}
.js-span{width:6px;margin-left:-3px;background:currentColor;opacity:.4;border-radius:3px}
.js-small{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:1rem 1.5rem}
.js-small a{color:inherit;text-decoration-color:rgb(20,150,130);text-underline-offset:3px}
.js-small figcaption{justify-content:space-between;margin-bottom:.3rem} .js-small small{font-weight:400;
  font-size:.75rem}
.js-bars{display:flex;align-items:flex-end;gap:1px;height:3rem;border-bottom:1px solid rgba(128,128,128,.7)}
.js-bars i{flex:1;background:#0d8275} .js-bars .js-much{background:#b8620f;border:1px solid;border-bottom:0}
.js-ends{display:flex;justify-content:space-between;font-size:.7rem;font-variant-numeric:tabular-nums;
  margin-top:.15rem;opacity:.85}
</style>"""


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Where layers and values are in the picture, in per cent from its left and top."""

    layers: tuple[int, int]
    ticks: list[float]

    def x(self, layer: int) -> float:
        first, last = self.layers
        return 50.0 if first == last else 100 * (layer - first) / (last - first)

    def y(self, value: float | int) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return 100 * (1 - (value - low) / (high - low))

    def drawn(self, *, as_percent: bool = False) -> str:
        """Lines and numbers."""
        say = _tick_percent if as_percent else _tick
        parts = [
            f'<i class="js-y" style="top:{self.y(t):.1f}%"><span>{say(t)}</span></i>' for t in self.ticks
        ]
        first, last = self.layers
        step = max(1, math.ceil((last - first) / 9))
        parts += [
            f'<span class="js-x" style="left:{self.x(layer):.1f}%">{layer}</span>'
            for layer in range(first, last + 1, step)
        ]
        return "".join(parts) + '<span class="js-axis">layer</span>'


def by_layer(
    frame: pd.DataFrame, columns: Mapping[str, str], *, title: str, error: str = "", as_percent: bool = False
) -> str:
    """Columns (to what they are called) by layer, a line each and a kind of site; `error` is ± a column.

    `frame` has layer and kind. A layer without a number leaves a gap.
    """
    lines, say = _lines(frame, columns), percent if as_percent else number
    values = [v for _, column, rows in lines for row in rows for v in _reach(row, column, error)]
    axes = _fit(frame, values)
    body, keys = [axes.drawn(as_percent=as_percent)], []
    for place, (name, column, rows) in enumerate(lines):
        colour, mark = _SERIES[place % len(_SERIES)], _MARKS[place % len(_MARKS)]
        known = [row for row in rows if math.isfinite(row[column])]
        points = [(axes.x(row["layer"]), axes.y(row[column])) for row in rows]
        parts = [_segment(*a, *b) for a, b in itertools.pairwise(points)]
        for row in known:
            told = f"layer {row['layer']}, {name}: {say(row[column])}"
            x, (low, high) = axes.x(row["layer"]), _reach(row, column, error)
            if high > low:
                top, bottom = axes.y(high), axes.y(low)
                where = f"left:{x:.1f}%;top:{top:.1f}%;height:{bottom - top:.1f}%"
                parts.append(f'<i class="js-error" style="{where}"></i>')
                told += f" ± {number(row[error], 2)}"
            parts.append(_dot(mark, x, axes.y(row[column]), told))
        body.append(f'<div class="js-line" style="color:{colour}">{"".join(parts)}</div>')
        sample = f'<i style="color:{colour}" aria-hidden="true"><i class="js-dot js-{mark}"></i></i>'
        keys.append(f'<span class="js-key">{sample} {html.escape(name)}</span>')
    said = "; ".join(f"{name} {_range_of(rows, column, say)}" for name, column, rows in lines)
    return _figure(title, "".join(keys) if len(keys) > 1 else "", f"{title} by layer: {said}", "".join(body))


def ranges(frame: pd.DataFrame, columns: tuple[str, str, str], *, title: str, names: str) -> str:
    """From a low to a high number by layer, with a mark for the one between; `names` says what they are."""
    low, middle, high = columns
    kinds = list(dict.fromkeys(frame["kind"]))
    rows = [row for row in frame.to_dict("records") if math.isfinite(row[middle])]
    axes = _fit(frame, [row[column] for row in rows for column in columns])
    body = [axes.drawn()]
    for row in rows:
        place = kinds.index(row["kind"])
        x = axes.x(row["layer"]) + 2 * (place - (len(kinds) - 1) / 2)
        top, bottom = axes.y(row[high]), axes.y(row[low])
        kind = f" {row['kind']}" if len(kinds) > 1 else ""
        told = f"layer {row['layer']}{kind}: {', '.join(number(row[c]) for c in columns)}"
        where = f"left:{x:.1f}%;top:{top:.1f}%;height:{bottom - top:.1f}%"
        parts = f'<i class="js-span" style="{where}" title="{html.escape(told)}"></i>'
        parts += _dot(_MARKS[place % len(_MARKS)], x, axes.y(row[middle]), told)
        body.append(f'<div class="js-line" style="color:{_SERIES[place % len(_SERIES)]}">{parts}</div>')
    label = f"{title} by layer: {_range_of(rows, middle, number)}"
    return _figure(title, f'<span class="js-key">{html.escape(names)}</span>', label, "".join(body))


def density(
    counts: Sequence[int], edges: Sequence[float | int], *, name: str, link: str = "", note: str = ""
) -> str:
    """How many latents fire how often, small: bins of log10 of the share of tokens, `edges` around them.

    Bins from a tenth of the tokens on are amber and outlined. `link` is where the name leads.
    """
    most, bars = max(*counts, 1), []
    for count, (low, high) in zip(counts, itertools.pairwise(edges), strict=True):
        tall = max(4.0, 100 * count / most) if count else 0
        told = f"{_share(low)} to {_share(high)} of tokens: {count:,} latents"
        much = ' class="js-much"' if low >= -1 and count else ""
        bars.append(f'<i{much} style="height:{tall:.0f}%" title="{told}"></i>')
    peak = edges[max(range(len(counts)), key=lambda place: counts[place])]
    shown = html.escape(readable_text(name))
    if link:
        shown = f'<a href="{html.escape(link)}" target="_self" data-js-link>{shown}</a>'
    label = html.escape(f"density of {readable_text(name)}: most latents near {_share(peak)} of tokens")
    ends = "".join(f"<span>{_share(edges[int(n * (len(edges) - 1) / 3)])}</span>" for n in range(4))
    return (
        f'<figure class="js-fig"><figcaption><span>{shown}</span>'
        f"<small>{html.escape(note)}</small></figcaption>"
        f'<div class="js-bars" role="img" aria-label="{label}">{"".join(bars)}</div>'
        f'<div class="js-ends" aria-hidden="true">{ends}</div></figure>'
    )


def _figure(title: str, keys: str, label: str, body: str) -> str:
    caption = f"<figcaption><span>{html.escape(title)}</span>{keys}</figcaption>"
    picture = f'<div class="js-plot" role="img" aria-label="{html.escape(label)}">{body}</div>'
    return f'<figure class="js-fig">{caption}{picture}</figure>'


def _lines(frame: pd.DataFrame, columns: Mapping[str, str]) -> list[tuple[str, str, list[Row]]]:
    """name, column and rows of each line, in the order of layers."""
    kinds = list(dict.fromkeys(frame["kind"]))
    return [
        (
            name if len(kinds) == 1 else f"{kind} {name}",
            column,
            frame.loc[frame["kind"] == kind].sort_values(by="layer").to_dict("records"),
        )
        for column, name in columns.items()
        for kind in kinds
    ]


def _reach(row: Row, column: str, error: str) -> tuple[float | int, float | int]:
    """A value less and plus its error, where it has one."""
    spread = row[error] if error and math.isfinite(row[error]) else 0.0
    return row[column] - spread, row[column] + spread


def _fit(frame: pd.DataFrame, values: Iterable[float | int]) -> _Axes:
    """Axes that hold all values and 0."""
    known = [0.0, *(value for value in values if math.isfinite(value))]
    low, high = min(known), max(known)
    high = high if high > low else low + 1.0
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * 0.999)
    ticks = [step * n for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    layers = frame["layer"].tolist()
    return _Axes(layers=(min(layers), max(layers)), ticks=ticks)


def _segment(x: float, y: float, x2: float, y2: float) -> str:
    """A line between two points; nothing where one is not known."""
    if not (math.isfinite(y) and math.isfinite(y2)):
        return ""
    across = f"left:{x:.1f}%;width:{x2 - x:.1f}%"
    if abs(y2 - y) < _FLAT:
        return f'<i class="js-level" style="{across};top:{(y + y2) / 2:.1f}%"></i>'
    way = "js-down" if y2 > y else "js-up"
    return f'<i class="{way}" style="{across};top:{min(y, y2):.1f}%;height:{abs(y2 - y):.1f}%"></i>'


def _dot(mark: str, x: float, y: float, told: str) -> str:
    where = f"left:{x:.1f}%;top:{y:.1f}%"
    return f'<i class="js-dot js-{mark}" style="{where}" title="{html.escape(told)}"></i>'


def _range_of(rows: Sequence[Row], column: str, say: Callable[[float | int], str]) -> str:
    known = [row[column] for row in rows if math.isfinite(row[column])]
    return f"from {say(min(known))} to {say(max(known))}" if known else "not known"


def _tick(value: float | int) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _tick_percent(value: float | int) -> str:
    return f"{_tick(100 * value)} %"


def _share(power: float | int) -> str:
    """10 to a power, as a share of tokens: 1e-4, 0.01, 1."""
    return f"{10.0**power:.2g}" if power > -2.01 else f"{10.0**power:.0e}".replace("e-0", "e-")
