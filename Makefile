# Two commands do all the set-up on a machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test quick package lint format clean

# torch first and by its exact version: a bare `torch` pulls gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo/run.py out/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The fast unit tests alone.
quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" tests/unit tests/test_structure.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Wheel and sdist, each installed in a fresh environment and run there: every command, every recipe.
package:
	rm -rf out/dist out/package
	$(PYTHON) -m venv out/package
	out/package/bin/python -m pip install --quiet --disable-pip-version-check build "$$(grep '^torch==' constraints.txt)"
	out/package/bin/python -m build --outdir out/dist .
	out/package/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt out/dist/*.whl
	out/package/bin/python -I tests/smoke.py examples/demo/model out/package/wheel
	out/package/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall out/dist/*.tar.gz
	out/package/bin/python -I tests/smoke.py examples/demo/model out/package/sdist

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
