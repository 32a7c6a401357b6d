"""A GGUF file, a Hugging Face folder or a hub id to a prepared base: `bases/<name>/`.

base.json            BaseRef: digests, licence, source, chat template
source.gguf          the weights as they came, when they came as GGUF
hf/                  the same weights for training libraries, with tokenizer and config
gguf/<quant>.gguf    what devices run, quantized by the installed llama.cpp
onnx/<precision>/    the same for ONNX Runtime: a graph that takes any adapter, and the files it names by digest
shipped/<quant>/     the same, dequantized once for training
"""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from pitstop import records
from pitstop.bundle.formats import read_gguf, read_onnx_graph
from pitstop.bundle.manifest import Artifact, BaseRef, Prompting
from pitstop.bundle.onnx import check_files, locate
from pitstop.engines.llama import quantize
from pitstop.errors import BrokenInput, UsageError
from pitstop.files import sha256_file, write_bytes
from pitstop.workshop.export import llamacpp
from pitstop.workshop.export.onnx import PRECISIONS, build_base, load_shipped
from pitstop.workshop.runs import exclusive
from pitstop.workshop.tokens import check_tokens
from pitstop.workshop.training import frozen
from pitstop.workshop.training.arithmetic import STORED, compute_dtype

BASE_FILE = "base.json"
SENTENCEPIECE = "tokenizer.model"

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's way to ask


def prepare(
    source: str,
    folder: Path,
    *,
    precisions: Sequence[str] = ("q8_0",),
    onnx: Sequence[str] = (),
    license: str = "unknown",
    origin: str | None = None,
) -> BaseRef:
    """Make a base folder out of a GGUF file, a Hugging Face folder or a hub id; what is there already is kept.

    Args:
        precisions: of GGUF files, as llama.cpp names them.
        onnx: precisions of ONNX bases: of `PRECISIONS`.

    Raises:
        UsageError: the source does not exist, the folder holds another base, or there is no such precision.
        FormatError: a damaged GGUF file.
        BrokenInput: weights that cannot be read or converted, or a GGUF file that cuts text into other tokens.
    """
    with exclusive(folder, wait=True):
        return _prepare(source, folder, precisions, onnx, license, origin)


def _prepare(
    source: str, folder: Path, precisions: Sequence[str], onnx: Sequence[str], license: str, origin: str | None
) -> BaseRef:
    path = Path(source)
    known = _known(folder)
    if known is None:
        is_file = path.suffix == ".gguf" or path.is_file()
        known = _from_gguf(path, folder) if is_file else _from_hugging_face(source, folder)
        known = replace(known, name=folder.name, license=license, source=origin or source)
    elif path.is_file() and sha256_file(path) != known.weights_sha256:
        raise UsageError(
            f"{folder} holds another base than {source}", where=folder / BASE_FILE, cure="name another folder with --to"
        )
    for precision in precisions:
        known = _with_gguf(known, folder, precision)
    for precision in onnx:
        known = _with_onnx(known, folder, precision)
    records.save_json(known, folder / BASE_FILE)
    return known


