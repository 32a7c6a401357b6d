"""Many recipes to bundles: train, settle, check, repair, export, parity, pack, each stage as its own command does it.

What is complete is not done again, so a build that was stopped goes on where it was. A recipe that fails, or whose
adapter is refused, does not stop the others.
"""

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pitstop.errors import PitstopError, RecordError, Refused, together
from pitstop.progress import say
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import load_identity
from pitstop.workshop.check import check
from pitstop.workshop.export.export import export
from pitstop.workshop.merge import merge
from pitstop.workshop.pack import pack
from pitstop.workshop.parity import Parity, parity
from pitstop.workshop.repair.repair import repair
from pitstop.workshop.repair.result import require_repaired
from pitstop.workshop.settle import settle
from pitstop.workshop.train import train

Outcome = Literal["packed", "refused", "broken"]


@dataclass(frozen=True)
class Built:
    """What became of one recipe."""

    recipe: Path
    name: str  # of the adapter
    outcome: Outcome
    stage: str  # the last one
    run: Path  # the run that was packed: the recipe's, or a settled or repaired one's
    bundle: Path | None
    changes: tuple[str, ...]  # "settle", "repair": what was done to the trained adapter
    exact: float | None  # exact answers of what ships, on held-out rows
    said: str  # why it ended, if it was not packed
    seconds: float
    where: str  # host it was built on


def build(
    paths: Sequence[Path],
    *,
    on: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    repairing: bool = True,
    done: Callable[[Built], None] = lambda _: None,
) -> tuple[Built, ...]:
    """Build the bundles of recipes, and return what became of each, in their order.

    Args:
        on: None builds one after another here; "ray" on a Ray cluster of this machine, "ray://HOST:PORT" or
            "HOST:PORT" on a running one, which sees this folder at the same path.
        cpus, gpus: that one recipe takes of a node of the cluster.
        repairing: whether an adapter that the gate refuses is repaired.
        done: told of each as it ends.

    Raises:
        UsageError: no such recipe, or a cluster that cannot be used.
        RecordError: every problem of every recipe, two that write to one folder included.
        MissingExtra: there is no Ray.
    """
    _refuse_problems(paths)
    results: Iterable[Built]
    if on is None:
        results = (build_one(path, repairing=repairing) for path in paths)
    else:
        from pitstop.workshop.cluster import spread

        results = spread(paths, on, cpus=cpus, gpus=gpus, repairing=repairing)
    found: dict[Path, Built] = {}
    for built in results:
        found[built.recipe] = built
        done(built)
    return tuple(found[path] for path in paths)


def _refuse_problems(paths: Sequence[Path]) -> None:
    with together() as attempt:
        loaded = [attempt(recipes.load, path) for path in paths]
    runs: dict[Path, Path] = {}
    problems = []
    for path, recipe in zip(paths, loaded, strict=True):
        before = runs.setdefault(recipe.run, path)
        if before is not path:
            problems.append(f"{path} and {before} both write to {recipe.run}; give one of them another name")
    if problems:
        raise RecordError(problems)


def build_one(path: Path, *, repairing: bool = True) -> Built:
    """Build the bundle of one recipe; what a user can cause is in the result, not raised."""
    begun = time.monotonic()
    way = _Way(path)
    outcome: Outcome = "packed"
    said = ""
    try:
        for stage in way.stages(repairing):
            say(f"{way.name}: {stage}")
    except Refused as refusal:
        outcome, said = "refused", refusal.what
    except PitstopError as error:
        outcome, said = "broken", str(error)
    return Built(
        recipe=path,
        name=way.name,
        outcome=outcome,
        stage=way.stage,
        run=way.run,
        bundle=way.bundle,
        changes=tuple(way.changes),
        exact=None if way.parity is None else way.parity.shipped.exact,
        said=said,
        seconds=round(time.monotonic() - begun, 1),
        where=socket.gethostname(),
    )


class _Way:
    """One recipe on its way: where it is, and what it has become."""

    def __init__(self, path: Path) -> None:
        recipe = recipes.load(path)
        self.path, self.run, self.name = path, recipe.run, recipe.name
        self.stage = ""
        self.changes: list[str] = []
        self.parity: Parity | None = None
        self.bundle: Path | None = None

    def stages(self, repairing: bool) -> Iterator[str]:
        """Yield the name of every stage before it is done.

        Raises:
            PitstopError: as the stages do.
            Refused: by the gate, by parity, or because nothing could be repaired.
        """
        yield self._at("train")
        train(self.path)
        if load_identity(recipes.load(self.path)).precision != "shipped":
            yield self._at("settle")
            self._goes_on_in(settle(self.path).run)
        yield self._at("check")
        if check(self.path).verdict.outcome != "pass" and repairing:
            yield self._at("repair")
            self._goes_on_in(require_repaired(repair(self.path)).run)
            yield self._at("check")
            check(self.path)
        yield self._at("export")
        merge(self.path) if recipes.load(self.path).export.delivery == "merged" else export(self.path)
        yield self._at("parity")
        self.parity = parity(self.path)
        yield self._at("pack")
        self.bundle = pack(self.path)

    def _at(self, stage: str) -> str:
        self.stage = stage
        return stage

    def _goes_on_in(self, run: str | None) -> None:
        assert run is not None
        self.changes.append(self.stage)
        self.path = self.run = Path(run)


def print_table(results: Sequence[Built], console: Console | None = None) -> None:
    """Print what became of every recipe."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("adapter", "outcome", "changed by", "exact", "minutes", "on"):
        table.add_column(
            name, justify="right" if name in ("exact", "minutes") else "left", no_wrap=name != "changed by"
        )
    for one in results:
        style = {"packed": "green", "refused": "yellow", "broken": "red"}[one.outcome]
        said = one.outcome if one.outcome == "packed" else f"{one.outcome} at {one.stage}"
        exact = "" if one.exact is None else f"{one.exact:.1%}"
        figures = (", ".join(one.changes), exact, f"{one.seconds / 60:.1f}", one.where)
        table.add_row(escape(one.name), f"[{style}]{said}[/]", *figures)
    console.print(table)
    for one in results:
        if one.said:
            console.print(f"{one.name}: {one.said}", highlight=False, markup=False)
