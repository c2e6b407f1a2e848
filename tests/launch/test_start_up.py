"""What a verb imports before it answers: only what it uses. Seconds depend on the machine; modules do not."""

import subprocess
import sys

import pytest

HEAVY = (
    "lightning",
    "datasets",
    "wandb",
    "accelerate",
    "sympy",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
)
SCRIPT = """
import sys
from decoct.launch.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
print("imported:", *sys.modules)
"""


def imported(script: str, *arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_imports_nothing_heavy() -> None:
    assert not imported(SCRIPT, "--help") & {*HEAVY, "torch", "transformers", "pydantic", "numpy"}


@pytest.mark.parametrize("arguments", [("footprint", "70B"), ("plan", "quickstart"), ("plan", "qwen3-8b-4b-int4")], ids=" ".join)
def test_shapes_need_neither_lightning_nor_transformers_models(arguments: tuple[str, ...]) -> None:
    seen = imported(SCRIPT, *arguments)
    assert "torch" in seen
    assert not seen & set(HEAVY)


def test_models_are_built_as_usual_after_their_configs_were_imported_alone() -> None:
    script = """
import sys
from decoct.models.common.light_configs import import_configs_alone
import_configs_alone()
from transformers import LlamaConfig
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
assert "transformers.modeling_utils" not in sys.modules
import torch
from transformers import LlamaForCausalLM
import transformers.integrations.hub_kernels as kernels
assert kernels.__file__
assert LlamaForCausalLM(config)(torch.arange(4)[None]).logits.shape == (1, 4, 8)
print("imported:", *sys.modules)
"""
    assert "transformers.modeling_utils" in imported(script)
