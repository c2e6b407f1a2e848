"""A chat template that does not end, or takes all memory, is found in a process of its own before it meets anybody's rows."""

import signal
import subprocess

import pytest
from transformers import PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.tokenizer import chat_template
from decoct.models.tokenizer.chat_template import check_chat_template
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DOUBLING = "{% set ns = namespace(x='a') %}{% for m in messages %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}" + PLAIN
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}" + PLAIN


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["hello world"], 257)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        pytest.param(LOOPS, "takes more than 1 seconds of processor time", id="loops"),
        pytest.param(DOUBLING, r"needs more than \S+ bytes of memory", id="doubling"),
        pytest.param("{{ 'a' * 10**11 }}", r"needs more than \S+ bytes of memory", id="one long string"),
        pytest.param("{{ 10 ** (10 ** 8) }}", "takes more than 1 seconds of processor time", id="power"),
        pytest.param("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end", id="recursion"),
    ],
)
def test_what_does_not_end_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str, fault: str
) -> None:
    if "seconds" in fault:  # what fills the memory must not be ended by a busy machine's clock first
        monkeypatch.setattr(chat_template, "SECONDS", 1)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"the chat template of .*{fault} to render a short conversation"):
        check_chat_template(tokenizer)


def test_usual_templates_and_refusals_of_their_own_pass(tokenizer: PreTrainedTokenizerFast) -> None:
    refusing = "{{ raise_exception('no system message') }}"
    generation = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    for template in (None, {"default": PLAIN, "tools": refusing}, generation, "{% for %}"):
        tokenizer.chat_template = template
        check_chat_template(tokenizer)


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (signal.SIGXCPU, "takes more than 10 seconds of processor time"),
        (signal.SIGSEGV, r"ends the process that tries it \(SIGSEGV\)"),
        (signal.SIGKILL, r"ends the process that tries it \(SIGKILL, as the system does when memory runs out\)"),
    ],
)
def test_a_process_that_is_killed_says_by_what(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, fault: str
) -> None:
    killed = subprocess.CompletedProcess([], -number, b"", b"")
    monkeypatch.setattr(chat_template.subprocess, "run", lambda *_, **__: killed)
    # a template of its own: faults are remembered
    tokenizer.chat_template = f"{{# {number.name} #}}"
    with pytest.raises(UserError, match=f"{fault} to render a short conversation"):
        check_chat_template(tokenizer)
