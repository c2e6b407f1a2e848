"""Overrides reach every key, are read like the file, and name what they cannot find."""

from collections.abc import Callable

import pytest

from decoct.configs import Recipe
from decoct.configs.nodes import Listing, Mapping, Scalar
from decoct.configs.overrides import apply_overrides
from decoct.models.common.errors import UserError

TEXT = """\
teacher: {path: a/teacher}
student: {keep: {layers: 4}}
data: {files: [a.txt], seq_length: 256}
stages:
  - distill: {tokens: 1M}
  - prune: {magnitude: {keep: 0.5}}
  - distill: {name: recover, tokens: 2M}
  - qat: {tokens: 3M}
  - export
logger: wandb
"""


def test_values_are_read_like_those_of_the_file(load: Callable[..., Recipe]) -> None:
    recipe = load(
        TEXT,
        [
            "seed=7",
            "trainer.precision=32",
            "trainer.gradient_clip=50%",
            "data.files=[x.txt, '*.jsonl']",
            "student.keep.layers = 6",
            "teacher.revision='null'",
            "logger.project=mine",
            "stages.0.betas=[0.8,0.99]",
        ],
    )
    assert (recipe.seed, recipe.trainer.precision, recipe.trainer.gradient_clip) == (7, "32", 0.5)
    assert recipe.data.files == ("x.txt", "*.jsonl")
    assert recipe.student.keep is not None
    assert recipe.student.keep.layers == 6
    assert recipe.teacher is not None
    assert recipe.teacher.revision == "null"
    assert (recipe.logger.kind, recipe.logger.project) == (("wandb",), "mine")
    assert recipe.stages[0].settings.betas == (0.8, 0.99)


@pytest.mark.parametrize(
    "override",
    [
        "stages.2.distill.tokens=2B",
        "stages.2.tokens=2B",
        "stages.recover.tokens=2B",
        "stages.03-recover.tokens=2B",
        "stages.recover.distill.tokens=2B",
    ],
)
def test_a_stage_is_addressed_by_position_name_or_folder(override: str, load: Callable[..., Recipe]) -> None:
    assert [getattr(entry.settings, "tokens", None) for entry in load(TEXT, [override]).stages] == [10**6, None, 2 * 10**9, 3 * 10**6, None]


def test_a_stage_is_addressed_by_its_kind_when_there_is_one_of_it(load: Callable[..., Recipe]) -> None:
    recipe = load(TEXT, ["stages.qat.weights.bits=8", "stages.qat.qat.tokens=4M", "stages.export.formats=[compressed-tensors]"])
    assert (recipe.stages[3].settings.weights.bits, recipe.stages[3].settings.tokens) == (8, 4_000_000)


def test_the_pattern_of_an_override_of_modules_keeps_its_dots(load: Callable[..., Recipe]) -> None:
    settings = (
        load(TEXT, ["stages.qat.overrides.*.mlp.down_proj.bits=8", "stages.3.qat.overrides.*.o_proj.group_size=64"]).stages[3].settings
    )
    assert {pattern: (change.bits, change.group_size) for pattern, change in settings.overrides.items()} == {
        "*.mlp.down_proj": (8, None),
        "*.o_proj": (None, 64),
    }
    assert load(TEXT, ["stages.qat.overrides.*.o_proj.bits=8", "stages.qat.overrides=null"]).stages[3].settings.overrides == {}


def test_the_last_of_two_overrides_counts_and_null_takes_the_default(load: Callable[..., Recipe]) -> None:
    recipe = load(TEXT, ["stages.0.tokens=5M", "stages.0.tokens=null", "stages.0.steps=9", "student.keep=null", "student.path=some/model"])
    assert (recipe.stages[0].settings.tokens, recipe.stages[0].settings.steps) == (None, 9)
    assert recipe.student.path == "some/model"


def test_a_mended_key_is_no_problem_of_the_file(load: Callable[..., Recipe]) -> None:
    assert load(TEXT.replace("seq_length: 256", "seq_length: short"), ["data.seq_length=512"]).data.seq_length == 512


