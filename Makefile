# Each target creates the virtual environment if it is missing. A new machine needs only Python and make.

PYTHON ?= python3
# A version of transformers, installed in a separate environment, as in `make conformance TRANSFORMERS=5.4.0`.
TRANSFORMERS ?=
VENV ?= $(if $(TRANSFORMERS),.venv-transformers-$(TRANSFORMERS),.venv)
# A pip requirement for torch, as in `make test TORCH=torch==2.9.1`. By default, the machine decides (see below).
TORCH ?=

# The version of the CPU build. The index contains only CPU builds.
TORCH_CPU := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

.PHONY: help quickstart test browser conformance versions docs build lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## */  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

quickstart: $(READY)  ## train a small Focal on handwritten digits and show its predictions, in ./quickstart
	@$(BIN)/python examples/quickstart.py

test: lint browser  ## run the linter, the type checker and all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Chromium for tests/test_app.py, which is skipped without it. Only root can install it, as in containers.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing Chromium"; export DEBIAN_FRONTEND=noninteractive; \
	    { apt-get -qq update && apt-get -qq install --no-install-recommends chromium; } >/dev/null 2>&1 \
	        || echo "Chromium could not be installed; the tests that need it will be skipped"; fi

conformance: $(READY)  ## run transformers' common model tests on Focal and, for comparison, on Swin
	@$(BIN)/python -m pytest -rsfP --swin tests/test_conformance.py

versions: $(READY)  ## run conformance and other tests with each minor version of transformers; write docs/versions.md
	@$(BIN)/python tests/versions.py

docs: $(READY)  ## build the documentation as a site, in ./docs/_build
	@$(BIN)/sphinx-build -q -W -n --keep-going -c docs . docs/_build
	@echo "Open docs/_build/index.html"

build: $(READY)  ## build and check the source distribution and the wheel, in ./dist
	@rm -rf dist
	@$(BIN)/python -m build
	@$(BIN)/python -m twine check --strict dist/*

# Annotations in torch and transformers differ by version. Types are checked with the versions that are installed by
# default.
lint: $(READY)  ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(if $(TRANSFORMERS)$(TORCH),,$(BIN)/mypy)

format: $(READY)  ## format the code, and apply the linter's fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environment, the quickstart's output, the built documentation and the built package
	rm -rf $(VENV) .venv-transformers-* quickstart docs/_build build dist

$(READY): Makefile setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    "error: %s is Python %d.%d; this project needs 3.11 or newer. Choose another: make PYTHON=python3.12" \
	    % (sys.executable, *sys.version_info[:2]))'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Creating a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(MAKE) --no-print-directory torch VENV=$(VENV) TORCH='$(TORCH)'
	@echo "Installing this package and the requirements of its examples and tests (takes minutes the first time)"
	@$(PIP) install -e '.[test]' $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS))
	@touch $@

# On Linux without an NVIDIA GPU, `torch` would install gigabytes of CUDA libraries, so install the CPU build (+cpu).
# Its dependencies are installed with this package, because the index does not have all of them for every Python.
.PHONY: torch
torch:
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then exit 0; fi; \
	echo "Installing PyTorch"; \
	if [ -n "$(TORCH)" ]; then $(PIP) install "$(TORCH)"; \
	elif [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then $(PIP) install torch; \
	else $(PIP) --timeout 5 --retries 0 install --no-deps --index-url $(TORCH_CPU_INDEX) '$(TORCH_CPU)+cpu' 2>/dev/null \
	    || { echo "The index of CPU builds does not answer; installing $(TORCH_CPU) from pip's default index"; $(PIP) install '$(TORCH_CPU)'; }; fi
