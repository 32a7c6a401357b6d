"""A builder's folder for tests of the workshop: a base, a dataset and recipes, all small."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables_as_toml import toml

COLORS = ("red", "green", "blue", "white", "black", "yellow", "brown", "pink")
PLACES = ("kitchen", "bedroom", "hall", "garage", "cellar", "attic")
TEXTS = (
    "The river rises in the mountains and reaches the sea after three hundred miles.",
    "Bread is made of flour, water, salt and time, and of very little else.",
    "She closed the book, looked out of the window and waited for the rain to stop.",
    "A prime number has no divisors but one and itself, and there is no largest one.",
)


@dataclass(frozen=True)
class TinyModel:
    """A random model of two layers in float32, for training libraries and for llama.cpp."""

    folder: Path  # Hugging Face
    gguf: Path


@dataclass(frozen=True)
class Project:
    """The folder a builder works in; tests run with it as the current one."""

    folder: Path

    @property
    def run(self) -> Path:
        """The run folder of the recipe's default name, relative to the folder."""
        return Path("runs", "lights")

    def rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Write a JSONL file, and return its path relative to the folder."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / name).write_text("".join(lines), encoding="utf-8")
        return Path(name)

    def recipe(self, file: str = "recipe.toml", **changes: Any) -> Path:
        """Write a recipe of a few steps on the tiny base; a table given here is laid over the default one."""
        recipe: dict[str, Any] = {
            "name": "lights",
            "base": {"folder": "bases/tiny"},
            "data": {"train": "rows.jsonl", "test_share": 0.3, "max_tokens": 128},
            "train": {"steps": 20, "batch": 4, "rank": 4, "alpha": 8.0, "learning_rate": 5e-3, "warmup_steps": 0},
        }
        for key, value in changes.items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        (self.folder / file).write_text(toml(recipe), encoding="utf-8")
        return Path(file)


def light_rows() -> list[dict[str, Any]]:
    """Return rows of a task that is easy to learn: a colour and a room as JSON, grouped by room."""
    return [
        {
            "prompt": f"make the {place} {color}",
            "completion": json.dumps({"room": place, "color": color}),
            "group": place,
        }
        for place in PLACES
        for color in COLORS
    ]
