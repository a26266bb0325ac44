# Ninerank: `make demo` and `make test` do everything on a fresh machine with Python 3.10-3.12; `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kernels test-npu test-cuda-compile lint format docs bench bench-peers clean

DEVICE ?=
PYTHON ?=
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
BOOT := $(if $(PYTHON),$(PYTHON),python3)
SETUP := $(BOOT) scripts/setup.py --venv "$(VENV)" --device "$(DEVICE)" --python "$(PYTHON)"
SOURCES := src tests bench examples scripts

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv and install everything to run: DEVICE=cpu|cuda|npu (default: detected), PYTHON=python3.11
	@$(SETUP) --for run

demo: ## train, evaluate, export, serve, rank and replay on a synthetic log
	@$(SETUP) --for demo
	@$(BIN)/python examples/demo.py $(ARGS)

test: ## all tests but the slow ones, doctests included: ARGS="-m slow", ARGS=tests/features
	@$(SETUP) --for test
	$(BIN)/python -m pytest $(ARGS)

test-kernels: ## all tests of the operators, slow ones too: Numba, Triton interpreted, compiled for CUDA, lowered for Ascend
	@$(SETUP) --for test
	@$(BIN)/python scripts/ascend.py
	$(BIN)/python -m pytest tests/fusion -m "slow or not slow" --ignore=tests/fusion/test_compile.py $(ARGS)

test-npu: ## Ascend without Ascend: the real torch_npu over a stand-in of its driver, steps traced, kernels lowered; docs/npu.md
	@$(BOOT) scripts/ascend.py
	.venv-ascend/bin/python tests/devices/lane.py npu

test-cuda-compile: ## NVIDIA without a GPU: every kernel to a cubin for sm_80 and sm_90, training steps traced
	@$(SETUP) --for test
	$(BIN)/python tests/devices/lane.py cuda

lint: ## ruff, format, types, layers
	@$(SETUP) --for test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: ## write the format, and what ruff can mend
	@$(SETUP) --for test
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

docs: ## check the documents: links, code blocks, doctests
	@$(SETUP) --for test
	$(BIN)/python scripts/check_docs.py
	$(BIN)/python -m pytest -q src

bench: ## run bench/NAME.py, print its table, write bench/results/NAME.json
	@$(SETUP) --for test
	@test -f "bench/$(NAME).py" || { echo "error: NAME=$(NAME): no bench/$(NAME).py; there are: $$(cd bench && ls *.py | grep -v -e harness -e peers | sed 's/\.py$$//' | xargs)" >&2; exit 2; }
	@$(BIN)/python "bench/$(NAME).py" $(ARGS)

bench-peers: ## make .venv-peers with the servers that bench/serving.py measures against
	@test -x .venv-peers/bin/python || $(BIN)/python -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')" numpy mosec

clean: ## remove what was built, not .venv and not data
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis demo
	find src tests bench examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
