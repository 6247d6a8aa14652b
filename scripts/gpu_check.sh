#!/bin/bash
# All that needs a GPU, in one go: builds, runs the tests of the CUDA backend, runs them under compute-sanitizer on small
# sizes, then times attention beside PyTorch. Results go to build/gpu/*.json.
#   scripts/gpu_check.sh             for GPU 0
#   DEVICE=1 scripts/gpu_check.sh    for another
#   STEPS="build test" ...           some of: build test python sanitize bench
#   ARCHITECTURES=90a ...            instead of the GPU's own
#   ROUNDS=3 ...                     of the benchmark
#   SHARDS=8 ...                     of the tests, each a process
# Libraries that are not where CMake looks come by its own variables (CMAKE_PREFIX_PATH, PKG_CONFIG_PATH); the peers
# need a python3 with torch, and are left out without it; so is the Python package without nanobind, scikit-build-core,
# pytest, torch and a transformers that thriftattn.hf takes.
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-0}
STEPS=${STEPS:-build test python sanitize bench}
ROUNDS=${ROUNDS:-3}
SHARDS=${SHARDS:-8}
BUILD=${BUILD:-build/gpu}
PYTHON=${PYTHON:-python3}

# Kernels may wait for what a fault never brings: nothing here takes longer than this.
LIMIT=${LIMIT:-1800}

failed=0  # a test or a tool found something: the rest runs all the same, and the script fails at its end

wants() { [[ " $STEPS " == *" $1 "* ]]; }
say() { printf '\n== %s\n' "$*" >&2; }
smi() { nvidia-smi -i "$DEVICE" --query-gpu="$1" --format=csv,noheader,nounits; }

capability=$(smi compute_cap | tr -d .)
case $capability in
  90 | 10? | 12?) native=${capability}a ;;
  *) native=$capability ;;
esac
ARCHITECTURES=${ARCHITECTURES:-$native}
export CUDA_VISIBLE_DEVICES=$DEVICE
mkdir -p "$BUILD"
say "$(smi name), compute capability $capability, driver $(smi driver_version), $(smi clocks.sm) MHz, $(smi power.draw) W"

if wants build; then
  say "building for sm_$ARCHITECTURES"
  generator=()
  command -v ninja > /dev/null && generator=(-G Ninja)
  cmake -S . -B "$BUILD" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DTHRIFTATTN_CUDA=ON \
    -DTHRIFTATTN_CUDA_ARCHITECTURES="$ARCHITECTURES"
  cmake --build "$BUILD" -j "$(nproc)" --target thriftattn_cli test_cuda test_model_cuda
fi

if wants test; then
  say "tests"
  # Side by side: what takes time is the reference on one processor.
  pids=()
  for ((i = 0; i < SHARDS; ++i)); do
    GTEST_TOTAL_SHARDS=$SHARDS GTEST_SHARD_INDEX=$i timeout "$LIMIT" "$BUILD/tests/cuda/test_cuda" --gtest_brief=1 \
      > "$BUILD/test_cuda.$i.log" 2>&1 &
    pids+=($!)
  done
  for ((i = 0; i < SHARDS; ++i)); do
    wait "${pids[$i]}" || { failed=1; cat "$BUILD/test_cuda.$i.log"; }
    tail -n 1 "$BUILD/test_cuda.$i.log"
  done
  timeout "$LIMIT" "$BUILD/tests/test_model_cuda" --gtest_brief=1 || failed=1
fi

package=0  # whether $BUILD/package is there
if wants python; then
  if "$PYTHON" -c 'import nanobind, scikit_build_core, pytest, torch' 2> /dev/null; then
    say "the Python package and its tests"
    "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target "$BUILD/package" . \
      -C build-dir="$BUILD/python" -C cmake.define.THRIFTATTN_CUDA=ON \
      -C cmake.define.THRIFTATTN_CUDA_ARCHITECTURES="$ARCHITECTURES"
    package=1
    PYTHONPATH=$BUILD/package timeout "$LIMIT" "$PYTHON" -m pytest -q tests/python -k 'cuda or gpu' || failed=1
  else
    say "no nanobind, scikit-build-core, pytest or torch here: no Python package"
  fi
fi

if wants sanitize; then
  # Every kernel on a few pages: one decode, one verify step and one chunk of each setting.
  small='GpuLengths.*:Steps/GpuRun.ReadsAGivenSelectionAsTheCpuDoes/decode_d128'
  small+=':Steps/GpuRun.ChoosesAsTheOracleDoes/verify3_d128:Steps/GpuRun.ChoosesAsTheOracleDoes/chunk_d128'
  for tool in memcheck racecheck; do
    say "compute-sanitizer $tool"
    timeout "$LIMIT" compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
      "$BUILD/tests/cuda/test_cuda" --gtest_brief=1 --gtest_filter="${SANITIZE_FILTER:-$small}" || failed=1
    timeout "$LIMIT" compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
      "$BUILD/tests/test_model_cuda" --gtest_brief=1 --gtest_filter='Kernels.*-*Fill*' || failed=1
  done
fi

if wants bench; then
  peers=(cudnn flash)
  "$PYTHON" -c 'import torch' 2> /dev/null || { say "no torch here: no peers"; peers=(none); }
  run() { # name, arguments
    say "bench: $1"
    timeout "$LIMIT" "$PYTHON" bench/peers_gpu.py --program "$BUILD/thriftattn" --peers "${peers[@]}" \
      --rounds "$ROUNDS" --json "$BUILD/$1.json" "${@:2}"
  }
  methods=(fp16 fp4 thrift thrift:storage=dual thrift:policy=block_mean thrift:policy=block_mean,storage=dual)
  run decode_b1 --s-kv 8192 32768 131072 524288 --method "${methods[@]}"
  run decode_b8 --batch 8 --s-kv 32768 --method "${methods[@]}"
  run decode_b16 --batch 16 --s-kv 131072 --method "${methods[@]}"
  run prefill --phase prefill --s-kv 8192 32768 --method fp16 fp4 thrift
  "$BUILD/thriftattn" bench attention --device cuda --phase append --s-kv 131072 --s-q 512 --json "$BUILD/append.json"
  for batch in 1 4; do
    "$BUILD/thriftattn" bench model --shape llama3-8b --random-weights --context 131072 --batch "$batch" \
      --method fp16 thrift thrift:policy=block_mean fp4 --rounds "$ROUNDS" --json "$BUILD/model_b$batch.json"
  done
  if [ "$package" = 1 ] && PYTHONPATH=$BUILD/package "$PYTHON" -c 'import thriftattn.hf'; then
    say "bench: a token of a Transformers model"
    for batch in 1 16; do
      PYTHONPATH=$BUILD/package timeout "$LIMIT" "$PYTHON" bench/hf_gpu.py --batch "$batch" --rounds "$ROUNDS" \
        --json "$BUILD/hf_b$batch.json" || failed=1
    done
  fi
fi

[ "$failed" = 0 ] || say "something failed above"
exit "$failed"
