# One virtual environment, .venv, from the versions in constraints.txt; it is renewed when they or pyproject.toml change.
SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
VERSIONS := pyproject.toml constraints.txt

# Of pip's words one dot per package is left, and its errors: a newcomer can do nothing about its warnings.
define install
	@echo "installing $(1) into $(VENV) (a few minutes the first time)"
	@tools/cpu_torch.sh $(RUN)
	@set -o pipefail; $(RUN) -m pip install --disable-pip-version-check --root-user-action=ignore --progress-bar off \
	  --no-color -e '$(2)' -c constraints.txt \
	  2> >(grep -v '^WARNING:' >&2) | awk '/^ *Collecting /{printf "."; fflush()} \
	  /^Installing collected/{printf " writing files"; fflush()} END{print ""}'
endef

# The tests of the chat page drive the distribution's Chromium. It is installed where that asks nobody: in CI, or as root.
define chromium
	@if ! command -v chromium chromium-browser >/dev/null && command -v apt-get >/dev/null \
	  && { [ -n "$$CI" ] || [ "$$(id -u)" = 0 ]; }; then \
	  echo "installing chromium for the tests of the chat page"; \
	  log=$$(mktemp); { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >$$log 2>&1 \
	    || { tail -n 3 $$log >&2; echo "chromium could not be installed: the tests of the chat page are left out" >&2; }; \
	  rm -f $$log; \
	fi
endef

.PHONY: help demo test test-slow lint wheel

help:  ## list what make can do
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /  make \1\t/' | expand -t 18

demo: $(VENV)/.core  ## raw text to a served reasoning model: 6 minutes with bf16 instructions, about twice as long without
	@$(VENV)/bin/xushi run recipes/demo.toml

test: $(VENV)/.dev  ## the quick tests, at most 5 minutes
	@$(RUN) -m pytest -q -n 2 --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.slow  ## the long tests, at most 40 minutes
	@$(RUN) -m pytest -q -m slow

lint: $(VENV)/.dev  ## ruff (format and rules) and mypy --strict
	@$(RUN) -m ruff format --check --quiet . || { $(RUN) -m ruff format --diff . 2>&1 | head -n 40; exit 1; }
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy --strict xushi

wheel: $(VENV)/.core  ## build dist/xushi-*.whl; with XUSHI_KERNELS=1 it carries compiled kernels
	@rm -rf build  # setuptools would pack what an older build left there
	@$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "xushi needs Python 3.11 or newer; $(PYTHON) --version says: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	  echo "install a newer one and name it, for example: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12"; exit 2; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment: its modules venv and ensurepip are not installed"; \
	  echo "install them (on Debian and Ubuntu: apt install python3-venv) or name another Python with PYTHON="; exit 2; } >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: $(VENV)/.made $(VERSIONS)
	$(call install,xushi,.)
	@touch $@

$(VENV)/.dev: $(VENV)/.made $(VERSIONS)
	$(call install,xushi and what its tests need,.[dev])
	@touch $@ $(VENV)/.core

# Clients of the API whose versions exclude one another: each has a folder with what only it needs.
CLIENTS := $(wildcard tests/serve/clients/*.txt)

$(VENV)/.slow: $(VENV)/.dev $(CLIENTS)
	$(call install,what its long tests need besides,.[test-slow])
	@for list in $(CLIENTS); do name=$$(basename $$list .txt); echo "installing $$name for its tests"; \
	  rm -rf $(VENV)/clients/$$name; \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
	    --target $(VENV)/clients/$$name -r $$list 2> >(grep -v '^WARNING:' >&2) || exit 1; done
	$(chromium)
	@touch $@
