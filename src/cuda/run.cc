// One call of attention on a GPU: checks what the host can know, builds the kernels' parameters and launches them.
//
//   decode, nothing to rank           attend
//   decode, policy that ranks first   rank -> attend
//   decode, fp4_mass                  attend (masses, states) -> choose -> exchange
//     where the rest is not FP4       attend (masses) -> choose -> attend
//   prefill                           rank -> expand -> attend
//
// Everything is asynchronous on the caller's stream; lengths, block tables and choices stay on the device.
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "attention/backends.h"
#include "cuda/state.h"
#include "cuda/workspace.h"

namespace thriftattn::cuda {

Workspace::Workspace(std::unique_ptr<State> state) : state_(std::move(state)) {}
Workspace::Workspace(Workspace&&) noexcept = default;
Workspace& Workspace::operator=(Workspace&&) noexcept = default;
Workspace::~Workspace() = default;
int64_t Workspace::bytes() const { return state_->memory.bytes(); }

Result<Workspace> Workspace::create(const Plan& plan, int device) {
  if (plan.backend != "cuda")
    return invalid_argument(
        fmt::format("the plan is for backend '{}': thriftattn::Workspace serves the CPU's", plan.backend));
  THRIFTATTN_ASSIGN_OR_RETURN(all, gpus());
  if (device < 0 || device >= std::ssize(all))
    return not_found(fmt::format("GPU {} does not exist: there are {}", device, all.size()));
  Gpu gpu = all[static_cast<size_t>(device)];
  const Problem& p = plan.problem;
  if (const std::string target = fmt::format("sm_{}", gpu.compute_capability); target != plan.target)
    return invalid_argument(fmt::format("the plan is for {}, GPU {} is {}", plan.target, device, target));
  auto state = std::make_unique<State>();
  state->plan = plan;
  state->device = device;
  int64_t scratch_bytes = 0;
  if (p.phase == Phase::prefill) {
    scratch_bytes = prefill_scratch_bytes(p, gpu);
  } else {
    gpu.multiprocessors = plan.splits;
    state->config = decode_config(p, gpu);
  }
  state->at = workspace_layout(p, state->config, scratch_bytes);
  THRIFTATTN_ASSIGN_OR_RETURN(memory, DeviceMemory::take(state->at.bytes, device, "a workspace"));
  state->memory = std::move(memory);
  const CurrentDevice current(device);
  THRIFTATTN_RETURN_IF_ERROR(
      check(cudaMemset(state->memory.data(), 0, static_cast<size_t>(state->at.bytes)), "cudaMemset"));
  THRIFTATTN_RETURN_IF_ERROR(check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
  return Workspace(std::move(state));
}

namespace {

Status check_shape(const char* name, const auto& x, int64_t rows, int heads, int channels) {
  if (x.tokens == rows && x.heads == heads && x.channels == channels && (rows == 0 || x.data)) return {};
  return invalid_argument(fmt::format("{} is [{}, {}, {}]{}, expected [{}, {}, {}]", name, x.tokens, x.heads,
                                      x.channels, x.data ? "" : " without memory", rows, heads, channels));
}

Status check_args(const Workspace::State& w, const Plan& plan, const AttendArgs& a) {
  const Problem& p = plan.problem;
  THRIFTATTN_RETURN_IF_ERROR(check_call(w, plan, a.cache));
  const CacheConfig& c = a.cache->config();
  if (a.layer < 0 || a.layer >= c.layers)
    return invalid_argument(fmt::format("layer {} does not exist: the cache has {}", a.layer, c.layers));
  const int64_t rows = a.cache->state().rows;
  THRIFTATTN_RETURN_IF_ERROR(check_shape("q", a.q, rows, p.h_q, p.d));
  return check_shape("out", a.out, rows, p.h_q, p.d_v);
}

// One call's parameters and launches.
class Launch {
 public:
  Launch(const Plan& plan, Workspace::State& w, const AttendArgs& a, cudaStream_t stream)
      : p_(plan.problem), w_(w), a_(a), stream_(stream) {
    const Cache::State& cache = a.cache->state();
    layer_ = cache.layer(a.layer);
    batch_ = cache.batch();
    shape_ = {p_.h_q,    p_.h_kv,   p_.h_q / p_.h_kv, p_.d,       p_.d_v,        static_cast<int>(p_.max_s_q),
              p_.causal, p_.window, p_.sm_scale,      p_.softcap, p_.method.rest};
    q_ = {a.q.data, a.q.dtype, a.q.token_stride, a.q.head_stride};
    out_ = {a.out.data, a.out.dtype, a.out.token_stride, a.out.head_stride};
  }

  Status decode() {
    if (w_.given) return attend(decode_params(Promote::listed));
    if (!promotes(p_.method)) return attend(decode_params(Promote::none));
    if (!ranks(p_.method)) return attend(decode_params(Promote::forced));
    const RankParams rank = rank_params();
    const bool by_mass = p_.method.policy == Policy::fp4_mass;
    if (!by_mass || p_.method.budget.kind == Budget::Kind::tolerance)
      THRIFTATTN_RETURN_IF_ERROR(check(launch_rank(rank, stream_), "launch_rank"));
    DecodeParams chosen = decode_params(Promote::listed);
    if (!by_mass) return attend(chosen);

    DecodeParams first = decode_params(Promote::forced);
    first.shape.rest = Tier::fp4;
    keep_states(first);
    THRIFTATTN_RETURN_IF_ERROR(attend(first));
    const MassParams mass{rank, first.state_ml, first.page_mass, first.mass_parts};
    THRIFTATTN_RETURN_IF_ERROR(check(launch_choose_by_mass(mass, stream_), "launch_choose_by_mass"));
    if (!exchanges(p_)) return attend(chosen);
    keep_states(chosen);
    THRIFTATTN_RETURN_IF_ERROR(check(launch_exchange(chosen, w_.config, stream_), "launch_exchange"));
    // The masses are those of the first reading: with the promoted pages in their tier they take another one.
    return p_.stats ? attend(chosen) : Status();
  }

  Status prefill() {
    const PrefillParams params = prefill_params();
    if (!w_.given) THRIFTATTN_RETURN_IF_ERROR(check(launch_rank_prefill(params, stream_), "rank_prefill"));
    THRIFTATTN_RETURN_IF_ERROR(check(launch_expand(params, stream_), "expand"));
    return check(launch_prefill(params, stream_), "prefill");
  }

  // What stats() reads besides what the kernels leave: the caller's q, and lse, which goes to the caller from here.
  Status keep_for_stats() const {
    if (!p_.stats || a_.q.tokens == 0) return {};
    const size_t rows = static_cast<size_t>(a_.q.tokens), width = static_cast<size_t>(p_.d * size_of(a_.q.dtype));
    if (a_.lse)
      THRIFTATTN_RETURN_IF_ERROR(check(
          cudaMemcpyAsync(a_.lse, w_.pointer<float>(w_.at.lse), rows * p_.h_q * 4, cudaMemcpyDeviceToDevice, stream_),
          "cudaMemcpyAsync of lse"));
    uint8_t* to = w_.pointer<uint8_t>(w_.at.q);
    const auto pitch = static_cast<size_t>(a_.q.token_stride * size_of(a_.q.dtype));
    for (int h = 0; h < p_.h_q; ++h, to += rows * width)
      THRIFTATTN_RETURN_IF_ERROR(check(cudaMemcpy2DAsync(to, width, a_.q.at(0, h), std::max(pitch, width), width, rows,
                                                         cudaMemcpyDeviceToDevice, stream_),
                                       "cudaMemcpy2DAsync of q"));
    w_.q_dtype = a_.q.dtype;
    w_.layer = a_.layer;
    return {};
  }

 private:
  RankParams rank_params() const {
    RankParams r{};
    r.cache = layer_;
    r.batch = batch_;
    r.shape = shape_;
    r.q = q_;
    r.method = p_.method;
    r.row_stride = row_stride(p_);
    r.score = w_.pointer<float>(w_.at.score);
    r.q_norm = w_.pointer<float>(w_.at.q_norm);
    r.lists = w_.lists();
    r.lists.promoted_alone = exchanges(p_) && !p_.stats;  // whose masses take another attend
    return r;
  }

  Status attend(const DecodeParams& params) const {
    if (params.page_mass && params.mass_parts == 8)  // of what is not read nothing is written: NaN
      THRIFTATTN_RETURN_IF_ERROR(check(
          cudaMemsetAsync(params.page_mass, 0xff, static_cast<size_t>(w_.at.mass_bytes), stream_), "cudaMemsetAsync"));
    return check(launch_attend(params, w_.config, stream_), "launch_attend");
  }

  DecodeParams decode_params(Promote promote) const {
    DecodeParams d{};
    d.cache = layer_;
    d.batch = batch_;
    d.shape = shape_;
    d.q = q_;
    d.out = out_;
    d.lse = p_.stats ? w_.pointer<float>(w_.at.lse) : a_.lse;
    d.sinks = a_.sinks;
    d.promote = promote;
    d.force = p_.method.force;
    d.lists = w_.lists();
    d.row_stride = row_stride(p_);
    d.mass_parts = mass_parts(p_);
    if (p_.stats) {
      d.page_mass = w_.pointer<float>(w_.at.page_mass);
      d.row_mass_high = w_.pointer<float>(w_.at.row_mass_high);
    }
    d.partials = w_.pointer<void>(w_.at.partials);
    d.tickets = w_.pointer<int32_t>(w_.at.tickets);
    return d;
  }

  // A reading that leaves masses and states, or an exchange.
  void keep_states(DecodeParams& d) const {
    d.page_mass = w_.pointer<float>(w_.at.page_mass);
    d.state_ml = w_.pointer<float>(w_.at.state_ml);
    d.state_o = w_.pointer<float>(w_.at.state_o);
  }

  PrefillParams prefill_params() const {
    PrefillParams f{};
    f.cache = layer_;
    f.batch = batch_;
    f.shape = shape_;
    f.method = p_.method;
    f.q = q_;
    f.out = out_;
    f.lse = a_.lse;
    f.sinks = a_.sinks;
    f.max_blocks = max_blocks(p_);
    f.tiers = w_.pointer<uint32_t>(w_.at.tiers);
    f.tier_words = tier_words(p_);
    f.tiers_given = w_.given;
    f.counts = w_.pointer<int32_t>(w_.at.block_counts);
    f.high_room = prefill_high_room(p_);
    f.scratch = w_.pointer<void>(w_.at.scratch);
    return f;
  }

  const Problem& p_;
  Workspace::State& w_;
  const AttendArgs& a_;
  const cudaStream_t stream_;
  LayerCache layer_;
  Batch batch_;
  Shape shape_;
  Rows<const void*> q_;
  Rows<void*> out_;
};

}  // namespace

Status check_call(const Workspace::State& w, const Plan& plan, const Cache* cache) {
  const Problem& p = plan.problem;
  if (!sizes_alike(plan, w.plan))
    return invalid_argument(
        fmt::format("the workspace was made for another plan: {}, not {}", to_string(w.plan), to_string(plan)));
  if (!cache) return invalid_argument("no cache is given");
  if (cache->device() != w.device)
    return invalid_argument(fmt::format("the cache is on GPU {}, the workspace on GPU {}", cache->device(), w.device));
  if (!pages_alike(cache->config(), p.cache))
    return invalid_argument("the cache is not of the configuration that the plan was made for");
  // Lengths are known to the device alone: the plan must serve whatever the cache can hold.
  if (cache->size().max_tokens > p.max_s_kv)
    return invalid_argument(fmt::format("a sequence of the cache may hold {} tokens, the plan serves up to {}",
                                        cache->size().max_tokens, p.max_s_kv));
  const std::vector<int64_t>& s_q = cache->state().s_q;
  if (std::ssize(s_q) > p.b)
    return invalid_argument(fmt::format("a batch of {} sequences does not fit a plan for {}", s_q.size(), p.b));
  for (const SeqId seq : cache->state().seqs)
    if (!cache->state().has(seq)) return unknown(seq);  // freed since it was put into the batch
  for (size_t i = 0; i < s_q.size(); ++i)
    if (s_q[i] > p.max_s_q)
      return invalid_argument(
          fmt::format("s_q {} of sequence {} is out of the plan's range [0, {}]", s_q[i], i, p.max_s_q));
  return {};
}

Status run(const Plan& plan, Workspace& workspace, const AttendArgs& args, Stream stream) {
  Workspace::State& w = workspace.state();
  THRIFTATTN_RETURN_IF_ERROR(check_args(w, plan, args));
  if (args.cache->state().s_q.empty()) return {};
  const CurrentDevice current(w.device);
  Launch launch(plan, w, args, static_cast<cudaStream_t>(stream));
  if (plan.problem.phase == Phase::prefill) return launch.prefill();
  THRIFTATTN_RETURN_IF_ERROR(launch.decode());
  return launch.keep_for_stats();
}

}  // namespace thriftattn::cuda
