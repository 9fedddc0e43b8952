// What the kernels of topk_mask.cu read: tiles of the scores, or of the stream set aside from them.
#pragma once
#include "launch.h"
#include "ordered_scan.cuh"
#include "topk_mask.h"

namespace fishfast::topk {

constexpr int kTileBits = 13;
constexpr int kTileScores = 1 << kTileBits;
static_assert(kTileScores == kTopkScoresPerTile, "positions are a tile and an offset in it");

struct Tile {
  const void* data;  // first score of the tile
  int64_t start;     // its index in the tensor
  int64_t tensor;
  int32_t length;
  Storage storage;
};

struct Place {
  int64_t tensor, index;
};

// Positions order as (tensor, index) does; they leave gaps, since the last tile of a tensor is
// shorter.
__device__ __forceinline__ Count position_of(int64_t tile, int offset) {
  return Count(tile) << kTileBits | Count(offset);
}

struct Digit {
  int shift, bits;
};
// Two digits fix the threshold where a block may have that much shared memory: A100, H100, H200,
// B200.
constexpr Digit kWideDigits[] = {{16, 15}, {0, 16}};            // 128 KB of shared counters
constexpr Digit kNarrowDigits[] = {{17, 14}, {3, 14}, {0, 3}};  // 32 KB: every card has them
constexpr int kMaxDigits = 3, kMaxBins = 1 << 16;

enum Remaining : int32_t { kNothing = 0, kScores, kStream };  // what is left to read

// One score set aside: its position, whether it is above the first digit's bin, and
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

  __device__ Place locate(const Tile& tile, int offset) const {
    return {tile.tensor, tile.start + offset};
  }
};

struct StreamSource {
  static constexpr Remaining kWhen = kStream;
  const Work& work;
  const uint32_t first_digit;

  __device__ explicit StreamSource(const Work& w)
      : work(w), first_digit(w.state->threshold & ~uint32_t(kOpenMask)) {}
  __device__ int64_t num_tiles() const {
    return (work.state->stream_length + work.scores_per_tile - 1) / work.scores_per_tile;
  }
  __device__ Tile open(int64_t tile) const {
    const int64_t start = tile * work.scores_per_tile;
    const int64_t left = work.state->stream_length - start;
    return {work.stream + start, start, 0, int32_t(min(left, work.scores_per_tile)), {}};
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

  __device__ Place locate(const Tile& tile, int offset) const {
    const Entry position = static_cast<const Entry*>(tile.data)[offset] >> kPositionShift;
    const Tile& scores = work.tiles[position >> kTileBits];
    return {scores.tensor, scores.start + int64_t(position % kTileScores)};
  }
};

}  // namespace fishfast::topk
