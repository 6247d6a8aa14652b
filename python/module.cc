// The module thriftattn._core: what Python sees of the library. Docstrings are the reference; signatures are what the
// stubs show.
#include <fmt/format.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>

#include "cache.h"
#include "codes.h"
#include "docs.h"
#include "tensors.h"
#include "thriftattn/attention.h"

namespace thriftattn::python {
namespace {

using namespace nb::literals;  // NOLINT: the names of arguments

template <class T>
T word(const char* name, const std::string& given, const std::map<std::string, T>& known) {
  const auto found = known.find(given);
  if (found != known.end()) return found->second;
  std::string words;
  for (const auto& [w, _] : known) words += (words.empty() ? "" : ", ") + w;
  throw nb::value_error(fmt::format("{} '{}' is not known: {} are", name, given, words).c_str());
}

Phase phase_of(const std::string& w) {
  return word<Phase>("phase", w, {{"prefill", Phase::prefill}, {"decode", Phase::decode}});
}
DType compute_of(const std::string& w) {
  return word<DType>("compute", w, {{"float32", DType::f32}, {"bfloat16", DType::bf16}});
}
Fp4Format format_of(const std::string& w) {
  return word<Fp4Format>("format", w, {{"nvfp4", Fp4Format::nvfp4}, {"mxfp4", Fp4Format::mxfp4}});
}
Scales scales_of(const std::string& w) {
  return word<Scales>("scales", w, {{"6", Scales::six}, {"4over6", Scales::four_over_six}});
}
Method method_of(const std::string& spec) { return value_or_raise(parse_method(spec)); }

// A cache's own method, or the words for another.
Method method_of(nb::handle spec, const Cache& cache) {
  if (spec.is_none()) return cache.method();
  std::string words;
  if (!nb::try_cast(spec, words)) throw nb::type_error("method is a str, or None");
  return method_of(words);
}

std::string path_of(nb::handle path) {
  const auto bytes = nb::cast<nb::bytes>(nb::module_::import_("os").attr("fsencode")(path));
  return std::string(bytes.c_str(), bytes.size());
}

using Scale = std::optional<float>;  // none: the problem's own

// As a problem has it, where 0 is the default.
float scale_of(Scale sm_scale) {
  if (sm_scale == 0.0f) throw nb::value_error("sm_scale is 0, which makes all scores equal: None is 1 / sqrt(d)");
  return sm_scale.value_or(0);
}

Form form_of(const std::string& phase, bool causal, int64_t window, Scale sm_scale, float softcap,
             const std::string& compute) {
  return {phase_of(phase), causal, window, scale_of(sm_scale), softcap, compute_of(compute)};
}

// A NumPy array that owns a copy of `values`.
template <class T>
nb::object array_of(const std::vector<T>& values, std::vector<size_t> shape = {}) {
  if (shape.empty()) shape = {values.size()};
  Output out(shape, nb::dtype<T>());
  std::copy(values.begin(), values.end(), out.data<T>());
  return out.release();
}

// Keys and values in a cache of their own, of one layer, where they are.
struct Held {
  Cache cache;
  std::vector<SeqId> seqs;

  Held(const Method& method, nb::handle q, nb::handle k, nb::handle v, nb::handle stream)
      : cache(empty(method, q, k, v)) {
    seqs = cache.new_sequences(tensor(k, "k").size(0));
    cache.append(seqs, 0, k, v, stream);
  }

