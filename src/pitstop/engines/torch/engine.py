"""Run a transformers model with PEFT LoRA adapters: the workshop's engine, for adapters that are not exported yet."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pitstop.bundle.binding import check_base_sha256
from pitstop.engines.activation import Activation
from pitstop.engines.answer import GrowingText, StopText, Wording, check_sampling, check_tokens, check_use
from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Piece, Sampling, Usage, Use
from pitstop.engines.invocation import active_from
from pitstop.errors import FormatError, MissingExtra, UsageError

try:
    import torch
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from peft.helpers import rescale_adapter_scale
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from pitstop.engines.torch.adapter_folder import CONFIG_FILE, base_of, config_of, weights_of
    from pitstop.engines.torch.answers import Filter, Stops, choose, end_tokens
except ImportError as missing:
    raise MissingExtra("running a transformers model", "workshop") from missing

BATCH_ROWS = 32  # sequences evaluated at once
BATCH_TOKENS = 4_096  # with their padding
HEAD_ROWS = 256  # positions whose logits are computed at once

_UNKNOWN = ""  # an adapter name that PEFT never has


@dataclass(frozen=True)
class LoraPair:
    """What an adapter adds to one matrix: scaling x B A, A of shape (rank, inputs), B of shape (outputs, rank)."""

    name: str
    layer: torch.nn.Module
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class TorchEngine(Engine):
    """A transformers model with PEFT adapters beside it; the model is the engine's until it is closed."""

    name = "torch"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base_sha256: str,
        context_length: int,
    ) -> None:
        """Take a loaded model.

        Args:
            base_sha256: digest of the base file whose weights the model has.
            context_length: tokens one conversation may have.

        Raises:
            UsageError: the model computes its logits in a way this engine does not know.
        """
        untyped: Any = model  # half of transformers' methods have no types
        self._model = untyped.eval()
        self._tokenizer: Any = tokenizer
        self._peft: Any = None
        self._inner: dict[str, str] = {}  # our name -> PEFT's, which may hold no dots
        self._invocations: dict[str, tuple[int, ...]] = {}
        self._activation = Activation()
        self._count = 0
        self._active: str | None = _UNKNOWN  # PEFT's active adapter, None: all are off
        self.base_sha256 = base_sha256
        self.context_length = context_length
        self.vocabulary_size = int(self._model.get_output_embeddings().weight.shape[0])
        self._softcap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        self._end_tokens = end_tokens(self._model, tokenizer)
        self._closed = False
        self._check_head()

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._inner)

    def load_adapter(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        """Load a PEFT adapter folder: its config, safetensors weights, and `pitstop.json` that names its base."""
        self._check_open()
        if name in self._inner:
            raise UsageError(f"an adapter {name!r} is already loaded", cure="unload it first, or choose another name")
        check_base_sha256(base_of(path), self.base_sha256, where=path)
        config = config_of(path)
        self._check_modules(config, path)
        weights = weights_of(path, sha256)
        self._count += 1
        inner = f"adapter{self._count}"
        self._inner[name] = inner
        self._invocations[name] = tuple(config.alora_invocation_tokens or ())
        config.alora_invocation_tokens = None  # where it acts is for `_under` to say
        try:
            self._insert(inner, config)
            if self._invocations[name]:
                self._activation.watch(self._model, inner)
            result: Any = set_peft_model_state_dict(self._peft, weights, adapter_name=inner)
            wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{inner}." in key)]
            if wrong:
                raise FormatError(f"the weights do not belong to the config: {', '.join(wrong[:3])}", where=path)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            self.unload_adapter(name)
            raise FormatError(f"PEFT cannot load this adapter: {error}", where=path) from error
        except BaseException:
            self.unload_adapter(name)
            raise

    def invocation(self, adapter: str) -> tuple[int, ...]:
        check_use(Use(adapter), self._inner)
        return self._invocations[adapter]

    def lora_pairs(self, adapter: str) -> Iterator[LoraPair]:
        """Yield the matrices that an adapter adds to the base's.

        Raises:
            UsageError: no such adapter.
        """
        check_use(Use(adapter), self._inner)
        inner = self._inner[adapter]
        for name, layer in self._model.named_modules():
            if inner in getattr(layer, "lora_A", ()):
                a, b = (pairs[inner].weight.detach() for pairs in (layer.lora_A, layer.lora_B))
                yield LoraPair(name, layer, a, b, float(layer.scaling[inner]))

    def _check_modules(self, config: LoraConfig, path: Path) -> None:
        if not isinstance(config.target_modules, (set, list)):
            return  # a regular expression: PEFT says when it matches nothing
        if config.alora_invocation_tokens and {"lm_head", "embed_tokens"} & set(config.target_modules):
            what = "an activated LoRA on the embeddings: they know no positions, and it would act everywhere"
            raise FormatError(what, where=path / CONFIG_FILE, cure="train it on other modules")
        names = [name for name, _ in self._model.named_modules()]
        missing = [t for t in sorted(config.target_modules) if not any(f".{name}".endswith(f".{t}") for name in names)]
        if missing:
            raise FormatError(
                f"the adapter changes modules this model does not have: {', '.join(missing)}",
                where=path / CONFIG_FILE,
                cure="name target modules of this model in the recipe, and train again",
            )

    def _insert(self, inner: str, config: LoraConfig) -> None:
        self._active = _UNKNOWN
        with warnings.catch_warnings():  # PEFT asks transformers in a way that transformers has renamed
            warnings.simplefilter("ignore", FutureWarning)
            if self._peft is None:
                self._peft = PeftModel(self._model, config, adapter_name=inner)
            else:
                self._peft.add_adapter(inner, config)
        self._peft.eval()

    def unload_adapter(self, name: str) -> None:
        self._check_open()
        if name not in self._inner:
            raise UsageError(f"no adapter {name!r} is loaded")
        inner = self._inner.pop(name)
        del self._invocations[name]
        self._active = _UNKNOWN
        if self._peft is None:
            return
        if self._inner:
            with warnings.catch_warnings():  # PEFT tells which adapter is active next; every call here sets its own
                warnings.simplefilter("ignore")
                self._peft.delete_adapter(inner)
        else:
            self._peft.unload()
            self._peft = None

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def logits(self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0) -> Logits:
        return next(self.logits_batch([tokens], use, firsts=[first]))

    def logits_batch(
        self, rows: Sequence[Sequence[int]], use: Use = PLAIN_BASE, *, firsts: Sequence[int] | None = None
    ) -> Iterator[Logits]:
        self._check_open()
        check_use(use, self._inner)
        firsts = list(firsts) if firsts is not None else [0] * len(rows)
        for row, first in zip(rows, firsts, strict=True):
            check_tokens(row, self.context_length, self.vocabulary_size)
            if not 0 <= first < len(row):
                raise UsageError(f"first is {first}, it must be from 0 to {len(row) - 1}")
        return self._logits_batch(rows, use, firsts)

    def _logits_batch(self, rows: Sequence[Sequence[int]], use: Use, firsts: Sequence[int]) -> Iterator[Logits]:
        done = 0
        for batch in _batches(rows):
            hidden = self._hidden(batch, use)
            for row, states in zip(batch, hidden, strict=True):
                yield self._head(states[firsts[done] : len(row)], use)
                done += 1

    @torch.no_grad()
    def _hidden(self, rows: Sequence[Sequence[int]], use: Use) -> torch.Tensor:
        """Return the last hidden states of rows, shape (rows, longest, width); right of a row's end is padding."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self._model.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = (torch.arange(longest, device=ids.device) < lengths[:, None]).long() if len(rows) > 1 else None
        with self._under(use), self._acting_on(rows, use, longest):
            states: torch.Tensor = self._model.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
        return states

    @torch.no_grad()
    def _head(self, states: torch.Tensor, use: Use) -> Logits:
        result = np.empty((len(states), self.vocabulary_size), np.float32)
        for at in range(0, len(states), HEAD_ROWS):
            with self._under(use):
                logits = self._model.get_output_embeddings()(states[at : at + HEAD_ROWS]).float()
            if self._softcap is not None:
                logits = torch.tanh(logits / self._softcap) * self._softcap
            result[at : at + HEAD_ROWS] = logits.cpu().numpy()
        return result

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some architectures scale their logits after the head: find out now rather than answer wrongly."""
        expected = self._model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self._model.device)).logits
        found = self._head(self._hidden([[0]], PLAIN_BASE)[0], PLAIN_BASE)
        if not np.allclose(found, expected[0].float().cpu().numpy(), rtol=1e-3, atol=1e-3):
            raise UsageError(
                f"{type(self._model).__name__} computes its logits in a way the torch engine does not know"
            )

    def generate(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, sampling: Sampling | None = None, usage: Usage | None = None
    ) -> Iterator[Piece]:
        sampling, usage = sampling or Sampling(), usage if usage is not None else Usage()
        self._check_request(use, sampling)
        check_tokens(tokens, self.context_length, self.vocabulary_size, answer=1)
        usage.prompt_tokens = len(tokens)
        text = GrowingText(self.detokenize)
        room = self.context_length - len(tokens)
        wording = Wording(room, sampling, usage, text.feed, self._end_tokens.__contains__)
        return self._answer(list(tokens), use, sampling, wording)

    def _answer(self, tokens: list[int], use: Use, sampling: Sampling, wording: Wording) -> Iterator[Piece]:
        inner = self._inner.get(use.adapter or "")
        generator = torch.Generator(self._model.device).manual_seed(sampling.seed)
        cache: Any = None  # this answer's own, so nothing of another adapter can be in it
        prompt = [tokens]
        while not wording.finished:
            self._check_open()
            if self._inner.get(use.adapter or "") != inner:
                raise UsageError(f"the adapter {use.adapter!r} was unloaded in the middle of an answer")
            ids = torch.tensor([tokens], device=self._model.device)
            with torch.no_grad(), self._under(use), self._acting_on(prompt, use, len(prompt[0])):
                step = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = step.past_key_values
            tokens = [choose(step.logits[0, -1].float(), sampling, generator)]
            yield Piece(tokens[0], wording.take(tokens[0]))

    def _check_request(self, use: Use, sampling: Sampling) -> None:
        self._check_open()
        check_use(use, self._inner)
        check_sampling(sampling, self.vocabulary_size)
        plain = Sampling(
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            seed=sampling.seed,
            stop=sampling.stop,
        )
        if use.also or sampling != plain:
            raise UsageError(
                "the torch engine runs one adapter, and knows temperature, top_p, top_k and stop texts only",
                cure="export the adapter and use the llama engine",
            )

    @torch.no_grad()
    def generate_batch(
        self, prompts: Sequence[Sequence[int]], use: Use = PLAIN_BASE, sampling: Sampling | None = None
    ) -> list[str]:
        sampling = sampling or Sampling()
        self._check_request(use, sampling)
        for prompt in prompts:
            check_tokens(prompt, self.context_length, self.vocabulary_size, answer=1)
        answers = [""] * len(prompts)
        # Prompts of like length go together: padding costs as much as tokens.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        done = 0
        for batch in _batches([prompts[index] for index in order]):
            for answer in self._generate_rows(batch, use, sampling) if sampling.max_tokens > 0 else ():
                answers[order[done]] = answer
                done += 1
        return answers

    def _generate_rows(self, prompts: Sequence[Sequence[int]], use: Use, sampling: Sampling) -> Iterator[str]:
        longest = max(map(len, prompts))
        room = min(sampling.max_tokens, self.context_length - min(map(len, prompts)))
        pad = min(self._end_tokens, default=0)
        ids = torch.tensor([[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
        device = self._model.device
        acting = self._acting_on(prompts, use, longest, right=True)
        with self._under(use), acting, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            made = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._generation_config(room, pad, sampling),
                logits_processor=[Filter(sampling)] if sampling.temperature > 0 else [],
                stopping_criteria=[Stops(self, sampling.stop, longest)] if sampling.stop else [],
            )
        for prompt, row in zip(prompts, made[:, longest:].tolist(), strict=True):
            row = row[: self.context_length - len(prompt)]
            end = next((at for at, token in enumerate(row) if token in self._end_tokens), len(row))
            stop = StopText(sampling.stop)
            yield stop.feed(self.detokenize(row[:end])) + stop.finish()

    def _generation_config(self, room: int, pad: int, sampling: Sampling) -> Any:
        # Every setting is named: what is left out would come from the model's own defaults.
        make: Any = GenerationConfig
        return make(
            max_new_tokens=room,
            do_sample=sampling.temperature > 0,
            num_beams=1,
            temperature=1.0,  # _Filter has applied the request's
            top_k=0 if sampling.temperature > 0 else None,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=sorted(self._end_tokens) or None,
            pad_token_id=pad,
            use_cache=True,
        )

    @contextmanager
    def _under(self, use: Use) -> Iterator[None]:
        """Evaluate under one adapter; every evaluation says which."""
        if self._peft is None:
            yield
            return
        inner = None if use.adapter is None or use.scale == 0 else self._inner[use.adapter]
        self._switch(inner)
        with rescale_adapter_scale(self._model, use.scale) if inner and use.scale != 1 else nullcontext():
            yield

    def _acting_on(
        self, rows: Sequence[Sequence[int]], use: Use, width: int, *, right: bool = False
    ) -> AbstractContextManager[None]:
        """Let an activated adapter act where the rows say; ``right``: they end where the longest one does."""
        invocation = self._invocations.get(use.adapter or "", ())
        starts = [active_from(row, invocation) + (width - len(row) if right else 0) for row in rows]
        return self._activation.of(starts if invocation else None, width, self._model.device)

    def _switch(self, inner: str | None) -> None:
        # PEFT walks through all modules to switch, so it is asked only when something changes.
        if inner == self._active:
            return
        self._active = _UNKNOWN
        if inner is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(inner, inference_mode=True)
        self._active = inner

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this engine is closed")

    def close(self) -> None:
        """Take the adapters out of the model and let go of it."""
        for name in self.adapters:
            self.unload_adapter(name)
        self._closed = True
        self._model = None


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Cut rows into batches, in order, each within BATCH_ROWS and BATCH_TOKENS."""
    batch: list[Sequence[int]] = []
    longest = 0
    for row in rows:
        if batch and (len(batch) == BATCH_ROWS or (len(batch) + 1) * max(longest, len(row)) > BATCH_TOKENS):
            yield batch
            batch, longest = [], 0
        batch.append(row)
        longest = max(longest, len(row))
    if batch:
        yield batch
