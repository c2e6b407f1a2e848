"""Fake quantization: the rounding of exports in the forward pass, with a gradient.

It imports nothing but torch (and triton when its kernels run), so any training loop can use it:

    y = F.linear(x, fake_quant(linear.weight, QuantSpec(bits=4, group_size=32)), linear.bias)

    fake_quant(weight, spec)                 scales taken from the weight          quantize, encode: its codes
    fake_quant_learned(weight, scale, spec)  scales given, learned by LSQ          quantize_with: its codes
    fake_quant_activation(x, spec)           activations, keys and values          static_scale: scales of an observed range

Each op has a file of formulas in plain PyTorch, ``*reference.py``, which also runs on CPUs, and a file of Triton kernels for GPUs,
``*kernel.py``, which gives the same bits.
"""

from ..spec import ActivationSpec as ActivationSpec
from ..spec import QuantSpec as QuantSpec
from .absmax import fake_quant as fake_quant
from .absmax import quantize as quantize
from .activations import fake_quant_activation as fake_quant_activation
from .activations import static_scale as static_scale
from .dispatch import Backend as Backend
from .encoding import Encoded as Encoded
from .encoding import decode as decode
from .encoding import dequantize as dequantize
from .encoding import encode as encode
from .learned import fake_quant_learned as fake_quant_learned
from .learned import quantize_with as quantize_with
