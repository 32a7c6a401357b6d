"""The demo's last page: verdicts, figures with their units, answers, and where every file is."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

MEANING = {
    "exact_trained": ("held-out rows answered exactly, trained adapter", "share"),
    "exact_shipped": ("the same rows, exported adapter on the device's engine", "share"),
    "exact_base": ("the same rows, base without an adapter", "share"),
    "field_f1_trained": ("fields right (micro-F1), trained adapter", "share"),
    "field_f1_shipped": ("fields right (micro-F1), exported adapter", "share"),
    "field_f1_base": ("fields right (micro-F1), base without an adapter", "share"),
    "parity_kl_nats_per_token": ("KL trained → exported", "nats a token"),
    "parity_top1_share": ("tokens where trained and exported agree", "share"),
    "kl_general_nats_per_token": ("KL base → adapter on general prose", "nats a token"),
    "kl_chat_nats_per_token": ("KL base → adapter on chat", "nats a token"),
    "train_seconds": ("training", "s"),
    "adapter_megabytes": ("adapter as shipped", "MB"),
}
ADAPTERS = ("home", "address", "forgetful")


def print_summary(
    figures: Mapping[str, float],
    verdicts: Mapping[str, str],
    answers: Mapping[str, str],
    files: Mapping[str, str],
    folder: Path,
) -> None:
    """Print what the demo found on standard error; standard output is left to --json."""
    console = Console(stderr=True)
    console.print()
    console.print(_adapters(figures, verdicts))
    console.print(_device(figures))
    console.print(_answers(answers))
    table = Table("file", f"where, in {folder}/", title="Files", title_justify="left")
    for what, where in files.items():
        table.add_row(what, where)
    console.print(table)


def _adapters(figures: Mapping[str, float], verdicts: Mapping[str, str]) -> Table:
    table = Table(title="Adapters", title_justify="left")
    for heading in ("", *ADAPTERS, "unit"):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    table.add_row("the gate says", *(_verdict(name, verdicts.get(name, "-")) for name in ADAPTERS), "")
    for key, (meaning, unit) in MEANING.items():
        found = [figures.get(f"{name}_{key}") for name in ADAPTERS]
        if any(value is not None for value in found):
            table.add_row(meaning, *("-" if value is None else f"{value:,.4g}" for value in found), unit)
    return table


def _verdict(name: str, outcome: str) -> str:
    if name == "forgetful":
        return "[red]pass: not refused[/red]" if outcome == "pass" else f"[green]refused: {outcome}[/green]"
    return f"[green]{outcome}[/green]" if outcome == "pass" else f"[red]{outcome}[/red]"


def _device(figures: Mapping[str, float]) -> Table:
    table = Table("device", "", "unit", title="Delivery and swap", title_justify="left")
    rows = {
        "update_fetched_bytes": ("fetched by update", "bytes"),
        "swap_to_first_token_cold_ms": ("naming another model to its first token, new conversation (median)", "ms"),
        "swap_to_first_token_warm_ms": ("the same, conversation already begun (median)", "ms"),
        "demo_seconds": ("the whole demo, this run", "s"),
    }
    for key, (meaning, unit) in rows.items():
        if key in figures:
            table.add_row(meaning, f"{figures[key]:,.1f}", unit)
    return table


def _answers(answers: Mapping[str, str]) -> Table:
    table = Table("model", "answer of the one running server", title="Answers", title_justify="left")
    for model, answer in answers.items():
        table.add_row(model, answer)
    return table
