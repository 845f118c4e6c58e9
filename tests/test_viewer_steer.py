"""The steer page and the boxes of a feature's page: the model with features steered, beside itself."""

import html

import pytest
from conftest import TEXTS
from page_fakes import VIEWS, address, html_of, page_app, press, wait_for_model
from tiny_run import D_SAE, SILENT, SITES, tiny_run

import viewer
from viewer import markup
from viewer.app import live_widgets, shell

STEER = VIEWS / "steer.py"
TEXT = "The capital of"
PROSE = TEXTS[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    return tiny_run(tmp_path_factory.mktemp("runs") / "mine", tiny_folder)


@pytest.fixture
def show(monkeypatch):
    def shown(folder, script=STEER, **query):
        app = page_app(monkeypatch, script, folder, **query)
        wait_for_model(folder)
        return app.run()

    return shown


@pytest.fixture(scope="module")
def latents(folder):
    """A latent of each site that fires."""
    run = viewer.open(folder)
    return [int(run.site(site).live()[0]) for site in SITES]


def whole(app):
    assert not app.exception and not app.error, (app.exception, [e.value for e in app.error])
    return app


def test_nothing_is_steered_at_first(show, folder):
    app = whole(show(folder))
    assert "Choose a feature" in html_of(app) and "next token" not in html_of(app)
    assert next(b for b in app.button if b.label == "Generate").disabled


def test_next_tokens_with_and_without(show, folder, latents):
    one = f"{SITES[1]}:{latents[1]}"
    app = whole(show(folder, f=f"{one}:2", text=TEXT))
    run = shell.open_run("mine")
    frame = run.steer({(SITES[1], latents[1]): 2.0}).next_tokens(TEXT)
    page = html_of(app)
    for row in frame.to_dict("records"):
        assert markup.percent(row["probability"]) in page and markup.percent(row["without"]) in page
    assert f"feature?run=mine&amp;site={SITES[1]}&amp;latent={latents[1]}" in page
    app.slider(key=f"strength {one}").set_value(-1.5).run()
    assert address(whole(app)) == {"run": "mine", "f": f"{one}:-1.5", "text": TEXT}
    app.toggle(key=f"off {one}").set_value(True).run()
    assert address(whole(app))["f"] == f"{one}:off" and app.slider(key=f"strength {one}").disabled
    frame = run.ablate((SITES[1], latents[1])).next_tokens(TEXT)
    assert all(markup.percent(value) in html_of(app) for value in frame["probability"])


def test_several_features_are_added_and_removed(show, folder, latents):
    app = whole(show(folder, f=f"{SITES[0]}:{latents[0]}:1", text=TEXT))
    app.selectbox(key="add_site").select(SITES[2])
    app.number_input(key="add_latent").set_value(latents[2])
    press(app, "Add")
    both = f"{SITES[0]}:{latents[0]}:1,{SITES[2]}:{latents[2]}:1"
    assert address(whole(app))["f"] == both and len(app.slider) == 2
    app.button(key=f"remove {SITES[0]}:{latents[0]}").click().run()
    assert address(whole(app))["f"] == f"{SITES[2]}:{latents[2]}:1" and len(app.slider) == 1


def test_a_text_is_generated_from_the_address_alone(show, folder, latents):
    f = f"{SITES[0]}:{latents[0]}:1,{SITES[1]}:{latents[1]}:off"
    app = whole(show(folder, f=f, text=TEXT, n="5", t="0.7", seed="3"))
    assert '<section class="js-side">' not in html_of(app)
    press(app, "Generate")
    assert address(whole(app)) == {
        "run": "mine", "f": f, "text": TEXT, "n": "5", "t": "0.7", "seed": "3", "go": "1"
    }  # fmt: skip
    run = shell.open_run("mine")
    changed = run.intervene({(SITES[0], latents[0]): 1.0}, [(SITES[1], latents[1])])
    made = changed.generate(TEXT, max_new_tokens=5, temperature=0.7, seed=3)
    again = whole(show(folder, **address(app)))
    for page in (html_of(app), html_of(again)):
        assert page.count('<section class="js-side">') == 2
        for text in (made.text, made.without):
            assert f'<span class="js-new">{escaped(text)}</span>' in page
    # what is changed is not what was generated
    app.number_input(key="new").set_value(6).run()
    assert "go" not in address(whole(app)) and '<section class="js-side">' not in html_of(app)


def escaped(text):
    return html.escape(markup.readable_text(text))


def test_steering_and_ablating_at_once_is_both(folder, latents, show):
    show(folder)
    run = shell.open_run("mine")
    both = run.intervene({(SITES[1], latents[1]): 2.0}, [(SITES[1], (latents[1] + 1) % D_SAE)])
    assert "steered" in both.name and "ablated" in both.name
    tokens = run._live.tokens(TEXT)
    made = run.dictionary(SITES[1])
    acts = run.model.activations(tokens, [SITES[1]])[SITES[1]]
    with both.at_work():
        there = run.model.activations(tokens, [SITES[1]])[SITES[1]]
    other = (latents[1] + 1) % D_SAE
    highest = run.site(SITES[1])[latents[1]].max
    expected = (
        acts + 2 * highest * made.W_dec[latents[1]] - made.encode(acts)[..., [other]] * made.W_dec[other]
    )
    assert (there[:, 1:] - expected[:, 1:]).abs().max() < 1e-4 * expected.abs().max()
    assert (there[:, 0] == acts[:, 0]).all()


def test_text_is_told_as_it_is_written_and_what_is_told_may_end_it(folder, latents, show):
    show(folder)
    run = shell.open_run("mine")
    steered = run.steer({(SITES[1], latents[1]): 1.0})
    told = []
    made = steered.generate(PROSE, max_new_tokens=4, progress=lambda *what: told.append(what))
    assert [side for side, _, _ in told] == ["with"] * 4 + ["without"] * 4
    assert told[3][1] == made.text and told[-1][1] == made.without and told[-1][2] == 4
    steered.generate(PROSE, max_new_tokens=4, progress=lambda *what: told.append(what))
    # the model alone goes on as it did
    assert [side for side, _, _ in told[8:]] == ["with"] * 4

    def stop(side, text, count):
        if count == 2:
            raise KeyboardInterrupt

    clean = run.next_tokens(PROSE)
    with pytest.raises(KeyboardInterrupt):
        steered.generate(PROSE, max_new_tokens=4, progress=stop)
    assert run.next_tokens(PROSE).equals(clean)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"f": "nonsense"}, "no feature"),
        ({"f": f"{SITES[0]}:99999:1"}, "no feature"),
        ({"f": f"{SITES[0]}:1:nan"}, "no feature"),
        ({"f": "<b>:1:1"}, "no feature"),
        ({"n": "1000"}, "from 1 to 200"),
        ({"t": "hot"}, "from 0 to 2"),
        ({"seed": "-1"}, "seed is from 0"),
        ({"f": ",".join(f"{SITES[0]}:{n}:off" for n in range(14))}, "At most 12"),
    ],
)
def test_a_bad_address_is_told(show, folder, query, said):
    app = whole(show(folder, text=TEXT, **query))
    assert [said in warning.value.replace("\\", "") for warning in app.warning] == [True]


def test_a_feature_that_never_fired_says_what_to_do(show, folder):
    app = show(folder, f=f"{SITES[0]}:{SILENT}:1", text=TEXT)
    assert not app.exception and "highest activation" in app.warning[0].value


def boxes():
    import streamlit as st

    from viewer.app import live_widgets, shell

    def show(run):
        feature = run.layer(1)[int(st.query_params["latent"])]
        live_widgets.try_text(run, feature)
        live_widgets.steer_box(run, feature)

    shell.render(show)


def test_the_boxes_of_a_feature(show, folder, latents):
    app = whole(show(folder, boxes, latent=str(latents[1])))
    assert "ires on" not in html_of(app) and '<section class="js-side">' not in html_of(app)
    app.text_area(key="try_text").set_value(TEXT).run()
    run = shell.open_run("mine")
    frame = run.trace(TEXT, sites=[SITES[1]]).frame
    mine = frame[frame["latent"] == latents[1]]
    page = html_of(whole(app))
    assert f"ires on {len(mine)} of" in page or (not len(mine) and "does not fire" in page)
    assert "prompt?run=mine&amp;text=The+capital+of" in page
    # another feature of the site: no need to ask again
    busy = int(frame["latent"].mode()[0])
    app.query_params["latent"] = str(busy)
    app.run()
    values = frame.loc[frame["latent"] == busy, "activation"]
    page = html_of(whole(app))
    assert f"Fires on {len(values)} of" in page and f">{markup.number(float(values.max()))}</span>" in page
    app.slider(key="steer_strength").set_value(0.5)
    app.text_input(key="steer_text").set_value(TEXT)
    press(app, "Generate")
    made = run.steer({(SITES[1], busy): 0.5}).generate(TEXT, max_new_tokens=live_widgets._BOX_TOKENS)
    page = html_of(whole(app))
    assert f'<span class="js-new">{escaped(made.text)}</span>' in page
    assert f"steer?run=mine&amp;f={SITES[1]}%3A{busy}%3A0.5&amp;text=The+capital+of" in page
