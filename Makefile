# make demo   a virtual environment, the install, and the whole path on real digits
# make test   the tests (within 10 minutes on 2 cores)
# make test-slow  what CI runs besides
# make check  ruff and mypy
# make docs   the API reference, made from the docstrings, into docs-site/
# PIP_FLAGS go to pip install, for example to take a CPU-only build of torch (see README).
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINKS := epdistill/teachers epdistill/students epdistill/export

.PHONY: demo test test-slow check docs format links install clean
.DEFAULT_GOAL := demo

# Editors and type checkers do not run import hooks: these links show them where
# `epdistill.teachers` is. The wheel is the same with and without them.
$(LINKS): epdistill/%:
	ln -sfn ../$* $@

links: $(LINKS)

$(STAMP): pyproject.toml | $(LINKS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[dev]'
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/epdistill run

test: $(STAMP)
	$(BIN)/python -P -m pytest -n auto --dist loadfile -m "not slow"

# What takes longer: the built wheel, every command end to end, killed runs.
test-slow: $(STAMP)
	$(BIN)/python -P -m pytest -n auto -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -P -m mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The rooms are named, for a package's own list of names hides its modules from pdoc.
# pdoc's own warnings are errors; what Ray does with old names of pydantic's is its own affair.
DOCUMENTED := epdistill epdistill.api epdistill.augment epdistill.console epdistill.data \
  epdistill.errors epdistill.export epdistill.images epdistill.live epdistill.loading \
  epdistill.page epdistill.recipes epdistill.recorded epdistill.robustness epdistill.runs \
  epdistill.students epdistill.teachers epdistill.tracking epdistill.training epdistill.workflows

docs: $(STAMP)
	$(BIN)/python -P -W error -W ignore::DeprecationWarning -m pdoc --docformat google --output-directory docs-site $(DOCUMENTED)

clean:
	rm -rf $(VENV) docs-site $(LINKS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
