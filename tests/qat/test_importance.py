"""Importance matrices of llama.cpp, in both forms: read exactly, refused where damaged or of another model, and used by the search."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, PreTrainedModel

from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import plan
from decoct.launch.plan.stage_shapes import ImpossibleStageError
from decoct.launch.run.stage_key import stage_key
from decoct.models.common.errors import UserError
from decoct.models.families import decoder_linears
from decoct.qat.export.gguf.container import TensorPlan, TensorType, write_gguf
from decoct.qat.importance import importance_of
from decoct.qat.ptq import METHODS, RoundingMethod, round_model
from decoct.qat.ptq.methods import Stack
from decoct.qat.readers.imatrix import read_imatrix
from decoct.qat.scheme import SpecChange
from decoct.qat.spec import QuantSpec
from decoct.qat.transforms.settings import TransformSettings
from decoct.trainer.settings import TrainerSettings
from decoct.trainer.settings_quantization import QuantizeSettings

Numbers = dict[str, NDArray[np.float32]]
CALLS = 8
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def numbers(layers: int = 2, width: int = 32, ffn: int = 48) -> Numbers:
    """Mean squares, multiples of 1/4, of which every form holds the sums exactly."""
    generator = np.random.default_rng(1)
    widths = {f"blk.{layer}.{name}.weight": ffn if name == "ffn_down" else width for layer in range(layers) for name in NAMES}
    return {name: (generator.integers(1, 64, size) / 4).astype(np.float32) for name, size in widths.items()}


def legacy(path: Path, means: Numbers, text: str | None = "a.txt") -> Path:
    parts = [struct.pack("<i", len(means))]
    for name, values in means.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", CALLS, len(values)), (values * CALLS).tobytes()]
    tail = b"" if text is None else struct.pack("<ii", CALLS, len(text)) + text.encode()
    path.write_bytes(b"".join([*parts, tail]))
    return path


def newer(path: Path, means: Numbers, kind: str = "imatrix", counts: float = 24.0) -> Path:
    tensors = []
    for name, values in means.items():
        sums = (values * np.float32(24)).astype("<f4").reshape(1, -1)
        tensors.append(TensorPlan(f"{name}.in_sum2", TensorType.F32, sums.shape, lambda sums=sums: sums))
        tensors.append(TensorPlan(f"{name}.counts", TensorType.F32, (1, 1), lambda: np.array([[counts]], "<f4")))
    write_gguf(path, {"general.type": kind, "imatrix.chunk_count": 3, "imatrix.chunk_size": 8, "imatrix.datasets": ["a.txt"]}, tensors)
    return path


@pytest.mark.parametrize("form", ["old", "old without a text", "new"])
def test_both_forms_hold_the_same_mean_squares(tmp_path: Path, form: str) -> None:
    means = numbers()
    file = newer(tmp_path / "m.gguf", means) if form == "new" else legacy(tmp_path / "m.dat", means, None if "without" in form else "a")
    found = read_imatrix(file)
    assert found.keys() == means.keys()
    assert all(np.array_equal(found[name], means[name]) for name in means)


def test_what_is_no_importance_matrix_is_refused(tmp_path: Path) -> None:
    means = numbers(1)
    whole = legacy(tmp_path / "whole.dat", means, None).read_bytes()
    name = next(iter(means))
    cases: list[tuple[Path, str]] = [
        (tmp_path / "missing.dat", "cannot be read: No such file"),
        (newer(tmp_path / "model.gguf", means, kind="model"), "no importance matrix"),
        (newer(tmp_path / "no.gguf", means, counts=0.0), "no text reached"),
        (legacy(tmp_path / "negative.dat", means | {name: -means[name]}), "no mean squares"),
        (legacy(tmp_path / "zero.dat", means | {name: means[name] * 0}), "no text reached it"),
        (legacy(tmp_path / "nan.dat", means | {name: means[name] * np.float32(np.nan)}), "no mean squares"),
    ]
    for label, content in (
        ("text", b"def f(x): return x\n" * 50),
        ("empty", b""),
        *((f"cut{at}", whole[:at]) for at in (3, 9, 60, len(whole) - 1)),
    ):
        file = tmp_path / label
        file.write_bytes(content)
        cases.append((file, "is not an importance matrix"))
    for file, message in cases:
        with pytest.raises(UserError, match=message):
            read_imatrix(file)


def test_a_matrix_of_another_model_is_refused_by_name_and_width(tmp_path: Path) -> None:
    inputs = {f"model.layers.{layer}.{name}": 48 if "down" in name else 32 for layer in range(2) for name in NAMES.values()}
    found = importance_of(legacy(tmp_path / "m.dat", numbers() | {"output.weight": np.ones(32, np.float32)}), "llama", inputs)
    assert np.array_equal(found["model.layers.1.mlp.down_proj"], numbers()["blk.1.ffn_down.weight"])
    for label, means, message in (
        (
            "deeper",
            numbers(3),
            r"has an entry 'blk\.2\.attn_q\.weight', and the model has no such linear \(7 in all\): it is of another model",
        ),
        ("flatter", numbers(1), r"has no entry 'blk\.1\.attn_q\.weight' for model\.layers\.1\.self_attn\.q_proj"),
        ("wider", numbers(width=64), r"blk\.0\.attn_q\.weight has 64 numbers, and model\.layers\.0\.self_attn\.q_proj has 32 inputs"),
    ):
        with pytest.raises(UserError, match=message):
            importance_of(legacy(tmp_path / label, means), "llama", inputs)
    with pytest.raises(UserError, match="cannot convert model_type 'olmo2'"):
        importance_of(tmp_path / "m.dat", "olmo2", inputs)


@pytest.mark.parametrize("spec", [QuantSpec(bits=3, group_size=16), QuantSpec(kind="q4_k")])
def test_the_search_is_weighted_by_it(random_model: Callable[..., PreTrainedModel], spec: QuantSpec) -> None:
    width = 256 if spec.super_block else 32
    shape: dict[str, Any] = {"hidden_size": width, "head_dim": width // 4, "intermediate_size": width, "num_hidden_layers": 1}
    model, name = random_model("llama", **shape), "model.layers.0.mlp.up_proj"
    weights = {module: linear.weight.detach().clone() for module, linear in decoder_linears(model).items()}
    importance = {module: torch.rand(width, generator=torch.Generator().manual_seed(2)) ** 4 for module in weights}
    state = round_model(model, spec, RoundingMethod(method="mse"), importance=importance).state
    stack = Stack(weight=weights[name], mask=None, moments=importance[name])
    expected = METHODS["mse"].round(stack, spec, RoundingMethod(method="mse", weighted=True))
    assert torch.equal(state.dequantized(name), expected.values(spec))
    plain = METHODS["mse"].round(stack, spec, RoundingMethod(method="mse"))
    assert not torch.equal(state.dequantized(name), plain.values(spec))


def test_settings_say_where_it_has_no_effect() -> None:
    for given, message in (
        ({"method": "gptq"}, "importance='m.dat' belongs to method=mse; leave one of them out"),
        ({}, "belongs to method=mse"),
        ({"method": "mse", "weighted": True}, "has the mean squares that weighted would measure"),
        ({"method": "mse", "transform": TransformSettings(method="awq")}, "is of the inputs before transform, which changes them"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizeSettings(importance="m.dat", **given)  # pyright: ignore[reportArgumentType]
    assert not QuantizeSettings(method="mse", importance="m.dat").calibrates


def test_the_stage_key_follows_the_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**more: Any) -> str:
        return stage_key(
            name="quantize", kind="quantize", settings=QuantizeSettings(method="mse", **more), format_version=1, input_hash="a", data="b",
            teacher=None, trainer=TrainerSettings(), seed=0,
        )  # fmt: skip

    first, same, other = (legacy(tmp_path / name, numbers(layers)) for name, layers in (("a", 2), ("b", 2), ("c", 1)))
    assert key(importance=str(first)) == key(importance=str(same))
    assert len({key(), key(importance=str(first)), key(importance=str(other))}) == 3
    assert len({key(), key(mix="q4_k_m"), key(weights=QuantSpec(bits=2)), key(weights=QuantSpec(ternary=True))}) == 4
    # stages that use none of these keep the keys that they had before there were any
    monkeypatch.setattr("decoct.launch.run.stage_key.sha256_json", str)
    told = key(embedding=SpecChange(bits=8), overrides={"*.q_proj": SpecChange(bits=8)})
    assert "'bits': 8" in told and not any(f"'{word}'" in told for word in ("importance", "mix", "ternary"))


def test_a_plan_refuses_one_of_another_model(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, vocab_size=64, num_hidden_layers=2
    ).save_pretrained(tmp_path)

    def stages(path: Path) -> list[Any]:
        quantize = {"method": "mse", "weights": {"group_size": 16}, "importance": str(path)}
        return [{"quantize": quantize}]

    recipe: dict[str, Any] = {"name": "x", "student": {"path": str(tmp_path)}, "data": {"builtin": "python-stdlib", "seq_length": 32}}
    assert plan(recipe_from_dict(recipe | {"stages": stages(legacy(tmp_path / "own.dat", numbers()))})).stages
    with pytest.raises(ImpossibleStageError, match=r"^stages\.0\.quantize\.importance: .*deeper\.dat has an entry 'blk\.2"):
        plan(recipe_from_dict(recipe | {"stages": stages(legacy(tmp_path / "deeper.dat", numbers(3)))}))
    with pytest.raises(ImpossibleStageError, match=r"importance: .*missing\.dat cannot be read: No such file"):
        plan(recipe_from_dict(recipe | {"stages": stages(tmp_path / "missing.dat")}))
