"""Dictionaries of the hub for the compare page: asked for by a person at this machine, kept by the server.

What a visitor types is never taken for a path, nothing is fetched for an address alone, which a link on any
page of the web could hold, and nothing at all when the viewer can be reached from other machines.
"""

import ipaddress
import os

import streamlit as st

import sae
from sae.dialects.ids import parse_id
from sae.errors import UserError


def allowed() -> bool:
    """Whether who is asking is at this machine."""
    forwarded = any(name.lower() in ("x-forwarded-for", "forwarded") for name in st.context.headers)
    return is_local(st.get_option("server.address") or "0.0.0.0") and not forwarded


def is_local(address: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def known(name: str) -> sae.Dictionary | None:
    """The dictionary of an id that was fetched since the server started."""
    return _kept().get(name)


def fetch(text: str) -> str:
    """Fetches a dictionary, or opens the copy in the hub's cache; returns the id that it is known by.

    Raises UserError when the viewer is not this machine's alone, for a path, and as `sae.load` does.
    """
    if not allowed():
        raise UserError(
            "dictionaries are fetched for people at the viewer's own machine",
            "a viewer that other machines can reach",
            "name the dictionary's folder on the command line, with an index beside it",
        )
    name = str(parse_id(text.strip()))
    # sae.load takes a path before an id
    if os.path.exists(name):
        do = "name it on the command line: `jumpscope index` makes what `jumpscope view` opens"
        raise UserError("an id of the hub must be given", "a path", do)
    if name not in _kept():
        _kept()[name] = sae.load(name)
    return name


@st.cache_resource(show_spinner=False)
def _kept() -> dict[str, sae.Dictionary]:
    return {}
