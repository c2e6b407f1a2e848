"""Small models that have learnt some Python, so that their logits mean something, as folders to export."""

import dataclasses
import os
import sysconfig
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from decoct.models.families import decoder_linears
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.pruning.magnitude import magnitude_masks
from decoct.models.pruning.shape_choice import select
from decoct.models.pruning.structured import cut
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.qat.codes.state import QuantState
from decoct.qat.layers.input_hooks import round_inputs
from decoct.qat.layers.kv_cache_hooks import round_cache
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.scheme import QuantScheme
from decoct.qat.spec import ActivationSpec, QuantSpec

SEQUENCE, ROWS, STEPS = 128, 16, 300
READ = ("textwrap", "gettext")
"""Modules that the models learn by heart: a model that is unsure everywhere has nearly equal choices, which any rounding decides."""
_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In the Makefile's own target of a judge a skipped test is a failed one: there the judge must be found."""
    report = yield
    if report.skipped and os.environ.get("DECOCT_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though DECOCT_NO_SKIPS forbids it: {report.longrepr}"
    return report


def stdlib(*names: str) -> list[str]:
    """Sources of Python's standard library, which are on every machine."""
    return [(Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(stdlib(*READ), 1000)


@pytest.fixture(scope="session")
def known_text(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """int64 [16, 128] of the text that the models have learnt: 2,048 positions."""
    ids: Any = tokenizer("\n".join(stdlib(*READ)))["input_ids"]
    return torch.tensor(ids[: ROWS * SEQUENCE]).reshape(ROWS, SEQUENCE)


def _config(model_type: str, overrides: dict[str, Any]) -> Any:
    fields = _GPT2 if model_type == "gpt2" else _CONFIG
    if not model_type.startswith("gemma"):
        fields = {**fields, "sliding_window": None}
    return AutoConfig.for_model(model_type, **{**fields, **overrides})


@pytest.fixture(scope="session")
def stdlib_texts() -> list[str]:
    return stdlib("pathlib", "zipfile", "decimal", "this")


Trained = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session")
def trained(tokenizer: PreTrainedTokenizerFast) -> Trained:
    """``trained(model_type, pruned=, steps=, **config)``: a model that has learnt ``READ``; the same one for the same arguments."""
    ids: Any = tokenizer("\n".join(stdlib(*READ)))["input_ids"]
    text = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).reshape(-1, SEQUENCE)
    made: dict[str, PreTrainedModel] = {}

    def train(model_type: str, pruned: bool = False, steps: int = STEPS, **overrides: Any) -> PreTrainedModel:
        key = f"{model_type} {pruned} {steps} {sorted(overrides.items())}"
        if key not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(_config(model_type, {"vocab_size": len(tokenizer), **overrides}))
                _fit(model, text, steps)
            if pruned:
                _prune(model, text)
            made[key] = model.eval()
        return made[key]

    return train


def _fit(model: PreTrainedModel, text: Tensor, steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = text[torch.randperm(len(text))[:8]]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def _prune(model: PreTrainedModel, text: Tensor) -> None:
    """FFN channels from 256 to 192, and three tenths of the remaining weights of each matrix to zero."""
    model = cut(model, select(model, [{"input_ids": text[:8]}], {"ffn": 192}))
    weights = {name: module.weight for name, module in decoder_linears(model).items()}
    for name, mask in magnitude_masks(weights, 0.7, "layer").items():
        weights[name].mul_(mask)


def _with_cache(model: Any, state: QuantState, spec: ActivationSpec, text: Tensor) -> QuantState:
    """The state with rounded keys and values, whose stored scales are of the range that ``text`` has."""
    cache = round_cache(model, spec)
    cache.observe()
    with torch.inference_mode():
        model(input_ids=text)
    cache.set_ranges(cache.extremes())
    return dataclasses.replace(state, cache=cache.state())


def _with_inputs(model: Any, state: QuantState, activations: ActivationSpec, text: Tensor) -> QuantState:
    """The state with rounded inputs; stored scales are of the range that ``text`` has."""
    inputs = round_inputs(model, state.modules, activations)
    if activations.scaling == "static":
        inputs.observe()
        with torch.inference_mode():
            model(input_ids=text)
        inputs.set_ranges(inputs.extremes())
    return dataclasses.replace(state, activations=activations, input_scales=inputs.scales(), input_zeros=inputs.zeros())


@pytest.fixture(scope="session")
def plain_folder(trained: Trained, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``plain_folder(model_type, dtype, pruned=, **config)``: a folder with weights that ``dtype`` holds."""

    def build(model_type: str, dtype: torch.dtype, pruned: bool = False, **overrides: Any) -> Path:
        model = trained(model_type, pruned, **overrides)
        return save_model_folder(tmp_path_factory.mktemp("plain") / "model", model, tokenizer, {"kind": "pretrain"}, dtype=dtype)

    return build


@pytest.fixture(scope="session")
def quantized_folder(
    trained: Trained, tokenizer: PreTrainedTokenizerFast, known_text: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``quantized_folder(model_type, spec, pruned=, skip=, activations=, kv_cache=, change=, **config)``: as 'quantize' writes it.

    ``change`` is given the codes and scales before anything is computed with them.
    """

    def build(
        model_type: str,
        spec: QuantSpec | QuantScheme,
        pruned: bool = False,
        skip: Sequence[str] = (),
        activations: ActivationSpec | None = None,
        kv_cache: ActivationSpec | None = None,
        change: Callable[[QuantState], QuantState] = lambda state: state,
        **overrides: Any,
    ) -> Path:
        original = trained(model_type, pruned, **overrides)
        model = AutoModelForCausalLM.from_config(original.config)
        model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in original.state_dict().items()})
        state = change(quantize_model(model, spec, skip))
        fold(model, state)
        if activations is not None:
            state = _with_inputs(model.eval(), state, activations, known_text)
        if kv_cache is not None:
            state = _with_cache(model.eval(), state, kv_cache, known_text)
        record = {"base_model": "someone/some-model", "kind": "quantize", "quant": state.record()}
        folder, tensors = tmp_path_factory.mktemp("quantized") / "model", {"quant/codes.safetensors": state.tensors()}
        return save_model_folder(folder, model.eval(), tokenizer, record, dtype=torch.float32, extra_tensors=tensors)

    return build
