"""Contrast of the viewer's texts and marks, computed from the colours in its code (WCAG 2.2, level AA)."""

import inspect
import re
from pathlib import Path

import pandas as pd
import pytest

import viewer
from viewer import feature_html, figures, markup
from viewer.app import launch

TEXT, GRAPHIC = 4.5, 3.0
THEMES = {"light": launch._LIGHT, "dark": launch._DARK}
SOURCES = sorted(Path(viewer.__file__).parent.rglob("*.py"))
STYLES = {
    path.name: style
    for path in SOURCES
    for style in re.findall(r"<style>.*?</style>", path.read_text(encoding="utf-8"), re.DOTALL)
}
# no text, but the band of a range
NO_TEXT = {".js-span"}


def colour(text):
    """A CSS colour as red, green, blue and alpha, from 0 to 1."""
    if text.startswith("#"):
        return *(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0
    values = [float(v) for v in re.findall(r"[\d.]+", text)]
    return *(v / 255 for v in values[:3]), values[3] if len(values) > 3 else 1.0


def over(top, below, opacity=1.0):
    """A colour laid over an opaque one."""
    alpha = top[3] * opacity
    return *(a * alpha + b * (1 - alpha) for a, b in zip(top[:3], below[:3], strict=True)), 1.0


def luminance(colour):
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour[:3]]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def papers(theme):
    return [colour(theme[name]) for name in ("backgroundColor", "secondaryBackgroundColor")]


def test_the_ratio_is_the_one_of_the_standard():
    black, white = colour("#000000"), colour("#ffffff")
    assert contrast(black, white) == pytest.approx(21)
    assert contrast(colour("#777777"), white) == pytest.approx(4.478, abs=1e-3)
    assert over(black, white, 0.5)[:3] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_text_and_links_of_the_theme(theme):
    for paper in papers(theme):
        assert contrast(colour(theme["textColor"]), paper) >= TEXT
        assert contrast(colour(theme["linkColor"]), paper) >= TEXT
        # Streamlit writes values of sliders and chosen options in it
        assert contrast(colour(theme["primaryColor"]), paper) >= TEXT
    light, dark = re.search(r"light-dark\((#\w+),(#\w+)\)", STYLES["header.py"]).groups()
    on_buttons = light if theme is launch._LIGHT else dark
    assert contrast(colour(on_buttons), colour(theme["primaryColor"])) >= TEXT


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
@pytest.mark.parametrize("source", STYLES)
def test_quiet_text_can_be_read(theme, source):
    ink, paper = colour(theme["textColor"]), colour(theme["backgroundColor"])
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", STYLES[source])
    found = {
        selector.strip(): contrast(over(ink, paper, float(value[1])), paper)
        for selector, body in rules
        if (value := re.search(r"(?<![\w-])opacity:([\d.]+)", body)) and selector.strip() not in NO_TEXT
    }
    assert {selector: ratio for selector, ratio in found.items() if ratio < TEXT} == {}


def coloured():
    """HTML with the coloured grounds that text stands on, at their deepest."""
    tokens, values = [" a", " b"], [0.5, 1.0]
    logits = pd.DataFrame(
        {"side": ["top", "bottom"], "token": ["a", "b"], "id": [0, 1], "logit": [1.0, -1.0]}
    )
    through_layers = "background:rgba(20,150,130,0.50)"
    assert "rgba(20,150,130,{depth:.2f})" in inspect.getsource(feature_html) and "depth = 0.5 * " in (
        inspect.getsource(feature_html)
    )
    return markup.example_html(tokens, values, 1, 1.0) + markup.logits_html(logits) + through_layers


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_text_on_coloured_ground(theme):
    ink, paper = colour(theme["textColor"]), colour(theme["backgroundColor"])
    sources = coloured() + "".join(p.read_text(encoding="utf-8") for p in SOURCES if p.name == "markup.py")
    grounds = set(re.findall(r"background:(?:linear-gradient\(90deg,)?(rgba\([\d,.]+\))", sources))
    assert len(grounds) >= 5
    ratios = {ground: contrast(ink, over(colour(ground), paper)) for ground in grounds}
    assert {ground: ratio for ground, ratio in ratios.items() if ratio < TEXT} == {}


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_lines_and_marks_of_figures(theme):
    paper = colour(theme["backgroundColor"])
    series = {text: contrast(colour(text), paper) for text in figures._SERIES}
    assert {text: ratio for text, ratio in series.items() if ratio < GRAPHIC} == {}
    for source in STYLES.values():
        # what tells that something is a link, shown, or in focus
        for line in re.findall(r"(?:outline:\dpx solid |text-decoration-color:)(rgb\([\d,]+\))", source):
            assert contrast(colour(line), paper) >= GRAPHIC
        for line in re.findall(r"border-bottom:2px solid (rgba\(190[\d,.]+\))", source):
            assert contrast(over(colour(line), paper), paper) >= GRAPHIC
