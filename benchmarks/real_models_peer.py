"""A peer's part of benchmarks/real_models.py, run by an interpreter that has llm-compressor or AutoRound: rounds a model folder.

    PYTHON real_models_peer.py '{"model": FOLDER, "windows": FILE, "out": FOLDER, "method": "gptq", "bits": 4, "group_size": 64}'

Needs nothing of decoct. ``windows`` holds ``input_ids`` int64 [N, S]; ``out`` becomes a plain model folder of codes times scales in fp32.
Methods: rtn, gptq and awq (llm-compressor, symmetric), auto-round (symmetric; ``iters`` steps a layer). Prints {seconds, peak_bytes}.
"""

import contextlib
import json
import resource
import sys
import time
from typing import Any


def compressed(told: dict[str, Any], model: Any, ids: Any) -> Any:
    """The model as llm-compressor rounds it, its weights not yet multiplied out."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]

    weights = QuantizationArgs(num_bits=told["bits"], type="int", symmetric=True, strategy="group", group_size=told["group_size"])  # pyright: ignore
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    data: dict[str, Any] = {}
    if told["method"] != "rtn":
        rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
        data = {"dataset": rows, "num_calibration_samples": len(ids), "max_seq_length": ids.shape[1], "shuffle_calibration_samples": False}
    ignored = {"config_groups": groups, "ignore": ["lm_head"]}
    if told["method"] == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]

        if not torch.accelerator.is_available():
            # its cache pins memory, which without a device to copy to is an error and no gain
            torch.Tensor.pin_memory = lambda self, *_: self  # pyright: ignore[reportAttributeAccessIssue]
        # its scales are folded into the weights first, which are then rounded
        recipe: Any = [AWQModifier(), QuantizationModifier(**ignored)]
    else:
        recipe = GPTQModifier(**ignored) if told["method"] == "gptq" else QuantizationModifier(**ignored)
    oneshot(model=model, recipe=recipe, **data)
    return model


def multiplied_out(model: Any) -> dict[str, Any]:
    """Weights that llm-compressor's scales and zero points stand for, by parameter name."""
    from compressed_tensors.quantization import fake_quantize

    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            found[f"{name}.weight"] = fake_quantize(
                module.weight.detach(), module.weight_scale.detach(), module.weight_zero_point, scheme.weights
            ).contiguous()
    return found


def auto_rounded(told: dict[str, Any], model: Any, tokenizer: Any, ids: Any) -> Any:
    """The model as AutoRound rounds it; its weights are multiplied out already."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]

    rows = [{"input_ids": row[None]} for row in ids]
    rounding = AutoRound(
        model, tokenizer, bits=told["bits"], group_size=told["group_size"], sym=True, dataset=rows, seqlen=ids.shape[1], nsamples=len(ids),
        iters=told["iters"], batch_size=told.get("batch", 4), device="cpu", device_map="cpu",
    )  # fmt: skip
    found, _ = rounding.quantize()
    return found


def work(told: dict[str, Any]) -> dict[str, float]:
    """Round, write the folder, and return the figures."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if told.get("threads"):
        torch.set_num_threads(told["threads"])
    ids = load_file(told["windows"])["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(told["model"])
    model = AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32)
    model.config.use_cache = False
    begun = time.perf_counter()
    if told["method"] == "auto-round":
        model = auto_rounded(told, model, tokenizer, ids)
        weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    else:
        model = compressed(told, model, ids)
        # AWQ folds its scales into other weights, so all of them are taken
        weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items()} | multiplied_out(model)
    seconds = time.perf_counter() - begun
    wanted = plain.state_dict()
    if missing := [name for name in wanted if name not in weights]:
        raise SystemExit(f"{told['method']} left no weight {missing[0]}")
    plain.load_state_dict({name: weights[name].view_as(wanted[name]) for name in wanted})
    # fp32: bf16 would round codes times scales once more
    plain.save_pretrained(told["out"])
    tokenizer.save_pretrained(told["out"])
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = work(json.loads(sys.argv[1]))
    print(json.dumps(answer))
