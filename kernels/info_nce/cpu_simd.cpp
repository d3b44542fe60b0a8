// The inner loops of the loss for the instruction set MAECT_SIMD.

#include "cpu_simd.h"

#include "../_common/simd.h"

namespace maect_fast::info_nce {
namespace {

#if defined(__AVX512BF16__)
using Math = Bf16;
#else
using Math = Fp32;
#endif

// exp(x) for x <= 88 within 1.5 units in the last place: 1 at 0, 0 below -88; NaN stays NaN.
MAECT_INLINE Floats exponential(Floats x) {
  // Adding this rounds to an integer, whose low bits are then a biased exponent.
  constexpr float kRound = 0x1.8p23f + 127;
  // ln 2 in two parts, of which the first times an exponent is exact.
  constexpr float kLn2 = 0x1.63p-1f, kLn2Rest = -0x1.bd0106p-13f;
  x = larger(broadcast(-88.1f), x);
  const Floats shifted = x * 0x1.715476p0f + kRound;
  const Floats exponent = shifted - kRound;
  const Floats r = x - exponent * kLn2 - exponent * kLn2Rest;
  // Minimax polynomial, relative error 3e-9 on [-ln 2 / 2, ln 2 / 2].
  Floats power = broadcast(0x1.6a2352p-10f);
  power = power * r + 0x1.123a6cp-7f;
  power = power * r + 0x1.5558f4p-5f;
  power = power * r + 0x1.555490p-3f;
  power = power * r + 0x1.fffffcp-2f;
  power = power * r + 1;
  power = power * r + 1;
  return power * reinterpret_cast<Floats>(reinterpret_cast<Ints>(shifted) << 23);
}

#if defined(__AVX512BF16__)

void round_row(const float* row, const int64_t dim, Word* words) {
  int64_t d = 0;
  for (; d + kVector <= dim; d += kVector) {
    const __m256bh halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(row + d));
    __builtin_memcpy(words + d / 2, &halves, sizeof halves);
  }
  if (d == dim) return;
  const __mmask16 rest = static_cast<__mmask16>((1u << (dim - d)) - 1);
  const __m256bh halves = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, row + d));
  __builtin_memcpy(words + d / 2, &halves, sizeof(Word) * ((dim - d + 1) / 2));
}

// Selects 0, 16, 1, 17, .. of 32 numbers.
__m512i interleaving() {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
}

void pair_rows(const Word* even, const Word* odd, const int64_t dim, Word* pairs) {
  const __m512i order = interleaving();
  for (int64_t d = 0; d < dim; d += kVector) {
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(even + d / 2)));
    both = _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i*)(odd + d / 2)), 1);
    _mm512_storeu_si512(pairs + d, _mm512_permutexvar_epi16(order, both));
  }
}

// Rounds weights of two rows into one row of words, in place; returns the number of words.
int round_weights(float* weights, const int num_rows) {
  const __m512i order = interleaving();
  for (int row = 0; row < num_rows; row += 2) {
    MAECT_UNROLL for (int v = 0; v < kLanes; v += kVector) {
      const float* even = weights + row * kLanes + v;
      const __m512bh both =
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(even + kLanes), _mm512_loadu_ps(even));
      _mm512_storeu_si512(weights + row / 2 * kLanes + v,
                          _mm512_permutexvar_epi16(order, (__m512i)both));
    }
  }
  return (num_rows + 1) / 2;
}

#else

void round_row(const float* row, const int64_t dim, Word* words) {
  __builtin_memcpy(words, row, sizeof(float) * dim);
}

constexpr auto pair_rows = nullptr;

int round_weights(float*, const int num_rows) { return num_rows; }

#endif

void score(const Word* rows, const int64_t row_step, const int num_rows, const Word* predictions,
           const int64_t num_words, const float scale, float* logits, const int64_t step) {
  // Products are summed in parts: in one sum, each of many roundings would be as large as the last.
  constexpr int64_t kPart = 64;
  for (int row = 0; row < num_rows; row += kTileRows) {
    float* tile = logits + row * step;
    MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
      store(tile + r * step, Floats{});
      store(tile + r * step + kVector, Floats{});
    }
    for (int64_t w = 0; w < num_words; w += kPart) {
      Math::Acc acc[kTileRows][2] = {};
      multiply<Math>(rows + row * row_step + w, row_step, 1, predictions + w * kLanes, kLanes,
                     w + kPart < num_words ? kPart : num_words - w, acc);
      MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
        float* out = tile + r * step;
        store(out, load<Floats>(out) + scale * acc[r][0]);
        store(out + kVector, load<Floats>(out + kVector) + scale * acc[r][1]);
      }
    }
  }
}

