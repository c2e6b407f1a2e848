"""Packed documents do not see each other, in any family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.batches import backbone_inputs, check_packing, keeps_documents_apart
from decoct.models.common.errors import UserError

TinyModel = Callable[..., Any]
SIZES = [4, 1, 6, 5]
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32, "initializer_range": 0.2}
_GEMMA = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 3}


def model_of(tiny_model: TinyModel, kind: str) -> Any:
    if kind == "gpt2":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **_GPT2)).eval()
    return tiny_model(kind, **(_GEMMA if kind == "gemma2" else {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_packed_logits_are_those_of_each_document_alone(tiny_model: TinyModel, kind: str, attention: str) -> None:
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for gemma2's capped attention")
    model = model_of(tiny_model, kind)
    model.set_attn_implementation(attention)
    ids = torch.randint(0, 128, (2, sum(SIZES)), generator=torch.Generator().manual_seed(0))
    # the rows of a batch are cut differently
    cuts = [SIZES, SIZES[::-1]]
    positions = torch.stack([torch.cat([torch.arange(size) for size in sizes]) for sizes in cuts])
    with torch.no_grad():
        packed = model(**backbone_inputs({"input_ids": ids, "position_ids": positions})).logits
        for row, sizes in enumerate(cuts):
            for own, document in zip(packed[row].split(sizes), ids[row].split(sizes)):
                torch.testing.assert_close(own, model(input_ids=document[None]).logits[0], rtol=1e-4, atol=1e-4)
    assert keeps_documents_apart(model)


def test_no_gradient_reaches_the_document_before(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    ids, positions = torch.arange(9)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=positions, attention_mask=None, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[:, 4:].square().sum(), embedded)
    assert gradient[:, :4].abs().max() == 0
    assert (gradient[:, 4:].abs().amax(-1) > 0).all()


def test_padded_windows_keep_their_mask() -> None:
    ids, mask = torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]])
    assert backbone_inputs({"input_ids": ids, "attention_mask": mask, "labels": ids}) == {
        "input_ids": ids,
        "attention_mask": mask,
        "use_cache": False,
    }
    packed = backbone_inputs({"input_ids": ids, "attention_mask": mask, "position_ids": ids})
    assert packed["attention_mask"] is None
    assert packed["position_ids"] is ids


def test_a_family_that_mixes_documents_is_refused_by_name() -> None:
    # ALiBi: distances come from the mask, positions are not asked for
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UserError, match=r"the teacher \(model type 'bloom'\) does not keep packed documents apart.*set data\.packing: false"
    ):
        check_packing(model, "the teacher")
    assert model.training
