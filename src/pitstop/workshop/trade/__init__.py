"""Which artifact of the base should a device run? The exported adapter on each, measured side by side."""

from pitstop.workshop.trade.measure import trade
from pitstop.workshop.trade.result import HEADS, Option, Trade, cells, choose

__all__ = ["HEADS", "Option", "Trade", "cells", "choose", "trade"]
