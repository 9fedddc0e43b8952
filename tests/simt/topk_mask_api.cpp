// csrc/topk_mask.cu for tests/simt/topk_mask_backend.py.
#include "api.h"
#include "launch.h"

extern "C" int ff_topk_mask_workspace_bytes(const fishfast::TopkParams* params, int64_t* bytes) {
  return simt::call([&] { *bytes = fishfast::topk_mask_workspace_bytes(*params); });
}

extern "C" int ff_topk_mask(const fishfast::TopkParams* params) {
  return simt::call([&] { fishfast::topk_mask_cuda(*params, nullptr); });
}
