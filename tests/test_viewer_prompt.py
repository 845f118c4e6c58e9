"""The prompt page: a text through all layers, and what explains its next token."""

import json

import pytest
from conftest import TEXTS
from page_fakes import VIEWS, address, html_of, page_app, wait_for_model
from tiny_run import SITES, tiny_run

import viewer
from viewer import markup
from viewer.app import background, shell
from viewer.app.token_map import map_data

PROMPT = VIEWS / "prompt.py"
TEXT = "The capital of France"
HOSTILE = "<script>window.pwned=1</script>\n\u202e🙂 $x$ **b** [a](javascript:1)\ttwo  \x07"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    return tiny_run(tmp_path_factory.mktemp("runs") / "mine", tiny_folder)


@pytest.fixture
def show(monkeypatch):
    """A page of a run, once its model is loaded or known to be absent."""

    def shown(script, folder, *, wait=True, **query):
        app = page_app(monkeypatch, script, folder, **query)
        if wait:
            wait_for_model(folder)
        return app.run()

    return shown


def drawn(app):
    """The data of the map."""
    return json.loads(app.get("bidi_component")[0].proto.json)


def whole(app):
    assert not app.exception and not app.error, (app.exception, [e.value for e in app.error])
    return app


def test_without_a_text_there_are_examples(show, folder):
    app = whole(show(PROMPT, folder))
    assert "prompt?run=mine&amp;text=The+Eiffel" in html_of(app) and not app.get("bidi_component")


def test_the_map_is_the_trace(show, folder):
    app = whole(show(PROMPT, folder, text=TEXT))
    trace = shell.open_run("mine").trace(TEXT)
    data = drawn(app)
    assert data["tokens"] == [markup.readable(token) for token in trace.tokens] and len(data["cells"]) == 3
    best = trace.top(1)
    seen = 0
    for row in best.to_dict("records"):
        cell = data["cells"][SITES.index(row["site"])][row["position"]]
        assert cell[0] == row["latent"] and cell[3] == row["label"]
        if cell[4]:
            assert cell[1] == round(100 * min(1, row["share"]))
        seen += 1
    assert seen == len(best) == sum(cell is not None for line in data["cells"] for cell in line) > 0
    # the last token at all layers
    assert data["chosen"] == [-1, len(trace.tokens) - 1]
    rows = trace.strongest(trace.frame[trace.frame["position"] == len(trace.tokens) - 1])
    page = html_of(app)
    for row in rows.head(25).to_dict("records"):
        assert (
            f"feature?run=mine&amp;site={row['site']}&amp;latent={row['latent']}&quot;".replace("&quot;", '"')
            in page
        )
    assert address(app) == {"run": "mine", "text": TEXT}


def test_the_address_says_which_token_layer_and_features(show, folder):
    app = whole(show(PROMPT, folder, text=TEXT, token="1", site=SITES[2], dense="1"))
    assert drawn(app)["chosen"] == [2, 1] and app.selectbox(key="layer").value == SITES[2]
    assert app.toggle(key="dense").value is True
    trace = shell.open_run("mine").trace(TEXT)
    here = trace.frame[(trace.frame["position"] == 1) & (trace.frame["site"] == SITES[2])]
    assert f"of {len(here)}</h2>" in html_of(app)
    app.selectbox(key="layer").select(SITES[0]).run()
    app.toggle(key="dense").set_value(False).run()
    assert address(whole(app)) == {"run": "mine", "text": TEXT, "token": "1", "site": SITES[0]}
    assert drawn(app)["chosen"] == [0, 1]
    # another text has other tokens
    app.text_area(key="prompt").set_value("France is").run()
    assert address(whole(app)) == {"run": "mine", "text": "France is", "site": SITES[0]}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"token": "99999"}, "from 0 to"),
        ({"token": "-1"}, "from 0 to"),
        ({"token": "²"}, "from 0 to"),
        ({"site": "<b>"}, "no site"),
        ({"view": "nonsense"}, "no view"),
        ({"view": "explain", "target": "300"}, "id is from 0 to 299"),
    ],
)
def test_a_bad_address_is_told_and_something_near_is_shown(show, folder, query, said):
    app = whole(show(PROMPT, folder, text=TEXT, **query))
    assert [said in warning.value for warning in app.warning] == [True] and "js-live" in html_of(app)


def test_hostile_text_is_shown_as_text(show, folder):
    app = whole(show(PROMPT, folder, text=HOSTILE))
    page, data = html_of(app), drawn(app)
    assert "<script" not in page and all(c not in "".join(data["tokens"]) for c in "\n\t\u202e\x07")
    assert "".join(data["tokens"]).startswith("<script>")
    assert address(app)["text"] == HOSTILE
    app = whole(show(PROMPT, folder, text=HOSTILE, view="explain"))
    assert "<script" not in html_of(app)


