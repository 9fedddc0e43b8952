// Global top-k over a list of score tensors on CPU threads: radix select on the bit pattern.
//
// Non-negative floats order as their bits do. Two digits, 15 bits and 16 bits, fix the threshold
// (the k-th largest score) exactly; ties at it go to the lowest (tensor, index). Four reads of the
// scores (two histograms, a count per chunk, the emission), three when all are bf16; beyond the
// output, 40 bytes per 65,536 scores and 256 KB per thread. Bit-identical for any thread count.
#include <numeric>

#include "launch.h"
#include "parallel.h"

namespace fishfast {
namespace {

constexpr int64_t kScoresPerChunk = 1 << 16;
constexpr int kHighBins = 1 << 15;  // bits 30..16 of the fp32 pattern: a whole bf16
constexpr int kLowBins = 1 << 16;   // bits 15..0
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kNegativeZero = 0x80000000u;

// Calls visit(index, fp32 bit pattern) for scores [start, start + length) in order.
template <class Visit>
void for_each_score(const ScoreTensor& tensor, int64_t start, int64_t length, const Visit& visit) {
  if (tensor.storage == Storage::kFloat32) {
    const uint32_t* bits = static_cast<const uint32_t*>(tensor.data);
    for (int64_t i = start; i < start + length; ++i) visit(i, bits[i]);
  } else if (tensor.storage == Storage::kBFloat16) {
    const uint16_t* bits = static_cast<const uint16_t*>(tensor.data);
    for (int64_t i = start; i < start + length; ++i) visit(i, uint32_t(bits[i]) << 16);
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(tensor.data);
    for (int64_t i = start; i < start + length; ++i) visit(i, bits_of(fp16_to_float(bits[i])));
  }
}

uint32_t magnitude(uint32_t bits) { return bits & 0x7fffffffu; }  // -0.0 counts as 0.0

// One histogram per thread, so that threads never write one cache line; sums commute, so the
// result does not depend on who took which chunk.
class Histogram {
 public:
  Histogram(int num_threads, int num_bins)
      : counts_(size_t(num_threads), std::vector<int64_t>(size_t(num_bins), 0)) {}

  int64_t* of_thread(int thread) { return counts_[size_t(thread)].data(); }

  // The bin in which the rank-th largest lies; rank is reduced by all counts above that bin.
  uint32_t find_from_top(int64_t& rank) const {
    for (size_t bin = counts_[0].size(); bin-- > 0;) {
      int64_t count = 0;
      for (const auto& histogram : counts_) count += histogram[bin];
      if (rank <= count) return uint32_t(bin);
      rank -= count;
    }
    return 0;  // not reached: rank is at most the number of scores
  }

