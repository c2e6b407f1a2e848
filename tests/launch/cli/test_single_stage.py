"""Single verbs on a model folder, each through the real command line, one after the other as a user would."""

import json
from pathlib import Path
from typing import Any

import pytest

from decoct.configs import recipe_from_dict
from decoct.launch.cli.app import app
from decoct.launch.cli.single_stage import run_verb
from decoct.launch.cli.stage_recipes import TextChoice, prune_settings, read_verb, verb_overrides, verb_recipe
from decoct.models.common.errors import UserError


@pytest.mark.slow
def test_verbs_lead_from_a_folder_to_a_verified_export(small_student: Path, verb: Any, corpus: Path, tmp_path: Path) -> None:
    student = str(small_student)
    text = ["--text", str(corpus / "*.txt"), "--seq-length", "32"]
    small = ["data.eval_tokens=1024", "trainer.precision=32"]

    verb("distill", student, *small, "--teacher", student, *text, "--tokens", "4k", "--out", "one")
    verb("prune", "one/01-distill/model", *small, "--ffn", "32", *text, "--out", "two")
    verb("prune", "two/01-prune/model", *small, "--keep", "0.5", "--tokens", "4k", *text, "--out", "three [x] y")
    verb("qat", "three [x] y/01-prune/model", *small, "--group-size", "16", "--tokens", "4k", *text, "--out", "four")
    verb("quantize", "one/01-distill/model", *small, "--bits", "8", "--group-size", "channel", *text, "--out", "five")
    cut = ["--shape", "ffn=32,heads=1", "structured.score=taylor", "structured.repair=true"]
    told = verb("prune", "one/01-distill/model", *small, *cut, *text, "--out", "seven").stdout
    assert "kept 1 of 2 query heads in each of 2 layers" in told
    assert "refit of the FFN output: KL" in told
    assert json.loads((tmp_path / "seven/01-prune/model/decoct.json").read_text())["parent_shape"]["heads"] == 2
    assert [row["name"] for row in json.loads((tmp_path / "five/report.json").read_text())["stages"]] == ["input", "01-quantize"]
    assert [row["name"] for row in json.loads((tmp_path / "one/report.json").read_text())["stages"]] == ["teacher", "input", "01-distill"]
    exported = verb("export", "four/01-qat/model", "--out", "served [x] y").stdout
    assert "every weight rebuilt exactly" in exported
    assert "packs 100% of the decoder's weights" in exported
    assert "served [x] y" in verb("export", "five/01-quantize/model", "--out", "served [x] y 8").stdout
    assert "ok" in verb("verify", "served [x] y", "source=four/01-qat/model", "runtimes=false").stdout
    verb("evaluate", "served [x] y", "--teacher", student, *text, "--tokens", "1024", "--out", "six")
    row = json.loads((tmp_path / "six/report.json").read_text())["stages"][-1]
    trained = json.loads((tmp_path / "four/report.json").read_text())["stages"][-1]
    assert row["sparsity"] >= 0.5
    assert row["eval"]["perplexity"] == pytest.approx(trained["eval"]["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_quantize_by_gptq_on_text(tiny: dict[str, Any], run: Any, verb: Any, corpus: Path, tmp_path: Path) -> None:
    made = run({**tiny, "name": "made", "stages": [{"distill": {"steps": 60}}]})
    assert made.returncode == 0, made.stderr
    student = "runs/made/01-distill/model"
    text = ["--text", str(corpus / "*.txt"), "--seq-length", "32", "data.eval_tokens=1024"]

    def quantize(*arguments: str, code: int = 0) -> str:
        done = verb("quantize", student, *text, "--teacher", student, "--group-size", "16", *arguments, code=code)
        return done.stdout + done.stderr

    def row(out: str) -> dict[str, Any]:
        return json.loads((tmp_path / out / "report.json").read_text())["stages"][-1]

    quantize("--bits", "3", "--out", "rtn")
    gptq = ["--method", "gptq", "--bits", "3", "--out", "gptq"]
    told = quantize(*gptq, "--calibration-tokens", "4k")
    assert "01-quantize: gptq on 4k tokens" in told
    assert "calibrates on 4,000 tokens in 125 windows" in told
    assert row("gptq")["eval"]["kl"] < row("rtn")["eval"]["kl"]
    first = json.loads((tmp_path / "gptq/01-quantize/model/decoct.json").read_text())
    assert first["quant"]["rounding"]["calibration"]["tokens"] == 4000
    assert "is done, skipped" in quantize(*gptq, "--calibration-tokens", "4k", "stages.0.quantize.stream=always")
    assert "calibrates on 8,000 tokens" in quantize(*gptq, "--calibration-tokens", "8k")
    assert len(list((tmp_path / "gptq").glob("01-quantize.*"))) == 1, "what other text gave is kept aside"
    awq = quantize("--bits", "3", "--transform", "awq", "--calibration-tokens", "4k", "--out", "awq")
    assert "01-quantize: awq + rtn on 4k tokens" in awq and "awq: mlp.up_proj, scales from" in awq
    assert row("awq")["eval"]["kl"] < row("rtn")["eval"]["kl"]
    refusal = "calibration_tokens=4000 has no effect with method=rtn: it belongs to gptq and mse"
    assert refusal in quantize("--calibration-tokens", "4k", "--out", "no", code=2)
    assert "must be 'rtn', 'mse' or 'gptq'; got 'gptk', did you mean 'gptq'?" in quantize("--method", "gptk", "--out", "no", code=2)


def test_verb_recipe_is_one_stage_on_the_given_model() -> None:
    recipe = verb_recipe("qat", "runs/x/01-distill/model", {"tokens": "1M", "other": None}, TextChoice(None, None, 64), "big")
    assert recipe["name"] == "qat-01-distill"
    assert recipe["student"] == {"path": "runs/x/01-distill/model"}
    assert recipe["teacher"] == {"path": "big"}
    assert recipe["data"] == {"builtin": "python-stdlib", "seq_length": 64}
    assert recipe["stages"] == [{"qat": {"tokens": "1M"}}]


def test_a_key_of_the_stage_stands_for_itself() -> None:
    assert verb_overrides("distill", ["learning_rate=1e-4", "loss.temperature=2", "teacher.load_in=fp32", "seed=1"]) == [
        "stages.0.learning_rate=1e-4", "stages.0.loss.temperature=2", "teacher.load_in=fp32", "seed=1",
    ]  # fmt: skip
    assert verb_overrides("distill", ["learning_rat=1", "trainr.precision=32", "lr=1"]) == [
        "stages.0.learning_rat=1", "trainr.precision=32", "lr=1",
    ]  # fmt: skip
    # like no key at all, or of another kind of stage: the message lists the keys of the stage
    assert verb_overrides("quantize", ["result=best", "zzz.y=1"]) == ["stages.0.result=best", "stages.0.zzz.y=1"]
    assert verb_overrides("evaluate", ["max_kl=0.1", "tokens=5"]) == ["stages.0.max_kl=0.1", "stages.0.tokens=5"]


@pytest.mark.parametrize(("given", "tokens", "steps"), [([], 1_000_000, None), (["steps=7"], None, 7), (["tokens=5k"], 5000, None)])
def test_steps_replace_the_default_tokens(given: list[str], tokens: Any, steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("decoct.launch.run.start.start", lambda recipe, out: started.append(recipe))
    run_verb("distill", "m", {"tokens": None}, TextChoice(["a.txt"], None, 64), "t", given, None)
    settings = started[0].stages[0].settings
    assert (settings.tokens, settings.steps) == (tokens, steps)


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        ([], 32),  # 1M tokens of 64 in a window: 488 steps
        (["tokens=200k"], 12),
        (["tokens=200k", "trainer.devices=8"], 8),
        (["steps=7"], 32),
        (["trainer.global_batch_tokens=128"], 2),
        # longer windows than the verb's own
        (["data.seq_length=1k"], 3),
    ],
)
def test_the_size_of_a_step_follows_from_tokens_window_and_devices(given: list[str], windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("decoct.launch.run.start.start", lambda recipe, out: started.append(recipe))
    run_verb("distill", "m", {"tokens": None}, TextChoice(["a.txt"], None, 64), "t", given, None)
    recipe = started[0]
    assert recipe.trainer.global_batch_tokens == windows * recipe.data.seq_length


@pytest.mark.parametrize(
    ("kind", "settings", "text", "given", "told"),
    [
        ("prune", {"magnitude": {"keep": 0.5}}, None, [], ""),
        ("prune", {"magnitude": {"keep": 0.5}, "tokens": "1M"}, None, [], "prune learns from the Python standard library"),
        ("prune", {"magnitude": {"keep": 0.5}}, None, ["steps=3"], "prune learns from the Python standard library"),
        ("prune", {"structured": {"ffn": 8}}, None, [], "prune scores channels on the Python standard library"),
        ("prune", {"wanda": {"keep": 0.5}}, None, [], "prune calibrates on the Python standard library"),
        ("quantize", {"method": "rtn"}, None, [], ""),
        ("quantize", {"method": "gptq"}, None, [], "quantize calibrates on the Python standard library"),
        ("quantize", {}, None, ["stages.0.method=gptq"], "quantize calibrates on the Python standard library"),
        ("quantize", {"method": "gptq"}, ["a.txt"], [], ""),
        ("quantize", {"method": "rtn", "transform": "awq"}, None, [], "quantize calibrates on the Python standard library"),
        ("quantize", {"method": "rtn", "transform": "rotation"}, None, [], ""),
        ("qat", {"tokens": "1M"}, None, [], "qat learns from the Python standard library"),
        ("qat", {"tokens": "1M"}, None, ["data.builtin=null", "data.files=a.txt"], ""),
        ("evaluate", {}, None, [], ""),
    ],
)
def test_the_built_in_text_is_announced_where_the_weights_depend_on_it(
    kind: str, settings: Any, text: Any, given: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("decoct.launch.run.start.start", lambda recipe, out: None)
    run_verb(kind, "m", settings, TextChoice(text, None, 64), "t", given, None)
    said = capsys.readouterr().err
    assert (told in said) if told else not said


def test_options_that_exclude_each_other_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="--text and --hub"):
        TextChoice(["a"], "b", 64).data()
    with pytest.raises(UserError, match=r"exactly one of --ffn .* and --keep"):
        prune_settings(None, None, None)
    with pytest.raises(UserError, match=r"exactly one of --ffn .*, --shape .* and --keep"):
        prune_settings(32, None, None, "heads=2")
    with pytest.raises(UserError, match=r"exactly one of --ffn .*, --budget .* and --keep"):
        prune_settings(32, None, None, budget="0.6")
    with pytest.raises(UserError, match="--budget searches a shape and takes no --tokens"):
        prune_settings(None, None, "1M", budget="0.6")
    with pytest.raises(UserError, match=r"exactly one of --ffn .* or --pattern"):
        prune_settings(32, None, None, pattern="2:4")
    with pytest.raises(UserError, match="--method chooses single weights and does not go with --ffn"):
        prune_settings(32, None, None, method="wanda")
    with pytest.raises(UserError, match="--method obs: there is no such method; give one of magnitude, wanda, sparsegpt, movement"):
        prune_settings(None, "0.5", None, method="obs")
    with pytest.raises(UserError, match="--method wanda is one shot and takes no --tokens; run `decoct distill` on the result"):
        prune_settings(None, "0.5", "1M", method="wanda")
    with pytest.raises(UserError, match="method movement scores weights by how training moves them; give tokens"):
        prune_settings(None, "0.5", None, method="movement", in_python=True)


def test_a_budget_is_handed_on_and_the_tokens_of_its_search_decide_the_step(tmp_path: Path) -> None:
    given = prune_settings(None, None, None, budget="0.6")
    assert given == {"structured": {"budget": "0.6"}}
    text = TextChoice(["x.txt"], None, 512)
    steps = []
    for tokens in (None, "256k"):
        search = {} if tokens is None else {"search": {"tokens": tokens}}
        recipe = read_verb("prune", "m", {"structured": {**given["structured"], **search}}, text, None, ())
        assert recipe.stages[0].settings.structured.budget == 0.6
        steps.append(recipe.trainer.global_batch_tokens)
    # nothing is trained; at least 256 steps in the first round
    assert steps == [512 * 32, 512]


def test_a_cut_with_tokens_is_made_in_rounds() -> None:
    assert prune_settings(32, None, "1M") == {"structured": {"ffn": 32, "rounds": 0.3}, "tokens": "1M"}
    assert prune_settings(None, None, "1M", "heads=2") == {"structured": {"heads": "2", "rounds": 0.3}, "tokens": "1M"}


def test_a_shape_is_read_from_text_and_from_a_mapping() -> None:
    made = prune_settings(None, None, None, "ffn=6144, heads=24,kv=6,hidden=3072,layers=28")
    assert made == {"structured": {"ffn": "6144", "heads": "24", "kv_heads": "6", "hidden": "3072", "layers": "28"}}
    assert prune_settings(None, None, None, {"kv_heads": 2}) == {"structured": {"kv_heads": 2}}
    given = read_verb("prune", "m", prune_settings(None, None, None, "ffn=6k,kv=4"), TextChoice(["a.txt"], None, 64), None, ())
    assert given.stages[0].settings.structured.kept == {"ffn": 6000, "kv_heads": 4}
    for wrong, told in (
        ("fnn=3", "'fnn' is no axis; name what is kept along ffn"),
        ("", "nothing is named"),
        ("3072", "'3072' is no axis"),
        ("ffn=128,ffn=64", "names ffn twice; name each axis once"),
        ("kv=2, kv_heads=1", "names kv_heads twice"),
    ):
        with pytest.raises(UserError, match=told):
            prune_settings(None, None, None, wrong)
    with pytest.raises(UserError, match=r"structured\.heads: 'two' is not a whole number|structured\.heads: must be a whole number"):
        read_verb("prune", "m", prune_settings(None, None, None, "heads=two"), TextChoice(["a.txt"], None, 64), None, ())


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ((None, "0.5", None), {"magnitude": {"keep": "0.5"}, "tokens": None}),
        ((None, "0.5", None, None, "wanda"), {"wanda": {"keep": "0.5"}, "tokens": None}),
        ((None, None, None, None, "sparsegpt", "2:4"), {"sparsegpt": {"pattern": "2:4"}, "tokens": None}),
        ((None, None, "2M", None, None, "2:4"), {"magnitude": {"pattern": "2:4"}, "tokens": "2M"}),
        ((None, "0.3", "2M", None, "movement"), {"movement": {"keep": "0.3"}, "tokens": "2M"}),
    ],
)
def test_a_method_and_a_share_make_a_section(given: tuple[Any, ...], settings: dict[str, Any]) -> None:
    rest = dict(zip(("method", "pattern"), given[4:]))
    assert prune_settings(*given[:4], **rest) == settings
    verb = verb_recipe("prune", "m", settings, TextChoice(["a.txt"], None, 64), "t")
    assert recipe_from_dict(verb).stages[0].settings.method == next(iter(settings))