 private:
  static Cache empty(const Method& method, nb::handle q, nb::handle k, nb::handle v) {
    const Tensor queries = tensor(q, "q", {"b", "s_q", "h_q", "d"}), keys = tensor(k, "k", {"b", "s_kv", "h_kv", "d"}),
                 values = tensor(v, "v", {"b", "s_kv", "h_kv", "d_v"});
    check_device(queries, "q", "k", keys.device);
    check_device(values, "v", "k", keys.device);
    for (const auto& [name, axis, a, b] : {std::tuple{"q and k differ in b", 0, &queries, &keys},
                                           {"k and v differ in b", 0, &keys, &values},
                                           {"k and v differ in s_kv", 1, &keys, &values},
                                           {"k and v differ in h_kv", 2, &keys, &values},
                                           {"q and k differ in d", 3, &queries, &keys}})
      if (a->size(axis) != b->size(axis))
        throw nb::value_error(fmt::format("{}: {} and {}", name, a->size(axis), b->size(axis)).c_str());
    const auto config = CacheConfig::for_method(method, 1, static_cast<int>(keys.size(2)),
                                                static_cast<int>(keys.size(3)), static_cast<int>(values.size(3)));
    const int64_t s_kv = std::max<int64_t>(1, keys.size(1)), rows = std::max(s_kv, queries.size(1));
    return Cache(method, config, keys.device, {static_cast<int>(std::max<int64_t>(1, keys.size(0))), s_kv, rows});
  }
};

nb::object attention(nb::handle q, nb::handle k, nb::handle v, bool causal, const std::string& method,
                     const std::string& phase, int64_t window, Scale sm_scale, float softcap, nb::handle sinks,
                     const std::string& compute, const Selection* given, nb::handle out, bool return_lse, bool stats,
                     nb::handle stream) {
  const Method m = method_of(method);
  const Form form = form_of(phase, causal, window, sm_scale, softcap, compute);
  Held held(m, q, k, v, stream);
  nb::object result = held.cache.attend(held.seqs, 0, form, m, q, {sinks, given, out, return_lse, stats, stream});
  check(in_turn([&] { return held.cache.store().check_appended(); }));
  return result;
}

Selection select(nb::handle q, nb::handle k, nb::handle v, bool causal, const std::string& method,
                 const std::string& phase, int64_t window, Scale sm_scale, float softcap, nb::handle stream) {
  const Method m = method_of(method);
  const Form form = form_of(phase, causal, window, sm_scale, softcap, "float32");
  Held held(m, q, k, v, stream);
  return held.cache.select(held.seqs, 0, form, m, q, stream);
}

Plan plan_of(const std::string& method, const std::string& phase, int b, int64_t s_q, int64_t s_kv, int h_q, int h_kv,
             int d, int d_v, bool causal, int64_t window, Scale sm_scale, float softcap, bool stats,
             const std::string& compute, int threads, const std::string& device) {
  Problem p;
  p.phase = phase_of(phase);
  p.b = b;
  p.max_s_q = s_q != 0 ? s_q : p.phase == Phase::decode ? 1 : s_kv;
  p.max_s_kv = s_kv;
  p.h_q = h_q;
  p.h_kv = h_kv;
  p.d = d;
  p.d_v = d_v != 0 ? d_v : d;
  p.causal = causal;
  p.window = window;
  p.sm_scale = scale_of(sm_scale);
  p.softcap = softcap;
  p.method = method_of(method);
  p.cache = CacheConfig::for_method(p.method, 1, h_kv, p.d, p.d_v);
  p.stats = stats;
  p.compute = compute_of(compute);
  const Device on = device_of(device);
  return value_or_raise(
      plan(p, on.is_cpu() ? Machine::here(threads > 0 ? threads : python::threads()) : machine_of(on)));
}

// The names of the GPUs, by index; none in a build without CUDA and where there is no driver.
std::vector<std::string> gpu_names() {
  std::vector<std::string> names;
  if (const auto all = in_turn([] { return cuda::gpus(); }); all.ok())
    for (const Gpu& gpu : all.value()) names.push_back(gpu.name);
  return names;
}

void bind_results(nb::module_& m) {
  nb::class_<Selection>(
      m, "Selection",
      "Pages promoted for every query block of a call. Blocks stand in the order sequence, head (query "
      "heads in prefill, KV heads in decode), block of 64 rows; pages ascend within a block, and all "
      "others are read in the method's rest.")
      .def(
          "__init__",
          [](Selection* s, std::vector<int64_t> offsets, const std::vector<int32_t>& pages,
             const std::vector<int>& tiers) {
            if (pages.size() != tiers.size())
              throw nb::value_error(
                  fmt::format("{} pages and {} tiers do not fit", pages.size(), tiers.size()).c_str());
            new (s) Selection{std::move(offsets), {}};
            for (size_t i = 0; i < pages.size(); ++i) {
              if (tiers[i] < 0 || tiers[i] > static_cast<int>(Tier::fp16))
                throw nb::value_error(fmt::format("tier {} does not exist: 0 to 3 do", tiers[i]).c_str());
              s->pages.push_back({pages[i], static_cast<Tier>(tiers[i])});
            }
          },
          "offsets"_a, "pages"_a, "tiers"_a,
          nb::sig("def __init__(self, offsets: collections.abc.Sequence[int], pages: collections.abc.Sequence[int], "
                  "tiers: collections.abc.Sequence[int]) -> None"),
          "From the three lists that the properties of the same names describe.")
      .def_prop_ro(
          "offsets", [](const Selection& s) { return array_of(s.first); },
          nb::sig("def offsets(self) -> numpy.ndarray"),
          "int64 [blocks + 1]: pages[offsets[i]:offsets[i + 1]] are those of block i.")
      .def_prop_ro(
          "pages",
          [](const Selection& s) {
            std::vector<int32_t> pages;
            for (const Promoted& p : s.pages) pages.push_back(p.page);
            return array_of(pages);
          },
          nb::sig("def pages(self) -> numpy.ndarray"), "int32 [promoted]: page 0 holds tokens 0 to 63.")
      .def_prop_ro(
          "tiers",
          [](const Selection& s) {
            std::vector<uint8_t> tiers;
            for (const Promoted& p : s.pages) tiers.push_back(static_cast<uint8_t>(p.tier));
            return array_of(tiers);
          },
          nb::sig("def tiers(self) -> numpy.ndarray"), "uint8 [promoted]: 0 none, 1 fp4, 2 fp4x2, 3 fp16.");

  nb::class_<CallStats>(m, "Stats",
                        "What a call did. Pairs are (query block, full page, query head) triples that a block can see.")
      .def_ro("pairs", &Stats::pairs, "Pairs there were.")
      .def_ro("promoted", &Stats::promoted, "Pairs read above the method's rest.")
      .def_ro("wanted_not_stored", &Stats::wanted_not_stored,
              "Promotions that the policy asked for and the storage could not serve.")
      .def_ro("mass_above_fp4", &Stats::mass_above_fp4,
              "Softmax mass read in a tier above fp4, in [0, 1], mean over rows and heads.")
      .def_ro("error_estimate", &Stats::error_estimate,
              "Estimated error of a row of `out`, from the pages' stored residual norms; mean over blocks and heads.")
      .def_ro("selection", &Stats::selection, "What was promoted.")
      .def_prop_ro(
          "page_mass",
          [](const CallStats& s) {
            return array_of(s.page_mass,
                            {static_cast<size_t>(s.b), static_cast<size_t>(s.h_kv), static_cast<size_t>(s.pages)});
          },
          nb::sig("def page_mass(self) -> numpy.ndarray"),
          "float32 [b, h_kv, pages]: softmax mass by page, mean over rows and query heads; pages beyond a sequence "
          "have none.")
      .def("__repr__", [](const CallStats& s) {
        return fmt::format(
            "Stats(pairs={}, promoted={}, wanted_not_stored={}, mass_above_fp4={:.4f}, "
            "error_estimate={:.3g})",
            s.pairs, s.promoted, s.wanted_not_stored, s.mass_above_fp4, s.error_estimate);
      });

  nb::class_<Plan>(m, "Plan", "What will run a problem. str() gives it in one line.")
      .def_ro("backend", &Plan::backend, "\"cpu\" or \"cuda\".")
      .def_ro("kernel", &Plan::kernel, "Such as \"decode_exchange\".")
      .def_ro("target", &Plan::target, "The instruction set, such as \"AVX3\" or \"sm_90\".")
      .def_ro("rows_per_tile", &Plan::rows_per_tile, "Query rows of one tile.")
      .def_ro("splits", &Plan::splits, "Page ranges into which one (sequence, KV head) of a decode step is cut.")
      .def_ro("threads", &Plan::threads, "Threads it is for.")
      .def_ro("workspace_bytes", &Plan::workspace_bytes, "Scratch memory of a call.")
      .def_prop_ro(
          "refused",
          [](const Plan& p) {
            std::vector<std::pair<std::string, std::string>> all;
            for (const Refusal& r : p.refused) all.emplace_back(r.backend, r.reason);
            return all;
          },
          "(backend or instruction set, reason) of each one passed over.")
      .def("__str__", [](const Plan& p) { return to_string(p); });

  nb::class_<MemoryUse>(m, "MemoryUse", "Bytes of a cache by what they hold; a page that forks share counts once.")
      .def_ro("codes", &MemoryUse::codes, "FP4 codes and scales, first plane.")
      .def_ro("residual", &MemoryUse::residual, "FP4 codes and scales, second plane.")
      .def_ro("high", &MemoryUse::high, "16-bit pages, tails included.")
      .def_ro("summaries", &MemoryUse::summaries, "Means, bounds, variances, page scales, residual norms.")
      .def_ro("tables", &MemoryUse::tables, "Block tables and form tables.")
      .def_prop_ro("total", &MemoryUse::total, "All of them.")
      .def("__repr__", [](const MemoryUse& u) {
        return fmt::format("MemoryUse(codes={}, residual={}, high={}, summaries={}, tables={}, total={})", u.codes,
                           u.residual, u.high, u.summaries, u.tables, u.total());
      });
}

void bind_cache(nb::module_& m) {
  using Seqs = std::vector<SeqId>;
  nb::class_<Cache>(m, "KvCache", nb::is_weak_referenceable(), docs::kCache)
      .def(
          "__init__",
          [](Cache* self, const std::string& method, int h_kv, int d, int d_v, int layers, const std::string& dtype,
             int64_t max_bytes, const std::string& device, int max_sequences, int64_t max_tokens, int64_t max_step) {
            const Method parsed = method_of(method);
            CacheConfig config = CacheConfig::for_method(parsed, layers, h_kv, d, d_v > 0 ? d_v : d);
            config.high_dtype = word<DType>("dtype", dtype, {{"float16", DType::f16}, {"bfloat16", DType::bf16}});
            config.max_bytes = max_bytes;
            new (self) Cache(parsed, config, device_of(device), {max_sequences, max_tokens, max_step});
          },
          "method"_a, nb::kw_only(), "h_kv"_a, "d"_a, "d_v"_a = 0, "layers"_a = 1, "dtype"_a = "float16",
          "max_bytes"_a = 0, "device"_a = "cpu", "max_sequences"_a = 0, "max_tokens"_a = 0, "max_step"_a = 0,
          docs::kCacheInit)
      .def_prop_ro(
          "device", [](const Cache& c) { return to_string(c.device()); }, "\"cpu\", or \"cuda:0\" and so on.")
      .def_prop_ro(
          "method", [](const Cache& c) { return to_string(c.method()); }, "The method, in its shortest words.")
      .def_prop_ro(
          "layers", [](const Cache& c) { return c.config().layers; }, "Layers.")
      .def_prop_ro(
          "h_kv", [](const Cache& c) { return c.config().h_kv; }, "KV heads.")
      .def_prop_ro(
          "d", [](const Cache& c) { return c.config().d; }, "Channels of a key head.")
      .def_prop_ro(
          "d_v", [](const Cache& c) { return c.config().d_v; }, "Channels of a value head.")
      .def(
          "new_sequence", [](Cache& c) { return c.new_sequences(1)[0]; }, "A new, empty sequence.")
      .def(
          "append",
          [](Cache& c, const Seqs& seqs, nb::handle k, nb::handle v, int layer, nb::handle stream) {
            c.append(seqs, layer, k, v, stream);
          },
          "seqs"_a, "k"_a, "v"_a, nb::kw_only(), "layer"_a = 0, "stream"_a = nb::none(),
          nb::sig("def append(self, seqs: collections.abc.Sequence[int], k: Tensor, v: Tensor, *, layer: int = 0, "
                  "stream: typing.Any = None) -> None"),
          docs::kAppend)
      .def(
          "attend",
          [](Cache& c, const Seqs& seqs, nb::handle q, int layer, const std::string& phase, bool causal, int64_t window,
             Scale sm_scale, float softcap, nb::handle sinks, const std::string& compute, nb::handle method,
             const Selection* given, nb::handle out, bool return_lse, bool stats, nb::handle stream) {
            return c.attend(seqs, layer, form_of(phase, causal, window, sm_scale, softcap, compute),
                            method_of(method, c), q, {sinks, given, out, return_lse, stats, stream});
          },
          "seqs"_a, "q"_a, nb::kw_only(), "layer"_a = 0, "phase"_a = "decode", "causal"_a = true, "window"_a = 0,
          "sm_scale"_a = nb::none(), "softcap"_a = 0.0f, "sinks"_a = nb::none(), "compute"_a = "float32",
          "method"_a = nb::none(), "given"_a.none() = nb::none(), "out"_a = nb::none(), "return_lse"_a = false,
          "stats"_a = false, "stream"_a = nb::none(),
          nb::sig(
              "def attend(self, seqs: collections.abc.Sequence[int], q: Tensor, *, layer: int = 0, phase: str = "
              "'decode', causal: bool = True, window: int = 0, sm_scale: float | None = None, softcap: float = 0.0, "
              "sinks: Tensor | None = None, compute: str = 'float32', method: str | None = None, given: Selection | "
              "None = None, out: Tensor | None = None, return_lse: bool = False, stats: bool = False, stream: "
              "typing.Any = None) -> typing.Any"),
          docs::kAttend)
      .def(
          "select",
          [](Cache& c, const Seqs& seqs, nb::handle q, int layer, const std::string& phase, bool causal, int64_t window,
             Scale sm_scale, float softcap, nb::handle method, nb::handle stream) {
            return c.select(seqs, layer, form_of(phase, causal, window, sm_scale, softcap, "float32"),
                            method_of(method, c), q, stream);
          },
          "seqs"_a, "q"_a, nb::kw_only(), "layer"_a = 0, "phase"_a = "decode", "causal"_a = true, "window"_a = 0,
          "sm_scale"_a = nb::none(), "softcap"_a = 0.0f, "method"_a = nb::none(), "stream"_a = nb::none(),
          nb::sig("def select(self, seqs: collections.abc.Sequence[int], q: Tensor, *, layer: int = 0, phase: str = "
                  "'decode', causal: bool = True, window: int = 0, sm_scale: float | None = None, softcap: float = "
                  "0.0, method: str | None = None, stream: typing.Any = None) -> Selection"),
          docs::kCacheSelect)
      .def(
          "settle",
          [](Cache& c, const Seqs& seqs, int layer) { check(in_turn([&] { return c.store().settle(seqs, layer); })); },
          "seqs"_a, nb::kw_only(), "layer"_a = 0,
          nb::sig("def settle(self, seqs: collections.abc.Sequence[int], *, layer: int = 0) -> None"),
          "Ends a step without attend(): frees the 16-bit copies of pages that have left the window.")
      .def(
          "fork", [](Cache& c, SeqId seq) { return value_or_raise(in_turn([&] { return c.store().fork(seq); })); },
          "seq"_a,
          "A new sequence that shares the full pages of `seq` and owns a copy of its tail. All layers must be of one "
          "length.")
      .def(
          "truncate",
          [](Cache& c, SeqId seq, int64_t length, bool lossy) {
            check(in_turn([&] { return c.store().truncate(seq, length, lossy); }));
          },
          "seq"_a, "length"_a, nb::kw_only(), "lossy"_a = false, docs::kTruncate)
      .def(
          "free", [](Cache& c, SeqId seq) { check(in_turn([&] { return c.store().free(seq); })); }, "seq"_a,
          "Gives a sequence back.")
      .def(
          "length",
          [](Cache& c, SeqId seq, nb::handle layer) {
            int of = 0;
            if (!layer.is_none() && !nb::try_cast(layer, of)) throw nb::type_error("layer is an int, or None");
            if (of < 0 || of >= c.config().layers)
              throw nb::value_error(
                  fmt::format("layer {} does not exist: the cache has {}", of, c.config().layers).c_str());
            const bool all = layer.is_none();
            const int64_t n = in_turn([&] { return all ? c.store().length(seq) : c.store().length(seq, of); });
            if (n < 0) throw nb::value_error(fmt::format("sequence {} does not exist", seq).c_str());
            return n;
          },
          "seq"_a, nb::kw_only(), "layer"_a = nb::none(),
          nb::sig("def length(self, seq: int, *, layer: int | None = None) -> int"),
          "Tokens that every layer holds, or that one holds.")
      .def(
          "read",
          [](Cache& c, SeqId seq, int layer, int64_t first, int64_t tokens) {
            const CacheConfig& config = c.config();
            if (tokens < 0 || first < 0) throw nb::value_error("first and tokens are not negative");
            const auto n = static_cast<size_t>(tokens), h = static_cast<size_t>(config.h_kv);
            const auto f32 = dlpack_type(DType::f32);
            Output k({n, h, static_cast<size_t>(config.d)}, f32), v({n, h, static_cast<size_t>(config.d_v)}, f32);
            check(in_turn([&] {
              return c.store().read(seq, layer, first, mutable_view(k.data<float>(), tokens, config.h_kv, config.d),
                                    mutable_view(v.data<float>(), tokens, config.h_kv, config.d_v));
            }));
            return nb::make_tuple(k.release(), v.release());
          },
          "seq"_a, nb::kw_only(), "layer"_a = 0, "first"_a = 0, "tokens"_a,
          nb::sig("def read(self, seq: int, *, layer: int = 0, first: int = 0, tokens: int) -> tuple[numpy.ndarray, "
                  "numpy.ndarray]"),
          "(k [tokens, h_kv, d], v [tokens, h_kv, d_v]) in float32, from the best form stored of each page.")
      .def(
          "save",
          [](Cache& c, SeqId seq, nb::handle path, const nb::bytes& metadata) {
            const std::string file = path_of(path);
            const std::string_view bytes(metadata.c_str(), metadata.size());
            check(in_turn([&] { return c.store().save(seq, file, bytes); }));
          },
          "seq"_a, "path"_a, "metadata"_a = nb::bytes(""),
          nb::sig("def save(self, seq: int, path: str | os.PathLike[str], metadata: bytes = b'') -> None"), docs::kSave)
      .def(
          "load",
          [](Cache& c, nb::handle path) {
            const std::string file = path_of(path);
            std::string metadata;
            const Result<SeqId> seq = in_turn([&] { return c.store().load(file, &metadata); });
            if (seq.status().code() == Code::not_found) {
              PyErr_SetString(PyExc_FileNotFoundError, seq.status().message().c_str());
              throw nb::python_error();
            }
            return nb::make_tuple(value_or_raise(seq), nb::bytes(metadata.data(), metadata.size()));
          },
          "path"_a, nb::sig("def load(self, path: str | os.PathLike[str]) -> tuple[int, bytes]"), docs::kLoad)
      .def(
          "bytes", [](Cache& c) { return in_turn([&] { return c.store().bytes(); }); }, "Bytes in use now.")
      .def(
          "peak_bytes", [](Cache& c) { return in_turn([&] { return c.store().peak_bytes(); }); },
          "The largest total so far.")
      .def(
          "reserved_bytes", [](Cache& c) { return in_turn([&] { return c.store().reserved_bytes(); }); },
          "Taken from the system, free records included; on a GPU scratch memory too.")
      .def(
          "check", [](Cache& c) { check(in_turn([&] { return c.store().check_appended(); })); }, docs::kCheck);
}

void bind_functions(nb::module_& m) {
  m.def("attention", attention, "q"_a, "k"_a, "v"_a, nb::kw_only(), "causal"_a = true, "method"_a = "thrift",
        "phase"_a = "prefill", "window"_a = 0, "sm_scale"_a = nb::none(), "softcap"_a = 0.0f, "sinks"_a = nb::none(),
        "compute"_a = "float32", "given"_a.none() = nb::none(), "out"_a = nb::none(), "return_lse"_a = false,
        "stats"_a = false, "stream"_a = nb::none(),
        nb::sig("def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, method: str = 'thrift', phase: "
                "str = 'prefill', window: int = 0, sm_scale: float | None = None, softcap: float = 0.0, sinks: Tensor "
                "| None = None, compute: str = 'float32', given: Selection | None = None, out: Tensor | None = None, "
                "return_lse: bool = False, stats: bool = False, stream: typing.Any = None) -> typing.Any"),
        docs::kAttention);
  m.def(
      "select", select, "q"_a, "k"_a, "v"_a, nb::kw_only(), "causal"_a = true, "method"_a = "thrift",
      "phase"_a = "prefill", "window"_a = 0, "sm_scale"_a = nb::none(), "softcap"_a = 0.0f, "stream"_a = nb::none(),
      nb::sig("def select(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, method: str = 'thrift', phase: str "
              "= 'prefill', window: int = 0, sm_scale: float | None = None, softcap: float = 0.0, stream: typing.Any = "
              "None) -> Selection"),
      docs::kSelect);
  m.def("plan", plan_of, "method"_a = "thrift", nb::kw_only(), "phase"_a = "decode", "b"_a = 1, "s_q"_a = 0, "s_kv"_a,
        "h_q"_a, "h_kv"_a, "d"_a, "d_v"_a = 0, "causal"_a = true, "window"_a = 0, "sm_scale"_a = nb::none(),
        "softcap"_a = 0.0f, "stats"_a = false, "compute"_a = "float32", "threads"_a = 0, "device"_a = "cpu",
        docs::kPlan);
  m.def("gpus", gpu_names,
        "The names of the GPUs, by index: none where this build has no CUDA or the machine no driver.");
  m.def(
      "quantize",
      [](nb::handle x, const std::string& format, const std::string& scales) {
        return quantize(x, format_of(format), scales_of(scales));
      },
      "x"_a, nb::kw_only(), "format"_a = "nvfp4", "scales"_a = "6",
      nb::sig("def quantize(x: Tensor, *, format: str = 'nvfp4', scales: str = '6') -> tuple[typing.Any, typing.Any]"),
      docs::kQuantize);
  m.def(
      "dequantize",
      [](nb::handle codes, nb::handle scales, const std::string& format) {
        return dequantize(codes, scales, format_of(format));
      },
      "codes"_a, "scales"_a, nb::kw_only(), "format"_a = "nvfp4",
      nb::sig("def dequantize(codes: Tensor, scales: Tensor, *, format: str = 'nvfp4') -> typing.Any"),
      docs::kDequantize);
  m.def("methods", method_names, "The names of methods.");
  m.def(
      "method_options",
      [](const std::string& method) {
        nb::dict all;
        for (const auto& [key, value] : options(method_of(method))) all[nb::str(key.c_str())] = value;
        return all;
      },
      "method"_a, nb::sig("def method_options(method: str) -> dict[str, str]"),
      "Every option of a method, in the words that it takes: {\"policy\": \"auto\", \"budget\": \"0.05\", ...}.");
  m.def("set_threads", set_threads, "threads"_a,
        "Sets the threads that every call uses, the caller's among them; 0: the processors that this process may use, "
        "which is the default. Results never depend on it.");
  m.def("threads", threads, "Threads that every call uses.");
}

}  // namespace
}  // namespace thriftattn::python

NB_MODULE(_core, m) {
  m.doc() = "Attention over a paged FP4 key/value cache; import thriftattn instead.";
  m.attr("__version__") = THRIFTATTN_VERSION;
  m.attr("PAGE_TOKENS") = thriftattn::kPageTokens;
  m.attr("MAX_DECODE_ROWS") = thriftattn::kMaxDecodeRows;
  thriftattn::python::bind_results(m);
  thriftattn::python::bind_cache(m);
  thriftattn::python::bind_functions(m);
}
