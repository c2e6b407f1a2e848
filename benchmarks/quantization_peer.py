"""llm-compressor's part of benchmarks/quantization.py, run by an interpreter that has it: rounds a model and times that.

    PYTHON quantization_peer.py '{"model": FOLDER, "windows": FILE, "out": FILE, "method": "rtn", "bits": 4, "group_size": 64}'

Needs nothing of decoct. ``windows`` holds ``input_ids`` int64 [N, S]; ``out`` takes the rounded weights, codes times scales, and the
scales, fp32. Prints {seconds, extra_bytes} as JSON.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any


# repeated here because this interpreter may have no decoct
def reset_peak() -> int:
    """Forget the peak so far; returns the memory in use, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    """A figure of this process's memory in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def modifier(told: dict[str, Any]) -> Any:
    """The recipe of a method: symmetric integers in groups, the head left alone, everything else llm-compressor's default."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]

    weights = QuantizationArgs(num_bits=told["bits"], type="int", symmetric=True, strategy="group", group_size=told["group_size"])  # pyright: ignore
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    kind = GPTQModifier if told["method"] == "gptq" else QuantizationModifier
    return kind(config_groups={"group_0": scheme}, ignore=["lm_head"])


def round_once(told: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """(the rounded model, figures); only the rounding is timed."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32)
    # a cache of keys and values would count as memory of the calibration
    model.config.use_cache = False
    ids = load_file(told["windows"])["input_ids"]
    data: dict[str, Any] = {}
    if told["method"] == "gptq":
        rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
        data = {"dataset": rows, "num_calibration_samples": len(ids), "max_seq_length": ids.shape[1], "shuffle_calibration_samples": False}
        data["batch_size"] = told.get("batch", 8)
    before, begun = reset_peak(), time.perf_counter()
    oneshot(model=model, recipe=modifier(told), **data)
    return model, {
        "seconds": time.perf_counter() - begun,
        "extra_bytes": status("VmHWM") - before,
    }


def work(told: dict[str, Any]) -> dict[str, float]:
    """Round, write the weights as they are served, and return the figures; with ``warm`` the second of two runs counts."""
    import torch
    from compressed_tensors.quantization import fake_quantize
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    # the first run compiles, imports and fills the page cache
    if told.get("warm"):
        round_once(told)
    model, figures = round_once(told)
    if told.get("out"):
        tensors: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is not None and scheme.weights is not None:
                scale = module.weight_scale.detach()
                tensors[f"{name}.weight"] = fake_quantize(
                    module.weight.detach(), scale, module.weight_zero_point, scheme.weights
                ).contiguous()
                tensors[f"{name}.scale"] = scale.contiguous()
        save_file(tensors, told["out"])
    return figures


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = work(json.loads(sys.argv[1]))
    print(json.dumps(answer))