@pytest.mark.parametrize(
    ("given", "eval_tokens", "length"),
    [
        (["--text", "a.txt"], "all", 512),
        (["--text", "a.txt", "data.seq_length=64"], "all", 64),
        (["--text", "a.txt", "--tokens", "1k"], 1000, 512),
        (["--hub", "some/stories"], 32_000, 512),
        ([], 32_000, 512),
    ],
)
def test_evaluate_measures_all_of_its_files_and_takes_overrides(
    given: list[str], eval_tokens: int | str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("decoct.launch.run.start.start", lambda recipe, out: started.append(recipe))
    app(["evaluate", "model", *given], standalone_mode=False)
    assert started[0].data.eval_tokens == eval_tokens
    assert started[0].data.seq_length == length


@pytest.mark.parametrize("arguments", [["evaluate"], ["quantize", "--group-size", "16"], ["prune", "--keep", "0.5"]], ids=" ".join)
def test_a_stage_that_learns_nothing_measures_on_all_of_a_short_text(
    arguments: list[str], verb: Any, small_student: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("kado logu mita nufi. " * 8)
    kind, *options = arguments
    verb(kind, str(small_student), *options, "--text", "short.txt", "--out", "made")
    report = json.loads((tmp_path / "made/report.json").read_text())
    assert 2 < report["protocol"]["tokens"] < 512, "less than one window of the default length"
    assert report["stages"][-1]["eval"]["perplexity"] > 1


def test_a_stage_that_learns_refuses_text_without_a_window_to_learn_from(verb: Any, small_student: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("kado logu mita nufi. " * 8)
    told = verb("prune", str(small_student), "--ffn", "16", "--text", "short.txt", code=2).stderr
    assert "fewer than one window of data.seq_length=512" in told
