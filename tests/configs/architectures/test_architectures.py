"""Stored architectures are those of the published models: parameter counts say so."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.configs.architectures import HUB_IDS, architecture, names
from decoct.models.common.errors import UserError

# parameters of the published checkpoints, tied tensors once
PUBLISHED = {
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M-Instruct": 134_515_008,
    "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM2-360M": 361_821_120,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_architecture_builds_with_the_published_number_of_parameters(name: str) -> None:
    fields = architecture(name)
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == PUBLISHED[name]
    # a field that the config class does not know would be carried along in silence
    assert set(fields) <= set(type(config)().to_dict())


def test_every_file_and_every_hub_id_is_reachable_and_answers_are_fresh() -> None:
    assert names() == sorted(PUBLISHED) == sorted(set(HUB_IDS.values()))
    for hub_id, name in HUB_IDS.items():
        assert architecture(hub_id) == architecture(name) == architecture(name.lower())
    architecture("SmolLM2-360M")["hidden_size"] = 1
    assert architecture("SmolLM2-360M")["hidden_size"] == 960


def test_unknown_architecture_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'SmolLM2-17B'.*Llama-3-70B, .*did you mean 'SmolLM2-1.7B'"):
        architecture("SmolLM2-17B")
