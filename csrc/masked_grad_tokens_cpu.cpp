// The gradient of an embedding's masked weights, and of no others, on CPU threads.
//
//   out[e] = sum of grad[t, column_e] over the tokens t of row_e, in their order
//
// Threads share out the columns: no two write to one entry, and its tokens come in order, so the
// bits are the same for any number of threads. Bytes moved per token and entry of its row: 4 of the
// gradient and 4 of the index read, 4 of the sum read and written. Memory: 16 bytes per token.
#include <stdexcept>

#include "cpu_clones.h"
#include "launch.h"
#include "parallel.h"

namespace fishfast {
namespace {

constexpr int64_t kTokensPerChunk = 256;
constexpr int64_t kMinColumns = 64;  // a thread's part of a row: four cache lines of a gradient

// Entries of one token's row.
struct Range {
  int64_t first, last;
};

template <class T>
FF_CPU_CLONES void add_run(const T* grad, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] += value_of(grad[i]);
}

template <class T, class Index>
class TokenSums {
 public:
  TokenSums(const MaskedTokenGrad& call, int num_threads)
      : call_(call),
        indices_(static_cast<const Index*>(call.indices)),
        num_threads_(num_threads),
        ranges_(size_t(call.num_tokens)) {}

  void run() {
    const int64_t num_chunks = (call_.num_tokens + kTokensPerChunk - 1) / kTokensPerChunk;
    parallel_chunks(num_chunks, num_threads_, [&](int64_t c, int) {
      const int64_t end = std::min(call_.num_tokens, (c + 1) * kTokensPerChunk);
      for (int64_t t = c * kTokensPerChunk; t < end; ++t) ranges_[size_t(t)] = entries_of(t);
    });
    const int64_t even = (call_.num_columns + num_threads_ - 1) / num_threads_;
    const int64_t width = std::max(even, kMinColumns);
    parallel_chunks((call_.num_columns + width - 1) / width, num_threads_, [&](int64_t c, int) {
      add_columns(c * width, std::min(call_.num_columns, (c + 1) * width));
    });
  }

 private:
  // The first entry from `from` to `to` with an index of at least `index`.
  int64_t find(int64_t from, int64_t to, int64_t index) const {
    return std::lower_bound(indices_ + from, indices_ + to, index) - indices_;
  }

  Range entries_of(int64_t t) const {
    const int64_t row = call_.tokens[t];
    if (row < 0 || row >= call_.num_rows) throw std::out_of_range("a token is not in the weight");
    if (row == call_.padding) return {0, 0};
    const int64_t first = find(0, call_.k, row * call_.num_columns);
    const int64_t most = std::min(call_.k, first + call_.num_columns);
    return {first, find(first, most, (row + 1) * call_.num_columns)};
  }

  void add_columns(int64_t begin, int64_t end) const {
    const bool all = end - begin == call_.num_columns;
    for (int64_t t = 0; t < call_.num_tokens; ++t) {
      auto [first, last] = ranges_[size_t(t)];
      const int64_t row_start = call_.tokens[t] * call_.num_columns;
      if (!all) {
        first = find(first, last, row_start + begin);
        last = find(first, last, row_start + end);
      }
      if (first == last) continue;
      const T* grad = static_cast<const T*>(call_.grad) + t * call_.grad_stride;
      const bool none_left_out = indices_[last - 1] - indices_[first] == last - 1 - first;
      if (none_left_out) {
        add_run(grad + (indices_[first] - row_start), last - first, call_.out + first);
        continue;
      }
      for (int64_t e = first; e < last; ++e)
        call_.out[e] += value_of(grad[indices_[e] - row_start]);
    }
  }

  const MaskedTokenGrad& call_;
  const Index* const indices_;
  const int num_threads_;
  std::vector<Range> ranges_;
};

template <class T>
void sum_tokens(const MaskedTokenGrad& call, int num_threads) {
  if (call.wide_indices) {
    TokenSums<T, int64_t>(call, num_threads).run();
  } else {
    TokenSums<T, int32_t>(call, num_threads).run();
  }
}

}  // namespace

void masked_grad_tokens_cpu(const MaskedTokenGrad& call, int num_threads) {
  switch (call.storage) {
    case Storage::kFloat32:
      return sum_tokens<float>(call, num_threads);
    case Storage::kBFloat16:
      return sum_tokens<BFloat16>(call, num_threads);
    case Storage::kFloat16:
      return sum_tokens<Float16>(call, num_threads);
  }
}

}  // namespace fishfast
