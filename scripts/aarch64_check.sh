#!/bin/bash
# Cross-compiles the library, its C interface and their tests for Arm and runs them under qemu's emulation. What it
# shows is that the code is right there, not how fast it is. The system is left as it is: Debian's arm64 packages are
# unpacked into build/aarch64/sysroot. Needs g++-aarch64-linux-gnu, qemu-user, cmake, ninja and pkg-config.
#   scripts/aarch64_check.sh                      the tests that meet the machine: codecs, kernels, cache, C interface
#   scripts/aarch64_check.sh REGEX [ctest args]   the tests whose names match, slow ones too
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/build/aarch64
sysroot=$root/sysroot
jobs=${JOBS:-$(nproc)}

for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja pkg-config apt-get dpkg-deb; do
  command -v $tool >/dev/null || { echo "aarch64_check.sh: $tool is missing (Debian: g++-aarch64-linux-gnu, qemu-user, cmake, ninja-build, pkg-config)" >&2; exit 2; }
done

# apt in a world of its own, where the machine is an Arm and nothing is installed.
if [ ! -e "$sysroot/.complete" ]; then
  rm -rf "$sysroot" "$root/apt"
  mkdir -p "$sysroot" "$root"/apt/{state/lists/partial,cache/archives/partial}
  : >"$root/apt/status"
  # shellcheck disable=SC1091
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $(. /etc/os-release; echo "$VERSION_CODENAME") main" >"$root/apt/sources.list"
  cat >"$root/apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "$(id -un)";
Dir::State "$root/apt/state";
Dir::State::status "$root/apt/status";
Dir::Cache "$root/apt/cache";
Dir::Etc::SourceList "$root/apt/sources.list";
Dir::Etc::SourceParts "/dev/null";
CONF
  export APT_CONFIG=$root/apt/apt.conf
  apt-get update -q
  (cd "$root/apt" && apt-get download -q libhwy-dev libhwy1 libfmt-dev libfmt9 libgtest-dev libxxhash-dev)
  for package in "$root"/apt/*.deb; do dpkg-deb -x "$package" "$sysroot"; done
  touch "$sysroot/.complete"
fi

cmake -S . -B "$root/build" -G Ninja --toolchain cmake/aarch64.cmake -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DTHRIFTATTN_MODEL=OFF -DTHRIFTATTN_CUDA=OFF -DTHRIFTATTN_WERROR=ON -DTHRIFTATTN_POISON=ON
cmake --build "$root/build" -j "$jobs"

# What was run stands in ctest's own lines. Left out by default: sweeps over what is the same on every machine, which
# take hours in emulation, and limits on memory, which the emulator does not keep. The kernels' agreement with the oracle
# is in Cpu/Target.
if [ $# -gt 0 ]; then
  ctest --test-dir "$root/build" -j "$jobs" --output-on-failure -R "$@"
else
  ctest --test-dir "$root/build" -j "$jobs" --output-on-failure -LE slow -E '^(example|Steps/Identity|HeadDims|OracleAgreement|Chunks|Soak|Memory|CacheFile\.ComesBack)'
fi
