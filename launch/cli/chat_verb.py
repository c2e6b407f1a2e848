"""The verb `chat`: a conversation on the terminal, or messages from a pipe, one in each line."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from ..terminal.console import CleanConsole
from ..terminal.written import write_out

if TYPE_CHECKING:
    from ..answers.answer import Sampling

PROMPT = "> "
NEW = "/new"


def run_chat(model: str, revision: str | None, system: str | None, dtype: str, sampling: "Sampling") -> None:
    """Answer message after message, until the input ends."""
    from ..answers.conversation import Conversation
    from ..answers.opened import open_for_answers
    from ..run.start import quiet_libraries

    quiet_libraries()
    # on stderr, so that a pipe gets the answers alone
    with CleanConsole(stderr=True).status(f"loading {model}"):
        opened = open_for_answers(model, revision=revision, dtype=dtype)
        talk = Conversation(opened, system)
    people = sys.stdin.isatty()
    if people:
        write_out(f"{opened.name}: Ctrl-C stops an answer, Ctrl-D ends, {NEW} begins anew\n")
    for message in _typed() if people else _piped():
        if not message.strip():
            continue
        if message.strip() == NEW:
            talk.reset()
            continue
        try:
            made = talk.say(message, sampling, write_out, _note)
        except UserError as error:
            # at a terminal the next message may be shorter; a pipe ends with exit code 2
            if not people:
                raise
            _note(str(error))
            continue
        write_out("\n")
        # nobody is at a pipe to send another message, so Ctrl-C ends the verb
        if made.finish == "interrupted" and not people:
            raise KeyboardInterrupt
        # an answer that came to its end needs no words
        if made.finish != "end" and people:
            _note(made.words())


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


def _typed() -> Iterator[str]:
    """Lines that someone types, with their history; Ctrl-C gives up a line, Ctrl-D ends."""
    with suppress(ImportError):
        import readline as readline  # input() uses it from now on
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            # so that the shell's prompt begins a line
            write_out("\n")
            return
        except KeyboardInterrupt:
            write_out("\n")


def _piped() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError:
        raise UserError("stdin is not UTF-8 text; convert it (iconv -t utf-8)") from None
