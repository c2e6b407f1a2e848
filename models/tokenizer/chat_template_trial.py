"""Renders a chat template in a process with limits: ``python -m decoct.models.tokenizer.chat_template_trial`` (see ``chat_template.py``).

Reads ``{"template", "conversations", "seconds", "bytes"}`` as JSON and prints ``{"fault"}``: '' or what went wrong. A template that needs
more time is ended by the system. What a template refuses by itself is no fault: rows are read one by one and may be refused too.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def main() -> None:
    """Render every conversation, with and without the start of an answer."""
    request: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit(request["seconds"], request["bytes"])
    render: Any = render_jinja_template
    fault = ""
    for messages in request["conversations"]:
        for prompt in (False, True):
            try:
                render(conversations=[messages], chat_template=request["template"], add_generation_prompt=prompt, **request["tokens"])
            except MemoryError:
                fault = f"needs more than {request['bytes']:,} bytes of memory"
            except RecursionError:
                fault = "calls itself without end"
            except Exception:
                # a template may refuse these conversations: what it says of the data's own is told when they are rendered
                continue
    sys.stdout.write(json.dumps({"fault": fault}))


def _limit(seconds: int, memory: int) -> None:
    """Of processor time from here on, and of memory beyond what this process has."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds))
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
