"""Memory of a training stage on one device in bytes, by role, from shapes alone.

The peak is where the loss is computed: it holds the activations of the whole micro-batch, the last step's gradients and the blocks of
logits. Activations are counted tensor by tensor for a Llama-like layer as autograd saves them (RMSNorm, rotary positions, SDPA that keeps
no attention matrix, gated FFN); other families are close. The overhead of allocators and the CUDA context is in ``RESERVE``. Copies of
rounded keys and values are not counted: they are half a percent of a layer's activations (measured with two of eight heads), and their
scales are two numbers per layer.
"""

from dataclasses import dataclass

from ...losses.block_rows import ACCELERATOR_LIMITS, BUFFERS_ALONE, BUFFERS_WITH_TEACHER, CPU_LIMITS, rows_per_block
from ...trainer.processes.teacher_memory import teacher_bytes
from .feature_memory import feature_bytes
from .memory_case import StageMemoryCase
from .quantized_shapes import quantized_linears
from .rounded_inputs import rounded_input_bytes
from .shapes import ModelShape

RESERVE = 0.08
"""Share of a GPU left to the CUDA context, workspaces and fragmentation."""
SMALLEST_8BIT = 4096
"""Tensors of fewer elements keep fp32 moments in bitsandbytes' 8-bit optimizers."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Bytes on one device."""

    teacher: int
    """Weights of the teacher."""
    student: int
    """fp32 master weights, and under FSDP2 the gathered layers."""
    gradients: int
    """fp32."""
    optimizer: int
    """Moments, and movement scores with the weights that they prune."""
    activations: int
    """Tensors saved for the backward pass, including copies of weights; those of the teacher's forward pass; and what losses on hidden
    states and relations keep of both, with their projectors."""
    logits: int
    """Blocks of logits, and gradients of head and hidden states."""

    @property
    def total(self) -> int:
        """Return the sum over all roles."""
        return self.teacher + self.student + self.gradients + self.optimizer + self.activations + self.logits


def training_memory(student: ModelShape, teacher: ModelShape | None, case: StageMemoryCase) -> Roles:
    """Return the bytes by role on one device at the peak of a step."""
    gradients, logits = _gradient_bytes(student, case), _logit_bytes(student, teacher, case)
    activations = _activation_bytes(student, case) + (0 if teacher is None else _teacher_pass(teacher, case))
    activations += 0 if teacher is None else feature_bytes(student, teacher, case)
    return Roles(
        teacher=0 if teacher is None else teacher_bytes(teacher.as_teacher, case.load_in, case.placement, case.ranks),
        student=_student_bytes(student, case),
        gradients=gradients,
        optimizer=_optimizer_bytes(student, case) + (8 * _share(student.linear, case) if case.scored else 0),
        # samples are drawn before a step, when there are no gradients and no activations: what is larger is the peak
        activations=max(activations, case.drawn - gradients - logits),
        logits=logits,
    )


