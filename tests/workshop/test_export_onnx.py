"""One ONNX base takes any adapter, and computes what PEFT computes; what it cannot carry is refused by name."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from onnx_bases import CONFIGS, OnnxBase, make_base, save_model, torch_logits
from pitstop.bundle.formats import read_onnx_adapter, read_onnx_graph
from pitstop.bundle.onnx import FIRST_ROW, check_files, check_onnx_adapter, locate, read_settings, sites
from pitstop.errors import BrokenInput, MissingExtra, RecordError, UsageError
from pitstop.workshop.export.onnx import build_base, export_onnx, load_shipped
from pitstop.workshop.export.onnx.blocks import to_blocks

SAME = 2e-3  # largest difference of logits; those here are of the order of 1
WORKING = ["llama, tied", "llama, untied", "qwen2", "qwen3", "phi3"]
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
        "alpha_pattern": {"v_proj": 12, "layers.0.self_attn.q_proj": 3, ".*1.*up_proj": 1},
    },
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 16}, "alpha_pattern": {"down_proj": 3}},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxBase]:
    """Made when a test asks for one."""

    class Made(dict[str, OnnxBase]):
        def __missing__(self, name: str) -> OnnxBase:
            self[name] = make_base(name, tmp_path_factory.mktemp("base"))
            return self[name]

    return Made()


def export(base: OnnxBase, adapter: Path, precision: str = "f32") -> Path:
    target = adapter.with_suffix(".onnx_adapter")
    export_onnx(adapter, base.folder, base.graph, base.sha256, target, precision=precision)
    return target


@pytest.mark.parametrize("name", WORKING)
def test_base_and_adapter_compute_what_peft_computes(bases: dict[str, OnnxBase], name: str, tmp_path: Path) -> None:
    base = bases[name]
    adapted = base.adapted(tmp_path / "peft")
    trained = torch_logits(adapted)
    with adapted.disable_adapter():
        plain = torch_logits(adapted)
    assert np.abs(trained - plain).max() > 0.5, "an adapter that does nothing proves nothing"
    assert np.abs(base.logits() - plain).max() < SAME
    assert np.abs(base.logits(export(base, tmp_path / "peft")) - trained).max() < SAME


@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "phi3"])
def test_fused_projections_take_the_same_adapters(name: str, tmp_path: Path) -> None:
    base = make_base(name, tmp_path, "fp32-fused")
    names = sites(read_onnx_graph(base.graph))
    assert {name.removeprefix("lora.0.") for name in names if name.startswith("lora.0.")} == {
        "attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
    }  # fmt: skip
    targets = base.linear if name == "phi3" else ["q_proj", "v_proj", "down_proj"]
    adapted = base.adapted(tmp_path / "peft", target_modules=targets, rank_pattern={targets[1]: 2})
    assert np.abs(base.logits(export(base, tmp_path / "peft")) - torch_logits(adapted)).max() < SAME


def test_fused_or_not_the_weights_are_the_same(tmp_path: Path) -> None:
    one, other = (make_base("llama, tied", tmp_path / name, name) for name in ("int8", "int8-fused"))
    apart, fused = (load_shipped(base.folder, base.graph, torch.float32).state_dict() for base in (one, other))
    assert all(torch.equal(apart[name], fused[name]) for name in apart)
    assert np.abs(one.logits() - other.logits()).max() < 1e-4


def test_logits_of_the_last_token_alone_are_the_same(bases: dict[str, OnnxBase], tmp_path: Path) -> None:
    for base in bases["llama, tied"], bases["phi3"], make_base("llama, untied", tmp_path, "int8"):
        whole, last = base.logits(), base.logits(feeds={FIRST_ROW: np.array([-1])})
        assert whole.shape == last.shape
        assert (whole[0, -1] == last[0, -1]).all()
        assert (last[0, 0] == last[0, -1]).all(), "nothing else was computed"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_of_scaling_and_any_choice_of_modules(
    bases: dict[str, OnnxBase], variant: str, tmp_path: Path
) -> None:
    base = bases["llama, tied"]
    adapted = base.adapted(tmp_path / "peft", **VARIANTS[variant])
    shipped = base.logits(export(base, tmp_path / "peft"))
    assert np.abs(shipped - base.logits()).max() > 0.05
    assert np.abs(shipped - torch_logits(adapted)).max() < SAME


def test_the_base_is_as_before_after_an_adapter(bases: dict[str, OnnxBase], tmp_path: Path) -> None:
    base = bases["llama, tied"]
    before = base.logits()
    base.adapted(tmp_path / "peft")
    base.logits(export(base, tmp_path / "peft"))
    assert (base.logits() == before).all()


def test_the_files_pass_the_checks_of_a_device(bases: dict[str, OnnxBase], tmp_path: Path) -> None:
    base = bases["qwen3"]
    graph = read_onnx_graph(base.graph)
    check_files(graph)
    assert read_settings(graph, locate(graph)["genai_config.json"]).vocabulary_size == 256
    assert len(sites(graph)) == 14
    base.adapted(tmp_path / "peft")
    header = read_onnx_adapter(export(base, tmp_path / "peft", "f16"))
    check_onnx_adapter(header, graph, base.sha256)
    assert {tensor.type for tensor in header.tensors} == {"F16"}


@pytest.mark.parametrize("name", ["llama, tied", "llama, untied"])
def test_eight_bits_of_everything_and_the_embedding_too(name: str, tmp_path: Path) -> None:
    base = make_base(name, tmp_path, "int8")
    weights = load_shipped(base.folder, base.graph, torch.float32)
    apart = sum(value.numel() for value in weights.parameters())
    assert (base.graph.parent / "model.onnx.data").stat().st_size < 1.3 * apart
    # What is left is the rounding of what flows in, which a float32 model does not do.
    assert np.abs(base.logits() - torch_logits(weights.eval())).max() < 0.05
    original = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    moved = [(one - other).abs().max() for one, other in zip(weights.parameters(), original.parameters(), strict=True)]
    assert 0 < max(moved) < 0.005
    adapted = base.adapted(tmp_path / "peft")
    assert np.abs(base.logits(export(base, tmp_path / "peft")) - torch_logits(adapted)).max() < 0.1


def test_four_bits_take_the_same_adapters(tmp_path: Path) -> None:
    base = make_base("llama, even", tmp_path, "int4")
    weights = load_shipped(base.folder, base.graph, torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    lost = np.abs(torch_logits(original.eval()) - torch_logits(weights)).max()
    assert np.abs(base.logits() - torch_logits(weights)).max() < lost / 4, "those are the weights it computes with"
    base.adapted(tmp_path / "peft")
    adapted = torch_logits(PeftModel.from_pretrained(weights, tmp_path / "peft").eval())
    assert np.abs(base.logits(export(base, tmp_path / "peft")) - adapted).max() < lost / 4
    assert np.abs(base.logits() - adapted).max() > lost


def test_weights_out_of_q8_0_stay_as_they_are() -> None:
    random = np.random.default_rng(3)
    steps = random.random((40, 3, 1)).astype(np.float16)
    whole = random.integers(-126, 127, (40, 3, 32))
    whole[:, :, 5] = np.where(whole[:, :, 6] > 0, 127, -127)  # Q8_0 scales every block so that its largest is 127
    matrix = (whole * steps.astype(np.float32)).reshape(40, 96)
    values, scales = to_blocks(matrix)
    assert (scales == steps[:, :, 0]).all()
    assert (values.astype(int) - 128 == whole).all()


@pytest.mark.parametrize("shape", [(8, 33), (1, 5)])
def test_rows_that_are_no_whole_blocks_are_filled_up(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(4).normal(size=shape)
    values, scales = to_blocks(matrix)
    again = ((values.astype(np.float32) - 128) * scales[:, :, None].astype(np.float32)).reshape(shape[0], -1)
    assert np.abs(again[:, : shape[1]] - matrix).max() < 0.03
    assert (again[:, shape[1] :] == 0).all()


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_what_the_builder_cannot_do_is_refused_with_what_works(name: str, tmp_path: Path) -> None:
    folder = save_model(name, tmp_path / "hf")
    with pytest.raises(BrokenInput, match=rf"{CONFIGS[name].model_type} cannot be exported") as refusal:
        build_base(folder, tmp_path / "base", "fp32")
    assert "llama" in str(refusal.value)
    assert not (tmp_path / "base" / "model.onnx").exists()


def test_what_an_adapter_file_cannot_say_is_refused_all_at_once(bases: dict[str, OnnxBase], tmp_path: Path) -> None:
    base = bases["llama, untied"]
    base.adapted(tmp_path / "peft", use_dora=True, bias="lora_only", modules_to_save=["lm_head"])
    with pytest.raises(RecordError) as refusal:
        export(base, tmp_path / "peft")
    assert len(refusal.value.problems) == 3
    assert "pitstop merge" in str(refusal.value)


def test_a_module_the_graph_has_no_room_for_is_refused_by_name(bases: dict[str, OnnxBase], tmp_path: Path) -> None:
    base = bases["llama, untied"]
    base.adapted(tmp_path / "peft", target_modules=["lm_head", "q_proj"])
    with pytest.raises(RecordError, match="changes lm_head"):
        export(base, tmp_path / "peft")


def test_stacked_adapters_are_those_that_peft_concatenates(bases: dict[str, OnnxBase], tmp_path: Path) -> None:
    base = bases["llama, tied"]
    for seed, rank in ((1, 4), (2, 8)):
        base.adapted(tmp_path / str(seed), seed=seed, r=rank)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    both = PeftModel.from_pretrained(model, tmp_path / "1", adapter_name="one")
    both.load_adapter(tmp_path / "2", adapter_name="two")
    both.add_weighted_adapter(["one", "two"], [1.0, 0.5], "sum", combination_type="cat")
    both.set_adapter("sum")
    both.eval().save_pretrained(tmp_path / "saved", selected_adapters=["sum"])
    shipped = base.logits(export(base, tmp_path / "saved" / "sum"))
    assert np.abs(shipped - torch_logits(both)).max() < SAME


@pytest.mark.parametrize("other", ["0.17.1", None])
def test_another_builder_fails_loudly(other: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if other is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return other

    folder = save_model("llama, tied", tmp_path / "hf")
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UsageError if other else MissingExtra, match=other or "workshop"):
        build_base(folder, tmp_path / "base", "fp32")
