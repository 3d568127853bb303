PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench docs

demo: .venv/.ready  ## learn on the paper's world, compare, write a report; learn for a real fleet, and run it beside others
	$(BIN)/emutune reproduce --quick --out runs/demo
	$(BIN)/emutune fleet private --devices 3 --steps 5 --only-prepare
	$(BIN)/emutune train runs/fleets/private/scenario.toml --out runs/policy
	$(BIN)/emutune fleet private --devices 3 --steps 5 --policy best_fixed,count_table,lookahead,runs/policy --fresh

# Where bytecode is not kept, every process takes 6 seconds longer to compile all tests and their assertions anew.
test: .venv/.ready  ## all tests but the slow ones, a process for each of two cores
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.ready  ## style, types and import rules; and the shape of the code, counted
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	$(BIN)/python tools/shape.py

bench: .venv/.ready  ## the numbers of docs/results.md; about 35 minutes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/speed.py --json runs/speed.json
	$(BIN)/python benchmarks/quality.py --json runs/quality.json
	$(BIN)/python benchmarks/tuning.py --json runs/tuning.json
	$(BIN)/python benchmarks/fleet.py --json runs/fleet.json

docs: .venv/.ready  ## the documentation as pages, in site/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/zensical build --clean --strict

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
