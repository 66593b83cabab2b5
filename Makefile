# Each target makes what it needs: the virtual environment is rebuilt when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test test-slow lint clean

train: $(VENV)/.ready  ## train the quickstart model on two processes of the CPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m dmoe.train configs/quickstart.yaml $(ARGS)

test: $(VENV)/.ready lint  ## the quick suite: CPU only, a few minutes on two cores
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.ready  ## the slow tests alone
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dmoe needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
