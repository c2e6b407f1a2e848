"""The prompts of `decoct generate`: from the command line, from files, or from stdin."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ...models.common.errors import UserError

STDIN = "-"
_ROWS = (".jsonl", ".ndjson")


def read_prompts(given: Sequence[str], files: Sequence[str]) -> list[str]:
    """Every prompt, in the order of the command line.

    Args:
        given: Prompts themselves; '-' is the whole of stdin.
        files: Text files with a prompt in each line, or jsonl files with rows ``{"prompt": ...}``; '-' is the lines of stdin.

    Raises:
        UserError: there is no prompt, or a file cannot be read.
    """
    if not given and not files:
        if sys.stdin.isatty():
            raise UserError("there is no prompt: give --prompt TEXT, or --prompts FILE, or text on stdin")
        given = [STDIN]
    # stdin can be read to its end once
    if (*given, *files).count(STDIN) > 1:
        raise UserError("stdin ('-') can be read once; give it once")
    # the line end that a shell adds is no part of the prompt
    prompts = [_stdin().rstrip("\n") if one == STDIN else one for one in given]
    prompts += [prompt for file in files for prompt in _of_file(file)]
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise UserError(f"{which} is empty; give the beginning of a text to go on from")
    if not prompts:
        raise UserError(f"{', '.join(files)}: there is no prompt in it; write one in each line")
    return prompts


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UserError("stdin is not UTF-8 text; convert it (iconv -t utf-8)") from None


def _of_file(file: str) -> list[str]:
    if file == STDIN:
        text = _stdin()
    else:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text; convert it (iconv -t utf-8)") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error}); give a file of prompts") from error
    # not splitlines: it also breaks at characters that a prompt may hold
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_row(file, *line) for line in lines] if Path(file).suffix in _ROWS else [line for _, line in lines]


def _row(file: str, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file}:{number}: is not JSON ({error}); each line holds a row such as {{"prompt": "Once"}}') from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{file}:{number}: has no text under \'prompt\'; each line holds a row such as {{"prompt": "Once"}}')
    return row["prompt"]
