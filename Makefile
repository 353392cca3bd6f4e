# The project's commands. `make run` and `make test` set everything up by themselves.

PY := .venv/bin/python
# Mounting needs root; the rest does not. Without a password-less sudo, run as you are and say what is missing.
ROOT := $(shell if [ "$$(id -u)" -eq 0 ]; then :; elif sudo -n true 2>/dev/null; then echo "sudo -n -E"; fi)
ARGS ?=
# What `make bench` runs, for example: make bench BENCH=mounts ARGS=--quick
BENCH ?= transfer mounts

.PHONY: help setup run test vm-test vm-clean check format lint types imports generated generate bench lock clean

help:
	@echo "make run [ARGS=--once]  start the one-machine stack and run the main job on it"
	@echo "make test               run all tests, layer by layer"
	@echo "make check              format, lint, types, import rules, generated files, tests"
	@echo "make vm-test            run the scenarios in virtual machines [BACKEND=uml|qemu|vagrant|all]"
	@echo "make vm-clean           remove the cached images of virtual machines"
	@echo "make bench              measure against peers and the raw limit"
	@echo "make setup              only set up: leaves a working .venv/bin/mooring"

setup:
	@.ci/setup

run: setup
	@exec $(ROOT) .venv/bin/mooring up $(ARGS)

test: setup
	@exec $(ROOT) $(PY) -m pytest $(ARGS)

# Machines with a kernel of their own, see docs/vm-tests.md. ARGS: what to run instead of the scenarios.
vm-test: setup
	@exec $(ROOT) $(PY) -m tests.vm.runner test --backend $(or $(BACKEND),auto) $(ARGS)

vm-clean: setup
	@exec $(ROOT) $(PY) -m tests.vm.runner clean

check: setup lint types imports generated
	@$(MAKE) --no-print-directory test

format: setup
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

lint: setup
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .

types: setup
	@$(PY) -m mypy

imports: setup
	@.venv/bin/lint-imports

generated: setup
	@$(PY) -m docs.generate --check

generate: setup
	@$(PY) -m docs.generate

bench: setup
	@for name in $(BENCH); do $(ROOT) $(PY) -m bench.$$name $(ARGS) || exit; done

# Resolves the newest versions that pyproject.toml allows, for every supported Python, with hashes.
lock: setup
	@$(PY) -m pip install --quiet uv
	@.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --extra embedded --extra dev --upgrade pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
