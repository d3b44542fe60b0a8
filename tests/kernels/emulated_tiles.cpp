// The search's AMX loops over an emulation of the tile instructions, beside those of AVX-512.
//
// Features are small integers, so that every sum is exact and both must list the same hits.

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

namespace {

struct Tile {
  uint32_t row[16][16];
};
Tile tiles[8];
bool is_configured = false;

float number(const uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void emulated_config(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  is_configured = bytes[0] == 1;
  for (int tile = 0; tile < 8; ++tile) {
    is_configured &= bytes[16 + 2 * tile] == 64 && bytes[17 + 2 * tile] == 0;
    is_configured &= bytes[48 + tile] == 16;
  }
}

void emulated_move(const int tile, const void* memory, const int64_t stride, const bool to_memory) {
  char* at = static_cast<char*>(const_cast<void*>(memory));
  for (auto& row : tiles[tile].row) {
    std::memcpy(to_memory ? at : reinterpret_cast<char*>(row),
                to_memory ? reinterpret_cast<char*>(row) : at, sizeof row);
    at += stride;
  }
}

void emulated_product(const int c, const int a, const int b) {
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        const uint32_t x = tiles[a].row[m][k], y = tiles[b].row[k][n];
        const float sum = number(tiles[c].row[m][n]) + number(x << 16) * number(y << 16) +
                          number(x & 0xffff0000) * number(y & 0xffff0000);
        std::memcpy(&tiles[c].row[m][n], &sum, sizeof sum);
      }
    }
  }
}

}  // namespace

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_config
#define _tile_release() (is_configured = false)
#define _tile_zero(tile) (tiles[tile] = {})
#define _tile_loadd(tile, from, stride) emulated_move(tile, from, stride, false)
#define _tile_stored(tile, to, stride) emulated_move(tile, to, stride, true)
#define _tile_dpbf16ps emulated_product
#define __AMX_BF16__ 1
#define MAECT_SIMD amx_bf16
#include "kernels/queue_topk/cpu_simd.cpp"

int main() {
  using namespace maect_fast::queue_topk;
  uint32_t state = 1;
  const auto draw = [&] {
    return static_cast<int>((state = state * 1664525 + 1013904223) >> 29) - 4;
  };
  int num_hits = 0;
  for (const int dim : {1, 2, 31, 32, 37, 64, 256}) {
    const int64_t num_words = (((dim + 1) / 2) + 15) / 16 * 16;
    const auto round = [&](const Simd& simd, const std::vector<float>& row) {
      std::vector<maect_fast::queue_topk::Word> words(num_words);
      simd.round_row(row.data(), dim, words.data(), num_words);
      return words;
    };
    std::vector<maect_fast::queue_topk::Word> queries(num_words * 32), rows(kPanelRows * num_words);
    std::vector<float> row(dim), threshold(32);
    for (int lane = 0; lane < 32; ++lane) {
      for (float& x : row) x = static_cast<float>(draw());
      threshold[lane] = static_cast<float>(8 * draw());
      const auto words = round(amx_bf16, row);
      if (words != round(avx512_bf16, row)) return std::puts("rows are rounded differently");
      for (int64_t w = 0; w < num_words; ++w) queries[w * 32 + lane] = words[w];
    }
    auto panel = std::make_unique<Panel>();
    panel->words = rows.data();
    for (const int num_rows : {kPanelRows, 40}) {
      panel->num_rows = num_rows;
      std::fill(rows.begin(), rows.end(), 0);
      for (int r = 0; r < num_rows; ++r) {
        for (float& x : row) x = static_cast<float>(draw());
        const auto words = round(amx_bf16, row);
        std::memcpy(rows.data() + r * num_words, words.data(), num_words * sizeof words[0]);
      }
      auto found = std::make_unique<Hits>(), expected = std::make_unique<Hits>();
      amx_bf16.score(*panel, num_words, queries.data(), threshold.data(), found.get());
      avx512_bf16.score(*panel, num_words, queries.data(), threshold.data(), expected.get());
      if (is_configured) return std::puts("the tiles are not given back");
      // The last strip of 32 rows may reach further than the last tile of 8.
      int count = 0;
      while (count < found->count && found->place[count] < num_rows * 32) ++count;
      int expected_count = 0;
      while (expected_count < expected->count && expected->place[expected_count] < num_rows * 32) {
        ++expected_count;
      }
      const bool same = count == expected_count &&
                        std::memcmp(found->place, expected->place, count * sizeof(int32_t)) == 0 &&
                        std::memcmp(found->score, expected->score, count * sizeof(float)) == 0;
      if (!same) return std::printf("dim %d, %d rows: other hits\n", dim, num_rows);
      num_hits += count;
    }
  }
  return num_hits > 1000 ? 0 : std::puts("too few hits to compare");
}
