# Every target sets up what it needs: environments are made by nox, outside the clone, keyed by their requirements.
PYTHON ?= python3
CACHE := $(or $(PRONGHORN_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pronghorn)
NOX_VERSION := $(shell sed -n 's/^nox==//p' requirements/main.txt)
TOOLS := $(CACHE)/tools-$(NOX_VERSION)
NOX := $(TOOLS)/bin/nox --no-error-on-missing-interpreters -s

.PHONY: demo test lint docs bench nightly tables

demo: $(TOOLS)/ready ; @$(NOX) demo
test: $(TOOLS)/ready ; @$(NOX) test
lint: $(TOOLS)/ready ; @$(NOX) lint
docs: $(TOOLS)/ready ; @$(NOX) docs
bench: $(TOOLS)/ready ; @$(NOX) bench
nightly: $(TOOLS)/ready ; @$(NOX) nightly oldest
tables: $(TOOLS)/ready ; @$(NOX) tables

$(TOOLS)/ready:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	@rm -rf $(TOOLS) && mkdir -p $(CACHE)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet nox==$(NOX_VERSION)
	@touch $@
