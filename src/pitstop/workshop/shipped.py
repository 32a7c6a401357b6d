"""What a run ships: its exported adapter, for any artifact of its base, or its merged model if the recipe says so."""

from dataclasses import dataclass
from pathlib import Path

from pitstop.bundle.manifest import Artifact
from pitstop.engines.base import Use
from pitstop.errors import UsageError
from pitstop.workshop.export.export import load_exported
from pitstop.workshop.merge import load_merged
from pitstop.workshop.recipe import Recipe


@dataclass(frozen=True)
class Shipped:
    """The file that runs on devices."""

    adapter_sha256: str  # of the trained weights it was made from
    base: str  # precision of the base artifact it runs beside
    base_sha256: str
    artifact: Artifact
    path: Path
    scale: float  # multiplier of its effect at run time; a merged model has its own inside

    def use(self, name: str) -> Use:
        """Return what a request names, if it was loaded under this name."""
        return Use(name, self.scale)


def load_shipped(recipe: Recipe, base: str | None = None) -> Shipped:
    """Return what the recipe ships, checked against its digest.

    Args:
        base: precision of the base artifact it is to run beside; None: the one the recipe trains on.

    Raises:
        UsageError: it is not made yet, or not for this artifact, or was merged at another scale.
        BrokenInput: the file is not the one that was made.
    """
    base = base or recipe.base.artifact
    if recipe.export.delivery == "attached":
        exported, path = load_exported(recipe)
        made = {further.base: (further.base_sha256, further.artifact) for further in exported.also}
        made[recipe.base.artifact] = exported.base_sha256, exported.artifact
        if base not in made:
            raise UsageError(
                f"{recipe.name} is not exported for {base} (it is for: {', '.join(made)})",
                cure=f"name {base} in [export] also, and export it: pitstop export {recipe.run}",
            )
        base_sha256, artifact = made[base]
        return Shipped(exported.adapter_sha256, base, base_sha256, artifact, path.parent / artifact.name, recipe.scale)
    if base != recipe.base.artifact:
        raise UsageError(f"{recipe.name} ships merged, and so for {recipe.base.artifact} only")
    merged, path = load_merged(recipe)
    if merged.scale != recipe.scale:
        raise UsageError(
            f"{recipe.name} was merged at scale {merged.scale}, the recipe says {recipe.scale}",
            where=path,
            cure=f"merge it again: pitstop merge {recipe.run}",
        )
    return Shipped(merged.adapter_sha256, base, merged.base_sha256, merged.artifact, path, 1.0)


def result_file(name: str, recipe: Recipe, base: str | None) -> Path:
    """Return where a result about what runs beside a base artifact lies: `retention.json`, `retention-int8.json`."""
    if base in (None, recipe.base.artifact):
        return recipe.run / name
    return recipe.run / f"{Path(name).stem}-{base}{Path(name).suffix}"
