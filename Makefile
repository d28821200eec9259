# `make` alone lists what can be made. Everything runs in .venv/, built on first need.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test test-demo test-quick test-slurm check bench bench-quality docs soak format clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/ready ## dense model, capture, training, sparse checkpoint and report on the embedded default
	dvc repro
	@cat reports/summary.txt

test: .venv/ready ## every test, the slow ones too, on every core
	$(BIN)/python -m pytest -q -n auto --dist loadfile --durations=20

test-demo: .venv/ready ## what the last demo must have reached
	$(BIN)/python -m pytest -q tests/after_demo.py

test-slurm: .venv/ready ## a real Slurm on loopback (apt-get as root): kills, lost nodes, requeues, the tiny model
	$(BIN)/python tests/slurm/packages.py --accounting
	$(BIN)/python -m pytest -q tests/slurm/test_slurm.py tests/slurm/proof.py

test-quick: .venv/ready ## the tests that take seconds
	$(BIN)/python -m pytest -q -m 'not slow'

check: .venv/ready ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/ready ## the speed table: each part beside its reference, in under 20 minutes
	$(BIN)/python -m benchmarks

soak: .venv/ready ## kill every stage at each of its writes, 200 times at random, and dvc itself
	$(BIN)/python tests/faults/soak.py --boundaries all

bench-quality: .venv/ready ## the quality table: recipes beside their controls, three seeds, in hours
	$(BIN)/python -m benchmarks.quality

docs: .venv/ready ## docs/configuration.md, from the schemas
	$(BIN)/python -m pipeline.reference

format: .venv/ready ## rewrite to the format and fix what lint can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: .venv/ready ## remove unfinished and outdated work, after asking; outputs stay
	$(BIN)/python -m pipeline clean

distclean: ## remove the environment, all work and the caches; outputs and the DVC cache stay
	rm -rf .venv .scratch .pytest_cache .ruff_cache .hypothesis
