"""Where an activated LoRA begins to act (aLoRA, arXiv:2504.12397): pure, for every engine.

Such an adapter has an invocation, some tokens that it was trained to wait for. Before their last occurrence the model
computes what the plain base computes, so that KV belongs to the base, and all such adapters can share it.
"""

from collections.abc import Sequence

NEVER = 1 << 62  # a position that no conversation reaches


def active_from(tokens: Sequence[int], invocation: Sequence[int]) -> int:
    """Return the first position at which an adapter acts: 0 without an invocation, NEVER if the tokens lack it."""
    width, wanted = len(invocation), list(invocation)
    if not width:
        return 0
    for at in range(len(tokens) - width, -1, -1):
        if list(tokens[at : at + width]) == wanted:
            return at
    return NEVER


def with_invocation(tokens: Sequence[int], invocation: Sequence[int]) -> tuple[int, ...]:
    """Return tokens under which the adapter acts somewhere: where they lack its invocation, it is put before them."""
    lacking = bool(invocation) and active_from(tokens, invocation) == NEVER
    return (*invocation, *tokens) if lacking else tuple(tokens)
