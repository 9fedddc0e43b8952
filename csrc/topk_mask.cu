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
#include "launch.h"
#include "ordered_scan.cuh"
#include "topk_mask.h"

namespace fishfast {
namespace {

constexpr int kTileBits = 13;
constexpr int kTileScores = 1 << kTileBits;
static_assert(kTileScores == kTopkScoresPerTile, "positions are a tile and an offset in it");

// A block of the histogram has most of a multiprocessor's shared memory, so it needs its threads.
constexpr int kCountThreads = 1024;
constexpr int kCompactThreads = 256;
constexpr int kScoresPerThread = kTileScores / kCompactThreads;
static_assert(kScoresPerThread == 32, "a thread's scores are the bits of one word");

// ---- what the kernels share -------------------------------------------------------------------

struct Tile {
  const void* data;  // first score of the tile
  int64_t start;     // its index in the tensor
  int64_t tensor;
  int32_t length;
  Storage storage;
};

struct Digit {
  int shift, bits;
};
constexpr Digit kWideDigits[] = {{16, 15}, {0, 16}};            // 128 KB of shared counters
constexpr Digit kNarrowDigits[] = {{17, 14}, {3, 14}, {0, 3}};  // 32 KB: every card has them
constexpr int kMaxDigits = 3, kMaxBins = 1 << 16;

enum Remaining : int32_t { kNothing = 0, kScores, kStream };  // what is left to read

// One scored weight set aside: its position, whether it is above the first digit's bin, and
// otherwise the bits of the score that the bin leaves open.
using Entry = uint64_t;
constexpr int kOpenBits = 17;
constexpr Entry kOpenMask = (Entry(1) << kOpenBits) - 1;
constexpr Entry kAbove = Entry(1) << kOpenBits;
constexpr int kPositionShift = kOpenBits + 1;  // leaves 46 bits: 7e13 weights

struct State {
  Count first_bad;  // ~position, so that 0 means none and the largest comes first
  Count num_above;  // scores above the bin, or above the threshold when it is exact
  int64_t stream_length;
  uint32_t threshold;  // the digits found so far
  Remaining remaining;
  Count next_count[kMaxDigits][2], next_collect, next_emit[2];  // tiles handed out
};

struct Work {  // pointers into the workspace; what the kernels are given
  const TopkRow* rows;
  int64_t num_tensors, num_tiles, scores_per_tile, k, stream_capacity;
  TopkResult* result;
  Count* num_selected;  // [num_tensors]
  State* state;
  Count* bins;                      // [kMaxDigits][kMaxBins]
  Count *collect_sums, *emit_sums;  // [2][num_tiles] each
  Tile* tiles;                      // [num_tiles]
  Entry* stream;                    // [stream_capacity]
};

// ---- what is read: tiles of scores, or of the stream ------------------------------------------

// Both give keys: bit patterns that order as the scores do.
struct ScoreSource {
  static constexpr Remaining kWhen = kScores;
  const Work& work;

  __device__ explicit ScoreSource(const Work& w) : work(w) {}
  __device__ int64_t num_tiles() const { return work.num_tiles; }
  __device__ Tile open(int64_t tile) const { return work.tiles[tile]; }

  // The bits of scores first, first + kStride, ...; 0 past the end. The loads do not wait for one
  // another.
  template <int kStride, int kLoads>
  __device__ void load(const Tile& tile, int first, uint32_t (&bits)[kLoads]) const {
    if (tile.storage == Storage::kFloat32) {
      const uint32_t* data = static_cast<const uint32_t*>(tile.data);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = first + j * kStride;
        bits[j] = i < tile.length ? data[i] : 0;
      }
      return;
    }
    const uint16_t* data = static_cast<const uint16_t*>(tile.data);
    const bool bfloat = tile.storage == Storage::kBFloat16;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int i = first + j * kStride;
      bits[j] = i < tile.length ? data[i] : 0;
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      bits[j] = bfloat ? bits[j] << 16 : bits_of(fp16_to_float(uint16_t(bits[j])));
    }
  }

  __device__ Entry position(const Tile&, int64_t tile, int offset) const {
    return Entry(tile) << kTileBits | Entry(offset);
  }
};

