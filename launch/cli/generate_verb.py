"""The verb `generate`."""

import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..terminal.console import CleanConsole
from ..terminal.written import QuietEndConsole, write_json, write_out

if TYPE_CHECKING:
    from ..answers.answer import Answer, Sampling
    from ..answers.opened import Opened

_SHOWN = 60


@dataclass(frozen=True)
class Asked:
    """Which models are asked, and how."""

    model: str
    revision: str | None
    other: str | None
    """A second model for comparison."""
    chat: bool
    system: str | None
    dtype: str


def run_generate(asked: Asked, given: Sequence[str], files: Sequence[str], sampling: "Sampling", as_json: bool) -> None:
    """Answer every prompt, in order; with another model, print the answers of both beside each other."""
    from ..answers.prompts import read_prompts
    from ..run.start import quiet_libraries

    prompts = read_prompts(given, files)
    quiet_libraries()
    # two models beside each other, and JSON, are printed when they are complete
    streams = asked.other is None and not as_json
    first = _opened(asked.model, asked)
    answers = _ask(first, prompts, asked, sampling, streams=streams)
    result: dict[str, Any] = {"model": first.name, "sampling": asdict(sampling), "answers": _as_json(prompts, answers)}
    if asked.other is not None and not _interrupted(answers):
        name, vocabulary = first.name, first.tokenizer.get_vocab()
        # one model in memory at a time
        del first
        gc.collect()
        other = _opened(asked.other, asked)
        seen = _ask(other, prompts, asked, sampling, streams=False)
        result["other"] = {"model": other.name, "answers": _as_json(prompts, seen)}
        if not as_json:
            _print_beside(prompts, (name, other.name), answers, seen, same_tokens=vocabulary == other.tokenizer.get_vocab())
        answers = [*answers, *seen]
    if as_json:
        write_json(result)
    # after everything is printed: the exit code says that it was cut short
    if _interrupted(answers):
        raise KeyboardInterrupt


def _opened(path: str, asked: Asked) -> "Opened":
    from ..answers.opened import open_for_answers

    # on stderr, so that a pipe gets the answers alone
    with CleanConsole(stderr=True).status(f"loading {path}"):
        # a revision belongs to the repository that it was given for
        return open_for_answers(path, revision=asked.revision if path == asked.model else None, dtype=asked.dtype)


def _interrupted(answers: "Sequence[Answer]") -> bool:
    return bool(answers) and answers[-1].finish == "interrupted"


def _ask(opened: "Opened", prompts: Sequence[str], asked: Asked, sampling: "Sampling", *, streams: bool) -> "list[Answer]":
    """The answers, as far as Ctrl-C allows: the last one is the interrupted one."""
    from ..answers.answer import answer, check_room, prompt_ids
    from ..answers.conversation import Conversation

    answers: list[Answer] = []
    talk = Conversation(opened, asked.system) if asked.chat else None
    # a conversation makes its ids itself, and checks them
    begun = [] if talk else [prompt_ids(opened, prompt) for prompt in prompts]
    # every prompt is checked before the first answer, which may take long
    for number, ids in enumerate(begun, 1):
        check_room(opened, ids, f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt")
    for number, prompt in enumerate(prompts):
        if streams and len(prompts) > 1:
            write_out(f"> {_short(prompt)}\n")
        say = write_out if streams else _silent
        if talk:
            # each prompt is a conversation of its own
            talk.reset()
            answers.append(talk.say(prompt, sampling, say))
        else:
            answers.append(answer(opened, begun[number], sampling, say=say))
        if streams:
            write_out("\n\n" if number + 1 < len(prompts) else "\n")
            _tell(answers[-1].words())
        if _interrupted(answers):
            break
    return answers


def _silent(_: str) -> None:
    """Takes the text of an answer that is shown later."""


def _tell(words: str) -> None:
    """A line beside the answers, for people: on stderr, and only on a terminal."""
    if sys.stderr.isatty():
        print(f"({words})", file=sys.stderr, flush=True)


def _short(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


def _print_beside(
    prompts: Sequence[str], names: tuple[str, str], first: "Sequence[Answer]", second: "Sequence[Answer]", *, same_tokens: bool
) -> None:
    from ..answers.side_by_side import beside_each_other, common_words

    console = QuietEndConsole(markup=False, highlight=False)
    for prompt, one, other in zip(prompts, first, second):
        console.print(f"> {_short(prompt)}", style="bold")
        console.print(beside_each_other(names, (one, other), console.width))
        if said := common_words((one, other), same_tokens):
            console.print(said)


def _as_json(prompts: Sequence[str], answers: "Sequence[Answer]") -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, **{k: v for k, v in asdict(made).items() if k != "ids"}, "tokens": len(made.ids)}
        for prompt, made in zip(prompts, answers)
    ]
