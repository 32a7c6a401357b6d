"""The commands, in the order of the flow; each is one short function, and its stage is imported when it runs."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pitstop import __version__
from pitstop.errors import MissingExtra, PitstopError, Refused, UsageError

START, BUILD, PUBLISH, DEVICE, MORE = "Start here", "Build an adapter", "Publish it", "On the device", "More"
MAKE = ("base", "train", "import", "settle", "check", "repair")
SHIP = ("export", "merge", "parity", "pack", "build")
BUILDER = ("demo", "init", *MAKE, *SHIP)
FLOW = (*BUILDER, "keys", "publish", "update", "status", "rollback", "serve", "chat", "bench", "suites", "doctor")
STDOUT = Path("-")  # as the file of --json
STOPPED, PIPE_CLOSED = 130, 141  # exit codes after Ctrl-C and after `| head`, as shells have them


class Flow(TyperGroup):
    """The commands in the order of the flow; whatever a user can cause ends with a message, not a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names as `--help` lists them."""
        return sorted(self.commands, key=FLOW.index)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError as gone:
            # Whoever read our output has left; nothing more can be said, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from gone
        except PitstopError as error:
            _complain(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as stop:
            _complain("stopped; nothing was lost: run the same command again")
            raise typer.Exit(STOPPED) from stop


def _complain(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    what, *rest = text.split("\n")
    Console(stderr=True, soft_wrap=True).print(Text.assemble((what, "bold red"), "".join(f"\n{line}" for line in rest)))


app = typer.Typer(
    cls=Flow,
    help="Train small adapters, refuse the ones that forget, ship them signed, swap them on the device.",
    epilog="Exit codes: 0 done, 1 refused by a gate, 2 wrong use, 3 broken input, 130 stopped.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys = typer.Typer(help="Make the publisher's signing keys.", no_args_is_help=True)
suites = typer.Typer(help="Build, list, show and add retention suites.", no_args_is_help=True)
app.add_typer(keys, name="keys", rich_help_panel=PUBLISH)
app.add_typer(suites, name="suites", rich_help_panel=MORE)


def main() -> None:
    """Run pitstop from the command line."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        print(f"pitstop {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _hush(file: Path | None) -> Path | None:
    if file == STDOUT:
        from pitstop.progress import be_quiet

        be_quiet()
    return file


Recipe = Annotated[Path, typer.Argument(metavar="R", help="A recipe file, or the run folder made from one.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again though a result for the same inputs is there.")]
Json = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=_hush, help="Write the result as JSON; - is standard output, and only that."),
]
EngineName = Annotated[
    Literal["torch", "llama", "onnx"] | None,
    typer.Option(
        "--engine", help="torch: the adapter as trained; llama, onnx: what ships. [torch; what ships if it is merged]"
    ),
]
BaseArtifact = Annotated[
    str | None,
    typer.Option("--artifact", metavar="PRECISION", help="Of the base, beside which it ships. [the recipe's]"),
]
Channel = Annotated[str, typer.Option(metavar="NAME", help="What devices ask the repository for.")]
Suites = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the suites are.")]
Device = Annotated[
    Path, typer.Option(metavar="FOLDER", envvar="PITSTOP_DEVICE", help="The device root: everything installed here.")
]
DEVICE_ROOT = Path("device")
Profile = Annotated[
    str | None, typer.Option(metavar="BOARD", help="Stay within this board's memory, threads and context length.")
]
SUITES = Path("suites")


