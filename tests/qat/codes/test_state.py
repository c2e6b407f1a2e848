"""Codes and scales in a model folder: what is written is read back, and every damage is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from decoct.models.common.errors import UserError
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.record import seal_record
from decoct.qat.codes.state import QUANT_FILE, QuantState, load_quant_state
from decoct.qat.fake_quant import fake_quant, quantize
from decoct.qat.layers.quantized_model import fold, prepare, quantize_model
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=4, group_size=16)
NAMES = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


@pytest.fixture
def state() -> QuantState:
    generator = torch.Generator().manual_seed(0)
    pairs = {name: quantize(torch.randn(6, 32, generator=generator), SPEC) for name in NAMES}
    return QuantState(
        spec=SPEC, modules=NAMES, codes={n: codes for n, (codes, _) in pairs.items()}, scales={n: scale for n, (_, scale) in pairs.items()}
    )


def write(folder: Path, state: QuantState, **changes: Any) -> Path:
    """A quantized folder as the stages write it, without config and tokenizer."""
    folder.mkdir(exist_ok=True)
    weights = {f"{name}.weight": state.dequantized(name) for name in state.modules} | {"model.norm.weight": torch.ones(32)}
    save_file(weights, folder / "model.safetensors")
    (folder / QUANT_FILE).parent.mkdir(exist_ok=True)
    save_file(state.tensors(), folder / QUANT_FILE)
    seal_record(folder, {"format": 1, "files": {}, "quant": state.record() | changes})
    return folder


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_round_trip(tmp_path: Path, state: QuantState) -> None:
    loaded = load_quant_state(write(tmp_path, state))
    assert (loaded.spec, loaded.modules, loaded.hash()) == (state.spec, state.modules, state.hash())
    for name in NAMES:
        assert torch.equal(loaded.codes[name], state.codes[name])
        assert torch.equal(loaded.scales[name], state.scales[name])
        assert torch.equal(loaded.dequantized(name), state.dequantized(name))
    assert set(load_file(tmp_path / QUANT_FILE)) == {f"{name}.{kind}" for name in NAMES for kind in ("codes", "scale")}


def test_codes_beside_the_weights_as_older_versions_wrote_them_are_read(tmp_path: Path, state: QuantState) -> None:
    file = write(tmp_path, state) / QUANT_FILE
    file.rename(tmp_path / "quant.safetensors")
    file.parent.rmdir()
    assert load_quant_state(tmp_path).hash() == state.hash()
    edit(tmp_path / "quant.safetensors", lambda tensors: tensors[f"{NAMES[0]}.scale"].mul_(2))
    with pytest.raises(UserError, match=r"quant\.safetensors: codes or scales differ"):
        load_quant_state(tmp_path)


def test_dequantized_is_the_fake_quantized_weight() -> None:
    weight = torch.randn(6, 32)
    codes, scales = quantize(weight, SPEC)
    state = QuantState(spec=SPEC, modules=("m",), codes={"m": codes}, scales={"m": scales})
    assert state.dequantized("m").numpy().tobytes() == fake_quant(weight, SPEC).numpy().tobytes()


def test_sharded_weights(tmp_path: Path, state: QuantState) -> None:
    write(tmp_path, state)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, tmp_path / weight_map[name])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert load_quant_state(tmp_path).hash() == state.hash()
    index.write_text(json.dumps({"weight_map": weight_map | {f"{NAMES[0]}.weight": "../model-0.safetensors"}}))
    with pytest.raises(UserError, match=r"'\.\./model-0\.safetensors'; only plain file names inside the folder"):
        load_quant_state(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {f"{NAMES[0]}.weight": weight_map["model.norm.weight"]}}))
    with pytest.raises(UserError, match=r"places tensor '.*up_proj.weight' in .*, which does not hold it"):
        load_quant_state(tmp_path)
    index.write_text("{")
    with pytest.raises(UserError, match=r"model.safetensors.index.json .*JSON"):
        load_quant_state(tmp_path)


def test_a_folder_without_codes_names_the_stages(tmp_path: Path, state: QuantState) -> None:
    with pytest.raises(UserError, match=r"holds no codes .*run the stage 'qat' or 'quantize' on the model first"):
        load_quant_state(tmp_path)
    write(tmp_path, state)
    (tmp_path / QUANT_FILE).unlink()
    with pytest.raises(UserError, match="holds no codes"):
        load_quant_state(tmp_path)


def test_changed_weights_codes_and_scales_are_found(tmp_path: Path, state: QuantState) -> None:
    up = NAMES[0]

    def another_weight(tensors: dict[str, Tensor]) -> None:
        tensors[f"{up}.weight"][2, 3] += 1e-6

    edit(write(tmp_path, state) / "model.safetensors", another_weight)
    with pytest.raises(UserError, match=rf"{up}\.weight is not codes \* scales"):
        load_quant_state(tmp_path)

    def one_nibble(tensors: dict[str, Tensor]) -> None:
        tensors[f"{up}.codes"][2, 3] ^= 1

    edit(write(tmp_path, state) / QUANT_FILE, one_nibble)
    with pytest.raises(UserError, match=r"codes or scales differ from what decoct.json recorded"):
        load_quant_state(tmp_path)

    edit(write(tmp_path, state) / QUANT_FILE, lambda tensors: tensors.pop(f"{up}.scale"))
    with pytest.raises(UserError, match=rf"tensor {up}\.scale is missing \(1 differ from decoct\.json\)"):
        load_quant_state(tmp_path)

    edit(write(tmp_path, state) / QUANT_FILE, lambda tensors: tensors.update(other=torch.ones(1)))
    with pytest.raises(UserError, match="tensor other is unexpected"):
        load_quant_state(tmp_path)

    edit(write(tmp_path, state) / "model.safetensors", lambda tensors: tensors.pop(f"{up}.weight"))
    with pytest.raises(UserError, match=rf"{up}\.weight is missing from the weights"):
        load_quant_state(tmp_path)

    edit(write(tmp_path, state) / "model.safetensors", lambda t: t.update({f"{up}.weight": t[f"{up}.weight"].double()}))
    with pytest.raises(UserError, match="is not codes"):
        load_quant_state(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path, state: QuantState) -> None:
    file = write(tmp_path, state) / QUANT_FILE
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=QUANT_FILE):
        load_quant_state(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"spec": {"bits": 4, "zero": 1}}, {"spec": {"bits": 40}}, {"spec": 3}, {"modules": None}, {"modules": 7}]
)
def test_an_unreadable_record_is_refused(tmp_path: Path, state: QuantState, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"decoct.json: the entry 'quant' cannot be read"):
        load_quant_state(write(tmp_path, state, **changes))


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("codes", torch.full((6, 32), 8, dtype=torch.int8), r"codes span 8\.\.8, outside -8\.\.7"),
        ("codes", torch.zeros(6, 32), "codes are torch.float32 of shape"),
        ("codes", torch.zeros(6, 33, dtype=torch.int8), "group_size=16 does not divide in_features=33"),
        ("scales", torch.ones(6, 1), r"scales are torch.float32 of shape \(6, 1\), not float32 of shape \(6, 2\)"),
        ("scales", torch.ones(6, 2).bfloat16(), "scales are torch.bfloat16"),
        ("scales", torch.zeros(6, 2), "a scale is not a positive finite number"),
        ("scales", torch.full((6, 2), float("nan")), "a scale is not a positive finite number"),
        ("scales", torch.full((6, 2), 1 + 2.0**-8), "a scale is not on the grid bf16_fp16"),
        ("scales", torch.full((6, 2), 2.0**-18), "a scale is not on the grid bf16_fp16"),
    ],
)
def test_impossible_codes_and_scales_name_the_module(state: QuantState, kind: str, value: Tensor, words: str) -> None:
    state.check("here")
    changed = {**getattr(state, kind), NAMES[1]: value}
    broken = replace(state, codes=changed) if kind == "codes" else replace(state, scales=changed)
    with pytest.raises(UserError, match=rf"^here: module {NAMES[1]}: {words}"):
        broken.check("here")


def test_hash_sees_spec_names_codes_and_scales(state: QuantState) -> None:
    changed = [
        replace(state, spec=QuantSpec(bits=8, group_size=16)),
        replace(state, modules=NAMES[::-1]),
        replace(state, codes=state.codes | {NAMES[0]: state.codes[NAMES[1]]}),
        replace(state, scales={name: scale * 2 for name, scale in state.scales.items()}),
    ]
    assert len({one.hash() for one in [state, *changed]}) == 5


def test_plain_transformers_gives_the_prepared_logits_from_a_saved_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(20)[None]
    prepare(model, SPEC)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    state = quantize_model(model, SPEC)
    fold(model, state)
    folder = tmp_path / "quantized"
    extra = {QUANT_FILE: state.tensors()}
    save_model_folder(folder, model, None, {"quant": state.record()}, dtype=torch.float32, extra_tensors=extra)
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert names <= model.state_dict().keys(), "servers load every *.safetensors beside config.json"
    assert load_quant_state(folder).hash() == state.hash()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
