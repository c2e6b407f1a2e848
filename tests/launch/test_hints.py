"""Every remedy that a message names is followed as it is written, and then that message is gone."""

import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest

from decoct.configs.loader import load_recipe
from decoct.launch.plan.make_plan import Plan, plan
from decoct.launch.plan.problems import problems
from decoct.models.common.errors import UserError

CUT, PRUNED, GPTQ = "smollm2-1.7b-half-int4", "qwen3-8b-4b-int4", "smollm2-1.7b-gptq-int4"
_OVERRIDE = re.compile(r"stages\.[\w.-]+=(?:\[[^\]]*\]|[^\s,;)]+)")
_LEAVE = re.compile(r"leave (stages\.[\w.-]+) out")
_RANKS = re.compile(r"--tensor-parallel (\d+)")


def alternatives(text: str) -> list[list[str]]:
    """The ways that a remedy names, each the overrides (or options of the verb) that it takes; words alone are none."""
    found = []
    for part in re.split(r",? or |; ", text):
        steps = _OVERRIDE.findall(part) + [f"{key}=null" for key in _LEAVE.findall(part)] + _RANKS.findall(part)
        found += [steps] if steps else []
    return found


def planned(recipe: str, steps: Sequence[str], ranks: int = 1, **machine: Any) -> Plan:
    options = [step for step in steps if step.isdigit()]
    overrides = [step for step in steps if not step.isdigit()]
    return plan(load_recipe(recipe, overrides), tensor_parallel=int(options[-1]) if options else ranks, **{"gpus": 0, **machine})


@pytest.mark.parametrize(
    ("recipe", "trigger", "said", "ways"),
    [
        (CUT, "export.formats=[awq] qat.weights.bits=8", "awq packs 4 bits", 1),
        (CUT, "export.formats=[gptq,gguf] qat.weights.symmetric=false", "gptq stores only symmetric weights", 2),
        (CUT, "export.formats=[gptq] qat.weights.bits=6", "gptq packs 2, 4 and 8 bits", 1),
        (CUT, "export.formats=[gptq_v2] qat.weights.bits=3", "gptq_v2 packs 2, 4 and 8 bits", 1),
        (CUT, "export.formats=[compressed-tensors] qat.weights.bits=3", "packs 3 bits differently", 2),
        (CUT, "export.reader_version=0.17 qat.weights.bits=5", "it must be 0.18.0 or later", 1),
        (CUT, "export.formats=[gguf] qat.weights.group_size=16", "one scale for a block of 32 weights", 1),
        (CUT, "export.formats=[gguf] qat.weights.bits=8 qat.weights.symmetric=false", "asymmetric codes of 5 bits at most", 2),
        (CUT, "export.formats=[gguf] qat.weights.bits=5 qat.weights.symmetric=false", "hardly ever holds it", 2),
        (CUT, "export.formats=[safetensors] qat.weights.bits=8", "do not hold 8-bit codes", 2),
        (CUT, "export.formats=[safetensors,gguf] qat.weights.symmetric=false", "do not hold asymmetric codes", 2),
        (CUT, "export.formats=[gguf-q2_0]", "gguf-q2_0 is for symmetric weights of 2 bits", 1),
        (CUT, "export.formats=[gptq] qat.weights.kind=nf4", "holds integer codes, not kind=nf4", 2),
        (CUT, "export.formats=[gguf] qat.weights.scale_grid=fp32", "does not hold scale_grid=fp32", 1),
        (CUT, "export.formats=[gptq] qat.embedding.bits=8", "gptq has readers that expect an unquantized embedding", 2),
        (CUT, "export.formats=[compressed-tensors] qat.kv_cache.kind=int8", "takes keys and values in fp8", 2),
        (CUT, "export.formats=[gguf] qat.kv_cache.kind=fp8_e4m3 qat.kv_cache.scaling=static", "cannot record that keys and values", 2),
        (CUT, "qat.activations.kind=int8", "takes int8 inputs with int8 weights", 2),
        (
            CUT,
            "qat.activations.kind=fp8_e4m3 qat.weights.bits=8 qat.weights.group_size=channel",
            "takes fp8 inputs with fp8_e4m3 weights",
            3,
        ),
        (CUT, "export.formats=[compressed-tensors] qat.weights.kind=nf4", "not kind=nf4", 3),
        (CUT, "export.formats=[gptq] qat.weights.kind=mxfp4 qat.weights.group_size=32", "holds integer codes, not kind=mxfp4", 3),
        (
            CUT,
            "export.formats=[compressed-tensors] qat.activations.kind=int8 qat.weights.kind=mxfp4 qat.weights.group_size=32",
            "takes int8 inputs with int8 weights",
            3,
        ),
        (
            PRUNED,
            "export.formats=[gguf] prune.structured.ffn=9200 qat.weights.group_size=channel",
            "stores blocks of 32 along the inputs",
            2,
        ),
        (PRUNED, "export.formats=[gptq] prune.structured.ffn=9201 qat.weights.group_size=channel", "packs 8 codes in a word", 3),
        (PRUNED, "export.formats=[awq] prune.structured.ffn=9201 qat.weights.group_size=channel", "packs 8 outputs in a word", 3),
    ],
)
def test_a_problem_of_a_plan_goes_away_by_each_of_its_remedies(recipe: str, trigger: str, said: str, ways: int) -> None:
    steps = [f"stages.{step}" for step in trigger.split()]
    told = [problem for problem in problems(planned(recipe, steps)) if said in problem]
    assert told, problems(planned(recipe, steps))
    found = alternatives(told[0])
    assert len(found) == ways, told[0]
    for way in found:
        left = problems(planned(recipe, [*steps, *way]))
        assert not [problem for problem in left if said in problem], (way, left)


