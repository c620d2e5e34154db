# make demo    the same small task with and without asynchrony, one of four local processes slowed 4x
# make test    the test suite, several tests at a time (WORKERS=0: one by one; ARGS=--thorough: every combination)
# make check   format, lint, types, layers
# make bench   one benchmark:  make bench NAME=straggler      (make bench alone lists them)
# make clean   remove what was built, the virtual environment included
#
# The first call creates .venv and installs into it; later ones are fast. Another torch, or another build of it (what is
# asked for is installed where it is not what was asked for last time, and stays until another one is asked for):
#     make test TORCH="torch==2.11.0"            make test TORCH="torch==2.13.0 --index-url <where your build lives>"
# On Debian and Ubuntu `python3 -m venv` needs the package python3-venv.

PYTHON ?= python3
PINNED := $(shell grep '^torch==' constraints.txt)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.chosen
INSTALLED := $(or $(shell cat $(READY) 2>/dev/null),$(PINNED))
TORCH  ?= $(INSTALLED)
CHOSEN := $(if $(filter-out $(PINNED),$(TORCH)),$(TORCH))
DEMO   := examples/demo.py
NAME   ?=
WORKERS ?= auto
ARGS   ?=

.PHONY: demo test check bench clean another

demo: $(READY)
	$(BIN)/python $(DEMO) $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_layers.py

bench: $(READY)
	$(BIN)/python -m benchmarks $(if $(NAME),$(NAME),--list) $(ARGS)

clean:
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and is then held: otherwise a dependency could bring another build of it, several gigabytes large.
# Who chose none goes with constraints.txt when that changes, so only another one is written down.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "== creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); } || { rm -rf $(VENV); exit 1; }
	@echo "== installing $(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	@{ grep -v '^torch==' constraints.txt; $(BIN)/python -m pip freeze --disable-pip-version-check | grep '^torch=='; } > $(VENV)/held.txt
	@echo "== installing lightning_async and what its tests need"
	$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/held.txt -e '.[dev]'
	@printf '%s\n' '$(subst ','\'',$(CHOSEN))' > $@

ifneq ($(strip $(TORCH)),$(strip $(INSTALLED)))
$(READY): another
another:
	@echo "== $(INSTALLED) was asked for last time"
endif
