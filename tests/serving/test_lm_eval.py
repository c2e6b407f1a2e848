"""Tasks of the real lm-eval on local data: our answers through its prompts and metrics, against those of its own model class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoct.launch.run.task_checks import check_tasks
from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model, load_tokenizer
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.qat.export.export import export_folder
from decoct.qat.layers.quantized_model import quantize_model
from decoct.qat.layers.save_folder import save_quantized_folder
from decoct.qat.spec import QuantSpec
from decoct.trainer.settings import EvaluateSettings
from decoct.trainer.tasks.harness import _generated
from decoct.trainer.tasks.language_model import LanguageModel
from decoct.trainer.tasks.scoring import TaskChoice, check_choice, score_tasks, unknown_tasks
from tests.serving.conftest import READ, stdlib

pytestmark = [pytest.mark.serving, pytest.mark.slow]
lm_eval = pytest.importorskip("lm_eval")

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
num_fewshot: 2
"""
CHOICES = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWERS = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
TEXTS = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(a folder of a small model that has read some Python, lines of that text)."""
    texts = stdlib(*READ)
    tokenizer = train_tokenizer(iter(texts), 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer("\n".join(texts))["input_ids"])
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for step in range(120):
        at = torch.randint(0, len(ids) - 65, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[i : i + 65] for i in at])
        made(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model_folder(folder, made, tokenizer, {"kind": "student"}, dtype=torch.float32)
    lines = [line for text in texts for line in text.splitlines() if len(line.split()) > 3 and line.isascii()]
    return folder, lines


@pytest.fixture
def tasks(tmp_path: Path, model: tuple[Path, list[str]]) -> list[str]:
    """YAML files of one task of each kind."""
    _, lines = model
    rows = []
    for index in range(24):
        words = lines[3 * index].split()
        ends = [lines[3 * index + other].split()[-1] for other in range(3)]
        rows.append({
            "question": " ".join(words[:-1]), "options": list(dict.fromkeys(ends)), "right": 0, "answer": words[-1],
            "text": "\n".join(lines[4 * index : 4 * index + 1 + index]),
        })  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = []
    for name, body in (("choices", CHOICES), ("answers", ANSWERS), ("texts", TEXTS)):
        (tmp_path / f"{name}.yaml").write_text(COMMON.format(name=f"own_{name}", data=data) + body)
        found.append(str(tmp_path / f"{name}.yaml"))
    return found


def own_class(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, max_length=128)


def by_its_own_class(folder: Path, tasks: list[str]) -> dict[str, dict[str, Any]]:
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    theirs, manager = own_class(folder), TaskManager(include_defaults=False)
    return evaluator.simple_evaluate(model=theirs, tasks=tasks, task_manager=manager, bootstrap_iters=1000, fewshot_random_seed=0)[
        "results"
    ]


def test_scores_are_those_of_lm_evals_own_reader_of_transformers(model: tuple[Path, list[str]], tasks: list[str]) -> None:
    folder, _ = model
    choice = TaskChoice(tasks=tuple(tasks))
    assert check_choice(choice) == ["own_choices", "own_answers", "own_texts"]
    before = torch.get_rng_state()
    ours = score_tasks(str(folder), choice, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    theirs = by_its_own_class(folder, tasks)
    choices, answers, texts = (ours[name] for name in ("own_choices", "own_answers", "own_texts"))
    assert choices.metrics == {"acc": theirs["own_choices"]["acc,none"], "acc_norm": theirs["own_choices"]["acc_norm,none"]}
    assert choices.stderr == pytest.approx(theirs["own_choices"]["acc_stderr,none"])
    assert 0 < choices.score < 1
    assert answers.score == theirs["own_answers"]["exact_match,none"]
    assert (answers.metric, answers.items, answers.shots) == ("exact_match", 24, 2)
    assert texts.score == pytest.approx(theirs["own_texts"]["word_perplexity,none"], rel=1e-4)
    assert not texts.higher_is_better
    assert answers.source.startswith("lm-eval 0.4") and "answers.yaml, sha256 " in answers.source


def test_generated_text_is_that_of_lm_evals_own_reader_of_transformers(model: tuple[Path, list[str]]) -> None:
    """A small model rarely hits a whole answer, so the texts themselves are compared."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    folder, lines = model
    how = {"until": ["\n", "("], "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (" ".join(line.split()[:3]), dict(how)), index) for index, line in enumerate(lines[:20])]
    ours = LanguageModel(load_model(folder, dtype=torch.float32), load_tokenizer(folder), batch=4)
    got = _generated(ours, [request.args for request in asked])
    assert got == own_class(folder).generate_until(asked)
    assert len(set(got)) > 5


def test_quantized_folders_and_exports_have_one_score(model: tuple[Path, list[str]], tasks: list[str], tmp_path: Path) -> None:
    folder, _ = model
    rounded = load_model(folder, dtype=torch.float32)
    state = quantize_model(rounded, QuantSpec(bits=4, group_size=32))
    save_quantized_folder(rounded, state, tmp_path / "quantized", tokenizer=load_tokenizer(folder), base_model="x")
    export_folder(tmp_path / "quantized", tmp_path / "export", "compressed-tensors", runtimes=False)
    choice = TaskChoice(tasks=(tasks[0],), limit=12, shots=1, batch=4)
    ours, packed = (score_tasks(str(tmp_path / place), choice, device="cpu")["own_choices"] for place in ("quantized", "export"))
    assert ours == packed
    assert (ours.items, ours.shots, ours.limit, ours.batch) == (12, 1, 12, 4)


def test_unknown_names_and_broken_files_are_one_message(tasks: list[str], tmp_path: Path) -> None:
    unknown, known = unknown_tasks(["arc_easi", "cloze"])
    assert unknown == ["arc_easi"]
    assert {"arc_easy", "gsm8k", "cloze"} <= set(known)
    with pytest.raises(UserError, match=r"unknown task 'arc_easi', did you mean 'arc_easy'\?"):
        check_tasks(EvaluateSettings(tasks=("arc_easi",)))
    with pytest.raises(UserError, match=r"min_task names 'own_choice', which is not scored, did you mean 'own_choices'\?"):
        check_tasks(EvaluateSettings(tasks=(tasks[0],), min_task={"own_choice": 0.9}))
    (tmp_path / "broken.yaml").write_text("task: x\ndataset_path: json\n")
    with pytest.raises(UserError, match=r"task .*broken\.yaml: lm-eval cannot open it .*correct the file"):
        check_choice(TaskChoice(tasks=(str(tmp_path / "broken.yaml"),)))


def test_a_task_on_the_hub_that_is_not_reached_is_one_message() -> None:
    with pytest.raises(UserError, match=r"task arc_easy: lm-eval cannot open it \(.*its data comes from the Hugging Face hub"):
        check_choice(TaskChoice(tasks=("arc_easy",)))
