"""What every command shares: the order of the flow, how it ends, and the options that several have."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pitstop import __version__
from pitstop.errors import MissingExtra, PitstopError

START, BUILD, PUBLISH, DEVICE, MORE = "Start here", "Build an adapter", "Publish it", "On the device", "More"
MAKE = ("base", "train", "import", "settle", "check", "repair")
SHIP = ("export", "merge", "parity", "pack", "build", "tell")
BUILDER = ("demo", "init", *MAKE, *SHIP)
OWNER = ("update", "status", "rollback", "serve", "web", "chat", "bench")
FLOW = (*BUILDER, "keys", "publish", *OWNER, "suites", "doctor")
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
def needs(extra: str, feature: str) -> Iterator[None]:
    """Turn the import error of an optional library into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pitstop":
            raise
        raise MissingExtra(feature, extra) from error


def finish(result: Any, said: str, json: Path | None) -> None:
    """Say what was done, and write it for scripts if they ask."""
    from pitstop import files, records

    if json == STDOUT:
        sys.stdout.write(records.to_json(result).decode())
        return
    if json is not None:
        files.write_bytes(json, records.to_json(result))
    print(said)
