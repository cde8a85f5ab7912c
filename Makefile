PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Nothing here looks anything up on a network or reports usage at run time.
export DO_NOT_TRACK = 1
export HF_HUB_OFFLINE ?= 1

DEMO := build/demo
DEMO_MODELS := $(DEMO)/models
FAMILY ?= qwen_image

.PHONY: help demo deploy test lint check bench torture screenshots format clean-demo
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(INSTALLED)  ## Cache 18 photos and train a LoRA of a tiny Qwen-Image, on CPU; FAMILY=... takes another family
	@test -f deploy/demo/$(FAMILY).yaml || { echo "no deploy/demo/$(FAMILY).yaml; FAMILY is one of $(basename $(notdir $(wildcard deploy/demo/*.yaml)))"; exit 2; }
	@$(BIN)/diffsynth-pipe tiny-model $(DEMO_MODELS)/tiny/$(FAMILY) --family $(FAMILY)
	@DIFFSYNTH_MODEL_BASE_PATH=$(DEMO_MODELS) DIFFSYNTH_SKIP_DOWNLOAD=True $(BIN)/diffsynth-pipe run deploy/demo/$(FAMILY).yaml

deploy: $(INSTALLED)  ## Register the flow with the Prefect server in PREFECT_API_URL: pools, deployments, automation
	$(BIN)/prefect work-pool create local --type process --overwrite
	$(BIN)/prefect work-pool create gpu-docker --type docker --overwrite
	$(BIN)/prefect work-pool create gpu-kubernetes --type kubernetes --base-job-template deploy/k8s/base-job-template.json --overwrite
	$(BIN)/prefect --no-prompt deploy --all --prefect-file deploy/prefect.yaml
	$(BIN)/python -m flows.automations

test: $(INSTALLED)  ## Run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## Check format, style, types and import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --verbose | tail -n 20

check: lint test  ## Everything that must pass before a commit

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## Measure the cache reader, on disk and S3, the sampler and the training step, and compare the engines
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python tests/bench/bench_sampler.py
	$(BIN)/python tests/bench/bench_reader.py
	$(BIN)/python tests/bench/bench_s3.py
	$(BIN)/python tests/bench/bench_train.py
	$(BIN)/python tests/bench/bench_engines.py

torture: $(INSTALLED)  ## Kill and damage caches, and kill trainings and deployments, for minutes
	$(BIN)/python tests/integration/torture_cache.py
	$(BIN)/python tests/integration/torture_training.py
	$(BIN)/python -m pytest -m torture

screenshots: $(INSTALLED)  ## Take the pictures of docs/images anew; needs /usr/bin/chromium
	SCREENSHOTS=$(CURDIR)/docs/images $(BIN)/python -m pytest -q --basetemp=/tmp/demo tests/prefect/test_ui.py

clean-demo:  ## Remove what the demo wrote
	rm -rf $(DEMO)
