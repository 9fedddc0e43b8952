// Global top-k over a list of score tensors on CPU threads: the passes of a radix select.
//
// Non-negative floats order as their bits do, so digits of the bit pattern, from the top, lead to
// the threshold (the k-th largest score): fishfast/mask/selection/radix.py drives. One read of the
// scores per call; beyond the outputs 32 bytes per 65,536 scores, and 8 bytes per bin and thread.
// Sums of counts commute and every chunk has its own place in the output: bit-identical for any
// number of threads.
#include "launch.h"
#include "parallel.h"
#include "topk_mask.h"

namespace fishfast {
namespace {

constexpr int64_t kScoresPerChunk = 1 << 16;
// Scores that are looked at together: few enough for the first-level cache, enough for vectors.
constexpr int64_t kScoresPerBlock = 64;
constexpr uint32_t kNumSpareBins = 8;

// fp32 bit patterns of scores in each storage dtype.
struct Float32Scores {
  const uint32_t* data;
  uint32_t operator[](int64_t i) const { return data[i]; }
};
struct BFloat16Scores {
  const uint16_t* data;
  uint32_t operator[](int64_t i) const { return uint32_t(data[i]) << 16; }
};
struct Float16Scores {
  const uint16_t* data;
  uint32_t operator[](int64_t i) const { return bits_of(fp16_to_float(data[i])); }
};

// Signed, which the baseline instruction set compares in vectors.
int32_t signed_magnitude(uint32_t bits) { return int32_t(magnitude(bits)); }

// Calls visit(bits, start, length) for each block of scores, in order; bits: [length] patterns.
template <class Scores, class Visit>
void for_each_block(const Scores& scores, int64_t start, int64_t length, const Visit& visit) {
  uint32_t bits[kScoresPerBlock];
  const int64_t end = start + length;
  for (; start + kScoresPerBlock <= end; start += kScoresPerBlock) {
    for (int64_t i = 0; i < kScoresPerBlock; ++i) bits[i] = scores[start + i];
    visit(bits, start, kScoresPerBlock);
  }
  for (int64_t i = start; i < end; ++i) bits[i - start] = scores[i];
  if (start < end) visit(bits, start, end - start);
}

template <class Visit>
void for_each_block(const ScoreTensor& tensor, int64_t start, int64_t length, const Visit& visit) {
  if (tensor.storage == Storage::kFloat32) {
    for_each_block(Float32Scores{static_cast<const uint32_t*>(tensor.data)}, start, length, visit);
  } else if (tensor.storage == Storage::kBFloat16) {
    for_each_block(BFloat16Scores{static_cast<const uint16_t*>(tensor.data)}, start, length, visit);
  } else {
    for_each_block(Float16Scores{static_cast<const uint16_t*>(tensor.data)}, start, length, visit);
  }
}

// Index within the block of the first NaN or negative score, or -1.
int64_t find_bad(const uint32_t* bits, int64_t length) {
  int32_t any = 0;
  for (int64_t i = 0; i < length; ++i) any |= is_bad_score(bits[i]);
  if (!any) return -1;
  int64_t i = 0;
  while (!is_bad_score(bits[i])) ++i;
  return i;
}

}  // namespace

TopkPasses::TopkPasses(std::vector<ScoreTensor> tensors, int num_threads)
    : tensors_(std::move(tensors)), num_threads_(std::max(1, num_threads)) {
  for (size_t t = 0; t < tensors_.size(); ++t) {
    for (int64_t start = 0; start < tensors_[t].numel; start += kScoresPerChunk) {
      const int64_t length = std::min(kScoresPerChunk, tensors_[t].numel - start);
      chunks_.push_back({int64_t(t), start, int32_t(length)});
    }
  }
}

BadScore TopkPasses::histogram(int shift, int num_bits, uint32_t prefix, int64_t* counts) const {
  const int64_t num_bins = int64_t(1) << num_bits;
  const int top = shift + num_bits;
  const bool check = top == 31;  // once is enough
  const uint32_t digit_mask = uint32_t(num_bins) - 1;
  // One histogram per thread, so that threads never write one cache line.
  std::vector<std::vector<int64_t>> of_thread(
      size_t(std::min<int64_t>(num_threads_, int64_t(chunks_.size()))));
  std::vector<int64_t> bad(chunks_.size(), -1);  // first bad index of each chunk

  parallel_chunks(int64_t(chunks_.size()), num_threads_, [&](int64_t c, int thread) {
    const Chunk& chunk = chunks_[size_t(c)];
    auto& own = of_thread[size_t(thread)];
    if (own.empty()) own.resize(size_t(num_bins) + kNumSpareBins);
    int64_t* const bins = own.data();
    int64_t zeros = 0;
    for_each_block(tensors_[size_t(chunk.tensor)], chunk.start, chunk.length,
                   [&](const uint32_t* bits, int64_t start, int64_t length) {
                     if (check && bad[size_t(c)] < 0) {
                       const int64_t found = find_bad(bits, length);
                       if (found >= 0) bad[size_t(c)] = start + found;
                     }
                     if (check) {
                       int32_t any_zero = 0;
                       for (int64_t i = 0; i < length; ++i) any_zero |= magnitude(bits[i]) == 0;
                       if (!any_zero) {  // all are counted, as nearly always: twice as fast
                         for (int64_t i = 0; i < length; ++i) ++bins[magnitude(bits[i]) >> shift];
                         return;
                       }
                     }
                     // No branch, which half of the scores could mispredict: what is not counted
                     // here, zeros above all, goes to spare bins in turn, since one counter would
                     // wait for itself.
                     uint32_t bin_of[kScoresPerBlock];
                     uint32_t any = 0;
                     int32_t zeros_here = 0;
                     for (int64_t i = 0; i < length; ++i) {
                       const uint32_t score = magnitude(bits[i]);
                       const uint32_t counted = -uint32_t((score >> top == prefix) & (score != 0));
                       const uint32_t spare = uint32_t(num_bins) + uint32_t(i) % kNumSpareBins;
                       bin_of[i] = (score >> shift & digit_mask & counted) | (spare & ~counted);
                       zeros_here += score == 0;
                       any |= counted;
                     }
                     zeros += zeros_here;
                     if (!any) return;
                     for (int64_t i = 0; i < length; ++i) ++bins[bin_of[i]];
                   });
    if (prefix == 0) bins[0] += zeros;
  });

  for (size_t c = 0; c < chunks_.size(); ++c) {
    if (bad[c] >= 0) return {chunks_[c].tensor, bad[c]};
  }
  for (const auto& own : of_thread) {
    if (own.empty()) continue;  // a thread that found no chunk left
    for (int64_t bin = 0; bin < num_bins; ++bin) counts[bin] += own[size_t(bin)];
  }
  return {-1, -1};
}

void TopkPasses::count(uint32_t threshold) {
  threshold_ = threshold;
  const int32_t limit = int32_t(threshold);
  parallel_chunks(int64_t(chunks_.size()), num_threads_, [&](int64_t c, int) {
    Chunk& chunk = chunks_[size_t(c)];
    chunk.greater = chunk.equal = 0;
    for_each_block(tensors_[size_t(chunk.tensor)], chunk.start, chunk.length,
                   [&](const uint32_t* bits, int64_t, int64_t length) {
                     int32_t greater = 0, equal = 0;
                     for (int64_t i = 0; i < length; ++i) {
                       greater += signed_magnitude(bits[i]) > limit;
                       equal += signed_magnitude(bits[i]) == limit;
                     }
                     chunk.greater += greater;
                     chunk.equal += equal;
                   });
  });
}

std::vector<int64_t> TopkPasses::per_tensor(int32_t Chunk::* count) const {
  std::vector<int64_t> sums(tensors_.size(), 0);
  for (const Chunk& chunk : chunks_) sums[size_t(chunk.tensor)] += chunk.*count;
  return sums;
}

void TopkPasses::emit(const std::vector<int64_t>& ties, const std::vector<void*>& outputs,
                      const std::vector<bool>& wide) const {
  struct Place {
    int64_t first_output;  // position of the chunk's first entry in its tensor's output
    int32_t ties;          // how many of its scores equal to the threshold are taken
  };
  std::vector<Place> places(chunks_.size());
  std::vector<int64_t> filled(tensors_.size(), 0), ties_left = ties;
  for (size_t c = 0; c < chunks_.size(); ++c) {
    const Chunk& chunk = chunks_[c];
    int64_t& left = ties_left[size_t(chunk.tensor)];
    places[c] = {filled[size_t(chunk.tensor)], int32_t(std::min<int64_t>(left, chunk.equal))};
    left -= places[c].ties;
    filled[size_t(chunk.tensor)] += chunk.greater + places[c].ties;
  }

  parallel_chunks(int64_t(chunks_.size()), num_threads_, [&](int64_t c, int) {
    const Chunk& chunk = chunks_[size_t(c)];
    int32_t ties_here = places[size_t(c)].ties;
    if (chunk.greater + ties_here == 0) return;
    // All ties of a chunk are taken, or none, but in the one chunk where they run out.
    const bool ties_run_out = ties_here > 0 && ties_here < chunk.equal;
    const int32_t limit = int32_t(threshold_) + (ties_here == 0);
    auto write = [&](auto* output) {
      using Index = std::remove_pointer_t<decltype(output)>;
      output += places[size_t(c)].first_output;
      const auto* end = output + chunk.greater + ties_here;
      for_each_block(tensors_[size_t(chunk.tensor)], chunk.start, chunk.length,
                     [&](const uint32_t* bits, int64_t start, int64_t length) {
                       int32_t any = 0;
                       for (int64_t i = 0; i < length; ++i)
                         any |= signed_magnitude(bits[i]) >= limit;
                       if (!any) return;
                       // Every index is written and the next one goes over it unless it is taken:
                       // no branch. The last may be past the chunk's output, hence not in place.
                       Index found[kScoresPerBlock];
                       int64_t num_found = 0;
                       for (int64_t i = 0; i < length; ++i) {
                         found[num_found] = Index(start + i);
                         bool taken = signed_magnitude(bits[i]) >= limit;
                         if (ties_run_out && signed_magnitude(bits[i]) == limit)
                           taken = ties_here-- > 0;
                         num_found += taken;
                       }
                       if (num_found > end - output) {
                         throw std::runtime_error("scores changed while they were selected");
                       }
                       output = std::copy(found, found + num_found, output);
                     });
    };
    void* output = outputs[size_t(chunk.tensor)];
    if (wide[size_t(chunk.tensor)]) {
      write(static_cast<int64_t*>(output));
    } else {
      write(static_cast<int32_t*>(output));
    }
  });
}

}  // namespace fishfast
