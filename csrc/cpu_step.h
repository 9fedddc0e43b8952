// Runs an optimizer's rows on CPU threads: blocks of entries, arithmetic first, scatter after, so
// that the arithmetic vectorises.
#pragma once
#include <vector>

#include "cpu_clones.h"
#include "parallel.h"
#include "scatter.h"

namespace fishfast {

constexpr int64_t kEntriesPerCpuChunk = 16384;  // five fp32 streams of it fit in a 1 MB L2

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
    update(*piece.row, piece.begin, piece.end);
    for (int64_t i = piece.begin; i < piece.end; ++i) {
      scatter_value(piece.row->target, i, piece.row->values[i]);
    }
  });
}

}  // namespace fishfast
