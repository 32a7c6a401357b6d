"""A Hugging Face folder to an ONNX base that takes any adapter: built, opened for adapters, and sealed by digests."""

import json
import shutil
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir
from transformers import AutoConfig

from pitstop.bundle.binding import BASE_KEY
from pitstop.bundle.formats.onnx_graph import FILES_KEY
from pitstop.bundle.onnx import GRAPH_FILE
from pitstop.files import replacing, sha256_file
from pitstop.workshop.export.onnx.architecture import projections
from pitstop.workshop.export.onnx.blocks import quantize
from pitstop.workshop.export.onnx.builder import FUSED, build
from pitstop.workshop.export.onnx.packing import pack_gate_and_up
from pitstop.workshop.export.onnx.rows import add_first_row
from pitstop.workshop.export.onnx.sites import add_sites

WEIGHTS_FILE = "model.onnx.data"
INLINE = 1024  # bytes; smaller tensors stay in the graph itself


def build_base(folder: Path, target: Path, precision: str, *, merged_from: str | None = None) -> Path:
    """Write an ONNX base into ``target`` and return its graph, whose digest stands for all of its files.

    Args:
        folder: a Hugging Face folder with weights, config and tokenizer.
        precision: of its matrices: one of `PRECISIONS`.
        merged_from: digest of the base that an adapter was merged into. Such a model takes no adapters: the room for
            them would cost speed.

    Raises:
        MissingExtra, UsageError: the builder is not installed, or another version of it.
        BrokenInput: this model cannot be exported.
        StorageError: the disk refuses; ``target`` has no graph then.
    """
    config = AutoConfig.from_pretrained(folder)
    kind = precision.removesuffix(FUSED)
    fused = kind != precision or merged_from is not None
    projections(config)  # refuses what is no such decoder before anything is built
    target.mkdir(parents=True, exist_ok=True)
    (target / GRAPH_FILE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        built, opened = Path(scratch, "built"), Path(scratch, "opened")
        build(folder, built, kind, config, fuse_qkv=fused)
        opened.mkdir()
        model = ir.load(built / GRAPH_FILE)
        if fused:
            pack_gate_and_up(model.graph)
        if kind == "int8":
            quantize(model.graph)
        add_first_row(model.graph, config)
        if merged_from is None:
            add_sites(model.graph, config)
        ir.save(model, opened / GRAPH_FILE, external_data=WEIGHTS_FILE, size_threshold_bytes=INLINE)
        for file in built.iterdir():
            if file.is_file() and file.name not in (GRAPH_FILE, WEIGHTS_FILE):
                shutil.copyfile(file, opened / file.name)
        return _seal(opened, target, {} if merged_from is None else {BASE_KEY: merged_from})


def _seal(opened: Path, target: Path, metadata: dict[str, str]) -> Path:
    """Move the files to ``target``, the graph last, with the digests of the others in its metadata."""
    graph = onnx.load(opened / GRAPH_FILE, load_external_data=False)
    files = {}
    for file in sorted(opened.iterdir()):
        if file.name != GRAPH_FILE:
            files[file.name] = sha256_file(file)
            file.replace(target / file.name)
    onnx.helper.set_model_props(graph, {FILES_KEY: json.dumps(files)} | metadata)
    with replacing(target / GRAPH_FILE) as out:
        out.write(graph.SerializeToString(deterministic=True))
    return target / GRAPH_FILE
