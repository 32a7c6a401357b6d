"""The adapter verbs of vLLM and of llama-server."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitstop.device.protocol.fields import BadRequest, optional, parse_json, parse_object, required
from pitstop.device.protocol.sampling import parse_scales
from pitstop.device.request import ServedModel

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class LoadRequest:
    """The body of `/v1/load_lora_adapter`."""

    name: str
    path: Path | None  # None: an adapter that is served already is to be brought into memory
    pin: bool | None  # None: as it was


def parse_load(body: bytes) -> LoadRequest:
    """Read the body of `/v1/load_lora_adapter`; ``pin`` is an addition of pitstop's.

    Raises:
        BadRequest: it is not JSON, or a field has a wrong type or value.
    """
    data = parse_object(body)
    path = optional(data, "lora_path", str, None)
    if path is not None and (not path.startswith("/") or "\0" in path):
        raise BadRequest("'lora_path' must be the whole path of a file of this machine", "lora_path")
    return LoadRequest(_name(data), None if path is None else Path(path), optional(data, "pin", bool, None))


def parse_unload(body: bytes) -> str:
    """Return the name in the body of `/v1/unload_lora_adapter`.

    Raises:
        BadRequest: as for `parse_load`.
    """
    return _name(parse_object(body))


def _name(data: Mapping[str, Any]) -> str:
    name: str = required(data, "lora_name", str)
    if not _NAME.fullmatch(name):
        raise BadRequest("'lora_name' must be letters, digits, '.', '_', '-' and '/', 128 at most", "lora_name")
    return name


def parse_default_scales(body: bytes) -> dict[int, float]:
    """Read the body of `POST /lora-adapters`.

    Raises:
        BadRequest: it is not JSON, or no list of adapters with scales.
    """
    return parse_scales(parse_json(body), "the body")


def adapter_entry(model: ServedModel, scale: float, *, loaded: bool, pinned: bool) -> dict[str, Any]:
    """Return an adapter as `GET /lora-adapters` lists it; not where on this device its file lies."""
    file = model.bundle.artifacts[0].name
    extra = {"name": model.name, "version": model.bundle.version, "loaded": loaded, "pinned": pinned}
    return {"id": model.id, "path": file, "scale": scale, "pitstop": extra}


def model_entry(model: ServedModel, created: int) -> dict[str, Any]:
    """Return a served model as `/v1/models` lists it."""
    bundle = model.bundle
    extra = {"kind": bundle.kind, "version": bundle.version, "base": bundle.base_name}
    if bundle.kind == "adapter":
        extra["delivery"] = "merged" if bundle.merged else "attached"
    return {"id": model.name, "object": "model", "created": created, "owned_by": "pitstop", "pitstop": extra}


def model_list(models: Sequence[ServedModel], created: int) -> dict[str, Any]:
    """Return what `/v1/models` answers."""
    return {"object": "list", "data": [model_entry(model, created) for model in models]}
