"""What a report says of the evaluations during its stages."""

from typing import Any

from decoct.launch.report.build import markdown_report
from decoct.launch.report.page import render_page
from decoct.launch.report.sentences import held_out_sentences, sample_sentences, term_sentences, text_sentences

SEEN = {
    "figure": "kl", "best_step": 120, "best": 0.04, "last_step": 240, "last": 0.05, "model_step": 240, "total_steps": 240,
    "evaluations_since_better": 4, "patience": None, "ended_early": False,
}  # fmt: skip


def test_a_stage_whose_best_evaluation_was_not_its_last_is_told(report: dict[str, Any]) -> None:
    report["stages"][2]["held_out"] = SEEN
    sentence = (
        "01-distill: held-out KL was lowest after step 120 (0.04), 20.0% lower than after step 240 (0.05); the model is that of step 240; "
        "result: best would take the best"
    )
    assert held_out_sentences(report) == [sentence]
    assert f"- {sentence}.\n" in markdown_report(report)
    assert sentence in render_page(report, {})


def test_an_early_end_is_told_with_its_reason(report: dict[str, Any]) -> None:
    early = {"model_step": 120, "total_steps": 900, "patience": 4, "ended_early": True}
    report["stages"][2]["held_out"] = {**SEEN, **early}
    first, second = held_out_sentences(report)
    assert first == ("01-distill ended early, after step 240 of 900: 4 evaluations in a row were not better (early_stopping.patience 4)")
    assert second.endswith("the model is that of step 120 (result: best)")


def test_nothing_is_said_where_the_last_was_the_best_and_of_runs_of_before(report: dict[str, Any]) -> None:
    report["stages"][2]["held_out"] = {**SEEN, "best_step": 240}
    report["stages"][3]["held_out"] = None
    assert "held_out" not in report["stages"][4]
    assert held_out_sentences(report) == []


def test_samples_are_told_with_the_kl_on_the_students_own_text(report: dict[str, Any]) -> None:
    assert sample_sentences(report) == []
    drawn = {"from": "student", "samples": 4800, "mean_length": 87.4, "cut": 0.4, "own_kl": 0.0412, "given_kl": 0.0398}
    report["stages"][2]["samples"] = drawn
    sentence = (
        "01-distill trained on 4,800 samples of the student: 87 tokens on average, 40.0% cut at the limit; in the last quarter of the "
        "steps KL 0.0412 on the student's own text, 0.0398 on other text"
    )
    assert sample_sentences(report) == [sentence]
    assert f"- {sentence}.\n" in markdown_report(report)
    assert sentence.replace("'", "&#39;") in render_page(report, {})
    report["stages"][2]["samples"] = {**drawn, "from": "teacher", "own_kl": None}
    assert sample_sentences(report) == [sentence.split(";")[0].replace("the student", "the teacher")]
    report["stages"][2]["samples"] = {**drawn, "samples": 0}
    assert sample_sentences(report) == []


def test_texts_of_a_blend_are_told_with_their_figures(report: dict[str, Any]) -> None:
    assert text_sentences(report) == []
    report["stages"][2]["texts"] = {
        "math": {"held_out_kl": 0.0412, "held_out_perplexity": 9.1, "data_epochs": 0.5},
        "web": {"held_out_perplexity": 20.0},
    }
    sentence = "01-distill: held out, text by text: math KL 0.0412, perplexity 9.10, read 0.50 times; web perplexity 20.00"
    assert text_sentences(report) == [sentence]
    assert f"- {sentence}.\n" in markdown_report(report)
    assert sentence in render_page(report, {})


def test_terms_of_a_loss_are_told_with_their_weights(report: dict[str, Any]) -> None:
    assert term_sentences(report) == []
    report["stages"][2]["terms"] = {"predictions": {"weight": 1.0, "mean": 0.0412}, "hidden": {"weight": 0.5, "mean": 0.21}}
    sentence = "01-distill: terms of the loss in the last quarter of the steps: predictions 0.0412 (weight 1), hidden 0.2100 (weight 0.5)"
    assert term_sentences(report) == [sentence]
    assert f"- {sentence}.\n" in markdown_report(report)
    assert sentence in render_page(report, {})
