# make train: a fresh machine to a trained model. make test: the same set-up, then the tests; make test-slow: those that
# take long; make test-all: both. make notebooks: run the notebooks again and store them with what they show.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: train test test-slow test-all notebooks lint format clean

train: $(VENV)/installed
	$(RUN) -m wsolkit.train $(ARGS)

PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/installed
	$(PYTEST) -m slow $(ARGS)

test-all: $(VENV)/installed
	$(PYTEST) $(ARGS)

notebooks: $(VENV)/installed
	$(RUN) notebooks/execute.py $(ARGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch and torchvision are named together so that both come from one build.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet torch torchvision --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs dist build .pytest_cache .mypy_cache .ruff_cache
