// bench attention --device cuda: the same rows on a GPU.
#pragma once

#include "commands.h"

namespace thriftattn::cli {

// Every repetition is a CUDA graph of many calls, each over another layer of the cache; the layers that a graph goes
// through hold more than four times the L2 cache of what a call reads. A single call between two events is timed too,
// and, for methods that choose pages, the call under a selection that is given.
Status bench_attention_gpu(const BenchOptions& options, int device);

}  // namespace thriftattn::cli
