// csrc/write_values.cu for tests of what follows another optimizer's step.
#include "api.h"
#include "launch.h"

extern "C" int ff_write_values(const void* rows, const void* chunks, int64_t num_chunks) {
  return simt::call([&] {
    fishfast::write_values_cuda(static_cast<const fishfast::WriteRow*>(rows),
                                static_cast<const fishfast::StepChunk*>(chunks), num_chunks,
                                nullptr);
  });
}
