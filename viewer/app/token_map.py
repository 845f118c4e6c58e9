"""The layer-by-token map of a trace: a grid that is walked with the arrow keys and clicked."""

from collections.abc import Callable
from typing import Any

import streamlit as st
import streamlit.components.v2

from activations.sites import site_label
from viewer import markup
from viewer.live.trace import Trace, strengths

_LONGEST_LABEL = 140

# Texts go in by textContent alone. The table is built once for a trace; a click changes only what is marked.
_JS = """
export default function ({ data, parentElement, setTriggerValue }) {
  const host = parentElement.querySelector(".map");
  if (!host) return;
  const made = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const told = (row, column) => {
    const token = data.tokens[column];
    if (row < 0) return `Token ${column + 1}: ${token}`;
    const cell = data.cells[row][column];
    if (!cell) return `${data.sites[row]}, ${token}: no feature fires`;
    return `${data.sites[row]}, ${token}: feature ${cell[0]}` + (cell[3] ? ` (${cell[3]})` : "") +
      `: ${cell[2]}` + (cell[4] ? `, ${cell[1]} % of its highest` : "");
  };
  if (host.shown !== data.id) {
    host.shown = data.id;
    const table = made("table");
    table.setAttribute("role", "grid");
    table.setAttribute("aria-label", data.title);
    const head = table.createTHead().insertRow();
    const corner = made("th", "corner", "layer");
    corner.scope = "col";
    head.append(corner);
    data.tokens.forEach((token, column) => {
      const heading = made("th", "token");
      heading.scope = "col";
      heading.append(made("span", "", token));
      head.append(heading);
    });
    const body = table.createTBody();
    data.cells.forEach((cells, row) => {
      const line = body.insertRow();
      const name = made("th", "site", data.sites[row]);
      name.scope = "row";
      line.append(name);
      cells.forEach((cell) => {
        const place = line.insertCell();
        place.setAttribute("role", "gridcell");
        if (!cell) return;
        place.textContent = cell[1];
        // strong ones stand out, and text keeps its contrast on the deepest in both themes
        place.style.setProperty("--depth", `${3 + Math.round(0.0048 * cell[1] ** 2)}%`);
      });
    });
    [head, ...body.rows].forEach((line, row) => [...line.cells].slice(1).forEach((place, column) => {
      place.tabIndex = -1;
      place.dataset.row = row - 1;
      place.dataset.column = column;
      place.setAttribute("aria-label", told(row - 1, column));
    }));
    const scroll = made("div", "scroll");
    scroll.append(table);
    const readout = made("p", "readout");
    host.replaceChildren(readout, scroll);
    const at = (row, column) => table.rows[row + 1]?.cells[column + 1];
    const here = (event) => event.target.closest("[data-row]");
    const tell = (place) => {
      readout.textContent = place ? told(+place.dataset.row, +place.dataset.column) : data.hint;
    };
    host.current = () => table.querySelector('[tabindex="0"]');
    host.at = at;
    tell(null);
    table.addEventListener("mouseover", (event) => tell(here(event)));
    table.addEventListener("mouseleave", () => tell(null));
    table.addEventListener("focusin", (event) => tell(here(event)));
    const choose = (place) =>
      host.send("cell", [+place.dataset.row, +place.dataset.column]);
    table.addEventListener("click", (event) => { const place = here(event); if (place) choose(place); });
    table.addEventListener("keydown", (event) => {
      const place = here(event);
      if (!place || event.ctrlKey || event.metaKey || event.altKey) return;
      const row = +place.dataset.row, column = +place.dataset.column;
      const steps = {
        ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
        ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
        Home: [row, 0], End: [row, data.tokens.length - 1],
      };
      if (event.key === "Enter" || event.key === " ") choose(place);
      else if (steps[event.key]) {
        const next = steps[event.key][1] < 0 || steps[event.key][0] < -1 ? null : at(...steps[event.key]);
        if (next) {
          host.current()?.setAttribute("tabindex", "-1");
          next.tabIndex = 0;
          next.focus();
        }
      } else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }
  host.send = setTriggerValue;
  host.querySelectorAll(".chosen, .column").forEach((p) => p.classList.remove("chosen", "column"));
  host.querySelectorAll("[aria-selected]").forEach((p) => p.removeAttribute("aria-selected"));
  const [row, column] = data.chosen;
  host.at(-1, column)?.classList.add("column");
  const chosen = host.at(row, column);
  if (chosen) {
    chosen.classList.add("chosen");
    chosen.setAttribute("aria-selected", "true");
    host.current()?.setAttribute("tabindex", "-1");
    chosen.tabIndex = 0;
  }
}
"""
_CSS = """
.map { font-family: var(--st-font); color: var(--st-text-color); font-size: .8rem; }
.readout { margin: 0 0 .4rem; min-height: 2.6em; line-height: 1.3; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
.scroll { overflow-x: auto; padding: 0 0 .4rem; }
table { border-collapse: separate; border-spacing: 1px; font-variant-numeric: tabular-nums; }
th { font-weight: 400; text-align: right; padding: 0 .5rem 0 0; white-space: nowrap; }
.corner { vertical-align: bottom; opacity: .75; }
.corner, .site { position: sticky; left: 0; background: var(--st-background-color); z-index: 1; }
.token { vertical-align: bottom; padding: .15rem 0; cursor: pointer; text-align: center; }
.token span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 7.2rem; overflow: hidden;
  text-overflow: ellipsis; unicode-bidi: isolate; line-height: 1.2; display: inline-block; }
.column span { font-weight: 700; border-left: 2px solid var(--st-primary-color); }
td { min-width: 2rem; height: 1.45rem; padding: 0 .15rem; text-align: center; cursor: pointer;
  border-radius: 3px; font-size: .72rem;
  background: color-mix(in srgb, #f59114 var(--depth, 0%), var(--st-secondary-background-color)); }
td:hover, .token:hover { outline: 1px solid var(--st-text-color); }
.chosen { outline: 2px solid var(--st-primary-color); font-weight: 700; }
td:focus-visible, .token:focus-visible { outline: 3px solid var(--st-primary-color); outline-offset: 1px; }
"""


