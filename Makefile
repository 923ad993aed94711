# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo figures test test-slow test-hosts lint types wheel clean

demo: $(VENV)/.installed  ## train a tiny MDEQ on handwritten digits, once per gradient method
	$(BIN)/deq-phantom compare --out runs/demo

figures: $(VENV)/.installed  ## every figure of examples/figures, and the numbers in them
	$(BIN)/python examples/synthetic.py
	$(BIN)/python examples/sgd_convergence.py

test: $(VENV)/.installed  ## the test suite
	$(BIN)/python -m pytest -n auto -m "not slow and not hosts"

test-slow: $(VENV)/.installed  ## tests that take minutes
	$(BIN)/python -m pytest -m "slow and not hosts"

test-hosts: $(VENV)/.installed  ## tests against checkouts of foreign repositories in .hosts/
	$(BIN)/python -m pytest -m hosts -rs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

wheel: $(VENV)/.installed  ## install the built wheel into an empty environment and use it there
	bash .ci/wheel $(BIN)/python

clean:
	rm -rf $(VENV) build dist runs *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[test]"
	touch $@
