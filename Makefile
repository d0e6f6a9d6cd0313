# Everything a newcomer needs: `make help`. Python >= 3.11, a C++ compiler and make are enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VIDEOS ?=

# Byte-compiling all of torch takes longer than a run; what `import torch` needs is compiled below.
PIP_INSTALL := -m pip install --quiet --no-compile

.DEFAULT_GOAL := help
.PHONY: help demo videos-folder test gates lint clean

help: ## this text
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo "  variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)  VIDEOS=dir (make demo)"

demo: videos-folder .venv/ready ## compare the network with and without blocks; VIDEOS=dir trains on that folder too
	.venv/bin/nlk compare demo run.out=runs/demo
ifneq ($(strip $(VIDEOS)),)
	.venv/bin/nlk train demo_videos data.root="$(VIDEOS)" run.out=runs/demo/videos
endif

# Before anything is installed or trained.
videos-folder:
	@test -z "$(VIDEOS)" || test -d "$(VIDEOS)" || { echo "make demo: VIDEOS: expected a folder, got '$(VIDEOS)'"; exit 2; }

test: ## all tests but the long ones, in a fresh environment
	rm -rf .venv-test
	$(MAKE) --no-print-directory .venv-test/ready
	.venv-test/bin/python -m pytest -m "not gate"

gates: .venv-test/ready ## the long tests
	.venv-test/bin/python -m pytest -m gate

lint: .venv/ready ## style of the Python code
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean: ## remove environments and build products, keep runs/
	rm -rf .venv .venv-test build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# One recipe for both environments. `ready` is written last, so an interrupted installation starts
# again; a changed pyproject.toml or setup.py installs again.
.venv/ready .venv-test/ready: %/ready: pyproject.toml setup.py
	rm -rf $*
	$(PYTHON) -m venv $*
	$*/bin/python $(PIP_INSTALL) "$(TORCH)"
	$*/bin/python $(PIP_INSTALL) --editable ".[all]"
	PYTHONDONTWRITEBYTECODE= $*/bin/python -c "import torch"
	touch $@
