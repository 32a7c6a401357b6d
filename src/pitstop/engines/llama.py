"""Run a GGUF base with LoRA adapters on llama.cpp, by the C API of llama-cpp-python; the only file that knows it.

llama.cpp keeps KV across a change of adapters and would answer from it. So every conversation is a sequence of its own,
tagged with what it was computed under (`sessions`), every evaluation sets its adapter first, and a swap is nothing but
the next evaluation in another sequence.
"""

import codecs
import ctypes
import importlib
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pitstop.bundle.formats import check_adapter, read_gguf
from pitstop.engines.answer import check_sampling, check_tokens, check_use, pieces
from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Piece, Sampling, Usage, Use
from pitstop.engines.sessions import BASE_TAG, Session, Sessions, Tag
from pitstop.errors import BrokenInput, FormatError, MissingExtra, StorageError, UsageError
from pitstop.files import storage_error, sync_folder

BATCH = 512  # tokens evaluated at once
OUTPUTS = 128  # of them with logits; bounds llama.cpp's buffer, which is OUTPUTS x vocabulary x 4 bytes
PROBE = "The capital of France is Paris, and 2 + 2 = 4."  # evaluated with and without a new adapter
SPARE = 16 << 20  # bytes; a disk with less is full

_PRECISIONS = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q6_k": "MOSTLY_Q6_K",
    "q5_k_m": "MOSTLY_Q5_K_M", "q5_k_s": "MOSTLY_Q5_K_S", "q5_1": "MOSTLY_Q5_1", "q5_0": "MOSTLY_Q5_0",
    "q4_k_m": "MOSTLY_Q4_K_M", "q4_k_s": "MOSTLY_Q4_K_S", "q4_1": "MOSTLY_Q4_1", "q4_0": "MOSTLY_Q4_0",
    "iq4_nl": "MOSTLY_IQ4_NL",
}  # fmt: skip

_ERROR, _CONTINUED = 4, 5  # levels of ggml.h; the comment in llama_cpp's own logger is out of date
_log: deque[str] = deque(maxlen=8)  # the last error lines
_log_open = False  # the line before was an error: what continues it is one too


@lru_cache(maxsize=1)
def _library() -> Any:
    """Import llama_cpp and take over its log."""
    try:
        library: Any = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise MissingExtra("running a GGUF model", "llama") from error
    # ctypes does not keep the callback alive: the library object must, as long as llama.cpp may call it.
    library.pitstop_log = library.llama_log_callback(_on_log)
    library.llama_log_set(library.pitstop_log, ctypes.c_void_p(0))
    library.llama_backend_init()
    return library


def _on_log(level: int, text: bytes, _: Any) -> None:
    global _log_open
    if level != _CONTINUED:
        _log_open = level == _ERROR
    if _log_open:
        _log.append(text.decode(errors="replace").strip())


def _reason() -> str:
    """Return llama.cpp's own words on what just failed."""
    lines = [line for line in _log if line]
    _log.clear()
    return "; ".join(lines) or "it gives no reason"