struct StreamSource {
  static constexpr Remaining kWhen = kStream;
  const Work& work;
  const uint32_t first_digit;

  __device__ explicit StreamSource(const Work& w)
      : work(w), first_digit(w.state->threshold & ~uint32_t(kOpenMask)) {}
  __device__ int64_t num_tiles() const {
    return (work.state->stream_length + kTileScores - 1) >> kTileBits;
  }
  __device__ Tile open(int64_t tile) const {
    const int64_t start = tile << kTileBits;
    const int64_t left = work.state->stream_length - start;
    return {work.stream + start, start, 0, int32_t(min(left, int64_t(kTileScores))), {}};
  }

  template <int kStride, int kLoads>
  __device__ void load(const Tile& tile, int first, uint32_t (&bits)[kLoads]) const {
    const Entry* entries = static_cast<const Entry*>(tile.data);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int i = first + j * kStride;
      const Entry entry = i < tile.length ? entries[i] : 0;
      // Infinity stands for all that is above the bin: then the bin is below infinity's.
      bits[j] = entry & kAbove ? kInfinityBits : first_digit | uint32_t(entry & kOpenMask);
    }
  }

  __device__ Entry position(const Tile& tile, int64_t, int offset) const {
    return static_cast<const Entry*>(tile.data)[offset] >> kPositionShift;
  }
};

// ---- tiles ------------------------------------------------------------------------------------

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

// ---- count: the histogram of one digit --------------------------------------------------------

// Counters of 16 bits, so that 2^16 of them fit into shared memory. Whoever makes one reach half of
// its range moves that half to the 64-bit counter behind it; between two barriers a block counts at
// most the other half.
struct BlockHistogram {
  static constexpr uint32_t kHalf = 1u << 15;
  uint32_t* pairs;  // shared, two counters each
  Count* bins;      // global

  __device__ void add(uint32_t bin, uint32_t count) const {
    const uint32_t shift = 16 * (bin & 1);
    const uint32_t before = atomicAdd(&pairs[bin >> 1], count << shift) >> shift & 0xffffu;
    if (before < kHalf && before + count >= kHalf) {
      atomicSub(&pairs[bin >> 1], kHalf << shift);
      atomicAdd(&bins[bin], Count(kHalf));
    }
  }
};
constexpr int kTilesPerTurn = BlockHistogram::kHalf / kTileScores;

// Adds a thread's part of one tile; first_bad is raised to ~position of a score to refuse.
template <class Source>
__device__ void count_tile(const Source& source, int64_t t, Digit digit, uint32_t prefix,
                           const BlockHistogram& histogram, Count& first_bad) {
  const Tile tile = source.open(t);
  uint32_t bits[kTileScores / kCountThreads];
  source.template load<kCountThreads>(tile, int(threadIdx.x), bits);

  // Zeros and runs of one digit are counted in registers: of a tensor of equal scores every thread
  // would otherwise wait for the same counter at every score.
  uint32_t zeros = 0, run_bin = 0, run_length = 0;
#pragma unroll
  for (int j = 0; j < kTileScores / kCountThreads; ++j) {
    const int offset = int(threadIdx.x) + j * kCountThreads;
    if (offset >= tile.length) break;
    const uint32_t key = magnitude(bits[j]);
    if (is_bad_score(bits[j])) {
      first_bad = max(first_bad, ~Count(source.position(tile, t, offset)));
    } else if (key >> (digit.shift + digit.bits) == prefix) {
      const uint32_t bin = key >> digit.shift & ((1u << digit.bits) - 1);
      if (key == 0) {
        ++zeros;
      } else if (bin == run_bin) {
        ++run_length;
      } else {
        if (run_length > 0) histogram.add(run_bin, run_length);
        run_bin = bin;
        run_length = 1;
      }
    }
  }
  if (run_length > 0) histogram.add(run_bin, run_length);
  if (zeros > 0) histogram.add(0, zeros);
}

