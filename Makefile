.DEFAULT_GOAL := help
.PHONY: help setup demo export test check lint

PYTHON ?= python3
RSD_TRT := .venv/bin/rsd-trt
BUNDLE := bundles/untrained
DEMO := --tasks 0,1 --trials 1 --max-steps 60 --n-action-steps 1 --out results/demo --fresh

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 10

setup: .venv/installed ## Make .venv with everything that demo and test need

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[export,cpu,rtx,libero,report,dev]'
	@touch $@

$(BUNDLE): | setup
	$(RSD_TRT) init $@ --size reference --seed 0

demo: setup $(BUNDLE) ## Drive real LIBERO episodes, baseline and RSD, and compare them
	$(RSD_TRT) eval $(BUNDLE) --mode baseline $(DEMO)
	$(RSD_TRT) eval $(BUNDLE) --mode rsd $(DEMO)
	$(RSD_TRT) compare results/demo/libero_spatial_baseline_results.json results/demo/libero_spatial_rsd_results.json

export: setup $(BUNDLE) ## Export the bundle to ONNX and engines
	$(RSD_TRT) export $(BUNDLE) -o engines/

test: setup ## Run all tests
	.venv/bin/pytest

lint: setup ## Check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

check: lint test ## lint and test
