"""The walk over a model: who shares inputs, what feeds what, padding, packing, files instead of memory, and what is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoct.models.batches import backbone_inputs
from decoct.models.calibration.error_report import SAMPLE, error_lines, linear_kind, sampled
from decoct.models.calibration.factor import factorize
from decoct.models.calibration.hessians import shared_inputs
from decoct.models.calibration.replay import Replay
from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.families import decoder_layers
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.streaming import empty_model
from decoct.qat.fake_quant import dequantize, quantize
from decoct.qat.layers.quantized_model import quantize_model
from decoct.qat.ptq import CalibrationText, RoundedModel, RoundingMethod, amount_of_work, round_model
from decoct.qat.ptq.gptq import gptq_codes
from decoct.qat.ptq.mse import searched_grid
from decoct.qat.ptq.walk import REMEDIES
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import ActivationSpec, QuantSpec

SPEC = QuantSpec(bits=3, group_size=16)
GPTQ = RoundingMethod(method="gptq")
RandomModel = Callable[..., PreTrainedModel]


def windows(count: int = 12, length: int = 24) -> Tensor:
    return torch.randint(0, 258, (count, length), generator=torch.Generator().manual_seed(1))


def text_of(ids: Tensor, batch: int = 4, **more: Tensor) -> CalibrationText:
    parts = {"input_ids": ids, **more}
    return CalibrationText(batches=[{k: v[at : at + batch] for k, v in parts.items()} for at in range(0, len(ids), batch)])


def codes_of(rounded: RoundedModel) -> Tensor:
    return torch.cat([codes.flatten() for codes in rounded.state.codes.values()])


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**backbone_inputs({"input_ids": windows(3)})).logits


STEPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def slow_walk(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Codes by whole forward passes: after every step of every layer all is run again from the start, one hook for each linear."""
    found: dict[str, Tensor] = {}
    for step in [[f"model.layers.{index}.{name}" for name in names] for index in range(len(decoder_layers(model))) for names in STEPS]:
        sums: dict[str, Tensor] = {}

        def add(name: str) -> Any:
            def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
                rows = inputs[0].flatten(0, 1).double()
                sums[name] = rows.T @ rows  # noqa: B023 - the hooks are gone before the next step

            return hook

        handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in step]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        for name in step:
            weight = model.get_submodule(name).get_parameter("weight")
            scales = quantize(weight, SPEC)[1]
            factor = factorize((2 / ids.numel() * sums[name]).float())
            assert factor is not None
            found[name] = gptq_codes(weight, scales, factor, SPEC)
            weight.data = dequantize(found[name], scales)
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gptq_walks_as_whole_forward_passes_would(random_model: RandomModel, kind: str) -> None:
    ids = windows()
    rounded = round_model(model := random_model(kind), SPEC, RoundingMethod(method="gptq", scale="absmax"), text=text_of(ids))
    expected = slow_walk(random_model(kind), ids)
    assert list(expected) == list(rounded.state.modules)
    differing = torch.stack([(rounded.state.codes[name] != codes).float().mean() for name, codes in expected.items()])
    assert differing.max() < 0.03  # near ties fall by the order in which sums are added
    for name in rounded.state.modules:
        assert torch.equal(model.get_submodule(name).get_parameter("weight"), rounded.state.dequantized(name))
    rounded.state.check("memory")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_rtn_is_quantize_model_bit_for_bit(random_model: RandomModel, kind: str) -> None:
    expected = quantize_model(random_model(kind), SPEC, ["*.o_proj"])
    rounded = round_model(random_model(kind), SPEC, RoundingMethod(), skip=["*.o_proj"])
    assert rounded.state.hash() == expected.hash()


def test_gptq_loses_less_than_mse_and_mse_less_than_rtn(random_model: RandomModel) -> None:
    full = logits(random_model("llama"))
    text, lost, errors = text_of(windows(64)), [], []
    for rounding in (RoundingMethod(), RoundingMethod(method="mse", weighted=True), GPTQ):
        model = random_model("llama")
        rounded = round_model(model, SPEC, rounding, text=text)
        lost.append(float((logits(model) - full).square().mean()))
        assert rounded.errors and not rounded.notes
        errors = list(rounded.errors.values())
    assert lost[2] < lost[1] < lost[0]
    for error in errors:
        assert 0 < error.error < error.baseline < error.energy and error.linears == 2
    with pytest.warns(DeprecationWarning, match="is called relative_baseline"):
        assert errors[-1].relative_nearest == errors[-1].relative_baseline
    with pytest.warns(DeprecationWarning, match="is called baseline"):
        assert errors[-1].nearest == errors[-1].baseline


