# Two commands do everything on a fresh machine: `make quickstart` and `make test`. Each sets up .venv if it is missing.
PYTHON ?= python3
INSTALLED := .venv/posttrain-installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: quickstart test lint clean

quickstart: $(INSTALLED)
	python -m posttrain.quickstart

test: $(INSTALLED)
	pytest -q -n 2 --dist loadfile -m 'not engine'
	pytest -q -n 2 --dist loadfile -m engine

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	pyright
	python scripts/fragments.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml scripts/install.py
	$(PYTHON) scripts/install.py
