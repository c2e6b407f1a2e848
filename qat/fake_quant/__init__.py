"""Fake quantization: the rounding that export stores, inside the forward, with a gradient.

Imports torch alone (triton only when its kernels run), so it can be lifted into any training loop:

    y = F.linear(x, fake_quant(linear.weight, QuantSpec(bits=4, group_size=32)), linear.bias)

    fake_quant(weight, spec)                 scales taken from the weight          quantize, encode: its codes
    fake_quant_learned(weight, scale, spec)  scales given, learned by LSQ          quantize_with: its codes
    fake_quant_activation(x, spec)           activations, keys and values          static_scale: scales of an observed range

Each op is a file of formulas in plain PyTorch, ``*reference.py``, the path of every CPU, and beside it the same, bit for bit, as
Triton kernels for a GPU, ``*kernel.py``.
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
