"""A look at candidates on a few rows, on the model itself: enough to say which are worth measuring exactly.

None of these rows is a suite's or held out, so what is chosen here was not chosen for the items that judge it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from pitstop.engines.activation import Activation
from pitstop.engines.invocation import active_from
from pitstop.workshop.dataset import Example
from pitstop.workshop.repair.edits import scale
from pitstop.workshop.repair.material import Screen
from pitstop.workshop.repair.pairs import CONFIG_FILE, Pair, Pairs
from pitstop.workshop.repair.parts import Heads
from pitstop.workshop.training.loss import Head, cross_entropy

BATCH_ROWS = 8
ADAPTER = "default"
COVARIANCE_BYTES = 1 << 30  # of matrices gathered in one pass over the text


@dataclass(frozen=True)
class Losses:
    """Nats per token on the screen's rows."""

    general: float
    task: float


@dataclass(frozen=True)
class Slopes:
    """d loss / d factor of one part's change, in nats per token: what its removal wins and costs, to first order."""

    general: float  # above zero: less of this part forgets less
    task: float  # below zero: less of this part does the task worse


class Probe:
    """The model with an adapter in it whose factors can be exchanged."""

    def __init__(self, model: PreTrainedModel, adapter: Path, screen: Screen, pairs: Pairs, use: float) -> None:
        """Put the adapter into the model.

        Args:
            use: multiplier the adapter runs at: the recipe's scale.
        """
        config = LoraConfig.from_pretrained(str(adapter))
        assert isinstance(config, LoraConfig), CONFIG_FILE
        invocation = tuple(config.alora_invocation_tokens or ())
        config.alora_invocation_tokens = None  # masked here, as the torch engine does
        self._screen, self._use, self._invocation = screen, use, invocation
        self._activation = Activation()
        model.requires_grad_(False)
        self._peft: Any = PeftModel(model, config, adapter_name=ADAPTER).eval()
        self._peft.requires_grad_(False)
        if invocation:
            self._activation.watch(model, ADAPTER)
        self._head = Head.of(self._peft.get_base_model())
        layers = {name: part for name, part in model.named_modules() if hasattr(part, "lora_A")}
        self._layers: dict[str, Any] = {name: layers[name] for name in pairs}
        self.put(pairs)

    def close(self) -> PreTrainedModel:
        """Take the adapter out again and return the plain model."""
        model: PreTrainedModel = self._peft.unload()
        self._peft = None
        return model

    @torch.no_grad()
    def put(self, pairs: Pairs) -> None:
        """Exchange the adapter's factors."""
        for name, pair in scale(pairs, self._use).items():
            layer = self._layers[name]
            layer.lora_A[ADAPTER].weight.copy_(pair.a)
            layer.lora_B[ADAPTER].weight.copy_(pair.b)

    @torch.no_grad()
    def losses(self, pairs: Pairs) -> Losses:
        """Return the losses under these factors, on every second row: many are asked for, and they are compared."""
        self.put(pairs)
        general, task = (
            sum(float(loss) * count for loss, count in self._batches(rows)) / sum(_scored(row) for row in rows)
            for rows in (self._screen.general[::2], self._screen.task[::2])
        )
        return Losses(general, task)

    def slopes(self, pairs: Pairs, heads: Heads) -> dict[str, list[Slopes]]:
        """Return by module the slopes of its change; for a module of heads one each, in their order.

        One backward pass over each kind of row, with a factor of 1 on every part.
        """
        self.put(pairs)
        factors = {name: self._factor(name, pair, heads) for name, pair in pairs.items()}
        found = []
        with self._factored(factors, heads):
            for rows in (self._screen.general, self._screen.task):
                for factor in factors.values():
                    factor.grad = None
                for loss, count in self._batches(rows):
                    (loss * count / sum(_scored(row) for row in rows)).backward()
                found.append({name: _gradient(factor) for name, factor in factors.items()})
        general, task = found
        return {name: [Slopes(*pair) for pair in zip(general[name], task[name], strict=True)] for name in pairs}

    def _factor(self, name: str, pair: Pair, heads: Heads) -> torch.Tensor:
        width = {"q": pair.b.shape[0], "o": pair.a.shape[1], None: 0}[heads.side(name)]
        count = heads.count if width == heads.count * heads.size else 1
        return torch.ones(count, device=self._layers[name].lora_A[ADAPTER].weight.device, requires_grad=True)

    @contextmanager
    def _factored(self, factors: Mapping[str, torch.Tensor], heads: Heads) -> Iterator[None]:
        """Multiply every part's change by its factor: a head's queries after B, what it says before A."""
        hooks = []
        for name, factor in factors.items():
            layer = self._layers[name]
            if heads.side(name) == "o" and len(factor) > 1:
                hooks.append(layer.lora_A[ADAPTER].register_forward_pre_hook(partial(_before, factor, heads.size)))
            else:
                each = heads.size if len(factor) > 1 else 1
                hooks.append(layer.lora_B[ADAPTER].register_forward_hook(partial(_after, factor, each)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def covariances(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Yield the second moments of what modules get on general text, without the adapter; (modules, (in, in)).

        Modules that get the same input share one. A row's first position is left out: attention rests on it, and its
        activations are so large that they would be all there is.
        """
        waiting = dict(self._layers)
        while waiting:
            now: dict[str, Any] = {}
            room = COVARIANCE_BYTES
            for name, layer in waiting.items():
                room -= 4 * layer.in_features**2
                if now and room < 0:
                    break
                now[name] = layer
            gathered = self._moments(now)
            for name in now:
                del waiting[name]
            yield from gathered

    def _moments(self, layers: Mapping[str, Any]) -> Iterator[tuple[list[str], torch.Tensor]]:
        sums: dict[str, torch.Tensor] = {}
        same: dict[str, list[str]] = defaultdict(list)
        newest: list[tuple[str, torch.Tensor]] = []  # the input that was seen last, and by whom first

        def gather(name: str, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if newest and newest[0][1] is inputs[0]:
                owner = newest[0][0]
            else:
                newest[:] = [(name, inputs[0])]
                owner = name
                rows = inputs[0][self._inside].float()
                product = rows.T @ rows
                sums[name] = sums[name] + product if name in sums else product
            if name not in same[owner]:
                same[owner].append(name)

        hooks = [layer.register_forward_pre_hook(partial(gather, name)) for name, layer in layers.items()]
        try:
            with self._peft.disable_adapter():
                for _ in self._batches(self._screen.general):
                    pass
        finally:
            for hook in hooks:
                hook.remove()
        for name, total in sums.items():
            yield same[name], total

    def _batches(self, rows: Sequence[Example]) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield the mean loss of each batch and how many tokens it is the mean of."""
        for begin in range(0, len(rows), BATCH_ROWS):
            batch = rows[begin : begin + BATCH_ROWS]
            width = max(len(row.tokens) for row in batch)
            device = self._peft.device
            tokens = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in batch], device=device)
            places = torch.arange(width, device=device)
            starts = torch.tensor([row.answer_start for row in batch], device=device)[:, None]
            ends = torch.tensor([len(row.tokens) for row in batch], device=device)[:, None]
            scored = (places >= starts - 1) & (places < ends - 1)
            self._inside = (places > 0) & (places < ends)
            acting = [active_from(row.tokens, self._invocation) for row in batch] if self._invocation else None
            with self._activation.of(acting, width, device):
                inner: Any = self._peft.get_base_model()
                body = inner.get_decoder() if hasattr(inner, "get_decoder") else inner.model
                # What is right of a row's end is padding, which nothing left of it sees.
                hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
            yield cross_entropy(hidden[scored], self._head, tokens[:, 1:][scored[:, :-1]]), int(scored.sum())


def _scored(row: Example) -> int:
    return len(row.tokens) - row.answer_start


def _gradient(factor: torch.Tensor) -> list[float]:
    return [0.0] * len(factor) if factor.grad is None else [float(value) for value in factor.grad]


def _before(factor: torch.Tensor, size: int, _: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0] * factor.repeat_interleave(size), *inputs[1:])


def _after(factor: torch.Tensor, size: int, _: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * factor.repeat_interleave(size)