template <class Source>
__global__ void __launch_bounds__(kCountThreads) count(Work work, int digit_number, Digit digit) {
  if (digit_number > 0 && work.state->remaining != Source::kWhen) return;  // the whole grid
  FF_DYN_SHARED(uint32_t, pairs);                                          // [2^(bits - 1)]
  FF_SHARED(Count, next);
  const int num_pairs = 1 << (digit.bits - 1);
  for (int i = int(threadIdx.x); i < num_pairs; i += kCountThreads) pairs[i] = 0;

  const Source source(work);
  const int64_t num_tiles = source.num_tiles();
  const uint32_t prefix = work.state->threshold >> (digit.shift + digit.bits);
  Count* bins = work.bins + digit_number * kMaxBins;
  Count* queue = &work.state->next_count[digit_number][Source::kWhen == kStream];
  Count first_bad = 0;
  for (;;) {
    if (threadIdx.x == 0) next = atomicAdd(queue, Count(1));
    __syncthreads();
    const int64_t first = int64_t(next) * kTilesPerTurn;
    if (first >= num_tiles) break;
    for (int64_t t = first; t < min(first + kTilesPerTurn, num_tiles); ++t) {
      count_tile(source, t, digit, prefix, {pairs, bins}, first_bad);
    }
    __syncthreads();
  }
  if (first_bad != 0) atomicMax(&work.state->first_bad, first_bad);
  for (int i = int(threadIdx.x); i < num_pairs; i += kCountThreads) {
    const uint32_t pair = pairs[i];
    if (pair & 0xffffu) atomicAdd(&bins[2 * i], Count(pair & 0xffffu));
    if (pair >> 16) atomicAdd(&bins[2 * i + 1], Count(pair >> 16));
  }
}

// ---- choose: the bin of the k-th largest, and what to read next -------------------------------

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

// ---- compact: what is above a threshold, and the first ties, in order -------------------------

// Calls write(tile, t, offsets, kept, place): `offsets`, in shared memory, are the scores of tile t
// that were selected, and go to `place` and after.
template <class Source, class Write>
__device__ void compact(const Source& source, uint32_t threshold, Count num_ties, Count* queue,
                        Count* sums, const Write& write) {
  // The keys of a tile, and then the offsets of those selected. A gap every 32 words lets the
  // threads of a warp read each its own 32 from different banks.
  FF_SHARED(int32_t, words, [kTileScores + kTileScores / 32]);
  FF_SHARED(Count, before, [2]);  // greater and equal in all tiles before
  FF_SHARED(Count, next);
  const int64_t num_tiles = source.num_tiles();
  for (;;) {
    if (threadIdx.x == 0) next = atomicAdd(queue, Count(1));
    __syncthreads();
    const int64_t t = int64_t(next);
    if (t >= num_tiles) break;

    const Tile tile = source.open(t);
    constexpr int kLoads = 16;
    for (int first = int(threadIdx.x); first < kTileScores; first += kLoads * kCompactThreads) {
      uint32_t bits[kLoads];
      source.template load<kCompactThreads>(tile, first, bits);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = first + j * kCompactThreads;
        words[i + i / 32] = i < tile.length ? int32_t(magnitude(bits[j])) : -1;
      }
    }
    __syncthreads();

    // Each thread: 32 neighbours, one bit each.
    uint32_t greater = 0, equal = 0;
    const int32_t limit = int32_t(threshold);
    for (int j = 0; j < kScoresPerThread; ++j) {
      const int32_t key = words[int(threadIdx.x) * (kScoresPerThread + 1) + j];
      greater |= uint32_t(key > limit) << j;
      equal |= uint32_t(key == limit) << j;
    }
    // Both counts in one word: neither is more than 8192.
    const auto counts = block_sum<kCompactThreads>(uint32_t(__popc(greater) | __popc(equal) << 16));
    const uint32_t num_greater = counts.total & 0xffffu, num_equal = counts.total >> 16;
    if (warp_id() < 2) {
      const Count own = warp_id() == 0 ? num_greater : num_equal;
      const Count sum = sum_before_tile(sums + warp_id() * source.work.num_tiles, t, own);
      if (lane_id() == 0) before[warp_id()] = sum;
    }
    __syncthreads();

    const Count ties_left = num_ties - min(num_ties, before[1]);
    const uint32_t ties = uint32_t(min(Count(num_equal), ties_left));
    uint32_t tie = counts.before >> 16;
    uint32_t place = (counts.before & 0xffffu) + min(tie, ties);
    for (uint32_t left = greater | equal; left != 0; left &= left - 1) {
      const int j = __ffs(int(left)) - 1;
      if ((equal >> j & 1) && tie++ >= ties) continue;
      words[place++] = int32_t(threadIdx.x) * kScoresPerThread + j;
    }
    const int64_t first_place = int64_t(before[0] + min(before[1], num_ties));
    __syncthreads();
    write(tile, t, words, int(num_greater + ties), first_place);
  }
}

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
      const Entry position = source.position(tile, t, offsets[i]);
      const Entry open = key >> shift > bin ? kAbove : Entry(key) & kOpenMask;
      work.stream[place + i] = position << kPositionShift | open;
    }
  };
  // The lowest key of the bin is the threshold, with all of its ties.
  compact(source, state.threshold, ~Count(0), &state.next_collect, work.collect_sums, write);
}

