# Everything a person types. `make test` and `make demo` make the virtual environment themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Another package index to take torch from, such as one of CPU wheels; empty: whatever pip is set up with.
TORCH_INDEX ?=
# requirements/v100.txt on a machine with V100s.
LOCK ?= requirements/cpu.txt
# Extra words for pytest, such as PYTEST="-k masks", or PYTEST=-n0 for one process that stops at a breakpoint.
PYTEST ?=

VENV := .venv
V100_VENV := .venv-v100
BIN := $(VENV)/bin
# One stamp a lock: another LOCK is another installation, and the last one alone leaves its stamp.
STAMP := $(VENV)/.installed-$(basename $(notdir $(LOCK)))
PIP := $(BIN)/python -m pip --disable-pip-version-check
# DeepSpeed starts `ninja` and Python by name, in children too.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-v100-lock soak lint mutants schema clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(STAMP) ## make .venv from the lock (LOCK, TORCH_INDEX, PYTHON)

$(STAMP): $(LOCK) setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: make venv PYTHON=/path/to/python3.11" >&2; exit 2; }
	@rm -f $(VENV)/.installed*
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python could not make $(VENV); on Debian: apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing $(LOCK) into $(VENV); a few minutes without a cache ..."
	$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $(LOCK)
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## train a tiny model on generated stickers, make GIFs under runs/demo/
	$(BIN)/python tools/demo.py

test: $(STAMP) ## the test suite
	$(BIN)/python -m pytest -q -m "not soak" -n 2 --dist loadscope $(PYTEST)

# TORCH_INDEX is not handed on: a CPU wheel of the same version would be taken for the build that V100s get.
test-v100-lock: ## the test suite on the CPU with requirements/v100.txt, in its own .venv-v100 (8 GB, mostly CUDA)
	CUDA_VISIBLE_DEVICES= $(MAKE) test VENV=$(V100_VENV) LOCK=requirements/v100.txt TORCH_INDEX=

soak: $(STAMP) ## long and repeated runs
	$(BIN)/python -m pytest -q -m soak $(PYTEST)

lint: $(STAMP) ## ruff, mypy, import directions
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutants: $(STAMP) ## put small wrongs into the code, one at a time; each must make the suite fail
	$(BIN)/python tools/mutants.py

schema: $(STAMP) ## write ds_configs/rdtf.schema.json anew
	$(BIN)/python tools/write_schema.py

clean: ## remove both environments and caches; runs/ stays
	rm -rf $(VENV) $(V100_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find rdtf_ds tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
