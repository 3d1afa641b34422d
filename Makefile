# Each target sets up what it needs, once: `make quickstart` and `make test` work on a fresh machine with Python and make.

PYTHON ?= python3
# Such as `make conformance TRANSFORMERS=5.18.0`: that version of transformers, in an environment of its own.
TRANSFORMERS ?=
VENV ?= $(if $(TRANSFORMERS),.venv-transformers-$(TRANSFORMERS),.venv)
# Any pip requirement for torch, such as `make test TORCH=torch==2.9.1`; empty chooses for this machine (see below).
TORCH ?=

# A version of which a CPU build exists wherever this project is built. The index has only such builds.
TORCH_CPU := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

.PHONY: help quickstart test browser conformance docs lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## */  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

quickstart: $(READY)  ## train a small Focal on handwritten digits and show what it has learnt, in ./quickstart
	@$(BIN)/python examples/quickstart.py

test: lint browser  ## run the linter and all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# For tests/test_app.py, which is skipped without one. Only root can install it: that is, in containers.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing Chromium"; export DEBIAN_FRONTEND=noninteractive; \
	    { apt-get -qq update && apt-get -qq install --no-install-recommends chromium; } >/dev/null 2>&1 \
	        || echo "Chromium cannot be installed: the tests that need it will be skipped"; fi

conformance: $(READY)  ## run transformers' own common tests of models on Focal, with Swin as the yardstick
	@$(BIN)/python -m pytest -rsfP tests/test_conformance.py

docs: $(READY)  ## build the documentation as a site, in ./docs/_build
	@$(BIN)/sphinx-build -q -W -n --keep-going -c docs . docs/_build
	@echo "Open docs/_build/index.html"

lint: $(READY)  ## check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(READY)  ## put the code into its format, mending what the linter can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environment, what the quickstart made and the built documentation
	rm -rf $(VENV) .venv-transformers-* quickstart docs/_build

$(READY): Makefile setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    "error: %s is Python %d.%d, this project needs 3.11 or newer. Choose another: make PYTHON=python3.12" \
	    % (sys.executable, *sys.version_info[:2]))'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making an environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(MAKE) --no-print-directory torch VENV=$(VENV) TORCH='$(TORCH)'
	@echo "Installing this package and what its examples and tests need (minutes the first time)"
	@$(PIP) install -e '.[test]' $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS))
	@touch $@

# On Linux without an NVIDIA GPU, plain `torch` would bring gigabytes of CUDA. Ask for a build that cannot (+cpu),
# without its dependencies, which come with this package's: that index has not all of them for every Python.
.PHONY: torch
torch:
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then exit 0; fi; \
	echo "Installing PyTorch"; \
	if [ -n "$(TORCH)" ]; then $(PIP) install "$(TORCH)"; \
	elif [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then $(PIP) install torch; \
	else $(PIP) --timeout 5 --retries 0 install --no-deps --index-url $(TORCH_CPU_INDEX) '$(TORCH_CPU)+cpu' 2>/dev/null \
	    || { echo "The index of CPU builds does not answer: asking pip's own for $(TORCH_CPU)"; $(PIP) install '$(TORCH_CPU)'; }; fi
