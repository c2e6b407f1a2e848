"""AWQ exports in mlx-lm: an interpreter that has it is named by DECOCT_MLX_PYTHON (``make test-serving-mlx`` makes one).

Its forward pass on a CPU takes seconds a token, so the weights are judged that it has after its own repacking.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decoct.qat.export.export import export_folder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.spec import QuantSpec

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif("DECOCT_MLX_PYTHON" not in os.environ, reason="DECOCT_MLX_PYTHON names no interpreter that has mlx-lm"),
]


@pytest.mark.parametrize(("symmetric", "largest"), [(True, 0.0), (False, 2e-4)])
@pytest.mark.parametrize("group_size", [32, 64])
def test_the_weights_that_mlx_has_are_the_fake_quant_weights(
    quantized_folder: Callable[..., Path], tmp_path: Path, group_size: int, symmetric: bool, largest: float
) -> None:
    """Zero points become zero x scale in fp16, which rounds; symmetric codes times scales are exact."""
    target = tmp_path / "awq"
    source = quantized_folder("llama", QuantSpec(bits=4, group_size=group_size, symmetric=symmetric))
    assert export_folder(source, target, "awq", runtimes=False).exact
    command = [os.environ["DECOCT_MLX_PYTHON"], "-P", str(Path(__file__).with_name("mlx_judge.py")), str(target), str(tmp_path / "weights")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = load_file(tmp_path / "weights"), load_exported_model(target).state_dict()
    linears = [name for name in found if "_proj" in name]
    assert len(linears) == 14
    off = {name: float((found[name] - wanted[name].float()).abs().max()) for name in linears}
    print(group_size, symmetric, max(off.values()))
    assert max(off.values()) <= largest, off
    # llama's embedding is bf16 in the file and fp16 there
    torch.testing.assert_close(found["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"].float(), rtol=0, atol=1e-7)
