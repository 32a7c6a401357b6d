"""Recipes that tools and tests make up, written as TOML."""

import json
from typing import Any


def toml(tables: dict[str, Any], at: str = "") -> str:
    """Write nested tables as TOML; their scalars and lists are written alike in JSON."""
    plain = "".join(f"{key} = {json.dumps(value)}\n" for key, value in tables.items() if not isinstance(value, dict))
    inner = (f"\n[{at}{key}]\n{toml(value, f'{at}{key}.')}" for key, value in tables.items() if isinstance(value, dict))
    return plain + "".join(inner)
