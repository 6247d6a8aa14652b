// Which method each layer and KV head runs, where one does not fit all.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "thriftattn/cache.h"
#include "thriftattn/method.h"
#include "thriftattn/status.h"

namespace thriftattn::model {

struct Schedule {
  int layers = 1, h_kv = 1;
  std::vector<Method> methods;  // distinct, in the order of their first (layer, KV head)
  std::vector<int> index;       // [layers, h_kv], into `methods`

  // The same method everywhere.
  static Schedule uniform(const Method& method, int layers, int h_kv);

  // A JSON object for a model of `layers` layers of `h_kv` KV heads:
  //   {"default": "thrift", "rules": [{"layers": "0-1", "method": "fp16"},
  //                                   {"layers": [5, "7-9"], "kv_heads": 0, "method": "thrift:budget=0.1"}]}
  // Layers and heads are a number, a range "first-last" or a list of those, and all where they are not given; a later
  // rule wins over an earlier one. Errors name `source`, the rule (counted from 0) and the value: unknown keys, layers
  // or heads that the model does not have, methods that parse_method refuses.
  static Result<Schedule> parse(std::string_view json, const std::string& source, int layers, int h_kv);
  static Result<Schedule> load(const std::string& path, int layers, int h_kv);

  const Method& at(int layer, int kv_head) const { return methods[index[layer * h_kv + kv_head]]; }

  // The KV heads of one layer, ascending, that run one method. Every head of the layer is in exactly one group.
  struct Group {
    Method method;
    std::vector<int> kv_heads;
  };
  std::vector<Group> groups(int layer) const;

  // What the cache must keep for all of them: storage by head where it differs, summaries and 16-bit pages of every
  // method. Methods that store FP4 must agree in format, scales, centring and page_scale; the error names two that do
  // not.
  Result<CacheConfig> cache_config(int d, int d_v) const;

  bool operator==(const Schedule&) const = default;
};

// One line: the method where there is one, else all of them and which one each layer's KV heads run:
// "thrift | fp16: 0,0 0,1 1,1".
std::string to_string(const Schedule& schedule);

}  // namespace thriftattn::model
