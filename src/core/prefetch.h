// Memory that is wanted soon, where no prefetcher of hardware follows.
#pragma once

#include <cstdint>

namespace thriftattn {

// Asks for the lines of [at, at + bytes), to be read, or to be written with kWrite = 1.
template <int kWrite = 0>
inline void prefetch(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, kWrite);
}

}  // namespace thriftattn