def load_ref(folder: Path) -> BaseRef:
    """Read a prepared base's `base.json`.

    Raises:
        UsageError: the folder is no prepared base.
        RecordError: `base.json` is damaged.
    """
    if not (folder / BASE_FILE).is_file():
        raise UsageError(f"{folder} is no prepared base", cure=f"make it: pitstop base SOURCE --to {folder}")
    return records.load_json(BaseRef, folder / BASE_FILE)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer."""
    return AutoTokenizer.from_pretrained(folder / "hf")


def load_weights(folder: Path, ref: BaseRef, *, precision: str, artifact: str, kept: str = "auto") -> PreTrainedModel:
    """Load the frozen weights to train on: `shipped` (the artifact's), `nf4` (QLoRA) or `bf16` (as the base came).

    Matrices hold bfloat16 values on every device: within 1.3e-3 (relative) of the shipped weights, far below what
    quantizing costs. Where the processor has no instructions for them, they stand in float32 (`arithmetic`).

    Args:
        kept: "dequantized", "blocks" (a layer's weights are made when it computes), or "auto": what memory allows.

    Raises:
        RecordError: the base has no such artifact.
        UsageError: its blocks are asked for, and it is no GGUF file.
        BrokenInput: the artifact is not the one `base.json` names.
    """
    device_map = "auto" if torch.cuda.is_available() else None
    common: dict[str, Any] = {"dtype": compute_dtype(), "device_map": device_map}
    if precision == "bf16":
        return AutoModelForCausalLM.from_pretrained(folder / "hf", **common)
    dequantized = kept == "dequantized" or (kept == "auto" and frozen.fits(AutoConfig.from_pretrained(folder / "hf")))
    if precision == "nf4":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(),
        )
        model = AutoModelForCausalLM.from_pretrained(folder / "hf", quantization_config=nf4, **common)
        frozen.release_nf4(model, dequantized=dequantized)
        return model
    is_onnx = ref.artifact(artifact).format == "onnx"
    if is_onnx and kept == "blocks":
        raise UsageError(f"the blocks of {artifact} cannot be trained on as they are", cure='set [base] kept = "auto"')
    source = _dequantized(folder, ref, artifact)
    if dequantized or is_onnx:
        return AutoModelForCausalLM.from_pretrained(source, **common)
    return frozen.load_blocks(source, artifact_path(folder, ref, artifact))


def artifact_path(folder: Path, ref: BaseRef, precision: str) -> Path:
    """Return the checked path of a base artifact; of an ONNX base its graph, with all files that it names.

    Raises:
        RecordError: the base has no artifact of this precision.
        BrokenInput: a file is not the one that was made.
    """
    artifact = ref.artifact(precision)
    path = folder / "onnx" / precision / artifact.name if artifact.format == "onnx" else folder / "gguf" / artifact.name
    if sha256_file(path) != artifact.sha256:
        raise BrokenInput(
            f"{path.name} is not the file {BASE_FILE} names", where=path, cure=f"remove {folder} and prepare it again"
        )
    if artifact.format == "onnx":
        check_files(read_onnx_graph(path))
    return path


def bytes_of(folder: Path, artifact: Artifact) -> int:
    """Return the size of a base artifact; of an ONNX base, of all its files."""
    if artifact.format != "onnx":
        return artifact.size
    graph = read_onnx_graph(folder / "onnx" / artifact.precision / artifact.name)
    return artifact.size + sum(path.stat().st_size for path in locate(graph).values())


def _dequantized(folder: Path, ref: BaseRef, precision: str) -> Path:
    """Return the folder of an artifact's dequantized weights, made once: reading GGUF blocks takes 8 s at 135M."""
    source = artifact_path(folder, ref, precision)
    target = folder / "shipped" / precision
    done = target / "artifact.sha256"
    with exclusive(target, wait=True):  # the processes of one training, and trainings side by side, share it
        if not done.is_file() or done.read_text() != ref.artifact(precision).sha256:
            if ref.artifact(precision).format == "onnx":
                model = load_shipped(folder / "hf", source, STORED)
            else:
                model = _read_gguf_weights(source, STORED)
            model.save_pretrained(target, max_shard_size="1000GB")
            write_bytes(done, ref.artifact(precision).sha256.encode())
    return target


def _read_gguf_weights(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )


def _known(folder: Path) -> BaseRef | None:
    return records.load_json(BaseRef, folder / BASE_FILE) if (folder / BASE_FILE).is_file() else None


def _from_gguf(path: Path, folder: Path) -> BaseRef:
    if not path.is_file():
        raise UsageError(f"no file {path}", cure="give the path of a GGUF file, a Hugging Face folder or a hub id")
    read_gguf(path)
    kept = folder / "source.gguf"
    shutil.copyfile(path, kept)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=kept.name)
    save_hugging_face(_read_gguf_weights(kept, STORED), tokenizer, folder)
    return _describe(folder, weights=kept)


def _from_hugging_face(source: str, folder: Path) -> BaseRef:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=STORED, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load {source}: {str(error).splitlines()[0]}",
            cure="give a GGUF file, a folder with config.json and safetensors, or a hub id (needs internet)",
        ) from error
    save_hugging_face(model, tokenizer, folder)
    return _describe(folder, weights=folder / "hf" / "model.safetensors")


