"""Frozen linear layers that stay in the blocks they are quantized in: a layer's weights are made when it computes.

Kept like that, the linear layers of an 8B base take 4.5 GB in Q4_0 instead of 14 in bfloat16: LoRA training fits a
GPU of 24 GB. It costs making every layer's weights twice a step, so it is done where memory asks for it (`fits`).
"""

from pathlib import Path
from typing import Any

import gguf
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

from pitstop.engines.machine import available_bytes
from pitstop.errors import BrokenInput
from pitstop.workshop.training.arithmetic import STORED, compute_dtype

SHARE = 0.5  # of the free memory that dequantized weights may take; activations need the rest


class FrozenLinear(torch.nn.Linear):
    """A linear layer without a weight of its own: ``weight``, shape (out, in), is made anew whenever it is read."""

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + bias, as any linear layer; W is not kept for backward."""
        y: torch.Tensor = _Product.apply(input, self)
        return y


class GgufLinear(FrozenLinear):
    """A layer in the blocks of a GGUF file."""

    blocks: torch.Tensor  # uint8, shape (out, bytes of a row)

    def __init__(
        self, blocks: torch.Tensor, ggml_type: int, in_features: int, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(in_features, len(blocks), bias)
        self.register_buffer("blocks", blocks, persistent=False)
        self._type, self._dtype = ggml_type, dtype

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        found = dequantize(self.blocks, self._type).view(self.out_features, self.in_features)
        return found.to(STORED).to(self._dtype)


class Nf4Linear(FrozenLinear):
    """A layer in the blocks of bitsandbytes."""

    blocks: torch.Tensor  # uint8, two values each

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, None if layer.bias is None else layer.bias.data)
        self.register_buffer("blocks", layer.weight.data, persistent=False)
        self._state, self._dtype = layer.weight.quant_state, dtype

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        found: torch.Tensor = dequantize_4bit(self.blocks, self._state)
        return found.view(self.out_features, self.in_features).to(STORED).to(self._dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer = layer
        weight = layer.weight
        return torch.nn.functional.linear(x.to(weight.dtype), weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return upstream @ ctx.layer.weight, None


def fits(config: Any) -> bool:
    """Whether the linear layers of a model of this shape may stand in memory, dequantized."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    size = compute_dtype().itemsize * sum(
        layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear)
    )
    free = _free_memory()
    return free is None or size <= SHARE * free


def _free_memory() -> int | None:
    """Return the free bytes of what is trained on: all GPUs, else the machine; None: not known here."""
    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    return available_bytes()


def release_nf4(model: PreTrainedModel, *, dequantized: bool) -> None:
    """Take a model's NF4 layers over from bitsandbytes: as blocks, or dequantized once and for all."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            made = Nf4Linear(layer, compute_dtype())
            model.set_submodule(name, _plain(made) if dequantized else made)


def _plain(layer: FrozenLinear) -> torch.nn.Linear:
    weight = layer.weight
    made = torch.nn.Linear(
        layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=weight.dtype
    )
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias
    return made


def load_blocks(dequantized: Path, artifact: Path) -> PreTrainedModel:
    """Load a base whose linear layers stay in the blocks of its GGUF file; the rest comes from ``dequantized``.

    Every layer's blocks are held against the dequantized weights of the same artifact: rows that llama.cpp stores in
    another order are put back, and what does not agree stays out.

    Args:
        dequantized: the folder transformers wrote of this artifact.
        artifact: the GGUF file.

    Raises:
        BrokenInput: a layer of the file is not the one in the folder.
    """
    config = AutoConfig.from_pretrained(dequantized)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype())
    model.tie_weights()
    tensors = _tensors(artifact, config.num_hidden_layers)
    head = model.get_output_embeddings()
    with safe_open(dequantized / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        for name, layer in list(model.named_modules()):
            found = tensors.get(name)
            if isinstance(layer, torch.nn.Linear) and layer is not head and found is not None:
                bias = file.get_tensor(f"{name}.bias").to(device) if f"{name}.bias" in stored else None
                blocks = _ordered(found, file.get_tensor(f"{name}.weight"), name, artifact).to(device)
                made = GgufLinear(blocks, int(found.tensor_type), layer.in_features, bias, compute_dtype())
                model.set_submodule(name, made)
        for name, _ in list(model.named_parameters()):
            if name in stored:
                set_module_tensor_to_device(model, name, device, file.get_tensor(name), dtype=compute_dtype())
    model.tie_weights()
    return model.to(device)  # type: ignore[no-any-return]


def gguf_names(architecture: str, layers: int) -> dict[str, str]:
    """Return llama.cpp's names of layers by those that transformers has; none for an architecture it does not know."""
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return {}
    names = gguf.get_tensor_name_map(known[architecture], layers)
    return {theirs: ours for theirs, (_, ours) in names.mapping.items()}


def _tensors(artifact: Path, layers: int) -> dict[str, Any]:
    """Return the quantized tensors of a GGUF file by the names that transformers has for their layers."""
    reader = gguf.GGUFReader(artifact)
    ours = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    quantized = {name: tensor for name, tensor in ours.items() if int(tensor.tensor_type) in GGML_BLOCK}
    names = gguf_names(reader.fields["general.architecture"].contents(), layers)
    return {theirs: quantized[name] for theirs, name in names.items() if name in quantized}


def _ordered(tensor: Any, expected: torch.Tensor, name: str, artifact: Path) -> torch.Tensor:
    """Return a tensor's blocks, shape (rows, bytes), in the order of rows that transformers has."""
    blocks = torch.from_numpy(tensor.data.copy()).view(len(expected), -1)
    made = dequantize(blocks, int(tensor.tensor_type)).view(expected.shape).to(expected.dtype)
    if torch.equal(made, expected):
        return blocks
    # The same rows in another order: llama.cpp rotates pairs where transformers rotates halves.
    key = _row_keys(expected)
    order = _row_keys(made).argsort()[key.argsort().argsort()]
    if not torch.equal(made[order], expected):
        raise BrokenInput(
            f"{name} in {artifact.name} is not what the base was dequantized to",
            where=artifact,
            cure="remove the base folder's shipped/ and train again",
        )
    return blocks[order]


def _row_keys(matrix: torch.Tensor) -> torch.Tensor:
    """Return a number of each row that only equal rows have in common, but for chance."""
    weights = torch.rand(matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return matrix.double() @ weights
