# Everything happens in .venv; PYTHON chooses its interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: env demo test lint format clean

env: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,plots]'
	touch $(STAMP)

demo: env
	$(VENV)/bin/python -m sts_sglang.tools.demo

test: lint
	$(VENV)/bin/python -m pytest

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: env
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
