# make demo | test | lint | gpu | clean. Each makes what it needs, in .venv; PYTHON=... picks one.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet
DEMO := demo
OUT ?=

.PHONY: demo test lint gpu clean help

help:
	@echo "make demo   train on whole generated events on this machine and draw the result, in minutes"
	@echo "make test   lint and all tests; no GPU needed"
	@echo "make lint   ruff: rules and format"
	@echo "make gpu    on a machine with a GPU and torch: device tests and benchmarks, offline"
	@echo "make clean  remove .venv and what the others made"

# The stamps name the extra that is installed; pyproject.toml and constraints.txt renew them.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "want Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { echo "want Python's venv module (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }

.venv/train .venv/test: .venv/%: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing fullres[$*] into .venv"
	@$(PIP) --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: .venv/train
	@rm -rf $(DEMO) && mkdir $(DEMO)
	@sh -c 'PATH="$$PWD/.venv/bin:$$PATH" sh bench/demo.sh $(DEMO)'

test: .venv/test lint
	.venv/bin/python -m pytest

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# The GPU machine has torch, triton and the rest, and no network: nothing is fetched.
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m fullres.bench.gpu $(if $(OUT),--out $(OUT))

clean:
	rm -rf .venv $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
