"""Write the page for phones: built by `make web`, told here which repository it trusts; any static host offers it."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root

from pitstop import profiles
from pitstop.bundle.channel import is_channel_name
from pitstop.errors import BrokenInput, UsageError
from pitstop.files import replacing, write_bytes

BUILT = Path(__file__).parent / "dist"
CONFIG = "config.json"  # what the page of this build is told
LAST = "service_worker.js"  # it names every other file with its digest
ENGINES = ("engine/engine-mt.wasm", "engine/engine-st.wasm")
ROOT = Path("metadata/1.root.json")  # in a repository
MIB = 1 << 20


@dataclass(frozen=True)
class Written:
    """The page as it was written."""

    page: Path  # folder
    repository: str  # its address, as the page sees it
    channel: str
    files: int


def web(
    out: Path,
    repository: str,
    *,
    root_json: Path | None = None,
    channel: str = "stable",
    profile: str = "phone-browser",
    built: Path = BUILT,
) -> Written:
    """Write the page into a folder, with the trusted root, the channel and what a phone may hold baked in.

    Args:
        out: made if it does not exist; a page that is there already is replaced, other files stay.
        repository: http(s) address, or a folder inside ``out``, which the same host then offers.
        root_json: the publisher's `1.root.json`; None: the one in the folder.
        profile: the board whose memory and context length the page keeps to.
        built: what `make web` made.

    Raises:
        UsageError: the page is not built, or there is no such repository, channel or board.
        BrokenInput: the root cannot be read, or is none.
        StorageError: the disk refuses.
    """
    files = _built_files(built)
    if not is_channel_name(channel):
        raise UsageError(f"{channel!r} cannot name a channel", cure="use the name the publisher gave, such as stable")
    address, root_path = _repository(out, repository, root_json)
    board = profiles.load(profile)
    config = {
        "repository": address,
        "channel": channel,
        "root": _root(root_path),
        "budget": board.budget_mib * MIB,
        "context_length": board.context_length,
    }
    write_bytes(out / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    for name in files:
        with (built / name).open("rb") as source, replacing(out / name) as target:
            shutil.copyfileobj(source, target)
    return Written(out, address, channel, len(files) + 1)


def _built_files(built: Path) -> list[str]:
    """List what `make web` made, the service worker last."""
    if not all((built / name).is_file() for name in (LAST, *ENGINES)):
        raise UsageError("the page is not built", where=built, cure="in a checkout of pitstop: make web")
    names = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    return [*sorted(names - {LAST, CONFIG}), LAST]


def _repository(out: Path, repository: str, root_json: Path | None) -> tuple[str, Path]:
    """Return the repository's address as the page sees it, and the file of its root."""
    if re.match(r"https?://", repository):
        if not urlsplit(repository).netloc:
            raise UsageError(f"{repository!r} is no address", cure="write https://HOST/PATH")
        if root_json is None:
            raise UsageError(
                "what the page shall trust is not known",
                where=repository,
                cure="get the publisher's 1.root.json by a way you trust: pitstop web … --root 1.root.json",
            )
        return f"{repository.rstrip('/')}/", root_json
    folder = Path(repository).resolve()
    if not (folder / ROOT).is_file():
        raise UsageError("there is no repository", where=repository, cure="give its address, or run: pitstop publish")
    if not folder.is_relative_to(out.resolve()):
        raise UsageError(
            f"the host of {out} will not offer a repository outside of it",
            where=repository,
            cure=f"publish with --to {out / 'repository'}, or give the address at which it is offered",
        )
    inside = folder.relative_to(out.resolve()).as_posix()
    return "./" if inside == "." else f"{inside}/", root_json or folder / ROOT


def _root(path: Path) -> str:
    """Return the text of a root, as it was signed."""
    try:
        data = path.read_bytes()
        signed = Metadata.from_bytes(data).signed
        text = data.decode()
    except OSError as error:
        raise BrokenInput(f"cannot read the trusted root: {error.strerror}", where=path) from error
    except (RepositoryError, UnicodeDecodeError) as error:
        raise BrokenInput(f"this is no root.json: {error}", where=path) from error
    if not isinstance(signed, Root):
        raise BrokenInput(f"this is no root.json but the metadata of {signed.type!r}", where=path)
    return text
