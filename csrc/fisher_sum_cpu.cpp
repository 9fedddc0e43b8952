// Per-sample squared gradients of a norm's scale and shift, or of a bias, on CPU threads.
//
//   score[d]      += sum_b f( sum_t grad[b, t, d] (x - mean)[b, t, d] rstd[b, t] )
//   bias_score[d] += sum_b f( sum_t grad[b, t, d] ),      f = square or absolute value
//
// Both in one pass over grad and x. A thread owns features, and goes through samples and positions
// in order: the same bits for any number of threads. The sums over positions are in double.
#include <cmath>

#include "cpu_clones.h"
#include "launch.h"
#include "parallel.h"

namespace fishfast {
namespace {

constexpr int64_t kFeatures = 256;  // of one chunk: two sums of 2 KB stay in the first-level cache

// sums[d] += grad[d], products[d] += grad[d] (x[d] - mean) rstd, over adjacent features
FF_CPU_CLONES void add_row(const float* grad, const float* x, float mean, float rstd, int64_t width,
                           double* products, double* sums) {
  if (x) {
    for (int64_t d = 0; d < width; ++d) products[d] += double(grad[d] * ((x[d] - mean) * rstd));
  }
  for (int64_t d = 0; d < width; ++d) sums[d] += double(grad[d]);
}

FF_CPU_CLONES void add_powers(const double* sums, int64_t width, int power, float* score) {
  for (int64_t d = 0; d < width; ++d) {
    const float sum = float(sums[d]);
    score[d] += power == 2 ? sum * sum : std::fabs(sum);
  }
}

int64_t offset(const FisherBlock& block, int64_t sample, int64_t position) {
  return sample * block.sample_stride + position * block.position_stride;
}

}  // namespace

void fisher_sum_cpu(const FisherSum& call, int num_threads) {
  const int64_t num_chunks = (call.num_features + kFeatures - 1) / kFeatures;
  parallel_chunks(num_chunks, num_threads, [&](int64_t chunk, int) {
    const int64_t first = chunk * kFeatures;
    const int64_t width = std::min(kFeatures, call.num_features - first);
    for (int64_t b = 0; b < call.num_samples; ++b) {
      double products[kFeatures] = {}, sums[kFeatures] = {};
      for (int64_t t = 0; t < call.num_positions; ++t) {
        const float* grad = call.grad.data + offset(call.grad, b, t) + first;
        const float* x = call.x.data ? call.x.data + offset(call.x, b, t) + first : nullptr;
        const float mean = call.mean.data ? call.mean.data[offset(call.mean, b, t)] : 0.0f;
        const float rstd = call.rstd.data ? call.rstd.data[offset(call.rstd, b, t)] : 1.0f;
        add_row(grad, x, mean, rstd, width, products, sums);
      }
      if (call.score) {
        add_powers(call.x.data ? products : sums, width, call.power, call.score + first);
      }
      if (call.bias_score) add_powers(sums, width, call.power, call.bias_score + first);
    }
  });
}

}  // namespace fishfast
