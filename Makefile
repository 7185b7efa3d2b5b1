# The doors of the project. Each does its own set-up on a fresh machine; Python 3.11 or newer and make are enough.
PYTHON ?= python3
BIN := .venv/bin
FLOOR := .venv-floor/bin
IMAGE ?= sidelight:latest

.PHONY: setup demo test lint proto proto-check bench soak image clean
.DEFAULT_GOAL := test

setup: .venv/.ready .venv-floor/.ready

# torch first and alone: left to a dependency's choice, pip may bring another build of it.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python pyhealth==2.1.0
	touch $@

# The oldest grpcio and protobuf that pyproject.toml allows, and the generator of the stubs, which is their age.
.venv-floor/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-floor
	$(FLOOR)/python -m pip install --quiet --upgrade pip
	$(FLOOR)/python -m pip install --quiet grpcio==1.73.1 protobuf==6.31.1 grpcio-tools==1.73.1 mypy-protobuf==3.6.0
	$(FLOOR)/python -m pip install --quiet --editable .
	touch $@

demo: .venv/.ready
	$(BIN)/sidelight demo --out demo

test: setup
	$(BIN)/python -m pytest

lint: setup proto-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/hadolint Dockerfile

GENERATE = $(FLOOR)/python -m grpc_tools.protoc --proto_path=proto \
	--plugin=protoc-gen-mypy_grpc=$(FLOOR)/protoc-gen-mypy_grpc \
	--plugin=protoc-gen-mypy=$(FLOOR)/protoc-gen-mypy \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) \
	proto/sidelight/v1/tensor.proto proto/sidelight/v1/model.proto proto/sidelight/v1/attribution.proto

proto: .venv-floor/.ready
	$(call GENERATE,client)

proto-check: .venv-floor/.ready
	@fresh=$$(mktemp -d) && $(call GENERATE,$$fresh) && \
	diff --recursive --exclude=__init__.py --exclude=__pycache__ $$fresh/sidelight/v1 client/sidelight/v1 \
	|| { echo 'client/sidelight/v1 is not what proto/ says: run `make proto`'; exit 1; }; rm -rf $$fresh

bench: .venv/.ready
	$(BIN)/python -m benchmarks

soak: .venv/.ready
	$(BIN)/python -m benchmarks.memory --requests 5000
	$(BIN)/python -m benchmarks.storm --requests 10000

image:
	buildah build --tag $(IMAGE) . || docker build --tag $(IMAGE) .

clean:
	rm -rf .venv .venv-floor dist demo
