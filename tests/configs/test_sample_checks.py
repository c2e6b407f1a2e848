"""Recipes with samples that cannot work are refused with the key, the reason and a remedy, which works."""

from typing import Any

import pytest

from decoct.configs.loader import recipe_from_dict
from decoct.configs.recipe import resolved
from decoct.models.common.errors import UserError

BASE: dict[str, Any] = {
    "name": "r",
    "teacher": {"path": "big"},
    "student": {"path": "small"},
    "data": {"files": ["a.txt"], "seq_length": 256},
    "stages": [{"distill": {"steps": 10, "samples": {"from": "student"}}}],
}


def _problems(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe_from_dict(BASE, overrides)
    return str(caught.value)


def test_samples_are_read_and_written_under_the_keys_of_recipes() -> None:
    recipe = recipe_from_dict(BASE, ["stages.0.samples.from=mix", "stages.0.samples.share=25%"])
    samples = recipe.stages[0].settings.samples
    assert (samples.from_, samples.share, samples.refresh) == ("mix", 0.25, 1)
    plain = resolved(recipe)
    assert plain["stages"][0]["distill"]["samples"]["from"] == "mix"
    assert recipe_from_dict(plain) == recipe
    for kind in ("qat", "prune"):
        stage: dict[str, Any] = {"steps": 10, "samples": {}, **({"magnitude": {"keep": 0.5}} if kind == "prune" else {})}
        assert recipe_from_dict({**BASE, "stages": [{kind: stage}]}).stages[0].settings.samples.from_ == "student"


@pytest.mark.parametrize(
    ("broken", "said", "remedy"),
    [
        (
            "stages.0.samples.share=1.5",
            "samples.share: 1.5 is out of range; it must be at least 0 and at most 1",
            "stages.0.samples.share=1",
        ),
        ("stages.0.samples.share=-0.1", "it is a share of the windows", "stages.0.samples.share=0"),
        ("stages.0.samples.from=both", "must be 'student', 'teacher' or 'mix'", "stages.0.samples.from=mix"),
        ("teacher.cache=hybrid", "for which teacher.cache has no predictions; remove teacher.cache, so that", "teacher.cache=null"),
        ("stages.0.loss.hard_weight=0.5", "would teach the student its own samples as labels; set", "stages.0.samples.from=teacher"),
        ("stages.0.loss.hard_weight=1", "needs a teacher to learn from, and loss.hard_weight is 1", "stages.0.loss.hard_weight=0"),
        ("trainer.strategy=fsdp2", "draws samples with the whole student on each rank", "trainer.strategy=auto"),
        ("trainer.compile=true", "whose lengths would be compiled one after the other", "trainer.compile=false"),
        (
            "stages.0.samples.prompts=200",
            "200 tokens of prompt (prompts) and 128 new tokens do not fit into a window of data.seq_length=256; lower one of them",
            "stages.0.samples.max_new_tokens=56",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_the_remedy_works(broken: str, said: str, remedy: str) -> None:
    assert said in _problems(broken)
    recipe_from_dict(BASE, [broken, remedy])


def test_a_served_teacher_is_refused() -> None:
    served = {**BASE, "teacher": {"path": "big", "served": {"url": "http://host/v1", "model": "big"}}}
    with pytest.raises(UserError, match=r"for which teacher\.served has no predictions; remove teacher\.served"):
        recipe_from_dict(served)
    # the stage's own input is a model in memory
    recipe_from_dict({**served, "stages": [{"qat": {"steps": 5, "teacher": "input", "samples": {}}}, {"distill": {"steps": 5}}]})


def test_a_sharded_teacher_writes_nothing() -> None:
    assert "trainer" not in BASE
    message = _problems("teacher.placement=sharded", "stages.0.samples.from=teacher")
    assert "a sharded teacher computes in step on all ranks; set it to replicated or offloaded, or set samples.from: student" in message
    recipe_from_dict(BASE, ["teacher.placement=sharded"])
    recipe_from_dict(BASE, ["teacher.placement=offloaded", "stages.0.samples.from=teacher"])


def test_conversations_need_their_answers_marked_and_room_for_new_ones() -> None:
    chat = {**BASE, "data": {"files": ["a.jsonl"], "kind": "chat", "seq_length": 256}}
    recipe_from_dict(chat)
    with pytest.raises(UserError, match=r"data\.mask_prompts=false marks none; remove one of the two keys"):
        recipe_from_dict(chat, ["data.mask_prompts=false"])
    with pytest.raises(UserError, match=r"256 new tokens do not fit into a window of data\.seq_length=256; lower it, or raise"):
        recipe_from_dict(chat, ["stages.0.samples.max_new_tokens=256"])


def test_stages_that_do_not_learn_from_a_teacher_have_none() -> None:
    with pytest.raises(UserError, match="pretrain learns from the text alone; use a distill stage"):
        recipe_from_dict({**BASE, "stages": [{"pretrain": {"steps": 5, "samples": {}}}, {"distill": {"steps": 5}}]})
    with pytest.raises(UserError, match="has no effect on a stage that takes no steps; give tokens or steps"):
        recipe_from_dict({**BASE, "stages": [{"prune": {"magnitude": {"keep": 0.5}, "samples": {}}}, {"distill": {"steps": 5}}]})
