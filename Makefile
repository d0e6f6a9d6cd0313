# Everything a newcomer needs: `make help`. Python >= 3.11, a C++ compiler and make are enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VIDEOS ?=
# Tests that run side by side.
JOBS ?= 2
# What has a Triton in it.
TRITON_TESTS := tests/gates tests/test_interpreter.py tests/test_launch.py $(wildcard tests/ops/test_triton*.py)

PYTEST := -m pytest -n $(JOBS) --dist worksteal
# Byte-compiling all of torch takes longer than a run; what `import torch` needs is compiled below.
PIP_INSTALL := -m pip install --quiet --no-compile

.DEFAULT_GOAL := help
.PHONY: help demo videos-folder test gates lint clean

help: ## this text
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo "  variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)  VIDEOS=dir (make demo)  JOBS=$(JOBS) (tests)"

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
	.venv-test/bin/python $(PYTEST) -m "not gate" --junitxml=build/tests/test.xml

gates: .venv-test/ready .venv-gates36/ready .venv-foreign/ready ## the long tests; the kernels with Triton 3.6.0, too; parity with other packages
	.venv-foreign/bin/python $(PYTEST) tests/foreign --junitxml=build/tests/foreign.xml
	.venv-gates36/bin/python $(PYTEST) tests/gates/test_compile.py --junitxml=build/tests/compile36.xml
	.venv-gates36/bin/python $(PYTEST) -m "not gate" $(TRITON_TESTS) --junitxml=build/tests/triton36.xml
	.venv-test/bin/python $(PYTEST) -m gate --junitxml=build/tests/gates.xml

lint: .venv/ready ## style of the Python code
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean: ## remove environments and build products, keep runs/
	rm -rf .venv .venv-test .venv-gates36 .venv-foreign build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready .venv-test/ready: INSTALLED := --editable ".[all]"
# The oldest Triton that is served; its interpreter needs a numpy of its time.
.venv-gates36/ready: INSTALLED := pytest pytest-xdist "triton==3.6.0" "numpy<2.4"
# The blocks of pytorchvideo and mmcv. Everything is named: these packages ask for video readers and
# an OpenCV with windows, which their blocks never touch.
.venv-foreign/ready: INSTALLED := --no-deps pytorchvideo==0.1.5 mmcv-lite==2.2.0 mmengine==0.10.7 ninja pybind11 \
	addict opencv-python-headless numpy pillow platformdirs pyyaml termcolor yapf \
	rich markdown-it-py mdurl pygments pytest pytest-xdist execnet iniconfig packaging pluggy

# One recipe for all environments. `ready` is written last, so an interrupted installation starts
# again; a changed pyproject.toml or setup.py installs again.
.venv/ready .venv-test/ready .venv-gates36/ready .venv-foreign/ready: %/ready: pyproject.toml setup.py
	rm -rf $*
	$(PYTHON) -m venv $*
	$*/bin/python $(PIP_INSTALL) "$(TORCH)"
	$*/bin/python $(PIP_INSTALL) $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= $*/bin/python -c "import torch"
	touch $@
