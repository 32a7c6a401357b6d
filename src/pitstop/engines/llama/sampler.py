"""From a row of logits to a token: llama.cpp's samplers over a row of our own, and its grammar if one is asked for."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pitstop.engines.base import Sampling
from pitstop.engines.llama.grammar import CURE, check_rules, grammar_of_schema
from pitstop.engines.llama.native import Model, forget_reasons, reason
from pitstop.errors import UsageError

KEEP = 1  # tokens that top_p and min_p always leave
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        """Make the chain of one request.

        Raises:
            UsageError: a grammar or JSON schema that llama.cpp does not take.
        """
        self._llama = model.llama
        self._size = model.vocabulary_size
        self._bias = dict(sampling.logit_bias)
        self._chain: Any = None
        self._grammar = self._make_grammar(model, sampling)
        try:
            self._chain = self._make_chain(sampling)
        except BaseException:
            self.close()
            raise
        self._candidates: NDArray[Any] | None = None  # reused: 12 bytes a word of the vocabulary

    def choose(self, row: NDArray[np.float32]) -> int:
        """Choose the next token from a row of logits, and remember it for penalties and grammar."""
        greedy = self._chain is None and self._grammar is None
        if self._bias and not (greedy and self._is_left_alone(int(row.argmax()))):
            row = row.copy()
            row[list(self._bias)] += list(self._bias.values())
        token = int(row.argmax()) if self._chain is None else self._draw(row)
        if self._grammar is not None:
            # Most tokens fit, and asking the grammar about one costs little: about all of them, much.
            if not self._fits(token, float(row[token])):
                token = self._draw(row, by_grammar=True)
            self._llama.llama_sampler_accept(self._grammar, token)
        if self._chain is not None:
            self._llama.llama_sampler_accept(self._chain, token)
        return token

    def _is_left_alone(self, likeliest: int) -> bool:
        """Whether no bias can change which token is the likeliest: most only keep some tokens away."""
        return likeliest not in self._bias and all(bias <= 0 for bias in self._bias.values())

    def _draw(self, row: NDArray[np.float32], *, by_grammar: bool = False) -> int:
        if self._candidates is None:
            self._candidates = np.zeros(self._size, _CANDIDATE)
        self._candidates["id"] = np.arange(self._size, dtype=np.int32)
        self._candidates["logit"] = row
        array = self._array(self._candidates)
        if by_grammar:
            self._llama.llama_sampler_apply(self._grammar, ctypes.byref(array))
        if self._chain is None:
            return int(self._candidates["logit"].argmax())
        self._llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _fits(self, token: int, logit: float) -> bool:
        one = np.array([(token, logit, 0.0)], _CANDIDATE)
        array = self._array(one)
        self._llama.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(np.isfinite(one["logit"][0]))

    def _array(self, candidates: NDArray[Any]) -> Any:
        data = ctypes.cast(candidates.ctypes.data, ctypes.POINTER(self._llama.llama_token_data))
        return self._llama.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)

    def _make_chain(self, sampling: Sampling) -> Any:
        """Return a chain of llama.cpp's samplers; None is the plain likeliest token."""
        penalized = (sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
        if sampling.temperature == 0 and not penalized:
            return None
        llama = self._llama
        links = []
        if penalized:
            penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
            links.append(llama.llama_sampler_init_penalties(self._size, sampling.penalty_tokens, *penalties))
        if sampling.temperature == 0:
            links.append(llama.llama_sampler_init_greedy())
        else:
            links += [llama.llama_sampler_init_top_k(sampling.top_k)] if sampling.top_k else []
            links += [llama.llama_sampler_init_top_p(sampling.top_p, KEEP)] if sampling.top_p < 1 else []
            links += [llama.llama_sampler_init_min_p(sampling.min_p, KEEP)] if sampling.min_p > 0 else []
            links.append(llama.llama_sampler_init_temp(sampling.temperature))
            links.append(llama.llama_sampler_init_dist(sampling.seed & 0xFFFFFFFF))
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for link in links:
            llama.llama_sampler_chain_add(chain, link)
        return chain

    def _make_grammar(self, model: Model, sampling: Sampling) -> Any:
        if sampling.json_schema is None and sampling.grammar is None:
            return None
        rules = sampling.grammar if sampling.json_schema is None else grammar_of_schema(sampling.json_schema)
        assert rules is not None
        check_rules(rules)
        forget_reasons()
        made = self._llama.llama_sampler_init_grammar(model.vocabulary, rules.encode(), b"root")
        if not made:
            raise UsageError(f"llama.cpp cannot read the grammar: {reason()}", cure=CURE)
        return made

    def close(self) -> None:
        """Give back what llama.cpp holds for it."""
        for held in (self._chain, self._grammar):
            if held:
                self._llama.llama_sampler_free(held)
        self._chain = self._grammar = None
