"""Which serving stack reads which export format: the one table behind the plan, model cards and docs/serving.md.

``launch/plan/serving_stacks.py`` judges a stack's support of a scheme or width; this table only lists the formats it knows. docs/serving.md
reports what was run, and how close the logits were.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RUNTIMES = ("vLLM", "SGLang", "transformers", "llama.cpp", "ONNX Runtime", "OpenVINO", "mlx-lm")
"""ONNX Runtime and OpenVINO are used through the packages onnxruntime-genai and openvino-genai."""
ONNX_OPTIONS = "nodes_to_exclude=/lm_head/MatMul shared_embeddings=false accuracy_level=1"
"""``--extra_options`` of onnxruntime-genai's builder. Without them it rounds a tied head to int4 itself and rounds inputs to 8 bits."""


@dataclass(frozen=True)
class Reading:
    """How a stack reads a format that it knows."""

    outcome: Literal["reads", "misreads"]
    """misreads: the stack loads the files without an error and computes another model."""
    how: str = ""
    """Options or caveats; '' if the folder's path is all the stack needs."""


_PLAIN = Reading("reads")
_SAFETENSORS = {"vLLM": _PLAIN, "SGLang": _PLAIN, "transformers": _PLAIN}
_ONNX = Reading("reads", f"its model builder, with --extra_options {ONNX_OPTIONS}")
_GGUF = {"llama.cpp": _PLAIN, "OpenVINO": Reading("reads", "its CPU plugin rounds inputs and cache to 8 bits")}
_MLX_AWQ = Reading("reads", "symmetric weights exactly; zero points and embeddings are rounded to fp16")
_OFF_BY_ONE = Reading("misreads", "its model builder reads version 2 as version 1, so each zero point is off by one")
_FP32 = Reading("reads", "with --dtype float32, or it computes in 16 bits")
READERS: Mapping[str, Mapping[str, Reading]] = {
    "compressed-tensors": _SAFETENSORS,
    "gptq": {**_SAFETENSORS, "ONNX Runtime": _ONNX},
    "gptq_v2": {**_SAFETENSORS, "ONNX Runtime": _OFF_BY_ONE},
    "awq": {**_SAFETENSORS, "ONNX Runtime": _ONNX, "mlx-lm": _MLX_AWQ},
    "bitsandbytes": {"transformers": _PLAIN},
    "safetensors": _SAFETENSORS,
    "safetensors-f32": {**_SAFETENSORS, "vLLM": _FP32, "SGLang": _FP32},
    "gguf": _GGUF,
    "gguf-q2_0": {"llama.cpp": Reading("reads", "from July 2026 on")},
    "gguf-tq1_0": {"llama.cpp": _PLAIN},
}
"""Format -> runtime -> how it reads the format. A missing pair: the stack does not know the format, or the pair is untested."""


def formats_for(runtime: str) -> list[str]:
    """Return the formats that a runtime reads correctly."""
    return [form for form, readers in READERS.items() if runtime in readers and readers[runtime].outcome == "reads"]


def known_as(form: str) -> str:
    """Return the table's name for a format: GGUF files of plain weights are read like any other GGUF file."""
    return form if form in READERS or not form.startswith("gguf") else "gguf"


def reading(form: str, runtime: str) -> Reading | None:
    """Return how a runtime reads a format; None if it does not know it."""
    return READERS.get(known_as(form), {}).get(runtime)


def card_lines(form: str) -> list[str]:
    """Return the model card's lines on options and caveats of stacks."""
    readers = READERS.get(known_as(form), {})
    words = {"reads": "reads it", "misreads": "must not be used with it"}
    return [f"- {runtime} {words[found.outcome]}: {found.how}." for runtime, found in readers.items() if found.how]


def readers_markdown() -> str:
    """Return the whole table for docs/serving.md."""
    lines = [f"| Format | {' | '.join(RUNTIMES)} |", "|---" * (len(RUNTIMES) + 1) + "|"]
    notes: list[str] = []
    for form, readers in READERS.items():
        cells = []
        for runtime in RUNTIMES:
            found = readers.get(runtime)
            if found is None:
                cells.append("-")
                continue
            # a remark that several pairs share gets one number
            mark = ""
            if found.how:
                note = f"{runtime}: {found.how}"
                notes += [] if note in notes else [note]
                mark = f" ({notes.index(note) + 1})"
            cells.append(("yes" if found.outcome == "reads" else "**misreads**") + mark)
        lines.append(f"| `{form}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"({number}) {note}.  " for number, note in enumerate(notes, 1))]) + "\n"
