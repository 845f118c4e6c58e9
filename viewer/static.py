"""Features as HTML files that open without a server, a network or jumpscope.

    DIR/index.html, 0.html, 1.html, ...      of a site: a table of its latents, and a page each
    DIR/index.html, SITE/index.html, ...     of a run: a table of its sites, and a folder each

A page needs no file but itself. Its policy allows inline styles and our own script, told by its hash, and
nothing else, so nothing that a text holds can run or reach for the network.
"""

import base64
import hashlib
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from activations.sites import site_label
from sae.errors import UserError
from sae.files import whole_folder
from viewer import feature_html, markup
from viewer.features import Feature, Site
from viewer.runs import Run
from viewer.static_table import SCRIPT as _TABLE_SCRIPT
from viewer.static_table import latents_html

_STYLE = """<style>:root{color-scheme:light dark;--paper:#fbfaf7;--ink:#1d2327;--link:#0b6e63;--line:#dcd8ce}
@media (prefers-color-scheme:dark){:root{--paper:#14181b;--ink:#e9e6df;--link:#5fd0c0;--line:#343b41}}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
body>*{max-width:75rem;margin:0 auto;padding:.75rem 1.25rem 0}
a{color:var(--link);text-underline-offset:3px}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.9rem}
h1{font-size:1.7rem;font-weight:600;line-height:1.25;margin:.25rem 0;overflow-wrap:anywhere}
details{margin:.4rem 0} summary{cursor:pointer;font-size:.85rem} footer{padding:1.5rem 1.25rem 2rem}
svg{max-width:100%} </style>"""
_FEATURE_SCRIPT = """
addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = rel && document.querySelector(`a[rel=${rel}]`);
  if (link) link.click();
});
"""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The pages around a feature's own, as addresses; "" where there is none."""

    index: str = ""
    previous: str = ""
    next: str = ""


def feature_page(
    feature: Feature, *, link: Callable[[str, int], str] | None = None, around: Neighbours | None = None
) -> str:
    """All that the index knows of a feature as one HTML document, with your label and notes.

    Alone it leads nowhere. `link` gives the addresses of related latents, `around` those of the table and
    of the pages before and after, which the arrow keys follow.
    """
    around, links = around or Neighbours(), feature_html.Links(feature=link or (lambda site, latent: ""))
    manifest = feature.site.manifest
    ways = [
        f'<a{rel} href="{html.escape(address)}">{html.escape(name)}</a>'
        for address, name, rel in (
            (around.index, site_label(feature.site.name), ""),
            (around.previous, "← Previous", ' rel="prev"'),
            (around.next, "Next →", ' rel="next"'),
        )
        if address
    ]
    origin = (
        f"{manifest['model']}, {feature.site.name}: {manifest['tokens']:,} tokens of {manifest['corpus']}"
    )
    body = (
        (f'<nav aria-label="Features">{"".join(ways)}</nav>' if ways else "")
        + f"<main>{feature_html.head_html(feature, links)}{feature_html.main_html(feature, links)}</main>"
        + f"<footer>{markup.note_html(origin)}</footer>"
    )
    return _document(feature.title(), feature_html.STYLE + body, _FEATURE_SCRIPT if ways else "")


def write_pages(
    run: Run,
    out: Path | str,
    *,
    sites: Sequence[str],
    latents: Iterable[int] | None = None,
    alone: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes a page for each of the latents (None: all) of some sites, and the tables; returns their number.

    `alone` is for one site: its pages lie in `out` itself. The folder appears when everything is in it.
    `progress` counts latents. Raises UserError when `out` is occupied, an index is torn, a site has no such
    latent, or the disk refuses.
    """
    opened = [run.site(name) for name in sites]
    chosen = {site.name: _chosen(site, latents) for site in opened}
    total, done = sum(len(numbers) for numbers in chosen.values()), 0
    with whole_folder(out) as folder:
        for site in opened:
            place = folder if alone else folder / site.name
            place.mkdir(exist_ok=True)
            _write(
                place / "index.html", _site_page(site, chosen[site.name], "" if alone else "../index.html")
            )
            for latent, page in _feature_pages(site, chosen):
                _write(place / f"{latent}.html", page)
                done += 1
                if progress:
                    progress(done, total)
        if not alone:
            _write(folder / "index.html", _run_page(run, opened, chosen))
    return total


def _feature_pages(site: Site, chosen: dict[str, Sequence[int]]) -> Iterator[tuple[int, str]]:
    numbers = chosen[site.name]
    written = {name: frozenset(these) for name, these in chosen.items()}

    def link(other: str, latent: int) -> str:
        if latent not in written.get(other, ()):
            return ""
        return f"{latent}.html" if other == site.name else f"../{quote(other)}/{latent}.html"

    for place, latent in enumerate(numbers):
        around = Neighbours(
            index="index.html",
            previous=f"{numbers[place - 1]}.html" if place else "",
            next=f"{numbers[place + 1]}.html" if place + 1 < len(numbers) else "",
        )
        yield latent, feature_page(site[latent], link=link, around=around)


def _site_page(site: Site, latents: Sequence[int], up: str) -> str:
    manifest, name = site.manifest, site_label(site.name)
    frame = site.latents()
    facts = [
        ("model", manifest["model"]),
        ("latents", f"{len(site):,}"),
        ("fired", f"{len(site.live()):,}"),
        ("tokens read", f"{manifest['tokens']:,}"),
        ("corpus", manifest["corpus"]),
    ]
    body = (
        (f'<nav aria-label="Sites"><a href="{up}">All sites</a></nav>' if up else "")
        + f"<main><h1>{html.escape(name)}</h1>{markup.facts_html(facts)}"
        + latents_html(frame.iloc[list(latents)])
        + "</main><footer></footer>"
    )
    return _document(name, body, _TABLE_SCRIPT)


def _run_page(run: Run, sites: Sequence[Site], chosen: dict[str, Sequence[int]]) -> str:
    rows = [
        [
            f'<a href="{html.escape(quote(site.name))}/index.html">{html.escape(site_label(site.name))}</a>',
            f"{len(chosen[site.name]):,}",
            f"{len(site):,}",
            f"{len(site) - len(site.live()):,}",
        ]
        for site in sites
    ]
    config = run.config()
    facts = [(key, str(config[key])) for key in ("model", "corpus") if key in config]
    table = markup.table_html(["site", "pages", "latents", "silent"], rows)
    name = html.escape(run.name)
    body = f"<main><h1>{name}</h1>{markup.facts_html(facts)}{table}</main><footer></footer>"
    return _document(run.name, body, "")


def _document(title: str, body: str, script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{html.escape(markup.readable_text(title))} · jumpscope</title>{markup.STYLE}{_STYLE}</head>"
        f"<body>{body}{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _write(path: Path, page: str) -> None:
    # a label may hold what no encoding has
    path.write_bytes(page.encode("utf-8", "replace"))


def _chosen(site: Site, latents: Iterable[int] | None) -> Sequence[int]:
    if latents is None:
        return range(len(site))
    numbers = sorted(set(latents))
    if numbers and not 0 <= numbers[0] <= numbers[-1] < len(site):
        wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise UserError(
            f"latents of {site.name} must be from 0 to {len(site) - 1}", str(wrong), "choose others"
        )
    return numbers
