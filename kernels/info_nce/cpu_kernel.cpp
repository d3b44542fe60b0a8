// Row statistics of the InfoNCE loss and their gradient on the CPU.
//
// Predictions are normalised, rounded and stored in blocks, lane by lane; neighbours are rounded
// panel by panel. Logits exist as one strip of a panel at a time, whose exponentials are summed, or
// multiplied once more with the panel. A task owns its softmax rows in the forward and its
// predictions in the backward, so nothing is merged and no number of threads changes a bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "../_common/cpu_features.h"
#include "../_common/rows.h"
#include "../_common/simd_choice.h"
#include "cpu_simd.h"

namespace maect_fast::info_nce {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kEps = 1e-12f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Below every logit, and finite: its difference to itself is zero.
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Those that this CPU can run for predictions of some dtype, the fastest first.
std::vector<Named<Simd>> runnable([[maybe_unused]] const ScalarType dtype) {
  std::vector<Named<Simd>> found;
#if defined(__x86_64__)
  if (dtype == ScalarType::BFloat16 && cpu_has_avx512() && cpu_has({"avx512_bf16"})) {
    found.push_back({"avx512_bf16", &avx512_bf16});
  }
  if (cpu_has_avx512()) found.push_back({"avx512", &avx512});
  if (cpu_has({"avx2", "fma"})) found.push_back({"avx2", &avx2});
#endif
  found.push_back({"portable", &portable});
  return found;
}

std::string simd_names() { return names(runnable(ScalarType::BFloat16)); }

// Null for an empty tensor.
const float* float_data(const Tensor& tensor) {
  if (tensor.numel() == 0) return nullptr;
  STD_TORCH_CHECK(tensor.is_contiguous(), "expected contiguous statistics and gradients");
  return tensor.const_data_ptr<float>();
}

std::vector<Rows> views_of(const Tensor& tensor) {
  std::vector<Rows> views;
  for (int64_t view = 0; view < tensor.size(0); ++view) {
    views.emplace_back(torch::stable::select(tensor, 0, view));
  }
  return views;
}

// How rows of D features are stored for the products.
struct Layout {
  Layout(const Simd& simd, const int64_t dim)
      : dim(dim),
        num_words((dim + simd.items - 1) / simd.items),
        // An odd number of cache lines: the same feature of many rows must not meet in one set.
        step(kLine * (((dim + kMaxLanes - 1) / kMaxLanes * (kMaxLanes / kLine)) | 1)) {}

  static constexpr int64_t kLine = 16;
  int64_t dim, num_words;
  // From a row of a panel, or of the gradient, to the next; features are padded to whole tiles.
  int64_t step;
};

// Some neighbours, rounded.
class Panel {
 public:
  Panel(const Simd& simd, const Layout& layout)
      : simd_(simd), layout_(layout), rows_(kPanelRows * layout.step), buffer_(layout.dim) {
    if (simd.items == 2) pairs_.resize(kPanelRows / 2 * layout.step);
  }

  void fill(const Rows& neighbour, const int64_t first) {
    num_rows_ = static_cast<int>(std::min<int64_t>(kPanelRows, neighbour.count() - first));
    for (int row = 0; row < num_rows_; ++row) {
      simd_.round_row(neighbour.get(first + row, buffer_.data()), layout_.dim, at(row));
    }
    std::fill(rows_.begin() + num_rows_ * layout_.step, rows_.end(), 0);
  }

  // What `accumulate` reads.
  const Word* columns() {
    if (simd_.items == 1) return rows_.data();
    for (int row = 0; row < num_rows_; row += 2) {
      simd_.pair_rows(at(row), at(row + 1), layout_.dim, pairs_.data() + row / 2 * layout_.step);
    }
    return pairs_.data();
  }

  const Word* rows() const { return rows_.data(); }
  int num_rows() const { return num_rows_; }

 private:
  Word* at(const int row) { return rows_.data() + row * layout_.step; }

