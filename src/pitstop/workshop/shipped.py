"""What a run ships: its exported adapter, or its merged model if the recipe says so."""

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
    base_sha256: str  # of the base file it runs beside
    artifact: Artifact
    path: Path
    scale: float  # multiplier of its effect at run time; a merged model has its own inside

    def use(self, name: str) -> Use:
        """Return what a request names, if it was loaded under this name."""
        return Use(name, self.scale)


def load_shipped(recipe: Recipe) -> Shipped:
    """Return what the recipe ships, checked against its digest.

    Raises:
        UsageError: it is not made yet, was merged at another scale, or is one that devices do not run.
        BrokenInput: the file is not the one that was made.
    """
    if recipe.export.delivery == "attached":
        exported, path = load_exported(recipe)
        return Shipped(exported.adapter_sha256, exported.base_sha256, exported.artifact, path, recipe.scale)
    merged, path = load_merged(recipe)
    if merged.artifact.format == "onnx":
        raise UsageError(
            "a device runs ONNX with attached adapters; a merged one is a model of its own",
            where=path,
            cure='ship it attached ([export] delivery), or merge it into a GGUF ([base] artifact = "q8_0")',
        )
    if merged.scale != recipe.scale:
        raise UsageError(
            f"{recipe.name} was merged at scale {merged.scale}, the recipe says {recipe.scale}",
            where=path,
            cure=f"merge it again: pitstop merge {recipe.run}",
        )
    return Shipped(merged.adapter_sha256, merged.base_sha256, merged.artifact, path, 1.0)
