"""What is loaded beside a base: adapters that are attached to it, and merged models that run in its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitstop.bundle.binding import check_fits, invocation_of, is_merged
from pitstop.bundle.formats import GgufHeader, read_gguf
from pitstop.engines.answer import check_merged_alone, check_use
from pitstop.engines.base import Use
from pitstop.engines.invocation import NEVER, active_from
from pitstop.engines.llama.native import Model
from pitstop.engines.sessions import BASE_TAG, Tag
from pitstop.errors import UsageError
from pitstop.files import open_verified


@dataclass(frozen=True)
class Loaded:
    """One of them."""

    tag: Tag  # what it computes under, as it is
    invocation: tuple[int, ...] = ()  # of an activated LoRA
    pointer: Any = None  # of an adapter
    model: Model | None = None  # a merged one


class Adapters:
    """All of them, by name; a later load of a name is another generation, whose KV is another's."""

    def __init__(self, base: Model, header: GgufHeader, base_sha256: str) -> None:
        self._base, self._header, self._base_sha256 = base, header, base_sha256
        self._loaded: dict[str, Loaded] = {}
        self._generation = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in the order they came."""
        return tuple(self._loaded)

    def load(self, name: str, path: Path, sha256: str | None) -> Loaded:
        """Load a file under a name that is free.

        Raises:
            as `Engine.load_adapter`.
        """
        if name in self._loaded:
            raise UsageError(f"an adapter {name!r} is already loaded", cure="unload it first, or choose another name")
        tag = Tag(((name, self._generation + 1, 1.0),))
        with open_verified(path, sha256) as file:
            header = read_gguf(path, file)
            check_fits(header, self._header, self._base_sha256)
            if is_merged(header):
                loaded = Loaded(tag, model=Model(path, file, products=self._base.products))
            else:
                loaded = Loaded(tag, invocation_of(header), self._base.load_adapter(path, file))
        self._generation += 1
        self._loaded[name] = loaded
        return loaded

    def unload(self, name: str) -> None:
        """Give back the memory of one; no context may hold it."""
        loaded = self._loaded.pop(name)
        if loaded.model is not None:
            loaded.model.free()
        else:
            self._base.free_adapter(loaded.pointer)

    def invocation(self, name: str) -> tuple[int, ...]:
        """Return the tokens from whose last occurrence on one acts; none: it acts everywhere.

        Raises:
            UsageError: there is none of this name.
        """
        check_use(Use(name), self._loaded)
        return self._loaded[name].invocation

    def tag(self, use: Use, tokens: Sequence[int]) -> Tag:
        """Return what tokens are computed under.

        Raises:
            UsageError: no such adapter, or a combination or scale that cannot be.
        """
        named = check_use(use, self._loaded)
        activated = [name for name, _ in named if self._loaded[name].invocation]
        if activated and len(named) > 1:
            what = f"{activated[0]} is an activated adapter, which cannot be stacked with others"
            raise UsageError(what, cure="name it alone")
        check_merged_alone(named, {name for name, _ in named if self._loaded[name].model is not None})
        start = active_from(tokens, self._loaded[activated[0]].invocation) if activated else 0
        if start == NEVER:
            return BASE_TAG
        generations = {name: self._loaded[name].tag.adapters[0][1] for name, _ in named}
        return Tag(tuple((name, generations[name], scale) for name, scale in named), start)

    def pointers(self, tag: Tag) -> list[tuple[Any, float]]:
        """Return the attached adapters of a tag with their scales.

        Raises:
            UsageError: one was unloaded since.
        """
        pointers = []
        for name, generation, scale in tag.adapters:
            loaded = self._loaded.get(name)
            if loaded is None or loaded.tag.adapters[0][1] != generation:
                raise UsageError(f"the adapter {name!r} was unloaded in the middle of an answer")
            if loaded.model is None:
                pointers.append((loaded.pointer, scale))
        return pointers

    def model(self, tag: Tag) -> Model:
        """Return whose weights a tag is computed with: a merged model's, or the base's."""
        merged = self._loaded[tag.names[0]].model if tag.adapters else None
        return merged or self._base

    def close(self) -> None:
        """Give back the memory of all; the base frees what is attached to it."""
        for loaded in self._loaded.values():
            if loaded.model is not None:
                loaded.model.free()
        self._loaded.clear()
