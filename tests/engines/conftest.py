"""Real engines over one real model, and the same small random adapters in the format of each."""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from onnx_files import write_onnx_adapter
from pitstop.bundle.binding import BASE_KEY
from pitstop.bundle.formats import GgufHeader, read_gguf
from pitstop.demo.smollm2 import SHA256
from pitstop.engines import sessions
from pitstop.engines.base import Engine
from pitstop.engines.llama import LlamaEngine
from pitstop.files import sha256_file

CONTEXT = 256  # tokens of a conversation
HEADS = 9  # GGUF keeps the rows of a Llama's query heads in pairs (i, i + half), HF in halves
LAYERS = (3, 11, 20)
MODULES = {"attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}  # GGUF: HF

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def random_pairs(smollm2_gguf: Path) -> Callable[..., Pairs]:
    """Make A (rank, in) and B (out, rank) for a few modules of the base, by GGUF name."""
    header: GgufHeader = read_gguf(smollm2_gguf)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}

    def make(rank: int, seed: int, size: float, modules: Collection[str] = MODULES) -> Pairs:
        random = np.random.default_rng(seed)
        pairs = {}
        for name in (f"blk.{layer}.{module}.weight" for layer in LAYERS for module in modules):
            rows, columns = shapes[name]
            a = random.standard_normal((rank, rows)) / np.sqrt(rows)
            b = random.standard_normal((columns, rank)) * size
            pairs[name] = a.astype(np.float32), b.astype(np.float32)
        return pairs

    return make


