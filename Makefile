# Each target sets up what it needs: Python 3.11 or newer, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports when it does, which is less than all.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help demo test compat fuzz bench bench-quick soak screenshots reference lint format lock clean

help: ## Show what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

# What runs the package, and then, in the same environment, what the tests and the checks need besides.
$(VENV)/.runs: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "Making an environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing Prefect, a speech engine and a decoder into it"
	@$(PIP) --no-deps --require-hashes -r requirements.lock
	@echo "Installing prefect-nanogpt from this folder"
	@$(PIP) --no-deps --no-build-isolation --editable . 2>$(VENV)/install.log || { cat $(VENV)/install.log; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.runs requirements-dev.lock
	@echo "Installing what the tests and the checks need"
	@$(PIP) --no-deps --require-hashes -r requirements-dev.lock
	@touch $@

demo: $(VENV)/.runs ## Say a sentence with the sandbox, tracked in Prefect, into audio/
	@audio=$$($(BIN)/prefect-nanogpt say "Hello! This sentence went from a ticket to verified audio in a Prefect flow." --save-to audio) \
	  && echo "Hear it in any player: $$audio" && echo "or in a browser: $(BIN)/prefect-nanogpt listen --folder audio"

test: $(VENV)/.installed ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

# uv looks for the Python, downloads it where there is none, and fails where it cannot.
COMPAT := $(VENV)/compat
COMPAT_TESTS := models credentials outcomes deployment
ON ?= 3.11
VERSIONS ?= --constraints requirements-dev.lock
compat: $(VENV)/.installed ## Test the wheel on another Python (ON=3.13), or the oldest versions (VERSIONS="--resolution lowest-direct")
	rm -rf build $(COMPAT)
	$(BIN)/uv venv --quiet --python $(ON) $(COMPAT)
	$(BIN)/uv pip install --quiet --python $(COMPAT) --only-binary :all: $(VERSIONS) \
	  --requirements pyproject.toml --extra sandbox --extra audio --extra long --group test
	$(BIN)/uv build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir $(COMPAT) .
	$(BIN)/uv pip install --quiet --python $(COMPAT) --no-deps $(COMPAT)/*.whl
	$(COMPAT)/bin/python -m pytest -n 2 --dist loadfile $(COMPAT_TESTS:%=tests/test_%.py) $(PYTEST_ARGS)

fuzz: $(VENV)/.installed ## Answer every call with odd bytes that are new, for FUZZ_SECONDS a test
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),120) $(BIN)/python -m pytest tests/test_fuzz.py $(PYTEST_ARGS)

bench: $(VENV)/.installed ## Measure everything into docs/performance.md (about 40 minutes)
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.installed ## Measure a little in about a minute, and only print it
	$(BIN)/python -m benchmarks --quick

soak: $(VENV)/.installed ## Say 10,000 lines through faults and a kill, and check what is left (LINES=500 in a minute)
	$(BIN)/python -m benchmarks.soak $(LINES)

screenshots: $(VENV)/.installed ## Photograph the Prefect UI for the documentation (needs Chromium)
	SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/test_new_user.py

reference: $(VENV)/.installed ## Make docs/reference.md from the docstrings
	$(BIN)/python docs/make_reference.py

lint: $(VENV)/.installed ## Check style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	@# flows/ and tasks/ are installed inside the package, where no type checker finds them before that.
	rm -rf build $(VENV)/typed && $(PIP) --no-deps --no-build-isolation --target $(VENV)/typed .
	cd $(VENV)/typed && MYPYPATH=. ../bin/mypy --config-file ../../pyproject.toml -p prefect_nanogpt

format: $(VENV)/.installed ## Rewrite the code in its style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

UV_LOCK = $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet
lock: $(VENV)/.installed ## Resolve the dependencies anew into requirements-dev.lock, and requirements.lock, a part of it
	$(UV_LOCK) --extra sandbox --extra audio --extra long --extra fast --extra s3 --group dev --upgrade -o requirements-dev.lock
	$(UV_LOCK) --extra sandbox --extra audio --group build --constraints requirements-dev.lock --upgrade -o requirements.lock

clean: ## Remove what was made
	rm -rf $(VENV) audio build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
