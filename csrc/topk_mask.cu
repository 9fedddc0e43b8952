// Global top-k over a list of score tensors on the card: radix select on the bit pattern.
//
//   count     histogram of the first digit (15 bits: a whole bf16); refuses NaN and negatives
//   choose    the bin in which the k-th largest lies
//   collect   sets aside, in order, everything in that bin and above: the stream
//   count, choose    the remaining digits, over the stream; now the threshold is exact
//   emit      the stream without those that lost, as indices
//
// Reads of the scores: two. When more than stream_capacity scores would be set aside, nothing is
// collected and the remaining digits and the emission read the scores again: three in all. bf16
// alone is exact after the first digit: two, without a stream. A card whose blocks have less than
// 128 KB of shared memory takes narrower digits: at most four.
// Bytes: two reads of the scores (the floor is one), 24 per score set aside, 4 or 8 per index.
//
// Deterministic: sums of integers, and places given out by an ordered scan, never by a counter. So
// the result is that of topk_mask_cpu.cpp, bit for bit, for every grid, card and run.
#include <algorithm>

#include "topk_mask_compact.cuh"
#include "topk_mask_count.cuh"

namespace fishfast {
namespace topk {

// Cuts the tensors into tiles, on the card: a model of 1e9 weights has 120,000, one thread each.
__global__ void make_tiles(Work work) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= work.num_tiles) return;
  int64_t low = 0, high = work.num_tensors;  // the last row whose tiles begin at t or before
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (work.rows[middle].first_tile <= t ? low : high) = middle;
  }
  const TopkRow row = work.rows[low];
  const int64_t start = (t - row.first_tile) * work.scores_per_tile;
  const int64_t bytes = row.scores.storage == Storage::kFloat32 ? 4 : 2;
  work.tiles[t] = {static_cast<const char*>(row.scores.data) + start * bytes, start, low,
                   int32_t(min(work.scores_per_tile, row.scores.numel - start)),
                   row.scores.storage};
}

// Finds the bin of the k-th largest, counting bins from the highest down in one block, and decides
// what is read next. Tells of the first bad score, after which nothing is read.
__global__ void __launch_bounds__(kCountThreads)
    choose(Work work, int digit_number, Digit digit, bool last) {
  State& state = *work.state;
  const Count* bins = work.bins + digit_number * kMaxBins;
  const int num_bins = 1 << digit.bits;
  const int bins_per_thread = (num_bins + kCountThreads - 1) / kCountThreads;
  const int highest = num_bins - 1 - int(threadIdx.x) * bins_per_thread;
  const int lowest = max(0, highest - bins_per_thread + 1);

  const Count rank = Count(work.k) - state.num_above;
  Count own = 0;
  for (int bin = highest; bin >= lowest; --bin) own += bins[bin];
  Count before = block_sum<kCountThreads>(own).before;

  if (threadIdx.x == 0 && digit_number == 0) {
    const Count position = ~state.first_bad;
    const bool bad = state.first_bad != 0;
    const Tile tile = work.tiles[bad ? position >> kTileBits : 0];
    work.result->bad_tensor = bad ? tile.tensor : -1;
    work.result->bad_index = bad ? tile.start + int64_t(position % kTileScores) : -1;
  }
  if (before >= rank || before + own < rank || state.first_bad != 0) return;
  int bin = highest;  // one thread is left
  while (before + bins[bin] < rank) before += bins[bin--];
  state.threshold |= uint32_t(bin) << digit.shift;
  state.num_above += before;
  const int64_t num_ties = work.k - int64_t(state.num_above);
  work.result->num_zero_score = state.threshold == 0 ? num_ties : 0;
  if (digit_number == 0) {
    state.stream_length = int64_t(state.num_above + bins[bin]);
    const bool collect = !last && state.stream_length <= work.stream_capacity;
    state.remaining = collect ? kStream : kScores;
  }
}

// The second read: what may still be selected goes to the stream, in order.
__global__ void __launch_bounds__(kCompactThreads) collect(Work work, int shift) {
  State& state = *work.state;
  if (state.remaining != kStream) return;  // the whole grid
  const ScoreSource source(work);
  const uint32_t bin = state.threshold >> shift;
  const auto write = [&](const Tile& tile, int64_t t, const int32_t* offsets, int kept,
                         int64_t place) {
    for (int i = int(threadIdx.x); i < kept; i += kCompactThreads) {
      uint32_t bits[1];
      source.load<1>(tile, offsets[i], bits);
      const uint32_t key = magnitude(bits[0]);
      const Entry open = key >> shift > bin ? kAbove : Entry(key) & kOpenMask;
      work.stream[place + i] = Entry(position_of(t, offsets[i])) << kPositionShift | open;
    }
  };
  // The lowest key of the bin is the threshold, with all of its ties.
  compact(source, state.threshold, ~Count(0), &state.next_collect, work.collect_sums, write);
}

