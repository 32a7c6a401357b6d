"""The publisher's commands: keys, and what a channel offers."""

from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.frame import PUBLISH, Channel, Json, app, finish, keys, needs
from pitstop.errors import UsageError


@keys.command("create")
def create_keys(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder, which no device ever sees.")],
    json: Json = None,
) -> None:
    """Make a key for every role.

    The keys are encrypted if PITSTOP_KEY_PASSPHRASE is set.
    """
    with needs("publish", "signing"):
        from pitstop.repository import keys as stage
    stage.create(folder)
    finish({"keys": folder}, f"{folder}: keep a copy in a safe place; whoever has these keys can publish", json)


@app.command(rich_help_panel=PUBLISH)
def publish(
    bundles: Annotated[list[Path], typer.Argument(metavar="R...", help="Run, base or bundle folders; recipe files.")],
    keys: Annotated[Path, typer.Option(metavar="FOLDER", help="The keys the repository is signed with.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="The repository.")] = Path("repository"),
    channel: Channel = "stable",
    json: Json = None,
) -> None:
    """Offer bundles on a channel of a repository."""
    with needs("publish", "signing"):
        from pitstop.repository import publish as stage
    result = stage.publish([_bundle(path) for path in bundles], to, keys, channel)
    offers = ", ".join(f"{offer.name} {offer.version}" for offer in result.bundles)
    said = "now offers" if result.changed else "offers as before"
    finish(result, f"{to}: channel {channel} {said} {offers}; devices trust it by {result.root}", json)


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
