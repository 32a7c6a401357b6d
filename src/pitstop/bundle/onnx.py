"""What an ONNX model is made of, and which adapters go with it: by the headers alone.

A model is a graph and the files it names by digest (`FILES_KEY` in its metadata): the weights, the tokenizer, the
settings of onnxruntime-genai. So the digest of the graph stands for all of it, and an adapter names that one.

ONNX Runtime feeds an adapter to the graph by the names of its tensors, whatever they are: one that is called
`input_ids` replaces the prompt. So only what the graph has for adapters may be in one: pairs of inputs `<site>.A` and
`<site>.B` that may be left out, and are of rank 0 then.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pitstop.bundle.binding import BASE_KEY, check_base_sha256
from pitstop.bundle.formats import OnnxAdapterHeader, OnnxGraphHeader
from pitstop.bundle.formats.onnx_graph import FILES_KEY, FLOAT32
from pitstop.bundle.formats.tensors import regular_size
from pitstop.bundle.manifest import Artifact
from pitstop.errors import FormatError
from pitstop.files import open_verified

CONFIG_FILE = "genai_config.json"
TOKENIZER_FILE = "tokenizer.json"
GRAPH_FILE = "model.onnx"  # as the settings call it
MAX_CONFIG = 1 << 20  # bytes
FIRST_ROW = "logits.first"  # an input that may be left out: the position from which on logits are computed
A, B = ".A", ".B"  # the halves of a pair: (inputs, rank) and (rank, outputs)

_CURE = "export the base again with pitstop export, or ask its publisher"
# Settings of onnxruntime-genai: what is not here loads libraries, other graphs or other hardware's drivers.
_SETTINGS = {"model", "search"}
_MODEL = {"bos_token_id", "context_length", "decoder", "eos_token_id", "pad_token_id", "type", "vocab_size"}
_DECODER = {
    "filename", "head_size", "hidden_size", "inputs", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "outputs", "session_options", "sliding_window",
}  # fmt: skip
_SESSION = {"log_id", "provider_options"}


@dataclass(frozen=True)
class Site:
    """A projection that adapters may add to."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Decoder:
    """What the settings of a model say of it."""

    context_length: int  # tokens
    vocabulary_size: int
    kv_bytes: int  # of one token, in 32-bit floats
    end_tokens: frozenset[int]


def sites(graph: OnnxGraphHeader) -> dict[str, Site]:
    """Return what adapters of this graph may change, by name."""
    found = {}
    for name, a in graph.inputs.items():
        site = name.removesuffix(A)
        b = graph.inputs.get(site + B)
        if site == name or b is None or not a.type == b.type == FLOAT32 or not len(a.shape) == len(b.shape) == 2:
            continue
        (columns, rank), (rank_b, rows) = a.shape, b.shape
        fixed = isinstance(columns, int) and isinstance(rows, int) and isinstance(rank, str) and rank == rank_b
        if fixed and a.default == (columns, 0) and b.default == (0, rows):
            found[site] = Site(int(columns), int(rows))
    return found


def locate(graph: OnnxGraphHeader) -> dict[str, Path]:
    """Return where the other files of a model are: beside the graph, under their names or their digests.

    Raises:
        FormatError: one is missing or shorter than the graph says, or the graph names none.
    """
    if CONFIG_FILE not in graph.files:
        _broken(graph, f"does not name its {CONFIG_FILE} ({FILES_KEY} in its metadata)")
    found = {}
    for name, digest in graph.files.items():
        beside = [graph.path.parent / digest, graph.path.parent / name]
        path = next((path for path in beside if path.is_file()), None)
        if path is None:
            _broken(graph, f"needs {name}, which is not beside it")
        found[name] = path
    for one in graph.external:
        if one.offset + one.length > regular_size(found[one.file]):
            _broken(graph, f"has weights beyond the end of {one.file}")
    return found


def parts(graph: OnnxGraphHeader) -> dict[Artifact, Path]:
    """Return the other files of a model as artifacts of a bundle, with where they are.

    Raises:
        FormatError: as `locate`.
    """
    return {
        Artifact("part", "onnx", "", name, graph.files[name], path.stat().st_size): path
        for name, path in locate(graph).items()
    }


def check_files(graph: OnnxGraphHeader) -> None:
    """Hash the files of a model.

    Raises:
        FormatError: as `locate`.
        Untrusted: one is not what the graph names.
    """
    for name, path in locate(graph).items():
        with open_verified(path, graph.files[name]):
            pass


