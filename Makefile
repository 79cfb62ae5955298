# Each target makes .venv on first use and reuses it. Nothing is needed but Python 3.10 or newer.
#
#   make demo    train a small net dense and 2:4 sparse, cut another's empty channels, write ONNX files and an HTML report
#   make test    the whole test suite
#   make check   ruff and mypy
#   make bench   the benchmarks that run on a CPU in minutes
#   make claims   the claims of the two source texts, re-checked on small nets; CLAIMS="--data FOLDER" for MNIST
#   make coverage  every model of torchvision, timm's families, transformers: hours; goes on where it was stopped
#
# PYTHON=... chooses the interpreter that .venv is made with, DEMO="--seeds 1" passes options to the demo.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo $$python; break; fi; done)
WORKERS ?= 2
BIN := .venv/bin
SOURCES := pyproject.toml $(wildcard setup.py sparsefx/ops/*.c sparsefx/ops/*.h)

# One thread a worker: two pools of threads on the same cores are slower than none.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check bench claims coverage clean

demo: .venv/.runtime
	$(BIN)/sparsefx demo --out demo-report $(DEMO)

test: .venv/.development
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q $(TESTS)

check: .venv/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.development
	OMP_NUM_THREADS=$(WORKERS) $(BIN)/python benchmarks/mask_update.py
	OMP_NUM_THREADS=$(WORKERS) $(BIN)/python benchmarks/step_overhead.py

claims: .venv/.development
	$(BIN)/python -m benchmarks.claims.every --scale cpu --workers $(WORKERS) $(CLAIMS)

coverage: .venv/.development
	$(BIN)/python benchmarks/coverage.py --jobs $(WORKERS) --out coverage-results $(COVERAGE)

clean:
	rm -rf .venv build dist *.egg-info

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.10 or newer with venv and ensurepip was found." \
			"Install one (on Debian and Ubuntu also python3-venv), or name it: make PYTHON=/path/to/python3" >&2; exit 1; fi
	$(PYTHON) -m venv .venv

.venv/.runtime: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.development: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[dev,zoo]"
	@touch .venv/.runtime $@
