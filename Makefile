# Each target works on a fresh machine with Python 3.10+ and make: it builds .venv first when that is missing or outdated.
# On Windows, run make from Git Bash.
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
STAMP := .venv/.installed
EXTRAS := app,serve,train,track,quantize,ray,dev

LOWEST := .venv-lowest/$(notdir $(BIN))
LOWEST_STAMP := .venv-lowest/.installed
# LOWEST_TORCH=--torch also takes torch's lowest release. On Linux, PyPI has it with CUDA only.
LOWEST_TORCH ?=

.PHONY: help setup app demo browser screenshots test test-slow test-all test-lowest check bench benchmark-quick leaderboard build release-check clean

help:
	@echo "make app            generate, mix, train and compare in the browser"
	@echo "make demo           learn a subject with NoRA and write outputs/demo (about 3 minutes on 2 cores)"
	@echo "make test           the fast tests"
	@echo "make test-slow      the tests that train or take long"
	@echo "make test-all       both in one run, which takes less time than one after the other"
	@echo "make test-lowest    the fast tests with the lowest releases that pyproject.toml allows, in .venv-lowest"
	@echo "make check          ruff and a strict type check"
	@echo "make bench          the benchmarks of docs/performance.md on the CPU (about 15 minutes on a quiet machine)"
	@echo "make benchmark-quick  compare three methods on three subjects of the embedded base (at most 10 minutes on 2 cores)"
	@echo "make leaderboard    write docs/leaderboard.md from the files in results"
	@echo "make browser        download a Chromium for the tests of the app, where the system has none"
	@echo "make screenshots    pictures of every tab in outputs/screenshots (needs Chromium)"
	@echo "make build          write the wheel and the sdist into dist"
	@echo "make release-check  build, check version and changelog, and try the wheel in an empty environment"
	@echo "make setup          only build .venv with the pinned dependencies"
	@echo "make clean          remove .venv, .venv-lowest, dist and caches; outputs stays, which holds the library of the app"
	@echo "make help           this list"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "Setting up .venv (pinned dependencies; this takes some minutes once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

$(LOWEST_STAMP): pyproject.toml constraints.txt tests/lowest.py
	@echo "Setting up .venv-lowest ..."
	@test -x $(LOWEST)/python || $(PYTHON) -m venv .venv-lowest
	@$(LOWEST)/python -m pip install --quiet --disable-pip-version-check packaging tomli
	@$(LOWEST)/python -m tests.lowest $(LOWEST_TORCH) > .venv-lowest/constraints.txt
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(LOWEST)/python -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[app,serve,train,track,quantize,dev]'
	@touch $@

app: $(STAMP)
	@$(BIN)/python app.py

demo: $(STAMP)
	@$(BIN)/nora-diffusion demo

browser: $(STAMP)
	@$(BIN)/python -m playwright install --with-deps chromium

screenshots: $(STAMP)  # needs Chromium
	@$(BIN)/python -m pytest tests/ui/screenshots.py

# One worker a core, each with one thread: the models of the tests are too small to share. Bytecode is kept, or each worker
# and each program that a test starts would compile the tests and the project again. Files stay in the order of
# tests/conftest.py.
ALONE := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1
SPREAD := --numprocesses auto --dist loadfile --no-loadscope-reorder
WORKERS := $(ALONE) $(BIN)/python -m pytest $(SPREAD)

test: $(STAMP)
	@$(WORKERS) -m "not slow"

test-slow: $(STAMP)
	@$(WORKERS) -m slow || { status=$$?; test $$status -eq 5; }  # 5: no test is marked slow

test-all: $(STAMP)
	@$(WORKERS)

# Without the app, whose gradio is pinned at the lowest release already, and without what depends on no release: reports,
# kills, sweeps and clusters (which train like the other tests, and Ray is not installed there), the repository itself, and
# the recipe of the embedded base, which runs with the pins.
EVERYWHERE := ui reports results tiny_sd training/run/test_kills.py training/sweeps training/many/test_cluster.py \
	cli/test_imports.py test_docs.py test_layering.py test_package.py test_project.py
test-lowest: $(LOWEST_STAMP)
	@$(ALONE) $(LOWEST)/python -m pytest $(SPREAD) -m "not slow" $(addprefix --ignore=tests/,$(EVERYWHERE))

bench: $(STAMP)  # one thread, so that another program on another core disturbs it little
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@for name in steps projections attention mixed_batch loading growth; do \
		echo; echo "== $$name"; OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; \
	done

QUICK := outputs/benchmark-quick

benchmark-quick: $(STAMP)  # for the independent judge the extra "probe"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[probe]'
	@$(BIN)/python -m nora_diffusion.tiny_sd.comparing --methods base lora nora nora_input --rates 4.8e-3 9.6e-3 \
		--subjects cyclops-purple tiger backpack-green --seeds 0 --out $(QUICK)
	@$(BIN)/nora-diffusion leaderboard $(QUICK)/results.json --out $(QUICK)

leaderboard: $(STAMP)
	@$(BIN)/nora-diffusion leaderboard $(sort $(wildcard results/*.json)) --out docs

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

build: $(STAMP)
	@rm -rf dist
	@$(BIN)/python -m hatchling build

release-check: build
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_project.py tests/test_package.py

clean:
	rm -rf .venv .venv-lowest build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
