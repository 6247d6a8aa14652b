// Saved sequences as bytes: what cache_file.cc shares with the tests.
#pragma once

#include <cstdint>
#include <span>

namespace thriftattn {

// Recomputes the checksums of a saved sequence held in memory, as far as its header can be followed. For tests and
// fuzzers, whose changes would otherwise never be seen by the checks behind the checksums.
void reseal(std::span<uint8_t> file);

}  // namespace thriftattn