class _Model:
    """A model and one context with streams of KV; pointers, batches and nothing else."""

    def __init__(self, path: Path, context_length: int, sequences: int, threads: int) -> None:
        self.llama = _library()
        self.context: Any = None
        self.model = self._load(path)
        try:
            self.vocabulary = self.llama.llama_model_get_vocab(self.model)
            self.vocabulary_size: int = self.llama.llama_vocab_n_tokens(self.vocabulary)
            self.context = self._open(context_length, sequences, threads)
        except BaseException:
            self.free()
            raise
        self.memory = self.llama.llama_get_memory(self.context)
        self._prepare_batch()

    def _load(self, path: Path) -> Any:
        _log.clear()
        params = self.llama.llama_model_default_params()
        params.load_mode = self.llama.LLAMA_LOAD_MODE_MMAP
        model = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise FormatError(f"llama.cpp cannot load {path.name}: {_reason()}", where=path)
        return model

    def _open(self, context_length: int, sequences: int, threads: int) -> Any:
        trained = self.llama.llama_model_n_ctx_train(self.model)
        if context_length > trained:
            raise UsageError(f"a context of {context_length} tokens was asked for, the model was trained for {trained}")
        params = self.llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context_length * sequences, sequences
        params.n_batch = params.n_ubatch = BATCH
        params.n_outputs_max = max(OUTPUTS, sequences)
        params.n_threads = params.n_threads_batch = threads
        # A stream of KV per sequence: in a unified cache every token also attends (masked) to the cells of all others.
        params.kv_unified = False
        if not self.llama.llama_supports_gpu_offload():
            # On a CPU it rounds otherwise for a prompt of 64 tokens or more than for what follows one: a conversation
            # that goes on would answer other than one begun afresh (logits of SmolLM2-135M move by up to 0.8).
            params.flash_attn_type = self.llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # A sliding window's cache forgets what it slid over; cutting a sequence back would then answer from holes.
        params.swa_full = True
        context = self.llama.llama_init_from_model(self.model, params)
        if not context:
            raise UsageError(
                f"no context for {sequences} sequences of {context_length} tokens: {_reason()}",
                cure="open the engine with fewer sequences or a shorter context",
            )
        return context

    def _prepare_batch(self) -> None:
        # All tokens of a batch are of one sequence, so all its sequence pointers may point at one number.
        self._token, self._position = np.zeros(BATCH, np.int32), np.zeros(BATCH, np.int32)
        self._sequence, self._counts = np.zeros(1, np.int32), np.ones(BATCH, np.int32)
        self._output = np.zeros(BATCH, np.int8)
        self._pointers = np.full(BATCH, self._sequence.ctypes.data, np.uintp)
        arrays: dict[str, Any] = {"token": self._token, "pos": self._position, "n_seq_id": self._counts}
        arrays |= {"seq_id": self._pointers, "logits": self._output}
        self._batch = self.llama.llama_batch()
        for name, kind in self.llama.llama_batch._fields_:
            if name in arrays:
                setattr(self._batch, name, ctypes.cast(arrays[name].ctypes.data, kind))

    def decode(self, sequence: int, position: int, tokens: Sequence[int], outputs: int) -> int:
        """Evaluate up to BATCH tokens of one sequence; logits for the last ``outputs`` of them. 0 is success."""
        count = len(tokens)
        self._token[:count] = tokens
        self._position[:count] = np.arange(position, position + count)
        self._output[:count] = 0
        self._output[count - outputs : count] = 1
        self._sequence[0] = sequence
        self._batch.n_tokens = count
        status: int = self.llama.llama_decode(self.context, self._batch)
        return status

    def rows(self, count: int) -> Logits:
        """Return a view of the logits of the last decode; it lasts until the next one."""
        pointer = self.llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(count, self.vocabulary_size))

    def cut(self, sequence: int, length: int) -> int:
        """Keep the first tokens of a sequence; return how many are left (0 where the model cannot keep some)."""
        if length and self.llama.llama_memory_seq_rm(self.memory, sequence, length, -1):
            return length
        self.llama.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        return 0

    def set_adapter(self, adapter: Any, scale: float) -> None:
        """Set the one adapter of the next decodes; None is the plain base. llama.cpp skips what does not change."""
        if adapter is None:
            self.llama.llama_set_adapters_lora(self.context, None, 0, None)
            return
        pointers = (self.llama.llama_adapter_lora_p_ctypes * 1)(adapter)
        self.llama.llama_set_adapters_lora(self.context, pointers, 1, (ctypes.c_float * 1)(scale))

    def free(self) -> None:
        if self.context is not None:
            self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)  # and the adapters that are still loaded


@dataclass(frozen=True)
class _Loaded:
    pointer: Any
    generation: int


