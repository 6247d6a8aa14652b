// The CUDA backend as dispatch sees it. Running is in thriftattn/cuda.h: its caches live on the device.
#pragma once

#include <string>

#include "thriftattn/attention.h"

namespace thriftattn::cuda {

// Why the CUDA backend will not serve `problem`; empty where it will.
std::string refusal(const Problem& problem, const Machine& machine);

// Fills in kernel, target, tile, splits and workspace of a plan for a problem that it serves.
void plan(const Machine& machine, Plan& plan);

}  // namespace thriftattn::cuda