VERDICTS = [
    (CUT, "export.formats=[compressed-tensors]", 1),
    (CUT, "export.formats=[gguf]", 1),
    (CUT, "export.formats=[gptq_v2] qat.weights.symmetric=false", 1),
    (CUT, "export.formats=[gptq,awq,gguf] qat.weights.group_size=16", 1),
    (CUT, "export.formats=[gptq,gguf] qat.weights.bits=2", 1),
    (CUT, "export.formats=[gguf] qat.weights.bits=6", 1),
    (CUT, "export.formats=[gptq] qat.weights.group_size=channel", 1),
    (CUT, "qat.skip=[*.q_proj]", 1),
    (CUT, "qat.weights.kind=nf4", 1),
    (CUT, "qat.embedding.bits=8", 1),
    (CUT, "export.formats=[compressed-tensors]", 3),
    (PRUNED, "prune.structured.ffn=9152 qat.weights.group_size=64", 4),
    (PRUNED, "prune.structured.ffn=9200 qat.weights.group_size=channel", 1),
]


@pytest.mark.parametrize(("recipe", "trigger", "ranks"), VERDICTS)
def test_a_verdict_of_a_plan_gets_better_by_each_way_of_its_remedy(recipe: str, trigger: str, ranks: int) -> None:
    steps = [f"stages.{step}" for step in trigger.split()]
    followed = 0
    for verdict in _verdicts(planned(recipe, steps, ranks)):
        parts = [ways for part in verdict.fix.split("; ") if (ways := alternatives(part))]
        for way in product(*parts):
            if not way:
                continue
            followed += 1
            done = [step for one in way for step in one]
            after = [v for v in _verdicts(planned(recipe, [*steps, *done], ranks)) if v.target == verdict.target]
            ranked = {"no": 0, "slower": 1, "ok": 2}
            better = max(ranked[v.outcome] for v in after) > ranked[verdict.outcome]
            assert better or all(verdict.reason.split("; ")[0] not in v.reason for v in after), (verdict, done, after)
    assert followed


def _verdicts(made: Plan) -> Iterator[Any]:
    for stage in made.stages:
        yield from stage.verdicts


def test_memory_that_rounding_does_not_have_goes_away_by_its_remedy() -> None:
    tight: dict[str, Any] = {"gpus": 1, "gpu_memory": 2 * 10**8}
    (told,) = [problem for problem in problems(planned(GPTQ, [], **tight)) if "works on one layer" in problem]
    assert "CUDA_VISIBLE_DEVICES=''" in told
    assert problems(planned(GPTQ, [], gpus=0)) == []
    starts = ["stages.qat.start=gptq"]
    (told,) = [problem for problem in problems(planned(CUT, starts, **tight)) if "works on one layer" in problem]
    (way,) = alternatives(told)
    assert not [problem for problem in problems(planned(CUT, [*starts, *way], **tight)) if "works on one layer" in problem]


@pytest.mark.parametrize(
    ("trigger", "said", "ways"),
    [
        (
            "trainer.global_batch_tokens=100000",
            r"use ([\d,]+) or ([\d,]+)",
            ["trainer.global_batch_tokens={0}", "trainer.global_batch_tokens={1}"],
        ),
        ("trainer.micro_batch=7", r"use (\d+) or (\d+)", ["trainer.micro_batch={0}", "trainer.micro_batch={1}"]),
        ("student.keep.layers=100", r"give (\d+) to (\d+)", ["student.keep.layers={0}", "student.keep.layers={1}"]),
        (
            "stages.qat.weights.group_size=48",
            r"use (\d+) or (\d+)",
            ["stages.qat.weights.group_size={0}", "stages.qat.weights.group_size={1}"],
        ),
        ("stages.qat.weights.bits=9", r"at most 8; (\d) and (\d)", ["stages.qat.weights.bits={0}", "stages.qat.weights.bits={1}"]),
        ("stages.qat.weights.kind=mxfp4", r"use (group_size)=(\d+)", ["stages.qat.weights.{0}={1}"]),
        ("stages.qat.weights.kind=fp8_e4m3", r"use (bits)=(\d)", ["stages.qat.weights.{0}={1} stages.qat.weights.group_size=channel"]),
        ("stages.qat.loss.divergence=jsd teacher.cache=top_k", r"use (forward_kl)", ["stages.qat.loss.divergence={0}"]),
        (
            "stages.export.formats=[gguf] stages.export.allow_inexact=true",
            r"applies only to (safetensors)",
            ["stages.export.formats=[{0}]"],
        ),
        (
            "stages.export.formats=[gguf] stages.export.reader_version=0.18.0",
            r"applies only to (compressed-tensors)",
            ["stages.export.formats=[{0}]"],
        ),
        (
            "stages.distill.tokens=5M stages.distill.steps=5",
            r"give '(tokens)' or '(steps)', not both",
            ["stages.distill.{0}=null", "stages.distill.{1}=null"],
        ),
    ],
)
def test_a_problem_of_a_recipe_goes_away_by_each_of_its_remedies(trigger: str, said: str, ways: list[str]) -> None:
    with pytest.raises(UserError) as told:
        load_recipe(CUT, trigger.split())
    match = re.search(said, str(told.value))
    assert match, str(told.value)
    for way in ways:
        steps = [*trigger.split(), *way.format(*match.groups()).replace(",", "").split()]
        load_recipe(CUT, steps)
