"""What a release needs to run: an engine for the format of its base, and files that are fit for that engine."""

from pathlib import Path
from typing import Any

from pitstop.bundle.binding import check_fits
from pitstop.bundle.formats import OnnxGraphHeader, read_gguf, read_onnx_adapter, read_onnx_graph
from pitstop.bundle.manifest import Bundle
from pitstop.bundle.onnx import CONFIG_FILE, check_onnx_adapter, check_onnx_merged, locate, read_settings
from pitstop.device.request import Limits
from pitstop.device.store import Release
from pitstop.engines.base import Engine
from pitstop.engines.opening import ENGINES, EngineName, engine_class, engine_for
from pitstop.engines.parking import Parking
from pitstop.errors import FormatError, UsageError
from pitstop.profiles import DeviceProfile


def check_engine(release: Release, wanted: EngineName | None = None, profile: DeviceProfile | None = None) -> None:
    """Refuse a release that another engine runs than was asked for, or than a board has.

    Raises:
        UsageError: it has another format.
        FormatError: as `engine_for`.
    """
    base = release.base
    runs = engine_for(base.artifact)
    if wanted is not None and wanted != runs:
        other = next(kind for kind, name in ENGINES.items() if name == wanted)
        raise UsageError(
            f"the release carries {base.name} as {base.artifact.format}, which the {runs} engine runs, not {wanted}",
            cure=f"update from a channel that offers {other}, or leave --engine out",
        )
    if profile is not None and base.artifact.format not in profile.formats:
        raise UsageError(
            f"the release carries {base.name} as {base.artifact.format}; {profile.name} runs "
            f"{' and '.join(profile.formats)}",
            cure="update from a channel that offers that",
        )


def open_engine(base: Bundle, path: Path, limits: Limits) -> Engine:
    """Load a base, within limits.

    Raises:
        MissingExtra: the engine is not installed.
        FormatError: the base is damaged, or in a format that no engine here runs.
        UsageError: the context does not fit in memory.
    """
    name = engine_for(base.artifact)
    options: dict[str, Any] = {"warm": limits.parked_memory}
    if name == "llama":
        parking = Parking(limits.parked_memory, limits.parked_disk, limits.parked_folder)
        options = {"own_lanes": limits.own_lanes, "parking": parking}
    engine: Engine = engine_class(name)(
        path,
        base_sha256=base.base_sha256,
        context_length=min(limits.context_length, base.context_length),
        sequences=limits.sequences,
        threads=limits.threads,
        **options,
    )
    return engine


def preload(release: Release) -> None:
    """Load the engine's library, so that one that is missing is told of before anything begins.

    Raises:
        MissingExtra: it is not installed.
    """
    if engine_for(release.base.artifact) == "onnx":
        import pitstop.engines.onnx.native  # noqa: F401
    else:
        from pitstop.engines.llama.native import library

        library()


def check_formats(release: Release) -> None:
    """Refuse a release with files that no engine here runs, or that are not for the engine of its base.

    Raises:
        FormatError: the first such file.
    """
    engine_for(release.base.artifact)
    kind = release.base.artifact.format
    for artifact in release.artifacts():
        if artifact.format != kind:
            raise FormatError(f"{artifact.name} is {artifact.format!r}, the base of the release is {kind!r}")


def check_files(release: Release) -> None:
    """Refuse files that no loader here should see, by their headers.

    Raises:
        FormatError: one is damaged, or does not fit the base.
        BaseMismatch: an adapter was made for another base.
    """
    path, sha256 = release.base_path(), release.base.base_sha256
    adapters = release.adapters()
    if engine_for(release.base.artifact) == "llama":
        base = read_gguf(path)
        for _, adapter in adapters.values():
            check_fits(read_gguf(adapter), base, sha256)
        return
    graph = _listed(release.base, path)
    read_settings(graph, locate(graph)[CONFIG_FILE])
    for bundle, adapter in adapters.values():
        if bundle.merged:
            check_onnx_merged(_listed(bundle, adapter), graph, sha256)
        else:
            check_onnx_adapter(read_onnx_adapter(adapter), graph, sha256)


def _listed(bundle: Bundle, path: Path) -> OnnxGraphHeader:
    """Return a graph all of whose files came with its bundle."""
    graph = read_onnx_graph(path)
    listed = {part.sha256 for part in bundle.parts}
    if missing := [name for name, digest in graph.files.items() if digest not in listed]:
        raise FormatError(f"the bundle of {bundle.name} does not list {', '.join(missing)}", where=path)
    return graph