@contextmanager
def _needs(extra: str, feature: str) -> Iterator[None]:
    """Turn the import error of an optional library into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pitstop":
            raise
        raise MissingExtra(feature, extra) from error


def _finish(result: Any, said: str, json: Path | None) -> None:
    """Say what was done, and write it for scripts if they ask."""
    from pitstop import files, records

    if json == STDOUT:
        sys.stdout.write(records.to_json(result).decode())
        return
    if json is not None:
        files.write_bytes(json, records.to_json(result))
    print(said)


@app.command(rich_help_panel=START)
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where everything goes.")] = Path("pitstop-demo"),
    json: Json = None,
) -> None:
    """Run the whole way on a small real model, without a GPU."""
    with _needs("demo", "the demo"):
        from pitstop.demo import story
    story.tell(folder, json)


@app.command(rich_help_panel=START)
def init(
    recipe: Annotated[Path, typer.Argument(metavar="R", help="The file to write.")] = Path("recipe.toml"),
    json: Json = None,
) -> None:
    """Write a commented recipe to start from."""
    from pitstop.workshop import recipe as stage

    written = stage.init(recipe)
    _finish({"recipe": written}, f"wrote {written}: fill it in, then run: pitstop train {written}", json)


@app.command(rich_help_panel=BUILD)
def base(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A GGUF file, a Hugging Face folder or a hub id.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder of this base, such as bases/NAME.")],
    precision: Annotated[list[str], typer.Option(help="Of a file that devices run; may be repeated.")] = ["q8_0"],  # noqa: B006
    onnx: Annotated[list[str], typer.Option(help="Of an ONNX base: fp32, int8 or int4; may be repeated.")] = [],  # noqa: B006
    license: Annotated[str, typer.Option(help="Of the base, as SPDX names it.")] = "unknown",
    json: Json = None,
) -> None:
    """Prepare a base: weights to train on, files to ship."""
    with _needs("workshop", "preparing a base"):
        from pitstop.workshop import base_model as stage
    ref = stage.prepare(source, to, precisions=precision, onnx=onnx, license=license)
    made = ", ".join(
        f"{artifact.format} {artifact.precision} ({stage.bytes_of(to, artifact) / 1e6:,.1f} MB)"
        for artifact in ref.artifacts
    )
    _finish(ref, f"{to}: base {ref.name} with {made}", json)


@app.command(rich_help_panel=BUILD)
def train(
    recipe: Recipe,
    report_to: Annotated[
        list[str], typer.Option(metavar="NAME", help="Send losses to tensorboard, wandb, mlflow …; may be repeated.")
    ] = [],  # noqa: B006
    force: Force = False,
    json: Json = None,
) -> None:
    """Train an adapter; a stopped training goes on."""
    with _needs("workshop", "training"):
        from pitstop.workshop import adapter as adapters
        from pitstop.workshop import recipe as recipes
        from pitstop.workshop import train as stage
    folder = stage.train(recipe, force=force, report_to=report_to)
    identity = adapters.load_identity(recipes.load(recipe))
    left_out = f", {identity.rows_too_long} longer than the limit left out" if identity.rows_too_long else ""
    loss = "" if identity.final_loss is None else f", loss {identity.final_loss:.3f} nats per token"
    _finish(identity, f"{folder}: {identity.rows} rows{left_out}{loss}", json)


@app.command("import", rich_help_panel=BUILD)
def import_adapter(
    recipe: Recipe,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A PEFT folder or a hub id.")],
    trained_on: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the adapter calls the recipe's base.")
    ] = None,
    force: Force = False,
    json: Json = None,
) -> None:
    """Take in a LoRA that another tool trained."""
    with _needs("workshop", "importing"):
        from pitstop.workshop import adapter as adapters
        from pitstop.workshop import importing as stage
        from pitstop.workshop import recipe as recipes
    folder = stage.import_adapter(recipe, source, trained_on=trained_on, force=force)
    identity = adapters.load_identity(recipes.load(recipe))
    said = f"{folder}: for {identity.base_name}, weights {identity.base_sha256[:12]}; next, pitstop check {recipe}"
    _finish(identity, said, json)


@app.command(rich_help_panel=BUILD)
def settle(
    recipe: Recipe,
    artifact: Annotated[
        str | None, typer.Option(metavar="PRECISION", help="Of the base, that the adapter is to run on. [the recipe's]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of distillation. [a tenth of the training's]")] = None,
    to: Annotated[str | None, typer.Option(metavar="NAME", help="The new run below runs/. [R's with -settled]")] = None,
    force: Force = False,
    json: Json = None,
) -> None:
    """Move an adapter onto the weights that ship."""
    with _needs("workshop", "settling"):
        from pitstop.workshop import settle as stage
    result = stage.settle(recipe, artifact=artifact, steps=steps, to=to, force=force)
    near = f"KL to what was trained {result.kl_before:.4f} → {result.kl_after:.4f} nats per token on held-out prompts"
    _finish(result, f"{result.run}: on {result.artifact}, {near}; next, pitstop check {result.run}", json)


@app.command(rich_help_panel=BUILD)
def check(
    recipe: Recipe,
    engine: EngineName = None,
    artifact: BaseArtifact = None,
    force: Force = False,
    json: Json = None,
) -> None:
    """Measure task and forgetting, and give the verdict.

    Exit code 1 unless the verdict is pass.
    """
    with _needs("workshop", "checking"):
        from pitstop.retention.report import print_table
        from pitstop.workshop import check as stage
        from pitstop.workshop import recipe as recipes
    report = stage.check(recipe, engine=engine, artifact=artifact, force=force)
    if json != STDOUT:
        print_table(report)
    page = stage.report_file(recipes.load(recipe), engine, artifact).with_suffix(".html")
    _finish(report, f"report: {page}", json)
    if report.verdict.outcome != "pass":
        raise typer.Exit(1)


@app.command(rich_help_panel=BUILD)
def repair(
    recipe: Recipe,
    to: Annotated[
        str | None, typer.Option(metavar="NAME", help="The new run below runs/. [R's with -repaired]")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="LIST", help="Of scale,modules,layers,heads,ramp,rank,null-space. [all]")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the task's gain in exact answers that must be left.")] = 0.98,
    force: Force = False,
    json: Json = None,
) -> None:
    """Find the least change that passes, or say it can't.

    Exit code 1 if no change of the adapter both passes the gate and keeps the task.
    """
    with _needs("workshop", "repairing"):
        from pitstop.workshop.repair import repair as stage
        from pitstop.workshop.repair import result as results
    chosen = stage.chosen_methods(methods)
    result = stage.repair(recipe, to=to, methods=chosen, keep=keep, force=force)
    if json != STDOUT:
        results.print_table(result)
    said = f"{result.run}: next, pitstop check {result.run}" if result.run else f"{result.source} is as it was"
    _finish(result, said, json)
    results.require_repaired(result)


@app.command(rich_help_panel=BUILD)
def export(recipe: Recipe, profile: Profile = None, force: Force = False, json: Json = None) -> None:
    """Write the adapter as the files that devices load; several are measured side by side."""
    with _needs("workshop", "exporting"):
        from pitstop.workshop import recipe as recipes
        from pitstop.workshop.export import export as stage
    result = stage.export(recipe, force=force)
    loaded = recipes.load(recipe)
    path = loaded.run / stage.FOLDER / result.artifact.name
    said = f"{path}: {result.artifact.size / 1e6:,.1f} MB, for the base {result.base_sha256[:12]}"
    for one in result.also:
        said += f"\n{path.with_name(one.artifact.name)}: {one.artifact.size / 1e6:,.1f} MB, for the base in {one.base}"
    if loaded.export.delivery == "merged":
        said += f"\nthe recipe ships a merged model, not this: pitstop merge {recipe}"
    if result.also:
        said += "\n" + _trade(recipe, profile, force=force)
    _finish(result, said, json)


def _trade(recipe: Path, profile: str | None, *, force: bool) -> str:
    """Measure what was exported on each base, and return what to say of it."""
    from pitstop import profiles
    from pitstop.workshop import recipe as recipes
    from pitstop.workshop import trade as stage

    result = stage.trade(recipe, profile=profiles.load(profile) if profile else None, force=force)
    rows = [stage.HEADS, *(stage.cells(one) for one in result.options)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    loaded = recipes.load(recipe)
    said = f"best: {result.chosen}" if result.chosen else "none is near enough and fits"
    if result.chosen not in (None, loaded.base.artifact):
        said += f"; the recipe ships {loaded.base.artifact} ([base] artifact)"
    return "\n".join([*table, said, *(f"  - {reason}" for reason in result.reasons)])


@app.command(rich_help_panel=BUILD)
def merge(recipe: Recipe, force: Force = False, json: Json = None) -> None:
    """Merge base and adapter into one model."""
    with _needs("workshop", "merging"):
        from pitstop.workshop import merge as stage
        from pitstop.workshop import recipe as recipes
    merged = stage.merge(recipe, force=force)
    loaded = recipes.load(recipe)
    path = loaded.run / stage.FOLDER / merged.artifact.name
    said = f"{path}: {merged.artifact.size / 1e6:,.1f} MB, base and adapter in one"
    if loaded.export.delivery == "attached":
        said += '\nthe recipe ships the adapter, not this; to ship it: delivery = "merged" under [export]'
    _finish(merged, said, json)


@app.command(rich_help_panel=BUILD)
def parity(recipe: Recipe, artifact: BaseArtifact = None, force: Force = False, json: Json = None) -> None:
    """Compare what ships with what was trained."""
    with _needs("workshop", "parity"):
        from pitstop.workshop import parity as stage
    result = stage.parity(recipe, artifact=artifact, force=force)
    near = f"KL {result.kl_nats_per_token:.4f} nats per token, same first choice {result.top1_agreement:.1%}"
    exact = f"exact answers: trained {result.trained.exact:.1%}, shipped {result.shipped.exact:.1%}"
    _finish(result, f"{near} of {result.tokens} tokens; {exact}, base {result.base.exact:.1%}", json)


@app.command(rich_help_panel=BUILD)
def pack(
    recipe: Annotated[Path, typer.Argument(metavar="R", help="A recipe file, a run folder or a base's folder.")],
    artifact: BaseArtifact = None,
    counter: Annotated[int | None, typer.Option(help="Devices refuse a lower one. [one more than before]")] = None,
    json: Json = None,
) -> None:
    """Pack the bundle, if verdict and parity allow it."""
    with _needs("workshop", "packing"):
        from pitstop.workshop import pack as stage
    folder = stage.pack(recipe, artifact=artifact, counter=counter)
    _finish({"bundle": folder}, f"{folder}: ready to publish", json)


@app.command(rich_help_panel=BUILD)
def build(
    recipes: Annotated[list[Path], typer.Argument(metavar="R...", help="Recipe files.")],
    on: Annotated[
        str | None, typer.Option(metavar="WHERE", help="ray: a cluster of this machine; or a running one's address.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0.1, help="That one recipe takes of a node.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="That one recipe takes of a node.")] = 0,
    repair: Annotated[bool, typer.Option(help="Repair what the gate refuses.")] = True,
    json: Json = None,
) -> None:
    """Do all of the above for many recipes.

    Exit code 1 if an adapter is refused, 3 if a recipe is broken.
    """
    with _needs("workshop", "building"):
        from pitstop.workshop import build as stage

    def done(built: stage.Built) -> None:
        said = built.bundle or f"{built.outcome} at {built.stage}"
        print(f"{built.name}: {said}", file=sys.stderr, flush=True)

    results = stage.build(recipes, on=on, cpus=cpus, gpus=gpus, repairing=repair, done=done)
    if json != STDOUT:
        stage.print_table(results)
    packed = sum(built.outcome == "packed" for built in results)
    _finish(results, f"{packed} of {len(results)} packed", json)
    if packed < len(results):
        raise typer.Exit(3 if any(built.outcome == "broken" for built in results) else 1)


@keys.command("create")
def create_keys(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder, which no device ever sees.")],
    json: Json = None,
) -> None:
    """Make a key for every role.

    The keys are encrypted if PITSTOP_KEY_PASSPHRASE is set.
    """
    with _needs("publish", "signing"):
        from pitstop.repository import keys as stage
    stage.create(folder)
    _finish({"keys": folder}, f"{folder}: keep a copy in a safe place; whoever has these keys can publish", json)


@app.command(rich_help_panel=PUBLISH)
def publish(
    bundles: Annotated[list[Path], typer.Argument(metavar="R...", help="Run, base or bundle folders; recipe files.")],
    keys: Annotated[Path, typer.Option(metavar="FOLDER", help="The keys the repository is signed with.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="The repository.")] = Path("repository"),
    channel: Channel = "stable",
    json: Json = None,
) -> None:
    """Offer bundles on a channel of a repository."""
    with _needs("publish", "signing"):
        from pitstop.repository import publish as stage
    result = stage.publish([_bundle(path) for path in bundles], to, keys, channel)
    offers = ", ".join(f"{offer.name} {offer.version}" for offer in result.bundles)
    said = "now offers" if result.changed else "offers as before"
    _finish(result, f"{to}: channel {channel} {said} {offers}; devices trust it by {result.root}", json)


@app.command(rich_help_panel=DEVICE)
def update(
    url: Annotated[str, typer.Argument(metavar="URL", help="The repository: an http(s) address or a folder.")],
    device: Device = DEVICE_ROOT,
    root: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The publisher's 1.root.json; needed the first time.")
    ] = None,
    channel: Channel = "stable",
    json: Json = None,
) -> None:
    """Fetch, verify, try and activate what a channel offers."""
    from pitstop.device import health, updater
    from pitstop.device.store import Store

    result = updater.update(device, url, root_json=_read(root) if root else None, channel=channel)
    probes: list[health.Probe] = []
    active = updater.activate(Store(device), lambda release: probes.append(health.probe(release)))
    if active is None or active.sha256 != result.release:
        raise Refused(
            f"release {result.release[:12]} was tried as often as it may be, and never proved itself",
            where=device,
            cure="what served before still does; ask the publisher for a repaired release",
        )
    offers = ", ".join(f"{bundle.name} {bundle.version}" for bundle in result.bundles)
    said = f"{result.fetched_bytes / 1e6:,.1f} MB fetched, tried, now active" if probes else "up to date"
    _finish({"update": result, "probes": probes}, f"{device}: {said}: {offers}", json)


@app.command(rich_help_panel=DEVICE)
def status(device: Device = DEVICE_ROOT, json: Json = None) -> None:
    """Show what is installed, active and bad."""
    from pitstop.device.store import Store

    store = Store(device)
    release = store.active()
    bundles = sorted(release.bundles.values(), key=lambda bundle: bundle.kind != "base") if release else []
    active = {bundle.name: bundle.version for bundle in bundles}
    lines = [f"{device}: {', '.join(f'{name} {version}' for name, version in active.items()) or 'nothing is active'}"]
    for what, digests in (
        ("on trial", [store.state.trial]),
        ("before", [store.state.previous]),
        ("bad", store.state.bad),
    ):
        lines += [f"  {what}: release {digest[:12]}" for digest in digests if digest]
    _finish({"active": active, "state": store.state}, "\n".join(lines), json)


@app.command(rich_help_panel=DEVICE)
def rollback(device: Device = DEVICE_ROOT, json: Json = None) -> None:
    """Go back to the release before."""
    from pitstop.device.store import Store

    Store(device).roll_back()
    status(device, json)


@app.command(rich_help_panel=DEVICE)
def serve(
    device: Device = DEVICE_ROOT,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Clients must send the key in this file.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let other machines in without a key.")] = False,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Let pages from there use it in a browser; repeatable.")
    ] = None,
    profile: Profile = None,
    engine: Annotated[
        Literal["llama", "onnx"] | None, typer.Option(help="Which must run it. [that of the release's format]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the engine. [all cores]")] = None,
    own_lanes: Annotated[
        int, typer.Option(min=0, help="Adapters with conversations of their own: faster, as memory allows.")
    ] = 4,
    parked_mb: Annotated[int, typer.Option(min=0, help="Memory for conversations that make room for others.")] = 64,
    parked_disk_mb: Annotated[int, typer.Option(min=0, help="Disk for those beyond that.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Say in JSON when it is ready.")] = False,
) -> None:
    """Serve OpenAI's API: every adapter is a model name."""
    with _needs("device", "serving"):
        from pitstop.device import server as stage
        from pitstop.device.request import Limits
    limits = Limits(
        threads=threads,
        own_lanes=own_lanes,
        parked_memory=parked_mb << 20,
        parked_disk=parked_disk_mb << 20,
        parked_folder=device / "parked",
    )
    stage.serve(
        device,
        host=host,
        port=port,
        limits=_within(profile, device, limits),
        engine=engine,
        api_key_file=api_key_file,
        no_auth=no_auth,
        cors=cors or (),
        as_json=json,
    )


