"""Loading instructions for the model cards of GPTQ, AWQ, bitsandbytes and plain safetensors exports."""

from .card import CardFacts, FormatCard

_TRANSFORMERS = """With transformers (`pip install {packages}`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
_SERVERS = """With vLLM or SGLang:

```bash
vllm serve path/to/this/folder
python -m sglang.launch_server --model-path path/to/this/folder
```
"""
_HALF = "Where a server has no kernel for the bfloat16 that config.json may name, add `--dtype float16`.\n"
_V2 = (
    "Not every kernel of every version reads `gptq_v2`; where text comes out as gibberish, update, or take the compressed-tensors export.\n"
)


def _gptq(facts: CardFacts) -> str:
    return "\n".join([_TRANSFORMERS.format(packages="transformers optimum gptqmodel"), _SERVERS, _HALF])


def _gptq_v2(facts: CardFacts) -> str:
    return "\n".join([_gptq(facts), _V2])


def _awq(facts: CardFacts) -> str:
    return "\n".join([_TRANSFORMERS.format(packages="transformers accelerate gptqmodel"), _SERVERS, _HALF])


def _bitsandbytes(facts: CardFacts) -> str:
    return _TRANSFORMERS.format(packages="transformers accelerate bitsandbytes")


def _plain(facts: CardFacts) -> str:
    return "\n".join([_TRANSFORMERS.format(packages="transformers"), _SERVERS])


_REST = "embeddings, norms and biases are 16-bit floats, in the dtype of config.json"
GPTQ_CARD = FormatCard(tag="gptq", scales="fp16 scale per {per} (GPTQ, version 1)", plain="16-bit floats", rest=_REST, loading=_gptq)
GPTQ_V2_CARD = FormatCard(tag="gptq", scales="fp16 scale per {per} (GPTQ, version 2)", plain="16-bit floats", rest=_REST, loading=_gptq_v2)
AWQ_CARD = FormatCard(tag="awq", scales="fp16 scale per {per} (AWQ, gemm)", plain="16-bit floats", rest=_REST, loading=_awq)
BITSANDBYTES_CARD = FormatCard(
    tag="bitsandbytes", scales="fp32 scale per {per} (bitsandbytes)", plain="16-bit floats", rest=_REST, loading=_bitsandbytes
)
PLAIN_CARD = FormatCard(tag="safetensors", loading=_plain)
