# Every target makes $(VENV) first if it is missing, or older than pyproject.toml.
#
#   make demo       the needle bank: what this library is for, in a few minutes on a CPU
#   make test       the test suite in two processes; ARGS="-n 8" or ARGS="tests/test_laws.py -k gla" go to pytest
#   make check      lint, format, types
#   make peers      what `memjax bench ops` is timed beside, in an environment of its own (.venv-peers)
#   make notebooks  executes notebooks/*.py, written to build/notebooks as .ipynb
#   make clean      removes what was made
#
# PYTHON=/path/to/python3.12 chooses the interpreter, VENV=folder where it is installed.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
IN_VENV = $(VENV)/bin/python

.PHONY: setup demo test check peers notebooks clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "memjax needs Python 3.11 to 3.13, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing memjax and its tools into $(VENV) ($$($(PYTHON) --version), about 1 GB, some minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(IN_VENV) -m pip install -qq --disable-pip-version-check -e '.[dev,demo,export,laws,notebooks,pdf,serve]'
	@touch $@

demo: setup
	$(IN_VENV) -m experiments.needle_bank $(ARGS)

test: setup
	$(IN_VENV) -m pytest $(or $(ARGS),-n 2 --dist loadgroup)

check: setup
	$(IN_VENV) -m ruff check
	$(IN_VENV) -m ruff format --check
	$(IN_VENV) -m pyright --pythonpath $(IN_VENV)

peers: .venv-peers/.installed

# fla-core is flash-linear-attention without its models. --no-deps and no triton: on CPUs only its naive forms are run,
# which need torch and einops. On Linux pip brings torch with CUDA; for one without, set PIP_INDEX_URL to PyTorch's
# index of CPU wheels.
.venv-peers/.installed: Makefile
	@echo "Installing PyTorch and flash-linear-attention into .venv-peers (1 GB or more, some minutes, once) ..."
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 einops==0.8.2 numpy
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check --no-deps fla-core==0.6.0
	@touch $@

notebooks: setup
	@rm -rf build/notebooks && mkdir -p build/notebooks && cp notebooks/*.py build/notebooks
	$(IN_VENV) -m jupytext --quiet --to ipynb --set-kernel python3 build/notebooks/*.py
	PYTHONPATH=$(CURDIR) $(IN_VENV) -m pytest --nbmake --overwrite build/notebooks/*.ipynb

clean:
	rm -rf .venv .venv313 .venv-peers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
