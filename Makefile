# make demo    set up, run the whole QSD recipe and its control on built-in data, end with a table and pictures
# make demo-face  set up, train a face network on built-in data, export it for insightface and compare
# make test    set up, lint, type-check and run the whole suite
# make check   lint and types only
# make venv    set up only
# make test-compat   the suite on the oldest supported stack (COMPAT_PYTHON=python3.10), in an environment of its own
#
# PYTHON=... picks the interpreter; NO_VENV=1 uses it as it is, without touching the torch installed there.

PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= $(shell $(PYTHON) requirements/pick.py)
# One process per core; a file's tests stay together, because they share what takes long to make.
TEST_ARGS ?= --numprocesses 2 --dist loadfile
COMPAT_PYTHON ?= python3.10

ifdef NO_VENV
RUN := $(PYTHON)
READY := $(VENV)/.no-venv
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo demo-face test suite check venv test-compat clean

venv: $(READY)

$(VENV)/.ready: requirements/runtime.txt requirements/hosts.txt requirements/dev.txt $(REQUIREMENTS) setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r $(REQUIREMENTS) -r requirements/dev.txt
	$(RUN) -m pip install --quiet --no-deps -r requirements/hosts.txt
	$(RUN) -m pip install --quiet --no-deps -e .
	touch $@

$(VENV)/.no-venv: requirements/hosts.txt setup.py
	$(RUN) -m pip install --quiet --no-deps -r requirements/hosts.txt
	$(RUN) -m pip install --quiet -r requirements/dev.txt
	$(RUN) -m pip install --quiet --no-deps -e .
	mkdir -p $(VENV) && touch $@

demo: $(READY)
	$(RUN) tools/experiment.py projects/QSD/experiments/demo.yml
	$(RUN) tools/compare.py logs/demo

demo-face: $(READY)
	$(RUN) tools/train_net.py --config-file projects/InsightFace/export_demo.yml
	rm -rf logs/insightface/export_demo/package
	$(RUN) tools/export_model.py logs/insightface/export_demo --face-package logs/insightface/export_demo/package --license LICENSE --evaluate

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: check suite

suite: $(READY)
	$(RUN) -m pytest $(TEST_ARGS)

# Without lint and types: those are clean against the pinned stack, not against older type stubs.
test-compat:
	$(MAKE) suite PYTHON=$(COMPAT_PYTHON) VENV=.venv-oldest REQUIREMENTS=requirements/oldest.txt

clean:
	rm -rf $(VENV) .venv-oldest
