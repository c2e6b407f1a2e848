"""A cut model of every family: sliced equals masked, reloaded equals in memory, and nothing else changes (law 5)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from decoct.models.common.errors import UserError
from decoct.models.family_map import FAMILIES
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.structured import cut
from decoct.models.ties import is_tied

from ...support.pruned_families import CONFIGS, FFN, HEADS, LAYER_NORM, LAYERS, WIDTH, ids, logits, masked_logits, parameters_of, tiny
from ...support.warm_python import WarmPython

ALL = list(range(LAYERS))
SOME = [0, 2, 3]
FEWER_HIDDEN = [0, 1, 3, 4, 5, 8, 9, 12, 14, 17, 20, 23]
"""12 channels: a multiple of the 2 and 4 heads that are left."""


def _ffn(layers: list[int]) -> list[list[int]]:
    return [[index, 7, 8, 11, 15 + index] for index in range(len(layers))]


CUTS: dict[str, Kept] = {
    "ffn": Kept(layers=ALL, ffn=_ffn(ALL)),
    # of 3 heads of each group two are left, other ones in each layer
    "heads": Kept(layers=ALL, heads=[[0, 2, 3, 4], [1, 2, 4, 5], [0, 1, 3, 5], [0, 2, 4, 5]]),
    "kv_heads": Kept(layers=ALL, heads=[[3, 4, 5], [0, 1, 2], [3, 4, 5], [3, 4, 5]], kv_heads=[[1], [0], [1], [1]]),
    "hidden": Kept(layers=ALL, hidden=FEWER_HIDDEN),
    "layers": Kept(layers=SOME),
    "all": Kept(layers=SOME, ffn=_ffn(SOME), heads=[[3, 5], [0, 1], [4, 5]], kv_heads=[[1], [0], [1]], hidden=FEWER_HIDDEN),
}
# heads of GPT-2 and OPT go with hidden / heads fixed, and each has its own keys and values
_WITH_HEADS: dict[str, Kept] = {
    "ffn": CUTS["ffn"],
    "layers": CUTS["layers"],
    "heads and hidden": Kept(layers=ALL, heads=[[0, 2, 4], [1, 2, 3], [0, 1, 5], [3, 4, 5]], hidden=FEWER_HIDDEN),
    "all": Kept(layers=SOME, ffn=_ffn(SOME), heads=[[0, 2, 4], [1, 2, 3], [3, 4, 5]], hidden=FEWER_HIDDEN),
}
CASES = [(kind, name, kept) for kind in CONFIGS for name, kept in (_WITH_HEADS if kind in LAYER_NORM else CUTS).items()]
FIELDS = {
    "hidden": {"hidden_size", "n_embd", "word_embed_proj_dim"},
    "ffn": {"intermediate_size", "n_inner", "ffn_dim"},
    "heads": {"num_attention_heads", "n_head"},
    "kv_heads": {"num_key_value_heads"},
    "layers": {"num_hidden_layers", "n_layer", "layer_types", "no_rope_layers", "max_window_layers"},
}


LOAD = """
import json, sys, torch
from pathlib import Path
from typing import Any
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    model, info = AutoModelForCausalLM.from_pretrained(file.with_suffix(""), output_loading_info=True)
    told = load_file(file)
    with torch.no_grad():
        equal = torch.equal(model(input_ids=told["ids"]).logits, told["logits"])
    found[file.stem] = [equal, sum(len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))]
