"""One training by several processes: each takes its share of every batch's rows, and all do the same step.

Started by `accelerate launch` or `torchrun`, which set WORLD_SIZE; alone, nothing here does anything. Files are the
first process's work.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from pitstop.errors import UsageError


def refuse_sharding() -> None:
    """Refuse launchers that would spread one model's weights over processes; here each has the whole base.

    Raises:
        UsageError: FSDP or DeepSpeed is asked for.
    """
    for name, key in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(key, "false").lower() == "true":
            raise UsageError(
                f"{name} spreads a model's weights over processes, which pitstop does not train with",
                cure='launch with tools/accelerate_ddp.yaml; [base] kept = "blocks" takes a quarter of the memory',
            )


def count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this one writes the files and shows the progress."""
    return count() == 1 or bool(_state().is_main_process)


def rank() -> int:
    """Return the number of this one, from 0."""
    return 0 if count() == 1 else int(_state().process_index)


def wait() -> None:
    """Go on when all of them are here."""
    if count() > 1:
        _state().wait_for_everyone()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first one do this before the others: what it leaves behind they find."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def add_up(weights: Iterable[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """Replace gradients and loss by their sums over all processes: one exchange for all of them."""
    if count() == 1:
        return
    trained = [weight for weight in weights if weight.requires_grad]
    for weight in trained:
        if weight.grad is None:  # this process had no rows
            weight.grad = torch.zeros_like(weight)
    parts = [weight.grad for weight in trained if weight.grad is not None]
    flat = torch.cat([part.flatten().float() for part in (*parts, loss)])
    torch.distributed.all_reduce(flat)
    sums = flat.split([part.numel() for part in (*parts, loss)])
    for part, total in zip((*parts, loss), sums, strict=True):
        part.copy_(total.view(part.shape))


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())
