#include "model/cuda/products.h"

#include <cublasLt.h>
#include <fmt/format.h>

#include <map>
#include <tuple>
#include <utility>

namespace thriftattn::model::gpu {
namespace {

constexpr int64_t kScratchBytes = int64_t{32} << 20;

Status check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return {};
  return Status(status == CUBLAS_STATUS_ALLOC_FAILED ? Code::out_of_memory : Code::unsupported,
                fmt::format("{}: {}", what, cublasLtGetStatusString(status)));
}

using Handle = Owned<cublasLtHandle_t, cublasLtDestroy>;
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

// cuBLASLt counts in columns: y^T [outputs, rows] = W^T' x^T, with W read as [inputs, outputs] and transposed.
struct Kernel {
  Operation operation;
  Layout w, x, y;
  cublasLtMatmulAlgo_t algorithm;
};

}  // namespace

struct Products::State {
  Handle handle;
  DeviceMemory scratch;
  std::map<std::tuple<DType, int64_t, int64_t, int64_t, bool>, Kernel> kernels;

  Result<Kernel> choose(const Matrix& w, int64_t rows) const {
    const cudaDataType_t type = w.type == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
    const auto inputs = static_cast<uint64_t>(w.inputs), outputs = static_cast<uint64_t>(w.outputs);
    const cublasOperation_t transpose = CUBLAS_OP_T;
    const cublasLtEpilogue_t add_bias = CUBLASLT_EPILOGUE_BIAS;
    const auto bytes = static_cast<uint64_t>(kScratchBytes);
    const char* what = "describing a matrix product";
    Kernel k;
    Preference preference;
    THRIFTATTN_RETURN_IF_ERROR(
        check(cublasLtMatmulDescCreate(k.operation.out(), CUBLAS_COMPUTE_32F, CUDA_R_32F), what));
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      return check(cublasLtMatmulDescSetAttribute(k.operation.get(), attribute, &value, sizeof(value)), what);
    };
    THRIFTATTN_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_DESC_TRANSA, transpose));
    if (w.bias) THRIFTATTN_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_DESC_EPILOGUE, add_bias));
    if (w.bias) THRIFTATTN_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, w.bias));
    THRIFTATTN_RETURN_IF_ERROR(check(cublasLtMatrixLayoutCreate(k.w.out(), type, inputs, outputs, w.inputs), what));
    THRIFTATTN_RETURN_IF_ERROR(
        check(cublasLtMatrixLayoutCreate(k.x.out(), type, inputs, static_cast<uint64_t>(rows), w.inputs), what));
    THRIFTATTN_RETURN_IF_ERROR(check(
        cublasLtMatrixLayoutCreate(k.y.out(), CUDA_R_32F, outputs, static_cast<uint64_t>(rows), w.outputs), what));
    THRIFTATTN_RETURN_IF_ERROR(check(cublasLtMatmulPreferenceCreate(preference.out()), what));
    THRIFTATTN_RETURN_IF_ERROR(
        check(cublasLtMatmulPreferenceSetAttribute(preference.get(), CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                   sizeof(bytes)),
              what));
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    const Status status =
        check(cublasLtMatmulAlgoGetHeuristic(handle.get(), k.operation.get(), k.w.get(), k.x.get(), k.y.get(),
                                             k.y.get(), preference.get(), 1, &best, &found),
              "choosing a matrix product");
    if (!status.ok() || found == 0) {
      return unsupported(fmt::format("cuBLASLt has no product of [{}, {}] and [{}, {}] in {}: {}", rows, w.inputs,
                                     w.inputs, w.outputs, w.type == DType::bf16 ? "bf16" : "f32", status.message()));
    }
    k.algorithm = best.algo;
    return k;
  }
};

Products::Products(std::unique_ptr<State> state) : state_(std::move(state)) {}
Products::Products(Products&&) noexcept = default;
Products& Products::operator=(Products&&) noexcept = default;
Products::~Products() = default;

Result<Products> Products::create() {
  auto state = std::make_unique<State>();
  THRIFTATTN_RETURN_IF_ERROR(check(cublasLtCreate(state->handle.out()), "cublasLtCreate"));
  THRIFTATTN_ASSIGN_OR_RETURN(scratch, take(kScratchBytes, "scratch memory of matrix products"));
  state->scratch = std::move(scratch);
  return Products(std::move(state));
}

Status Products::multiply(const Matrix& w, const void* x, int64_t rows, float* y, cudaStream_t stream) {
  State& s = *state_;
  const std::tuple key(w.type, w.inputs, w.outputs, rows, w.bias != nullptr);
  auto it = s.kernels.find(key);
  if (it == s.kernels.end()) {
    THRIFTATTN_ASSIGN_OR_RETURN(kernel, s.choose(w, rows));
    it = s.kernels.emplace(key, std::move(kernel)).first;
  }
  Kernel& k = it->second;
  if (w.bias) {
    THRIFTATTN_RETURN_IF_ERROR(check(
        cublasLtMatmulDescSetAttribute(k.operation.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &w.bias, sizeof(w.bias)),
        "setting a bias"));
  }
  const float one = 1, zero = 0;
  return check(cublasLtMatmul(s.handle.get(), k.operation.get(), &one, w.weights, k.w.get(), x, k.x.get(), &zero, y,
                              k.y.get(), y, k.y.get(), &k.algorithm, s.scratch.data(), kScratchBytes, stream),
               "cublasLtMatmul");
}

}  // namespace thriftattn::model::gpu
