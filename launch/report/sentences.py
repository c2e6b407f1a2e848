"""The sentences of a report: how its figures were measured, what the stages covered, how exact the exports are."""

from typing import Any

from ...models.capabilities import percent
from ...qat.source.plain_source import CastError
from ...trainer.evaluation.spread import CLEAR
from ...trainer.loop.standing import best_words
from .bit_widths import width_sentences

Report = dict[str, Any]
Row = dict[str, Any]


def protocol_lines(report: Report) -> list[str]:
    """Return how the figures were measured, one sentence per line."""
    p, v = report["protocol"], report["versions"]
    # the packages whose release can change a figure
    packages = ", ".join(f"{n} {v['packages'][n]}" for n in ("decoct", "torch", "transformers", "lightning") if v["packages"].get(n))
    return [
        f"Held-out text: {p['text']} (fingerprint {p['text_hash'][:12]}), {p['tokens']:,} tokens "
        f"in non-overlapping windows of {p['context']}, computed in {p['dtype']}.",
        *_left_out(p.get("left_out", {})),
        "KL is the mean over tokens of KL(teacher || model) in nats; top-1 is the share of tokens for which both predict the same token.",
        *_errors(p.get("blocks")),
        *_tasks(report),
        "Size is the size of the model as it is served; folder is the size of its weight files on disk. After qat or quantize they differ: "
        "the folder holds codes times scales in fp32, while an export packs codes and scales and keeps the rest in 16 bits (usually "
        "embeddings, head and norms, which are a large part of a small model).",
        "Bits per weight = 8 x size / parameters, embeddings included, tied tensors once; sparsity is the share of zeros in linear "
        "weights without embeddings and head.",
        "Change is the relative change of the perplexity since the row before: a stage is compared with the model that it started from, a "
        "re-read export with the model that it was made from.",
        f"Commit {report['commit'] or 'of an installed package'}; {packages}; Python {v['python']}; "
        f"{', '.join(v['gpus']) or v['cpu']}, {v['cores']} cores.",
    ]


def _errors(blocks: int | None) -> list[str]:
    """How errors were taken; nothing for a report of an earlier version, which has none."""
    if not blocks:
        return []
    return [
        f"± is one standard error over {blocks:,} blocks of the held-out text. The error of a change is that of the difference of both "
        f"models on the same blocks, and a change of at most {CLEAR:g} errors is none ('none seen'). A single block gives no error."
    ]


def _tasks(report: Report) -> list[str]:
    """How each task was scored, one sentence each; nothing without tasks."""
    rows = (*report["stages"], *report["exports"])
    scores = {name: score for row in rows for name, score in (row.get("tasks") or {}).items()}
    return [
        f"Task {name} ({score['source']}): {score['metric']} of {score['items']:,} items, {score['shots']} solved examples before each, "
        f"seed {score['seed']}, limit {score['limit'] or 'none'}, batch {score['batch'] or 'auto'}, fp32; ± is the error over items."
        for name, score in scores.items()
    ] + ["KL does not predict tasks: read both." for _ in scores][:1]


def _left_out(counts: dict[str, int]) -> list[str]:
    """Return the unused parts of the text by reason; nothing if all of it was used."""
    listed = "; ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return [f"Not used of the text: {listed}."] if listed else []


def coverage_sentences(report: Report) -> list[str]:
    """Return a sentence for each stage with the share of the decoder's weights that it worked on."""
    told = ((row, row["coverage"]) for row in report["stages"] if row.get("coverage"))
    return [
        f"{row['name']} worked on {percent(seen['share'])} of the decoder's weights"
        + (f"; unchanged: {', '.join(seen['left'])}" if seen["left"] else "")
        for row, seen in told
    ]


def held_out_sentences(report: Report) -> list[str]:
    """Return a sentence for each stage that ended early, or whose last evaluation was not the best one."""
    sentences = []
    for row in report["stages"]:
        # rows of earlier versions have none
        seen = row.get("held_out")
        if not seen:
            continue
        if seen["ended_early"]:
            sentences.append(
                f"{row['name']} ended early, after step {seen['last_step']} of {seen['total_steps']}: "
                f"{seen['evaluations_since_better']} evaluations in a row were not better (early_stopping.patience {seen['patience']})"
            )
        if seen["ended_early"] or seen["best_step"] != seen["last_step"]:
            sentences.append(f"{row['name']}: {best_words(seen)}")
    return sentences


def sample_sentences(report: Report) -> list[str]:
    """Return a sentence for each stage that trained on samples: how many, how long, and the KL on them beside that on given text."""
    sentences = []
    for row in report["stages"]:
        seen = row.get("samples")
        if not seen or not seen["samples"]:
            continue
        whose = {"student": "the student", "teacher": "the teacher", "mix": "student and teacher"}[seen["from"]]
        text = (
            f"{row['name']} trained on {seen['samples']:,} samples of {whose}: {seen['mean_length']:.0f} tokens on average, "
            f"{percent(seen['cut'])} cut at the limit"
        )
        own, given = seen["own_kl"], seen["given_kl"]
        if own is not None:
            text += f"; in the last quarter of the steps KL {own:.4f} on the student's own text"
            text += f", {given:.4f} on other text" if given is not None else ""
        sentences.append(text)
    return sentences


def round_sentences(report: Report) -> list[str]:
    """Return a sentence for each stage that cut in rounds."""
    sentences = []
    for row in report["stages"]:
        if seen := row.get("rounds"):
            # steps are whole, so that rounds may differ by one
            each = "; ".join(
                f"{one['shape']} ({percent(one['share'])} of the decoder layers' parameters left, {one['tokens']:,} tokens)" for one in seen
            )
            sentences.append(f"{row['name']} cut in {len(seen)} rounds and distilled after each: {each}")
    return sentences


def term_sentences(report: Report) -> list[str]:
    """Return a sentence for each stage whose loss had terms besides that on predictions: the size of each, and its weight."""
    sentences = []
    for row in report["stages"]:
        terms = row.get("terms")
        if terms:
            parts = [f"{name} {term['mean']:.4f} (weight {term['weight']:g})" for name, term in terms.items()]
            sentences.append(f"{row['name']}: terms of the loss in the last quarter of the steps: {', '.join(parts)}")
    return sentences


def text_sentences(report: Report) -> list[str]:
    """Return a sentence for each stage that trained on a blend: the held-out figures of each text, and how often it was read."""
    sentences = []
    for row in report["stages"]:
        parts = []
        for name, seen in (row.get("texts") or {}).items():
            figures = [f"KL {seen['held_out_kl']:.4f}"] if "held_out_kl" in seen else []
            figures += [f"perplexity {seen['held_out_perplexity']:.2f}"] if "held_out_perplexity" in seen else []
            figures += [f"read {seen['data_epochs']:.2f} times"] if "data_epochs" in seen else []
            parts.append(f"{name} {', '.join(figures)}")
        if parts:
            sentences.append(f"{row['name']}: held out, text by text: {'; '.join(parts)}")
    return sentences


def stage_sentences(report: Report) -> list[str]:
    """Return all that is told of stages in sentences."""
    return [
        *coverage_sentences(report),
        *width_sentences(report),
        *held_out_sentences(report),
        *sample_sentences(report),
        *term_sentences(report),
        *text_sentences(report),
        *round_sentences(report),
    ]


def exactness(export: Row) -> str:
    """Describe the weights in the files of a row of ``exports``."""
    if export["exact"]:
        return "rebuilt element by element by an independent reader"
    rounding = export.get("rounding")
    return f"NOT exact: {CastError(**rounding)}" if rounding else "NOT exact"
