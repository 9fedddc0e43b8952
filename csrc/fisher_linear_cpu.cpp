// Per-sample squared gradients of a linear layer's weight with short samples, on CPU threads.
//
//   score[o, i] += sum_b f( sum_{t in sample b} grad[t, o] x[t, i] ),  f = square or absolute value
//
// A product per sample, then a pass over the weight, is bound by those passes when a sample has few
// rows. Here a tile of the weight stays in registers while the rows of a sample go by, and in the
// first-level cache while the samples do: the scores are read and written once. Both operands are
// copied into panels of a tile's height and width, in which the rows follow one another.
// Every tile is one thread's, samples and rows in order: the same bits for any number of threads.
#include "cpu_clones.h"
#include "launch.h"
#include "parallel.h"

namespace fishfast {
namespace {

constexpr int kLanes = 8;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 sums, 2 inputs and a broadcast: 16 registers
constexpr int kTileColumns = kTileVectors * kLanes;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

// Copies columns [first, first + width) of rows [num_rows, ...] into [num_rows, width], with zeros
// behind the last column.
void copy_panel(const float* rows, int64_t stride, int64_t num_rows, int64_t num_columns,
                int64_t first, int width, float* panel) {
  const int filled = int(std::min<int64_t>(width, num_columns - first));
  for (int64_t t = 0; t < num_rows; ++t) {
    const float* source = rows + t * stride + first;
    for (int c = 0; c < filled; ++c) panel[t * width + c] = source[c];
    for (int c = filled; c < width; ++c) panel[t * width + c] = 0.0f;
  }
}

// total [kTileRows][kTileVectors] = the f's of all samples, of one tile.
FF_CPU_CLONES void score_tile(const float* grad, const float* x, const int64_t* starts,
                              const int64_t* ends, int64_t num_samples, bool squares,
                              Vector* total) {
  for (int i = 0; i < kTileRows * kTileVectors; ++i) total[i] = Vector{};
  for (int64_t b = 0; b < num_samples; ++b) {
    Vector sum[kTileRows][kTileVectors] = {};
    for (int64_t t = starts[b]; t < ends[b]; ++t) {
      const Vector* inputs = reinterpret_cast<const Vector*>(x + t * kTileColumns);
      const Vector left = inputs[0], right = inputs[1];
      const float* g = grad + t * kTileRows;
      for (int r = 0; r < kTileRows; ++r) {
        sum[r][0] += g[r] * left;
        sum[r][1] += g[r] * right;
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) {
        const Vector value = sum[r][v];
        total[r * kTileVectors + v] += squares ? value * value : (value < 0 ? -value : value);
      }
    }
  }
}

}  // namespace

void fisher_linear_cpu(const FisherLinear& call, int num_threads) {
  const int64_t row_panels = (call.num_outputs + kTileRows - 1) / kTileRows;
  const int64_t column_panels = (call.num_inputs + kTileColumns - 1) / kTileColumns;
  const int64_t panel_size = call.num_rows * kTileRows;
  std::vector<float> grads(size_t(row_panels * panel_size));
  parallel_chunks(row_panels, num_threads, [&](int64_t p, int) {
    copy_panel(call.grad, call.grad_stride, call.num_rows, call.num_outputs, p * kTileRows,
               kTileRows, grads.data() + p * panel_size);
  });
  std::vector<std::vector<float>> panels(size_t(std::max(1, num_threads)));
  parallel_chunks(column_panels, num_threads, [&](int64_t c, int thread) {
    std::vector<float>& inputs = panels[size_t(thread)];
    inputs.resize(size_t(call.num_rows * kTileColumns));
    const int64_t first = c * kTileColumns;
    copy_panel(call.x, call.x_stride, call.num_rows, call.num_inputs, first, kTileColumns,
               inputs.data());
    const int64_t width = std::min<int64_t>(kTileColumns, call.num_inputs - first);
    for (int64_t p = 0; p < row_panels; ++p) {
      Vector total[kTileRows * kTileVectors];
      score_tile(grads.data() + p * panel_size, inputs.data(), call.starts, call.ends,
                 call.num_samples, call.power == 2, total);
      const float* totals = reinterpret_cast<const float*>(total);
      const int64_t height = std::min<int64_t>(kTileRows, call.num_outputs - p * kTileRows);
      for (int64_t r = 0; r < height; ++r) {
        float* score = call.score + (p * kTileRows + r) * call.score_stride + first;
        for (int64_t i = 0; i < width; ++i) score[i] += totals[r * kTileColumns + i];
      }
    }
  });
}

}  // namespace fishfast
