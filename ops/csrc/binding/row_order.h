// The order in which the attention operators work on their rows.
//
// Rows come in the order of a BEV or of an image. Before the next line looks at the same place, all else that a
// line looks at has passed through the cache; on maps that exceed it, cells would be fetched again and again.
// Rows are taken tile by tile instead: a tile of the map and what points reach beyond it stay in a second-level cache.
#pragma once

#include "levels.h"

namespace bevperception {

// The first level of a map, cut into squares.
class Tiles {
 public:
  static constexpr int32_t kCells = 16;  // a side: with 8 cells around and 1 KB a cell, one takes 1 MB

  explicit Tiles(const Level& level)
      : columns_((level.width + kCells - 1) / kCells),
        rows_((level.height + kCells - 1) / kCells),
        columns_of_map_(static_cast<double>(level.width) / kCells),
        rows_of_map_(static_cast<double>(level.height) / kCells) {}

  int64_t count() const { return columns_ * rows_; }

  // Of the place (x, y), 0 to 1 over the map, or of the tile nearest to it. Lines of tiles run there and back.
  template <class T>
  int64_t at(T x, T y) const {
    const int64_t row = index(y * rows_of_map_, rows_), column = index(x * columns_of_map_, columns_);
    return row * columns_ + (row % 2 == 0 ? column : columns_ - 1 - column);
  }

 private:
  // What is not a number counts as 0.
  static int64_t index(double position, int64_t count) {
    if (!(position > 0)) return 0;
    return position < static_cast<double>(count) ? static_cast<int64_t>(position) : count - 1;
  }

  int64_t columns_, rows_;
  double columns_of_map_, rows_of_map_;
};

// Whether an order by tiles pays: maps are large, and a tile has rows to share its cells.
inline bool tiles_pay(const MsDeformAttnSizes& sizes, const Tiles& tiles, int64_t rows, size_t bytes_of_number) {
  constexpr int64_t kRowsOfTile = 8;
  const int64_t map_bytes = sizes.cells * sizes.heads * sizes.channels * static_cast<int64_t>(bytes_of_number);
  return map_bytes > cpu::kLargeMapBytes && rows / kRowsOfTile >= sizes.batch * tiles.count();
}

// Rows from 0 to `rows` by their keys, each from 0 to `keys`; those of one key as they come.
template <class KeyOf>
std::vector<int64_t> rows_by_key(int64_t rows, int64_t keys, const KeyOf& key_of) {
  constexpr int64_t kWork = 64;  // of one key: a fetch from memory
  std::vector<int64_t> key(static_cast<size_t>(rows)), order(key.size()), next(static_cast<size_t>(keys + 1));
  share_out(rows, kWork, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) key[static_cast<size_t>(row)] = key_of(row);
  });
  for (const int64_t of_row : key) ++next[static_cast<size_t>(of_row + 1)];
  for (size_t k = 1; k < next.size(); ++k) next[k] += next[k - 1];
  for (size_t row = 0; row < key.size(); ++row) {
    order[static_cast<size_t>(next[static_cast<size_t>(key[row])]++)] = static_cast<int64_t>(row);
  }
  return order;
}

}  // namespace bevperception
