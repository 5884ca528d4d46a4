.DEFAULT_GOAL := help
.PHONY: help setup demo export trt-proof test test-all check lint

PYTHON ?= python3
RSD_TRT := .venv/bin/rsd-trt
DEMO := --tasks 0,1 --trials 1 --perturb late:7 --video --out results/demo --fresh

PROOF := results/tensorrt
JOIN := import json; print(json.dumps({name: json.load(open(f"$(PROOF)/{name}.json")) for name in ("export", "verify", "profile")}))

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 10

setup: .venv/installed ## Make .venv with everything that demo and test need

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[export,cpu,rtx,libero,openvla,ray,report,serve,train,dev]'
	@touch $@

demo: setup ## The shipped policy in LIBERO while something moves: both modes, a video and a report
	$(RSD_TRT) eval --mode baseline,rsd $(DEMO)
	$(RSD_TRT) report results/demo/*_results.json -o results/demo/report
	@.venv/bin/python -m examples.demo results/demo

export: setup ## Export the reference policy to ONNX and engines
	$(RSD_TRT) export

trt-proof: setup ## On a GPU, with the full TensorRT: build, compare and time engines; one file to send in
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[trt]'
	mkdir -p $(PROOF)
	$(RSD_TRT) export --target tensorrt --json > $(PROOF)/export.json
	$(RSD_TRT) verify --backend trt --device cuda --json > $(PROOF)/verify.json
	$(RSD_TRT) profile --backend torch,graph,trt --device cuda --out $(PROOF)
	.venv/bin/python -c '$(JOIN)' > $(PROOF)/proof.json
	@echo 'wrote $(PROOF)/proof.json: docs/results/tensorrt/README.md says where it goes'

test: setup ## Run the tests, but for the slowest
	.venv/bin/pytest -n 2 --dist loadfile -m "not slow"

test-all: test ## Run the slowest tests too
	.venv/bin/pytest -n 2 --dist loadfile -m slow

lint: setup ## Check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

check: lint test-all ## lint and test-all
