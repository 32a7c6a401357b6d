"""The commands, in the order of the flow; each is one short function, and its stage is imported when it runs."""

from pitstop.cli import builder, device, publisher, suites
from pitstop.cli.frame import app

__all__ = ["app", "builder", "device", "main", "publisher", "suites"]


def main() -> None:
    """Run pitstop from the command line."""
    app()
