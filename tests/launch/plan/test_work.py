"""Operations that a plan counts are those that torch counts while a tiny model runs."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.launch.plan.shapes import ModelShape, shape_of
from decoct.launch.plan.work import (
    LOSS_FLOP,
    Work,
    backward_share,
    cache_work,
    head_forward,
    layers_forward,
    student_work,
    teacher_work,
)
from decoct.losses.linear_divergence import linear_divergence
from decoct.losses.linear_divergence.inputs import TeacherHidden
from decoct.losses.settings import LossSettings
from decoct.models.families import backbone_and_head

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
BATCH, SEQ = 2, 40


def built(kind: str = "llama", **options: Any) -> tuple[Any, ModelShape]:
    """A tiny model, and its shape."""
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager"), shape_of(config, "")


def _product(_: Any, left: torch.Size, right: torch.Size, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(run: Any) -> float:
    """Operations per token of what ``run`` does."""
    # products that are added in place, as the head's gradient is, are not in torch's own list
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _product}) as mode:
        run()
    return mode.get_total_flops() / (BATCH * SEQ)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2"])
def test_layers_and_head_forward_and_backward(kind: str) -> None:
    model, shape = built(kind, **({"head_dim": 16, "query_pre_attn_scalar": 16} if kind == "gemma2" else {}))
    ids = torch.randint(0, 97, (BATCH, SEQ))
    forward = layers_forward(shape, SEQ) + head_forward(shape)
    # eager attention multiplies the whole square, as masks of packed documents make sdpa do; products of rotary positions are left over
    assert counted(lambda: model(input_ids=ids, use_cache=False)) == pytest.approx(forward, rel=0.01)
    both = counted(lambda: model(input_ids=ids, use_cache=False).logits.sum().backward())
    assert both == pytest.approx(3 * forward, rel=0.01)
    assert teacher_work(shape, SEQ, "bf16") == Work(bf16=forward)
    assert teacher_work(shape, SEQ, "fp32") == Work(fp32=forward)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_with_its_loss(checkpointing: bool) -> None:
    student, shape = built()
    teacher, taught = built(hidden_size=64, num_attention_heads=8)
    if checkpointing:
        student.train()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, labels = torch.randint(0, 97, (BATCH, SEQ)), torch.randint(0, 97, (BATCH * SEQ,))

    def step() -> None:
        backbone, head, _ = backbone_and_head(student)
        theirs, their_head, _ = backbone_and_head(teacher)
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        with torch.no_grad():
            known = TeacherHidden(theirs(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1), their_head)
        linear_divergence(hidden, head, known, labels, LossSettings(), v_eff=97).loss.backward()

    work = student_work(shape, SEQ, mixed=False, checkpointing=checkpointing) + teacher_work(taught, SEQ, "fp32")
    assert work.bf16 == 0
    # torch repeats a layer only up to its last product, which nothing reads again; the plan counts the whole layer
    spared = 2 * 3 * 80 * 48 if checkpointing else 0
    assert counted(step) == pytest.approx(work.fp32 - LOSS_FLOP * 97 - spared, rel=0.01)


def test_heads_and_losses_are_fp32_also_under_bf16() -> None:
    _, shape = built()
    mixed, whole = (student_work(shape, SEQ, mixed=mixed, checkpointing=False) for mixed in (True, False))
    assert mixed == Work(bf16=3 * layers_forward(shape, SEQ), fp32=3 * head_forward(shape) + LOSS_FLOP * 97)
    assert (whole.bf16, whole.total) == (0, mixed.total)
    assert backward_share(shape, SEQ, mixed=True, checkpointing=True) == Work(bf16=3 * layers_forward(shape, SEQ))
    assert cache_work(shape, SEQ, "bf16") == Work(bf16=layers_forward(shape, SEQ), fp32=head_forward(shape) + LOSS_FLOP / 2 * 97)


def test_attention_grows_with_the_window_and_weights_do_not() -> None:
    _, shape = built()
    assert layers_forward(shape, 2 * SEQ) - layers_forward(shape, SEQ) == 4 * SEQ * 48 * 3
    # a model without attention has no such term
    state_space = shape_of(AutoConfig.for_model("mamba", hidden_size=48, num_hidden_layers=3, vocab_size=97, state_size=8), "")
    assert layers_forward(state_space, 2 * SEQ) == layers_forward(state_space, SEQ) > 0


def test_a_token_passes_some_experts() -> None:
    options = {"num_local_experts": 8, "num_experts_per_tok": 2}
    _, shape = built("mixtral", **options)
    experts = sum(count for words, count in shape.family.weights.others.items() if "expert" in words)
    assert experts == 3 * 8 * 3 * 48 * 80
    others = sum(shape.family.weights.others.values()) - experts
    assert layers_forward(shape, SEQ) == 2 * (shape.linear + others + experts / 4) + 4 * SEQ * 48 * 3
