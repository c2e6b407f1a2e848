"""Renders a chat template in a limited process: ``python -m decoct.models.tokenizer.chat_template_trial`` (see ``chat_template.py``).

Reads ``{"template", "conversations", "seconds", "bytes"}`` as JSON and prints ``{"fault"}``: '' or what went wrong. The system ends a
template that needs more time. A conversation that the template itself refuses is not a fault: rows of data may be refused too.
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

    # after the imports, whose time and memory must not count
    _limit(request["seconds"], request["bytes"])
    render: Any = render_jinja_template
    fault = ""
    for messages in request["conversations"]:
        # both forms: templates branch on the prompt for an answer
        for prompt in (False, True):
            try:
                render(conversations=[messages], chat_template=request["template"], add_generation_prompt=prompt, **request["tokens"])
            except MemoryError:
                fault = f"needs more than {request['bytes']:,} bytes of memory"
            except RecursionError:
                fault = "calls itself without end"
            except Exception:
                # a template may refuse these conversations; its refusals of real data are reported when the data is rendered
                continue
    sys.stdout.write(json.dumps({"fault": fault}))


def _limit(seconds: int, memory: int) -> None:
    """Limit processor time (s) from now on, and memory (bytes) beyond what the process already uses."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    # RLIMIT_CPU counts from the start of the process, and imports have used some of it
    spent = int(used.ru_utime + used.ru_stime) + 1
    # SIGXCPU at the limit, which only this limit sends; with an equal hard limit it would be SIGKILL, as for a lack of memory
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds + 1))
    # SIGXCPU would also leave a file with the memory of the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        # address space, because the kernel limits nothing closer to real use
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
