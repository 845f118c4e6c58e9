"""Tables that more than one verb prints."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.table import Table

from activations.sites import kind_of, layer_of, site_label
from train.cli.console import figure, table


def eval_summary(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """The held-out metrics of a run, a row a site, in 80 columns. KL and the rest are in eval.json."""
    one_kind = len({kind_of(site) for site in metrics}) == 1
    made = table(
        ">layer" if one_kind else "site",
        ">L0",
        ">of",
        ">FVU",
        ">delta CE",
        ">CE rec.\nmean",
        ">CE rec.\nzero",
        ">dead in\ntrain",
        ">silent\nhere",
    )
    for site, row in metrics.items():
        delta, error = row["delta_ce"], row["delta_ce_se"]
        made.add_row(
            str(layer_of(site)) if one_kind else site_label(site),
            figure(row["l0"], 1),
            "-" if row["l0_target"] is None else f"{row['l0_target']:g}",
            figure(row["fvu"], 4),
            figure(delta) + ("" if error is None else f"±{figure(error)}"),
            figure(row["ce_recovered_mean"]),
            figure(row["ce_recovered_zero"]),
            "-" if row.get("dead_training") is None else f"{100 * row['dead_training']:.1f} %",
            f"{100 * row['dead']:.1f} %",
        )
    return made


def eval_caption(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """What the numbers of `eval_summary` were measured on, in a line."""
    row = next(iter(metrics.values()))
    return (
        f"L0, FVU and silent latents over {row['n_tokens']:,} held-out tokens; dead in training means "
        "silent for its last 100,000 tokens; losses in nats per token over "
        f"{row['n_loss_tokens']:,} of them (clean {figure(row['ce_clean'])}), ± one standard error; "
        "CE recovered is 1 - delta CE / what mean or zero ablation adds, "
        f"found on {row['n_baseline_tokens']:,}."
    )


def training_summary(metrics: pd.DataFrame) -> Table:
    """The last line of each site in metrics.jsonl."""
    made = table("site", ">step", ">L0", ">FVU", ">dead")
    if metrics.empty:
        return made
    last = metrics.groupby("site", sort=False).last().to_dict("index")
    for site, row in last.items():
        made.add_row(
            site_label(str(site)),
            str(row["step"]),
            figure(row["l0"], 1),
            figure(row["fvu"], 4),
            f"{100 * row['dead']:.1f} %",
        )
    return made
