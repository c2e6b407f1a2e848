"""Renders report.html: one self-contained page that loads nothing from elsewhere."""

from importlib import resources
from typing import Any

from ...models.common.terminal_text import printable
from .bit_widths import width_tables
from .curves import Curves
from .pictures import draw_all, render
from .searches import search_table, search_words, searches
from .sentences import exactness, protocol_lines, stage_sentences
from .tables import headings, report_rows

_CAPTIONS = {
    "size-quality": "Each point is a model at the size that it is served at; the line follows the stages of the recipe.",
    "search": "Shapes that were tried within a budget, and in earlier searches for the same model and text; the chosen one is named.",
    "curves": "Training curves from metrics.jsonl; points are measured on a small part of the held-out text during the stage.",
    "sparsity": "Zeros per decoder layer.",
    "bits": "Bits per weight that were chosen for each kind of linear in each decoder layer; 16 = left alone.",
}


def render_page(report: dict[str, Any], curves: Curves) -> str:
    """Return the page as HTML, with the pictures as inline SVG and all user text escaped."""
    import jinja2
    import yaml
    from markupsafe import Markup

    from ...qat.runtimes.outcome_words import outcome_text

    pictures = []
    for name, figure in draw_all(report, curves).items():
        svg = render(figure, "svg").decode()
        # matplotlib writes an XML prolog, which is not allowed inside HTML
        pictures.append({"name": name, "svg": Markup(svg[svg.index("<svg") :]), "caption": _CAPTIONS[name]})
    source = resources.files("decoct.launch.report").joinpath("page.html.j2").read_text()
    # autoescape, as names of runs and stages are free text; StrictUndefined, so that a renamed key fails in a test and not as a hole in a
    # page
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    return template.render(
        report=report,
        headings=headings(report),
        rows=report_rows(report),
        pictures=pictures,
        protocol=protocol_lines(report),
        searches=[(search_words(stage, search), *search_table(search)) for stage, search in searches(report)],
        exactness=exactness,
        coverage=stage_sentences(report),
        widths=width_tables(report),
        outcome_text=outcome_text,
        samples=_samples(report),
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
    )


def _samples(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each prompt with the answers of every model; [] for a report without samples. Control characters are shown as escapes."""
    found = report.get("samples") or {"prompts": [], "answers": {}}
    return [
        (printable(prompt), [(name, printable(texts[at])) for name, texts in found["answers"].items()])
        for at, prompt in enumerate(found["prompts"])
    ]
