# Every target sets up what it needs by itself: a virtual environment in .venv with the versions of constraints.txt.
# An installed torch that should be kept (a CUDA build), with its Triton, is used with: make VENV_FLAGS=--system-site-packages gpu
# `make --keep-going gpu` measures also where a test fails.
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
KEPT := $(if $(findstring system-site-packages,$(VENV_FLAGS)),torch|triton)
BIN := $(VENV)/bin
STAMP := $(VENV)/.zimage-installed

.PHONY: setup demo test check bench gpu gpu-tests gpu-benchmarks clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	grep -vE "^($(KEPT))==" constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	mkdir -p demo-output
	$(BIN)/zimage generate "a red circle left of a blue square" --model demo --seed 7 --force --output demo-output/shapes.png

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=95

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/against_diffusers.py
	$(BIN)/python benchmarks/cold_start.py

gpu: gpu-tests gpu-benchmarks

gpu-tests: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu

gpu-benchmarks: $(STAMP)
	$(BIN)/python benchmarks/kernels.py --output benchmarks/results
	$(BIN)/python benchmarks/memory.py --output benchmarks/results
	$(BIN)/python benchmarks/throughput.py --model small --device cuda --size 1024 --save --output benchmarks/results
	$(BIN)/python benchmarks/against_diffusers.py --device cuda --output benchmarks/results
	$(BIN)/python benchmarks/card.py --output benchmarks/results

clean:
	rm -rf $(VENV) demo-output build dist .coverage* .mypy_cache .pytest_cache .ruff_cache
