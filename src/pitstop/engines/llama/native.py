"""llama.cpp as a few Python objects: the library, a model, a context with streams of KV. Pointers and batches only."""

import ctypes
import importlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pitstop.engines.base import Logits
from pitstop.engines.llama.matmul import Products, use_products
from pitstop.errors import FormatError, MissingExtra, StorageError, UsageError

BATCH = 512  # tokens evaluated at once
OUTPUTS = 128  # of them with logits; bounds llama.cpp's buffer, which is OUTPUTS x vocabulary x 4 bytes

_ERROR, _CONTINUED = 4, 5  # levels of ggml.h; the comment in llama_cpp's own logger is out of date
_log: deque[str] = deque(maxlen=8)  # the last error lines
_log_open = False  # the line before was an error: what continues it is one too


@lru_cache(maxsize=1)
def library() -> Any:
    """Import llama_cpp and take over its log.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        found: Any = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise MissingExtra("running a GGUF model", "llama") from error
    # ctypes does not keep the callback alive: the library object must, as long as llama.cpp may call it.
    found.pitstop_log = found.llama_log_callback(_on_log)
    found.llama_log_set(found.pitstop_log, ctypes.c_void_p(0))
    found.llama_backend_init()
    return found


def _on_log(level: int, text: bytes, _: Any) -> None:
    global _log_open
    if level != _CONTINUED:
        _log_open = level == _ERROR
    if _log_open:
        _log.append(text.decode(errors="replace").strip())


def forget_reasons() -> None:
    """Forget what llama.cpp complained of before the call that comes now."""
    _log.clear()


def reason() -> str:
    """Return llama.cpp's own words on what just failed."""
    lines = [line for line in _log if line]
    _log.clear()
    return "; ".join(lines) or "it gives no reason"