@app.command(rich_help_panel=DEVICE)
def chat(
    device: Device = DEVICE_ROOT,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="NAME", help="Who answers. [the base]")
    ] = None,
    profile: Profile = None,
) -> None:
    """Talk in the terminal; /swap NAME changes the adapter."""
    with _needs("llama", "running a model"):
        from pitstop.device import chat as stage
        from pitstop.device.request import Limits
    stage.chat(device, adapter, limits=_within(profile, device, Limits()))


@app.command(rich_help_panel=DEVICE)
def bench(
    device: Device = DEVICE_ROOT,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of threads to try; repeatable. [1, 2, 4 … all cores]")
    ] = None,
    json: Json = None,
) -> None:
    """Measure speed, memory and swaps on this board."""
    from pitstop.device import bench as stage
    from pitstop.device.runtime import active_release

    with _needs("llama", "running a model"):
        measured = stage.bench(active_release(device), threads or stage.thread_counts())
    if json != STDOUT:
        stage.describe(measured)
    if json is not None:
        _finish(measured, f"written to {json}", json)


def _within(profile: str | None, device: Path, limits: Any) -> Any:
    """Return limits lowered to what a board's profile allows."""
    if profile is None:
        return limits
    from pitstop import profiles
    from pitstop.device.engine import check_engine
    from pitstop.device.limits import within
    from pitstop.device.runtime import active_release

    release = active_release(device)
    board = profiles.load(profile)
    check_engine(release, profile=board)
    merged = [bundle.artifact.size for bundle, _ in release.adapters().values() if bundle.merged]
    return within(board, release.base_path(), limits, merged=merged, format=release.base.artifact.format)


