"""Starts the viewer's server."""

import errno
import importlib
import ipaddress
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sae.errors import UserError
from viewer.places import find_place

APP = Path(__file__).resolve().with_name("main.py")
_LIGHT = {
    "primaryColor": "#0b6e63",
    "backgroundColor": "#fbfaf7",
    "secondaryBackgroundColor": "#f1efe9",
    "textColor": "#1d2327",
    "linkColor": "#0b6e63",
    "borderColor": "#dcd8ce",
}
_DARK = {
    "primaryColor": "#3fbfae",
    "backgroundColor": "#14181b",
    "secondaryBackgroundColor": "#1d2327",
    "textColor": "#e9e6df",
    "linkColor": "#5fd0c0",
    "borderColor": "#343b41",
}
_THEME = {
    "baseRadius": "small",
    "showWidgetBorder": True,
    "paddingTop": "1.5rem",
    "headingFontWeights": [600, 600, 600],
    "headingFontSizes": ["2rem", "1.6rem", "1.2rem"],
}


def reach(address: str) -> Literal["this machine", "any network", "one network"]:
    """From where a server that listens at `address` can be reached."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "this machine" if address == "localhost" else "one network"
    return "this machine" if ip.is_loopback else "any network" if ip.is_unspecified else "one network"


def launch(
    paths: Sequence[Path | str], port: int = 8501, headless: bool = False, address: str = "127.0.0.1"
) -> None:
    """Serves the viewer of runs until it is stopped (Ctrl-C or SIGTERM). Opens a browser unless `headless`.

    Only this machine can reach it unless `address` says otherwise. It runs in this process, because `python
    -m streamlit` would let a train.py in the current folder stand in front of our package. Raises UserError
    when one of `paths` is neither a run folder nor an index, or the port is taken.
    """
    found = [find_place(path).home.resolve() for path in paths]
    _check_port(address, port)
    imported = threading.Event()
    threading.Thread(target=_warm, args=(found, imported), daemon=True).start()
    # Streamlit takes most of a second to import, and only a viewer needs it
    from streamlit.web import bootstrap

    imported.set()
    flags = options(port=port, headless=headless, address=address)
    bootstrap.load_config_options(flags)
    bootstrap.run(str(APP), False, [str(path) for path in found], flags)


def _warm(paths: Sequence[Path], imported: threading.Event) -> None:
    # beside the server and the browser's own start, for it takes as long as both
    importlib.import_module("torch")
    imported.wait()
    from viewer.app import shell

    shell.warm(paths)


def options(*, port: int, headless: bool, address: str) -> dict[str, Any]:
    """Streamlit's options, keyed as its command line keys them: `server_port` for server.port."""
    values: dict[str, Any] = {
        "server.port": port,
        "server.address": address,
        "server.headless": headless,
        "server.fileWatcherType": "none",
        "server.showEmailPrompt": False,
        "runner.magicEnabled": False,
        "logger.level": "warning",
        "logger.hideWelcomeMessage": True,
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "viewer",
        "client.showErrorDetails": "none",
        **{f"theme.{name}": value for name, value in _THEME.items()},
        **{f"theme.light.{name}": value for name, value in _LIGHT.items()},
        **{f"theme.dark.{name}": value for name, value in _DARK.items()},
    }
    return {name.replace(".", "_"): value for name, value in values.items()}


def _check_port(address: str, port: int) -> None:
    if not 0 < port < 65536:
        raise UserError("the port must be from 1 to 65535", str(port), "choose another --port")
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    must, do = "the viewer must be able to listen where it is told to", "choose another --port or --address"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                must = "the viewer's port must be free"
                free = _free_port(family, address)
                do = f"open what runs there, or choose another, for instance --port {free}"
            raise UserError(must, f"{address}:{port}: {error.strerror}", do) from error


def _free_port(family: socket.AddressFamily, address: str) -> int:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
