"""The student of benchmarks/serving.py, in every form that it is served in.

A small Llama learns a text by heart: a model that is unsure everywhere has nearly equal choices, which any rounding decides, and could not
be checked. Then it is made wide without changing what it predicts (every feature, head and channel many times, each sum divided by that
number: Net2Net, Chen et al. 2016, section 2.1): speed and memory depend on shapes, not on values.
"""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

READ = ("textwrap", "gettext")
"""Modules of Python's standard library that it reads, when no text is given."""
SEQUENCE, ROWS, STEPS, BATCH, RATE = 128, 16, 300, 8, 6e-3
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUP = 32
"""Inputs that share a scale: all that llama.cpp's Q4_0 has."""


def read_text(files: list[str]) -> str:
    """The given files, or two modules of the standard library."""
    chosen = [Path(file) for file in files] or [Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in READ]
    return "\n".join(file.read_text(encoding="utf-8") for file in chosen)


def trained(text: str, layers: int) -> tuple[Any, Any, Tensor]:
    """(model, tokenizer, int64 [16, 128] of the text); UserError of the tokenizer when there is too little text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

    tokenizer = train_tokenizer([text], 1000)
    ids: Any = tokenizer(text)["input_ids"]
    if len(ids) < ROWS * SEQUENCE:
        raise SystemExit(f"the text has {len(ids):,} tokens, {ROWS * SEQUENCE:,} are needed; give more of it")
    rows = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).reshape(-1, SEQUENCE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, **SHAPE))  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        batch = rows[torch.randperm(len(rows))[:BATCH]]
        loss: Any = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, rows[:ROWS]


@torch.no_grad()
def widened(model: Any, times: int) -> Any:
    """The same function with ``times`` as many features, heads and channels; ``times`` is a power of two, so that nothing is rounded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**{**model.config.to_dict(), **{name: getattr(model.config, name) * times for name in wide}})
    made = LlamaForCausalLM(config)
    state = {}
    for name, tensor in model.state_dict().items():
        # norm weights are repeated, embeddings repeated along the features; a matrix sums over repeated inputs, so it is divided by their
        # number
        if tensor.ndim == 1:
            state[name] = tensor.repeat(times)
        elif "embed_tokens" in name:
            state[name] = tensor.repeat(1, times)
        elif "lm_head" in name:
            state[name] = tensor.repeat(1, times) / times
        else:
            state[name] = tensor.repeat(times, times) / times
    made.load_state_dict(state)
    return made.eval()


def forms(place: Path, text: str, layers: int, times: int) -> tuple[dict[str, dict[str, Path]], Tensor]:
    """({case: {format: folder}}, int64 [16, 128] of the text): the student in bf16 and in int4, for each kind of runtime."""
    from decoct.models.folder.model_folder import save_model_folder
    from decoct.qat.codes.state import QUANT_FILE
    from decoct.qat.export.export import export_folder
    from decoct.qat.layers.quantized_model import fold, quantize_model
    from decoct.qat.spec import QuantSpec

    small, tokenizer, tokens = trained(text, layers)
    student = widened(small, times)
    plain = save_model_folder(place / "plain", student, tokenizer, {"kind": "distill"}, dtype=torch.bfloat16)
    # both forms start from the same bf16 weights
    student.load_state_dict({name: tensor.bfloat16().float() for name, tensor in student.state_dict().items()})
    state = quantize_model(student, QuantSpec(bits=4, group_size=GROUP))
    fold(student, state)
    record, tensors = {"kind": "quantize", "quant": state.record()}, {QUANT_FILE: state.tensors()}
    rounded = save_model_folder(place / "rounded", student, tokenizer, record, dtype=torch.float32, extra_tensors=tensors)
    made: dict[str, dict[str, Path]] = {"bf16": {}, f"w4-g{GROUP}": {}}
    for case, source, packed, gguf in (
        ("bf16", plain, "safetensors", "gguf-bf16"),
        (f"w4-g{GROUP}", rounded, "compressed-tensors", "gguf"),
    ):
        for kind, form in (("folder", packed), ("gguf", gguf)):
            made[case][kind] = export_folder(source, place / f"{case}-{kind}", form, runtimes=False).path
    return made, tokens
