# `make demo` and `make test` set up what they need first; `make help` lists the rest.
# Choose an interpreter with `make setup PYTHON=python3.12`; it must be Python 3.11 or newer.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
DOCS_STAMP  := $(VENV)/.installed-docs
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
RECIPE := pyproject.toml constraints/py311.txt constraints/py312.txt
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# the constraints file for the Python inside .venv
PINS = constraints/`$(BIN)/python -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")'`.txt

export JAX_PLATFORMS ?= cpu
export OPENBLAS_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-oldest lint format docs bench reproduce clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(STAMP)  ## create .venv with the pinned versions (a second call does nothing)

# Old interpreters are asked with syntax that they too can read. The constraints file is chosen by the
# version inside .venv, so an environment made by hand is respected.
$(STAMP): $(RECIPE)
	@set -eu; \
	recent='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! [ -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  chosen=; \
	  for candidate in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c "$$recent" >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$chosen" ]; then \
	    echo "setup: $(PYTHON) is `$(PYTHON) --version 2>&1 | head -n 1`; gradjax needs Python 3.11 or newer, and no" >&2; \
	    echo "python3.11, 3.12 or 3.13 was found. Install one, then: make setup PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "setup: creating $(VENV) with $$chosen (`$$chosen --version`)"; \
	  if ! "$$chosen" -m venv --clear $(VENV); then \
	    rm -rf $(VENV); \
	    echo "setup: $$chosen could not create a virtual environment. On Debian and Ubuntu the module is a" >&2; \
	    echo "package of its own: apt install python3-venv (or python3.12-venv ...), then make setup again." >&2; \
	    exit 1; \
	  fi; \
	fi; \
	echo "setup: installing gradjax and its tools, versions of $(PINS) (a few minutes the first time)"; \
	$(BIN)/python $(PIP_INSTALL) -e '.[lab,dev]' -c $(PINS); \
	touch $@

$(BENCH_STAMP): $(STAMP)
	@echo "bench: installing the peer to measure against (PyTorch)"
	@$(BIN)/python $(PIP_INSTALL) -e '.[lab,dev,bench]' -c $(PINS)
	@touch $@

$(DOCS_STAMP): $(STAMP)
	@echo "docs: installing mkdocs-material and mkdocstrings"
	@$(BIN)/python $(PIP_INSTALL) -e '.[lab,dev,docs]' -c $(PINS)
	@touch $@

# The oldest Python and the oldest packages that pyproject.toml allows, in an environment of their own.
$(OLDEST_STAMP): pyproject.toml constraints/oldest.txt
	@set -eu; \
	oldest='import sys; sys.exit(sys.version_info[:2] != (3, 11))'; \
	for candidate in "$(PYTHON)" python3.11 $(BIN)/python; do \
	  if "$$candidate" -c "$$oldest" >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$${chosen:-}" ]; then \
	  echo "test-oldest: needs Python 3.11, the oldest that gradjax supports: make test-oldest PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	echo "test-oldest: creating $(OLDEST) with $$chosen, versions of constraints/oldest.txt"; \
	"$$chosen" -m venv --clear $(OLDEST); \
	$(OLDEST)/bin/python $(PIP_INSTALL) -e '.[lab,dev]' -c constraints/oldest.txt; \
	touch $@

demo: setup  ## diagnose an exploding network and cure it: verdict, table per layer, ranking, figures
	$(BIN)/gradjax diagnose configs/demo.toml
	$(BIN)/gradjax cure configs/demo.toml --no_pairs \
	  --remedies critical_init,orthogonal_init,residual_scaled,clip_by_global_norm

test: setup  ## the fast tests
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-slow: setup  ## the slow tests
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-oldest: $(OLDEST_STAMP)  ## the fast tests with the oldest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest -m 'not slow' -n 2 --dist loadfile

lint: setup  ## ruff (rules and format) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup  ## let ruff rewrite what `make lint` would refuse
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_STAMP)  ## the docs site in site/; a warning or a dead link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(BENCH_STAMP)  ## ratios against peers, one process each
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

reproduce: setup  ## the papers' figures of tier 1, with their table of claims
	$(BIN)/python scripts/reproduce.py --tier 1

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
