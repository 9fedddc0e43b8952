// The gradient of a linear layer's masked weights, and of no others, on CPU threads.
//
//   out[e] = sum_t left[t, row_e] * right[t, column_e]
//
// left and right are the output's gradient and the input. Blocks of samples are transposed into
// panels, in which what one row or column holds is contiguous, so that an entry is a dot product of
// two runs; rows and columns without entries are left out. A block's panel of columns stays in the
// second-level cache while the entries go by, row after row. Sums are fp32.
// Bytes moved per entry and sample: 4 of the columns' panel, from that cache.
//
// An entry's sum depends on the block size only, which depends on the sizes: the same bits for any
// number of threads.
#include <memory>

#include "cpu_clones.h"
#include "launch.h"
#include "parallel.h"

namespace fishfast {
namespace {

constexpr int kLanes = 8;
constexpr int kEntries = 4;            // dot products at a time: 8 sums, 8 addresses
constexpr int64_t kStep = 2 * kLanes;  // samples that a dot product takes at a time
constexpr int64_t kMinBlock = 64;      // samples; shorter runs do not pay for adding up the lanes
constexpr int64_t kMaxBlock = 256;
constexpr int64_t kBlockBytes = 3 << 17;  // of the columns' panel: most of a second-level cache
constexpr int64_t kPanelBytes = 8 << 20;  // of all blocks between two starts of threads
constexpr int64_t kEntriesPerTask = 512;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

// 8 values that follow one another.
template <class T>
FF_HOST_DEVICE void load(const T* values, Vector& out) {
  for (int c = 0; c < kLanes; ++c) out[c] = value_of(values[c]);
}
FF_HOST_DEVICE void load(const float* values, Vector& out) { memcpy(&out, values, sizeof(out)); }

template <int... kFrom>
FF_HOST_DEVICE void shuffle(const Vector& a, const Vector& b, Vector& out) {
#if defined(__clang__)
  out = __builtin_shufflevector(a, b, kFrom...);
#else
  typedef int Order __attribute__((vector_size(sizeof(Vector))));
  out = __builtin_shuffle(a, b, Order{kFrom...});
#endif
}

// Writes column c of 8 rows to panel + c * stride.
FF_HOST_DEVICE void store_transposed(const Vector* rows, int64_t stride, float* panel) {
  Vector pairs[8], fours[8], column;
  for (int i = 0; i < 8; i += 2) {
    shuffle<0, 8, 1, 9, 4, 12, 5, 13>(rows[i], rows[i + 1], pairs[i]);
    shuffle<2, 10, 3, 11, 6, 14, 7, 15>(rows[i], rows[i + 1], pairs[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      shuffle<0, 1, 8, 9, 4, 5, 12, 13>(pairs[i + j], pairs[i + 2 + j], fours[i + 2 * j]);
      shuffle<2, 3, 10, 11, 6, 7, 14, 15>(pairs[i + j], pairs[i + 2 + j], fours[i + 2 * j + 1]);
    }
  }
  for (int c = 0; c < 4; ++c) {
    shuffle<0, 1, 2, 3, 8, 9, 10, 11>(fours[c], fours[c + 4], column);
    memcpy(panel + c * stride, &column, sizeof(column));
    shuffle<4, 5, 6, 7, 12, 13, 14, 15>(fours[c], fours[c + 4], column);
    memcpy(panel + (c + 4) * stride, &column, sizeof(column));
  }
}

// One side of the products: a matrix [samples, width] of which some columns are used.
struct Side {
  const void* data;
  int64_t stride;
  std::vector<int64_t> used;        // ascending
  std::vector<int32_t> slot;        // [width], place of each used column in the panels
  std::unique_ptr<float[]> panels;  // [blocks][width()][block]; not zeroed, which took an eighth

  int64_t width() const { return (int64_t(used.size()) + kLanes - 1) / kLanes * kLanes; }

  void find_slots() {
    for (size_t i = 0; i < slot.size(); ++i) {
      if (slot[i] == 0) continue;
      slot[i] = int32_t(used.size());
      used.push_back(int64_t(i));
    }
  }
};

// Copies samples [first, last) of the used columns into a block's panel, transposed, with zeros
// behind the last sample. The panel has room for columns up to a multiple of kLanes.
template <class T>
FF_CPU_CLONES void transpose(const Side& side, int64_t first, int64_t last, int64_t block,
                             float* panel) {
  const int64_t num_used = int64_t(side.used.size());
  for (int64_t from = 0; from < num_used; from += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, num_used - from);
    const int64_t* used = side.used.data() + from;
    const bool together = count == kLanes && used[kLanes - 1] == used[0] + kLanes - 1;
    for (int64_t t = 0; t < block; t += kLanes) {
      const int64_t num_rows = std::min<int64_t>(kLanes, last - first - t);
      const T* corner = static_cast<const T*>(side.data) + (first + t) * side.stride;
      Vector rows[kLanes];
      if (together && num_rows == kLanes) {
        for (int r = 0; r < kLanes; ++r) load(corner + r * side.stride + used[0], rows[r]);
      } else {
        for (int r = 0; r < kLanes; ++r) {
          rows[r] = Vector{};
          if (r >= num_rows) continue;
          for (int c = 0; c < count; ++c) rows[r][c] = value_of(corner[r * side.stride + used[c]]);
        }
      }
      store_transposed(rows, block, panel + from * block + t);
    }
  }
}

// Where the two runs of an entry begin, in the panels of a block.
struct Runs {
  int32_t left, right;
};

// out[e] += left . right of entry e, runs of length block, a multiple of 2 kLanes.
FF_CPU_CLONES void add_dot_products(const float* left, const float* right, const Runs* runs,
                                    int64_t num_entries, int64_t block, float* out) {
  for (int64_t first = 0; first < num_entries; first += kEntries) {
    const int count = int(std::min<int64_t>(kEntries, num_entries - first));
    const float *a[kEntries], *b[kEntries];
    for (int e = 0; e < kEntries; ++e) {
      const Runs& run = runs[first + std::min(e, count - 1)];
      a[e] = left + run.left * block;
      b[e] = right + run.right * block;
    }
    Vector even[kEntries] = {}, odd[kEntries] = {};
    for (int64_t t = 0; t < block; t += 2 * kLanes) {
      for (int e = 0; e < kEntries; ++e) {
        const Vector* from_a = reinterpret_cast<const Vector*>(a[e] + t);
        const Vector* from_b = reinterpret_cast<const Vector*>(b[e] + t);
        even[e] += from_a[0] * from_b[0];
        odd[e] += from_a[1] * from_b[1];
      }
    }
    float sums[kEntries];
    for (int e = 0; e < kEntries; ++e) {
      const Vector both = even[e] + odd[e];
      sums[e] =
          ((both[0] + both[4]) + (both[2] + both[6])) + ((both[1] + both[5]) + (both[3] + both[7]));
    }
    for (int e = 0; e < count; ++e) out[first + e] += sums[e];
  }
}

template <class Index>
class Product {
 public:
  Product(const MaskedGrad& call, int num_threads) : call_(call), num_threads_(num_threads) {
    left_ = {call.left, call.left_stride, {}, std::vector<int32_t>(size_t(call.num_rows)), {}};
    right_ = {
        call.right, call.right_stride, {}, std::vector<int32_t>(size_t(call.num_columns)), {}};
    const Index* indices = static_cast<const Index*>(call.indices);
    for (int64_t e = 0, row = 0; e < call.k; ++e) {
      while (indices[e] >= (row + 1) * call.num_columns) ++row;
      left_.slot[size_t(row)] = right_.slot[size_t(indices[e] - row * call.num_columns)] = 1;
    }
    left_.find_slots(), right_.find_slots();
    const int64_t fitting = kBlockBytes / 4 / int64_t(right_.used.size());
    const int64_t most = std::min(std::max(fitting / kMinBlock * kMinBlock, kMinBlock), kMaxBlock);
    // Blocks of one length, of which the last is nearly full: 128 samples are no block of 192.
    const int64_t num_blocks = std::max<int64_t>(1, (call.num_samples + most - 1) / most);
    const int64_t samples = (call.num_samples + num_blocks - 1) / num_blocks;
    block_ = std::max<int64_t>(1, (samples + kStep - 1) / kStep) * kStep;
    const int64_t width = left_.width() + right_.width();
    // Threads start anew for every so many blocks.
    blocks_ = num_threads == 1 ? 1 : std::max<int64_t>(1, kPanelBytes / 4 / block_ / width);
    blocks_ = std::min(blocks_, (call.num_samples + block_ - 1) / block_);
    left_.panels.reset(new float[size_t(blocks_ * block_ * left_.width())]);
    right_.panels.reset(new float[size_t(blocks_ * block_ * right_.width())]);
  }

