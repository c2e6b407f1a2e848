"""Checks that a chat template terminates. A template is a program that comes with a model and may loop or build long texts.

transformers runs templates in jinja2's sandbox, which blocks files and Python objects, but not ranges nested fifteen deep or strings that
double with each turn. Before its first use on data, a template is tried once on conversations of 1 to 64 messages in a separate process
with limits on time and memory.
"""

import json
import os
import signal
import subprocess
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10
"""Limit of processor time for all conversations together; published templates take milliseconds."""
BYTES = 2**30
# far above SECONDS: a busy machine gives the child little processor time
_WALL_SECONDS = 120
_REMEDY = "mend chat_template.jinja (or chat_template in tokenizer_config.json), or take the template of a model that you trust"


def check_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Try the chat template of a tokenizer, if it has one. This takes a second or two, once per template and process.

    Raises:
        UserError: the template needs more than ``SECONDS`` or ``BYTES`` for a short conversation, or recurses without end.
    """
    given: Any = tokenizer.chat_template
    # special tokens that templates print, as text
    tokens = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    # a tokenizer may have several templates by name
    for template in given.values() if isinstance(given, dict) else (given,):
        if isinstance(template, str) and (fault := _fault(template, json.dumps(tokens, sort_keys=True))):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} {fault} to render a short conversation; {_REMEDY}"
            )


@lru_cache
def _fault(template: str, tokens: str) -> str:
    # as JSON, so that the arguments can be cached
    request = {"template": template, "tokens": json.loads(tokens), "conversations": _conversations(), "seconds": SECONDS, "bytes": BYTES}
    # -P: a file in the working directory must not replace a module of the child
    command = [sys.executable, "-P", "-m", "decoct.models.tokenizer.chat_template_trial"]
    # no network, no GPU and one thread: a template needs none of it
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, env=environment, timeout=_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {_WALL_SECONDS} seconds"
    if done.returncode == -signal.SIGXCPU:
        return f"takes more than {SECONDS} seconds of processor time"
    if done.returncode < 0:
        return f"ends the process that tries it ({_killed_by(-done.returncode)})"
    try:
        return str(json.loads(done.stdout)["fault"])
    except (ValueError, KeyError):
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return f"ends the process that tries it ({said[-1] if said else done.returncode})"


def _killed_by(number: int) -> str:
    name = signal.Signals(number).name if number in {known.value for known in signal.Signals} else f"signal {number}"
    return name + (", as the system does when memory runs out" if number == signal.SIGKILL else "")


def _conversations() -> list[list[dict[str, str]]]:
    # 64 turns: a text that doubles with each turn exceeds any limit
    # user and assistant in turn, since most templates refuse another order
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"what is said in turn {n}"} for n in range(64)]
    system = {"role": "system", "content": "what holds for all turns"}
    return [turns[:1], turns[:2], [system, *turns[:2]], turns[:9], turns]