  const Simd& simd_;
  const Layout& layout_;
  int num_rows_ = 0;
  std::vector<Word> rows_;   // [kPanelRows, step]
  std::vector<Word> pairs_;  // [kPanelRows / 2, step]
  std::vector<float> buffer_;
};

// Shifts and factors of some softmax rows, the factors times a scale; zeros beyond their number.
struct Normaliser {
  // All rows' shifts, then all rows' factors, or null.
  Normaliser(const float* all, const int64_t num_all, const int64_t first, const int64_t count,
             const float scale) {
    for (int64_t i = 0; all && i < count; ++i) {
      shift[i] = all[first + i];
      factor[i] = all[num_all + first + i] * scale;
    }
  }

  float shift[kPanelRows] = {}, factor[kPanelRows] = {};
};

class Loss {
 public:
  Loss(const Tensor& predicted, const Tensor& neighbour, const double temperature,
       const int64_t first, const bool transposed, const std::string& simd)
      : simd_(choose(runnable(predicted.scalar_type()), simd)),
        predicted_(views_of(predicted)),
        neighbour_(views_of(neighbour)),
        num_views_(predicted.size(0)),
        num_predictions_(predicted.size(1)),
        num_neighbours_(neighbour.size(1)),
        num_blocks_((num_predictions_ + simd_.lanes - 1) / simd_.lanes),
        num_panels_((num_neighbours_ + kPanelRows - 1) / kPanelRows),
        scale_(static_cast<float>(1 / temperature)),
        first_(first),
        transposed_(transposed),
        layout_(simd_, predicted.size(2)),
        words_(num_views_ * num_blocks_ * layout_.num_words * simd_.lanes) {
    STD_TORCH_CHECK(first >= 0 && first + num_predictions_ <= num_neighbours_,
                    "expected a neighbour for every prediction");
    pack();
  }

  // row_max, row_sum [V, R], positive [V, n].
  void forward(float* row_max, float* row_sum, float* positive) const {
    if (transposed_) {
      over_predictions([&](const int64_t view, const int64_t begin, const int64_t end) {
        const int64_t row = view * num_predictions_;
        sum_over_neighbours(view, begin, end, row_max + row, row_sum + row, positive + row);
      });
      return;
    }
    const int64_t num_tasks = num_views_ * num_panels_;
    torch::stable::parallel_for(0, num_tasks, 1, [&](const int64_t begin, const int64_t end) {
      Panel panel(simd_, layout_);
      std::vector<float> strip(kPanelRows * kColumns), states;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t view = task / num_panels_, start = task % num_panels_ * kPanelRows;
        panel.fill(opposite(view), start);
        reset(states, kPanelRows);
        sum_over_predictions(view, panel, start, strip.data(), states.data(),
                             positive + view * num_predictions_);
        const int64_t row = view * num_neighbours_ + start;
        for (int i = 0; i < panel.num_rows(); ++i) {
          simd_.join(&states[i * state_size()], row_max + row + i, row_sum + row + i);
          keep_nan(row_max + row + i, row_sum + row + i);
        }
      }
    });
  }

  // grad [V, n, D], radial [V, n]; weight [V, n], by_neighbour [2, V, P] and by_predicted
  // [2, V, n], null where rows of that kind have no losses.
  template <class Item>
  void backward(const float scale, const float* weight, const float* by_neighbour,
                const float* by_predicted, Item* grad, float* radial) const {
    over_predictions([&](const int64_t view, const int64_t begin, const int64_t end) {
      std::vector<float> grad_unit((end - begin) * simd_.lanes * layout_.step);
      sum_gradients(view, begin, end, scale, weight + view * num_predictions_, by_neighbour,
                    by_predicted, grad_unit.data());
      normalize_backward(view, begin * simd_.lanes, lanes_end(end), grad_unit.data(),
                         grad + view * num_predictions_ * layout_.dim,
                         radial + view * num_predictions_);
    });
  }

