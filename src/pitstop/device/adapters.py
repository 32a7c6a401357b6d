"""The adapters of a runtime: which may be asked for, which are in memory, and who leaves when there is no room."""

import dataclasses
import itertools
import stat
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pitstop.bundle.binding import is_merged
from pitstop.bundle.formats import is_onnx_adapter, read_gguf, read_onnx_adapter, read_onnx_graph
from pitstop.bundle.manifest import Artifact, ArtifactRole, Bundle
from pitstop.bundle.onnx import parts
from pitstop.device.metrics import Metrics
from pitstop.device.request import ServedModel, Stack, UnknownModel
from pitstop.device.store import ROTTEN
from pitstop.engines.base import Engine
from pitstop.errors import BaseMismatch, BrokenInput, Busy, FormatError, NoEffect, Untrusted, UsageError
from pitstop.files import sha256_file


class Catalogue:
    """What may be asked for, by name and by number. Any thread may call any method."""

    def __init__(self, served: Iterable[ServedModel]) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._served: dict[str, ServedModel] = {}
        self._scales: dict[int, float] = {}
        for model in served:
            self.add(self.number(model))

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models a request may name, the base first."""
        with self._lock:
            return tuple(self._served.values())

    def model(self, name: str) -> ServedModel:
        """Return the served model of a name.

        Raises:
            UnknownModel: there is none, with those there are.
        """
        with self._lock:
            if name not in self._served:
                have = ", ".join(self._served)
                raise UnknownModel(f"there is no model {name!r} here", cure=f"ask for one of: {have}")
            return self._served[name]

    def number(self, model: ServedModel) -> ServedModel:
        """Return a model with the number it will have once it is served.

        Raises:
            UsageError: the name is taken.
        """
        with self._lock:
            if model.name in self._served:
                cure = "unload that one first, or take another name"
                raise UsageError(f"a model {model.name!r} is served already", cure=cure)
            return model if model.path is None else dataclasses.replace(model, id=next(self._ids))

    def add(self, model: ServedModel) -> None:
        """Serve one more model, which has its number."""
        with self._lock:
            self._served[model.name] = model

    def remove(self, model: ServedModel) -> None:
        """Serve a model no longer."""
        with self._lock:
            if self._served.get(model.name) == model:
                del self._served[model.name]
            self._scales.pop(model.id, None)

    def default_scales(self) -> dict[int, float]:
        """Return the scales of adapters in requests to the plain base that name none themselves."""
        with self._lock:
            return dict(self._scales)

    def set_default_scales(self, scales: Mapping[int, float]) -> None:
        """Set those scales, for requests that come from now on; adapters that are left out count as 0.

        Raises:
            UnknownModel: no adapter has such a number.
        """
        self._numbered(scales)
        with self._lock:
            self._scales = {number: scale for number, scale in scales.items() if scale}

    def stack(self, model: ServedModel, scales: Mapping[int, float] | None) -> Stack:
        """Return the adapters that a request for a model is evaluated under.

        Args:
            scales: what the request itself says, by number: adapters beside the model's own, or its own in another
                scale; None: nothing.

        Raises:
            UnknownModel: no adapter has such a number.
            UsageError: a merged model is to be scaled or stacked.
        """
        if scales is None:
            scales = self.default_scales() if model.path is None else {}
        if scales and model.bundle.merged:
            raise UsageError(f"{model.name} is merged into its base: it has one scale, and nothing is added to it")
        wanted = {model.id: (model, model.bundle.scale)} if model.path is not None else {}
        wanted |= {number: (adapter, scales[number]) for number, adapter in self._numbered(scales).items()}
        # In one order whatever the request's: the same adapters are evaluated together and share their sessions.
        return tuple((adapter, scale) for _, (adapter, scale) in sorted(wanted.items()) if scale)

    def _numbered(self, numbers: Iterable[int]) -> dict[int, ServedModel]:
        have = {model.id: model for model in self.models if model.scalable}
        for number in numbers:
            if number not in have:
                listed = ", ".join(f"{number} ({model.name})" for number, model in have.items()) or "none"
                raise UnknownModel(f"there is no adapter with the number {number} here", cure=f"there are: {listed}")
        return {number: have[number] for number in numbers}


@dataclass(frozen=True)
class Resident:
    """An adapter in memory."""

    model: ServedModel
    size: int  # bytes


class Residents:
    """The adapters in memory, least recently used first; only the runtime's thread may change them."""

    def __init__(self, engine: Engine, budget: int | None, metrics: Metrics) -> None:
        """Begin with none.

        Args:
            budget: bytes all of them may have; None: no limit.
        """
        self._engine = engine
        self._budget = budget
        self._metrics = metrics
        self._inside: dict[str, Resident] = {}  # by key
        self._pinned: set[str] = set()
        self._faults: dict[str, str] = {}

    @property
    def inside(self) -> list[Resident]:
        """Those in memory now."""
        return list(self._inside.values())

    @property
    def faults(self) -> dict[str, str]:
        """Adapters of the release that could not be loaded when they were last asked for, with the reason."""
        return dict(self._faults)

    def holds(self, model: ServedModel) -> bool:
        """Whether an adapter is in memory."""
        return model.key in self._inside

    def is_pinned(self, model: ServedModel) -> bool:
        """Whether an adapter never leaves to make room."""
        return model.key in self._pinned

    def pin(self, model: ServedModel, pinned: bool) -> None:
        """Keep an adapter in memory whatever else is asked for, or no longer."""
        (self._pinned.add if pinned else self._pinned.discard)(model.key)

    def fits(self, wanted: Iterable[ServedModel], in_use: Iterable[ServedModel]) -> bool:
        """Tell whether adapters find room beside those in use and the pinned ones."""
        if self._budget is None:
            return True
        pinned = [resident.model for resident in self.inside if self.is_pinned(resident.model)]
        return sum(map(self._size, {one.key: one for one in (*in_use, *pinned, *wanted)}.values())) <= self._budget

    def load(self, models: Sequence[ServedModel], in_use: Collection[str]) -> None:
        """Bring adapters into memory that are not there; each all or nothing, but for idle ones that had to leave.

        Args:
            in_use: keys of adapters that must not leave, these among them.

        Raises:
            BaseMismatch: it was trained on another base.
            FormatError: it is damaged, or changes nothing.
            BrokenInput: it was loaded by its path, and the file has changed since.
            UsageError: they are larger than all adapters together may be.
            Busy: others in use leave no room.
        """
        self._check_budget(models)
        for model in models:
            self._load(model, in_use)

    def _check_budget(self, models: Sequence[ServedModel]) -> None:
        if self._budget is None or self.fits(models, ()):
            return
        pinned = sum(resident.size for resident in self.inside if self.is_pinned(resident.model))
        besides = f", {pinned / 1e6:,.1f} MB of them are pinned" if pinned else ""
        raise UsageError(
            f"{' and '.join(model.name for model in models)} need {sum(map(self._size, models)) / 1e6:,.1f} MB, "
            f"all adapters together may have {self._budget / 1e6:,.1f} MB{besides}",
            cure="raise the adapter budget" + (", or unpin one" if pinned else ""),
        )

    def _load(self, model: ServedModel, in_use: Collection[str]) -> None:
        if self.holds(model):
            self._inside[model.key] = self._inside.pop(model.key)  # now the last one to leave
            return
        begun = time.monotonic()
        assert model.path is not None
        try:
            self._check(model, model.path)
            size = self._size(model)
            self._make_room(model, size, in_use)
            self._engine.load_adapter(model.key, model.path, sha256=model.bundle.artifact.sha256)
        except Untrusted as error:
            self._refused(model, error)
            raise _changed(model) from error
        except BrokenInput as error:
            self._refused(model, error)
            raise
        self._inside[model.key] = Resident(model, size)
        self._faults.pop(model.name, None)
        self._metrics.count("adapter_loads", adapter=model.name)
        self._metrics.count("adapter_load_seconds", time.monotonic() - begun, adapter=model.name)

    def _check(self, model: ServedModel, path: Path) -> None:
        if model.bundle.base_sha256 != self._engine.base_sha256:
            raise BaseMismatch(
                f"{model.name} was trained on base {model.bundle.base_sha256[:12]}…, "
                f"{self._engine.base_sha256[:12]}… runs here",
                where=path,
                cure="run `pitstop update`",
            )

    def _refused(self, model: ServedModel, error: BrokenInput) -> None:
        reason = "no_effect" if isinstance(error, NoEffect) else "damaged"
        reason = "wrong_base" if isinstance(error, BaseMismatch) else reason
        self._metrics.count("refused_adapters", adapter=model.name, reason=reason)
        if not model.local:
            self._faults[model.name] = error.what

    def _make_room(self, model: ServedModel, size: int, in_use: Collection[str]) -> None:
        if self._budget is None:
            return
        idle = [one.model for one in self.inside if one.model.key not in in_use and not self.is_pinned(one.model)]
        while sum(resident.size for resident in self.inside) + size > self._budget:
            if not idle:
                raise Busy(f"the adapters that answer now leave no room for {model.name}", cure="try again in a moment")
            self._metrics.count("evictions", adapter=idle[0].name)
            self.unload(idle.pop(0))

    def _size(self, model: ServedModel) -> int:
        """Return the bytes an adapter takes; 0 if its file is gone, for then its load says so."""
        if model.path is None or not model.path.is_file():
            return 0
        return model.bundle.size + self._engine.context_bytes if model.bundle.merged else model.bundle.size

    def unload(self, model: ServedModel) -> None:
        """Let an adapter leave memory, if it is there; nothing may be evaluated under it."""
        if self.holds(model):
            self._engine.unload_adapter(model.key)
            del self._inside[model.key]
        self._pinned.discard(model.key)


