#include "model/normalizer.h"

#include <fmt/format.h>

#include "model/unicode.h"

namespace thriftattn::model {

Result<Normalizer> Normalizer::parse(const Json& json, const std::string& source) {
  Normalizer out;
  for (const Json* step : steps_of(json, "normalizers")) {
    const Json &type = member(*step, "type"), &from = member(member(*step, "pattern"), "String"),
               &to = member(*step, "content"), &prefix = member(*step, "prepend");
    if (type == "NFC") {
      out.steps_.push_back({Step::Kind::nfc, {}, {}});
    } else if (type == "Prepend" && prefix.is_string()) {
      out.steps_.push_back({Step::Kind::prepend, {}, prefix.get<std::string>()});
    } else if (type == "Replace" && from.is_string() && from != "" && to.is_string()) {
      out.steps_.push_back({Step::Kind::replace, from.get<std::string>(), to.get<std::string>()});
    } else {
      return unsupported(
          fmt::format("{}: normalizer {} is not supported: NFC, Prepend and Replace of a string are, and a sequence of "
                      "them",
                      source, shown(*step)));
    }
  }
  return out;
}

std::string_view Normalizer::apply(std::string_view text, std::string* storage) const {
  for (const Step& step : steps_) {
    if (text.empty()) break;
    switch (step.kind) {
      case Step::Kind::nfc:
        *storage = nfc(text);
        break;
      case Step::Kind::prepend:
        *storage = step.to + std::string(text);
        break;
      case Step::Kind::replace:
        *storage = replaced(text, step.from, step.to);
        break;
    }
    text = *storage;
  }
  return text;
}

}  // namespace thriftattn::model