@contextmanager
def _c_file(file: IO[bytes]) -> Iterator[ctypes.c_void_p]:
    """Give llama.cpp an open file from its beginning, as the FILE* it reads from."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fdopen.restype, libc.fdopen.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_char_p)
    libc.fclose.argtypes = (ctypes.c_void_p,)
    descriptor = os.dup(file.fileno())
    os.lseek(descriptor, 0, os.SEEK_SET)
    stream = libc.fdopen(descriptor, b"rb")
    if not stream:
        os.close(descriptor)
        raise StorageError(f"cannot read {file.name}: {os.strerror(ctypes.get_errno())}", where=file.name)
    try:
        yield ctypes.c_void_p(stream)
    finally:
        libc.fclose(stream)


@dataclass(frozen=True)
class Part:
    """Tokens of one sequence, to be evaluated with those of others; logits for the last ``outputs`` of them."""

    sequence: int
    position: int  # of the first token, in the sequence
    tokens: Sequence[int]
    outputs: int


class Model:
    """Weights, vocabulary and adapters."""

    def __init__(
        self,
        path: Path,
        file: IO[bytes] | None = None,
        *,
        products: Products | None = None,
        vocab_only: bool = False,
    ) -> None:
        """Map a model file.

        Args:
            file: the file, if it is open already: what is mapped is this one, whatever has taken its name since.
            products: what computes with the weights, instead of llama.cpp itself.
            vocab_only: leave the weights out: a model that can only tokenize.

        Raises:
            MissingExtra: llama-cpp-python is not installed.
            FormatError: llama.cpp refuses the file.
        """
        self.llama = library()
        forget_reasons()
        params = self.llama.llama_model_default_params()
        params.load_mode = self.llama.LLAMA_LOAD_MODE_MMAP
        params.vocab_only = vocab_only
        self.products = products
        params.use_extra_bufts = products is None  # else llama.cpp lays out some weights in its own way
        name = os.fsencode(path) if file is None else f"/dev/fd/{file.fileno()}".encode()
        self.pointer = self.llama.llama_model_load_from_file(name, params)
        if not self.pointer:
            raise FormatError(f"llama.cpp cannot load {path.name}: {reason()}", where=path)
        self.vocabulary = self.llama.llama_model_get_vocab(self.pointer)
        self.vocabulary_size: int = self.llama.llama_vocab_n_tokens(self.vocabulary)
        self.trained_length: int = self.llama.llama_model_n_ctx_train(self.pointer)  # tokens

    def load_adapter(self, path: Path, file: IO[bytes]) -> Any:
        """Return the pointer of an adapter that was loaded from an open file.

        What an attached adapter costs a token, measured with SmolLM2-135M in Q4_0 (4.3 ms without one), r=16 on every
        linear layer, on an x86 core with AVX-512:

            A, B        f16, f16   f32, f32   f16, f32   B of r=32 in f16   of r=64 in f16
            1 thread    +2.3 ms    +1.3 ms    +1.2 ms    +3.7 ms            +1.9 ms
            2 threads   +2.3 ms    +2.2 ms    +2.3 ms

        It is four nodes of the graph for each of 210 matrices: A x, B times that, the scale, the sum. Two threads wait
        for each other after each, so they are no faster than one, which pays for arithmetic instead: ggml takes rows
        of B, as long as the rank, in steps of 64 and what is left over number by number, in f16 at twice the price of
        f32. Hence r=32 costs more than r=64, and B in f32 is worth more than anything else the C API leaves to choose.

        Raises:
            FormatError: llama.cpp refuses it.
        """
        forget_reasons()
        with _c_file(file) as stream:
            pointer = self.llama.llama_adapter_lora_init_from_file_ptr(self.pointer, stream)
        if not pointer:
            raise FormatError(f"llama.cpp cannot load {path.name}: {reason()}", where=path)
        return pointer

    def free_adapter(self, pointer: Any) -> None:
        self.llama.llama_adapter_lora_free(pointer)

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode(errors="replace")
        room = len(raw) + 8
        tokens = (self.llama.llama_token * room)()
        count = self.llama.llama_tokenize(self.vocabulary, raw, len(raw), tokens, room, False, True)
        return list(tokens[: max(count, 0)])

    def text_of(self, token: int, *, special: bool = False) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self.llama.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def ends(self, token: int) -> bool:
        return bool(self.llama.llama_vocab_is_eog(self.vocabulary, token))

    def free(self) -> None:
        self.llama.llama_model_free(self.pointer)  # and the adapters that are still loaded


class Context:
    """Streams of KV over a model, and the one batch they are evaluated by."""

    def __init__(
        self, model: Model, context_length: int, sequences: int, *, unified: bool = False, outputs: int = OUTPUTS
    ) -> None:
        """Open a context.

        Args:
            unified: all sequences share ``context_length`` tokens, and a token may belong to several of them.
            outputs: tokens of one evaluation that logits may be wanted for.

        Raises:
            UsageError: there is no memory for it.
        """
        self.llama = model.llama
        self.vocabulary_size = model.vocabulary_size
        self._own_products = model.products is not None
        params = self.llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context_length * (1 if unified else sequences), sequences
        params.n_batch = params.n_ubatch = BATCH
        params.n_outputs_max = max(outputs, sequences)
        params.n_threads = params.n_threads_batch = self._threads = 1
        # A stream of KV per sequence: in a unified cache every token also attends (masked) to the cells of all others.
        params.kv_unified = unified
        # Flash attention is on wherever llama.cpp has it, for its graph has fewer nodes: SmolLM2-135M in Q4_0 decodes
        # 267 tokens/s instead of 210 (after 512 tokens 186 instead of 159) and reads 1,696 instead of 1,349. A CPU
        # rounds it otherwise for 64 tokens of a conversation at once than for fewer, and for one token beyond 512 by
        # the number of threads. That moves logits of f16 weights by 0.2 at most; without it, one token against many
        # moves them by 0.1. In Q8_0 these are 2.8 and 1.9 (mean KL 0.0013 and 0.0012), for activations are rounded to
        # int8: an answer in other portions differs as much with it as without.
        # A sliding window's cache forgets what it slid over; cutting a sequence back would then answer from holes.
        params.swa_full = True
        self.pointer = self.llama.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise UsageError(
                f"no context for {sequences} sequences of {context_length} tokens: {reason()}",
                cure="open the engine with fewer sequences or a shorter context",
            )
        self.memory = self.llama.llama_get_memory(self.pointer)
        self._prepare_batch()

    def _prepare_batch(self) -> None:
        # Every token belongs to one sequence: its list of sequences is the one number at its own place.
        self._token, self._position = np.zeros(BATCH, np.int32), np.zeros(BATCH, np.int32)
        self._sequence, self._counts = np.zeros(BATCH, np.int32), np.ones(BATCH, np.int32)
        self._output = np.zeros(BATCH, np.int8)
        first = self._sequence.ctypes.data
        self._pointers = np.arange(first, first + 4 * BATCH, 4).astype(np.uintp)
        arrays: dict[str, Any] = {"token": self._token, "pos": self._position, "n_seq_id": self._counts}
        arrays |= {"seq_id": self._pointers, "logits": self._output}
        self._batch = self.llama.llama_batch()
        for name, kind in self.llama.llama_batch._fields_:
            if name in arrays:
                setattr(self._batch, name, ctypes.cast(arrays[name].ctypes.data, kind))

    def decode(self, parts: Sequence[Part], threads: int) -> int:
        """Evaluate up to BATCH tokens of one or several sequences, all under the adapter that is set; 0 is success."""
        end = 0
        for part in parts:
            begin, end = end, end + len(part.tokens)
            self._token[begin:end] = part.tokens
            self._position[begin:end] = np.arange(part.position, part.position + end - begin)
            self._sequence[begin:end] = part.sequence
            self._output[begin:end] = 0
            self._output[end - part.outputs : end] = 1
        return self._decode(end, threads)

    def decode_forest(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        members: Sequence[Sequence[int]],
        wanted: Sequence[bool],
        threads: int,
    ) -> int:
        """Evaluate up to BATCH tokens from nothing, each a part of several sequences; 0 is success.

        For a unified context, which then evaluates nothing else: the lists of sequences are laid out anew.
        """
        end = len(tokens)
        # Zeroed: a value that is not finite would reach others through the mask, for 0 times NaN is NaN.
        self.llama.llama_memory_clear(self.memory, True)
        self._token[:end], self._position[:end], self._output[:end] = tokens, positions, wanted
        self._sequence = np.fromiter((one for node in members for one in node), np.int32)
        self._counts[:end] = [len(node) for node in members]
        begins = np.cumsum(self._counts[:end]) - self._counts[:end]
        self._pointers[:end] = self._sequence.ctypes.data + 4 * begins.astype(np.uintp)
        return self._decode(end, threads)

    def _decode(self, count: int, threads: int) -> int:
        self._batch.n_tokens = count
        forget_reasons()
        use_products(self._own_products)
        if self._threads != threads:
            self._threads = threads
            self.llama.llama_set_n_threads(self.pointer, threads, threads)
        status: int = self.llama.llama_decode(self.pointer, self._batch)
        return status

    def rows(self, count: int) -> Logits:
        """Return a view of the logits of the last decode, in the order of its parts; it lasts until the next one."""
        first = self.llama.llama_get_logits(self.pointer).contents
        values: Any = (ctypes.c_float * (count * self.vocabulary_size)).from_address(ctypes.addressof(first))
        rows: Logits = np.frombuffer(values, np.float32).reshape(count, self.vocabulary_size)
        return rows

    def cut(self, sequence: int, length: int) -> int:
        """Keep the first tokens of a sequence; return how many are left (0 where the model cannot keep some)."""
        if length and self.llama.llama_memory_seq_rm(self.memory, sequence, length, -1):
            return length
        self.llama.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        return 0

    def copy(self, source: int, target: int) -> None:
        """Make a sequence hold what another one holds; whole, for the streams of two sequences are two buffers."""
        self.llama.llama_memory_seq_rm(self.memory, target, -1, -1)
        self.llama.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def state_size(self, sequence: int) -> int:
        """Return how many bytes the state of a sequence has."""
        return int(self.llama.llama_state_seq_get_size(self.pointer, sequence))

    def state(self, sequence: int) -> NDArray[np.uint8]:
        """Return what a sequence holds, to be restored in any context of the same model and settings."""
        state = np.empty(self.state_size(sequence), np.uint8)
        room = ctypes.cast(state.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        count = self.llama.llama_state_seq_get_data(self.pointer, room, len(state), sequence)
        return state[:count]

    def restore(self, sequence: int, state: NDArray[np.uint8]) -> bool:
        """Make a sequence hold what `state` returned, and nothing else; tell whether that worked."""
        self.llama.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        data = ctypes.cast(state.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        return bool(self.llama.llama_state_seq_set_data(self.pointer, data, len(state), sequence))

    def set_adapters(self, adapters: Sequence[tuple[Any, float]]) -> None:
        """Set the adapters (pointer, scale) of the next decodes; none is the plain base."""
        count = len(adapters)
        if not count:
            self.llama.llama_set_adapters_lora(self.pointer, None, 0, None)
            return
        pointers = (self.llama.llama_adapter_lora_p_ctypes * count)(*(pointer for pointer, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        self.llama.llama_set_adapters_lora(self.pointer, pointers, count, scales)

    def free(self) -> None:
        self.llama.llama_free(self.pointer)
