"""The parts an adapter's change falls into: modules, layers, attention heads."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Heads:
    """The base's attention heads: how many ask and speak in a layer, and how wide each is."""

    count: int  # query heads; keys and values may have fewer
    size: int

    @classmethod
    def of(cls, config: Any) -> "Heads":
        """Read them from a transformers config."""
        text = config.get_text_config()
        count = int(text.num_attention_heads)
        size = getattr(text, "head_dim", None) or text.hidden_size // count
        return cls(count, int(size))

    def side(self, module: str) -> Literal["q", "o"] | None:
        """Tell whether a module makes the heads' queries or takes their outputs."""
        match module.rpartition(".")[2]:
            case "q_proj":
                return "q"
            case "o_proj":
                return "o"
        return None


def layer_of(module: str) -> int | None:
    """Return the number of the layer a module is in, None outside of all."""
    found = re.search(r"\.layers\.(\d+)\.", f".{module}")
    return int(found.group(1)) if found else None


def layers_of(modules: Iterable[str]) -> list[int]:
    """Return the layers these modules are in, in order."""
    return sorted({layer for module in modules if (layer := layer_of(module)) is not None})


def short(module: str) -> str:
    """Return a module's name as people write it: 0.q_proj."""
    layer, last = layer_of(module), module.rpartition(".")[2]
    return last if layer is None else f"{layer}.{last}"
