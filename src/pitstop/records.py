"""Dataclasses to and from JSON and TOML; whatever is wrong in a file is reported at once."""

import contextlib
import dataclasses
import difflib
import json
import reprlib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
from cattrs.cols import homogenous_tuple_structure_factory, mapping_structure_factory
from cattrs.gen import make_dict_structure_fn

from pitstop.errors import BrokenInput, RecordError
from pitstop.files import write_bytes

Record = TypeVar("Record")

_converter = cattrs.Converter()


def _strict(kind: type) -> Any:
    def check(value: Any, _: type) -> Any:
        # bool is an int in Python; a recipe that says `rank = true` does not mean 1.
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise TypeError(f"expected {_NAMES[kind]}, found {value!r}")
        return value

    return check


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
for _kind in _NAMES:
    _converter.register_structure_hook(_kind, _strict(_kind))
_converter.register_structure_hook(Path, lambda value, _: Path(_strict(str)(value, str)))


def _only(kind: type, called: str, hook: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def check(value: Any, cls: Any) -> Any:
        # Without this "all" would be the three texts "a", "l", "l", and other kinds an AttributeError.
        if not isinstance(value, kind):
            raise TypeError(f"expected {called}, found {reprlib.repr(value)}")
        return hook(value, cls)

    return check


def _of(origin: Any) -> Callable[[Any], bool]:
    return lambda kind: get_origin(kind) is origin


def _one_of(value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise TypeError(f"expected one of {', '.join(map(repr, choices))}, found {reprlib.repr(value)}")
    return value


@_converter.register_structure_hook_factory(dataclasses.is_dataclass)
def _record(cls: type[Any]) -> Callable[[Any, Any], Any]:
    return _only(Mapping, "a table", make_dict_structure_fn(cls, _converter, _cattrs_forbid_extra_keys=True))


@_converter.register_structure_hook_factory(_of(tuple))
def _list(kind: Any) -> Callable[[Any, Any], Any]:
    return _only(list, "a list", homogenous_tuple_structure_factory(kind, _converter))


@_converter.register_structure_hook_factory(_of(dict))
def _table(kind: Any) -> Callable[[Any, Any], Any]:
    return _only(Mapping, "a table", mapping_structure_factory(kind, _converter))


_converter.register_structure_hook_func(_of(Literal), _one_of)
_converter.register_unstructure_hook(Path, str)


def from_mapping(cls: type[Record], data: Mapping[str, Any], *, where: object = None) -> Record:
    """Build a dataclass from plain data.

    Raises:
        RecordError: unknown keys (with the nearest known one), missing keys, wrong types; all of them at once.
    """
    try:
        return _converter.structure(data, cls)
    except (cattrs.BaseValidationError, TypeError, ValueError) as error:
        raise RecordError(sorted(set(_problems(error, cls))), where=where) from error


def readable_part(cls: type[Record], path: Path) -> Record | None:
    """Return the record of a TOML file without the keys that are wrong; None if what is left is not enough for one.

    For what a caller can still say about a record that `load_toml` refuses.
    """
    try:
        return _converter.structure(_readable(cls, tomllib.loads(_read(path).decode())), cls)
    except (cattrs.BaseValidationError, TypeError, ValueError, RecursionError):
        return None


def _readable(cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value = data.get(field.name)
        if dataclasses.is_dataclass(field.type) and isinstance(value, Mapping):
            kept[field.name] = _readable(field.type, value)
        elif field.name in data:
            with contextlib.suppress(cattrs.BaseValidationError, TypeError, ValueError):
                _converter.structure(value, field.type)  # type: ignore[arg-type]
                kept[field.name] = value
    return kept


def to_mapping(record: Any) -> Any:
    """Return the record as dicts, lists and scalars."""
    return _converter.unstructure(record)


def to_json(record: Any) -> bytes:
    """Return the record as indented UTF-8 JSON with sorted keys: equal records give equal bytes."""
    return (json.dumps(to_mapping(record), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def from_json(cls: type[Record], data: bytes, *, where: object = None) -> Record:
    """Read a dataclass from JSON bytes.

    Raises:
        RecordError: not JSON, or not such a record.
    """
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError([f"not JSON: {error}"], where=where) from error
    return from_mapping(cls, parsed, where=where)


def load_json(cls: type[Record], path: Path) -> Record:
    """Read a dataclass from a JSON file.

    Raises:
        BrokenInput: the file cannot be read.
        RecordError: it is not such a record.
    """
    return from_json(cls, _read(path), where=path)


def save_json(record: Any, path: Path) -> None:
    """Write a record as JSON, whole or not at all.

    Raises:
        StorageError: the disk refused.
    """
    write_bytes(path, to_json(record))


def load_toml(cls: type[Record], path: Path) -> Record:
    """Read a dataclass from a TOML file.

    Raises:
        BrokenInput: the file cannot be read.
        RecordError: it is not TOML, or not such a record.
    """
    try:
        parsed = tomllib.loads(_read(path).decode())
    except (ValueError, RecursionError) as error:
        raise RecordError([f"not TOML: {error}"], where=path) from error
    return from_mapping(cls, parsed, where=path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BrokenInput(f"cannot read {path.name}: {error.strerror}", where=path) from error


def _problems(error: BaseException, cls: Any, at: str = "") -> list[str]:
    """Walk cattrs' exception groups and say each leaf in plain words."""
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in dataclasses.fields(error.cl)]
        return [f"{_dotted(at, key)}: no such key{_suggest(key, known)}" for key in sorted(error.extra_fields)]
    if isinstance(error, BaseExceptionGroup):
        found: list[str] = []
        for inner in error.exceptions:
            name, kind = _place(inner)
            found += _problems(inner, kind, _dotted(at, name) if name else at)
        return found
    if isinstance(error, KeyError):
        return [f"{_dotted(at, str(error.args[0])) if not at.endswith(str(error.args[0])) else at}: missing"]
    return [f"{at}: {error}" if at else str(error)]


def _place(error: BaseException) -> tuple[str, Any]:
    """Find which attribute or index cattrs was at."""
    for note in getattr(error, "__notes__", []):
        if isinstance(note, cattrs.AttributeValidationNote):
            return note.name, note.type
        if isinstance(note, cattrs.IterableValidationNote):
            return f"[{note.index}]", note.type
    return "", None


def _dotted(at: str, name: str) -> str:
    if not at or name.startswith("["):
        return f"{at}{name}"
    return f"{at}.{name}"


def _suggest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
