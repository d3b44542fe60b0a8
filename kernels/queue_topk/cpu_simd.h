// The inner loops of the search, one set per instruction set (cpu_simd.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace maect_fast::queue_topk {

using Word = uint32_t;  // one fp32, two bf16 or four int8 features

// Queue rows that are scored together: a multiple of every tile height; 96 KiB in bf16 (L2).
constexpr int kPanelRows = 192;
// Query blocks are at most this wide.
constexpr int kMaxLanes = 32;
// Reservoirs are a multiple of every vector.
constexpr int64_t kScores = 16;

// A row rounded to the type of the scores, with hat for rounded: c = hat(c) + residual.
struct Rounded {
  float norm2;      // |c|^2
  float residual2;  // |c - hat(c)|^2
  float scale;      // hat(c) = scale * integers; 1 for floats
  int32_t start;    // -128 * sum of integers, as queries are stored with 128 added; 0 for floats
};

// Rows of the queue, rounded; the last panel ends with rows of zeros.
struct Panel {
  int num_rows;  // scored in whole tiles
  Word* words;   // [kPanelRows, num_words]
  float scale[kPanelRows];
  int32_t start[kPanelRows];
};

// Scores that reach a threshold; `place` is row * lanes + lane within a panel and a query block.
struct Hits {
  // Whole vectors are written at the end.
  static constexpr int kCapacity = kPanelRows * kMaxLanes + 16;
  int count;
  float score[kCapacity];
  int32_t place[kCapacity];
};

struct Simd {
  // Queries of a block: kLanes of the instruction set.
  int lanes;
  // Features in a word.
  int items;
  // Words of a row are a multiple of it.
  int word_multiple;
  // Reservoirs are so many times larger, as the margin of coarse scores keeps more candidates.
  int crowding;
  // Rounds row [dim] into words; what they hold beyond it is zero, words beyond them stay.
  Rounded (*round_row)(const float* row, int64_t dim, Word* words, int64_t num_words);
  // How a query's rounded word is stored (integers are made unsigned).
  Word query_flip;
  // Lists the scores <row, query> / (query's scale) of a panel and a block of queries [num_words]
  // [lanes] that reach the query's threshold [lanes], row by row.
  void (*score)(const Panel& panel, int64_t num_words, const Word* queries, const float* threshold,
                Hits* hits);
  // The k-th largest of scores, whose number is a multiple of kScores.
  float (*kth_largest)(const float* scores, int64_t count, int64_t k);
  // Moves the scores that reach the threshold, and their slots, to the front; returns their number.
  int64_t (*keep)(float* scores, int32_t* slots, int64_t count, float threshold);
  // Exact products, summed in double in an order that no instruction set changes.
  double (*dot)(const float* a, const float* b, int64_t dim);
};

extern const Simd portable;
#if defined(__x86_64__)
extern const Simd avx2, avx512, avx512_bf16, avx512_vnni, amx_bf16;
#endif

}  // namespace maect_fast::queue_topk
