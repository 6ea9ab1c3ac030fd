# Two commands for a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process per core, each with whole files of tests, since the tests of a file share their trainings.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile

.PHONY: link demo picture test test-all platforms lint format docs dist clean help

help:
	@echo "make demo      train on a phantom, predict, evaluate, leave pictures in demo/"
	@echo "make picture   the film of README.md, from a longer training"
	@echo "make test      linters, types and the test suite"
	@echo "make test-all  the same with the slow tests, and a short part on each supported Python"
	@echo "make platforms that part only, with the newest and the lowest dependencies"
	@echo "make lint      ruff and mypy only"
	@echo "make dist      wheel and source archive in dist/, checked as an index checks them"
	@echo "make docs      the documentation as a site, in site/"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip check
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m volumen.cli.demo -o demo

picture: $(STAMP)
	$(BIN)/python docs/draw_film.py -o picture

# The import name is `volumen`, the code lies in bundle/scripts: tools that read files see it here as it is imported.
link: $(STAMP)
	rm -rf $(VENV)/src && mkdir -p $(VENV)/src/volumen
	ln -s "$(CURDIR)"/bundle/scripts/* "$(CURDIR)"/bundle/volumen/__init__.py $(VENV)/src/volumen/

lint: link
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent --cache-dir=.mypy_cache/strict -m volumen -m volumen.api
	PYTHONPATH=$(VENV)/src $(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

test-all: lint dist docs
	$(BIN)/python -m pytest -m "" $(PARALLEL)
	$(BIN)/python tests/platforms.py

platforms: $(STAMP)
	$(BIN)/python tests/platforms.py

dist: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[release]"
	rm -rf dist
	$(BIN)/python -m build --no-isolation -o dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/validate-pyproject pyproject.toml

docs: link
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/make_configuration.py --check
	$(BIN)/python docs/make_tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .hypothesis .mypy_cache .ruff_cache
