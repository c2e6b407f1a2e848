"""The linears of a decoder layer that servers join into one matrix. Imports no torch, so that limits of export formats need none."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one block that read the same input. Servers join them into one matrix, so they need the same quantization spec."""
FUSED_NAMES = ("qkv_proj", "gate_up_proj")
"""Names of those matrices in servers."""