def read_settings(graph: OnnxGraphHeader, path: Path) -> Decoder:
    """Read the settings of onnxruntime-genai, and refuse those that reach beyond the model.

    Raises:
        FormatError: they cannot be read, lack something, or hold something that a plain decoder has no use for.
    """
    if regular_size(path) > MAX_CONFIG:
        _broken(graph, f"has a {CONFIG_FILE} of more than {MAX_CONFIG:,} bytes")
    try:
        settings = json.loads(path.read_bytes())
        model = settings["model"]
        decoder, ends = model["decoder"], model["eos_token_id"]
        _only_known(graph, settings)
        layers, heads, size = (decoder[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_size"))
        numbers = model["context_length"], model["vocab_size"], 2 * 4 * layers * heads * size
        ends = frozenset(ends if isinstance(ends, list) else [ends])
        if decoder["filename"] != GRAPH_FILE or not all(type(n) is int and 0 <= n < 1 << 31 for n in (*numbers, *ends)):
            _broken(graph, f"has a {CONFIG_FILE} whose numbers or file name cannot be")
        return Decoder(*numbers, ends)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{CONFIG_FILE} cannot be read: {error!r}", where=path, cure=_CURE) from error


def _only_known(graph: OnnxGraphHeader, settings: Mapping[str, Any]) -> None:
    decoder = settings["model"]["decoder"]
    session = decoder.get("session_options", {})
    parts = ((settings, _SETTINGS), (settings["model"], _MODEL), (decoder, _DECODER), (session, _SESSION))
    if unknown := sorted(key for part, known in parts for key in part.keys() - known):
        _broken(graph, f"has settings that a plain decoder has no use for: {', '.join(unknown)}")
    if session.get("provider_options"):
        _broken(graph, "asks for other hardware than the processor (provider_options)")


def check_onnx_merged(merged: OnnxGraphHeader, base: OnnxGraphHeader, base_sha256: str) -> None:
    """Refuse a graph that is not this very base with an adapter in its weights: it answers to the base's tokens.

    Raises:
        FormatError: a file of it is missing, or it has another tokenizer, vocabulary or shape of KV than the base.
        BaseMismatch: it was made from another base, or does not say from which.
    """
    check_base_sha256(merged.metadata.get(BASE_KEY), base_sha256, where=merged.path)
    if merged.files.get(TOKENIZER_FILE) != base.files.get(TOKENIZER_FILE):
        _broken(merged, "has another tokenizer than the base it was made from")
    made, known = (read_settings(graph, locate(graph)[CONFIG_FILE]) for graph in (merged, base))
    if made != known:
        _broken(merged, "has other settings than the base it was made from")


def check_onnx_adapter(adapter: OnnxAdapterHeader, graph: OnnxGraphHeader, base_sha256: str) -> None:
    """Refuse an `.onnx_adapter` file that is no LoRA for this very base.

    Raises:
        FormatError: it feeds something that is not for adapters, or a pair of it does not fit.
        BaseMismatch: it was trained on another base, or does not say on which.
    """
    check_base_sha256(adapter.base_sha256, base_sha256, where=adapter.path)
    known = sites(graph)
    shapes = {tensor.name: tensor.shape for tensor in adapter.tensors}
    for name in shapes:
        site = name.removesuffix(A).removesuffix(B)
        if site == name or site not in known:
            _refuse(adapter, f"feeds {name!r}, which is nothing an adapter of this base may change")
        if site + A not in shapes or site + B not in shapes:
            _refuse(adapter, f"has only one half of the pair for {site}")
        a, b, expected = shapes[site + A], shapes[site + B], known[site]
        if len(a) != 2 or len(b) != 2 or a[1] != b[0] or (a[0], b[1]) != (expected.inputs, expected.outputs):
            _refuse(
                adapter,
                f"has {a} and {b} for {site}, which takes ({expected.inputs}, rank) and (rank, {expected.outputs})",
            )


def _refuse(adapter: OnnxAdapterHeader, what: str) -> NoReturn:
    cure = "export the adapter again with pitstop export, or ship it merged: [export] delivery"
    raise FormatError(f"{adapter.path.name} {what}", where=adapter.path, cure=cure)


def _broken(graph: OnnxGraphHeader, what: str) -> NoReturn:
    raise FormatError(f"{graph.path.name} {what}", where=graph.path, cure=_CURE)
