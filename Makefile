# Two commands do all the set-up on a machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test quick oldest package lint format clean clients

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

# The families and the engine with the oldest transformers that pyproject.toml allows, beside all else as it is.
OLDEST := out/oldest

$(OLDEST)/.ready: $(READY)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) \
		"transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)"
	touch $@

oldest: $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
		tests/unit/families/test_families.py tests/unit/forward/test_engine.py

# What people run next, each in an environment of its own (6 GB in all, an hour on two cores): tests/clients/.
# vLLM's wheel brings builds of torchvision and torchaudio that its own torch refuses; it reads text without them.
CLIENTS  ?= out/clients
READERS  := transformers5 transformers4 llama.cpp mlx vllm
NODE     := node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

$(CLIENTS)/%/.ready: tests/clients/requirements/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	test $* = mlx || $(@D)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	test $* != vllm || $(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The npm package has llama.cpp's own source in it, of the same version: its converter is used.
$(CLIENTS)/llama.cpp-source:
	mkdir -p $(CLIENTS)/node
	cd $(CLIENTS)/node && npm install --silent --ignore-scripts --omit=optional $(NODE)
	git clone --quiet $(CLIENTS)/node/node_modules/node-llama-cpp/llama/gitRelease.bundle $@

# Of llama.cpp's tools the one that computes an imatrix, of one file, against the package's libraries.
$(CLIENTS)/llama-imatrix: $(CLIENTS)/llama.cpp-source
	libraries=$(abspath $(CLIENTS))/node/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64 && \
		cd $(CLIENTS)/llama.cpp-source && $(CXX) -O1 -std=c++17 -Iinclude -Icommon -Iggml/include -Ivendor \
		tools/imatrix/imatrix.cpp -o $(abspath $@) $$libraries/libllama-common.so $$libraries/libllama.v*.so \
		$$libraries/libggml.v*.so $$libraries/libggml-base.so -Wl,-rpath,$$libraries -Wl,--allow-shlib-undefined

clients: $(READY) $(READERS:%=$(CLIENTS)/%/.ready) $(CLIENTS)/llama.cpp-source $(CLIENTS)/llama-imatrix
	OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py $(CLIENTS) --clients $(READERS)
	OMP_NUM_THREADS=1 MOESURGERY_CLIENTS=$(abspath $(CLIENTS)) $(BIN)/python -m pytest tests/clients
	$(BIN)/python docs/generate.py

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