def replay_of(model: PreTrainedModel, text: CalibrationText) -> tuple[Replay, nn.Module, dict[str, nn.Linear]]:
    """Replay, first layer and its linears."""
    layers = decoder_layers(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.0.")}
    return Replay(model, layers, text.batches, torch.device("cpu"), REMEDIES), layers[0], linears


@torch.no_grad()
def test_linears_with_the_same_input_share_its_moments(random_model: RandomModel) -> None:
    text = text_of(windows())
    replay, _, linears = replay_of(random_model("llama"), text)
    done: list[int] = []
    shared = shared_inputs(replay, 0, linears, True, done.append)
    assert [[name.removeprefix("model.layers.0.") for name in one.names] for one in shared] == STEPS
    assert sum(done) == text.tokens == 12 * 24
    assert all(torch.allclose(one.moments, one.moments.T) for one in shared)


def test_layers_run_on_what_the_rounded_ones_before_give(random_model: RandomModel) -> None:
    model = random_model("llama")
    layers, batches = decoder_layers(model), text_of(windows(8)).batches
    replay = Replay(model, layers, batches, torch.device("cpu"), REMEDIES)
    with torch.no_grad():
        replay.finish(0, lambda tokens: None)
        layers[1].get_submodule("mlp.up_proj").get_parameter("weight").mul_(2)
        found = [replay.run(1, number) for number in range(2)]
        expected = [model.base_model(**backbone_inputs(b), output_hidden_states=True) for b in batches]
    # the last hidden state is behind the final norm; of a layer's own output the norm makes the same
    norm = model.get_submodule("model.norm")
    for mine, whole in zip(found, expected):
        assert torch.allclose(norm(mine), whole.last_hidden_state, atol=1e-5)
    assert "forward" not in vars(layers[0])


def test_batch_size_and_padding_play_no_part(random_model: RandomModel) -> None:
    ids = windows(12)
    reference = round_model(random_model("llama"), SPEC, GPTQ, text=(text := text_of(ids, 4)))
    padded = F.pad(ids, (0, 9), value=7)
    mask = F.pad(torch.ones_like(ids), (0, 9))
    other = text_of(padded, 5, attention_mask=mask)
    assert other.fingerprint() == text.fingerprint() and other.tokens == text.tokens
    again = round_model(random_model("llama"), SPEC, GPTQ, text=other)
    assert (codes_of(again) != codes_of(reference)).float().mean() < 0.01
    wrong = round_model(random_model("llama"), SPEC, GPTQ, text=text_of(padded, 5))
    assert (codes_of(wrong) != codes_of(reference)).float().mean() > 0.03


def test_packed_documents_stay_apart(random_model: RandomModel) -> None:
    ids = windows(8, 24)
    packed = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(24).remainder(12).repeat(8, 1)}
    apart = round_model(random_model("llama"), SPEC, GPTQ, text=text_of(ids.reshape(16, 12), 4))
    together = round_model(random_model("llama"), SPEC, GPTQ, text=text_of(ids, 4, **packed))
    assert (codes_of(apart) != codes_of(together)).float().mean() < 0.01
    mixed = round_model(random_model("llama"), SPEC, GPTQ, text=text_of(ids, 4))
    assert (codes_of(apart) != codes_of(mixed)).float().mean() > 0.02


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rounding", [RoundingMethod(), RoundingMethod(method="mse"), GPTQ])
def test_from_files_is_as_from_memory(random_model: RandomModel, tmp_path: Path, rounding: RoundingMethod, tied: bool) -> None:
    model = random_model("qwen2", tie_word_embeddings=tied)
    save_model_folder(tmp_path / "model", model, None, {}, dtype=torch.float32)
    text = text_of(windows())
    expected = round_model(model, SPEC, rounding, skip=["*.1.mlp.up_proj"], text=text)
    empty, files = empty_model(tmp_path / "model")
    (tmp_path / "work").mkdir()
    done: list[int] = []
    amount = amount_of_work(empty, SPEC, rounding, ["*.1.mlp.up_proj"], text)
    streamed = round_model(
        empty, SPEC, rounding, skip=["*.1.mlp.up_proj"], text=text, files=files, work=tmp_path / "work", advance=done.append
    )
    assert streamed.state.hash() == expected.state.hash()
    assert streamed.errors == expected.errors
    assert sum(done) == amount
    assert torch.equal(logits(empty), logits(model))
    assert len(list((tmp_path / "work").iterdir())) == 2
    one = save_model_folder(tmp_path / "one", model, None, {}, dtype=torch.float32)
    two = save_model_folder(tmp_path / "two", empty, None, {}, dtype=torch.float32)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


