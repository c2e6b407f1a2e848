"""Floating point operations of training, of a teacher's cache and of a model's forward pass: the one rule, from shapes alone.

Per token of a window of S tokens:

- a forward pass takes 2 for each weight of a decoder layer's matrices, and 4 S for each channel of all query heads of a layer (scores, and
  their sum of values; the whole square is counted, as masks of packed documents do not shorten it). A mixture of experts counts the
  experts that a token passes. Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery et al. 2022 (PaLM), arXiv 2204.02311,
  appendix B;
- the backward pass takes twice as much, and activation checkpointing repeats the forward pass of the layers;
- the head takes 2 H V forward and twice that backward, and the loss ``LOSS_FLOP`` for each entry of the vocabulary.

Embedding tables are looked up, which takes none. Norms, fake quantization and the optimizer are bound by memory and are not counted.

Operations are kept apart by arithmetic, because a GPU does fp32 many times slower than bf16: the student's head and the loss are fp32 also
under bf16-mixed (law 2, docs/architecture.md).
"""

from dataclasses import dataclass
from typing import Any

from ...models.families import text_config
from ...models.settings import LoadIn
from .shapes import ModelShape

LOSS_FLOP = 20
"""fp32 operations per token and entry of the vocabulary: two softmaxes, the divergence and its gradient. An estimate; below one percent of
the head's product from 1,000 channels on."""
# a token passes so many of so many experts
_PASSED, _EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k"), ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations by arithmetic."""

    bf16: float = 0.0
    fp32: float = 0.0

    @property
    def total(self) -> float:
        """Return all operations."""
        return self.bf16 + self.fp32

    def __add__(self, other: "Work") -> "Work":
        return Work(bf16=self.bf16 + other.bf16, fp32=self.fp32 + other.fp32)

    def __mul__(self, factor: float) -> "Work":
        return Work(bf16=self.bf16 * factor, fp32=self.fp32 * factor)


def _in(operations: float, *, mixed: bool) -> Work:
    return Work(bf16=operations) if mixed else Work(fp32=operations)


def layers_forward(model: ModelShape, seq_length: int) -> float:
    """Return the operations per token of a forward pass through the decoder layers."""
    # a token passes a share of the experts, and all other weights
    weights = model.linear + sum(
        count * (_passed(model.config) if "expert" in words else 1.0) for words, count in model.family.weights.others.items()
    )
    sizes = model.dimensions
    # state space models have no heads
    attention = 4.0 * seq_length * sizes.heads * sizes.head_dim * sizes.layers if sizes.kv_heads else 0.0
    return 2.0 * weights + attention


def head_forward(model: ModelShape) -> float:
    """Return the operations per token of the output head."""
    return 2.0 * model.hidden * model.vocabulary


def student_work(student: ModelShape, seq_length: int, *, mixed: bool, checkpointing: bool) -> Work:
    """Return the operations per training token of the student, with the loss.

    Args:
        mixed: Whether layers compute in bf16.
        checkpointing: Whether the layers' forward pass runs twice.
    """
    # one forward pass and a backward pass of twice its work; checkpointing repeats the forward pass
    passes = 4 if checkpointing else 3
    head = 3 * head_forward(student) + LOSS_FLOP * student.vocabulary
    return _in(passes * layers_forward(student, seq_length), mixed=mixed) + Work(fp32=head)


def backward_share(student: ModelShape, seq_length: int, *, mixed: bool, checkpointing: bool) -> Work:
    """Return the part of ``student_work`` in which gradients of the layers appear."""
    return _in((3 if checkpointing else 2) * layers_forward(student, seq_length), mixed=mixed)


def teacher_work(teacher: ModelShape, seq_length: int, load_in: LoadIn) -> Work:
    """Return the operations per token of a teacher in memory: one forward pass and its logits, in its own arithmetic."""
    # nf4 and int8 weights are multiplied as bf16
    return _in(layers_forward(teacher, seq_length) + head_forward(teacher), mixed=load_in != "fp32")


def cache_work(teacher: ModelShape, seq_length: int, load_in: LoadIn) -> Work:
    """Return the operations per token of filling the teacher's cache: a forward pass in its own arithmetic, logits in fp32."""
    layers = _in(layers_forward(teacher, seq_length), mixed=load_in != "fp32")
    # half of the loss: one softmax of the two, and no gradient
    return layers + Work(fp32=head_forward(teacher) + LOSS_FLOP / 2 * teacher.vocabulary)


def _passed(config: Any) -> float:
    """Return the share of the experts that a token passes; 1 if the config does not say it in a known field."""
    text = text_config(config)
    passed, experts = (next((n for name in names if isinstance(n := getattr(text, name, None), int)), 0) for names in (_PASSED, _EXPERTS))
    return min(1.0, passed / experts) if passed > 0 and experts > 0 else 1.0
