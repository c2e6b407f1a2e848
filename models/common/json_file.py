"""Reads JSON objects from model folders, with readable errors."""

import json
from pathlib import Path
from typing import Any

from .errors import UserError


def what_instead(folder: Path) -> str:
    """Advice on what to give instead of a folder that is not a model folder, from its content."""
    checkpoints = [found.parent for found in folder.glob("checkpoint-*/config.json")]
    if checkpoints:
        # by length first: checkpoint-900 comes before checkpoint-1000
        newest = max(checkpoints, key=lambda one: (len(one.name), one.name))
        return f"give one of the checkpoints in it, such as {newest}"
    # the models of a run folder: runs/x and runs/x/NN-kind
    made = [found.parent for found in (*folder.glob("model/config.json"), *folder.glob("[0-9][0-9]-*/model/config.json"))]
    # a folder NN-kind.<key> is from before the settings of its stage changed
    current = [one for one in made if "." not in one.parent.name] or made
    if current:
        return f"give a model folder in it, such as {max(current)}"
    if gguf := sorted(folder.glob("*.gguf")):
        return f"give its GGUF file {gguf[0].name} itself, or make a model folder of it: decoct import {gguf[0]} --out MODEL"
    if any(folder.glob("*.pth")):
        return "it holds an original release (.pth), which is pickled and never read; give its version for transformers"
    return "give a folder that from_pretrained can read"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model folder; ``UserError`` if the file is missing or is not a JSON object."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not a model folder: it has no {path.name}; {what_instead(path.parent)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # deeply nested lists end in a RecursionError
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}; fetch or export the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; fetch or export the model again")
    return content
