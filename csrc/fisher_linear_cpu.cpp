// Per-sample squared gradients of a linear layer's weight with short samples, on CPU threads.
//
//   score[o, i] += sum_b f( sum_{t in sample b} grad[t, o] x[t, i] ),  f = square or absolute value
//
// A product per sample, then a pass over the weight, is bound by those passes when a sample has few
// rows. Here a tile of the weight stays in registers while the rows of a sample go by, and in the
// first-level cache while a block of samples does. Both operands are copied into panels of a tile's
// height and width, in which the rows follow one another. They are read through offsets of their
// rows and columns, so that a convolution's windows are rows that were never written out.
// Every tile is one thread's, samples and rows in order: the same bits for any number of threads.
#include <cmath>
#include <memory>

#include "cpu_clones.h"
#include "launch.h"
#include "parallel.h"

namespace fishfast {
namespace {

constexpr int kLanes = 8;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 sums, 2 inputs and a broadcast: 16 registers
constexpr int kTileColumns = kTileVectors * kLanes;
// Gradients of a block of samples: 512 KB stay in the second-level cache from one panel of the
// inputs to the next. Blocks of fewer rows would mostly read and write scores.
constexpr int64_t kBlockGrads = 1 << 17;
constexpr int64_t kBlockRows = 256;
// More parts than threads, so that none waits long for the last one.
constexpr int64_t kPartsPerThread = 4;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

struct Block {
  int64_t first_sample, num_samples;
  int64_t first_row, num_rows;  // counted over the samples' rows alone
};

std::vector<Block> blocks_of(const FisherLinear& call) {
  const int64_t most = std::max(kBlockRows, kBlockGrads / std::max<int64_t>(1, call.num_outputs));
  std::vector<Block> blocks;
  int64_t row = 0;
  for (int64_t b = 0; b < call.num_samples; ++b) {
    const int64_t length = call.ends[b] - call.starts[b];
    if (blocks.empty() || blocks.back().num_rows + length > most) blocks.push_back({b, 0, row, 0});
    ++blocks.back().num_samples;
    blocks.back().num_rows += length;
    row += length;
  }
  return blocks;
}

// Copies columns [first, first + kWidth) of the block's rows into [rows, kWidth], with zeros behind
// the last column.
template <int kWidth>
void copy_panel(const FisherLinear& call, const FisherOperand& from, int64_t num_columns,
                int64_t first, const Block& block, float* panel) {
  const int filled = int(std::min<int64_t>(kWidth, num_columns - first));
  const int64_t* columns = from.columns + first;
  bool adjacent = filled == kWidth;
  for (int c = 1; c < filled; ++c) adjacent = adjacent && columns[c] == columns[0] + c;
  for (int64_t b = block.first_sample; b < block.first_sample + block.num_samples; ++b) {
    for (int64_t t = call.starts[b]; t < call.ends[b]; ++t, panel += kWidth) {
      const float* source = from.data + from.rows[t];
      if (adjacent) {
        std::copy_n(source + columns[0], kWidth, panel);
        continue;
      }
      for (int c = 0; c < filled; ++c) panel[c] = source[columns[c]];
      for (int c = filled; c < kWidth; ++c) panel[c] = 0.0f;
    }
  }
}

// total [kTileRows][kTileVectors] = the f's of the block's samples, of one tile.
FF_CPU_CLONES void score_tile(const float* grad, const float* x, const FisherLinear& call,
                              const Block& block, Vector* total) {
  const bool squares = call.power == 2;
  for (int i = 0; i < kTileRows * kTileVectors; ++i) total[i] = Vector{};
  for (int64_t b = block.first_sample; b < block.first_sample + block.num_samples; ++b) {
    Vector sum[kTileRows][kTileVectors] = {};
    for (int64_t t = call.starts[b]; t < call.ends[b]; ++t, grad += kTileRows, x += kTileColumns) {
      const Vector* inputs = reinterpret_cast<const Vector*>(x);
      const Vector left = inputs[0], right = inputs[1];
      for (int r = 0; r < kTileRows; ++r) {
        sum[r][0] += grad[r] * left;
        sum[r][1] += grad[r] * right;
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

// Offsets of the rows and columns of samples that follow one another in equal blocks.
struct Offsets {
  std::vector<int64_t> rows, columns;

  Offsets(const FisherBlock& block, int64_t num_samples, int64_t num_positions, int64_t num_columns)
      : rows(size_t(num_samples * num_positions)), columns(size_t(num_columns)) {
    for (int64_t b = 0, row = 0; b < num_samples; ++b) {
      for (int64_t t = 0; t < num_positions; ++t) {
        rows[size_t(row++)] = b * block.sample_stride + t * block.position_stride;
      }
    }
    for (int64_t c = 0; c < num_columns; ++c) columns[size_t(c)] = c * block.column_stride;
  }

  FisherOperand operand(const float* data) const { return {data, rows.data(), columns.data()}; }
};

bool is_zero_row(const FisherOperand& from, int64_t row, int64_t num_columns) {
  for (int64_t c = 0; c < num_columns; ++c) {
    if (from.data[from.rows[row] + from.columns[c]] != 0.0f) return false;  // so is NaN
  }
  return true;
}

// bias_score[c] += sum_b f( sum_{t in sample b} from[t, c] )
void add_bias(float* bias_score, const FisherOperand& from, int64_t num_columns,
              const FisherLinear& call) {
  std::vector<double> sums(static_cast<size_t>(num_columns));
  for (int64_t b = 0; b < call.num_samples; ++b) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t t = call.starts[b]; t < call.ends[b]; ++t) {
      const float* row = from.data + from.rows[t];
      for (int64_t c = 0; c < num_columns; ++c) sums[size_t(c)] += row[from.columns[c]];
    }
    for (int64_t c = 0; c < num_columns; ++c) {
      const float sum = float(sums[size_t(c)]);
      bias_score[c] += call.power == 2 ? sum * sum : std::fabs(sum);
    }
  }
}

}  // namespace

void fisher_linear_blocks_cpu(const FisherLinearBlocks& blocks, int num_threads) {
  const int64_t samples = blocks.num_samples, positions = blocks.num_positions;
  const Offsets grad(blocks.grad, samples, positions, blocks.num_outputs);
  const Offsets x(blocks.x, samples, positions, blocks.num_inputs);
  FisherLinear call = {blocks.score,
                       grad.operand(blocks.grad.data),
                       x.operand(blocks.x.data),
                       nullptr,
                       nullptr,
                       blocks.num_outputs,
                       blocks.num_inputs,
                       samples,
                       blocks.score_stride,
                       blocks.power};
  const FisherOperand& output = blocks.bias_of_x ? call.x : call.grad;  // the layer's gradient
  const int64_t width = blocks.bias_of_x ? blocks.num_inputs : blocks.num_outputs;
  std::vector<int64_t> starts(static_cast<size_t>(samples)), ends(static_cast<size_t>(samples));
  for (int64_t b = 0; b < samples; ++b) {
    starts[size_t(b)] = b * positions;
    int64_t end = (b + 1) * positions;
    while (end > b * positions && is_zero_row(output, end - 1, width)) --end;  // padding
    ends[size_t(b)] = end;
  }
  call.starts = starts.data();
  call.ends = ends.data();
  if (blocks.bias_score) add_bias(blocks.bias_score, output, width, call);
  fisher_linear_cpu(call, num_threads);
}

void fisher_linear_cpu(const FisherLinear& call, int num_threads) {
  const std::vector<Block> blocks = blocks_of(call);
  if (blocks.empty()) return;
  const int64_t num_rows = blocks.back().first_row + blocks.back().num_rows;
  const Block all = {0, call.num_samples, 0, num_rows};
  const int64_t row_panels = (call.num_outputs + kTileRows - 1) / kTileRows;
  const int64_t column_panels = (call.num_inputs + kTileColumns - 1) / kTileColumns;
  const int64_t panel_size = num_rows * kTileRows;
  const std::unique_ptr<float[]> grads(new float[size_t(row_panels * panel_size)]);
  parallel_chunks(row_panels, num_threads, [&](int64_t p, int) {
    copy_panel<kTileRows>(call, call.grad, call.num_outputs, p * kTileRows, all,
                          grads.get() + p * panel_size);
  });

  const auto score_panel = [&](const Block& block, int64_t column, std::vector<float>& inputs) {
    inputs.resize(size_t(block.num_rows * kTileColumns));
    copy_panel<kTileColumns>(call, call.x, call.num_inputs, column, block, inputs.data());
    const int64_t width = std::min<int64_t>(kTileColumns, call.num_inputs - column);
    for (int64_t p = 0; p < row_panels; ++p) {
      const float* panel = grads.get() + p * panel_size + block.first_row * kTileRows;
      Vector total[kTileRows * kTileVectors];
      score_tile(panel, inputs.data(), call, block, total);
      const float* totals = reinterpret_cast<const float*>(total);
      const int64_t height = std::min<int64_t>(kTileRows, call.num_outputs - p * kTileRows);
      for (int64_t r = 0; r < height; ++r) {
        float* score = call.score + (p * kTileRows + r) * call.score_stride + column;
        for (int64_t i = 0; i < width; ++i) score[i] += totals[r * kTileColumns + i];
      }
    }
  };
  const int64_t parts = std::min(column_panels, kPartsPerThread * std::max(1, num_threads));
  std::vector<std::vector<float>> panels(size_t(std::max(1, num_threads)));
  parallel_chunks(parts, num_threads, [&](int64_t part, int thread) {
    const int64_t first = part * column_panels / parts, end = (part + 1) * column_panels / parts;
    for (const Block& block : blocks) {
      for (int64_t c = first; c < end; ++c) {
        score_panel(block, c * kTileColumns, panels[size_t(thread)]);
      }
    }
  });
}

}  // namespace fishfast