@suites.command("build")
def build_suites(
    folder: Suites = SUITES,
    size: Annotated[int | None, typer.Option(min=1, help="Items per suite at most. [what each suite needs]")] = None,
    json: Json = None,
) -> None:
    """Build the suites out of pinned packages."""
    from pitstop.retention import builders

    built = [suite.record for suite in builders.build(folder, size)]
    _finish(built, f"{folder}: {', '.join(record.name for record in built)}", json)


@suites.command("list")
def list_suites(folder: Suites = SUITES, json: Json = None) -> None:
    """List the suites of a folder; those that pitstop carries where none were built."""
    from pitstop.retention import suite

    found = [suite.record for suite in suite.load_all(suite.folder_or_default(folder))]
    lines = (f"{record.name:12} {record.count:5} items  {record.description}" for record in found)
    _finish(found, "\n".join(lines), json)


@suites.command("show")
def show_suite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the suite.")],
    folder: Suites = SUITES,
    items: Annotated[int, typer.Option(min=0, help="How many of its items.")] = 3,
    json: Json = None,
) -> None:
    """Show what a suite is, where it comes from, and some of its items."""
    from pitstop.retention import describe, suite

    found = suite.named(suite.folder_or_default(folder), name)
    _finish({"record": found.record, "items": found.items[:items]}, describe.describe(found, items), json)


