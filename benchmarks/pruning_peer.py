"""Torch-Pruning's part of benchmarks/pruning.py, run by an interpreter that has it: cuts a model along one axis.

    PYTHON pruning_peer.py '{"model": FOLDER, "windows": FILE, "out": FOLDER, "method": "magnitude", "axis": "ffn", "number": 512}'

Needs nothing of decoct. ``windows`` holds ``input_ids`` int64 [N, S], which the method taylor reads; ``out`` becomes a plain model folder
in bf16. Models with Llama's names; axis ffn or hidden.
"""

import json
import sys
from typing import Any


def smaller(told: dict[str, Any], model: Any, ids: Any) -> None:
    """Cut ``model`` in place, and set its config to what is left."""
    import torch
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]

    axis, number, config = told["axis"], told["number"], model.config
    layers = model.model.layers
    if axis == "ffn":
        roots, whole = [layer.mlp.gate_proj for layer in layers], config.intermediate_size
    else:
        roots, whole = [model.model.embed_tokens], config.hidden_size
    taylor = told["method"] == "taylor"
    importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
    if taylor:
        for window in ids:
            model(input_ids=window[None], labels=window[None]).loss.backward()
    pruner = tp.pruner.BasePruner(
        model, example_inputs=ids[:1, :16], importance=importance, pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(roots, 1 - number / whole),
        # heads stay as they are; otherwise it scores q, k and v as equally many heads, which grouped queries do not have
        ignored_layers=[getattr(layer.self_attn, name) for layer in layers for name in ("q_proj", "k_proj", "v_proj")],
        # logits alone: its tracer follows tensors
        forward_fn=lambda model, inputs: model(input_ids=inputs, use_cache=False).logits,
        root_module_types=[torch.nn.Linear, torch.nn.Embedding],
    )  # fmt: skip
    pruner.step()
    model.zero_grad(set_to_none=True)
    setattr(config, "intermediate_size" if axis == "ffn" else "hidden_size", number)
    # the config of a model without its own head_dim would derive another one from a smaller hidden size
    config.head_dim = layers[0].self_attn.head_dim
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def work(told: dict[str, Any]) -> None:
    """Cut, check that the result is a model of its config, and write the folder."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(told["windows"])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32)
    model.config.use_cache = False
    smaller(told, model, ids)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    if wrong := [name for name, tensor in model.state_dict().items() if shapes.get(name) != tensor.shape]:
        raise SystemExit(f"{told['method']}: {wrong[0]} is not the shape of a model with {told['axis']} {told['number']}")
    plain.load_state_dict(model.state_dict())
    plain.config.use_cache = True
    plain.bfloat16().save_pretrained(told["out"])
    AutoTokenizer.from_pretrained(told["model"]).save_pretrained(told["out"])


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
