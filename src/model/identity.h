// Which model this is, so that what one model has computed is not taken for another's.
#pragma once

#include <string>

#include "model/model.h"
#include "thriftattn/status.h"

namespace thriftattn::model {

// 16 hexadecimal digits over the text of config.json and the name, type, shape and bytes of every tensor: all bytes of
// small tensors, 16 pieces of 4 KiB of those beyond 64 KiB. Reads the model's folder again.
Result<std::string> identity(const Model& model);

}  // namespace thriftattn::model