@suites.command("add")
def add_suite(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Items as JSONL, or an lm-evaluation-harness task.")],
    license: Annotated[str, typer.Option(help="Of the items, as SPDX names it.")],
    source: Annotated[str, typer.Option(help="Where the items come from.")],
    name: Annotated[str | None, typer.Option(help="Of the suite. [the file's, the task's]")] = None,
    kind: Annotated[
        Literal["choice", "cloze", "answer", "text", "chat"] | None, typer.Option(help="Of JSONL items.")
    ] = None,
    scoring: Annotated[
        Literal["per byte", "whole", "pmi"] | None, typer.Option(help="What options compete with. [per byte]")
    ] = None,
    neutral: Annotated[str | None, typer.Option(help="The prompt that asks for nothing, for pmi.")] = None,
    guards: Annotated[
        Literal["knowledge", "format", "safety", "stereotype"], typer.Option(help="Which margin applies.")
    ] = "knowledge",
    purpose: Annotated[Literal["retention", "drift"], typer.Option(help="drift: only KL to the base.")] = "retention",
    description: Annotated[str | None, typer.Option(help="In a few words.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A task's rows as JSONL. [what the task names]")
    ] = None,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the suites are.")] = SUITES,
    json: Json = None,
) -> None:
    """Make a suite of your own items, or of a task of lm-evaluation-harness."""
    from pitstop.retention import adding

    said = {"description": description, "scoring": scoring, "neutral": neutral, "guards": guards, "purpose": purpose}
    told = {key: value for key, value in said.items() if value is not None}
    added = adding.add(file, to, name=name, kind=kind, data=data, license=license, source=source, **told)
    _finish(added.record, f"{to / added.name}: {added.record.count} items", json)


@app.command("doctor", rich_help_panel=MORE)
def examine(json: Json = None) -> None:
    """Say what is installed, what is missing and what to type."""
    from pitstop import doctor

    diagnosis = doctor.examine()
    _finish(diagnosis, doctor.describe(diagnosis), json)
    if diagnosis.problems:
        raise typer.Exit(UsageError.exit_code)


def _bundle(path: Path) -> Path:
    """Find the bundle folder of what a user names.

    Raises:
        UsageError: nothing is packed there.
    """
    if path.is_file():
        from pitstop.workshop import recipe as recipes

        path = recipes.load(path).run
    found = path / "bundle" if (path / "bundle").is_dir() else path
    if not (found / "bundle.json").is_file():
        raise UsageError(f"nothing is packed at {path}", cure=f"run first: pitstop pack {path}")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
