// Values into their weights, on CPU threads: what an optimizer's step ends with, alone.
//
// Memory: per entry 4 bytes of the value and 4 of its offset are read, and the weight's sector is
// read and written: the scatter decides.
#include "cpu_step.h"

namespace fishfast {

static void prefetch_streams(const WriteRow& row, int64_t entry) {
  __builtin_prefetch(row.values + entry);
}

void write_values_cpu(const WriteRow* rows, int64_t num_rows, int num_threads) {
  step_rows(rows, num_rows, num_threads, [](const WriteRow&, int64_t, int64_t) {});
}

}  // namespace fishfast
