"""Students: kept layers, random ones from a config, vocabularies without padding rows."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.families import check_head
from decoct.models.student import kept_layers, student_by_keeping, student_from_config, trim_vocabulary

TinyModel = Callable[..., Any]
IDS = torch.arange(24).reshape(2, 12)
_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", _WINDOW),
    "qwen3-window": ("qwen3", _WINDOW),
}
SMALL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """100 words, the last of which ends a text."""
    words = {**{f"w{index}": index for index in range(99)}, "<end>": 99}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="<end>")


def test_kept_layers_are_spread_evenly_with_first_and_last() -> None:
    assert kept_layers(24, 12) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert kept_layers(6, 2) == [0, 5]
    assert kept_layers(5, 5) == [0, 1, 2, 3, 4]
    assert kept_layers(1, 1) == [0]
    for total in range(2, 40):
        for keep in range(2, total + 1):
            kept = kept_layers(total, keep)
            assert (kept[0], kept[-1], len(set(kept))) == (0, total - 1, keep)
            assert max(b - a for a, b in itertools.pairwise(kept)) <= -(-(total - 1) // (keep - 1)) + 1


@pytest.mark.parametrize("keep", [0, 1, 7])
def test_impossible_number_of_layers_names_the_recipe_key(keep: int) -> None:
    with pytest.raises(UserError, match=rf"student.keep.layers={keep} cannot be cut from a teacher of 6 layers; give 2 to 6"):
        kept_layers(6, keep)


def _with_layers_removed(teacher: Any, kept: list[int]) -> torch.Tensor:
    """Logits of the teacher where every other layer passes its input on: the definition of the cut model."""

    def passes_on(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> torch.Tensor:
        return args[0] if args else kwargs["hidden_states"]

    layers = teacher.get_submodule("model.layers")
    assert isinstance(layers, torch.nn.ModuleList)
    handles = [layer.register_forward_hook(passes_on, with_kwargs=True) for i, layer in enumerate(layers) if i not in kept]
    with torch.no_grad():
        logits = teacher(input_ids=IDS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_student_equals_the_teacher_without_the_other_layers(tiny_model: TinyModel, tmp_path: Path, variant: str) -> None:
    model_type, fields = VARIANTS[variant]
    teacher = tiny_model(model_type, num_hidden_layers=6, **fields)
    student: Any
    student, kept = student_by_keeping(teacher, 4)
    assert kept == [0, 2, 3, 5]
    with torch.no_grad():
        logits = student(input_ids=IDS).logits
    torch.testing.assert_close(logits, _with_layers_removed(teacher, kept))
    assert not student.training
    assert student.num_parameters() < teacher.num_parameters()
    assert teacher.config.num_hidden_layers == 6

    student.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    reloaded, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=IDS).logits, logits)


def test_layers_that_are_named_are_those_of_the_student(tiny_model: TinyModel) -> None:
    teacher: Any = tiny_model("llama", num_hidden_layers=6)
    student: Any
    student, kept = student_by_keeping(teacher, (1, 2, 4))
    assert kept == [1, 2, 4]
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=IDS).logits, _with_layers_removed(teacher, kept))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_student_generates_the_same_with_and_without_cache(tiny_model: TinyModel, variant: str) -> None:
    model_type, fields = VARIANTS[variant]
    student: Any
    student, _ = student_by_keeping(tiny_model(model_type, num_hidden_layers=6, eos_token_id=None, **fields), 3)
    prompt = torch.arange(1, 9)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached, plain = (student.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    assert cached.shape == (1, 20)
    assert torch.equal(cached, plain)


def test_student_config_follows_the_layers(tiny_model: TinyModel) -> None:
    student: Any
    student, kept = student_by_keeping(tiny_model("qwen3", num_hidden_layers=6, **{**_WINDOW, "max_window_layers": 3}), 3)
    assert kept == [0, 2, 5]
    assert student.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert (student.config.num_hidden_layers, student.config.max_window_layers) == (3, 2)
    layers = student.get_submodule("model.layers")
    assert [layer.self_attn.layer_idx for layer in layers.children()] == [0, 1, 2]


def test_student_is_an_fp32_copy_that_leaves_teacher_and_generators_alone(tiny_model: TinyModel) -> None:
    teacher = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    state = torch.get_rng_state()
    student: Any
    student, _ = student_by_keeping(teacher, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    before = teacher.get_input_embeddings().weight.clone()
    torch.nn.init.zeros_(student.get_input_embeddings().weight)
    assert torch.equal(teacher.get_input_embeddings().weight, before)
    check_head(student)


def test_teacher_on_the_meta_device_gives_a_student_there() -> None:
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", hidden_size=4096, num_hidden_layers=32))
    student: Any
    student, kept = student_by_keeping(teacher, 16)
    assert student.device.type == "meta"
    assert len(kept) == student.config.num_hidden_layers == 16


def test_keeping_layers_of_another_family_is_refused() -> None:
    config = AutoConfig.for_model("bloom", hidden_size=8, n_layer=3, n_head=2, vocab_size=16, bos_token_id=0, eos_token_id=0)
    with pytest.raises(UserError, match=r"'bloom'.*know the families gemma2, .*llama, mistral, olmo2, opt, phi3, qwen2, qwen3, smollm3"):
        student_by_keeping(AutoModelForCausalLM.from_config(config), 2)


def test_layers_that_compute_by_their_number_are_all_kept() -> None:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(
        "gpt2", n_embd=8, n_layer=3, n_head=2, vocab_size=16, n_positions=8, scale_attn_by_inverse_layer_idx=True, **ends
    )
    teacher = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"student.keep.layers=2: the model divides each layer's attention by the layer's number"):
        student_by_keeping(teacher, 2)
    assert student_by_keeping(teacher, 3)[1] == [0, 1, 2]


def test_student_from_config_has_one_row_per_token_and_the_tokenizers_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = student_from_config({**SMALL, "torch_dtype": "bfloat16", "rope_theta": 1e5}, tokenizer, seed=3)
    assert model.get_input_embeddings().weight.shape == (100, 16)
    assert model.get_output_embeddings().weight.shape == (100, 16)
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.bos_token_id) == (100, 99, None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.rope_parameters["rope_theta"] == 1e5


def test_student_from_config_depends_on_its_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    one: Any = student_from_config(SMALL, tokenizer, seed=3)
    state = torch.get_rng_state()
    two = student_from_config(SMALL, tokenizer, seed=3)
    three: Any = student_from_config(SMALL, tokenizer, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.get_input_embeddings().weight, three.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hiden_layers": 2}, r"student.config.num_hiden_layers is not a field of LlamaConfig; did you mean 'num_hidden_layers'\?"),
        ({"auto_map": {}}, r"student.config.auto_map is not a field"),
        ({"_attn_implementation": "eager"}, r"student.config._attn_implementation is not a field"),
        ({"save_pretrained": 1}, r"student.config.save_pretrained is not a field"),
        ({"model_type": "lama"}, r"student.config.model_type='lama' is not a causal language model"),
        ({"model_type": "clip"}, r"student.config.model_type='clip' is not a causal language model"),
        ({"vocab_size": 128}, r"student.config.vocab_size=128 differs from the tokenizer's 100 tokens; leave it out"),
        ({"num_attention_heads": 3}, r"student.config is refused by transformers: .*not a multiple"),
        ({"hidden_size": "wide"}, r"student.config is refused by transformers: .*hidden_size"),
    ],
)
def test_bad_config_is_refused_by_key(tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        student_from_config({**SMALL, **change}, tokenizer, seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_trimming_drops_padding_rows_and_keeps_logits_and_tie(tiny_model: TinyModel, tmp_path: Path, tied: bool) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[..., :100]
    assert trim_vocabulary(model, 100) == 28
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert model.get_output_embeddings().weight.shape == model.get_input_embeddings().weight.shape == (100, 32)
    assert model.get_output_embeddings().out_features == model.get_input_embeddings().num_embeddings == 100
    assert model.vocab_size == model.base_model.vocab_size == model.config.vocab_size == 100
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    reloaded, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    labels = IDS % 100
    assert model(input_ids=IDS, labels=labels).loss.isfinite()


def test_trimming_forgets_a_special_token_on_a_dropped_row(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("qwen2", pad_token_id=120)
    trim_vocabulary(model, 100)
    assert model.config.pad_token_id is None
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().padding_idx is None


def test_trimming_nothing_and_too_few_rows(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    weight = model.get_input_embeddings().weight
    assert trim_vocabulary(model, 128) == 0
    assert model.get_input_embeddings().weight is weight
    with pytest.raises(UserError, match="128 rows but its tokenizer has ids up to 128"):
        trim_vocabulary(model, 129)
