"""Which linears of a decoder layer servers make one matrix of. Imports no torch: limits of export formats are known without it."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one block that read the same input. Servers make one matrix of them, so they need one quantization scheme."""
FUSED_NAMES = ("qkv_proj", "gate_up_proj")
"""What servers call those matrices."""
