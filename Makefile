.DEFAULT_GOAL := help
.PHONY: help setup demo export test test-all check lint

PYTHON ?= python3
RSD_TRT := .venv/bin/rsd-trt
DEMO := --backend ort --tasks 0,1 --trials 1 --n-action-steps 1 --out results/demo --fresh

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 10

setup: .venv/installed ## Make .venv with everything that demo and test need

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[export,cpu,rtx,libero,ray,report,dev]'
	@touch $@

demo: setup ## The reference policy in LIBERO, baseline and RSD, with a report
	$(RSD_TRT) export --target onnx
	$(RSD_TRT) eval --mode baseline,rsd $(DEMO)
	$(RSD_TRT) report results/demo/*_results.json -o results/demo/report

export: setup ## Export the reference policy to ONNX and engines
	$(RSD_TRT) export

test: setup ## Run the tests, but for the slowest
	.venv/bin/pytest -n 2 --dist loadfile -m "not slow"

test-all: test ## Run the slowest tests too
	.venv/bin/pytest -n 2 --dist loadfile -m slow

lint: setup ## Check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

check: lint test-all ## lint and test-all
