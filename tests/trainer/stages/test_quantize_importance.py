"""Stage quantize with an importance matrix: it needs no text, says whose errors it sums, and records the file."""

import hashlib
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from decoct.models.families import decoder_linears
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record
from decoct.qat.codes.state import load_quant_state
from decoct.qat.ptq import RoundingMethod, round_model
from decoct.qat.spec import QuantSpec
from decoct.trainer.settings_quantization import QuantizeSettings
from decoct.trainer.stages.context import StageContext
from decoct.trainer.stages.quantize import finish

PLACES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WEIGHTS = QuantSpec(bits=3, group_size=16)


@pytest.mark.parametrize("stream", ["never", "always"])
def test_it_weights_the_search_without_text_and_is_recorded(
    make_context: Callable[..., StageContext], trained_folder: Path, tmp_path: Path, stream: Any
) -> None:
    model, generator = load_model(trained_folder, dtype=torch.float32), torch.Generator().manual_seed(4)
    means = {name: torch.rand(linear.in_features, generator=generator) ** 4 for name, linear in decoder_linears(model).items()}
    entries = [struct.pack("<i", len(means))]
    for name, values in means.items():
        layer, kind = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        place = f"blk.{layer}.{PLACES[kind]}.weight".encode()
        entries += [struct.pack("<i", len(place)), place, struct.pack("<ii", 1, len(values)), values.numpy().astype(np.float32).tobytes()]
    file = tmp_path / "imatrix.dat"
    file.write_bytes(b"".join(entries))

    context = make_context("01-quantize")
    finish(QuantizeSettings(method="mse", weights=WEIGHTS, importance=str(file), stream=stream), context, None)
    expected = round_model(model, WEIGHTS, RoundingMethod(method="mse"), importance=means, others=torch.bfloat16).state
    assert load_quant_state(context.model).hash() == expected.hash()
    record = read_record(context.model)["quant"]["rounding"]
    assert record["importance"] == {"file": "imatrix.dat", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert "calibration" not in record
    errors = record["relative_error"].values()
    assert all(error["rounded"] < error["to_nearest"] for error in errors)
    # the errors are weighted by the inputs, so they are those of outputs
    assert "squared output error" in cast(Any, context.run.console.file).getvalue()
