"""The table of a site's latents on a static page: all rows are in the file, a script sorts and filters."""

import html

import pandas as pd

from viewer import markup

_STYLE = """<style>.find{display:flex;flex-wrap:wrap;align-items:end;gap:.5rem 1rem;margin:1rem 0}
.find label{display:flex;flex-direction:column;font-size:.8rem;gap:.2rem}
.find input{font:inherit;font-size:1rem;color:inherit;background:transparent;border:1px solid var(--line);
  border-radius:4px;padding:.4rem .6rem;width:min(22rem,80vw)} .find output{font-size:.85rem;opacity:.8}
th button{all:unset;cursor:pointer;white-space:nowrap} th button:focus-visible{outline:2px solid var(--link)}
th[aria-sort=ascending] button::after{content:" ▲"} th[aria-sort=descending] button::after{content:" ▼"}
.js-table td:nth-child(2),.js-table th:nth-child(2){text-align:left;white-space:normal;min-width:14rem;
  overflow-wrap:anywhere}
#more{font:inherit;color:inherit;background:transparent;cursor:pointer;margin:1rem 0;padding:.4rem .9rem;
  border:1px solid var(--line);border-radius:4px}</style>"""

SCRIPT = """
const STEP = 200;
const [body] = document.querySelector("table").tBodies;
const box = document.getElementById("filter"), more = document.getElementById("more");
const count = document.getElementById("count");
const heads = [...document.querySelectorAll("th")];
const key = (cell) => ("v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent);
const rows = [...body.rows].map((row) => ({
  row, text: row.textContent.toLowerCase(), keys: [...row.cells].map(key),
}));
const order = new Intl.Collator("en").compare;
const known = new URLSearchParams(location.hash.slice(1));
let column = Math.min(Math.max(parseInt(known.get("by")) || 0, 0), heads.length - 1);
let falling = known.get("falling") === "1", shown = STEP, found = rows;
box.value = known.get("q") ?? "";

function draw() {
  body.replaceChildren(...found.slice(0, shown).map((entry) => entry.row));
  more.hidden = found.length <= shown;
  const first = Math.min(shown, found.length).toLocaleString("en");
  count.textContent = `${first} of ${found.length.toLocaleString("en")} latents shown`;
}

function choose() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  found = rows.filter((entry) => words.every((word) => entry.text.includes(word)));
  const sign = falling ? -1 : 1;
  found.sort((a, b) => {
    const [x, y] = [a.keys[column], b.keys[column]];
    return sign * (typeof x === "number" ? x - y : order(x, y)) || a.keys[0] - b.keys[0];
  });
  heads.forEach((head, n) => {
    if (n === column) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  shown = STEP;
  const state = new URLSearchParams({ by: column, falling: falling ? 1 : 0, q: box.value });
  history.replaceState(null, "", `#${state}`);
  draw();
}

heads.forEach((head, n) => head.querySelector("button").addEventListener("click", () => {
  // numbers are looked at from the highest, names from the first
  falling = n === column ? !falling : "v" in (rows[0]?.row.cells[n].dataset ?? {}) && n > 0;
  column = n;
  choose();
}));
box.addEventListener("input", choose);
more.addEventListener("click", () => { shown += STEP; draw(); });
document.querySelector(".find").hidden = false;
choose();
"""

_NUMBERS = {"density": markup.percent, "max": markup.number, "mean": markup.number}


def latents_html(frame: pd.DataFrame) -> str:
    """A filter and a table of latents (rows of `Site.latents`), each linked to LATENT.html."""
    heads = ("latent", "label", "state", *_NUMBERS)
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in heads)
    columns = [frame[name] for name in heads]
    rows = []
    for latent, label, state, *values in zip(*columns, strict=True):
        cells = [
            f'<td data-v="{latent}"><a href="{latent}.html">{latent}</a>',
            f"<td>{html.escape(markup.readable_text(label))}",
            f"<td>{html.escape(state)}",
        ]
        cells += [
            f'<td data-v="{value:.6g}">{show(value)}'
            for value, show in zip(values, _NUMBERS.values(), strict=True)
        ]
        rows.append(f"<tr>{''.join(cells)}")
    return (
        f'{_STYLE}<div class="find" hidden><label>Filter by number, label or state'
        '<input id="filter" type="search" autocomplete="off" spellcheck="false"></label>'
        '<output id="count"></output></div>'
        f'<div class="js-scroll"><table class="js-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<button id="more" type="button" hidden>Show more</button>'
    )
