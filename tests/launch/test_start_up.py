"""What a verb imports before it answers: only what it uses. Seconds depend on the machine; modules do not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from decoct.configs.architectures import architecture
from decoct.configs.architectures import names as stored
from decoct.configs.shipped import shipped_recipes

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


@pytest.mark.parametrize(
    "arguments",
    [("footprint", name) for name in ("70B", *stored())]
    + [("plan", name) for name in shipped_recipes()]
    + [("plan", "quickstart", "--gpus", "2", "--gpu-memory", "80GB", "--json")],
    ids=" ".join,
)
def test_plans_of_common_families_need_neither_torch_nor_transformers(arguments: tuple[str, ...]) -> None:
    assert not imported(SCRIPT, *arguments) & {*HEAVY, "torch", "transformers"}


def test_a_folder_needs_them_no_more(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(architecture("Qwen3-8B")))
    assert not imported(SCRIPT, "footprint", str(tmp_path)) & {*HEAVY, "torch", "transformers"}


def test_other_families_need_no_modelling_code_for_their_configs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}))
    seen = imported(SCRIPT, "footprint", str(tmp_path))
    assert "transformers" in seen
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
