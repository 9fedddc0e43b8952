// Runs an optimizer's rows on CPU threads: blocks of entries, arithmetic first, scatter after, so
// that the arithmetic vectorises. Meanwhile the weights are on their way from memory.
#pragma once
#include <vector>

#include "cpu_clones.h"
#include "parallel.h"
#include "scatter.h"

namespace fishfast {

constexpr int64_t kEntriesPerCpuChunk = 4096;  // their weights' lines and five streams fit in an L2

constexpr size_t kPiecesAhead = 2;

inline void prefetch_weight(const ScatterTarget& target, int64_t entry) {
  if (target.weight == nullptr) return;
  const int64_t size = target.storage == Storage::kFloat32 ? 4 : 2;
  __builtin_prefetch(static_cast<char*>(target.weight) + scatter_offset(target, entry) * size, 1);
}

// prefetch_streams(row, begin), found by the row's type, fetches what the update of an entry reads.
// Calls update(row, begin, end) for pieces of every row, then scatters the piece.
template <class Row, class Update>
void step_rows(const Row* rows, int64_t num_rows, int num_threads, const Update& update) {
  struct Piece {
    const Row* row;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t begin = 0; begin < rows[r].k; begin += kEntriesPerCpuChunk) {
      pieces.push_back({&rows[r], begin, std::min(rows[r].k, begin + kEntriesPerCpuChunk)});
    }
  }
  parallel_chunks(int64_t(pieces.size()), num_threads, [&](int64_t p, int) {
    const Piece& piece = pieces[size_t(p)];
    const ScatterTarget target = piece.row->target;
    // Of many small rows the start of each is a cache miss in every stream, so begun early.
    if (size_t(p) + kPiecesAhead < pieces.size()) {
      const Piece& next = pieces[size_t(p) + kPiecesAhead];
      const int64_t size = next.row->target.wide_offsets ? 8 : 4;
      __builtin_prefetch(static_cast<const char*>(next.row->target.offsets) + next.begin * size);
      prefetch_streams(*next.row, next.begin);
    }
    for (int64_t i = piece.begin; i < piece.end; ++i) prefetch_weight(target, i);
    update(*piece.row, piece.begin, piece.end);
    const float* values = piece.row->values;
    for (int64_t i = piece.begin; i < piece.end; ++i) scatter_value(target, i, values[i]);
  });
}

}  // namespace fishfast
