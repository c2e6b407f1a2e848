"""Adapters of peft, merged without peft: what peft's own merge gives, and a refusal for whatever is no sum of matrices."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from decoct.models.common.errors import UserError
from decoct.models.folder.import_model import import_model
from decoct.models.folder.loading import load_model, load_tokenizer
from decoct.models.folder.record import read_record
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

from ...support.gguf_files import gguf_of, tiny

Build = Callable[..., tuple[Path, Path, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 260)


@pytest.fixture
def adapted(tokenizer: Any, tmp_path: Path) -> Build:
    """``adapted(model_type, model={}, **LoraConfig)``: (folder of the base, folder of the adapter, peft's model)."""

    def build(model_type: str = "llama", model: dict[str, Any] | None = None, **settings: Any) -> tuple[Path, Path, Any]:
        from peft import LoraConfig, get_peft_model

        tiny(model_type, **(model or {})).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **given))
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.1)
        with warnings.catch_warnings():
            # advice about embeddings, ties and biases, which are the subject here
            warnings.simplefilter("ignore")
            wrapped.save_pretrained(str(tmp_path / "adapter"))
        return tmp_path / "base", tmp_path / "adapter", wrapped.eval()

    return build


def edited(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 11}}),
    "dora": ("llama", {"use_dora": True}),
    "biases": ("qwen2", {"bias": "all", "target_modules": ["q_proj", "v_proj"]}),
    "bias of b": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "whole modules": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "up_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora of conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_merge_is_that_of_peft(form: str, adapted: Build, tmp_path: Path) -> None:
    model_type, settings = FORMS[form]
    base, adapter, wrapped = adapted(model_type, **settings)
    import_model(str(base), tmp_path / "merged", adapter=adapter)
    merged, before = load_model(tmp_path / "merged", dtype=torch.float32), load_model(base, dtype=torch.float32)
    with torch.no_grad():
        ids = torch.arange(40)[None]
        assert torch.allclose(merged(input_ids=ids).logits, wrapped(input_ids=ids).logits, atol=2e-4, rtol=1e-3)
        assert not torch.allclose(merged(input_ids=ids).logits, before(input_ids=ids).logits, atol=1e-2)
    expected = wrapped.merge_and_unload(safe_merge=True).state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-5, rtol=1e-5), name
    # another order of sums may move the last bits of what changed; what did not change is the same
    untouched = [name for name, tensor in before.state_dict().items() if torch.equal(tensor, expected[name])]
    assert untouched and all(torch.equal(merged.state_dict()[name], expected[name]) for name in untouched)


