// The machine as the operating system describes it; shared by doctor and bench.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace thriftattn::cli {

struct CpuCache {
  int level = 0;
  std::string type;  // Data, Instruction or Unified
  int64_t bytes = 0;
};

// The caches of processor 0, from the core outwards; empty where the system does not tell.
std::vector<CpuCache> cpu_caches();

// The instruction sets that kernels can make use of and this processor has, as Linux spells them.
std::vector<std::string> cpu_features();

struct Memory {
  int64_t total = 0, available = 0;  // bytes; 0 = unknown
};
Memory memory();

}  // namespace thriftattn::cli
