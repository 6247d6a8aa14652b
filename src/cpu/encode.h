// Appending to pages, as one table of functions per instruction set. encode.cc holds the single generic body.
#pragma once

#include <string>

#include "format/page_codec.h"

namespace thriftattn::cpu {

struct Encoder {
  const char* target;
  bool (*append_rows)(const PageAppend& append);
};

// The table of one target of targets(); null for any other name.
const Encoder* encoder_for(const std::string& target);

}  // namespace thriftattn::cpu
