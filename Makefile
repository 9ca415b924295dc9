# Two commands on a fresh machine with python3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
export TRANSFORMERS_VERBOSITY := error

.PHONY: demo test quality format wheel docs architectures clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## Purify two backdoored models on real digits, end to end (SEED=0).
	rm -rf demo_output
	$(BIN)/hf-tsc demo --seed $(SEED) --output_dir demo_output

test: $(VENV)/.installed  ## Run the default test suite on two processes.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

quality: $(VENV)/.installed  ## Check format, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.installed  ## Build the wheel and try it outside the repository.
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/python tests/try_wheel.py dist

docs: $(VENV)/.installed  ## Run the demo for seeds 0, 1 and 2 and write its numbers and pictures to docs/demo.
	$(BIN)/python recipes/demo_docs.py

architectures: $(VENV)/.installed  ## Derive and verify a tiny model of every architecture; write the table.
	$(BIN)/python -m hf_tsc.architectures.table docs/architectures.md

clean:
	rm -rf $(VENV) demo_output dist build *.egg-info
