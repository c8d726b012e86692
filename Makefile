# Every target sets up .venv by itself. Only `make` and a Python 3.10 to 3.13 are needed.

# The Python that makes the virtual environment.
PYTHON3 ?= python3
# Installed first and alone, so that nothing pulls another build of it.
TORCH ?= torch==2.13.0

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: test test-gpu lint format demo bench install clean

# Two workers of one thread each: the same cores, without one test's threads waiting for another's.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not gpu" -n 2 --dist loadscope

# On a machine with an NVIDIA GPU.
test-gpu: $(INSTALLED)
	$(PYTHON) -m pytest -m gpu

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: $(INSTALLED)
	$(PYTHON) scripts/demo.py

# What is missing of the benchmark's matrix, then the README's tables. In pieces: make bench MINUTES=9, again and again.
MINUTES ?=
bench: $(INSTALLED)
	$(PYTHON) benchmarks/end_to_end.py $(if $(MINUTES),--minutes $(MINUTES)); code=$$?; \
	$(PYTHON) scripts/render_results.py && exit $$code

install: $(INSTALLED)

$(INSTALLED): pyproject.toml runtime/pyproject.toml
	test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check --quiet "$(TORCH)"
	$(PYTHON) -m pip install --disable-pip-version-check --quiet -e "./runtime[onnxruntime]" -e ".[dev,rtx-builder]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
