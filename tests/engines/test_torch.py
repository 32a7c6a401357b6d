"""What only the torch engine has: PEFT folders, and a model that comes from outside and goes back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitstop.demo.smollm2 import SHA256
from pitstop.engines.base import PLAIN_BASE, Engine, Use, log_softmax
from pitstop.errors import FormatError

pytestmark = pytest.mark.slow  # the model is dequantized once, which takes more than 10 s

Make = Callable[..., Path]
TEXT = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    "The capital of France is Paris, a city on the Seine. It has about two million inhabitants.<|im_end|>\n"
)


@pytest.fixture
def changed(peft_adapter: Make, tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter folder and change its config."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(peft_adapter(), folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config = {name: value for name, value in (config | changes).items() if value is not None}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def test_modules_that_do_not_exist_are_named(torch_engine: Engine, changed: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match=r"c_attn, query_key_value(.|\n)*recipe"):
        torch_engine.load_adapter("one", changed(target_modules=["q_proj", "query_key_value", "c_attn"]))
    assert torch_engine.adapters == ()
    assert np.isfinite(torch_engine.logits([1])).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "PEFT cannot load"),
        ({"target_modules": "nothing.*", "layers_to_transform": None}, "PEFT cannot load"),
        ({"target_modules": ["q_proj"]}, "do not belong to the config"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}, "do not belong to the config"),
        ({"peft_type": "NOTHING"}, "PEFT cannot read"),
        ({"of_a_later_peft": 1}, "of_a_later_peft"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    torch_engine: Engine, changed: Callable[..., Path], peft_adapter: Make, changes: dict[str, Any], message: str
) -> None:
    before = torch_engine.logits([1, 2, 3])
    with pytest.raises(FormatError, match=message):
        torch_engine.load_adapter("one", changed(**changes))
    assert torch_engine.adapters == ()
    assert np.array_equal(torch_engine.logits([1, 2, 3]), before)
    torch_engine.load_adapter("one", peft_adapter())


def test_an_adapter_of_another_method_is_refused(torch_engine: Engine, peft_adapter: Make) -> None:
    folder = peft_adapter()
    other = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(FormatError, match="only LoRA"):
        torch_engine.load_adapter("one", folder)


def test_weights_are_read_as_safetensors_only(torch_engine: Engine, peft_adapter: Make) -> None:
    folder = peft_adapter()
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"cannot read adapter_model\.safetensors"):
        torch_engine.load_adapter("one", folder)
    weights.write_bytes((folder / "adapter_model.bin").read_bytes()[:-4])
    with pytest.raises(FormatError, match="no good safetensors file"):
        torch_engine.load_adapter("one", folder)
    with pytest.raises(FormatError, match="not finite"):
        torch_engine.load_adapter("one", peft_adapter(size=float("inf")))
    (folder / "pitstop.json").write_text("{")
    with pytest.raises(FormatError, match=r"pitstop\.json"):
        torch_engine.load_adapter("one", folder)


def test_the_model_goes_back_as_it_came(torch_parts: tuple[Any, Any], peft_adapter: Make) -> None:
    from pitstop.engines.torch import TorchEngine

    names = {name for name, _ in torch_parts[0].named_parameters()}
    with TorchEngine(*torch_parts, base_sha256=SHA256, context_length=64) as engine:
        engine.load_adapter("one", peft_adapter())
        engine.load_adapter("two", peft_adapter(seed=2))
        engine.logits([1], Use("two", 0.5))
    assert {name for name, _ in torch_parts[0].named_parameters()} == names


def test_what_peft_saves_is_loaded(torch_engine: Engine, torch_parts: tuple[Any, Any], tmp_path: Path) -> None:
    """rsLoRA with a rank per module, as PEFT itself writes it, gives what PEFT itself computes."""
    import copy
    import warnings

    import peft
    import torch

    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[5],
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(copy.deepcopy(torch_parts[0]), config)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    (tmp_path / "pitstop.json").write_text(json.dumps({"base_sha256": SHA256}))
    torch_engine.load_adapter("one", tmp_path)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([[1, 2, 3]])).logits[0].numpy()
    assert np.abs(torch_engine.logits([1, 2, 3], Use("one")) - expected).max() <= 1e-3
    assert np.abs(torch_engine.logits([1, 2, 3]) - expected).max() > 0.1


def test_llama_and_torch_agree_on_the_same_weights(
    torch_engine: Engine, open_llama: Any, peft_adapter: Make, gguf_adapter: Make
) -> None:
    """Measured on the plain base, 16-bit against 32-bit floats: KL at most 2.1e-5 nats a token, logits within 0.052."""
    llama = open_llama()
    llama.load_adapter("one", gguf_adapter())
    torch_engine.load_adapter("one", peft_adapter())
    tokens = llama.tokenize(TEXT)
    assert torch_engine.tokenize(TEXT) == tokens
    for use in (PLAIN_BASE, Use("one"), Use("one", 0.5)):
        ours, theirs = (log_softmax(engine.logits(tokens, use)) for engine in (llama, torch_engine))
        kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
        assert kl.max() < 1e-3
        assert (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).mean() > 0.95
    llama.close()
