PYTHON ?= python3
BIN := .venv/bin

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: quickstart ablation gpu test test-all lint clean

quickstart: .venv/ready  ## train, evaluate, convert and check a small RepMLPNet on the embedded digits
	$(BIN)/python -m tools.quickstart

ablation: .venv/ready  ## what branches, share-sets and Global Perceptron bring, on rendered shapes; a stopped one resumes
	$(BIN)/python -m tools.ablation

gpu: .venv/ready-dev  ## tests, benchmarks and short trainings on a GPU; one JSON file
	$(BIN)/python -m benchmarks.gpu

test: .venv/ready-dev lint  ## linter, type checker and the tests of continuous integration, on the CPU
	$(PYTEST) -m "not slow"

test-all: .venv/ready-dev lint  ## the same with every test: further combinations, and what takes minutes
	$(PYTEST)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv output
