"""The adapter folder: PEFT's files, and `pitstop.json` that says what they are and which base they belong to."""

from dataclasses import dataclass
from pathlib import Path

from pitstop import records
from pitstop.errors import BrokenInput, PitstopError, UsageError
from pitstop.files import sha256_file
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import require

FOLDER = "adapter"
WEIGHTS_FILE = "adapter_model.safetensors"
IDENTITY_FILE = "pitstop.json"


@dataclass(frozen=True)
class Change:
    """What was done to a finished adapter, without training it again."""

    method: str  # "scale", "layers", … as `pitstop repair` names them
    parameters: dict[str, float]
    adapter_sha256: str  # of the weights it was done to


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from that was not trained here."""

    source: str  # folder or hub id it was imported from
    base: str  # what it said it was trained on


@dataclass(frozen=True)
class Identity:
    """`adapter/pitstop.json`: what an adapter is and what it belongs to."""

    name: str
    base_name: str
    base_sha256: str  # the base artifact it was trained for
    precision: str  # of the frozen weights in training: shipped or nf4
    adapter_sha256: str  # of adapter_model.safetensors
    inputs: str  # digest of everything that decides the result: same inputs, nothing to do
    rows: int
    rows_too_long: int  # left out, never cut
    tokens: int  # processed in training, padding not counted
    seconds: float  # of training; of the last part when it was resumed
    final_loss: float | None  # nats per token, mean of the last logged steps; None if nothing was left to train
    history: tuple[Change, ...] = ()  # what was done to it after its training, first to last
    origin: Origin | None = None  # None: trained here


def refuse_imported(run: Path) -> None:
    """Refuse to train over an adapter that cannot be trained again here.

    Raises:
        UsageError: the run's adapter was imported.
    """
    try:
        identity = records.load_json(Identity, run / FOLDER / IDENTITY_FILE)
    except (OSError, PitstopError):
        return  # none, or none that is whole
    if identity.origin is not None:
        raise UsageError(
            f"this run's adapter was imported from {identity.origin.source}; training would replace it",
            where=run / FOLDER,
            cure=f"check it as it is (pitstop check {run}), name another run in the recipe, or add --force",
        )


def load_identity(recipe: Recipe) -> Identity:
    """Return the identity of a run's finished adapter, its weights checked against it.

    Raises:
        UsageError: nothing is trained yet.
        BrokenInput: the weights are not those that were trained.
    """
    folder = recipe.run / FOLDER
    identity = records.load_json(
        Identity, require(folder / IDENTITY_FILE, "trained adapter", f"pitstop train {recipe.run}")
    )
    if sha256_file(folder / WEIGHTS_FILE) != identity.adapter_sha256:
        raise BrokenInput(
            "the adapter's weights are not the ones that were trained",
            where=folder / WEIGHTS_FILE,
            cure=f"train it again: pitstop train {recipe.run} --force",
        )
    return identity
