"""Products of quantized weights: what our library computes, and that llama.cpp asks it."""

import ctypes
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pitstop.bundle.formats import read_gguf
from pitstop.engines.llama import matmul
from pitstop.files import sha256_file

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8  # ggml_type
BLOCK = 32


class Params(ctypes.Structure):
    _fields_ = (("thread", ctypes.c_int), ("threads", ctypes.c_int))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A copy, for the one that llama.cpp asks in this process is on or off as the engines want it."""
    path = matmul._compiled()
    if path is None:
        pytest.skip("no C compiler for x86-64 here")
    found = ctypes.CDLL(shutil.copy(path, tmp_path_factory.mktemp("products")))
    found.pitstop_matmul_runs_here.restype = found.llamafile_sgemm.restype = ctypes.c_bool
    if not found.pitstop_matmul_runs_here():
        pytest.skip("this processor has no AVX-512 VNNI")
    return found


def quantized(values: NDArray[np.float32], kind: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return rows as ggml's blocks, and what these stand for."""
    blocks = values.reshape(len(values), -1, BLOCK)
    largest = 127 if kind == Q8_0 else 7
    scales = (np.abs(blocks).max(-1, keepdims=True) / largest).astype(np.float16)
    wide = scales.astype(np.float64)
    whole = np.rint(np.divide(blocks, wide, where=wide > 0, out=np.zeros_like(blocks, np.float64))).astype(np.int8)
    if kind == Q8_0:
        packed = whole.view(np.uint8)
    else:
        nibbles = (whole + 8).astype(np.uint8)
        packed = nibbles[..., :16] | nibbles[..., 16:] << 4
    return np.concatenate((scales.view(np.uint8), packed), axis=-1), (whole * wide).reshape(values.shape)


def product(library: ctypes.CDLL, a: NDArray[np.generic], b: NDArray[np.generic], kinds: tuple[int, int], m: int,
            n: int, k: int, threads: int) -> NDArray[np.float32] | None:  # fmt: skip
    """Let every thread compute its share; None if the library hands the product on."""
    found = np.full((n, m), np.nan, np.float32)
    pointer = ctypes.c_void_p
    for thread in range(threads):
        params = Params(thread, threads)
        sizes = [ctypes.c_int64(size) for size in (m, n, k)]
        places = (a.ctypes.data, k), (b.ctypes.data, k), (found.ctypes.data, m)
        arrays = [one for at, stride in places for one in (pointer(at), ctypes.c_int64(stride))]
        if not library.llamafile_sgemm(ctypes.byref(params), *sizes, *arrays, *kinds, F32):
            return None
    return found


@pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=["Q8_0", "Q4_0"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_quantized_products_are_those_of_the_blocks(library: ctypes.CDLL, kind: int, data: st.DataObject) -> None:
    strips, n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(8, 40)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    a, weights = quantized(rng.standard_normal((16 * strips, k * BLOCK), np.float32), kind)
    b, columns = quantized(rng.standard_normal((n, k * BLOCK), np.float32) * rng.uniform(0, 9), Q8_0)
    library.pitstop_matmul_use(True)
    found = product(library, a, b, (kind, Q8_0), 16 * strips, n, k, data.draw(st.integers(1, 4)))
    wanted = columns @ weights.T
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_products_of_an_adapter_are_those_of_its_halves(library: ctypes.CDLL, data: st.DataObject) -> None:
    strips, n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(8, 40)), data.draw(st.integers(1, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    a = rng.standard_normal((16 * strips, k), np.float32).astype(np.float16)
    b = rng.standard_normal((n, k), np.float32)
    library.pitstop_matmul_use(True)
    found = product(library, a, b, (F16, F32), 16 * strips, n, k, data.draw(st.integers(1, 4)))
    assert found is not None
    np.testing.assert_allclose(found, b @ a.astype(np.float32).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kinds", "m", "n", "on"),
    [
        pytest.param((Q8_0, Q8_0), 16, 7, True, id="few columns"),
        pytest.param((Q8_0, Q8_0), 24, 16, True, id="rows that fill no strip"),
        pytest.param((F32, F32), 16, 16, True, id="other types"),
        pytest.param((Q8_0, Q8_0), 16, 16, False, id="switched off"),
    ],
)
def test_what_it_has_no_product_for_it_hands_on(
    library: ctypes.CDLL, kinds: tuple[int, int], m: int, n: int, on: bool
) -> None:
    library.pitstop_matmul_use(on)
    assert product(library, np.zeros((m, 34), np.uint8), np.zeros((n, 34), np.uint8), kinds, m, n, 1, 1) is None


def test_it_is_for_bases_of_its_types(smollm2_gguf: Path) -> None:
    header = read_gguf(smollm2_gguf)  # in Q4_1
    kinds = {"Q4_1": False, "Q8_0": True, "Q4_0": True, "F16": False}
    for kind, wanted in kinds.items():
        tensors = tuple(replace(one, type=kind) if one.type == "Q4_1" else one for one in header.tensors)
        assert matmul.multiplies(replace(header, tensors=tensors)) is wanted


IN_A_PROCESS = """
import json, sys
from pathlib import Path
import numpy as np
from pitstop.engines.base import PLAIN_BASE, Sampling, Use
from pitstop.engines.llama import LlamaEngine, products

base, sha256, adapter = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
found = {"possible": products() is not None, "kl": {}, "counts": []}
engines = [LlamaEngine(base, base_sha256=sha256, context_length=256, sequences=8, threads=1, own_products=own)
           for own in (False, True)]
text = engines[0].tokenize("A river rises in the hills, runs through the valley and ends in the sea. " * 12)[:200]
for name, use in (("base", PLAIN_BASE), ("adapter", Use("one"))):
    logs = []
    for engine in engines:
        if use.adapter:
            engine.load_adapter("one", adapter)
        logits = next(engine.logits_batch([text], use, firsts=[0])).astype(np.float64)
        logs.append(logits - logits.max(-1, keepdims=True))
        logs[-1] -= np.log(np.exp(logs[-1]).sum(-1, keepdims=True))
        found["counts"].append(products().count if found["possible"] else 0)
    found["kl"][name] = float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())
found["names"] = [engine.name for engine in engines]
answers = engines[1].generate_batch([text[:40 + at] for at in range(8)], PLAIN_BASE, Sampling(max_tokens=4))
found["answers"] = len(answers)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_llama_cpp_asks_it_and_predicts_the_same(
    library: ctypes.CDLL, smollm2_gguf: Path, make_adapter, tmp_path: Path, precision: str
) -> None:
    """In a process of its own, for it must be loaded before llama.cpp is."""
    script, base = tmp_path / "here.py", tmp_path / "base.gguf"
    script.write_text(IN_A_PROCESS)
    pytest.importorskip("llama_cpp", reason="the llama part is not installed")
    from pitstop.engines.llama import quantize

    quantize(smollm2_gguf, base, precision)
    sha256 = sha256_file(base)
    adapter = make_adapter(tmp_path / "adapter.gguf", 1, rank=16, strength=0.05, base_sha256=sha256)
    done = subprocess.run([sys.executable, script, base, sha256, adapter], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["possible"]
    assert found["names"] == ["llama", matmul.NAME]
    plain, ours, still_ours, more = found["counts"]
    assert plain == 0 < ours == still_ours < more  # an engine that was not opened with it computes without it
    # Rounding activations to int8 turns last bits of a float into 0.001 nats: see f16_gguf in conftest.
    assert max(found["kl"].values()) < 0.01
    assert found["answers"] == 8