def _changed(model: ServedModel) -> Untrusted:
    since, cure = "it was loaded", "unload it, and load it again"
    if not model.local:
        since, cure = "it was installed", ROTTEN
    return Untrusted(f"the file of {model.name} has changed since {since}", where=model.path, cure=cure)


def check_file(path: Path) -> str:
    """Return the SHA-256 of a file that somebody named.

    Raises:
        FormatError: there is none, or it is a folder, a pipe, a device: only a regular file is opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FormatError(f"{path.name or path} is no regular file", where=path, cure="name an adapter file")
        return sha256_file(path)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path.name} cannot be read: {getattr(error, 'strerror', error)}", where=path) from error


def local_model(name: str, path: Path, base: Bundle) -> ServedModel:
    """Return the model of an adapter or merged model that belongs to no release; it is asked as the base is.

    Raises:
        FormatError: there is no such file, or it is not regular, or not in the format of the base.
    """
    sha256, kind = check_file(path), base.artifact.format
    others: tuple[Artifact, ...] = ()
    if kind == "gguf":
        merged = is_merged(read_gguf(path))
    elif not (merged := not is_onnx_adapter(path)):
        read_onnx_adapter(path)
    else:
        others = tuple(parts(read_onnx_graph(path)))
    role: ArtifactRole = "merged" if merged else "adapter"
    artifacts = (Artifact(role, kind, "", path.name, sha256, path.stat().st_size), *others)
    bundle = dataclasses.replace(
        base, kind="adapter", name=name, version="local", artifacts=artifacts, scale=1.0, measured={}, reports={}
    )
    return ServedModel(name, bundle, path, local=True)
