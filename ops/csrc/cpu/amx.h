// Products of matrices of float32 numbers by a unit that multiplies bfloat16 numbers (Intel AMX).
//
// A float32 number is the sum of three bfloat16 numbers: the nearest one, the nearest one to what that leaves, and the
// rest. Of the nine products of two such sums six matter; the others are below a float32 number's precision. The unit
// adds in float32: its sums are about as exact as a chain of float32 multiply-adds.
//
// Source: G. Henry, P. T. P. Tang and A. Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype for
// Higher-Precision Computations, ARITH 2019, sections III and IV.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "memory.h"
#include "vectors.h"

namespace bevperception::cpu {
namespace {

constexpr int64_t kTileRows = 16;   // of a tile register
constexpr int64_t kTileLine = 64;   // bytes of its row
constexpr int64_t kTileBytes = kTileRows * kTileLine;
constexpr int64_t kTileDepth = 32;  // bfloat16 numbers of a row: what one step sums over
constexpr int64_t kTileParts = 3;   // of a float32 number
constexpr int64_t kTileColumns = 2 * kTileRows;  // of a panel

// Claims the tile registers, all of full size; afterwards their configuration is as it was.
class TileRegisters {
 public:
  TileRegisters() {
    _tile_storeconfig(&before_);
    Configuration full{};
    full.palette = 1;
    for (int i = 0; i < 8; ++i) full.row_bytes[i] = kTileLine, full.rows[i] = kTileRows;
    _tile_loadconfig(&full);
  }
  ~TileRegisters() { _tile_loadconfig(&before_); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Configuration before_;
};

// 32 numbers in three parts, each of 32 bfloat16 numbers.
struct SplitNumbers {
  __m512i part[kTileParts];
};

BEV_INLINE __m512i nearest_bfloat16(__m512 numbers) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(numbers), _mm512_set1_epi32(0x8000));
  return _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

// What is infinite, or rounds to it, leaves a part that is not a number.
BEV_INLINE SplitNumbers split(__m512 left, __m512 right) {
  const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29,
                                                27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  SplitNumbers numbers;
  for (int i = 0; i < kTileParts; ++i) {
    const bool is_rest = i == kTileParts - 1;
    const __m512i left_part = is_rest ? _mm512_castps_si512(left) : nearest_bfloat16(left);
    const __m512i right_part = is_rest ? _mm512_castps_si512(right) : nearest_bfloat16(right);
    numbers.part[i] = _mm512_permutex2var_epi16(left_part, upper_halves, right_part);
    left = _mm512_sub_ps(left, _mm512_castsi512_ps(left_part));
    right = _mm512_sub_ps(right, _mm512_castsi512_ps(right_part));
  }
  return numbers;
}

// Rows become columns, of 16 times 16 numbers of four bytes.
BEV_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16];
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
    pairs[4 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
    pairs[8 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    pairs[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(pairs[i], pairs[8 + i], 0x88);
    rows[4 + i] = _mm512_shuffle_i32x4(pairs[4 + i], pairs[12 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(pairs[i], pairs[8 + i], 0xdd);
    rows[12 + i] = _mm512_shuffle_i32x4(pairs[4 + i], pairs[12 + i], 0xdd);
  }
}

// Sums of 32 rows times 32 columns, held in four tile registers.
class TileSums {
 public:
  static constexpr int64_t kNumbers = 4 * kTileRows * kTileRows;

  static BEV_INLINE void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // (32, 32), row by row.
  static BEV_INLINE void load(const float* sums) {
    stores_come_first();
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + kTileRows, kRow);
    _tile_loadd(2, sums + kLower, kRow);
    _tile_loadd(3, sums + kLower + kTileRows, kRow);
  }
  static BEV_INLINE void store(float* sums) {
    _tile_stored(0, sums, kRow);
    _tile_stored(1, sums + kTileRows, kRow);
    _tile_stored(2, sums + kLower, kRow);
    _tile_stored(3, sums + kLower + kTileRows, kRow);
  }

  // Adds products summed over `steps` times 32. upper, lower: tiles (step, part) of 16 rows each; panel: tiles (step,
  // part, half) of 16 columns each. Of `ahead` asks for some lines a step.
  static BEV_INLINE void add(const char* upper, const char* lower, const char* panel, int64_t steps, Ahead& ahead,
                             int64_t lines) {
    stores_come_first();
    for (int64_t s = 0; s < steps; ++s) {
      // In an order in which each changes one side only.
      load_columns<0>(panel), load_rows<2>(upper, lower), multiply();
      ahead.ask(lines);
      load_rows<0>(upper, lower), multiply();
      load_columns<2>(panel), multiply();
      load_columns<1>(panel), multiply();
      load_rows<1>(upper, lower), multiply();
      load_columns<0>(panel), multiply();
      upper += kTileParts * kTileBytes;
      lower += kTileParts * kTileBytes;
      panel += kTileParts * 2 * kTileBytes;
    }
  }

 private:
  static constexpr int64_t kRow = kTileColumns * static_cast<int64_t>(sizeof(float));  // bytes
  static constexpr int64_t kLower = kTileRows * kTileColumns;

  // Compilers do not see what a tile register is loaded from.
  static BEV_INLINE void stores_come_first() { __asm__ volatile("" : : : "memory"); }

  template <int PART>
  static BEV_INLINE void load_rows(const char* upper, const char* lower) {
    _tile_loadd(4, upper + PART * kTileBytes, kTileLine);
    _tile_loadd(5, lower + PART * kTileBytes, kTileLine);
  }
  template <int PART>
  static BEV_INLINE void load_columns(const char* panel) {
    _tile_loadd(6, panel + 2 * PART * kTileBytes, kTileLine);
    _tile_loadd(7, panel + (2 * PART + 1) * kTileBytes, kTileLine);
  }
  static BEV_INLINE void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

}  // namespace
}  // namespace bevperception::cpu