def test_the_sum_is_rounded_once_to_the_dtype_of_the_base(adapted: Build, tmp_path: Path) -> None:
    base, adapter, _ = adapted()
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    what = import_model(str(base), tmp_path / "merged", adapter=adapter)
    assert what.startswith("an adapter (rank 3, adapter/adapter_model.safetensors, sha256 ") and what.endswith("weights of base")
    parts, found = load_file(adapter / "adapter_model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in stored.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in parts:
            a, b = (parts[f"{module}.lora_{part}.weight"].double() for part in "AB")
            exact = tensor.double() + 5 / 3 * (b @ a)
            # fp32 before the one rounding: never further from the exact sum than half a step and a little
            assert ((found[name].double() - exact).abs() <= exact.abs() * 2.0**-8).all(), name
        else:
            assert torch.equal(found[name], tensor), name
    facts = read_record(tmp_path / "merged")["imported"]
    assert (facts["format"], facts["base"], facts["rank"]) == ("adapter", "base", 3)


def test_an_adapter_names_its_base_and_a_gguf_file_may_be_one(adapted: Build, tokenizer: Any, tmp_path: Path) -> None:
    _, adapter, _ = adapted()
    import_model(str(adapter), tmp_path / "one")
    file = gguf_of(tmp_path / "base.gguf", tiny("llama"), tokenizer)
    import_model(str(file), tmp_path / "two", adapter=adapter)
    one, two = (load_model(tmp_path / name, dtype=torch.float32).state_dict() for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert load_tokenizer(tmp_path / "two").encode("return") == tokenizer.encode("return")
    edited(adapter, base_model_name_or_path=None)
    with pytest.raises(UserError, match=f"does not say which model it belongs to: decoct import MODEL --adapter {adapter}"):
        import_model(str(adapter), tmp_path / "three")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prefix tuning": ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'; only LORA adapters"),
    "of a later peft": ({"use_wonder": True}, "use_wonder=True is not known here"),
    "experts": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters=.* is not known here"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base model's weights"),
    "rank": ({"r": 4}, r"lora_A.weight has shape \(3, \d+\); rank 4 and .* ask for \(4, \d+\)"),
    "no rank": ({"r": 0}, "r is 0, not a number"),
    "alpha": ({"lora_alpha": "many"}, "lora_alpha is 'many', not a number"),
    "magnitudes": ({"use_dora": True}, "use_dora and the magnitude vector of .* contradict each other"),
    "pattern": ({"rank_pattern": {"(": 3}}, "rank_pattern holds the pattern .*, which is no regular expression"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_settings_that_cannot_be_merged_are_refused_by_name(case: str, adapted: Build, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    base, adapter, _ = adapted()
    edited(adapter, **changes)
    with pytest.raises(UserError, match=message):
        import_model(str(base), tmp_path / "merged", adapter=adapter)
    assert sorted(one.name for one in tmp_path.iterdir() if "cache" not in one.name) == ["adapter", "base"]


def _renamed(parts: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("layers.1", "layers.7"): tensor for name, tensor in parts.items()}


def _lone(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in parts.items() if not name.endswith("1.self_attn.q_proj.lora_B.weight")}


def _nan(parts: dict[str, Any]) -> dict[str, Any]:
    name = next(name for name in parts if name.endswith("lora_B.weight"))
    return {**parts, name: parts[name] * float("nan")}


FILES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "another depth": (_renamed, r"changes the module model.layers.7.* does not have; it is for another model"),
    "half a pair": (_lone, "model.layers.1.self_attn.q_proj has no lora_B"),
    "nan": (_nan, "holds NaN or infinite numbers"),
    "other names": (lambda parts: {f"model.{name}": one for name, one in parts.items()}, "is no adapter of peft"),
    "other parts": (lambda parts: {**parts, "base_model.model.lm_head.lora_E": torch.ones(3)}, "is no part of a LoRA adapter"),
    "a head of another size": (lambda parts: {**parts, "base_model.model.lm_head.weight": torch.ones(300, 64)}, r"has shape \(300, 64\)"),
    "no such module": (
        lambda parts: {**parts, "base_model.model.model.norm.bias": torch.ones(64)},
        "base has none; it is for another model",
    ),
    "nothing": (lambda parts: {}, "is empty"),
}


@pytest.mark.parametrize("case", list(FILES))
def test_files_of_another_model_are_refused(case: str, adapted: Build, tmp_path: Path) -> None:
    change, message = FILES[case]
    base, adapter, _ = adapted()
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    with pytest.raises(UserError, match=message):
        import_model(str(base), tmp_path / "merged", adapter=adapter)
    assert not (tmp_path / "merged").exists()


def test_a_wider_base_is_another_model(adapted: Build, tokenizer: Any, tmp_path: Path) -> None:
    _, adapter, _ = adapted()
    tiny("llama", intermediate_size=128).save_pretrained(tmp_path / "wider")
    tokenizer.save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match=r"down_proj.lora_A.weight has shape \(3, 96\); .* ask for \(3, 128\)"):
        import_model(str(tmp_path / "wider"), tmp_path / "merged", adapter=adapter)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_tied_embeddings_cannot_be_changed_on_one_side(adapted: Build, tmp_path: Path, settings: dict[str, Any]) -> None:
    base, adapter, _ = adapted(model={"tie_word_embeddings": True}, **settings)
    file = adapter / "adapter_model.safetensors"
    alone = {name: tensor.clone() for name, tensor in load_file(file).items() if "lm_head" not in name}
    save_file(alone, file)
    with pytest.raises(UserError, match=r"embed_tokens.weight, which .* shares with lm_head.weight \(tied embeddings\)"):
        import_model(str(base), tmp_path / "merged", adapter=adapter)


def test_pickled_or_missing_adapters_are_refused(adapted: Build, tmp_path: Path) -> None:
    base, adapter, _ = adapted()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"its weights only as adapter_model.bin, which is pickled and not read"):
        import_model(str(base), tmp_path / "merged", adapter=adapter)
    with pytest.raises(UserError, match=r"is no adapter of peft: it has no adapter_config\.json"):
        import_model(str(base), tmp_path / "merged", adapter=tmp_path)
