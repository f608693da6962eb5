# Two commands: `make quickstart` and `make test`. Everything happens in .venv; pinned versions in constraints.txt.
# Speed against peers: `make bench`, `make bench-gpu`, and the rows without targets `make bench-more`, `make bench-gpu-more`.
PYTHON ?= python3
# of the machine that `make bench-gpu-packages` prepares for
GPU_PYTHON ?= 3.12
# processes of the tests, each with one thread and up to 4 GiB
WORKERS ?= 2
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
TEST_ENV := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
BENCH_ENV := HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=10000

OLDEST := .venv-oldest
.PHONY: quickstart test test-oldest check format pages bench bench-more bench-gpu bench-gpu-more bench-gpu-packages clean

quickstart: .venv/installed
	$(BIN)/fedmira quickstart

test: .venv/installed-dev check
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# all tests with the oldest versions that pyproject.toml accepts; their torch brings gigabytes for GPUs
test-oldest: .venv/installed-dev
	$(PYTHON) -m venv --clear $(OLDEST)
	$(BIN)/python tools/oldest_versions.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the pages that are made from what is committed: results of the studies, configuration, targets of the benchmark
pages: .venv/installed-dev
	$(BIN)/python tools/methods_study.py page > docs/results/methods.md.new
	mv docs/results/methods.md.new docs/results/methods.md
	$(BIN)/python tools/attack_study.py page > docs/results/attacks.md.new
	mv docs/results/attacks.md.new docs/results/attacks.md
	$(BIN)/python tools/joining_study.py page > docs/results/joining.md.new
	mv docs/results/joining.md.new docs/results/joining.md
	$(BIN)/python tools/methods_picture.py
	$(BIN)/python tools/configuration_page.py
	$(BIN)/python -m benchmarks.table

# ours against the peers on this machine's processor, half an hour to an hour on two cores
bench: .venv/installed-dev
	$(BENCH_ENV) $(BIN)/python -W ignore::FutureWarning -m benchmarks.run --out benchmarks/results

# rows that carry no target: 15M shape at batch 8, GPT-2 124M at batch 1 and 8, 80 clients that generate, bfloat16
bench-more: .venv/installed-dev
	$(BENCH_ENV) $(BIN)/python -W ignore::FutureWarning -m benchmarks.run --more --out benchmarks/results

# the same on a GPU, not yet run on one; needs no network, takes the Python that has torch, transformers, peft and pyyaml
bench-gpu bench-gpu-more: export PYTHONPATH := src:benchmarks/.site
bench-gpu bench-gpu-more:
	@$(PYTHON) -W ignore::FutureWarning -m benchmarks.imports
	$(BENCH_ENV) $(PYTHON) -W ignore::FutureWarning -m benchmarks.run --device cuda $(if $(filter %-more,$@),--more) --out benchmarks/results

# pydantic, which a bare GPU image lacks, and what it needs, for that machine; nothing that could stand before its torch
bench-gpu-packages:
	rm -rf benchmarks/.site
	$(PYTHON) -m pip install --quiet --target benchmarks/.site --only-binary=:all: --python-version $(GPU_PYTHON) \
		--constraint constraints.txt pydantic

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
	rm -rf .venv $(OLDEST) benchmarks/.venv benchmarks/.site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