STAGES = "stages: 0 (01-distill), 1 (02-prune), 2 (03-recover), 3 (04-qat), 4 (05-export)"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.precison=32", ": trainer.precison: unknown key, did you mean 'precision'? valid here: devices, "),
        ("trianer.precision=32", ": trianer: unknown key, did you mean 'trainer'? valid here: name, "),
        ("trainer.precision=16", ": trainer.precision: must be '32' or 'bf16-mixed'; got '16'"),
        ("stages.0.tokns=1M", ": stages.0.distill.tokns: unknown key, did you mean 'tokens'? valid here: name, tokens, "),
        (
            "stages.0.loss.temprature=2",
            ": stages.0.distill.loss.temprature: unknown key, did you mean 'temperature'? valid here: divergence, ",
        ),
        ("stages.0.qat.tokens=1M", f": stages.0 is a 'distill' stage, not 'qat'; {STAGES}"),
        ("stages.recver.tokens=1M", f": there is no stage 'recver', did you mean 'recover'? {STAGES}"),
        ("stages.distill.tokens=1M", f": 'distill' is more than one stage; use the position; {STAGES}"),
        ("stages.5.tokens=1M", f": there is no stage 5; {STAGES}"),
        ("stages.5", ": write key=value, such as trainer.precision=32 or stages.1.tokens=2M"),
        ("stages.0=3", f": name a stage and a key of it, such as stages.0.tokens=2M; {STAGES}"),
        ("stages.0.distill=3", ": name a key of the stage, such as stages.0.tokens=2M"),
        ("stages.qat.overrides.*.mlp.down_proj=8", ": overrides needs a pattern of module names and one of kind, bits, "),
        ("stages.qat.overrides.bits=8", ": overrides needs a pattern of module names and one of kind, bits, "),
        ("stages.qat.overrides.*.down_proj.bit=8", ": overrides needs a pattern of module names and one of kind, bits, "),
        ("trainer..precision=32", ": write key=value, such as trainer.precision=32 or stages.1.tokens=2M"),
        ("data.files.0=b.txt", ": data.files is a list; set it as a whole"),
        ("data.seq_length.x=1", ": data.seq_length is a single value; set it as a whole"),
    ],
)
def test_an_override_that_means_nothing_is_refused(override: str, expected: str, message: Callable[..., str]) -> None:
    assert message(TEXT, [override]).startswith(f"override '{override}'{expected}")


def test_several_loggers_are_a_list(load: Callable[..., Recipe]) -> None:
    assert load(TEXT, ["logger=[wandb,tensorboard]"]).logger.kind == ("wandb", "tensorboard")
    listed = load(TEXT.replace("logger: wandb", "logger: [wandb, csv]"), ["logger.project=mine"])
    assert (listed.logger.kind, listed.logger.project) == (("wandb", "csv"), "mine")
    assert load(TEXT, ["logger.kind=csv"]).logger.kind == ("csv",)


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("['a,b.txt','c']", ("a,b.txt", "c")),
        ('[ "a, b.txt" , c.txt]', ("a, b.txt", "c.txt")),
        ("[*.txt, it's.txt, x[0].txt, y{1.txt]", ("*.txt", "it's.txt", "x[0].txt", "y{1.txt")),
        ("['[a', b]", ("[a", "b")),
    ],
)
def test_a_list_is_split_at_commas_between_its_items(text: str, files: tuple[str, ...], load: Callable[..., Recipe]) -> None:
    assert load(TEXT, [f"data.files={text}"]).data.files == files


def test_a_list_may_hold_mappings() -> None:
    root = Mapping("")
    apply_overrides(root, ["x=[{name: ema, every: 2, of: ['a}, b', [1, 2]]}, plain, [c, d]]"])
    listed = root.entries["x"].node
    assert isinstance(listed, Listing)
    ema, plain, inner = listed.items
    assert isinstance(ema, Mapping)
    assert list(ema.entries) == ["name", "every", "of"]
    of = ema.entries["of"].node
    assert isinstance(of, Listing)
    assert isinstance(of.items[0], Scalar)
    assert of.items[0].value == "a}, b"
    assert isinstance(plain, Scalar)
    assert plain.value == "plain"
    assert isinstance(inner, Listing)
    assert len(inner.items) == 2


def test_a_mapping_is_written_in_braces(load: Callable[..., Recipe]) -> None:
    recipe = load(TEXT, ["logger={kind: wandb, project: mine}", "student={keep: {layers: 6}}"])
    assert (recipe.logger.kind, recipe.logger.project) == (("wandb",), "mine")
    assert recipe.student.keep is not None
    assert recipe.student.keep.layers == 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("logger={kind: wandb, kind: none}", r"^override 'logger={kind: wandb, kind: none}': kind: given twice; keep one$"),
        ("logger={kind: [}", r"^override 'logger={kind: \[}': not readable as YAML: "),
        ("logger={kind: &a wandb}", r"^override 'logger={kind: &a wandb}': YAML anchors"),
        ("logger={knd: wandb}", r"^override 'logger={knd: wandb}': logger.knd: unknown key, did you mean 'kind'"),
        ("stages.export.formats=[]", r"formats=\[\] names no format; name one or more, or leave the stage out$"),
    ],
)
def test_a_faulty_mapping_or_list_is_reported_by_its_override(load: Callable[..., Recipe], override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(TEXT, [override])
