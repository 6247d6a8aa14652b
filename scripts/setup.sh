#!/bin/bash
# Installs the Debian packages that a task needs, and does nothing when they are there.
#   scripts/setup.sh build | test | demo | check | fuzz | python ...
set -euo pipefail

# ocl-icd-opencl-dev: the CMake file of libdnnl-dev asks for OpenCL and its package does not depend on it.
build="build-essential cmake ninja-build pkg-config libhwy-dev libdnnl-dev ocl-icd-opencl-dev libcli11-dev nlohmann-json3-dev libfmt-dev libpcre2-dev libxxhash-dev libutf8proc-dev"
packages=""
for task in "$@"; do
  case "$task" in
    build) packages+=" $build" ;;
    test) packages+=" $build libgtest-dev python3" ;;
    demo) packages+=" $build bible-kjv" ;;
    fuzz) packages+=" $build clang libclang-rt-dev python3" ;;
    python) packages+=" $build python3-dev python3-venv" ;;
    check) packages+=" git clang-format" ;;
    *) echo "setup.sh: unknown task '$task': build, test, demo, check, fuzz and python are known" >&2; exit 2 ;;
  esac
done

missing=""
for package in $packages; do
  dpkg -s "$package" 2>/dev/null | grep -q '^Status: install ok installed' || missing+=" $package"
done
[ -z "$missing" ] && exit 0

echo "installing:$missing"
sudo=""
[ "$(id -u)" = 0 ] || sudo="sudo"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -q
# shellcheck disable=SC2086  # a list of words
$sudo apt-get install -q -y --no-install-recommends $missing