void update(const float* logits, const int count, const int64_t step, float* state) {
  // Two sums at a time, as each waits for its last addition.
  Floats before[2], most[2], total[2], excess[2];
  MAECT_UNROLL for (int v = 0; v < 2; ++v) most[v] = before[v] = load<Floats>(state + v * kVector);
  for (int i = 0; i < count; ++i) {
    MAECT_UNROLL for (int v = 0; v < 2; ++v) {
      most[v] = larger(most[v], load<Floats>(logits + i * step + v * kVector));
    }
  }
  MAECT_UNROLL for (int v = 0; v < 2; ++v) {
    const Floats scale = exponential(before[v] - most[v]);
    total[v] = load<Floats>(state + kLanes + v * kVector) * scale;
    excess[v] = load<Floats>(state + 2 * kLanes + v * kVector) * scale;
  }
  for (int i = 0; i < count; ++i) {
    MAECT_UNROLL for (int v = 0; v < 2; ++v) {
      // Kahan's summation: a small loss consists of small terms beside the maximum's 1.
      const Floats x = load<Floats>(logits + i * step + v * kVector);
      const Floats term = exponential(x - most[v]) - excess[v];
      const Floats next = total[v] + term;
      excess[v] = (next - total[v]) - term;
      total[v] = next;
    }
  }
  MAECT_UNROLL for (int v = 0; v < 2; ++v) {
    store(state + v * kVector, most[v]);
    store(state + kLanes + v * kVector, total[v]);
    store(state + 2 * kLanes + v * kVector, excess[v]);
  }
}

void join(const float* state, float* row_max, float* row_sum) {
  *row_max = maximum(larger(load<Floats>(state), load<Floats>(state + kVector)));
  Floats total{};
  for (int v = 0; v < kLanes; v += kVector) {
    const Floats each = load<Floats>(state + kLanes + v) - load<Floats>(state + 2 * kLanes + v);
    total += each * exponential(load<Floats>(state + v) - *row_max);
  }
  *row_sum = sum(total);
}

void weigh(float* logits, const int num_rows, const float* row_max, const float* grad_sum,
           const bool transposed) {
  for (int row = 0; row < num_rows; ++row) {
    MAECT_UNROLL for (int v = 0; v < kLanes; v += kVector) {
      float* at = logits + row * kLanes + v;
      const Floats shift = transposed ? load<Floats>(row_max + v) : broadcast(row_max[row]);
      const Floats grad = transposed ? load<Floats>(grad_sum + v) : broadcast(grad_sum[row]);
      store(at, exponential(load<Floats>(at) - shift) * grad);
    }
  }
}

void accumulate(float* weights, const int num_rows, const Word* columns, const int64_t step,
                const int64_t dim, float* grad, const int64_t grad_step) {
  const int num_words = round_weights(weights, num_rows);
  const Word* words = reinterpret_cast<const Word*>(weights);
  for (int64_t d = 0; d < dim; d += kLanes) {
    for (int lane = 0; lane < kLanes; lane += kTileRows) {
      // A panel's sum on its own: sums of many terms would lose digits one by one.
      Math::Acc acc[kTileRows][2] = {};
      multiply<Math>(words + lane, 1, kLanes, columns + d, step, num_words, acc);
      MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
        float* out = grad + (lane + r) * grad_step + d;
        store(out, load<Floats>(out) + acc[r][0]);
        store(out + kVector, load<Floats>(out + kVector) + acc[r][1]);
      }
    }
  }
}

}  // namespace

const Simd MAECT_SIMD = {kLanes, Math::kItems, round_row, pair_rows,  score,
                         update, join,         weigh,     accumulate, dot};

}  // namespace maect_fast::info_nce