def _share(elements: int, case: StageMemoryCase) -> int:
    # rounded up: the last shard is padded
    return -(-elements // case.shares)


def added_parameters(student: ModelShape, case: StageMemoryCase) -> int:
    """Return the number of parameters that quantized linears add to their weights: scales and adapters."""
    if case.scheme is None or not (case.learned_scales or case.rank):
        return 0
    quantized = quantized_linears(student, case.scheme)
    # scales of other kinds are computed in every forward pass and never trained
    scales = sum(one.scales for one in quantized.values() if one.spec.kind == "int") if case.learned_scales else 0
    return scales + case.rank * sum(one.rows + one.columns for name, one in quantized.items() if name in student.linears)


def _quantized_weights(student: ModelShape, case: StageMemoryCase) -> int:
    """Return the number of quantized weights of the decoder's linears."""
    quantized = {} if case.scheme is None else quantized_linears(student, case.scheme)
    return sum(one.rows * one.columns for name, one in quantized.items() if name in student.linears)


def _trained(student: ModelShape, case: StageMemoryCase) -> int:
    """Return the number of parameters with a gradient and moments."""
    # over fixed codes and under adapters the weights have no gradient
    return added_parameters(student, case) + (0 if case.codes_only or case.rank else student.parameters)


def _student_bytes(student: ModelShape, case: StageMemoryCase) -> int:
    if case.codes_only:
        # one byte per code in place of four per master weight; what is not quantized stays fp32
        quantized = _quantized_weights(student, case)
        return quantized + 4 * (student.parameters - quantized + added_parameters(student, case))
    own = 4 * _share(student.parameters + added_parameters(student, case), case)
    # gathered: everything outside the layers, the current layer, the prefetched one, and its receive buffer
    return own + (4 * student.outside + 3 * _gathered_layer(student, case) if case.sharded else 0)


def _gathered_layer(student: ModelShape, case: StageMemoryCase) -> int:
    """Return the bytes of a gathered layer."""
    low = student.linear // max(1, student.layers) if case.gathers_bf16(student.family.model_type) else 0
    return 4 * student.layer - 2 * low


def _gradient_bytes(student: ModelShape, case: StageMemoryCase) -> int:
    own = 4 * _share(_trained(student, case), case)
    # of one layer: as the backward pass leaves them, in the dtype of the gathered weights, and in fp32 on their way to other ranks
    return own + (_gathered_layer(student, case) + 4 * student.layer if case.sharded else 0)


def _optimizer_bytes(student: ModelShape, case: StageMemoryCase) -> int:
    if case.plan.optimizer == "adamw" or case.codes_only or case.rank:
        return 8 * _share(_trained(student, case), case)
    # bitsandbytes decides per tensor; under FSDP2 it sees the shard
    large = sum(size for size in map(_elements, student.tensors.values()) if _share(size, case) >= SMALLEST_8BIT)
    small = _trained(student, case) - large
    # two moments, each one byte and an fp32 scale per 256 elements
    return int(_share(large, case) * (2 + 2 * 4 / 256)) + 8 * _share(small, case)


def _layer_activations(student: ModelShape, case: StageMemoryCase) -> int:
    """Return the bytes that one decoder layer saves for a micro-batch, without copies of weights."""
    sizes = student.dimensions
    hidden, ffn = sizes.hidden, sizes.ffn
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    low = 2 if case.mixed else 4
    # both norms: input and normalised input in fp32; then the input that each linear saves (under autocast a bf16 copy each)
    norms = 2 * 2 * 4 * hidden + (low * 5 * hidden if case.mixed else 4 * 2 * hidden)
    # queries, keys and values as attention reads them, and its result, already in the projection's memory layout
    attention = low * (queries + 2 * keys) + low * queries + 4 * sizes.heads
    # gate, its SiLU, up, and their product
    return case.tokens * (norms + attention + low * 4 * ffn)


def _layer_copies(student: ModelShape, case: StageMemoryCase) -> int:
    """Return the bytes of weight copies for one layer's backward pass: quantized values, bf16 casts, flags of clipped weights."""
    # the mean over layers
    linear = student.linear // max(1, student.layers)
    if case.scheme is None:
        # what was gathered as bf16 needs no copy
        return 2 * linear if case.mixed and not case.gathers_bf16(student.family.model_type) else 0
    quantized = _quantized_weights(student, case) // max(1, student.layers)
    plain = 2 * (linear - quantized) if case.mixed else 0
    if case.codes_only:
        return plain  # the weight is recomputed in the backward pass
    flags = 0 if case.on_gpu else 1  # the Triton kernel recomputes the flags
    return plain + quantized * ((2 if case.mixed else 4) + flags)


def _table_copies(student: ModelShape, case: StageMemoryCase) -> int:
    """Return the bytes of rounded values, flags and bf16 casts of embedding and head; a tied head rounds the table again."""
    if case.scheme is None:
        return 0
    quantized = quantized_linears(student, case.scheme)
    tables = [one for name, one in quantized.items() if name not in student.linears]
    uses = 2 if student.embedding in quantized and not student.head else 1
    return sum(one.rows * one.columns for one in tables) * uses * (4 + (0 if case.on_gpu else 1) + (2 if case.mixed else 0))


def _activation_bytes(student: ModelShape, case: StageMemoryCase) -> int:
    layer = _layer_activations(student, case) + rounded_input_bytes(student, case) + _layer_copies(student, case)
    # embedding, final norm (input, normalised, result)
    outside = 4 * 4 * case.tokens * student.hidden + _table_copies(student, case)
    # only each layer's input is kept, plus the one layer that is being recomputed
    if case.plan.activation_checkpointing:
        return outside + student.layers * 4 * case.tokens * student.hidden + layer
    return outside + student.layers * layer


def _teacher_pass(teacher: ModelShape, case: StageMemoryCase) -> int:
    """Return the peak of the teacher's forward pass, which is that of one layer, since only the last hidden states are kept."""
    width = 4 if case.load_in == "fp32" else 2
    return case.tokens * width * (3 * teacher.dimensions.ffn + 4 * teacher.hidden)


def _logit_bytes(student: ModelShape, teacher: ModelShape | None, case: StageMemoryCase) -> int:
    vocabulary = student.vocabulary
    # logits of the student and of the teacher, and the work buffers of the loss
    buffers = 1 + BUFFERS_ALONE if teacher is None else 2 + BUFFERS_WITH_TEACHER
    limits = ACCELERATOR_LIMITS if case.on_gpu else CPU_LIMITS
    # the rule by which the loss itself cuts its blocks
    rows = rows_per_block(case.tokens, vocabulary, buffers, 4, limits)
    blocks = buffers * 4 * min(rows, case.tokens) * vocabulary
    # the head's gradient, and the hidden states' gradient and shifted copy
    gradients = 4 * vocabulary * student.hidden + 2 * 4 * case.tokens * student.hidden
    if teacher is None:
        return blocks + gradients
    # Without the fused kernel the loss multiplies in fp32, so a head in another dtype is cast as a whole. The kernel's products take bf16
    # hidden states and head as they are (``losses/linear_divergence/fused.py``).
    kept = case.load_in == "fp32" or (case.on_gpu and not case.own_loss)
    theirs = 0 if kept else 4 * vocabulary * teacher.hidden
    return blocks + gradients + theirs + case.tokens * teacher.hidden * (4 if case.load_in == "fp32" else 2)


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
