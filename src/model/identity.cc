#include "model/identity.h"

#include <fmt/format.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <filesystem>
#include <string_view>

#include "model/json_file.h"
#include "model/weights.h"

namespace thriftattn::model {

Result<std::string> identity(const Model& model) {
  constexpr int64_t kWhole = int64_t{64} << 10, kPieces = 16, kPiece = int64_t{4} << 10;
  const auto& tensors = model.weights().files.tensors();
  const std::filesystem::path folder = std::filesystem::path(tensors.begin()->second.file).parent_path();
  THRIFTATTN_ASSIGN_OR_RETURN(config, read_file((folder / "config.json").string()));

  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  const auto add = [&state](const void* bytes, int64_t n) {
    XXH3_64bits_update(&state, bytes, static_cast<size_t>(n));
  };
  const auto add_text = [&add](std::string_view text) { add(text.data(), std::ssize(text)); };
  add_text(config);
  for (const auto& [name, tensor] : tensors) {
    add_text(fmt::format("\n{} {} {}\n", name, tensor.dtype_name, shape_to_string(tensor.shape)));
    if (tensor.bytes <= kWhole) {
      add(tensor.data, tensor.bytes);
      continue;
    }
    for (int64_t i = 0; i < kPieces; ++i)  // the first piece begins and the last one ends with the tensor
      add(tensor.data + (tensor.bytes - kPiece) * i / (kPieces - 1), kPiece);
  }
  return fmt::format("{:016x}", XXH3_64bits_digest(&state));
}

}  // namespace thriftattn::model
