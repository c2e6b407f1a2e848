"""Loss and gradient of a block of logits as one Triton kernel, in two or three passes where ``closed_form`` needs a dozen.

One program handles one row of logits. The first pass computes both normalisers (online softmax, Milakov & Gimelshein 2018, arXiv
1805.02867), the second the divergence and the mean of its slope, the third writes the gradient with respect to the product. Forward KL
and cross-entropy need no mean, so their second pass writes the gradient. Bias, scale and soft cap are applied on the way. Formulas:
``slopes``.

The kernel also runs in Triton's interpreter, so bf16 is read as int16.
"""

import triton
import triton.language as tl

from .fused_math import ADAPTIVE, FORWARD, MAX_LOG_RATIO, REVERSE, expm1, slope_g, value

_FORWARD = tl.constexpr(FORWARD)
_REVERSE = tl.constexpr(REVERSE)
_ADAPTIVE = tl.constexpr(ADAPTIVE)


@triton.jit
def _logits(
    row_ptr, bias_ptr, columns, valid, scale, cap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr
):  # fmt: skip
    """fp32 final logits of some columns, -inf beyond the vocabulary, and their derivative with respect to the product."""
    raw = tl.load(row_ptr + columns, mask=valid, other=0)
    if raw.dtype == tl.int16:
        # bf16 is the upper half of an fp32
        x = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = raw.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=valid, other=0.0)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if HAS_SCALE:
        x *= scale
        slope *= scale
    if HAS_CAP:
        # tanh(y) = -expm1(-2 |y|) / (2 + expm1(-2 |y|)) with the sign of y
        e = expm1(-2.0 * tl.abs(x) / cap)
        t = tl.math.div_rn(-e, 2.0 + e)
        t = tl.where(x < 0, -t, t)
        x = t * cap
        slope *= 1.0 - t * t
    return tl.where(valid, x, float("-inf")), slope


@triton.jit
def _grown(best, total, x, over):
    """Online softmax: (maximum, sum of exp((x - maximum) / T)) with another block, ``over`` = 1 / T."""
    larger = tl.maximum(best, tl.max(x, axis=0))
    return larger, total * tl.exp((best - larger) * over) + tl.sum(tl.exp((x - larger) * over), axis=0)


@triton.jit
def _at(x, columns, place):
    """x at one column; 0 when it is not in this block."""
    return tl.sum(tl.where(columns == place, x, 0.0), axis=0)


