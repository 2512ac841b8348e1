// The tile registers of Intel AMX in ordinary memory: included ahead of cpu/amx.h, so that its code runs on any CPU with
// AVX-512, and so that sanitizers see every access.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulated_tiles {

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct State {
  Configuration configuration;
  unsigned char tiles[8][16][64];
};

inline State& state() {
  static thread_local State registers;
  return registers;
}

// Every use of a tile that is not configured in full ends the program, as it would with the real ones.
inline unsigned char (&tile(int number))[16][64] {
  const Configuration& as = state().configuration;
  if (as.palette != 1 || as.row_bytes[number] != 64 || as.rows[number] != 16) abort();
  return state().tiles[number];
}

inline void configure(const void* from) {
  memset(&state(), 0, sizeof(State));
  memcpy(&state().configuration, from, sizeof(Configuration));
}

inline void load(int number, const void* from, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) memcpy(tile(number)[row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int number, void* to, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) memcpy(static_cast<char*>(to) + row * stride, tile(number)[row], 64);
}

// Number 2 * pair + odd of a row of bfloat16 numbers.
inline float number_of(const unsigned char (&row)[64], int pair, int odd) {
  uint16_t half;
  memcpy(&half, row + 4 * pair + 2 * odd, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

// TDPBF16PS of Intel's Instruction Set Extensions Programming Reference, but for denormal numbers.
inline void multiply(int sums, int left, int right) {
  for (int row = 0; row < 16; ++row) {
    float total[16];
    memcpy(total, tile(sums)[row], sizeof total);
    for (int column = 0; column < 16; ++column) {
      float even = 0, odd = 0;
      for (int k = 0; k < 16; ++k) {
        even += number_of(tile(left)[row], k, 0) * number_of(tile(right)[k], column, 0);
        odd += number_of(tile(left)[row], k, 1) * number_of(tile(right)[k], column, 1);
      }
      total[column] += even + odd;
    }
    memcpy(tile(sums)[row], total, sizeof total);
  }
}

}  // namespace emulated_tiles

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated_tiles::configure(from)
#define _tile_storeconfig(to) memcpy(to, &emulated_tiles::state().configuration, sizeof(emulated_tiles::Configuration))
#define _tile_zero(number) memset(emulated_tiles::tile(number), 0, sizeof emulated_tiles::tile(number))
#define _tile_loadd(number, from, stride) emulated_tiles::load(number, from, stride)
#define _tile_stored(number, to, stride) emulated_tiles::store(number, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated_tiles::multiply(sums, left, right)
