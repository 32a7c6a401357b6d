"""The builder's commands: from a base and rows to bundles."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.frame import (
    BUILD,
    START,
    STDOUT,
    BaseArtifact,
    EngineName,
    Force,
    Json,
    Profile,
    Recipe,
    app,
    finish,
    needs,
)
from pitstop.errors import UsageError


@app.command(rich_help_panel=START)
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where everything goes.")] = Path("pitstop-demo"),
    json: Json = None,
) -> None:
    """Run the whole way on a small real model, without a GPU."""
    with needs("demo", "the demo"):
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
    finish({"recipe": written}, f"wrote {written}: fill it in, then run: pitstop train {written}", json)


@app.command(rich_help_panel=BUILD)
def base(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A GGUF file, a Hugging Face folder or a hub id.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder of this base, such as bases/NAME.")],
    precision: Annotated[list[str], typer.Option(help="Of a file that devices run; may be repeated.")] = ["q8_0"],  # noqa: B006
    onnx: Annotated[list[str], typer.Option(help="Of an ONNX base: fp32, int8, int4, int8-fused; repeatable.")] = [],  # noqa: B006
    license: Annotated[str, typer.Option(help="Of the base, as SPDX names it.")] = "unknown",
    json: Json = None,
) -> None:
    """Prepare a base: weights to train on, files to ship."""
    with needs("workshop", "preparing a base"):
        from pitstop.workshop import base_model as stage
    ref = stage.prepare(source, to, precisions=precision, onnx=onnx, license=license)
    made = ", ".join(
        f"{artifact.format} {artifact.precision} ({stage.bytes_of(to, artifact) / 1e6:,.1f} MB)"
        for artifact in ref.artifacts
    )
    finish(ref, f"{to}: base {ref.name} with {made}", json)


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
    with needs("workshop", "training"):
        from pitstop.workshop import adapter as adapters
        from pitstop.workshop import recipe as recipes
        from pitstop.workshop import train as stage
    folder = stage.train(recipe, force=force, report_to=report_to)
    identity = adapters.load_identity(recipes.load(recipe))
    left_out = f", {identity.rows_too_long} longer than the limit left out" if identity.rows_too_long else ""
    loss = "" if identity.final_loss is None else f", loss {identity.final_loss:.3f} nats per token"
    finish(identity, f"{folder}: {identity.rows} rows{left_out}{loss}", json)


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
    with needs("workshop", "importing"):
        from pitstop.workshop import adapter as adapters
        from pitstop.workshop import importing as stage
        from pitstop.workshop import recipe as recipes
    folder = stage.import_adapter(recipe, source, trained_on=trained_on, force=force)
    identity = adapters.load_identity(recipes.load(recipe))
    said = f"{folder}: for {identity.base_name}, weights {identity.base_sha256[:12]}; next, pitstop check {recipe}"
    finish(identity, said, json)


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
    with needs("workshop", "settling"):
        from pitstop.workshop import settle as stage
    result = stage.settle(recipe, artifact=artifact, steps=steps, to=to, force=force)
    near = f"KL to what was trained {result.kl_before:.4f} → {result.kl_after:.4f} nats per token on held-out prompts"
    finish(result, f"{result.run}: on {result.artifact}, {near}; next, pitstop check {result.run}", json)


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
    with needs("workshop", "checking"):
        from pitstop.retention.report import print_table
        from pitstop.workshop import check as stage
        from pitstop.workshop import recipe as recipes
    report = stage.check(recipe, engine=engine, artifact=artifact, force=force)
    if json != STDOUT:
        print_table(report)
    page = stage.report_file(recipes.load(recipe), engine, artifact).with_suffix(".html")
    finish(report, f"report: {page}", json)
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
    with needs("workshop", "repairing"):
        from pitstop.workshop.repair import repair as stage
        from pitstop.workshop.repair import result as results
    chosen = stage.chosen_methods(methods)
    result = stage.repair(recipe, to=to, methods=chosen, keep=keep, force=force)
    if json != STDOUT:
        results.print_table(result)
    said = f"{result.run}: next, pitstop check {result.run}" if result.run else f"{result.source} is as it was"
    finish(result, said, json)
    results.require_repaired(result)


@app.command(rich_help_panel=BUILD)
def export(recipe: Recipe, profile: Profile = None, force: Force = False, json: Json = None) -> None:
    """Write the adapter as the files that devices load; several are measured side by side."""
    with needs("workshop", "exporting"):
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
    finish(result, said, json)


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
    with needs("workshop", "merging"):
        from pitstop.workshop import merge as stage
        from pitstop.workshop import recipe as recipes
    merged = stage.merge(recipe, force=force)
    loaded = recipes.load(recipe)
    path = loaded.run / stage.FOLDER / merged.artifact.name
    said = f"{path}: {merged.artifact.size / 1e6:,.1f} MB, base and adapter in one"
    if loaded.export.delivery == "attached":
        said += '\nthe recipe ships the adapter, not this; to ship it: delivery = "merged" under [export]'
    finish(merged, said, json)


@app.command(rich_help_panel=BUILD)
def parity(recipe: Recipe, artifact: BaseArtifact = None, force: Force = False, json: Json = None) -> None:
    """Compare what ships with what was trained."""
    with needs("workshop", "parity"):
        from pitstop.workshop import parity as stage
    result = stage.parity(recipe, artifact=artifact, force=force)
    near = f"KL {result.kl_nats_per_token:.4f} nats per token, same first choice {result.top1_agreement:.1%}"
    exact = f"exact answers: trained {result.trained.exact:.1%}, shipped {result.shipped.exact:.1%}"
    scores = f"{near} of {result.tokens} tokens; {exact}, base {result.base.exact:.1%}"
    finish(result, f"{scores}\nwhat there is of a difference comes mostly from {result.cause}", json)


@app.command(rich_help_panel=BUILD)
def pack(
    recipe: Annotated[Path, typer.Argument(metavar="R", help="A recipe file, a run folder or a base's folder.")],
    artifact: BaseArtifact = None,
    counter: Annotated[int | None, typer.Option(help="Devices refuse a lower one. [one more than before]")] = None,
    json: Json = None,
) -> None:
    """Pack the bundle, if verdict and parity allow it."""
    with needs("workshop", "packing"):
        from pitstop.workshop import pack as stage
    folder = stage.pack(recipe, artifact=artifact, counter=counter)
    finish({"bundle": folder}, f"{folder}: ready to publish", json)


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
    with needs("workshop", "building"):
        from pitstop.workshop import build as stage

    def done(built: stage.Built) -> None:
        said = built.bundle or f"{built.outcome} at {built.stage}"
        print(f"{built.name}: {said}", file=sys.stderr, flush=True)

    results = stage.build(recipes, on=on, cpus=cpus, gpus=gpus, repairing=repair, done=done)
    if json != STDOUT:
        stage.print_table(results)
    packed = sum(built.outcome == "packed" for built in results)
    finish(results, f"{packed} of {len(results)} packed", json)
    if packed < len(results):
        raise typer.Exit(3 if any(built.outcome == "broken" for built in results) else 1)


@app.command(rich_help_panel=BUILD)
def tell(
    recipe: Recipe,
    source: Annotated[Path, typer.Argument(metavar="TABLE", help="Further rows; they need no label.")],
    json: Json = None,
) -> None:
    """Tell rows of a table as prompts, one a line."""
    from pitstop.workshop import recipe as recipes
    from pitstop.workshop import tables

    data = recipes.load(recipe).data
    if data.table is None:
        raise UsageError("the recipe's rows are no table: ask them as they are", where=recipe)
    prompts = tables.ask_rows(source, data.table, data.columns, data.train)
    finish([{"prompt": prompt} for prompt in prompts], "\n".join(prompts), json)
