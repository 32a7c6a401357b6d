"""Fixtures of publishing and updating, from tests/delivery.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from delivery import no_pauses, publisher, server

__all__ = ["no_pauses", "publisher", "server"]
