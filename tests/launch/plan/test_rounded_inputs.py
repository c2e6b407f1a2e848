"""What rounded inputs save for the backward pass, beside what autograd really keeps."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoct.launch.plan.memory import training_memory
from decoct.launch.plan.memory_case import StageMemoryCase
from decoct.launch.plan.shapes import shape_of
from decoct.qat.layers.input_hooks import round_inputs
from decoct.qat.layers.quantized_model import prepare
from decoct.qat.scheme import QuantScheme
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.trainer.plan import BatchPlan, TrainingPlan

SPEC = QuantSpec(bits=8, group_size="channel")
WINDOWS, SEQ = 2, 48


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=224, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2
    )  # fmt: skip


def kept(skip: list[str], activations: ActivationSpec | None, precision: str) -> int:
    """Bytes that a forward pass saves, each storage once."""
    model = LlamaForCausalLM(config()).train()
    names = [name for name in prepare(model, SPEC) if not any(name.endswith(one) for one in skip)]
    if activations is not None:
        inputs = round_inputs(model, names, activations)
        if activations.scaling == "static":
            inputs.set_ranges(torch.full((len(names), 2), 3.0))
    seen: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (WINDOWS, SEQ))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision != "32"),
    ):
        out = model(input_ids=ids)
    assert out.logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def planned(skip: list[str], rounds: bool, precision: Any, on_gpu: bool = False) -> int:
    """Bytes of activations in the plan."""
    batch = BatchPlan(global_windows=WINDOWS, micro_batch=WINDOWS, accumulation=1)
    plan = TrainingPlan(total_steps=1, batch=batch, learning_rate=1e-4, checkpoint_every=9, precision=precision)
    scheme = QuantScheme(weights=SPEC, skip=tuple(f"*{one}" for one in skip))
    case = StageMemoryCase(plan=plan, seq_length=SEQ, ranks=1, on_gpu=on_gpu, scheme=scheme, rounds_inputs=rounds)
    return training_memory(shape_of(config(), ""), None, case).activations


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("scaling", ["dynamic", "static"])
def test_the_plan_counts_what_autograd_keeps(kind: Any, scaling: Any, precision: str) -> None:
    activations = ActivationSpec(kind=kind, scaling=scaling)
    before, after = kept([], None, precision), kept([], activations, precision)
    assert after - before > 0.1 * before
    assert planned([], True, precision) - planned([], False, precision) == pytest.approx(after - before, rel=0.01)
    assert planned([], True, precision) == pytest.approx(after, rel=0.02)


def test_skipped_linears_round_nothing() -> None:
    skip = ["v_proj", "down_proj"]
    more = kept(skip, ActivationSpec(), "32") - kept(skip, None, "32")
    assert planned(skip, True, "32") - planned(skip, False, "32") == pytest.approx(more, rel=0.02)


def test_kernels_keep_what_they_read_instead_of_flags() -> None:
    tokens, columns = WINDOWS * SEQ, 5 * 96 + 96 + 224
    assert planned([], True, "32", on_gpu=True) - planned([], False, "32", on_gpu=True) == 3 * tokens * 4 * columns
    normed, own = 2 * 96, 96 + 224
    mixed = planned([], True, "bf16-mixed", on_gpu=True) - planned([], False, "bf16-mixed", on_gpu=True)
    assert mixed == 3 * tokens * (4 * normed + 2 * own)
