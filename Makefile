# Needs make and python3 (3.11 or newer) only; everything else is set up by the targets themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What the tests use beyond Python packages: a C compiler and the kernel's headers (structs are
# compared with them), a debugger for core files, the servers that are
# checkpointed, and what people look at our output with.
TEST_PACKAGES := gcc gdb libc6-dev nginx-light postgresql-15 redis-server tmux vim nftables iproute2 nodejs \
	openjdk-17-jre-headless \
	chromium fonts-dejavu-core zsh fish groff-base
BENCH_PACKAGES := gcc libc6-dev redis-server
PLOT_REQUIREMENTS := 'matplotlib>=3.8'
FUZZ_REQUIREMENTS := 'atheris>=2.3'
KERNELS_PACKAGES := gcc libc6-dev qemu-system-x86 kmod

# Set CKPT_NO_APT=1 to leave the system's packages alone.
PACKAGES := $(if $(CKPT_NO_APT),:,.ci/packages)

# The last of these would have each of the thousands of commands that the tests start compile all of
# ckpt again: half of its time.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The stamp holds the directory it was made for: scripts in a virtual environment name their
# interpreter by its full path, so one that was moved, or whose Python is gone, is made anew.
STAMP := $(VENV)/ready
ifneq ($(shell $(BIN)/python -c '' 2>/dev/null && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(shell rm -f $(STAMP))
endif

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(STAMP) ## Checkpoint a running program four times, kill it, bring it back (under a minute)
	@$(BIN)/python integration/demo/demo.py

.PHONY: test
test: $(STAMP) ## Run all tests of this kernel
	@$(PACKAGES) $(TEST_PACKAGES)
	@$(BIN)/python -m pytest --durations=40 --durations-min=3 \
		tests integration --ignore=integration/kernels

.PHONY: cuts
cuts: $(STAMP) ## Cut or kill a migration at every point (half an hour)
	@$(PACKAGES) $(TEST_PACKAGES)
	@CKPT_EVERY_CUT=1 $(BIN)/python -m pytest integration/migrate/test_cuts.py \
		integration/migrate/test_ssh_cuts.py integration/migrate/test_shortage.py \
		integration/migrate/test_live.py::test_a_writer_goes_there_and_back_again_and_again

.PHONY: random-cuts
random-cuts: $(STAMP) ## Cut or kill 100 migrations at random (ARGS="--runs 1000 --seed 1")
	@$(PACKAGES) $(TEST_PACKAGES)
	@$(BIN)/python -m integration.migrate.random_cuts $(ARGS)

.PHONY: fault
fault: $(STAMP) ## Kill ckpt a thousand times and behind each step, fail each, fill the disk (an hour)
	@$(PACKAGES) $(TEST_PACKAGES)
	@CKPT_KILLS=1000 $(BIN)/python -m pytest --timeout 7200 integration/process/test_killed_tracer.py \
		integration/process/test_kill_points.py integration/process/test_killed_restore.py \
		integration/fault tests/image/test_crash.py tests/image/test_crash_keeping.py

.PHONY: damage
damage: $(STAMP) ## Damage the files of a chain in 10,000 ways; each must be told (some minutes)
	@CKPT_DAMAGES=10000 $(BIN)/python -m pytest --timeout 3600 tests/image/test_damage.py

.PHONY: fuzz
fuzz: $(STAMP) ## Look for bytes that break a decoder, by coverage (ARGS="600 manifest words")
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(FUZZ_REQUIREMENTS)
	@$(BIN)/python -m tests.fuzz $(ARGS)

.PHONY: soak
soak: $(STAMP) ## 10,000 dumps of a busy redis; nothing may pile up (ARGS="--dumps 1000 --minutes 10")
	@$(PACKAGES) $(TEST_PACKAGES)
	@$(BIN)/python -m integration.soak $(ARGS)

.PHONY: kernels
kernels: $(STAMP) ## Run the tracker tests under other kernels, in qemu
	@$(PACKAGES) $(KERNELS_PACKAGES)
	@$(BIN)/python -m pytest integration/kernels

.PHONY: bench
bench: $(STAMP) ## ckpt beside CRIU: freeze, wall, bytes, restore (ARGS="--json memory redis")
	@$(PACKAGES) $(BENCH_PACKAGES)
	@$(BIN)/python -m integration.bench $(ARGS)

.PHONY: bench-migrate
bench-migrate: $(STAMP) ## How long services are away while they move (ARGS="redis --runs 2 --mib 256")
	@$(PACKAGES) $(BENCH_PACKAGES) nftables iproute2
	@$(BIN)/python -m integration.migrate.bench $(ARGS)

.PHONY: bench-plots
bench-plots: $(STAMP) ## Draw how cost grows into integration/bench/results (ARGS="threads fds")
	@$(PACKAGES) $(BENCH_PACKAGES)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PLOT_REQUIREMENTS)
	@$(BIN)/python -m integration.bench.plots $(ARGS)

.PHONY: check
check: lint types layers rules ## lint + types + layers + rules

.PHONY: lint
lint: $(STAMP) ## Style of code and docstrings, format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }

.PHONY: types
types: $(STAMP) ## Strict static types
	@$(BIN)/mypy

.PHONY: layers
layers: $(STAMP) ## Imports point down, never up
	@log=$$($(BIN)/lint-imports --no-cache 2>&1) && tail -n 1 <<<"$$log" || { echo "$$log"; exit 1; }

.PHONY: rules
rules: $(STAMP) ## What the repository promises about itself
	@$(BIN)/python -m pytest --quiet tests/test_repo_rules.py

.PHONY: format
format: $(STAMP) ## Format the code in place
	@$(BIN)/ruff format --quiet .

.PHONY: man
man: $(STAMP) ## Make the manual page, build/man/ckpt.1
	@mkdir -p build/man
	@$(BIN)/python -m ckpt.cli.manual >build/man/ckpt.1
	@ls build/man/ckpt.1

.PHONY: wheel
wheel: $(STAMP) ## Build the wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

.PHONY: clean
clean: ## Remove everything that the other targets made here
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml .ci/venv
	@PYTHON='$(PYTHON)' .ci/venv $(VENV)