def halves_of(b: np.ndarray) -> np.ndarray:
    """Return B of the queries with its rows as HF and ONNX have them."""
    return b.reshape(HEADS, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


@pytest.fixture(scope="session")
def gguf_adapter(random_pairs: Callable[..., Pairs], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Write a random GGUF LoRA; its effect grows with ``size``, 0 is none."""

    def make(
        rank: int = 8,
        seed: int = 1,
        size: float = 1.0,
        base_sha256: str | None = SHA256,
        modules: Collection[str] = MODULES,
        invocation: Sequence[int] = (),
    ) -> Path:
        path = tmp_path_factory.mktemp("gguf") / f"r{rank}s{seed}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)
        if base_sha256 is not None:
            writer.add_string(BASE_KEY, base_sha256)
        if invocation:
            key, kinds = "adapter.alora.invocation_tokens", (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
            writer.add_key_value(key, list(invocation), kinds[0], sub_type=kinds[1])
        for name, (a, b) in random_pairs(rank, seed, size, modules).items():
            writer.add_tensor(f"{name}.lora_a", a)
            writer.add_tensor(f"{name}.lora_b", b)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@pytest.fixture(scope="session")
def torch_parts(smollm2_gguf: Path) -> tuple[Any, Any]:
    """The weights of the GGUF file dequantized to float32, and its tokenizer."""
    torch = pytest.importorskip("torch", reason="the workshop part is not installed")
    transformers = pytest.importorskip("transformers", reason="the workshop part is not installed")
    folder, file = smollm2_gguf.parent, smollm2_gguf.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


@pytest.fixture(scope="session")
def peft_adapter(random_pairs: Callable[..., Pairs], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Write the very adapter of `gguf_adapter` as a PEFT folder."""
    peft = pytest.importorskip("peft", reason="the workshop part is not installed")
    save_file = pytest.importorskip("safetensors.numpy", reason="the workshop part is not installed").save_file

    def make(
        rank: int = 8,
        seed: int = 1,
        size: float = 1.0,
        base_sha256: str | None = SHA256,
        invocation: Sequence[int] | None = None,
    ) -> Path:
        folder = tmp_path_factory.mktemp("peft")
        modules = [name.split(".")[1] for name in MODULES.values()]
        peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=modules,
            layers_to_transform=list(LAYERS),
            task_type="CAUSAL_LM",
            alora_invocation_tokens=invocation,
        ).save_pretrained(str(folder))
        weights = {}
        for name, (a, b) in random_pairs(rank, seed, size).items():
            _, layer, module, _ = name.split(".")
            if module == "attn_q":
                b = halves_of(b)
            place = f"base_model.model.model.layers.{layer}.{MODULES[module]}"
            weights |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
        save_file(weights, folder / "adapter_model.safetensors")
        if base_sha256 is not None:
            (folder / "pitstop.json").write_text(json.dumps({"base_sha256": base_sha256, "name": "random"}))
        return folder

    return make


@pytest.fixture(scope="session")
def open_llama(f16_gguf: Path) -> Iterator[Callable[..., Any]]:
    """Open a llama engine of any kind; it is closed at the end."""
    opened: list[LlamaEngine] = []

    def make(
        kind: type[LlamaEngine] = LlamaEngine, *, sequences: int = 3, path: Path = f16_gguf, **options: Any
    ) -> LlamaEngine:
        options = {"context_length": CONTEXT, "sequences": sequences, "threads": 1, **options}
        engine = kind(path, base_sha256=SHA256, **options)
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture(scope="session")
def onnx_adapter(
    random_pairs: Callable[..., Pairs], onnx_graph: Path, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Write the very adapter of `gguf_adapter` as an `.onnx_adapter` file."""
    own = sha256_file(onnx_graph)

    def make(
        rank: int = 8,
        seed: int = 1,
        size: float = 1.0,
        base_sha256: str | None = own,
        modules: Collection[str] = MODULES,
        invocation: Sequence[int] = (),
        kind: type = np.float32,
    ) -> Path:
        path = tmp_path_factory.mktemp("onnx") / f"r{rank}s{seed}.onnx_adapter"
        tensors = {}
        for name, (a, b) in random_pairs(rank, seed, size, modules).items():
            _, layer, module, _ = name.split(".")
            site = f"lora.{layer}.{MODULES[module].removeprefix('self_')}"
            b = halves_of(b) if module == "attn_q" else b
            tensors |= {f"{site}.A": a.T.astype(kind), f"{site}.B": b.T.astype(kind)}
        write_onnx_adapter(path, tensors, base_sha256, invocation)
        return path

    return make


@pytest.fixture(scope="session")
def open_onnx(onnx_graph: Path) -> Iterator[Callable[..., Any]]:
    """Open an ONNX engine of any kind; it is closed at the end."""
    from pitstop.engines.onnx import OnnxEngine

    opened: list[Engine] = []

    def make(kind: type[Engine] = OnnxEngine, *, sequences: int = 3, **options: Any) -> Engine:
        options = {"context_length": CONTEXT, "sequences": sequences, "threads": 1, **options}
        engine = kind(onnx_graph, base_sha256=sha256_file(onnx_graph), **options)
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture(scope="session")
def shared_onnx(open_onnx: Callable[..., Any]) -> Engine:
    return open_onnx()


@pytest.fixture
def onnx(shared_onnx: Engine) -> Iterator[Engine]:
    """An ONNX engine, opened once for all tests; its adapters are taken out after each."""
    yield shared_onnx
    for name in shared_onnx.adapters:
        shared_onnx.unload_adapter(name)


@pytest.fixture(scope="session")
def shared_llama(open_llama: Callable[..., Any]) -> LlamaEngine:
    return open_llama()


@pytest.fixture
def llama(shared_llama: LlamaEngine) -> Iterator[LlamaEngine]:
    """A llama engine, opened once for all tests; its adapters are taken out after each."""
    yield shared_llama
    for name in shared_llama.adapters:
        shared_llama.unload_adapter(name)


@pytest.fixture
def torch_engine(torch_parts: tuple[Any, Any]) -> Iterator[Engine]:
    from pitstop.engines.torch import TorchEngine

    with TorchEngine(*torch_parts, base_sha256=SHA256, context_length=CONTEXT) as engine:
        yield engine


@pytest.fixture(params=["llama", "onnx", pytest.param("torch_engine", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def adapter(engine: Engine, request: pytest.FixtureRequest) -> Make:
    """Write an adapter for the engine under test."""
    return request.getfixturevalue({"llama": "gguf_adapter", "onnx": "onnx_adapter"}.get(engine.name, "peft_adapter"))


@pytest.fixture
def cold(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Callable[[], Engine]]:
    """Open an engine of the same kind that has seen nothing; the torch engine keeps nothing between requests."""
    opened: list[Engine] = []

    def make() -> Engine:
        if engine.name == "torch":
            return engine
        opened.append(request.getfixturevalue(f"open_{engine.name}")(sequences=1))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def kv_found_by_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV is found whatever it was computed under, as other runtimes do it."""
    common, continues = sessions.common_prefix, sessions._continues
    monkeypatch.setattr(sessions, "common_prefix", lambda held, tag, tokens: common(held, held.tag or tag, tokens))
    monkeypatch.setattr(sessions, "_continues", lambda held, tag, *rest: continues(held, held.tag or tag, *rest))