MIXED = QuantScheme(
    weights=SPEC,
    overrides={"*.down_proj": SpecChange(bits=8), "*.0.*.k_proj": SpecChange(bits=4), "*.o_proj": SpecChange(kind="nf4")},
    embedding=SpecChange(bits=8, symmetric=False),
)


@pytest.mark.parametrize("tied", [False, True])
def test_every_module_gets_its_own_lattice_to_nearest(random_model: RandomModel, tied: bool) -> None:
    scheme = MIXED if tied else dataclasses.replace(MIXED, head=SpecChange(bits=6))
    model = random_model("qwen3", tie_word_embeddings=tied)
    expected = quantize_model(model, scheme)
    rounded = round_model(model, scheme, RoundingMethod())
    assert rounded.state.hash() == expected.hash()
    assert rounded.state.modules[0] == "model.embed_tokens" and ("lm_head" in rounded.state.modules) is not tied
    for name in rounded.state.modules:
        assert torch.equal(model.get_parameter(f"{name}.weight"), expected.dequantized(name))


@pytest.mark.parametrize("tied", [False, True])
def test_mixed_lattices_from_files_are_as_from_memory(random_model: RandomModel, tmp_path: Path, tied: bool) -> None:
    scheme = dataclasses.replace(MIXED, embedding=SpecChange(bits=8))
    model = random_model("llama", tie_word_embeddings=tied)
    save_model_folder(tmp_path / "model", model, None, {}, dtype=torch.float32)
    text = text_of(windows())
    alone = round_model(random_model("llama", tie_word_embeddings=tied), SPEC, GPTQ, text=text).state
    expected = round_model(model, scheme, GPTQ, text=text, others=torch.bfloat16)
    empty, files = empty_model(tmp_path / "model")
    (tmp_path / "work").mkdir()
    streamed = round_model(empty, scheme, GPTQ, text=text, files=files, work=tmp_path / "work", others=torch.bfloat16)
    assert streamed.state.hash() == expected.state.hash()
    assert torch.equal(logits(empty), logits(model))
    # values of 8 bits: GPTQ goes below nearest for linears, and the embedding is rounded before they are calibrated
    assert not torch.equal(expected.state.codes["model.layers.0.self_attn.q_proj"], alone.codes["model.layers.0.self_attn.q_proj"])
    assert expected.state.spec_of("model.layers.0.self_attn.k_proj").bits == 4
    assert all(error.relative <= error.relative_baseline for error in expected.errors.values())
    assert next(iter(expected.errors)) == "model.embed_tokens"


