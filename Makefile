PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/.ready  ## learn on the paper's world, compare, write a report
	$(BIN)/emutune reproduce --quick --out runs/demo

test: .venv/.ready  ## all tests but the slow ones
	$(BIN)/python -m pytest

lint: .venv/.ready  ## style, types and import rules
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
