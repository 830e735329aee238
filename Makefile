# make demo · make test · make test-long · make check · make bench: each sets up what it needs in .venv

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long check bench setup clean

demo: $(VENV)/.installed
	$(BIN)/lorakit demo --out runs/demo --overwrite

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" -n $(WORKERS) --dist loadfile

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long --durations=10

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/attach.py
	$(BIN)/python bench/store.py

setup: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml setup.sh
	PYTHON="$(PYTHON)" sh setup.sh $(VENV)
	touch $@

$(VENV)/.installed-dev: pyproject.toml setup.sh
	PYTHON="$(PYTHON)" sh setup.sh $(VENV) dev
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
