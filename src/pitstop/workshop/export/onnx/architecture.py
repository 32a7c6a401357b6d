"""What a decoder is made of, by its config: every projection that an adapter may change, and its shape.

Models and the graph builder name and group matrices as they like. Here is what must come out.
"""

from optimum.utils import NormalizedConfigManager, NormalizedTextConfig
from transformers import PretrainedConfig

from pitstop.errors import BrokenInput

TESTED = ("llama", "qwen2", "qwen3", "phi3")  # model types whose exported logits are compared with PEFT's in the tests

# Projections of one input that may be one matrix, in a model or in a graph: their outputs follow one another.
GROUPS = {
    "attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def n_layers(config: PretrainedConfig) -> int:
    """Return how many decoder layers there are."""
    return int(_normalized(config).num_layers)


def projections(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of one layer's projections by name, such as `attn.q_proj`.

    Raises:
        BrokenInput: this is no decoder of attention and gated feed-forward layers.
    """
    try:
        normalized = _normalized(config)
        hidden, heads, inner = normalized.hidden_size, normalized.num_attention_heads, config.intermediate_size
    except AttributeError as error:
        raise unsupported(config, f"its config does not say: {error}") from error
    # optimum knows neither of the two: heads may be wider than their share of the hidden state, and fewer for the keys.
    size = getattr(config, "head_dim", None) or hidden // heads
    kv = size * (getattr(config, "num_key_value_heads", None) or heads)
    return {
        "attn.q_proj": (hidden, heads * size),
        "attn.k_proj": (hidden, kv),
        "attn.v_proj": (hidden, kv),
        "attn.o_proj": (heads * size, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def unsupported(config: PretrainedConfig, why: str) -> BrokenInput:
    """Return the refusal of a model that cannot be an ONNX base, with those that can."""
    return BrokenInput(
        f"{config.model_type} cannot be exported to ONNX: {why}",
        cure=f"use a base of one of the architectures that work ({', '.join(TESTED)}), or ship GGUF",
    )


def _normalized(config: PretrainedConfig) -> NormalizedTextConfig:
    try:
        kind = NormalizedConfigManager.get_normalized_config_class(config.model_type)
    except KeyError:  # one that optimum does not know by name
        kind = NormalizedTextConfig
    return kind(config)
