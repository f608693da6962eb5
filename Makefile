# Two commands: `make quickstart` and `make test`. Everything happens in .venv; pinned versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
TEST_ENV := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2}

.PHONY: quickstart test check format clean

quickstart: .venv/installed
	$(BIN)/fedmira quickstart

test: .venv/installed-dev check
	$(TEST_ENV) $(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch goes first and alone: the pinned release has a small CPU build, a later one would bring gigabytes of CUDA
.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12), (3, 13)} and "fedmira needs Python 3.11, 3.12 or 3.13; try make PYTHON=python3.12 quickstart")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "Installing PyTorch (some 200 MB, once) ..."
	@$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	@touch $@

.venv/installed: .venv/torch pyproject.toml constraints.txt
	@echo "Installing fedmira and what it needs ..."
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests need ..."
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
