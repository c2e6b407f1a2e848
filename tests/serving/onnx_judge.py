"""Run by the interpreter that DECOCT_ONNX_PYTHON names: onnxruntime-genai makes an ONNX graph of an export, onnxruntime computes it.

    python onnx_judge.py EXPORT WORK TOKENS LOGITS OPTION ...

TOKENS and LOGITS are safetensors files, int64 [rows, S] and fp32 [rows, S, V]; the options are ``--extra_options`` of the builder.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingImports]
from safetensors.numpy import load_file, save_file


def main() -> None:
    """Build, compute, write."""
    export, work, tokens, logits, *options = sys.argv[1:]
    build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", export, "-o", work, "-p", "int4", "-e", "cpu"]
    subprocess.run([*build, "-c", f"{work}-cache", "--extra_options", *options], check=True, stdout=subprocess.DEVNULL)
    config = json.loads((Path(export) / "config.json").read_text())
    heads = config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    session = onnxruntime.InferenceSession(str(Path(work) / "model.onnx"), providers=["CPUExecutionProvider"])
    rows = load_file(tokens)["tokens"]
    wanted = [given.name for given in session.get_inputs()]
    found = []
    for row in rows:
        given = {"input_ids": row[None], "attention_mask": np.ones((1, len(row)), np.int64), "position_ids": np.arange(len(row))[None]}
        given |= {name: np.zeros((1, heads, 0, width), np.float32) for name in wanted if name.startswith("past_key_values")}
        found.append(session.run(["logits"], {name: given[name] for name in wanted})[0][0].astype(np.float32))
    save_file({"logits": np.stack(found)}, logits)


if __name__ == "__main__":
    main()
