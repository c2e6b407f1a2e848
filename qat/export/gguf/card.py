"""Loading instructions for the model card of a GGUF export: llama.cpp, Ollama and Python."""

from ..card import CardFacts, FormatCard

_LOADING = """With llama.cpp:

```bash
llama-cli -m path/to/this/folder/model.gguf
llama-server -m path/to/this/folder/model.gguf
```

With Ollama, next to a file `Modelfile` with the line `FROM ./model.gguf`. Ollama runs no Jinja: for chats the file also needs the template
in Ollama's own language, and the sampling settings (docs/serving.md of decoct has an example):

```bash
ollama create my-model -f Modelfile && ollama run my-model
```

From Python (`pip install xllamacpp`):

```python
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "path/to/this/folder/model.gguf"
print(xllamacpp.Server(parameters).handle_completions({"prompt": "Once upon a time", "max_tokens": 32}))
```
"""


def _loading(facts: CardFacts) -> str:
    return _LOADING


GGUF_CARD = FormatCard(
    tag="gguf",
    library="gguf",
    scales="fp16 scale per {per}, repeated for every 32 weights (GGUF: Q4_0, Q5_0 or Q8_0; with zero points Q4_1 or Q5_1)",
    rest="embedding: {embedding}; norms and biases are fp32",
    loading=_loading,
    own_arithmetic=("llama.cpp",),
    unchecked="",
)