def test_nul_and_a_text_of_nothing(show, folder):
    whole(show(PROMPT, folder, text="a\x00b"))
    app = whole(show(PROMPT, folder, text=" "))
    assert len(drawn(app)["tokens"]) == 1


def test_a_long_text_is_cut_and_kept_out_of_the_address(show, folder, monkeypatch):
    monkeypatch.setattr("viewer.app.live_widgets.MOST_TOKENS", 20)
    text = " ".join(TEXTS)
    app = whole(show(PROMPT, folder, text=text))
    n_tokens = len(shell.open_run("mine").model.encode(text))
    assert len(drawn(app)["tokens"]) == 20 and f"{n_tokens - 20} more" in app.info[0].value.replace("\\", "")
    # the tokens of a text do not depend on what follows in this tokenizer
    assert drawn(app)["cells"] == map_data(shell.open_run("mine").trace(text, limit=20), 0.1, (0, 0))["cells"]
    app.text_area(key="prompt").set_value("word " * 3000).run()
    assert "text" not in address(whole(app)) and "too long" in app.caption[0].value
    assert len(drawn(app)["tokens"]) == 20 and app.text_area(key="prompt").value.startswith("word word")
    app = show(PROMPT, folder, text=text, view="explain")
    assert "at most 64 tokens" in app.info[0].value or n_tokens <= 64


def test_the_next_token_is_explained_and_verified(show, folder):
    app = whole(show(PROMPT, folder, text=TEXT, view="explain"))
    run = shell.open_run("mine")
    likeliest = run.next_tokens(TEXT)
    assert app.selectbox(key="target").value == likeliest["id"][0]
    rows = run.attribute(TEXT, int(likeliest["id"][0])).frame
    assert f"{rows['attribution'][0]:+.3f}" in html_of(app) and "by ablation" not in html_of(app)
    app.selectbox(key="target").select(int(likeliest["id"][3])).run()
    assert address(whole(app))["target"] == str(likeliest["id"][3])
    next(b for b in app.button if "Verify" in b.label).click().run()
    attribution = run.attribute(TEXT, int(likeliest["id"][3]))
    page = html_of(whole(app))
    assert address(app)["verify"] == "1" and "by ablation" in page
    for value in attribution.verify(10).frame["measured"]:
        assert f"{value:+.3f}" in page
    app.text_input(key="other").set_value("zz!").run()
    assert "tokens" in app.warning[0].value
    app.text_input(key="other").set_value("a").run()
    assert address(whole(app))["target"] == str(run.model.encode("a")[0]) and "verify" not in address(app)


def test_while_the_model_loads_the_page_says_so(show, folder, monkeypatch):
    app = whole(show(PROMPT, folder, text=TEXT))
    live = background.resident(shell.open_run("mine"))
    monkeypatch.setattr(live, "state", "loading")
    monkeypatch.setattr(live, "doing", "<b>the model</b>")
    app = whole(show(PROMPT, folder, wait=False, text=TEXT))
    assert "Loading &lt;b&gt;the model&lt;/b&gt;" in html_of(app) and not app.get("bidi_component")
    assert app.text_area(key="prompt").value == TEXT


def test_without_a_model_the_page_says_why(show, tmp_path):
    folder = tiny_run(tmp_path / "run", tmp_path / "gone", index=False)
    app = show(PROMPT, folder, text=TEXT)
    assert not app.exception and "gone" in app.info[0].value.replace("\\", "")
    assert "everything else works" in app.info[0].value
    button = next(b for b in app.button if b.label == "Try again")
    button.click().run()
    assert not app.exception


def test_a_run_without_an_index_is_traced_too(show, tmp_path, tiny_folder):
    folder = tiny_run(tmp_path / "bare", tiny_folder, index=False)
    app = whole(show(PROMPT, folder, text=TEXT))
    cells = [cell for line in drawn(app)["cells"] for cell in line if cell]
    assert cells and all(cell[3] == "" and cell[4] is False for cell in cells)


def test_a_label_of_yours_is_seen_at_once(show, folder):
    app = whole(show(PROMPT, folder, text=TEXT, site=SITES[1]))
    cell = drawn(app)["cells"][1][-1]
    viewer.open(folder).layer(1)[cell[0]].label = "<b>mine</b>"
    app.run()
    assert drawn(whole(app))["cells"][1][-1][3] == "<b>mine</b>"
    assert "&lt;b&gt;mine&lt;/b&gt;" in html_of(app) and "<b>mine" not in html_of(app)
    viewer.open(folder).layer(1)[cell[0]].label = ""
