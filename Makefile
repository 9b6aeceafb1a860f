# Two commands: `make demo` and `make test`. Both set themselves up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
STAMP := $(VENV)/.ready

.PHONY: demo test lint bench setup clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,demo]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py --out demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: $(STAMP)  # half an hour on a quiet machine; it needs torchvision and torch-pruning in .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed.guard

clean:
	rm -rf $(VENV) demo build dist *.egg-info