class LlamaEngine(Engine):
    """A GGUF base with GGUF LoRA adapters, many conversations at once."""

    name = "llama"

    def __init__(
        self,
        path: Path,
        *,
        base_sha256: str,
        context_length: int = 2048,
        sequences: int = 8,
        threads: int | None = None,
    ) -> None:
        """Load a base.

        Args:
            base_sha256: digest of the file, which the caller has checked.
            context_length: tokens of one conversation.
            sequences: conversations kept in memory; each takes ``context_length`` tokens of KV.
            threads: None takes every core this process may use.

        Raises:
            MissingExtra: llama-cpp-python is not installed.
            FormatError: the file is damaged or is no model that llama.cpp can run.
            UsageError: the context is longer than the model's, or does not fit in memory.
        """
        if context_length < 1 or sequences < 1:
            raise UsageError("context_length and sequences must be 1 or more")
        _library()
        self.path = path
        self.base_sha256 = base_sha256
        self.context_length = context_length
        self._header = read_gguf(path)
        # One sequence more than conversations: `logits` evaluates there and leaves it empty.
        self._scratch = sequences
        self._model = _Model(path, context_length, sequences + 1, threads or _cores())
        self.vocabulary_size = self._model.vocabulary_size
        self._sessions = Sessions(sequences)
        self._loaded: dict[str, _Loaded] = {}
        self._generation = 0
        self._closed = False

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def load_adapter(self, name: str, path: Path) -> None:
        self._check_open()
        if name in self._loaded:
            raise UsageError(f"an adapter {name!r} is already loaded", cure="unload it first, or choose another name")
        check_adapter(read_gguf(path), self._header, self.base_sha256)
        _log.clear()
        pointer = self._model.llama.llama_adapter_lora_init(self._model.model, os.fsencode(path))
        if not pointer:
            raise FormatError(f"llama.cpp cannot load {path.name}: {_reason()}", where=path)
        self._generation += 1
        self._loaded[name] = _Loaded(pointer, self._generation)
        try:
            self._probe(name, path)
        except BaseException:
            self.unload_adapter(name)
            raise

    def _probe(self, name: str, path: Path) -> None:
        """Refuse an adapter without effect: other runtimes load one and answer as the base for ever."""
        tokens = self.tokenize(PROBE)[: self.context_length] or [0]
        plain = self.logits(tokens, PLAIN_BASE, first=len(tokens) - 1)
        adapted = self.logits(tokens, Use(name), first=len(tokens) - 1)
        if not np.isfinite(adapted).all():
            raise FormatError(f"{path.name} makes the model compute values that are not finite", where=path)
        if np.array_equal(plain, adapted):
            raise FormatError(
                f"{path.name} changes nothing: with it the base computes exactly what it computes without",
                where=path,
                cure="check that the training changed the adapter and that the export kept its tensors",
            )

    def unload_adapter(self, name: str) -> None:
        self._check_open()
        if name not in self._loaded:
            raise UsageError(f"no adapter {name!r} is loaded")
        for session in self._sessions.tagged(name):
            self._empty(session)
        # The context must let go first: a later adapter can get the same address, and would count as "unchanged".
        self._model.set_adapter(None, 0.0)
        self._model.llama.llama_adapter_lora_free(self._loaded.pop(name).pointer)

    def tokenize(self, text: str) -> list[int]:
        self._check_open()
        raw = text.encode(errors="replace")
        room = len(raw) + 8
        tokens = (self._model.llama.llama_token * room)()
        count = self._model.llama.llama_tokenize(self._model.vocabulary, raw, len(raw), tokens, room, False, True)
        return list(tokens[: max(count, 0)])

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._check_open()
        if tokens:
            check_tokens(tokens, len(tokens), self.vocabulary_size)
        return b"".join(map(self._bytes, tokens)).decode(errors="replace")

    def logits(self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0) -> Logits:
        tag = self._tag(use)
        check_tokens(tokens, self.context_length, self.vocabulary_size)
        if not 0 <= first < len(tokens):
            raise UsageError(f"first is {first}, it must be from 0 to {len(tokens) - 1}")
        result = np.empty((len(tokens) - first, self.vocabulary_size), np.float32)
        scratch = Session(self._scratch)
        self._empty(scratch)
        try:
            while (at := len(scratch.tokens)) < len(tokens):
                end = min(len(tokens), at + BATCH, max(at, first) + OUTPUTS)
                wanted = max(0, end - max(at, first))
                self._evaluate(scratch, tag, tokens[at:end], wanted)
                if wanted:
                    result[end - wanted - first : end - first] = self._model.rows(wanted)
        finally:
            self._empty(scratch)
        return result

    def generate(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, sampling: Sampling | None = None, usage: Usage | None = None
    ) -> Iterator[Piece]:
        begun = time.perf_counter()
        sampling, usage = sampling or Sampling(), usage if usage is not None else Usage()
        tag = self._tag(use)
        check_sampling(sampling)
        check_tokens(tokens, self.context_length, self.vocabulary_size, answer=1)
        usage.prompt_tokens = len(tokens)
        return self._answer(list(tokens), tag, sampling, usage, begun)

    def _answer(self, tokens: list[int], tag: Tag, sampling: Sampling, usage: Usage, begun: float) -> Iterator[Piece]:
        session, common = self._sessions.take(tag, tokens)
        sampler = self._sampler(sampling)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def next_token(previous: int | None) -> int:
            if previous is None:
                usage.reused_tokens = self._prefill(session, tag, tokens, common)
            else:
                self._evaluate(session, tag, [previous], 1)
            return self._choose(sampler)

        def text_of(token: int | None) -> str:
            return decoder.decode(b"", final=True) if token is None else decoder.decode(self._bytes(token))

        try:
            room = self.context_length - len(tokens)
            yield from pieces(room, sampling, usage, begun, next_token, text_of, self._ends)
        finally:
            session.busy = False
            if sampler is not None:
                self._model.llama.llama_sampler_free(sampler)

    def _prefill(self, session: Session, tag: Tag, tokens: Sequence[int], common: int) -> int:
        """Bring the session to the prompt and return how many tokens were there already."""
        # The last token is always evaluated: the logits that choose the next one must be of this request.
        kept = self._model.cut(session.sequence, min(common, len(tokens) - 1))
        session.tag, session.tokens = tag, list(tokens[:kept])
        while (at := len(session.tokens)) < len(tokens):
            end = min(len(tokens), at + BATCH)
            self._evaluate(session, tag, tokens[at:end], 1 if end == len(tokens) else 0)
        return kept

    def _evaluate(self, session: Session, tag: Tag, tokens: Sequence[int], outputs: int) -> None:
        """Evaluate tokens at the end of a session, under its tag and no other."""
        self._check_open()
        self._model.set_adapter(self._pointer(tag), tag.scale)
        _log.clear()
        status = self._model.decode(session.sequence, len(session.tokens), tokens, outputs)
        if status != 0:
            self._empty(session)
            raise BrokenInput(
                f"llama.cpp could not evaluate {len(tokens)} tokens ({status}): {_reason()}", where=self.path
            )
        session.tokens.extend(tokens)

    def _empty(self, session: Session) -> None:
        self._model.cut(session.sequence, 0)
        session.tag, session.tokens = None, []

    def _tag(self, use: Use) -> Tag:
        self._check_open()
        if use.adapter is None or not check_use(use, self._loaded):
            return BASE_TAG
        return Tag(use.adapter, self._loaded[use.adapter].generation, float(use.scale))

    def _pointer(self, tag: Tag) -> Any:
        if tag.adapter is None:
            return None
        loaded = self._loaded.get(tag.adapter)
        if loaded is None or loaded.generation != tag.generation:
            raise UsageError(f"the adapter {tag.adapter!r} was unloaded in the middle of an answer")
        return loaded.pointer

    def _sampler(self, sampling: Sampling) -> Any:
        """Return a chain of llama.cpp's samplers; None is greedy."""
        if sampling.temperature == 0:
            return None
        llama = self._model.llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if sampling.top_k:
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_p(sampling.top_p, 1))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(sampling.temperature))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(sampling.seed & 0xFFFFFFFF))
        return chain

    def _choose(self, sampler: Any) -> int:
        """Choose a token from the last row of the last evaluation."""
        if sampler is None:
            return int(np.argmax(self._model.rows(1)[0]))
        return int(self._model.llama.llama_sampler_sample(sampler, self._model.context, -1))

    def _ends(self, token: int) -> bool:
        return bool(self._model.llama.llama_vocab_is_eog(self._model.vocabulary, token))

    def _bytes(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            vocabulary = self._model.vocabulary
            count = self._model.llama.llama_token_to_piece(vocabulary, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this engine is closed")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loaded.clear()
            self._model.free()


def _cores() -> int:
    with suppress(AttributeError):  # macOS has no affinity
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quantize(source: Path, target: Path, precision: str) -> None:
    """Write a GGUF model in another precision ("q8_0", "q4_0" …), also from one that is quantized already.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        UsageError: no such precision.
        FormatError: the source is damaged, or llama.cpp refuses it.
        StorageError: the disk refused; ``target`` is as it was.
    """
    llama = _library()
    if precision not in _PRECISIONS:
        raise UsageError(f"no precision {precision!r}", cure=f"choose one of: {', '.join(_PRECISIONS)}")
    read_gguf(source)
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_{_PRECISIONS[precision]}")
    params.nthread, params.allow_requantize = _cores(), True
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            # llama.cpp writes by name, so the file takes its own only when it is whole and on the disk.
            unfinished = Path(folder) / target.name
            _log.clear()
            if llama.llama_model_quantize(os.fsencode(source), os.fsencode(unfinished), ctypes.byref(params)) != 0:
                _quantize_failed(source, target)
            read_gguf(unfinished)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error


def _quantize_failed(source: Path, target: Path) -> NoReturn:
    if shutil.disk_usage(target.parent).free < SPARE:
        raise StorageError(f"no space for {target.name}", where=target, cure="free some space on this disk")
    raise FormatError(f"llama.cpp cannot quantize {source.name}: {_reason()}", where=source)
