// A mixture of experts in an MLP's place: a router sends every token to a few of many small MLPs.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "model/linear.h"
#include "thriftattn/status.h"
#include "thriftattn/threads.h"

namespace thriftattn::model {

struct Expert {
  Linear gate_up;  // hidden -> 2*intermediate, gate and up of a channel side by side
  Linear down;     // intermediate -> hidden
};

struct Experts {
  Linear router;  // hidden -> experts
  std::vector<Expert> all;
};

// y = the sum, over the experts_per_token experts that the router scores highest (the lower index of equals), of what
// the expert makes of x times its share: the softmax of those scores. x, y: [rows, hidden].
Status apply(const Experts& experts, const ModelConfig& config, const float* x, int64_t rows, float* y,
             ThreadPool& pool);

}  // namespace thriftattn::model
