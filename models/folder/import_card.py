"""The model card (README.md) of an imported model, and the origin of its weights in words. It contains no path of this machine."""

from collections.abc import Mapping
from typing import Any

_LICENSE_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-._")


def origin_words(facts: Mapping[str, Any]) -> str:
    """Where weights come from, as a phrase: 'weights were stored as Q4_K, Q6_K and F32 in model.gguf, sha256 0123...'.

    Args:
        facts: The entry ``imported`` of a record; {} gives ''.
    """
    if not facts:
        return ""
    if facts.get("format") == "adapter":
        rank = f"rank {facts['rank']}, " if facts.get("rank") else ""
        words = f"an adapter ({rank}{_file(facts)}) was added to the weights of {facts.get('base', 'its base model')}"
    elif facts.get("format") == "pickle":
        words = f"weights were stored as pickled tensors in {_file(facts)}"
    else:
        words = f"weights were stored as {_listed(list(facts.get('types', {})))} in {_file(facts)}"
    return words + (f", and rounded to {facts['stored_as']}" if facts.get("stored_as") else "")


def card_of(name: str, facts: Mapping[str, Any], model_type: str) -> str:
    """The card as Markdown with the hub's YAML header."""
    license = str(facts.get("license", "")).lower()
    # a license is written into YAML, so only plain words are taken
    licensed = [f"license: {license}"] if license and set(license) <= _LICENSE_LETTERS else []
    header = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *licensed,
        "tags:",
        "- decoct",
        f"- {model_type}",
        "---",
    ]
    rows = {
        "Made from": facts.get("name") or facts.get("file"),
        "Origin": origin_words(facts),
        **({"Tensors": ", ".join(f"{count} {kind}" for kind, count in facts["types"].items())} if facts.get("types") else {}),
    }
    table = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value]
    return "\n".join([*header, "", f"# {name}", "", "| | |", "|---|---|", *table, ""])


def _file(facts: Mapping[str, Any]) -> str:
    return f"{facts.get('file', 'a file')}, sha256 {facts.get('sha256', 'unknown')}"


def _listed(kinds: list[str]) -> str:
    return f"{', '.join(kinds[:-1])} and {kinds[-1]}" if len(kinds) > 1 else "".join(kinds) or "unknown types"


def _cell(value: Any) -> str:
    # a bar or a line end would break the table
    return str(value).replace("|", "\\|").replace("\n", " ")
