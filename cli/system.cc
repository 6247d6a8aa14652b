#include "system.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

namespace thriftattn::cli {

std::vector<CpuCache> cpu_caches() {
  std::vector<CpuCache> caches;
  for (int i = 0;; ++i) {
    const std::string at = fmt::format("/sys/devices/system/cpu/cpu0/cache/index{}/", i);
    std::ifstream level(at + "level"), type(at + "type"), size(at + "size");
    CpuCache cache;
    char unit = 0;
    if (!(level >> cache.level) || !(type >> cache.type) || !(size >> cache.bytes >> unit)) return caches;
    cache.bytes <<= unit == 'M' ? 20 : unit == 'K' ? 10 : 0;
    caches.push_back(std::move(cache));
  }
}

std::vector<std::string> cpu_features() {
  static constexpr const char* kKnown[] = {"avx2",        "fma",         "f16c",     "avx_vnni", "avx512f",  "avx512bw",
                                           "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd",
                                           "asimddp",     "bf16",        "i8mm",     "sve",      "sve2"};
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    const std::set<std::string> flags{std::istream_iterator<std::string>(words), {}};
    std::vector<std::string> found;
    std::copy_if(std::begin(kKnown), std::end(kKnown), std::back_inserter(found),
                 [&](const char* name) { return flags.contains(name); });
    return found;
  }
  return {};
}

Memory memory() {
  std::ifstream info("/proc/meminfo");
  Memory out;
  std::string key;
  int64_t kilobytes = 0;
  for (std::string line; std::getline(info, line);) {
    std::istringstream(line) >> key >> kilobytes;
    if (key == "MemTotal:") out.total = kilobytes << 10;
    if (key == "MemAvailable:") out.available = kilobytes << 10;
  }
  return out;
}

}  // namespace thriftattn::cli