print(json.dumps(found))
"""
"""In a process of its own: for each folder whether its logits are those that were in memory, and how many keys did not fit."""


@pytest.mark.parametrize(("kind", "name", "kept"), CASES, ids=[f"{kind}-{name}" for kind, name, _ in CASES])
def test_sliced_equals_masked(kind: str, name: str, kept: Kept) -> None:
    dense = tiny(kind)
    whole, expected = logits(dense), masked_logits(dense, kept)
    assert torch.equal(logits(dense), whole), "the hooks are gone"
    student = cut(dense, kept)
    assert (whole - expected).abs().max() > 1e-3 * whole.abs().max(), "the cut is seen"
    # transformers' RMSNorm computes in fp32 whatever the weights are, and a factor rounds otherwise there
    scaled = kind not in LAYER_NORM and (kept.hidden is not None or (kind == "olmo2" and kept.heads is not None))
    tolerance = 5e-5 * float(expected.abs().max()) if scaled else 1e-9
    torch.testing.assert_close(logits(student), expected, rtol=0, atol=tolerance)
    assert torch.equal(logits(dense), whole), "the parent is as before"


@pytest.mark.parametrize(("kind", "name", "kept"), CASES, ids=[f"{kind}-{name}" for kind, name, _ in CASES])
def test_sizes_ties_and_config(kind: str, name: str, kept: Kept) -> None:
    dense = tiny(kind, dtype=torch.float32)
    student = cut(dense, kept)
    assert sum(parameter.numel() for parameter in student.parameters()) == parameters_of(student.config)
    assert is_tied(student) == is_tied(dense)
    assert student.dtype == dense.dtype
    assert not student.training
    before, after = dense.config.to_dict(), student.config.to_dict()
    allowed = set().union(*(fields for axis, fields in FIELDS.items() if getattr(kept, axis) is not None))
    assert {key for key in {*before, *after} if before.get(key) != after.get(key)} <= allowed
    if kind not in LAYER_NORM:
        assert after["head_dim"] == WIDTH
    layers: Any = student.get_submodule({"gpt2": "transformer.h", "opt": "model.decoder.layers"}.get(kind, "model.layers"))
    for index, layer in enumerate(layers):
        attention = layer.attn if kind == "gpt2" else layer.self_attn
        assert attention.layer_idx == index


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation_with_a_cache_is_generation_without(kind: str) -> None:
    student: Any = cut(tiny(kind, dtype=torch.float32), (_WITH_HEADS if kind in LAYER_NORM else CUTS)["all"])
    prompt = ids()[:, :7]
    told = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    cached = student.generate(prompt, use_cache=True, **told)
    assert torch.equal(cached, student.generate(prompt, use_cache=False, **told))
    assert cached.shape[1] == 13


def test_a_fresh_process_loads_every_family_as_it_was_in_memory(tmp_path: Path, warm: WarmPython) -> None:
    for kind in CONFIGS:
        student = cut(tiny(kind, dtype=torch.float32), (_WITH_HEADS if kind in LAYER_NORM else CUTS)["all"])
        save_model_folder(tmp_path / kind, student, None, {}, dtype=torch.float32)
        save_file({"ids": ids(), "logits": logits(student)}, tmp_path / f"{kind}.safetensors")
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    done = warm.run([str(script), str(tmp_path)], timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {kind: [True, 0] for kind in CONFIGS}


def test_per_layer_lists_follow_the_layers_that_stay() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    for kind in ("qwen2", "gemma2", "gemma3_text"):
        assert cut(tiny(kind), Kept(layers=SOME)).config.layer_types == [kinds[0], "full_attention", "sliding_attention"]
    # layers 0 and 1 attend to all; of these only 0 is left
    assert cut(tiny("qwen2"), Kept(layers=SOME)).config.max_window_layers == 1
    assert cut(tiny("smollm3"), Kept(layers=SOME)).config.no_rope_layers == [1, 1, 1]
    assert cut(tiny("smollm3"), Kept(layers=[0, 1, 3])).config.no_rope_layers == [1, 0, 1]


def test_keeping_everything_changes_nothing() -> None:
    for kind in CONFIGS:
        dense = tiny(kind, dtype=torch.float32)
        student = cut(dense, Kept(layers=ALL))
        pairs = zip(dense.named_parameters(), student.named_parameters(), strict=True)
        assert all(one == two and torch.equal(a, b) for (one, a), (two, b) in pairs)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(dense.parameters(), student.parameters(), strict=True))


def test_released_parents_give_the_same_student() -> None:
    kept = CUTS["all"]
    for tied in (True, False):
        whole, spent = (tiny("gemma2", tie_word_embeddings=tied) for _ in range(2))
        student = cut(spent, kept, release=True)
        assert torch.equal(logits(student), logits(cut(whole, kept)))
        assert sum(parameter.numel() for name, parameter in spent.named_parameters() if ".1." not in name) == 0


def test_students_on_the_meta_device_have_shapes_alone() -> None:
    dense = tiny("qwen3", dtype=torch.float32).to("meta")
    student = cut(dense, CUTS["all"])
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in student.parameters()) == parameters_of(student.config)


def test_a_tensor_that_the_map_does_not_have_is_refused_by_name() -> None:
    dense = tiny("llama")
    dense.get_submodule("model.layers.1.self_attn").register_parameter("sinks", torch.nn.Parameter(torch.zeros(HEADS)))
    with pytest.raises(UserError, match=r"type 'llama' cannot be cut: .* tensors model\.layers\.\*\.self_attn\.sinks$"):
        cut(dense, CUTS["ffn"])


def test_a_width_that_differs_from_the_config_is_refused() -> None:
    dense = tiny("llama")
    dense.config.intermediate_size = FFN + 1
    with pytest.raises(UserError, match=rf"mlp.gate_proj.weight has {FFN} ffn where its config says {FFN + 1}"):
        cut(dense, CUTS["ffn"])


def test_the_record_names_indices_of_the_parent() -> None:
    record = CUTS["all"].record(FAMILIES["llama"], LAYERS)
    assert record["layers"] == SOME
    assert record["hidden"] == FEWER_HIDDEN
    assert record["heads"] == {"model.layers.0.self_attn": [3, 5], "model.layers.2.self_attn": [0, 1], "model.layers.3.self_attn": [4, 5]}
    assert record["kv_heads"]["model.layers.2.self_attn"] == [0]
    assert record["ffn"]["model.layers.3.mlp"] == [2, 7, 8, 11, 17]
    assert list(CUTS["ffn"].record(FAMILIES["opt"], LAYERS)) == ["ffn"]
