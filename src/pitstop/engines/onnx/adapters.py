"""What is loaded beside an ONNX base: merged models, and the tensors that a request's adapters and scales come to.

The graph takes one pair of tensors for each projection. So what a request is computed under is one set of tensors, for
every projection: adapters that are asked for together are put side by side (A = [A1 | A2], B = [w1 B1; w2 B2]), which
adds up what each does; a scale is multiplied into B; and a projection that none of them changes gets tensors of rank 0,
because a conversation would go on to use those of the adapter it had before.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pitstop.bundle.formats import (
    OnnxAdapterHeader,
    OnnxGraphHeader,
    is_onnx_adapter,
    read_onnx_adapter,
    read_onnx_graph,
)
from pitstop.bundle.onnx import A, B, check_files, check_onnx_adapter, check_onnx_merged, sites
from pitstop.engines.answer import check_merged_alone, check_use
from pitstop.engines.base import Use
from pitstop.engines.invocation import NEVER, active_from
from pitstop.engines.onnx.native import Model
from pitstop.engines.sessions import BASE_TAG, Tag
from pitstop.errors import FormatError, UsageError
from pitstop.files import open_verified, sha256_file

COMPOSED = 8  # sets of tensors for other scales, and for several adapters together, that stay when nobody uses them

Tensors = dict[str, NDArray[np.float32]]
Weights = tuple[tuple[str, int, float], ...]  # as in Tag: name, generation, scale
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


@dataclass(frozen=True)
class Loaded:
    """One adapter, or one merged model."""

    generation: int
    path: Path
    sha256: str  # of its file, which is read again for other scales
    invocation: tuple[int, ...] = ()
    model: Model | None = None  # a merged one


class Adapters:
    """All of them, by name; a later load of a name is another generation, whose KV is another's."""

    def __init__(
        self,
        graph: OnnxGraphHeader,
        base_sha256: str,
        base: Model,
        open_model: Callable[[OnnxGraphHeader], Model],
    ) -> None:
        """Begin with none.

        Args:
            base: takes the sets of tensors.
            open_model: loads a merged one.
        """
        self._graph, self._base_sha256 = graph, base_sha256
        self._base, self._open_model = base, open_model
        self._sites = sites(graph)
        self._loaded: dict[str, Loaded] = {}
        self._generation = self._sets = 0
        self._native: dict[Weights, str] = {}  # sets the library has, least recently used first, with their names
        self._doomed: list[str] = []  # sets that nobody will ask for again
        self._gone: list[Model] = []  # merged models that nobody will ask for again

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in the order they came."""
        return tuple(self._loaded)

    @property
    def doomed(self) -> frozenset[str]:
        """Sets of tensors that the library still has, and that nobody will ask for again."""
        return frozenset(self._doomed)

    @property
    def gone(self) -> tuple[Model, ...]:
        """Merged models that are in memory, and that nobody will ask for again."""
        return tuple(self._gone)

    def load(self, name: str, path: Path, sha256: str | None) -> None:
        """Load a file under a name that is free.

        Raises:
            as `Engine.load_adapter`.
        """
        if name in self._loaded:
            raise UsageError(f"an adapter {name!r} is already loaded", cure="unload it first, or choose another name")
        sha256 = sha256 or sha256_file(path)
        with open_verified(path, sha256) as file:
            is_adapter = is_onnx_adapter(path)
            invocation = self._checked(path, file).invocation if is_adapter else ()
        model = None if is_adapter else self._merged(path)
        self._generation += 1
        self._loaded[name] = Loaded(self._generation, path, sha256, invocation, model)
        if model is not None:
            return
        try:
            self.native(Tag(((name, self._generation, 1.0),)))
        except BaseException:
            del self._loaded[name]
            raise

    def _checked(self, path: Path, file: IO[bytes]) -> OnnxAdapterHeader:
        header = read_onnx_adapter(path, file)
        check_onnx_adapter(header, self._graph, self._base_sha256)
        return header

    def _merged(self, path: Path) -> Model:
        graph = read_onnx_graph(path)
        check_onnx_merged(graph, self._graph, self._base_sha256)
        check_files(graph)
        return self._open_model(graph)

    def _tensors(self, loaded: Loaded) -> Tensors:
        """Read what was loaded, in 32-bit floats."""
        found: Tensors = {}
        with open_verified(loaded.path, loaded.sha256) as file:
            header = self._checked(loaded.path, file)
            for tensor in header.tensors:
                file.seek(tensor.offset)
                values = np.frombuffer(file.read(tensor.size), _TYPES[tensor.type]).reshape(tensor.shape)
                found[tensor.name] = _finite(values.astype(np.float32), tensor.name, header)
        return found

    def unload(self, name: str) -> None:
        """Forget one, and every set it is in."""
        loaded = self._loaded.pop(name)
        generation = loaded.generation
        if loaded.model is not None:
            self._gone.append(loaded.model)
        for weights in [w for w in self._native if any(one[1] == generation for one in w)]:
            self._doomed.append(self._native.pop(weights))

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
            UsageError: no such adapter, or a combination that cannot be.
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
        return Tag(tuple((name, self._loaded[name].generation, scale) for name, scale in named), start)

    def model(self, tag: Tag) -> Model:
        """Return whose weights a tag is computed with: a merged model's, or the base's.

        Raises:
            UsageError: what it names was unloaded since.
        """
        for name, generation, _ in tag.adapters:
            if name not in self._loaded or self._loaded[name].generation != generation:
                raise UsageError(f"the adapter {name!r} was unloaded in the middle of an answer")
        return (self._loaded[tag.names[0]].model if tag.adapters else None) or self._base

    def native(self, tag: Tag) -> str | None:
        """Return the library's name of a tag's set of tensors, which is loaded if it is not; None: it needs none.

        Raises:
            UsageError: an adapter of it was unloaded since.
            BrokenInput: the library refuses it, or there is no room.
        """
        if self.model(tag) is not self._base:
            return None
        known = self._native.pop(tag.adapters, None)
        if known is None:
            self._sets += 1
            known = f"set{self._sets}"
            path = self._loaded[tag.names[0]].path if tag.adapters else self._graph.path
            self._base.load_adapter(known, self._compose(tag.adapters), path)
        self._native[tag.adapters] = known
        return known

    def _compose(self, weights: Weights) -> Tensors:
        parts = [(self._tensors(self._loaded[name]), scale) for name, _, scale in weights]
        found: Tensors = {}
        for site, shape in self._sites.items():
            a = [tensors[site + A] for tensors, _ in parts if site + A in tensors]
            b = [tensors[site + B] * np.float32(scale) for tensors, scale in parts if site + B in tensors]
            found[site + A] = np.concatenate([*a, np.zeros((shape.inputs, 0), np.float32)], axis=1)
            found[site + B] = np.concatenate([*b, np.zeros((0, shape.outputs), np.float32)], axis=0)
        return found

    def tidy(self, held: Collection[str], running: Collection[Model]) -> None:
        """Give back what nobody will ask for again, and sets beyond COMPOSED, but for what is held or runs."""
        for model in [model for model in self._gone if model not in running]:
            self._gone.remove(model)
            model.close()
        plain = {((name, loaded.generation, 1.0),) for name, loaded in self._loaded.items()} | {()}
        composed = [weights for weights, name in self._native.items() if weights not in plain and name not in held]
        for weights in composed[: max(0, len(composed) - COMPOSED)]:
            self._doomed.append(self._native.pop(weights))
        for name in [name for name in self._doomed if name not in held]:
            self._doomed.remove(name)
            self._base.unload_adapter(name)

    def close(self) -> None:
        """Give back merged models; conversations must be gone, and the base gives back the rest."""
        for model in (*self._gone, *(loaded.model for loaded in self._loaded.values() if loaded.model)):
            model.close()


def _finite(values: NDArray[np.float32], name: str, header: OnnxAdapterHeader) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        what = f"{header.path.name} is damaged: {name} holds values that are not finite"
        raise FormatError(what, where=header.path, cure="export the adapter again")
    return values
