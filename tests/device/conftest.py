"""Fixtures of publishing and updating from tests/delivery.py, of running from tests/serving.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from delivery import no_pauses, publisher, server
from serving import board

__all__ = ["board", "no_pauses", "publisher", "server"]
