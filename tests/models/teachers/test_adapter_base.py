"""LoRA students: their head is what they compute with, and their base is a teacher, against peft's own forward pass."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from decoct.losses.settings import LossSettings
from decoct.models.common.errors import UserError
from decoct.models.families import backbone_and_head, check_head
from decoct.models.teachers import AdapterBaseTeacher, LocalTeacher
from decoct.trainer.loop.objective import Objective


def adapted(tiny_model: Any, *, kind: str = "llama", seed: int = 0, **given: Any) -> Any:
    """A model under a LoRA adapter that has learnt something."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(kind), LoraConfig(**{**settings, **given}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    "given", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"lora_dropout": 0.3, "target_modules": ["q_proj"]}]
)
def test_the_head_is_what_the_model_computes_with(tiny_model: Any, given: dict[str, Any]) -> None:
    model = adapted(tiny_model, **given).eval()
    if "modules_to_save" in given:
        model.get_base_model().lm_head.modules_to_save["default"].weight.data += 0.3
    check_head(model)
    batch = batch_of(model)
    backbone, weight, _ = backbone_and_head(model)
    logits = backbone(input_ids=batch["input_ids"], use_cache=False).last_hidden_state @ weight.T
    torch.testing.assert_close(logits, model(input_ids=batch["input_ids"]).logits, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_are_those_of_the_adapted_model(tiny_model: Any) -> None:
    model = adapted(tiny_model)
    batch = batch_of(model)
    v_eff = model.config.vocab_size
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lm_head" in name for name in own)
    sums = Objective(None, LossSettings(hard_weight=1.0), v_eff=v_eff)(model, batch)
    got = torch.autograd.grad(sums.loss / sums.tokens, list(own.values()))
    wanted = torch.autograd.grad(model(**batch).loss, list(own.values()))
    for name, one, two in zip(own, got, wanted):
        assert two.abs().max() > 0, name
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_base_is_the_model_without_its_adapter(tiny_model: Any) -> None:
    model = adapted(tiny_model, lora_dropout=0.0)
    batch, v_eff = batch_of(model), model.config.vocab_size
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    base = AdapterBaseTeacher(model, v_eff=v_eff)
    plain = LocalTeacher(tiny_model("llama"), v_eff=v_eff)
    ours, theirs = (Objective(teacher, LossSettings(), v_eff=v_eff)(model, batch) for teacher in (base, plain))
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-6)
    assert float(ours.kl) > 1e-4
    assert {name: module.training for name, module in model.named_modules()} == modes
    hidden, head, _, _ = base.hidden_and_head(batch)
    assert not hidden.requires_grad
    assert not head.requires_grad
    fresh: Any = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    untouched = Objective(AdapterBaseTeacher(fresh, v_eff=v_eff), LossSettings(), v_eff=v_eff)(fresh, batch)
    assert float(untouched.kl) == pytest.approx(0.0, abs=1e-5)


def test_what_cannot_be_taken_apart_is_refused(tiny_model: Any) -> None:
    model = adapted(tiny_model, lora_dropout=0.1).train()
    with pytest.raises(UserError, match=r"output head has dropout 0\.1"):
        backbone_and_head(model)
    backbone_and_head(model.eval())
    with pytest.raises(UserError, match="not plain LoRA"):
        backbone_and_head(adapted(tiny_model, use_dora=True))
    prompts: Any = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="learns prompts"):
        backbone_and_head(prompts)
    with pytest.raises(UserError, match="only a model under an adapter"):
        AdapterBaseTeacher(tiny_model("llama"), v_eff=8)
