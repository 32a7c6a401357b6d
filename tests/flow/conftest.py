"""Fixtures of publishing from tests/delivery.py, of running from tests/serving.py, of a board from tests/aarch64.py."""

from aarch64 import machine
from delivery import no_pauses, publisher, server
from serving import board

__all__ = ["board", "machine", "no_pauses", "publisher", "server"]
