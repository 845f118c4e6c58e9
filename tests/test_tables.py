"""The tables that the command line prints, at the width of a narrow terminal."""

import io

import pytest
from rich.console import Console

from train.cli.tables import eval_caption, eval_summary


def rows(kinds: tuple[str, ...]) -> dict[str, dict]:
    row = {
        "l0": 41.94,
        "l0_target": 40.0,
        "fvu": 0.27114,
        "delta_ce": 1.129,
        "delta_ce_se": 0.056,
        "ce_recovered_mean": 0.81,
        "ce_recovered_zero": 0.886,
        "kl": 1.116,
        "dead": 0.0371,
        "dead_training": 0.0012,
        "n_tokens": 16_384,
        "n_loss_tokens": 2_244,
        "n_baseline_tokens": 748,
        "ce_clean": 2.63,
    }
    return {f"blocks.{layer}.hook_{kind}": row for layer in (0, 17) for kind in kinds}


@pytest.mark.parametrize("kinds", [("resid_post",), ("resid_post", "mlp_out")])
def test_eval_summary_shows_every_figure_in_80_columns(kinds):
    page = io.StringIO()
    Console(file=page, width=80).print(eval_summary(rows(kinds)))
    lines = page.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    last = lines[-1].split()
    wanted = ["17", "41.9", "40", "0.2711", "1.129±0.056", "0.810", "0.886", "0.1", "%", "3.7", "%"]
    assert [word for word in last if word not in kinds] == wanted
    assert all(f"17 {kind}" in page.getvalue() for kind in kinds[1:])


def test_eval_caption_says_on_what():
    caption = eval_caption(rows(("resid_post",)))
    for figure in ("16,384", "2,244", "748", "2.630"):
        assert figure in caption


def test_what_could_not_be_had_is_a_dash():
    table = rows(("resid_post",))
    for row in table.values():
        row.update(delta_ce_se=None, ce_recovered_zero=None, l0_target=None, dead_training=None)
    page = io.StringIO()
    Console(file=page, width=80).print(eval_summary(table))
    assert page.getvalue().splitlines()[-1].split().count("-") == 3