// Writes the indices, from the stream or from the scores, and counts them per tensor.
template <class Source>
__global__ void __launch_bounds__(kCompactThreads) emit(Work work, void* indices, bool wide) {
  State& state = *work.state;
  if (state.remaining != Source::kWhen) return;  // the whole grid
  const Source source(work);
  const auto write = [&](const Tile& tile, int64_t, const int32_t* offsets, int kept,
                         int64_t place) {
    for (int i = int(threadIdx.x); i < kept; i += kCompactThreads) {
      const Place own = source.locate(tile, offsets[i]);
      if (wide) {
        static_cast<int64_t*>(indices)[place + i] = own.index;
      } else {
        static_cast<int32_t*>(indices)[place + i] = int32_t(own.index);
      }
      // A tensor's number of selected scores: where its runs end minus where they begin.
      if (i > 0 && source.locate(tile, offsets[i - 1]).tensor != own.tensor) {
        atomicAdd(&work.num_selected[own.tensor], Count(0) - Count(i));
      }
      if (i == kept - 1 || source.locate(tile, offsets[i + 1]).tensor != own.tensor) {
        atomicAdd(&work.num_selected[own.tensor], Count(i + 1));
      }
    }
  };
  compact(source, state.threshold, Count(work.k) - state.num_above,
          &state.next_emit[Source::kWhen == kStream], work.emit_sums, write);
}

// The parts of the workspace: what must begin as 0, and then the rest.
struct Layout {
  Work work;
  int64_t zero_bytes, bytes;
};

Layout lay_out(const TopkParams& params) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(params.workspace);  // 0 to ask for the bytes
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(base + uintptr_t(used));
    used += (count * int64_t(sizeof(*pointer)) + 7) / 8 * 8;
  };
  Layout layout{};
  Work& work = layout.work;
  work.rows = params.rows;
  work.num_tensors = params.num_tensors;
  work.num_tiles = params.num_tiles;
  work.scores_per_tile = params.scores_per_tile;
  work.k = params.k;
  work.stream_capacity = params.stream_capacity;
  take(work.result, 1);
  take(work.num_selected, params.num_tensors);
  take(work.state, 1);
  take(work.bins, kMaxDigits * kMaxBins);
  take(work.collect_sums, 2 * params.num_tiles);
  take(work.emit_sums, 2 * params.num_tiles);
  layout.zero_bytes = used;
  take(work.tiles, params.num_tiles);
  take(work.stream, params.stream_capacity);
  layout.bytes = used;
  return layout;
}

class Launcher {
 public:
  Launcher(const TopkParams& params, const Work& work, cudaStream_t stream)
      : params_(params), work_(work), stream_(stream) {
    shared_bytes_ = max_shared_bytes();
    if (params.max_shared_bytes > 0) {
      shared_bytes_ = std::min(shared_bytes_, params.max_shared_bytes);
    }
  }

  void find_threshold() {
    FF_LAUNCH(make_tiles, dim3(unsigned((work_.num_tiles + 255) / 256)), dim3(256), 0, stream_,
              work_);
    // A block needs a little more than its counters.
    const bool wide_card = shared_bytes_ >= pair_bytes(kWideDigits[1]) + 1024;
    const Digit* digits = wide_card ? kWideDigits : kNarrowDigits;
    int num_digits = 1;
    while (digits[num_digits - 1].shift > params_.zero_bits) ++num_digits;

    for (int d = 0; d < num_digits; ++d) {
      launch_count<ScoreSource>(d, digits[d]);
      if (d > 0) launch_count<StreamSource>(d, digits[d]);
      FF_LAUNCH(choose, dim3(1), dim3(kCountThreads), 0, stream_, work_, d, digits[d],
                d == num_digits - 1);
      if (d == 0 && num_digits > 1) {
        FF_LAUNCH(collect, grid(collect, kCompactThreads, 0), dim3(kCompactThreads), 0, stream_,
                  work_, digits[d].shift);
      }
    }
  }

  void emit_indices() {
    launch_emit<StreamSource>();
    launch_emit<ScoreSource>();
  }

 private:
  static int64_t pair_bytes(Digit digit) { return int64_t(2) << digit.bits; }

  template <class Kernel>
  dim3 grid(Kernel kernel, int threads, int64_t shared_bytes) const {
    int64_t blocks = resident_blocks(kernel, threads, shared_bytes);
    if (params_.max_blocks > 0) blocks = std::min(blocks, params_.max_blocks);
    return dim3(unsigned(std::min(blocks, work_.num_tiles)));
  }

  template <class Source>
  void launch_count(int digit_number, Digit digit) {
    const int64_t bytes = pair_bytes(digit);
    FF_LAUNCH(count<Source>, grid(count<Source>, kCountThreads, bytes), dim3(kCountThreads),
              size_t(bytes), stream_, work_, digit_number, digit);
  }

  template <class Source>
  void launch_emit() {
    FF_LAUNCH(emit<Source>, grid(emit<Source>, kCompactThreads, 0), dim3(kCompactThreads), 0,
              stream_, work_, params_.indices, params_.wide_indices != 0);
  }

  const TopkParams& params_;
  const Work& work_;
  cudaStream_t stream_;
  int64_t shared_bytes_;
};

}  // namespace topk

int64_t topk_mask_workspace_bytes(const TopkParams& params) { return topk::lay_out(params).bytes; }

void topk_mask_cuda(const TopkParams& params, void* stream) {
  const topk::Layout layout = topk::lay_out(params);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  check_status(cudaMemsetAsync(params.workspace, 0, size_t(layout.zero_bytes), cuda_stream));
  topk::Launcher launcher(params, layout.work, cuda_stream);
  launcher.find_threshold();
  launcher.emit_indices();
}

}  // namespace fishfast