template <class Source, class Index>
__global__ void __launch_bounds__(kCompactThreads) emit(Work work, Index* indices) {
  State& state = *work.state;
  if (state.remaining != Source::kWhen) return;  // the whole grid
  const Source source(work);
  const auto write = [&](const Tile& tile, int64_t t, const int32_t* offsets, int kept,
                         int64_t place) {
    const auto tensor_of = [&](int i) {
      return work.tiles[source.position(tile, t, offsets[i]) >> kTileBits].tensor;
    };
    for (int i = int(threadIdx.x); i < kept; i += kCompactThreads) {
      const Entry position = source.position(tile, t, offsets[i]);
      const Tile own = work.tiles[position >> kTileBits];
      indices[place + i] = Index(own.start + int64_t(position % kTileScores));
      // A tensor's number of selected scores: where its runs end minus where they begin.
      if (i > 0 && tensor_of(i - 1) != own.tensor) {
        atomicAdd(&work.num_selected[own.tensor], ~Count(i) + 1);
      }
      if (i == kept - 1 || tensor_of(i + 1) != own.tensor) {
        atomicAdd(&work.num_selected[own.tensor], Count(i + 1));
      }
    }
  };
  compact(source, state.threshold, Count(work.k) - state.num_above,
          &state.next_emit[Source::kWhen == kStream], work.emit_sums, write);
}

// ---- host -------------------------------------------------------------------------------------

// The parts of the workspace: what must begin as 0, and then the rest.
struct Layout {
  Work work;
  int64_t zero_bytes, bytes;
};

Layout lay_out(const TopkParams& params) {
  char* const base = static_cast<char*>(params.workspace);
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(base + used);
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
    const bool wide = shared_bytes_ >= pair_bytes(kWideDigits[1]) + 1024;
    const Digit* digits = wide ? kWideDigits : kNarrowDigits;
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

  template <class Index>
  void emit_indices() {
    launch_emit<StreamSource, Index>();
    launch_emit<ScoreSource, Index>();
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

  template <class Source, class Index>
  void launch_emit() {
    FF_LAUNCH((emit<Source, Index>), grid(emit<Source, Index>, kCompactThreads, 0),
              dim3(kCompactThreads), 0, stream_, work_, static_cast<Index*>(params_.indices));
  }

  const TopkParams& params_;
  const Work& work_;
  cudaStream_t stream_;
  int64_t shared_bytes_;
};

}  // namespace

int64_t topk_mask_workspace_bytes(const TopkParams& params) { return lay_out(params).bytes; }

void topk_mask_cuda(const TopkParams& params, void* stream) {
  const Layout layout = lay_out(params);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  check_status(cudaMemsetAsync(params.workspace, 0, size_t(layout.zero_bytes), cuda_stream));
  Launcher launcher(params, layout.work, cuda_stream);
  launcher.find_threshold();
  if (params.wide_indices) {
    launcher.emit_indices<int64_t>();
  } else {
    launcher.emit_indices<int32_t>();
  }
}

}  // namespace fishfast
