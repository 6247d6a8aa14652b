# The front door: every target installs the Debian packages it needs, when they are missing, and then does its work.
#   make demo            what FP4 attention costs on a long text, and what ThriftAttention gives back
#   make demo TEXT=FILE  the same on your text
#   make test            build and run all tests; CUDA=ON fails where nvcc is missing, CUDA=OFF leaves its backend out
#   make build           the program at build/release/thriftattn
#   make asan            the fast tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make tsan            the attention tests and the soak under ThreadSanitizer
#   make soak            a cache in long random use against the oracle, SECONDS=600 of it unless told otherwise
#   make fuzz            every parser of files under libFuzzer, RUNS=200000 inputs each unless told otherwise
#   make python          the Python package, installed into build/venv beside PyTorch and Transformers; for GPUs too
#                        with CUDA=ON
#   make test-python     ... and its tests; make docs: the documentation pages, in build/docs
#   make bench-peers     decode beside PyTorch and ONNX Runtime, installed there too; BENCH="--phase ..."
#   make format-check    clang-format over the tracked C, C++ and CUDA files; `make format` rewrites them

# Two texts, because the loss on one is known to about 0.002 nats only.
TEXT ?= build/genesis.txt build/matthew.txt
MODEL ?= models/pocket-8m
CONTEXT ?= 16384
JOBS ?= $(shell nproc)
RUNS ?= 200000
SECONDS ?= 600
CUDA ?= AUTO
BENCH ?= --phase decode --s-kv 16384 131072 --method fp16 fp4 thrift

.PHONY: all build bench-peers demo test python test-python docs asan tsan soak fuzz format format-check clean

all: build

build:
	@scripts/setup.sh build
	cmake --preset release -DTHRIFTATTN_TESTS=OFF -DTHRIFTATTN_CUDA=$(CUDA)
	cmake --build --preset release -j $(JOBS)

build/genesis.txt: RANGE = gen1:1-deu34:12
build/matthew.txt: RANGE = mat1:1-rev22:21
build/genesis.txt build/matthew.txt: scripts/demo_text.sh
	@scripts/setup.sh demo
	scripts/demo_text.sh $@ $(RANGE)

demo: build $(TEXT)
	build/release/thriftattn eval --model $(MODEL) --text $(TEXT) --context $(CONTEXT) --json build/demo.json

test:
	@scripts/setup.sh test
	cmake --preset dev -DTHRIFTATTN_CUDA=$(CUDA)
	cmake --build --preset dev -j $(JOBS)
	ctest --preset dev -j $(JOBS)

asan:
	@scripts/setup.sh test
	cmake --preset asan
	cmake --build --preset asan -j $(JOBS)
	ctest --preset asan -j $(JOBS) -LE slow

# The model runner stays out: oneDNN's OpenMP is unknown to ThreadSanitizer.
tsan:
	@scripts/setup.sh test
	cmake --preset tsan
	cmake --build --preset tsan -j $(JOBS) --target test_attention
	THRIFTATTN_SOAK_SECONDS=30 build/tsan/tests/test_attention --gtest_brief=1 \
	  --gtest_filter='Soak.*:Cache*:Damaged.*:Batch.*:KvHeads.*:StorageByHead.*'

soak:
	@scripts/setup.sh test
	cmake --preset dev
	cmake --build --preset dev -j $(JOBS) --target test_attention
	THRIFTATTN_SOAK_SECONDS=$(SECONDS) build/dev/tests/test_attention --gtest_filter='Soak.*'

fuzz:
	@scripts/setup.sh fuzz
	cmake --preset fuzz -DTHRIFTATTN_FUZZ_RUNS=$(RUNS)
	cmake --build --preset fuzz -j $(JOBS)
	ctest --preset fuzz -j $(JOBS)

build/venv/with-%:
	@scripts/setup.sh python
	test -d build/venv || python3 -m venv build/venv
	build/venv/bin/pip install --quiet torch $(PACKAGES)
	touch $@

build/venv/with-peers: PACKAGES = numpy onnxruntime onnx
build/venv/with-tests: PACKAGES = cmake scikit-build-core nanobind transformers matplotlib \
  pytest hypothesis nbclient ipykernel sphinx myst-parser

# Kernels for GPUs, which take minutes, are compiled here only where they are insisted on.
python: build/venv/with-tests
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) build/venv/bin/pip install --quiet --no-build-isolation --no-deps . \
	  -C cmake.define.THRIFTATTN_CUDA=$(if $(filter ON,$(CUDA)),ON,OFF) -C cmake.define.THRIFTATTN_UNITY=ON

test-python: python
	build/venv/bin/python -m pytest -q

docs: python
	build/venv/bin/python -m sphinx -q -W --keep-going docs/site build/docs

bench-peers: build build/venv/with-peers
	build/venv/bin/python bench/peers_cpu.py $(BENCH) --json build/peers.json

format-check:
	@scripts/setup.sh check
	git ls-files '*.h' '*.cc' '*.c' '*.cuh' '*.cu' | xargs -r clang-format --dry-run -Werror

format:
	@scripts/setup.sh check
	git ls-files '*.h' '*.cc' '*.c' '*.cuh' '*.cu' | xargs -r clang-format -i

clean:
	rm -rf build
