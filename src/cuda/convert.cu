// Records between a cache's pools and a buffer in canonical order, for sequences that go to the host or come from it.
// A block converts one record; it is bound by what crosses to the host afterwards.
#include "cuda/convert.h"
#include "cuda/params.h"

namespace thriftattn::cuda {
namespace {

struct Pages {
  StagedPage values[kStagedPages];
};

// Grid: (heads, pages).
__global__ void convert_kernel(const __grid_constant__ ConvertParams p, const __grid_constant__ Pages pages) {
  const StagedPage page = pages.values[blockIdx.y];
  const int64_t head = blockIdx.x, heads = gridDim.x;
  uint8_t* const there = p.pool + (page.record * heads + head) * p.pool_bytes;
  uint8_t* const here = p.staged + (blockIdx.y * heads + head) * p.staged_bytes;
  const int first = threadIdx.x, step = blockDim.x;
  switch (p.kind) {
    case RecordKind::fp4:
      if (p.to_pool) to_device_fp4(p.canonical, p.layout, here, there, first, step);
      if (!p.to_pool) to_canonical_fp4(p.layout, p.canonical, there, here, first, step);
      break;
    case RecordKind::high:
      if (p.to_pool) to_device_high(p.canonical, p.layout, here, page.tokens, there, first, step);
      if (!p.to_pool) to_canonical_high(p.layout, p.canonical, there, here, first, step);
      break;
    case RecordKind::summary:
      for (int64_t i = first; i < p.pool_bytes; i += step)
        (p.to_pool ? there : here)[i] = (p.to_pool ? here : there)[i];
      break;
  }
}

}  // namespace

cudaError_t launch_convert(const ConvertParams& p, int h_kv, const StagedPage* pages, int count, cudaStream_t stream) {
  Pages list;
  for (int i = 0; i < count; ++i) list.values[i] = pages[i];
  convert_kernel<<<dim3(h_kv, count), 256, 0, stream>>>(p, list);
  return cudaGetLastError();
}

}  // namespace thriftattn::cuda