  void run() {
    for (int64_t e = 0; e < call_.k; ++e) call_.out[e] = 0.0f;
    for (int64_t first = 0; first < call_.num_samples; first += blocks_ * block_) {
      fill(left_, first), fill(right_, first);
      const int64_t samples = std::min(blocks_ * block_, call_.num_samples - first);
      const int64_t tasks = (call_.k + kEntriesPerTask - 1) / kEntriesPerTask;
      parallel_chunks(tasks, num_threads_, [&](int64_t task, int) {
        const int64_t end = std::min(call_.k, (task + 1) * kEntriesPerTask);
        add(task * kEntriesPerTask, end, (samples + block_ - 1) / block_);
      });
    }
  }

 private:
  void fill(Side& side, int64_t first) {
    parallel_chunks(blocks_, num_threads_, [&](int64_t b, int) {
      const int64_t from = first + b * block_;
      const int64_t to = std::min(from + block_, call_.num_samples);
      if (from >= to) return;
      float* panel = side.panels.get() + b * block_ * side.width();
      switch (call_.storage) {
        case Storage::kFloat32:
          return transpose<float>(side, from, to, block_, panel);
        case Storage::kBFloat16:
          return transpose<BFloat16>(side, from, to, block_, panel);
        case Storage::kFloat16:
          return transpose<Float16>(side, from, to, block_, panel);
      }
    });
  }

  // Adds the first blocks' part to out[begin, end).
  void add(int64_t begin, int64_t end, int64_t blocks) {
    const Index* indices = static_cast<const Index*>(call_.indices);
    Runs runs[kEntriesPerTask];
    int64_t row = indices[begin] / call_.num_columns;
    for (int64_t e = begin; e < end; ++e) {
      while (indices[e] >= (row + 1) * call_.num_columns) ++row;
      runs[e - begin] = {left_.slot[size_t(row)],
                         right_.slot[size_t(indices[e] - row * call_.num_columns)]};
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const float* left_panel = left_.panels.get() + b * block_ * left_.width();
      const float* right_panel = right_.panels.get() + b * block_ * right_.width();
      add_dot_products(left_panel, right_panel, runs, end - begin, block_, call_.out + begin);
    }
  }

  const MaskedGrad& call_;
  const int num_threads_;
  Side left_, right_;
  int64_t block_, blocks_;
};

}  // namespace

void masked_grad_cpu(const MaskedGrad& call, int num_threads) {
  if (call.k == 0) return;
  if (call.wide_indices) {
    Product<int64_t>(call, num_threads).run();
  } else {
    Product<int32_t>(call, num_threads).run();
  }
}

}  // namespace fishfast
