# make demo | test | emulate | lint | bench | gpu | clean. Each makes what it needs, in .venv; PYTHON=... picks one.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet
FULLRES := .venv/bin/fullres
DEMO := demo
OUT ?=
ONLY ?=
SECONDS ?=

.PHONY: demo test emulate lint bench gpu clean help

help:
	@echo "make demo     train on whole generated events on this machine and draw the result, in minutes"
	@echo "make test     lint and all tests; no GPU needed"
	@echo "make emulate  tests of kernels, as compiled for sm_80 and sm_90 and run without a GPU"
	@echo "make lint     ruff: rules and format"
	@echo "make bench    benchmarks of this machine: of a GPU where there is one, else predictions"
	@echo "make gpu      on a machine with a GPU and torch: device tests and benchmarks, offline, in ten minutes"
	@echo "make clean    remove .venv and what the others made"

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

# A network small enough for two cores in minutes; the events it labels are not those it trained on.
# Where a processor multiplies bfloat16 itself, a step takes half the time and there are twice as many.
NATIVE_BF16 := $(shell grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo yes)
demo: .venv/train
	@rm -rf $(DEMO) && mkdir $(DEMO)
	$(FULLRES) generate $(DEMO)/train.h5 --events 8
	$(FULLRES) generate $(DEMO)/test.h5 --events 2 --seed 1
	$(FULLRES) train --data $(DEMO)/train.h5 --val-data $(DEMO)/test.h5 --out $(DEMO)/run --workers 0 \
	  --preset a21 --network filters=8,depth=5,level_blocks=1,deepest_blocks=1,deepest_channels=64,deepest_kernel=3 \
	  --image-size 1260x2048 --loss light --lr 2e-2 --schedule cosine --warmup 3 --validate-first \
	  $(if $(NATIVE_BF16),--precision bf16 --steps 36,--precision fp32 --steps 18)
	$(FULLRES) predict --checkpoint $(DEMO)/run/last.ckpt --data $(DEMO)/test.h5 --out $(DEMO)/pictures
	@echo
	@echo "A small U-ResNet was trained on 8 generated events and has labelled 2 that it had not seen."
	@echo "  $(DEMO)/pictures/event-00000.png   charge, truth, prediction and errors, plane by plane"
	@echo "  $(DEMO)/pictures/labels.h5         its labels, in the layout of the data"
	@echo "  $(DEMO)/run/curves.png             loss and validation, step by step"
	@echo "  $(DEMO)/run/last.ckpt              weights; fullres train --resume goes on from them"
	@echo "It has trained for minutes: it knows tracks from noise, and guesses whose they are. README.md, Status, has longer runs."

test: .venv/test lint
	.venv/bin/python -m pytest

# What triton's compiler makes of the kernels, where tests would interpret their Python.
EMULATED := backward conv conv_fwd conv_transpose dgrad focal_loss focal_loss_sigmoid interpolate \
  linear_focal_loss loss norm pointwise pool wgrad
emulate: .venv/test
	.venv/bin/python -m pytest --emulate sm_80 $(EMULATED:%=tests/test_%.py)
	.venv/bin/python -m pytest --emulate sm_90 $(EMULATED:%=tests/test_%.py)

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/train
	$(FULLRES) bench $(if $(OUT),--out $(OUT))

# The GPU machine has torch, triton and the rest, and no network: nothing is fetched. Results lie in
# bench/results; OUT gets their page and one archive of them. What installing takes is of the SECONDS.
gpu: BEGUN := $(shell date +%s)
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable . || { \
	  echo "it could not be installed, and runs from the checkout"; \
	  mkdir -p build/checkout && ln -sfn "$(CURDIR)" build/checkout/fullres; }
	PYTHONPATH="$(CURDIR)/build/checkout:$$PYTHONPATH" $(PYTHON) -m fullres.bench.gpu --begun $(BEGUN) \
	  $(if $(SECONDS),--seconds $(SECONDS)) $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--copy-to "$(OUT)")

clean:
	rm -rf .venv $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