@triton.jit
def loss_kernel(
    product_ptr,  # [n, >= V] fp32: hidden @ head.T of the student
    product_stride,
    bias_ptr,  # [V] fp32
    teacher_ptr,  # [rows, >= V] fp32, fp16 or, as int16, bf16: the teacher's product or final logits
    teacher_stride,
    teacher_rows_ptr,  # [n] int64 rows of the teacher, where TEACHER_ROWS
    teacher_bias_ptr,  # [V] fp32
    labels_ptr,  # [n] int64
    head_from_ptr,  # [n] fp32 smallest teacher logit in adaptive KL's head
    figures_ptr,  # [5, figures_stride] fp32: loss, cross-entropy, KL, teacher entropy, top-1 match
    figures_stride,
    slope_ptr,  # [n, V] fp32 or bf16: gradient with respect to the product
    V,
    over,  # 1 / T
    soft_weight,  # factor on the divergence
    hard_weight,
    dial,  # beta, alpha or balance
    scale, cap, teacher_scale, teacher_cap,
    KIND: tl.constexpr, HAS_TEACHER: tl.constexpr, TEACHER_ROWS: tl.constexpr,
    SOFT: tl.constexpr,  # whether the divergence has a weight
    HARD: tl.constexpr,  # whether cross-entropy has a weight
    TEMPERED: tl.constexpr,  # T is not 1
    BOTH_KLS: tl.constexpr,  # symmetric or adaptive
    EARLY: tl.constexpr,  # the gradient is written in pass 2
    LATE: tl.constexpr,  # the gradient is written in pass 3
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own_row = product_ptr + row * product_stride
    teacher_row = row
    if TEACHER_ROWS:
        teacher_row = tl.load(teacher_rows_ptr + row)
    their_row = teacher_ptr + teacher_row * teacher_stride
    label = tl.load(labels_ptr + row).to(tl.int32)

    # Pass 1: normalisers at temperature 1 and T, the label's logit, and the likeliest tokens.
    best = float("-inf")
    total = 0.0
    total_t = 0.0
    labelled = 0.0
    their_best = float("-inf")
    their_total = 0.0
    their_total_t = 0.0
    at_their_best = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        valid = columns < V
        s, _ = _logits(own_row, bias_ptr, columns, valid, scale, cap, HAS_BIAS, HAS_SCALE, HAS_CAP)  # pyright: ignore[reportGeneralTypeIssues]
        labelled += _at(s, columns, label)
        if TEMPERED:
            _, total_t = _grown(best, total_t, s, over)
        best, total = _grown(best, total, s, 1.0)
        if HAS_TEACHER:
            t, _ = _logits(
                their_row, teacher_bias_ptr, columns, valid, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_SCALE, TEACHER_CAP
            )
            highest = tl.max(t, axis=0)
            # the first of equal logits, as argmax takes it
            place = tl.min(tl.where(t == highest, columns, V), axis=0)
            at_their_best = tl.where(highest > their_best, _at(s, columns, place), at_their_best)
            if TEMPERED:
                _, their_total_t = _grown(their_best, their_total_t, t, over)
            their_best, their_total = _grown(their_best, their_total, t, 1.0)
    log_z = best + tl.log(total)
    log_z_t = log_z
    if TEMPERED:
        log_z_t = best * over + tl.log(total_t)
    hard = log_z - labelled
    figure = figures_ptr + row
    tl.store(figure + figures_stride, hard)
    if not HAS_TEACHER:
        tl.store(figure, hard)
        tl.store(figure + 4 * figures_stride, tl.where(labelled >= best, 1.0, 0.0))
    else:
        tl.store(figure + 4 * figures_stride, tl.where(at_their_best >= best, 1.0, 0.0))
    their_log_z = their_best + tl.log(their_total)
    their_log_z_t = their_log_z
    if TEMPERED:
        their_log_z_t = their_best * over + tl.log(their_total_t)
    shift = their_log_z - log_z
    shift_t = their_log_z_t - log_z_t

    # Pass 2: sums over the vocabulary, and the gradient where it does not depend on them.
    divergence = 0.0
    centre = 0.0
    kl = 0.0
    entropy = 0.0
    apart = 0.0
    apart_in_head = 0.0
    head_from = 0.0
    if KIND == _ADAPTIVE and SOFT:
        head_from = tl.load(head_from_ptr + row)
    if HAS_TEACHER or EARLY:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            valid = columns < V
            s, through = _logits(  # pyright: ignore[reportGeneralTypeIssues]
                own_row, bias_ptr, columns, valid, scale, cap, HAS_BIAS, HAS_SCALE, HAS_CAP
            )
            gradient = tl.zeros([BLOCK], tl.float32)
            if HAS_TEACHER:
                t, _ = _logits(
                    their_row, teacher_bias_ptr, columns, valid, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_SCALE, TEACHER_CAP
                )
                difference = tl.where(valid, t - s, 0.0)
                log_p = tl.where(valid, t - their_log_z, 0.0)
                p = tl.where(valid, tl.exp(log_p), 0.0)
                kl += tl.sum(p * (difference - shift), axis=0)
                entropy -= tl.sum(p * log_p, axis=0)
                if SOFT:
                    d = tl.where(valid, difference * over - shift_t, 0.0)
                    if TEMPERED:
                        p = tl.where(valid, tl.exp(t * over - their_log_z_t), 0.0)
                    q = tl.where(valid, tl.exp(s * over - log_z_t), 0.0)
                    if KIND == _FORWARD:
                        divergence += tl.sum(p * d, axis=0)
                        gradient = (q - p) * (soft_weight * over)
                    elif BOTH_KLS:
                        divergence += tl.sum(p * d, axis=0)
                        centre -= tl.sum(q * d, axis=0)
                        if KIND == _ADAPTIVE:
                            distance = tl.abs(p - q)
                            apart += tl.sum(distance, axis=0)
                            apart_in_head += tl.sum(tl.where(t >= head_from, distance, 0.0), axis=0)
                    else:
                        # exponentials of d could overflow; reverse KL has none and would be wrong where models are far apart
                        if KIND != _REVERSE:
                            d = tl.minimum(tl.maximum(d, -MAX_LOG_RATIO), MAX_LOG_RATIO)
                        g = slope_g(p, q, d, dial, KIND)
                        divergence += tl.sum(value(p, q, d, g, dial, KIND), axis=0)
                        centre += tl.sum(q * g, axis=0)
            if EARLY:
                if HARD:
                    one_hot = tl.where(columns == label, 1.0, 0.0)
                    gradient += hard_weight * (tl.exp(s - log_z) - one_hot)
                tl.store(slope_ptr + row * V + columns, (gradient * through).to(slope_ptr.dtype.element_ty), mask=valid)
    forward = dial
    if KIND == _ADAPTIVE:
        forward = tl.where(apart > 0, apart_in_head / tl.where(apart > 0, apart, 1.0), 0.5)
    if BOTH_KLS:
        divergence = forward * divergence + (1.0 - forward) * centre
    if HAS_TEACHER:
        tl.store(figure + 2 * figures_stride, kl)
        tl.store(figure + 3 * figures_stride, entropy)
        loss = 0.0
        # a term of weight 0 is left out, so that an infinite one cannot turn the loss into NaN
        if HARD:
            loss += hard_weight * hard
        if SOFT:
            loss += soft_weight * divergence
        tl.store(figure, loss)

    # Pass 3: the gradient of divergences that need a sum first; p, q and d are computed again, as keeping them would take [n, V] buffers.
    if LATE:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            valid = columns < V
            s, through = _logits(  # pyright: ignore[reportGeneralTypeIssues]
                own_row, bias_ptr, columns, valid, scale, cap, HAS_BIAS, HAS_SCALE, HAS_CAP
            )
            t, _ = _logits(
                their_row, teacher_bias_ptr, columns, valid, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_SCALE, TEACHER_CAP
            )
            d = tl.where(valid, (t - s) * over - shift_t, 0.0)
            p = tl.where(valid, tl.exp(t * over - their_log_z_t), 0.0)
            q = tl.where(valid, tl.exp(s * over - log_z_t), 0.0)
            if BOTH_KLS:
                gradient = forward * (q - p) - (1.0 - forward) * q * (d + centre)
            else:
                if KIND != _REVERSE:
                    d = tl.minimum(tl.maximum(d, -MAX_LOG_RATIO), MAX_LOG_RATIO)
                gradient = q * (slope_g(p, q, d, dial, KIND) - centre)
            gradient *= soft_weight * over
            if HARD:
                one_hot = tl.where(columns == label, 1.0, 0.0)
                gradient += hard_weight * (tl.exp(s - log_z) - one_hot)
            tl.store(slope_ptr + row * V + columns, (gradient * through).to(slope_ptr.dtype.element_ty), mask=valid)
