"""The viewer's pages in Streamlit's own tester: one as its address asks for it, and what it holds."""

import sys
import time
from pathlib import Path

from streamlit.testing.v1 import AppTest

import viewer
from viewer.app import background, shell

APP = Path(viewer.__file__).resolve().parent / "app" / "main.py"
VIEWS = APP.parent / "views"


def page_app(monkeypatch, script, *folders, **query):
    """A page, or a function that draws, of the viewer of these folders; `run()` draws it."""
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, folders)])
    make = AppTest.from_function if callable(script) else AppTest.from_file
    app = make(script if callable(script) else str(script), default_timeout=180)
    for name, value in query.items():
        app.query_params[name] = value
    return app


def wait_for_model(folder):
    """Until the run's model is loaded, or known to be absent."""
    live = background.resident(shell.open_run(folder.name))
    while live.state == "loading":
        time.sleep(0.02)


def html_of(app):
    return "".join(str(element.proto.body) for element in app.get("html"))


def address(app):
    """The query as the browser would show it; the tester gives lists for what it was told itself."""
    return {k: v[0] if isinstance(v, list) else v for k, v in app.query_params.items()}


def press(app, label):
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception
