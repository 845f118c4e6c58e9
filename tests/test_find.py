"""Search over all sites against the plainest count, and what it refuses."""

import numpy as np
import pandas as pd
import pytest
from viewer_fakes import SITES, fake_run

import viewer
from sae import UserError
from viewer.index.storage import read_tokens, write_tokens
from viewer.tables import stem


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return viewer.open(fake_run(tmp_path_factory.mktemp("runs") / "mine").path)


def test_a_token_finds_the_latents_that_fire_on_it_with_exact_numbers(run):
    texts = run.index.texts
    tokens = texts.tokens.ravel()[texts.place]
    every = {(s, f.latent): f.activations() for s in SITES for f in run.site(s)}
    for token in np.unique(tokens)[-12:].tolist():
        text = run.index.strings.of([token])[0]
        found = run.find(token=text, limit=1000)
        assert found["score"].is_monotonic_decreasing and found.equals(run.find(token=token, limit=1000))
        assert run.find(token=token, limit=2).equals(found.head(2))
        seen = set()
        for row in found.itertuples():
            fired = every[row.site, row.latent]
            on = fired["token"] == text
            share = fired.loc[on, "activation"].sum() / fired["activation"].sum()
            assert (row.count, row.share) == (on.sum(), pytest.approx(share, rel=1e-5))
            assert row.mean == pytest.approx(fired.loc[on, "activation"].mean(), rel=1e-5)
            coverage = on.sum() / (tokens == token).sum()
            assert row.coverage == pytest.approx(coverage)
            assert row.score == pytest.approx(2 * share * coverage / (share + coverage), rel=1e-5)
            seen.add((row.site, row.latent))
        # nothing that puts more than 1/11 of its activation on it is left out
        for latent, fired in every.items():
            mass = fired.loc[fired["token"] == text, "activation"].sum()
            assert mass <= fired["activation"].sum() / 11 or latent in seen


def test_tokens_that_read_the_same_count_as_one(tmp_path):
    path = fake_run(tmp_path / "run").path
    write_tokens(path / "index", {i: f" word{i // 2}" for i in read_tokens(path / "index")})
    run, of_two = viewer.open(path), 0
    read = np.unique(run.index.texts.tokens[run.index.texts.keep]).tolist()
    for token in (t for t in read if t % 2 == 0 and t + 1 in read):
        parts = pd.concat([run.find(token=t, limit=1000) for t in (token, token + 1)])
        for row in run.find(token=f" word{token // 2}", limit=1000).itertuples():
            mine = parts[(parts["site"] == row.site) & (parts["latent"] == row.latent)]
            of_two += len(mine) == 2
            assert row.count == mine["count"].sum() and row.lift == mine["lift"].max()
            assert row.share == pytest.approx(mine["share"].sum())
            assert row.mean == pytest.approx((mine["mean"] * mine["count"]).sum() / row.count)
    assert of_two > 0


def test_a_token_that_is_not_there_is_refused_with_what_is(run):
    with pytest.raises(UserError, match="' word77'"):
        run.find(token="Word77")
    with pytest.raises(UserError, match="text="):
        run.find(token="nowhere")
    named = set(run.layer(0).tables.raised["token"].tolist()) - set(run.index.texts.tokens.ravel().tolist())
    with pytest.raises(UserError, match="text="):
        run.find(token=run.index.strings.of([min(named)])[0])
    with pytest.raises(UserError, match="another number"):
        run.find(token=10**6)


def test_words_find_labels_first_then_what_drives_a_latent(run, tmp_path):
    mine = viewer.open(fake_run(tmp_path / "own").path)
    feature = mine.layer(1)[7]
    feature.label = "Capital cities of Europe"
    found = mine.find(text="capital city")
    assert (found.loc[0, "site"], found.loc[0, "latent"]) == (SITES[1], 7) and found.loc[0, "score"] == 1
    assert found.loc[0, "why"] == "capital: label; city: label" and found.loc[0, "label"] == feature.label
    live = mine.layer(0)[5]
    word = live.drivers()["token"][0].strip()
    found = mine.find(text=word, limit=100)
    row = found[(found["site"] == SITES[0]) & (found["latent"] == live.latent)].iloc[0]
    assert "of its activation" in row["why"] and 0 < row["score"] <= 1
    assert found["score"].is_monotonic_decreasing and len(mine.find(text="unheard")) == 0
    with pytest.raises(UserError, match="word"):
        mine.find(text=" ?! ")


def test_the_plural_and_the_case_of_a_word_do_not_matter():
    assert stem(" Cities") == stem("city") == "city" and stem("capitals") == stem(" CAPITAL")
    assert stem("glass") == "glass" and stem("is") == "is"


def test_a_feature_finds_what_points_its_way_in_every_layer(run):
    feature = run.layer(0)[5]
    found = run.find(like=feature, limit=1000)
    assert len(found) == sum(len(run.site(s)) for s in SITES) - 1
    assert not ((found["site"] == SITES[0]) & (found["latent"] == 5)).any()
    for row in found.itertuples():
        a, b = feature.direction().numpy(), run.site(row.site)[row.latent].direction().numpy()
        assert row.score == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-5)
    assert len(run.find(like=feature, limit=3)) == 3


def test_a_feature_of_another_run_of_the_same_name_finds_itself_here(run, tmp_path):
    other = viewer.open(fake_run(tmp_path / "else" / "mine").path)
    assert other.name == run.name
    found = run.find(like=other.layer(1)[3], limit=1)
    assert (found.loc[0, "site"], found.loc[0, "latent"]) == (SITES[1], 3)
    assert found.loc[0, "score"] == pytest.approx(1, abs=1e-5)


def test_find_wants_one_question_and_an_index(run, tmp_path):
    for asked in ({}, {"token": " a", "text": "a"}):
        with pytest.raises(UserError, match="one of token, text and like"):
            run.find(**asked)
    bare = viewer.open(fake_run(tmp_path / "bare", index=False).path)
    for call in (lambda: bare.find(token=" a"), bare.latents, bare.duplicates, lambda: bare.sql("select 1")):
        with pytest.raises(UserError, match="jumpscope index"):
            call()


def test_duplicates_are_pairs_with_the_overlap_of_their_firings(run):
    pairs = run.duplicates(0.5)
    assert len(pairs) and (pairs["cosine"] >= 0.5).all() and (pairs["latent"] < pairs["other"]).all()
    assert not pairs.duplicated(["site", "latent", "other"]).any()
    for row in pairs.itertuples():
        a, b = (set(run.site(row.site)[n].activations()["row"]) for n in (row.latent, row.other))
        assert row.jaccard == (len(a & b) / len(a | b) if a | b else 0)


def test_all_sites_stand_in_one_table_by_their_state(run):
    latents = run.latents()
    assert latents["site"].value_counts().to_dict() == dict.fromkeys(SITES, 24)
    assert (run.dead()["firings"] == 0).all() and 2 in set(run.dead()["latent"])
    assert (run.dense()["density"] > 0.1).all() and 1 in set(run.dense()["latent"])
    assert set(run.latents()["label_source"]) <= {"", "automatic", "yours"}


def test_sql_answers_over_all_sites_and_touches_nothing_else(run, tmp_path):
    counts = run.sql("select site, layer, sum(firings)::int as n from latents group by all order by site")
    assert counts["n"].tolist() == [len(run.site(s).tables.firings.row) for s in SITES]
    joined = run.sql(
        "select text from drivers join tokens on token = id where latent = 5 and layer = 0 and rank = 0"
    )
    drivers = [run.layer(0)[5].drivers(order)["token"][0] for order in ("activation", "lift")]
    assert sorted(joined["text"]) == sorted(drivers)
    assert len(run.sql("select * from labels")) == 0
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    for statement in (
        f"select * from read_csv('{secret}')",
        f"copy (select 1) to '{tmp_path / 'out.csv'}'",
        "select 1; select 2",
        "drop view latents",
        "set enable_external_access = true",
        "select nonsense from latents",
        "this is no sql",
        "",
    ):
        with pytest.raises(UserError):
            run.sql(statement)
    assert not (tmp_path / "out.csv").exists()


def test_a_quote_in_the_path_is_no_sql(tmp_path):
    run = viewer.open(fake_run(tmp_path / "it's; mine").path)
    run.layer(0)[3].label = "it's"
    assert run.sql("select count(*) as n from latents")["n"][0] == 48
    assert run.sql("select label from labels")["label"].tolist() == ["it's"]


def test_a_run_whose_latents_are_all_dead_answers(tmp_path):
    dead = viewer.open(fake_run(tmp_path / "dead", threshold=1e6).path)
    assert len(dead.dead()) == 48 and len(dead.dense()) == 0
    word = dead.index.strings.of(dead.index.texts.tokens.ravel()[dead.index.texts.place[:1]])[0]
    assert len(dead.find(token=word)) == 0 and isinstance(dead.find(text="word"), pd.DataFrame)
    assert len(dead.find(like=dead.layer(0)[0])) == 20
    assert len(dead.compare(dead, layer=0).matched) == 0 and "matched 0" in repr(dead.compare(dead, layer=0))
