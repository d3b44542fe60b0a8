// The inner loops of the loss, one set per instruction set (cpu_simd.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace maect_fast::info_nce {

using Word = uint32_t;  // one fp32 or two bf16 numbers

// Neighbours that are multiplied together: even, and a multiple of every tile height. A strip of
// their logits and the features that a tile of the gradient reads share the L1 cache.
constexpr int kPanelRows = 128;
// Predictions of a block are at most this many, and a multiple of them fills a strip of kColumns.
constexpr int kMaxLanes = 32;
constexpr int kColumns = 128;

struct Simd {
  // Predictions of a block.
  int lanes;
  // Numbers in a word.
  int items;
  // Rounds row [dim] into words, the last one padded with zeros.
  void (*round_row)(const float* row, int64_t dim, Word* words);
  // Words of two rows' numbers, feature by feature, from the rows' own words (of bf16). Whole
  // vectors are read and written.
  void (*pair_rows)(const Word* even, const Word* odd, int64_t dim, Word* pairs);
  // logits[r * step + lane] = <row r, prediction> * scale, for rows [num_rows][row_step] up to a
  // whole tile and a block of predictions [num_words][lanes].
  void (*score)(const Word* rows, int64_t row_step, int num_rows, const Word* predictions,
                int64_t num_words, float scale, float* logits, int64_t step);
  // Takes `count` vectors, `step` apart, into each lane's running state [3][lanes / 2]: the
  // maximum, the sum of exp(logit - maximum), and by how much roundings made that sum too large.
  void (*update)(const float* logits, int count, int64_t step, float* state);
  // All lanes of a state in one.
  void (*join)(const float* state, float* row_max, float* row_sum);
  // logits [num_rows][lanes] become exp(logit - row_max) * grad_sum, both given per row, or per
  // lane where softmax rows are predictions.
  void (*weigh)(float* logits, int num_rows, const float* row_max, const float* grad_sum,
                bool transposed);
  // grad[lane * grad_step + d] += sum over rows r of weights[r][lane] * neighbour[r][d], for `dim`
  // features up to a whole tile. `columns` is the panel itself, or its pairs of rows, `step` words
  // apart; rows from num_rows on are zero. Weights are overwritten.
  void (*accumulate)(float* weights, int num_rows, const Word* columns, int64_t step, int64_t dim,
                     float* grad, int64_t grad_step);
  // Exact products, summed in double in an order that no instruction set changes.
  double (*dot)(const float* a, const float* b, int64_t dim);
};

extern const Simd portable;
#if defined(__x86_64__)
extern const Simd avx2, avx512, avx512_bf16;
#endif

}  // namespace maect_fast::info_nce
