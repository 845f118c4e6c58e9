"""`jumpscope plan`."""

from sae.numbers import format_count, format_size, format_time
from train.cli.console import note, say, stdout, table
from train.cli.parsing import parse
from train.config import TrainConfig
from train.plan import Plan, make_plan, missing_memory


def run(argv: list[str]) -> None:
    """Prints what a training run with these flags would take; trains nothing."""
    examples = ["plan --width 16k --tokens 10M --memory 8G", "plan --config runs/gemma/run.json --layers 9"]
    show(parse(TrainConfig, argv, verb="plan", examples=examples, from_dict=TrainConfig.from_dict))


def show(config: TrainConfig, *, eval_tokens: int = 0, loss_tokens: int = 0, index_tokens: int = 0) -> Plan:
    """Makes the plan and prints it. Raises UserError when the run cannot fit."""
    plan = make_plan(config, eval_tokens=eval_tokens, loss_tokens=loss_tokens, index_tokens=index_tokens)
    say(
        f"{config.model}: {len(plan.sites)} dictionaries of {config.width:,} latents, L0 {config.l0:g}, "
        f"{format_count(config.tokens)} tokens of {config.corpus}, "
        f"{plan.steps:,} steps on {plan.device} in {plan.dtype}"
    )
    rows = table("memory", ">", "disk", ">", "time, roughly", ">")
    columns = (
        [(name, format_size(n)) for name, n in plan.memory.items()],
        [(name, format_size(n)) for name, n in plan.disk.items()],
        [(name, format_time(s)) for name, s in plan.seconds.items()],
    )
    for i in range(max(map(len, columns))):
        rows.add_row(*(cell for column in columns for cell in (column[i] if i < len(column) else ("", ""))))
    rows.add_section()
    totals = (format_size(plan.memory_total), format_size(plan.disk_total), format_time(plan.seconds_total))
    rows.add_row(*(cell for total in totals for cell in ("total", total)), style="bold")
    stdout.print(rows)
    note(
        f"memory is limited by --memory {format_size(config.memory)}; "
        f"times follow from {plan.flops / 1e9:.0f} GFLOP/s, measured just now"
    )
    if warning := missing_memory(plan):
        note(f"warning: {warning}")
    return plan