def in_file(tensor: Tensor, folder: Path) -> bool:
    """Whether the memory of a tensor is a mapped file of ``folder``."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_memory_holds_one_layer_of_a_model_in_files(random_model: RandomModel, tmp_path: Path) -> None:
    save_model_folder(tmp_path / "model", random_model("llama", num_hidden_layers=4), None, {}, dtype=torch.float32)
    empty, files = empty_model(tmp_path / "model")
    layers, work = decoder_layers(empty), tmp_path / "work"
    work.mkdir()
    held: list[int] = []

    def look(_tokens: int) -> None:
        held.append(sum(any(not p.is_meta and not in_file(p, work) for p in layer.parameters()) for layer in layers))

    rounded = round_model(empty, SPEC, GPTQ, text=text_of(windows()), files=files, work=work, advance=look)
    assert set(held) == {1}
    assert all(in_file(codes, work) for codes in rounded.state.codes.values())
    assert all(in_file(p, work) for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("skip", [["*layers.0.*"], ["*layers.1.*"], ["*.mlp.*"]])
@pytest.mark.parametrize("more", [{}, {"method": "gptq"}, {"method": "mse", "weighted": True}])
@pytest.mark.parametrize("served", [{}, {"activations": ActivationSpec(scaling="static")}, {"kv_cache": ActivationSpec(scaling="static")}])
def test_progress_adds_up_where_layers_have_nothing_to_round(
    random_model: RandomModel, skip: list[str], more: dict[str, Any], served: dict[str, Any]
) -> None:
    model, text, rounding, done = random_model("llama"), text_of(windows()), RoundingMethod(**more, **served), list[int]()
    amount = amount_of_work(model, SPEC, rounding, skip, text)
    round_model(model, SPEC, rounding, skip=skip, text=text, advance=done.append)
    assert sum(done) == amount and min(done, default=0) >= 0


def test_a_model_that_was_training_goes_on_training_after_an_error(random_model: RandomModel) -> None:
    model = random_model("llama").train()
    model.get_submodule("model.layers.1.input_layernorm").get_parameter("weight").data[3] = float("nan")
    with pytest.raises(NonFiniteError):
        round_model(model, SPEC, GPTQ, text=text_of(windows()))
    assert model.training


def test_masks_keep_pruned_weights_at_zero(random_model: RandomModel) -> None:
    model = random_model("llama")
    name = "model.layers.0.self_attn.k_proj"
    weight = model.get_submodule(name).get_parameter("weight")
    weight.data[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    zeros = weight == 0
    rounded = round_model(model, SPEC, GPTQ, sparse=[name], text=text_of(windows()))
    assert not rounded.state.codes[name][zeros].any()


def test_mse_weighs_by_the_inputs_when_told_to(random_model: RandomModel) -> None:
    model = random_model("llama")
    weight = model.get_submodule("model.layers.0.self_attn.v_proj").get_parameter("weight").detach().clone()
    plain = round_model(random_model("llama"), SPEC, RoundingMethod(method="mse"))
    assert torch.equal(plain.state.scales["model.layers.0.self_attn.v_proj"], searched_grid(weight, SPEC).scales)
    weighted = round_model(model, SPEC, RoundingMethod(method="mse", weighted=True), text=text_of(windows()))
    with torch.no_grad():
        embedded = model.get_input_embeddings()(windows())
        x = model.get_submodule("model.layers.0.input_layernorm")(embedded).flatten(0, 1)
    expected = searched_grid(weight, SPEC, None, x.square().mean(0)).scales
    found = weighted.state.scales["model.layers.0.self_attn.v_proj"]
    assert (found != expected).float().mean() < 0.01 and not torch.equal(found, searched_grid(weight, SPEC).scales)


def test_cholesky_trouble_is_told_with_the_modules_names(random_model: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    few = text_of(windows(1, 4))
    rounded = round_model(random_model("llama"), SPEC, RoundingMethod(method="gptq", damping=0.0), text=few)
    assert any("model.layers.0.mlp.down_proj: damping raised to 0.001" in note for note in rounded.notes)
    monkeypatch.setattr("decoct.qat.ptq.methods.factorize", lambda *_: None)
    given_up = round_model(random_model("llama"), SPEC, RoundingMethod(method="gptq", scale="absmax"), text=few)
    assert "q_proj, model.layers.0.self_attn.k_proj" in given_up.notes[0] and "rounded to nearest" in given_up.notes[0]
    assert given_up.state.hash() == quantize_model(random_model("llama"), SPEC).hash()


@pytest.mark.parametrize("rounding", [RoundingMethod(), RoundingMethod(method="mse"), GPTQ])
def test_a_bad_weight_is_named(random_model: RandomModel, rounding: RoundingMethod) -> None:
    model = random_model("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").get_parameter("weight").data[1, 2] = float("inf")
    with pytest.raises((UserError, NonFiniteError), match=r"model\.layers\.1\.mlp\.(up|down)_proj"):
        round_model(model, SPEC, rounding, text=text_of(windows()))


def test_bad_inputs_are_named(random_model: RandomModel) -> None:
    model = random_model("llama")
    model.get_submodule("model.layers.1.input_layernorm").get_parameter("weight").data[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj are NaN"):
        round_model(model, SPEC, GPTQ, text=text_of(windows()))


def test_linears_that_idle_are_named(random_model: RandomModel) -> None:
    model = random_model("llama")
    model.get_submodule("model.layers.0").add_module("spare", nn.Linear(32, 32, bias=False))
    with pytest.raises(UserError, match=r"model\.layers\.0\.spare \(1 in all\) did not run .* add it to skip"):
        round_model(model, SPEC, GPTQ, text=text_of(windows()))


class Flat(nn.Module):
    """Reads tokens as rows, as OPT's FFN does; ``least`` = of how many tokens at most."""

    def __init__(self, inner: nn.Module, least: int = 10**6) -> None:
        super().__init__()
        self.inner, self.least = inner, least

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        given = self.inner(rows[: self.least])
        return torch.cat([given, given.new_zeros(len(rows) - len(given), given.shape[1])]).view(*x.shape[:2], -1)