 private:
  // Two views are crossed.
  const Rows& opposite(const int64_t view) const { return neighbour_[num_views_ - 1 - view]; }
  int state_size() const { return 3 * simd_.lanes; }
  // States of nothing.
  void reset(std::vector<float>& states, const int64_t count) const {
    states.assign(count * state_size(), 0);
    for (int64_t i = 0; i < count; ++i) {
      std::fill_n(&states[i * state_size()], simd_.lanes, kLowest);
    }
  }
  int64_t lanes_end(const int64_t block) const {
    return std::min(block * simd_.lanes, num_predictions_);
  }
  // Where a block of predictions starts.
  int64_t block(const int64_t view, const int64_t index) const {
    return (view * num_blocks_ + index) * layout_.num_words * simd_.lanes;
  }

  // Calls function(view, first block, last block) on ranges of blocks of one view.
  template <class Function>
  void over_predictions(const Function& function) const {
    const int64_t num_tasks = num_views_ * num_blocks_;
    torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, const int64_t end) {
      while (begin < end) {
        const int64_t view = begin / num_blocks_, start = view * num_blocks_;
        const int64_t stop = std::min(end, start + num_blocks_);
        function(view, begin - start, stop - start);
        begin = stop;
      }
    });
  }

  void pack() {
    over_predictions([&](const int64_t view, const int64_t begin, const int64_t end) {
      const int lanes = simd_.lanes;
      std::vector<float> buffer(layout_.dim), unit(layout_.dim);
      std::vector<Word> words(layout_.num_words);
      for (int64_t j = begin * lanes; j < lanes_end(end); ++j) {
        const float* raw = predicted_[view].get(j, buffer.data());
        const float divisor = clamp_norm(norm(raw));
        for (int64_t d = 0; d < layout_.dim; ++d) unit[d] = raw[d] / divisor;
        simd_.round_row(unit.data(), layout_.dim, words.data());
        Word* to = &words_[block(view, j / lanes) + j % lanes];
        for (int64_t w = 0; w < layout_.num_words; ++w) to[w * lanes] = words[w];
      }
    });
  }

  float norm(const float* row) const {
    return static_cast<float>(std::sqrt(simd_.dot(row, row, layout_.dim)));
  }
  // NaN stays.
  static float clamp_norm(const float norm) { return norm < kEps ? kEps : norm; }

  void score(const Panel& panel, const int64_t view, const int64_t index, float* strip,
             const int64_t step) const {
    simd_.score(panel.rows(), layout_.step, panel.num_rows(), &words_[block(view, index)],
                layout_.num_words, scale_, strip, step);
  }

  // Softmax rows are the panel's neighbours; columns are taken strip by strip.
  void sum_over_predictions(const int64_t view, const Panel& panel, const int64_t start,
                            float* strip, float* states, float* positive) const {
    const int64_t per_strip = kColumns / simd_.lanes;
    for (int64_t index = 0; index < num_blocks_; index += per_strip) {
      const int64_t column = index * simd_.lanes, stop = std::min(index + per_strip, num_blocks_);
      const int64_t num_lanes = stop * simd_.lanes - column;
      const int64_t num_columns = lanes_end(stop) - column;
      for (int64_t i = index; i < stop; ++i) {
        score(panel, view, i, strip + (i - index) * simd_.lanes, kColumns);
      }
      for (int row = 0; row < panel.num_rows(); ++row) {
        float* logits = strip + row * kColumns;
        std::fill(logits + num_columns, logits + num_lanes, -kInfinity);
        const int64_t j = start + row - first_;
        if (column <= j && j < column + num_columns) {
          positive[j] = std::exchange(logits[j - column], -kInfinity);
        }
        simd_.update(logits, static_cast<int>(stop - index), simd_.lanes,
                     states + row * state_size());
      }
    }
  }

  // Softmax rows are predictions.
  void sum_over_neighbours(const int64_t view, const int64_t begin, const int64_t end,
                           float* row_max, float* row_sum, float* positive) const {
    const int lanes = simd_.lanes;
    Panel panel(simd_, layout_);
    std::vector<float> strip(kPanelRows * lanes), states;
    reset(states, end - begin);
    for (int64_t start = 0; start < num_neighbours_; start += kPanelRows) {
      panel.fill(opposite(view), start);
      for (int64_t index = begin; index < end; ++index) {
        score(panel, view, index, strip.data(), lanes);
        for_positives(start, panel.num_rows(), index, [&](const int64_t j, const int64_t place) {
          positive[j] = std::exchange(strip[place], -kInfinity);
        });
        simd_.update(strip.data(), panel.num_rows(), lanes,
                     &states[(index - begin) * state_size()]);
      }
    }
    for (int64_t j = begin * lanes; j < lanes_end(end); ++j) {
      const int64_t lane = j - begin * lanes;
      const float* state = &states[lane / lanes * state_size() + lane % lanes];
      row_max[j] = state[0];
      row_sum[j] = state[lanes] - state[2 * lanes];
      keep_nan(row_max + j, row_sum + j);
    }
  }

  void sum_gradients(const int64_t view, const int64_t begin, const int64_t end, const float scale,
                     const float* weight, const float* by_neighbour, const float* by_predicted,
                     float* grad_unit) const {
    const int lanes = simd_.lanes;
    Panel panel(simd_, layout_);
    std::vector<float> strip(kPanelRows * lanes), other(strip);
    for (int64_t start = 0; start < num_neighbours_; start += kPanelRows) {
      panel.fill(opposite(view), start);
      const Word* columns = panel.columns();
      const Normaliser rows(by_neighbour, num_views_ * num_neighbours_,
                            view * num_neighbours_ + start, panel.num_rows(), scale);
      for (int64_t index = begin; index < end; ++index) {
        score(panel, view, index, strip.data(), lanes);
        if (by_predicted) {
          const int64_t j = index * lanes;
          const Normaliser block(by_predicted, num_views_ * num_predictions_,
                                 view * num_predictions_ + j, lanes_end(index + 1) - j, scale);
          if (by_neighbour) other = strip;
          simd_.weigh(strip.data(), panel.num_rows(), block.shift, block.factor, true);
        }
        if (by_neighbour) {
          float* to = by_predicted ? other.data() : strip.data();
          simd_.weigh(to, panel.num_rows(), rows.shift, rows.factor, false);
        }
        if (by_predicted && by_neighbour) {
          std::transform(strip.begin(), strip.end(), other.begin(), strip.begin(), std::plus<>());
        }
        for_positives(start, panel.num_rows(), index, [&](const int64_t j, const int64_t place) {
          strip[place] = scale * weight[j];
        });
        simd_.accumulate(strip.data(), panel.num_rows(), columns, layout_.step, layout_.dim,
                         grad_unit + (index - begin) * lanes * layout_.step, layout_.step);
      }
    }
  }

  // Calls function(prediction, place in the strip) on the positive pairs of a panel and a block.
  template <class Function>
  void for_positives(const int64_t start, const int64_t num_rows, const int64_t index,
                     const Function& function) const {
    const int64_t lanes = simd_.lanes;
    const int64_t begin = std::max(index * lanes, start - first_);
    const int64_t end = std::min(lanes_end(index + 1), start - first_ + num_rows);
    for (int64_t j = begin; j < end; ++j) {
      function(j, (j + first_ - start) * lanes + j - index * lanes);
    }
  }

  // Comparisons lose a NaN, sums do not. (With an infinite maximum only the sum is NaN.)
  static void keep_nan(float* row_max, const float* row_sum) {
    if (std::isnan(*row_sum) && !std::isinf(*row_max)) *row_max = *row_sum;
  }

  // From the gradient of normalised predictions, from that of `begin` on, to that of the raw ones;
  // see reference.py.
  template <class Item>
  void normalize_backward(const int64_t view, const int64_t begin, const int64_t end,
                          float* grad_unit, Item* grad, float* radial) const {
    const int64_t dim = layout_.dim;
    std::vector<float> buffer(dim), unit(dim);
    for (int64_t j = begin; j < end; ++j) {
      const float* raw = predicted_[view].get(j, buffer.data());
      float* from = grad_unit + (j - begin) * layout_.step;
      const float length = norm(raw), divisor = clamp_norm(length);
      for (int64_t d = 0; d < dim; ++d) {
        unit[d] = raw[d] / divisor;
        from[d] *= scale_;
      }
      radial[j] = static_cast<float>(simd_.dot(from, unit.data(), dim));
      const float along = length < kEps ? 0 : radial[j];
      for (int64_t d = 0; d < dim; ++d) {
        grad[j * dim + d] = static_cast<Item>((from[d] - along * unit[d]) / divisor);
      }
    }
  }

  const Simd& simd_;
  const std::vector<Rows> predicted_, neighbour_;
  const int64_t num_views_, num_predictions_, num_neighbours_, num_blocks_, num_panels_;
  const float scale_;
  const int64_t first_;
  const bool transposed_;
  const Layout layout_;
  std::vector<Word> words_;  // [V, num_blocks, num_words, lanes]
};

