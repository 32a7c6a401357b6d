"""onnxruntime-genai, the part of it that pitstop needs; no other file knows it.

What it calls, the C API has as well, so a phone app can do the same:

    here                                        C API
    Config, Config.overlay, Model               OgaCreateConfig, OgaConfigOverlay, OgaCreateModelFromConfig
    Tokenizer.encode, decode, to_token_id       OgaTokenizerEncode, OgaTokenizerDecode, OgaTokenizerToTokenId
    GeneratorParams.set_search_options          OgaGeneratorParamsSetSearchNumber, …SetSearchBool
    GeneratorParams.set_guidance                OgaGeneratorParamsSetGuidance
    Generator.append_tokens, rewind_to          OgaGenerator_AppendTokens, OgaGenerator_RewindTo
    Generator.get_logits, set_logits            OgaGenerator_GetLogits, OgaGenerator_SetLogits
    Generator.get_output("logits")              OgaGenerator_GetOutput
    Generator.generate_next_token, token_count  OgaGenerator_GenerateNextToken, OgaGenerator_GetSequenceCount
    Adapters.load, unload                       OgaLoadAdapter, OgaUnloadAdapter
    Generator.set_active_adapter                OgaSetActiveAdapter

Java's Generator has appendTokens, rewindTo, generateNextToken, getOutput("logits"), setActiveAdapter and close (read in
its sources, not run); no logits can be set there, and its GeneratorParams have no guidance. An app in Java lets the
library choose the tokens (generateNextToken with search options), and reaches the rest through C.

The logits of a prompt's last token alone are computed where an adapter that holds nothing but `logits.first` = -1 is
set; a generator feeds all the adapters it was given.

An adapter file in 32-bit floats can be loaded by an app as it is exported, if it opens a new generator for each
adapter. One that swaps in a live generator must give it tensors for every projection (see `adapters`): a generator goes
on to feed those of the adapter it had before. A scale is another file, with B multiplied; several adapters are one,
side by side.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pitstop.bundle.formats import OnnxGraphHeader
from pitstop.bundle.onnx import CONFIG_FILE, FIRST_ROW, GRAPH_FILE, Decoder, locate, read_settings
from pitstop.engines.answer import END_TEXTS
from pitstop.engines.base import Logits
from pitstop.errors import BrokenInput, FormatError, MissingExtra, UsageError

try:
    import onnxruntime
    import onnxruntime_genai
except ImportError as missing:
    raise MissingExtra("running an ONNX model", "onnx") from missing

PORTION = 128  # tokens evaluated at once: the graph gives logits for all of them, 196 KB each with SmolLM2
# A generator keeps every adapter it was ever given and feeds them all again at each step, the last one winning: 200 of
# them made a step 12 ms slower, and took 17 MB.
CHANGES = 8

_ERRORS = (RuntimeError, ValueError, TypeError, MemoryError, OSError)
_FORMAT_VERSIONS = 1
_LAST_ROW = "last row"  # the name of a file that asks for the logits of the last token only


@contextmanager
def translated(what: str, where: object) -> Iterator[None]:
    """Translate whatever onnxruntime-genai raises.

    Raises:
        BrokenInput: it raised something.
    """
    try:
        yield
    except _ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BrokenInput(f"onnxruntime-genai could not {what}: {reason[:300]}", where=where) from error


class Model:
    """A graph in memory, with its tokenizer."""

    def __init__(self, graph: OnnxGraphHeader, threads: int) -> None:
        """Load a model.

        Raises:
            FormatError: a file of it is missing, asks for something a plain decoder has no use for, or cannot be read.
        """
        self.path = graph.path
        files = locate(graph)
        self.settings: Decoder = read_settings(graph, files[CONFIG_FILE])
        # Only what the graph names is there for the library to find, and under the names it looks for.
        self._view = tempfile.TemporaryDirectory(prefix="pitstop-onnx-")
        view = Path(self._view.name)
        for name, path in {**files, GRAPH_FILE: graph.path}.items():
            (view / name).symlink_to(path.absolute())
        try:
            self._model = onnxruntime_genai.Model(_config(view, threads))
            self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
            self._tokenizer.update_options(add_special_tokens="false", skip_special_tokens="true")
            self._spelling = onnxruntime_genai.Tokenizer(self._model)
            self._spelling.update_options(skip_special_tokens="false")
            self.adapters = onnxruntime_genai.Adapters(self._model)
            self._can_skip_rows = FIRST_ROW in graph.inputs  # graphs of older versions cannot
            if self._can_skip_rows:
                self._load_tensors(_LAST_ROW, {FIRST_ROW: np.array([-1], np.int64)})
        except _ERRORS as error:
            self._view.cleanup()
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise FormatError(f"onnxruntime-genai cannot load it: {reason[:300]}", where=graph.path) from error
        ends = {self._tokenizer.to_token_id(text) for text in END_TEXTS}
        self.end_tokens = self.settings.end_tokens | {int(token) for token in ends if token >= 0}

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens written in it count as such, none is added."""
        with translated("tokenize a text", self.path):
            return [int(token) for token in self._tokenizer.encode(text)] if text else []

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens, special ones left out or as they are written."""
        if not tokens:
            return ""
        with translated("write tokens as text", self.path):
            text: str = (self._spelling if special else self._tokenizer).decode(np.array(tokens, np.int32))
        # It writes nothing but special tokens as if it were half a character.
        return "" if text == "\ufffd" and not special and text not in self.detokenize(tokens, special=True) else text

    def conversation(self, length: int, guide: str | None = None, *, every_row: bool = False) -> "Conversation":
        """Open an empty KV for so many tokens.

        Args:
            guide: a JSON schema that tokens may be chosen by.
            every_row: compute the logits of every token, not just of the last one that is appended.

        Raises:
            BrokenInput: there is no memory for it.
            UsageError: the schema cannot be followed.
        """
        try:
            with translated("open a conversation", self.path):
                params = onnxruntime_genai.GeneratorParams(self._model)
                params.set_search_options(max_length=length, do_sample=False)
                if guide is not None:
                    params.set_guidance("json_schema", guide)
                generator = onnxruntime_genai.Generator(self._model, params)
                if self._can_skip_rows and not every_row:
                    generator.set_active_adapter(self.adapters, _LAST_ROW)
                return Conversation(self, generator, length, guide)
        except BrokenInput as error:
            if guide is None:
                raise
            raise UsageError(f"the JSON schema cannot be followed: {error.what}", cure="simplify it") from error

    def load_adapter(self, name: str, tensors: Mapping[str, NDArray[np.float32]], path: Path) -> None:
        """Load tensors as an adapter, under a name that no other has; ``path`` is for messages.

        onnxruntime-genai reads adapters from files only. The file is written from tensors that were checked, so nobody
        can have exchanged it in between; it is mapped then, and needs its name no longer.

        Raises:
            BrokenInput: it is refused, or there is no room to write it.
        """
        with translated(f"load {path.name}", path):
            self._load_tensors(name, tensors)

    def _load_tensors(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t)) for key, t in tensors.items()}
        with tempfile.TemporaryDirectory(prefix="pitstop-onnx-") as folder:
            made = onnxruntime.AdapterFormat()
            made.set_adapter_version(_FORMAT_VERSIONS)
            made.set_model_version(_FORMAT_VERSIONS)
            made.set_parameters(values)
            made.export_adapter(f"{folder}/adapter")
            self.adapters.load(f"{folder}/adapter", name)

    def unload_adapter(self, name: str) -> None:
        """Give back an adapter that no conversation was given, or none that still lives."""
        with translated("unload an adapter", self.path):
            self.adapters.unload(name)

    def close(self) -> None:
        """Let go of everything; conversations must be gone."""
        del self.adapters, self._tokenizer, self._spelling, self._model
        self._view.cleanup()


class Conversation:
    """One KV. Which adapters its tokens are computed under is whatever was set last before they came."""

    def __init__(self, model: Model, generator: onnxruntime_genai.Generator, length: int, guide: str | None) -> None:
        self.length = length  # tokens it has room for
        self.guide = guide
        self.under: str | None = None  # the adapter that was set last
        self.given: list[str] = []  # all that were ever set: they cannot be unloaded while this lives
        self.model = model
        self._generator: Any = generator

    def serves(self, model: Model, length: int, guide: str | None) -> bool:
        """Tell whether it is of this model, has room for so many tokens, and follows the guide, if there is one."""
        return self.model is model and self.length >= length and guide in (None, self.guide)

    def takes(self, names: Sequence[str]) -> bool:
        """Tell whether these adapters can be set one after the other; else a new conversation is needed."""
        changes = sum(name != before for before, name in zip([self.under, *names[:-1]], names, strict=False))
        return len(self.given) + changes <= CHANGES

    def set_adapter(self, name: str) -> None:
        """Compute under an adapter from now on, one with tensors for every projection; what was computed stays."""
        if name == self.under:
            return
        with translated("change adapters", self.model.path):
            self._generator.set_active_adapter(self.model.adapters, name)
        self.given.append(name)
        self.under = name

    def rewind(self, length: int) -> None:
        """Keep the first tokens only."""
        if length < self._generator.token_count():
            with translated("rewind a conversation", self.model.path):
                self._generator.rewind_to(length)

    def append(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens at the end, PORTION of them at most."""
        with translated(f"evaluate {len(tokens)} tokens", self.model.path):
            self._generator.append_tokens(np.array(tokens, np.int32))

    def row(self) -> NDArray[np.float32]:
        """Return the logits after the last token, shape (vocabulary,); a token that was chosen is evaluated first."""
        with translated("evaluate a token", self.model.path):
            row: NDArray[np.float32] = self._generator.get_logits().reshape(-1)
            return row

    def rows(self, count: int) -> Logits:
        """Return the logits after each of the last tokens that were appended together, shape (count, vocabulary).

        Of a conversation that was opened for every row.
        """
        with translated("read logits", self.model.path):
            every: Logits = self._generator.get_output("logits")
            return every[0, -count:]

    def close(self) -> None:
        """Give back the KV; whoever else still holds this holds nothing."""
        self._generator = None

    def choose(self, row: NDArray[np.float32]) -> int:
        """Choose the likeliest token of a row that the guide allows; it counts as appended, and is evaluated later."""
        with translated("choose a token", self.model.path):
            self._generator.set_logits(row.reshape(1, -1))
            self._generator.generate_next_token()
            return int(self._generator.get_next_tokens()[0])


def _config(view: Path, threads: int) -> onnxruntime_genai.Config:
    config = onnxruntime_genai.Config(str(view))
    # Threads that wait for each other spin, and take the cores from whoever has work. 420 warnings of one kind: none.
    options = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "0", "log_severity_level": 3}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return config