 private:
  std::vector<std::vector<int64_t>> counts_;
};

}  // namespace

TopkSelection::TopkSelection(std::vector<ScoreTensor> tensors, int64_t k, int num_threads)
    : tensors_(std::move(tensors)),
      num_selected_(tensors_.size(), 0),
      num_threads_(std::max(1, num_threads)) {
  cut_into_chunks();
  if (find_threshold(k)) count_per_chunk();
}

void TopkSelection::cut_into_chunks() {
  for (size_t t = 0; t < tensors_.size(); ++t) {
    for (int64_t start = 0; start < tensors_[t].numel; start += kScoresPerChunk) {
      const int64_t length = std::min(kScoresPerChunk, tensors_[t].numel - start);
      chunks_.push_back({int64_t(t), start, length});
    }
  }
}

// Finds threshold_ and num_ties_; false if a score is NaN or negative.
bool TopkSelection::find_threshold(int64_t k) {
  Histogram high(num_threads_, kHighBins);
  std::vector<int64_t> bad(chunks_.size(), -1);  // first bad index of each chunk
  bool has_low_bits = false;
  for (const ScoreTensor& tensor : tensors_) has_low_bits |= tensor.storage != Storage::kBFloat16;

  parallel_chunks(int64_t(chunks_.size()), num_threads_, [&](int64_t c, int thread) {
    const Chunk& chunk = chunks_[size_t(c)];
    int64_t* counts = high.of_thread(thread);
    int64_t zeros = 0;  // in a register: a mostly-zero tensor would wait on one counter
    for_each_score(tensors_[size_t(chunk.tensor)], chunk.start, chunk.length,
                   [&](int64_t index, uint32_t bits) {
                     if (bits > kInfinity && bits != kNegativeZero) {
                       if (bad[size_t(c)] < 0) bad[size_t(c)] = index;
                     } else if (magnitude(bits) == 0) {
                       ++zeros;
                     } else {
                       ++counts[bits >> 16];
                     }
                   });
    counts[0] += zeros;
  });
  for (size_t c = 0; c < chunks_.size(); ++c) {
    if (bad[c] >= 0) {
      bad_tensor_ = chunks_[c].tensor;
      bad_index_ = bad[c];
      return false;
    }
  }

  num_ties_ = k;
  threshold_ = high.find_from_top(num_ties_) << 16;
  if (!has_low_bits) return true;

  Histogram low(num_threads_, kLowBins);
  const uint32_t prefix = threshold_ >> 16;
  parallel_chunks(int64_t(chunks_.size()), num_threads_, [&](int64_t c, int thread) {
    const Chunk& chunk = chunks_[size_t(c)];
    int64_t* counts = low.of_thread(thread);
    int64_t zeros = 0;
    for_each_score(tensors_[size_t(chunk.tensor)], chunk.start, chunk.length,
                   [&](int64_t, uint32_t bits) {
                     bits = magnitude(bits);
                     if (bits >> 16 != prefix) return;
                     if (bits == 0) {
                       ++zeros;
                     } else {
                       ++counts[bits & 0xffffu];
                     }
                   });
    counts[0] += zeros;
  });
  threshold_ |= low.find_from_top(num_ties_);
  return true;
}

// Gives every chunk its place in the output and its share of the ties.
void TopkSelection::count_per_chunk() {
  std::vector<int64_t> greater(chunks_.size(), 0), equal(chunks_.size(), 0);
  parallel_chunks(int64_t(chunks_.size()), num_threads_, [&](int64_t c, int) {
    const Chunk& chunk = chunks_[size_t(c)];
    int64_t above = 0, same = 0;
    for_each_score(tensors_[size_t(chunk.tensor)], chunk.start, chunk.length,
                   [&](int64_t, uint32_t bits) {
                     above += magnitude(bits) > threshold_;
                     same += magnitude(bits) == threshold_;
                   });
    greater[size_t(c)] = above;
    equal[size_t(c)] = same;
  });
  int64_t ties_left = num_ties_;
  for (size_t c = 0; c < chunks_.size(); ++c) {
    Chunk& chunk = chunks_[c];
    chunk.ties = std::min(ties_left, equal[c]);
    ties_left -= chunk.ties;
    chunk.first_output = num_selected_[size_t(chunk.tensor)];
    num_selected_[size_t(chunk.tensor)] += greater[c] + chunk.ties;
  }
  num_zero_score_ = threshold_ == 0 ? num_ties_ : 0;
}

void TopkSelection::emit(const std::vector<void*>& outputs, const std::vector<bool>& wide) const {
  parallel_chunks(int64_t(chunks_.size()), num_threads_, [&](int64_t c, int) {
    const Chunk& chunk = chunks_[size_t(c)];
    int64_t ties = chunk.ties;
    auto write = [&](auto* output) {
      for_each_score(tensors_[size_t(chunk.tensor)], chunk.start, chunk.length,
                     [&](int64_t index, uint32_t bits) {
                       bits = magnitude(bits);
                       if (bits < threshold_ || (bits == threshold_ && ties == 0)) return;
                       if (bits == threshold_) --ties;
                       *output++ = static_cast<std::decay_t<decltype(*output)>>(index);
                     });
    };
    void* output = outputs[size_t(chunk.tensor)];
    if (wide[size_t(chunk.tensor)]) {
      write(static_cast<int64_t*>(output) + chunk.first_output);
    } else {
      write(static_cast<int32_t*>(output) + chunk.first_output);
    }
  });
}

}  // namespace fishfast