def save_hugging_face(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `hf/` in a folder: one safetensors file, config and tokenizer; it appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "hf"
        model.save_pretrained(made, max_shard_size="1000GB")
        tokenizer.save_pretrained(made)
        _keep_sentencepiece(tokenizer, made)
        shutil.rmtree(folder / "hf", ignore_errors=True)
        made.rename(folder / "hf")


def _keep_sentencepiece(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Add to a saved tokenizer the SentencePiece model it was read from, and which tokens are special.

    llama.cpp's converters read both, for Gemma nothing else, and transformers has left both out since its version 5.
    """
    try:
        source = cached_file(tokenizer.name_or_path, SENTENCEPIECE)
    except OSError:  # it came without one
        source = None
    if source is None:
        return
    shutil.copyfile(source, folder / SENTENCEPIECE)
    config = folder / "tokenizer_config.json"
    added = {str(number): token.__getstate__() for number, token in tokenizer.added_tokens_decoder.items()}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"added_tokens_decoder": added}, indent=2))


def _describe(folder: Path, weights: Path) -> BaseRef:
    tokenizer = load_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder / "hf")
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise BrokenInput(
            "this base has no chat template", where=folder, cure="use an instruction-tuned model, or add a template"
        )
    prompting = Prompting(
        chat_template=template, bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or ""
    )
    return BaseRef(
        name=folder.name,
        architecture=config.model_type,
        license="unknown",
        source="",
        weights_sha256=sha256_file(weights),
        tokenizer_sha256=sha256_file(folder / "hf" / "tokenizer.json"),
        template_sha256=hashlib.sha256(template.encode()).hexdigest(),
        prompting=prompting,
        context_length=config.max_position_embeddings,
    )


def _with_gguf(ref: BaseRef, folder: Path, precision: str) -> BaseRef:
    if any(artifact.precision == precision for artifact in ref.artifacts):
        artifact_path(folder, ref, precision)
        return ref
    target = folder / "gguf" / f"{precision}.gguf"
    target.parent.mkdir(exist_ok=True)
    source = folder / "source.gguf"
    if source.is_file():
        quantize(source, target, precision)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            full = Path(scratch) / "full.gguf"
            llamacpp.convert_model(folder / "hf", full)
            quantize(full, target, precision)
    check_tokens(load_tokenizer(folder), ref.prompting, target)
    artifact = Artifact("base", "gguf", precision, target.name, sha256_file(target), target.stat().st_size)
    return replace(ref, artifacts=(*ref.artifacts, artifact))


def _with_onnx(ref: BaseRef, folder: Path, precision: str) -> BaseRef:
    if any(artifact.precision == precision for artifact in ref.artifacts):
        artifact_path(folder, ref, precision)
        return ref
    if precision not in PRECISIONS:
        raise UsageError(f"no ONNX precision {precision!r}", cure=f"choose of {', '.join(PRECISIONS)}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = folder / "hf"
        if precision.startswith("int8") and any(artifact.precision == "q8_0" for artifact in ref.artifacts):
            # The very weights of the GGUF: an adapter that was trained on them is at home here too.
            weights = _read_gguf_weights(artifact_path(folder, ref, "q8_0"), torch.float32)
            save_hugging_face(weights, load_tokenizer(folder), Path(scratch))
            source = Path(scratch) / "hf"
        graph = build_base(source, folder / "onnx" / precision, precision)
    artifact = Artifact("base", "onnx", precision, graph.name, sha256_file(graph), graph.stat().st_size)
    return replace(ref, artifacts=(*ref.artifacts, artifact))
