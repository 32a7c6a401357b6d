"""How much memory conversations take, by the header of their base."""

from pitstop.bundle.formats import GgufHeader
from pitstop.errors import UsageError

KV_BYTES = 2  # of a value in KV: float16
WORK = 64 << 20  # bytes a context computes in, its logits included: 51 MB with SmolLM2-135M


def context_bytes(header: GgufHeader, context_length: int, conversations: int) -> int:
    """Return the bytes of a context for so many conversations of so many tokens.

    Raises:
        UsageError: as `kv_bytes_per_token`.
    """
    return memory_of(conversations, context_length, kv_bytes_per_token(header))


def memory_of(conversations: int, context_length: int, token: int) -> int:
    """Return the bytes of so many conversations of so many tokens, of which each takes ``token`` bytes."""
    # There is one more than asked for, for what is evaluated from nothing.
    return WORK + (conversations + 1) * context_length * token


def kv_bytes_per_token(header: GgufHeader) -> int:
    """Return how many bytes of KV a token of a conversation takes, by the header of a base.

    Raises:
        UsageError: the header does not say it in a way that is known here.
    """
    architecture = header.text("general.architecture") or ""

    def number(key: str, default: int = 0) -> int:
        value = header.metadata.get(f"{architecture}.{key}", default)
        numbers = value if isinstance(value, tuple) else (value,)  # some have one for each layer
        return max((int(each) for each in numbers if isinstance(each, int)), default=default)

    heads = number("attention.head_count")
    width = number("embedding_length") // heads if heads else 0
    keys, values = number("attention.key_length", width), number("attention.value_length", width)
    bytes_per_token = number("block_count") * number("attention.head_count_kv", heads) * (keys + values) * KV_BYTES
    if not bytes_per_token:
        raise UsageError(f"{header.path.name} does not say how large its conversations are", where=header.path)
    return bytes_per_token
