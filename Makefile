# Every target creates the environment it needs: .venv, with the python3 on the PATH.
# Another Python or directory: make test PYTHON=python3.12 VENV=.venv312. Only the fast tests: make test FAST=1; some
# tests: make test TESTS=tests/test_model.py.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= Once upon a time, there was a little girl named Lily. She loved to play outside
PYTEST = $(VENV)/bin/python -m pytest -q -rs --durations=10
TWO_WORKERS = -n 2 --dist loadfile --no-loadscope-reorder

RUN ?= runs/tiny_cpu
TESTS ?= tests
# What depends on JAX's version: not formats, tokenizers, templates, documents or the command line; of the rest not
# the longest tests, most of which are shorter ones over again, on a mesh or in another process.
JAX_TESTS = $(filter-out $(addprefix tests/test_,config.py docs.py launch_recipes.py mutants.py notebooks.py),\
  $(wildcard tests/test_*.py)) tests/ops tests/decoding tests/adapters $(addprefix tests/train/test_,\
  step.py objectives.py optimizer.py checkpoint.py evaluate.py feed.py devices.py runs.py)
# The files that have such tests: to collect all others takes half a minute of each processor.
MARKED = $(shell grep -rlE 'mark\.$(1)\b' tests --include='test_*.py')
NOTEBOOKS ?=

# Where this is set (containers often do), every process that starts compiles JAX from its sources: 4 seconds more
# each, as the installations below leave compiling to the first import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test durations test-jax parity stores test-stores pods gpu notebooks lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     generate English with a pretrained 135M-parameter Llama; then train a small one on Python code"
	@echo "make test     the test suite, on 8 simulated devices (FAST=1: only the fast tests)"
	@echo "make test-jax  the part of it that depends on the version of JAX"
	@echo "make parity   compare with Hugging Face transformers, PEFT, TRL and llama.cpp (installs torch)"
	@echo "make stores   gs:// and s3:// against emulators on this machine, with faults injected; Beam's local runner"
	@echo "make pods     compile the 7B and 70B training steps for TPU slices (installs libtpu; Python 3.12)"
	@echo "make gpu      correctness and speed on one NVIDIA GPU, in 12 minutes, to build/gpu.json (installs CUDA for JAX)"
	@echo "make notebooks  run every notebook; with their outputs they go to build/notebooks, as .ipynb and .html"
	@echo "make lint     ruff, mypy and shellcheck"
	@echo "make clean    remove $(VENV) and all caches in this folder"

demo: $(VENV)/demo.stamp
	@$(VENV)/bin/llama-jax generate smollm2-135m --prompt "$(PROMPT)" \
	  --max-new-tokens 96 --repetition-penalty 1.1
	@echo; echo "Now training a small Llama on Python's standard library (about two minutes; to $(RUN)) ..."
	@$(VENV)/bin/llama-jax train configs/tiny_cpu.toml --train.run_dir $(RUN)
	@echo; echo "Its continuation of 'def read(self' (llama-jax generate $(RUN) ...):"
	@$(VENV)/bin/llama-jax generate $(RUN) --prompt "def read(self" --max-new-tokens 120 --temperature 0.5 --seed 1

test: $(VENV)/test.stamp
	$(PYTEST) $(TWO_WORKERS) -m "not parity and not pods and not stores$(if $(FAST), and not slow)" $(if $(FAST),--shorter-than 1) $(TESTS)

# Measures again which tests FAST=1 leaves out, in processor seconds: other work may go on beside it.
durations: $(VENV)/test.stamp $(VENV)/parity.stamp
	$(PYTEST) $(TWO_WORKERS) -m "not parity and not pods and not stores" --store-durations
	$(PYTEST) $(TWO_WORKERS) -m parity --store-durations $(call MARKED,parity)

test-jax: $(VENV)/test.stamp
	$(PYTEST) $(TWO_WORKERS) -m "not parity and not pods and not stores and not slow" --shorter-than 1 $(wildcard $(JAX_TESTS))

parity: $(VENV)/parity.stamp
	$(PYTEST) $(TWO_WORKERS) -m parity $(call MARKED,parity)

# In an environment of its own: Beam needs older packages than `make parity`.
stores:
	@$(MAKE) --no-print-directory test-stores VENV=$(VENV)-stores

test-stores: $(VENV)/stores.stamp
	$(PYTEST) $(TWO_WORKERS) -m stores tests/storage tests/train/data/test_prepare.py

pods: $(VENV)/pods.stamp
	$(PYTEST) -n 2 --dist worksteal -m pods $(call MARKED,pods)

# Without a GPU nothing is installed.
gpu:
	@test -e /dev/nvidia0 || test -e /dev/nvidiactl || test -e /dev/dxg || \
	  { echo "error: this machine has no NVIDIA GPU; python -m benchmarks.gpu --tiny tests the script on the CPU" >&2; exit 2; }
	@$(MAKE) --no-print-directory $(VENV)/gpu.stamp
	@mkdir -p build
	$(VENV)/bin/python -m benchmarks.gpu --out build/gpu.json

notebooks: $(VENV)/notebooks.stamp
	$(VENV)/bin/python -m notebooks.run $(NOTEBOOKS) --jobs 2 --out build/notebooks

lint: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck docs/launch/*.sbatch .ci/run

clean:
	rm -rf $(VENV) $(VENV)-stores build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# One stamp per extra of pyproject.toml (`base` is none); changing that file reinstalls. Modules are compiled when
# they are first imported: most of those that torch, Beam and the like bring never are, and to compile them all is half
# of the installation.
$(VENV)/%.stamp: EXTRA = $(if $(filter-out base,$*),[$*])
$(VENV)/%.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python %s; \
	llama_jax needs 3.11 or newer: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing llama-jax$(EXTRA) into $(VENV) (once, about a minute) ..."
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile -e '.$(EXTRA)'
	@touch $@