void forward(const Tensor predicted, const Tensor neighbour, const double temperature,
             const int64_t first, const bool transposed, const std::string simd, Tensor row_max,
             Tensor row_sum, Tensor positive) {
  Loss(predicted, neighbour, temperature, first, transposed, simd)
      .forward(row_max.mutable_data_ptr<float>(), row_sum.mutable_data_ptr<float>(),
               positive.mutable_data_ptr<float>());
}

void backward(const double scale, const Tensor predicted, const Tensor neighbour,
              const double temperature, const Tensor weight, const Tensor by_neighbour,
              const Tensor by_predicted, const int64_t first, const std::string simd, Tensor grad,
              Tensor radial) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const Loss loss(predicted, neighbour, temperature, first, false, simd);
  const auto call = [&](auto* to) {
    loss.backward(static_cast<float>(scale), float_data(weight), float_data(by_neighbour),
                  float_data(by_predicted), to, radial.mutable_data_ptr<float>());
  };
  void* to = grad.mutable_data_ptr();
  switch (grad.scalar_type()) {
    case ScalarType::BFloat16:
      return call(static_cast<BFloat16*>(to));
    case ScalarType::Half:
      return call(static_cast<Half*>(to));
    default:
      return call(static_cast<float*>(to));
  }
}

}  // namespace
}  // namespace maect_fast::info_nce

STABLE_TORCH_LIBRARY_FRAGMENT(maect_fast, m) {
  m.def("info_nce_simd() -> str");
  m.def(
      "info_nce_fwd_cpp(Tensor predicted, Tensor neighbour, float temperature, int first, "
      "bool transposed, str simd, Tensor(a!) row_max, Tensor(b!) row_sum, Tensor(c!) positive) "
      "-> ()");
  m.def(
      "info_nce_bwd_cpp(float scale, Tensor predicted, Tensor neighbour, float temperature, "
      "Tensor weight, Tensor by_neighbour, Tensor by_predicted, int first, str simd, "
      "Tensor(a!) grad, Tensor(b!) radial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(maect_fast, CompositeExplicitAutograd, m) {
  m.impl("info_nce_simd", TORCH_BOX(&maect_fast::info_nce::simd_names));
}

STABLE_TORCH_LIBRARY_IMPL(maect_fast, CPU, m) {
  m.impl("info_nce_fwd_cpp", TORCH_BOX(&maect_fast::info_nce::forward));
  m.impl("info_nce_bwd_cpp", TORCH_BOX(&maect_fast::info_nce::backward));
}