@pytest.mark.parametrize("padded", [False, True])
def test_flattened_inputs_give_the_codes_of_plain_ones(random_model: RandomModel, padded: bool) -> None:
    mask = torch.ones(12, 24, dtype=torch.int64)
    mask[::3, 17:] = 0
    text = text_of(windows(), attention_mask=mask) if padded else text_of(windows())
    plain, flat = random_model("llama"), random_model("llama")
    for name in ("gate_proj", "up_proj", "down_proj"):
        place = f"model.layers.0.mlp.{name}"
        flat.set_submodule(place, Flat(flat.get_submodule(place)))
    one, two = (round_model(model, SPEC, GPTQ, text=text) for model in (plain, flat))
    for name, codes in one.state.codes.items():
        assert torch.equal(codes, two.state.codes.get(name, two.state.codes.get(f"{name}.inner", codes[:0]))), name


def test_linears_that_read_no_token_vectors_are_named(random_model: RandomModel) -> None:
    model = random_model("llama")
    place = "model.layers.0.mlp.down_proj"
    model.set_submodule(place, Flat(model.get_submodule(place), least=40))
    with pytest.raises(UserError, match=r"down_proj\.inner reads a tensor of shape \(40, 48\)"):
        round_model(model, SPEC, GPTQ, text=text_of(windows()))


def test_text_is_needed(random_model: RandomModel) -> None:
    with pytest.raises(UserError, match="method gptq needs calibration text, and there is none; raise calibration_tokens"):
        round_model(random_model("llama"), SPEC, GPTQ)
    nothing = text_of(windows(2), attention_mask=torch.zeros(2, 24, dtype=torch.int64))
    with pytest.raises(UserError, match="needs calibration text, and there is none"):
        round_model(random_model("llama"), SPEC, GPTQ, text=nothing)


def test_the_fingerprint_is_of_the_tokens() -> None:
    ids = windows(4)
    other = ids.clone()
    other[2, 3] += 1
    one, two, cut = text_of(ids, 1).fingerprint(), text_of(other, 1).fingerprint(), text_of(ids.reshape(8, 12)).fingerprint()
    assert len({one, two, cut}) == 3 and len(one) == 64


def test_rows_that_stand_for_all_are_spread_over_them() -> None:
    for rows in (1, 7, SAMPLE, SAMPLE + 1, 5632):
        seen = range(rows)[sampled(rows)]
        assert SAMPLE / 2 < len(seen) <= SAMPLE or len(seen) == rows
        assert rows - seen[-1] <= seen.step


def test_lines_of_the_summary(random_model: RandomModel) -> None:
    rounded = round_model(random_model("llama"), SPEC, GPTQ, text=text_of(windows()))
    lines = list(error_lines(rounded.errors, True))
    assert len(lines) == 7
    assert lines[0].startswith("self_attn.q_proj  squared output error ") and lines[0].endswith(" to nearest")
    assert linear_kind("model.layers.12.mlp.down_proj") == "mlp.down_proj" and linear_kind("lm_head") == "lm_head"