def token_map(
    trace: Trace, *, densest: float, chosen: tuple[int, int], key: str, on_choice: Callable[[], None]
) -> None:
    """Draws the strongest feature of each site and token as its share of its highest activation, in percent.

    `chosen` is (site, token), by number; a site of -1 is all. `on_choice` is called after a click, which
    `choice(key)` tells.
    """
    _component()(key=key, data=map_data(trace, densest, chosen), on_cell_change=on_choice)


def choice(key: str) -> tuple[int, int] | None:
    """The (site, token) that was clicked just now."""
    cell = st.session_state[key].cell
    # what a browser sends is anybody's
    if isinstance(cell, list | tuple) and len(cell) == 2 and all(isinstance(n, int) for n in cell):
        return cell[0], cell[1]
    return None


def map_data(trace: Trace, densest: float, chosen: tuple[int, int]) -> dict[str, Any]:
    """What is drawn: texts that can be seen, and for each site and token [latent, percent, value, label,
    whether the percentage is of its highest activation], or None."""
    best = trace.top(1, densest=densest)
    cells: list[list[Any]] = [[None] * len(trace.tokens) for _ in trace.sites]
    place = {site: number for number, site in enumerate(trace.sites)}
    for row, share in zip(best.to_dict("records"), strengths(best).clip(0, 1), strict=True):
        label = markup.readable_text(str(row["label"] or "")[:_LONGEST_LABEL]).replace("\n", " ")
        known = bool(row["share"] == row["share"])
        cells[place[row["site"]]][row["position"]] = [
            int(row["latent"]), round(100 * share), markup.number(row["activation"]), label, known,
        ]  # fmt: skip
    return {
        "id": f"{id(trace)} {densest}",
        "title": "Layers by tokens: the strongest feature's activation, in percent of its highest",
        "hint": "Each number is the strongest feature's activation in percent of its highest. "
        "Point at a cell, or walk with the arrow keys; Enter or a click lists its features.",
        "tokens": [markup.readable(token) for token in trace.tokens],
        "sites": [site_label(site) for site in trace.sites],
        "cells": cells,
        "chosen": list(chosen),
    }


@st.cache_resource(show_spinner=False)
def _component() -> Callable[..., Any]:
    return streamlit.components.v2.component(
        "jumpscope_map", html='<div class="map"></div>', css=_CSS, js=_JS
    )
