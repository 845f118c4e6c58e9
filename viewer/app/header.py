"""What stands above every page: the pages, and the run that is shown with the others to choose from."""

import html

import streamlit as st

from sae.errors import UserError
from viewer import markup
from viewer.app.shell import PAGES, address, current, open_run, run_paths

# Streamlit writes white on its main buttons, which a light teal on dark paper does not bear
STYLE = """<style>
.stMainBlockContainer{padding-top:.75rem!important} .stAppHeader{height:2.75rem;min-height:0;
  background:none;pointer-events:none} .stAppHeader *{pointer-events:auto}
[data-testid=stBaseButton-primary] *{color:light-dark(#ffffff,#14181b)}
.js-head{display:flex;flex-wrap:wrap;align-items:baseline;gap:.25rem 1.5rem;min-height:2.4rem;
  border-bottom:1px solid rgba(128,128,128,.3);padding-right:2.5rem}
.js-head nav{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;flex:1 1 auto}
.js-head a{color:inherit;text-decoration:none;padding:.35rem .1rem;border-bottom:3px solid transparent}
.js-head a:hover{border-bottom-color:rgba(128,128,128,.6)}
.js-head a[aria-current]{font-weight:600;border-bottom-color:rgb(20,150,130)}
.js-runs{position:relative;max-width:100%} .js-runs summary{cursor:pointer;padding:.35rem .1rem}
.js-runs small{font-size:.8rem;opacity:.8;overflow-wrap:anywhere}
.js-runs ul{position:absolute;right:0;z-index:9;list-style:none;margin:0;padding:.3rem;min-width:16rem;
  max-width:90vw;max-height:60vh;overflow:auto;background:Canvas;color:CanvasText;
  border:1px solid rgba(128,128,128,.5);border-radius:6px;box-shadow:0 6px 20px rgba(0,0,0,.2)}
.js-runs li a{display:block;border:0;padding:.35rem .6rem;overflow-wrap:anywhere}
.js-runs li a:hover{background:rgba(128,128,128,.15)}
a[data-js-link]:focus-visible,summary:focus-visible,[tabindex]:focus-visible{
  outline:2px solid rgb(20,150,130);outline-offset:2px;border-radius:3px}
@media(max-width:40rem){.js-runs{flex-basis:100%} .js-runs ul{right:auto;left:0}}
.js-section{font-size:1.3rem;font-weight:600;margin:1.75rem 0 .75rem;padding:0}
section+.js-scroll{margin-top:1.75rem}
</style>"""
_LONGEST_STATE = 40


def header(shown: str) -> None:
    """Draws it; `shown` is the page below, as in PAGES."""
    links = "".join(
        _link(name.capitalize(), address(name), "page" if name == shown else "") for name in PAGES
    )
    st.html(f'{STYLE}<div class="js-head"><nav aria-label="Main">{links}</nav>{_runs(shown)}</div>')


def _runs(shown: str) -> str:
    """The run and, where there are several, links to the same page of the others."""
    known, run = list(run_paths()), current()
    here = f"{_text(run)} <small>{_text(state(run))}</small>"
    if len(known) < 2:
        return f'<div class="js-runs">{here}</div>'
    # a site and a latent of one run are looked at in the other: that is what several are opened for
    query = {name: value for name, value in st.query_params.to_dict().items() if name != "run"}
    items = "".join(
        "<li>"
        + _link(name, address(shown, **{**query, "run": name}), "true" if name == run else "", state(name))
        + "</li>"
        for name in known
    )
    return f'<details class="js-runs"><summary>Run: {here}</summary><ul>{items}</ul></details>'


def state(run: str) -> str:
    """How a run stands, in a word or two."""
    try:
        stands = open_run(run).state()
    except UserError:
        return "cannot be read"
    return stands if len(stands) <= _LONGEST_STATE else stands[:_LONGEST_STATE] + "…"


def _link(text: str, where: str, here: str, small: str = "") -> str:
    mark = f' aria-current="{here}"' if here else ""
    small = f" <small>{_text(small)}</small>" if small else ""
    return f'<a href="{html.escape(where)}" target="_self" data-js-link{mark}>{_text(text)}{small}</a>'


def _text(text: str) -> str:
    return html.escape(markup.readable_text(text))
