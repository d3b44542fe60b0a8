// Exact top-k search on the CPU.
//
// Scores are computed in a cheap type (bf16, int8 or fp32) whose error is bounded by the norms of
// the rounding residuals: |s - approximate s| <= margin, by Cauchy-Schwarz. Every slot within twice
// the margin of the k-th best approximate score stays a candidate; the candidates' exact scores
// decide. So the type of the scores, the instruction set and the number of threads change the time
// and never a bit of the result.
//
// Panels of queue rows are rounded once and meet all queries, whose blocks are stored lane by lane.
// Scores are compared with their query's threshold in registers, which drops nearly all; the others
// enter the query's reservoir, which raises the threshold whenever it is full.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../_common/cpu_features.h"
#include "../_common/philox.h"
#include "../_common/rows.h"
#include "../_common/simd_choice.h"
#include "cpu_simd.h"

namespace maect_fast::queue_topk {
namespace {

using torch::stable::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Sort keys below every score: unordered scores (NaN, -inf), and last the query's own slots.
constexpr float kUnordered = std::numeric_limits<float>::lowest();
// What is searched together is bounded in queries and, for a large k, in bytes of reservoirs.
constexpr int64_t kQueries = 1024, kReservoirBytes = 8 << 20;
// Threads share the queue in parts of at least so many rows, as every part fills its own
// reservoirs, and the queries in groups of at least so many, as every group rounds the queue again.
constexpr int64_t kMinPart = 8192;
constexpr int64_t kMinGroup = 256;

struct Candidate {
  float score;
  int32_t slot;
};

// The contract's order: score descending, slot ascending.
bool precedes(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.slot < b.slot;
}

#if defined(__x86_64__)
// AMX: Linux hands out the tile registers on request.
bool has_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, asm/fpu/types.h
  return cpu_has({"amx_tile", "amx_bf16"}) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Those that this CPU can run, the fastest for any data first. The last two have to be asked for:
// int8, whose wide margin makes a large k slower, and AMX, which has not been measured.
std::vector<Named<Simd>> find_runnable() {
  std::vector<Named<Simd>> found;
#if defined(__x86_64__)
  const bool has_avx512 = cpu_has_avx512();
  if (has_avx512 && cpu_has({"avx512_bf16"})) found.push_back({"avx512_bf16", &avx512_bf16});
  if (has_avx512) found.push_back({"avx512", &avx512});
  if (cpu_has({"avx2", "fma"})) found.push_back({"avx2", &avx2});
#endif
  found.push_back({"portable", &portable});
#if defined(__x86_64__)
  if (has_avx512 && cpu_has({"avx512_vnni"})) found.push_back({"avx512_vnni", &avx512_vnni});
  if (has_avx512 && cpu_has({"avx512_bf16"}) && has_tiles())
    found.push_back({"amx_bf16", &amx_bf16});
#endif
  return found;
}

const std::vector<Named<Simd>>& runnable() {
  static const std::vector<Named<Simd>> found = find_runnable();
  return found;
}

std::string simd_names() { return names(runnable()); }

const int64_t* int64_data(const std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous(), "expected contiguous ids, labels and ranks");
  return tensor->const_data_ptr<int64_t>();
}

// A group of queries, normalised, and rounded in blocks of lanes.
struct Queries {
  int64_t count, num_blocks;
  std::vector<float> unit;       // [count, D]
  std::vector<Word> words;       // [num_blocks, num_words, lanes]
  std::vector<float> scale;      // [num_blocks * lanes], as for the next two
  std::vector<float> residual;   // |u - hat(u)|
  std::vector<char> is_ordered;  // [count], as for the next: no NaN in the query
  std::vector<int64_t> id;       // -1 = none

  const float* row(const int64_t i, const int64_t dim) const { return unit.data() + i * dim; }
};

// What rows of the queue may be apart from their rounded copies, the largest so far.
struct Extent {
  float norm = 0, residual = 0;

  // Returns whether it grew.
  bool include(const Extent& other) {
    const bool grows = other.norm > norm || other.residual > residual;
    norm = std::max(norm, other.norm);
    residual = std::max(residual, other.residual);
    return grows;
  }
};

// Part of the queue against part of the queries.
struct Task {
  int64_t part, first_row, last_row, first_block, last_block;
};

// What a task learned about its rows.
struct Found {
  Extent extent;
  // Slots whose rows are not finite: scored exactly for every query, zero in their panel.
  std::vector<int32_t> irregular;
};

// The candidates of one query in one part of the queue, some of which have their exact score.
struct Reservoir {
  float* scores = nullptr;  // [capacity], in units of the query's scale
  int32_t* slots = nullptr;
  int64_t count = 0;
  float kth = -kInfinity;  // the k-th best score when it was full the last time
};

int64_t multiple(const int64_t count, const int64_t of) { return (count + of - 1) / of * of; }

class Search {
 public:
  Search(const Simd& simd, const Rows& query, const Rows& queue, const int64_t k,
         const int64_t* query_id, const int64_t num_ids, const int64_t* queue_id)
      : simd_(simd),
        query_(query),
        queue_(queue),
        k_(k),
        capacity_(multiple(std::min(simd.crowding * std::max<int64_t>(128, 4 * k), queue.count()),
                           kScores)),
        dim_(queue.dim()),
        num_words_(multiple((dim_ + simd.items - 1) / simd.items, simd.word_multiple)),
        query_id_(query_id),
        num_ids_(num_ids),
        queue_id_(queue_id) {}

  // values and indices [B, K].
  void run(float* values, int64_t* indices) {
    const int64_t reservoir_bytes =
        capacity_ * static_cast<int64_t>(sizeof(float) + sizeof(int32_t));
    const int64_t together =
        std::clamp<int64_t>(kReservoirBytes / reservoir_bytes, simd_.lanes, kQueries);
    for (int64_t first = 0; first < query_.count(); first += together) {
      pack(first, std::min(together, query_.count() - first));
      const std::vector<Task> tasks = split();
      std::vector<Found> found(tasks.size());
      const int64_t num_tasks = static_cast<int64_t>(tasks.size());
      torch::stable::parallel_for(0, num_tasks, 1, [&](const int64_t begin, const int64_t end) {
        for (int64_t task = begin; task < end; ++task) scan(tasks[task], found[task]);
      });
      Found all;
      for (size_t task = 0; task < tasks.size(); ++task) {
        all.extent.include(found[task].extent);
        // The groups of queries saw the same rows.
        if (tasks[task].first_block > 0) continue;
        all.irregular.insert(all.irregular.end(), found[task].irregular.begin(),
                             found[task].irregular.end());
      }
      torch::stable::parallel_for(
          0, queries_.count, 8, [&](const int64_t begin, const int64_t end) {
            std::vector<float> buffer(dim_), scores;
            std::vector<Candidate> best;
            for (int64_t i = begin; i < end; ++i) {
              collect(i, all, buffer.data(), scores, best);
              write(i, best, values + (first + i) * k_, indices + (first + i) * k_);
            }
          });
    }
  }

 private:
  void pack(const int64_t first, const int64_t count) {
    const int64_t lanes = simd_.lanes, num_blocks = (count + lanes - 1) / lanes;
    queries_.count = count;
    queries_.num_blocks = num_blocks;
    queries_.unit.resize(count * dim_);
    queries_.words.assign(num_blocks * num_words_ * lanes, 0);
    queries_.scale.assign(num_blocks * lanes, 1);
    queries_.residual.assign(num_blocks * lanes, 0);
    queries_.is_ordered.assign(count, 1);
    queries_.id.assign(count, -1);
    if (query_id_ != nullptr) {
      for (int64_t i = 0; i < count; ++i) queries_.id[i] = query_id_[(first + i) % num_ids_];
    }
    torch::stable::parallel_for(0, num_blocks, 1, [&](const int64_t begin, const int64_t end) {
      std::vector<float> buffer(dim_);
      std::vector<Word> words(num_words_);
      for (int64_t i = begin * lanes; i < std::min(end * lanes, count); ++i) {
        float* unit = queries_.unit.data() + i * dim_;
        queries_.is_ordered[i] = normalise(query_.get(first + i, buffer.data()), unit);
        if (!queries_.is_ordered[i]) continue;
        const Rounded rounded = simd_.round_row(unit, dim_, words.data(), num_words_);
        queries_.scale[i] = rounded.scale;
        queries_.residual[i] = std::sqrt(rounded.residual2);
        Word* to = queries_.words.data() + i / lanes * num_words_ * lanes + i % lanes;
        for (int64_t w = 0; w < num_words_; ++w) to[w * lanes] = words[w] ^ simd_.query_flip;
      }
    });
  }

  // The work of all threads: parts of the queue, and groups of queries where these are many.
  std::vector<Task> split() {
    const int64_t num_threads = torch::stable::get_num_threads();
    const int64_t num_panels = (queue_.count() + kPanelRows - 1) / kPanelRows;
    const auto share = [&](const int64_t by) { return (num_threads + by - 1) / by; };
    const int64_t wanted = std::clamp<int64_t>(queries_.count / kMinGroup, 1, num_threads);
    num_parts_ = std::clamp<int64_t>(queue_.count() / kMinPart, 1, share(wanted));
    // Small groups are better than idle threads.
    const int64_t num_groups = std::min(share(num_parts_), queries_.num_blocks);
    const int64_t num_reservoirs = num_parts_ * queries_.count;
    scores_.resize(num_reservoirs * capacity_);
    slots_.resize(num_reservoirs * capacity_);
    reservoirs_.resize(num_reservoirs);
    for (int64_t r = 0; r < num_reservoirs; ++r) {
      reservoirs_[r] = {scores_.data() + r * capacity_, slots_.data() + r * capacity_};
    }
    std::vector<Task> tasks;
    for (int64_t part = 0; part < num_parts_; ++part) {
      const int64_t first = num_panels * part / num_parts_ * kPanelRows;
      const int64_t last = num_panels * (part + 1) / num_parts_ * kPanelRows;
      for (int64_t group = 0; group < num_groups; ++group) {
        tasks.push_back({part, first, std::min(last, queue_.count()),
                         queries_.num_blocks * group / num_groups,
                         queries_.num_blocks * (group + 1) / num_groups});
      }
    }
    return tasks;
  }

  // Returns whether the unit row is finite.
  bool normalise(const float* row, float* unit) const {
    const float norm = static_cast<float>(std::sqrt(simd_.dot(row, row, dim_)));
    const float divisor = norm < 1e-12f ? 1e-12f : norm;
    for (int64_t d = 0; d < dim_; ++d) unit[d] = row[d] / divisor;
    return std::isfinite(norm);
  }

  // How far a query's approximate score may be from its exact one, in units of the query's scale:
  // |<u, c> - <hat(u), hat(c)>| <= |u - hat(u)| |c| + |hat(u)| |c - hat(c)|, |u| = 1, and roundings
  // to fp32 (of the sums, of the scales, of the exact score).
  float margin(const int64_t i, const Extent& extent) const {
    const float dim = static_cast<float>(dim_), query_residual = queries_.residual[i];
    const float rounded_query = 1 + query_residual, rounded_row = extent.norm + extent.residual;
    const float sum = query_residual * extent.norm + rounded_query * extent.residual +
                      (2 * dim + 16) * 0x1p-24f * rounded_query * rounded_row;
    // The norms are fp32 sums themselves; the squares of what is below 1e-19 vanish from them.
    return (1.001f * sum + 2e-19f * dim) / queries_.scale[i];
  }

  Reservoir& reservoir(const int64_t part, const int64_t i) {
    return reservoirs_[part * queries_.count + i];
  }
  bool is_own(const int64_t i, const int64_t slot) const {
    return queries_.id[i] != -1 && queue_id_[slot] == queries_.id[i];
  }

  // The scores of a range of panels and of query blocks.
  void scan(const Task& task, Found& found) {
    const int lanes = simd_.lanes, lane_bits = __builtin_ctz(lanes);
    const int64_t last_query = std::min(task.last_block * lanes, queries_.count);
    std::vector<Word> words(kPanelRows * num_words_);
    std::vector<float> buffer(dim_),
        threshold((task.last_block - task.first_block) * lanes, kInfinity);
    const auto set_thresholds = [&] {
      for (int64_t i = task.first_block * lanes; i < last_query; ++i) {
        if (!queries_.is_ordered[i]) continue;
        threshold[i - task.first_block * lanes] =
            reservoir(task.part, i).kth - 2 * margin(i, found.extent);
      }
    };
    set_thresholds();
    std::vector<char> is_scored(kPanelRows);
    const auto panel = std::make_unique<Panel>();
    const auto hits = std::make_unique<Hits>();
    panel->words = words.data();
    for (int64_t first = task.first_row; first < task.last_row; first += kPanelRows) {
      panel->num_rows = static_cast<int>(std::min<int64_t>(kPanelRows, task.last_row - first));
      if (round_panel(first, *panel, is_scored.data(), buffer.data(), found)) set_thresholds();
      for (int64_t block = task.first_block; block < task.last_block; ++block) {
        prefetch(first + kPanelRows, block - task.first_block, task);
        float* least = threshold.data() + (block - task.first_block) * lanes;
        simd_.score(*panel, num_words_, queries_.words.data() + block * num_words_ * lanes, least,
                    hits.get());
        for (int hit = 0; hit < hits->count; ++hit) {
          const int row = hits->place[hit] >> lane_bits, lane = hits->place[hit] & (lanes - 1);
          const int64_t slot = first + row, i = block * lanes + lane;
          // The threshold may have risen since.
          if (hits->score[hit] < least[lane] || !is_scored[row] || is_own(i, slot)) continue;
          Reservoir& into = reservoir(task.part, i);
          into.scores[into.count] = hits->score[hit];
          into.slots[into.count++] = static_cast<int32_t>(slot);
          if (into.count == capacity_) least[lane] = compact(i, into, found.extent);
        }
      }
    }
  }

  // Returns whether the extent of the rows grew.
  bool round_panel(const int64_t first, Panel& panel, char* is_scored, float* buffer,
                   Found& found) const {
    Extent extent;
    for (int row = 0; row < kPanelRows; ++row) {
      Word* words = panel.words + row * num_words_;
      Rounded rounded = {0, 0, 1, 0};
      is_scored[row] = row < panel.num_rows;
      if (is_scored[row]) {
        rounded = simd_.round_row(queue_.get(first + row, buffer), dim_, words, num_words_);
        is_scored[row] = std::isfinite(rounded.norm2);
        if (!is_scored[row]) found.irregular.push_back(static_cast<int32_t>(first + row));
      }
      if (is_scored[row]) {
        extent.include({std::sqrt(rounded.norm2), std::sqrt(rounded.residual2)});
      } else {
        std::fill(words, words + num_words_, 0);
        rounded = {0, 0, 1, 0};
      }
      panel.scale[row] = rounded.scale;
      panel.start[row] = rounded.start;
    }
    return found.extent.include(extent);
  }

  // Starts to load one of as many shares of the next panel as the task has blocks.
  void prefetch(const int64_t first, const int64_t share, const Task& task) const {
    const int64_t num_shares = task.last_block - task.first_block;
    const int64_t last = std::min(first + kPanelRows * (share + 1) / num_shares, task.last_row);
    for (int64_t row = first + kPanelRows * share / num_shares; row < last; ++row) {
      queue_.prefetch(row);
    }
  }

  // Makes room in a full reservoir; returns the query's threshold from now on.
  float compact(const int64_t i, Reservoir& full, const Extent& extent) const {
    full.kth = simd_.kth_largest(full.scores, full.count, k_);
    const float width = 2 * margin(i, extent);
    full.count = simd_.keep(full.scores, full.slots, full.count, full.kth - width);
    if (full.count <= capacity_ / 2) return full.kth - width;
    // A crowd within the margin (near-duplicates): only the exact scores tell them apart.
    std::vector<float> buffer(dim_);
    std::vector<Candidate> all;
    for (int64_t c = 0; c < full.count; ++c) all.push_back({0, full.slots[c]});
    make_exact(i, all.data(), full.count, buffer.data());
    std::nth_element(all.begin(), all.begin() + k_ - 1, all.end(), precedes);
    full.count = k_;
    for (int64_t c = 0; c < k_; ++c) {
      full.scores[c] = all[c].score / queries_.scale[i];
      full.slots[c] = all[c].slot;
    }
    full.kth = full.scores[k_ - 1];
    return full.kth - width;
  }

  float exact(const int64_t i, const int64_t slot, float* buffer) const {
    return static_cast<float>(simd_.dot(queries_.row(i, dim_), queue_.get(slot, buffer), dim_));
  }

  void make_exact(const int64_t i, Candidate* all, const int64_t count, float* buffer) const {
    // Rows come from memory: two of the queue's length are under way while one is multiplied.
    constexpr int64_t kAhead = 4;
    for (int64_t c = 0; c < std::min(kAhead, count); ++c) queue_.prefetch(all[c].slot);
    for (int64_t c = 0; c < count; ++c) {
      if (c + kAhead < count) queue_.prefetch(all[c + kAhead].slot);
      all[c].score = exact(i, all[c].slot, buffer);
    }
  }

  // The best k of what all parts found, by exact score, in order; fewer if own slots are left.
  void collect(const int64_t i, const Found& found, float* buffer, std::vector<float>& scores,
               std::vector<Candidate>& best) {
    best.clear();
    if (!queries_.is_ordered[i]) return;
    scores.clear();
    for (int64_t part = 0; part < num_parts_; ++part) {
      const Reservoir& from = reservoir(part, i);
      scores.insert(scores.end(), from.scores, from.scores + from.count);
    }
    const int64_t count = static_cast<int64_t>(scores.size());
    scores.resize(multiple(count, kScores), -kInfinity);
    // First the k best, whose exact scores tell which of the others can still be among them.
    const float upper =
        count > k_ ? simd_.kth_largest(scores.data(), scores.size(), k_) : -kInfinity;
    add(i, upper, kInfinity, buffer, best);
    if (count > k_) {
      float kth = kInfinity;
      for (const Candidate& one : best) kth = std::min(kth, one.score);
      add(i, kth / queries_.scale[i] - margin(i, found.extent), upper, buffer, best);
    }
    for (const int32_t slot : found.irregular) {
      if (is_own(i, slot)) continue;
      const float score = exact(i, slot, buffer);
      best.push_back({score > kUnordered ? score : kUnordered, slot});
    }
    const auto end = best.begin() + std::min<int64_t>(k_, best.size());
    std::partial_sort(best.begin(), end, best.end(), precedes);
    best.erase(end, best.end());
  }

  // Candidates with lower <= score < upper, with their exact scores.
  void add(const int64_t i, const float lower, const float upper, float* buffer,
           std::vector<Candidate>& best) {
    const int64_t before = static_cast<int64_t>(best.size());
    for (int64_t part = 0; part < num_parts_; ++part) {
      const Reservoir& from = reservoir(part, i);
      for (int64_t c = 0; c < from.count; ++c) {
        if (lower <= from.scores[c] && from.scores[c] < upper) best.push_back({0, from.slots[c]});
      }
    }
    make_exact(i, best.data() + before, static_cast<int64_t>(best.size()) - before, buffer);
  }

  // Fills up to k: all slots of an unordered query, own slots where the others do not suffice.
  void write(const int64_t i, const std::vector<Candidate>& best, float* values, int64_t* indices) {
    int64_t count = 0;
    const auto put = [&](const float score, const int64_t slot) {
      values[count] = score;
      indices[count++] = slot;
    };
    for (const Candidate& one : best) {
      put(one.score == kUnordered ? -kInfinity : one.score, one.slot);
    }
    const bool is_ordered = queries_.is_ordered[i];
    for (int64_t slot = 0; !is_ordered && count < k_ && slot < queue_.count(); ++slot) {
      if (!is_own(i, slot)) put(-kInfinity, slot);
    }
    for (int64_t slot = 0; count < k_; ++slot) {
      if (is_own(i, slot)) put(-1, slot);
    }
  }

  const Simd& simd_;
  const Rows &query_, &queue_;
  const int64_t k_, capacity_, dim_, num_words_;
  const int64_t* query_id_;
  const int64_t num_ids_;
  const int64_t* queue_id_;
  Queries queries_;
  int64_t num_parts_ = 1;
  std::vector<Reservoir> reservoirs_;  // [parts, queries]
  std::vector<float> scores_;          // theirs, as for the next
  std::vector<int32_t> slots_;
};

// query [B, D]; rows i and i + n of its views share query_id and query_label [n]. The last three
// outputs are empty unless asked for.
void queue_topk(const Tensor query, const Tensor queue, const int64_t k,
                const std::optional<Tensor> query_id, const std::optional<Tensor> queue_id,
                const std::optional<Tensor> query_label, const std::optional<Tensor> queue_label,
                const std::optional<Tensor> rank, const std::string simd, Tensor values,
                Tensor indices, Tensor picked_index, Tensor picked_neighbour, Tensor label_hit) {
  const Rows queries(query), rows(queue);
  STD_TORCH_CHECK(rows.count() <= std::numeric_limits<int32_t>::max(), "queue: too many rows");
  const int64_t num_queries = queries.count();
  int64_t* index = indices.mutable_data_ptr<int64_t>();
  Search(choose(runnable(), simd), queries, rows, k, int64_data(query_id),
         query_id ? query_id->size(0) : 1, int64_data(queue_id))
      .run(values.mutable_data_ptr<float>(), index);
  if (!rank) return;
  const int64_t* ranks = int64_data(rank);
  const int64_t* query_labels = int64_data(query_label);
  const int64_t* queue_labels = int64_data(queue_label);
  int64_t* picked = picked_index.mutable_data_ptr<int64_t>();
  bool* hit = query_labels == nullptr ? nullptr : label_hit.mutable_data_ptr<bool>();
  // Bytes, as the rows have the queue's dtype. A run lies together in both.
  const int64_t item = static_cast<int64_t>(queue.element_size()), dim = rows.dim();
  const int64_t row_stride = queue.stride(0) * item, stride = queue.stride(1) * item;
  const int64_t run = stride == item ? dim : 1;
  const char* from = static_cast<const char*>(queue.const_data_ptr());
  char* to = static_cast<char*>(picked_neighbour.mutable_data_ptr());
  for (int64_t i = 0; i < num_queries; ++i) {
    const int64_t slot = index[i * k + ranks[i]];
    picked[i] = slot;
    for (int64_t d = 0; d < dim; d += run, to += run * item) {
      std::memcpy(to, from + slot * row_stride + d * stride, run * item);
    }
    if (hit == nullptr) continue;
    const int64_t label = query_labels[i % query_label->size(0)];
    hit[i] = label >= 0 && queue_labels[slot] == label;
  }
}

// ranks [V, n] of rows [n]; the other inputs are 0-d. All int64.
void draw_ranks(const Tensor seed, const Tensor step, const Tensor view, const Tensor row,
                const int64_t k, Tensor ranks) {
  const auto scalar = [](const Tensor& tensor) {
    return static_cast<uint64_t>(*tensor.const_data_ptr<int64_t>());
  };
  const uint64_t seed_bits = scalar(seed), step_bits = scalar(step), first_view = scalar(view);
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(seed_bits),
                                       static_cast<uint32_t>(seed_bits >> 32)};
  const int64_t* rows = row.const_data_ptr<int64_t>();
  int64_t* out = ranks.mutable_data_ptr<int64_t>();
  for (int64_t v = 0; v < ranks.size(0); ++v) {
    for (int64_t i = 0; i < ranks.size(1); ++i) {
      const uint32_t word = philox4x32(
          key, {static_cast<uint32_t>(rows[i]), static_cast<uint32_t>(first_view + v),
                static_cast<uint32_t>(step_bits), static_cast<uint32_t>(step_bits >> 32)})[0];
      *out++ = static_cast<int64_t>(word * static_cast<uint64_t>(k) >> 32);
    }
  }
}

}  // namespace
}  // namespace maect_fast::queue_topk

STABLE_TORCH_LIBRARY_FRAGMENT(maect_fast, m) {
  m.def("queue_topk_simd() -> str");
  m.def(
      "queue_topk_cpp(Tensor query, Tensor queue, int k, Tensor? query_id, Tensor? queue_id, "
      "Tensor? query_label, Tensor? queue_label, Tensor? rank, str simd, Tensor(a!) values, "
      "Tensor(b!) indices, Tensor(c!) picked_index, Tensor(d!) picked_neighbour, "
      "Tensor(e!) label_hit) -> ()");
  m.def(
      "draw_ranks_cpp(Tensor seed, Tensor step, Tensor view, Tensor row, int k, Tensor(a!) ranks) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(maect_fast, CompositeExplicitAutograd, m) {
  m.impl("queue_topk_simd", TORCH_BOX(&maect_fast::queue_topk::simd_names));
}

STABLE_TORCH_LIBRARY_IMPL(maect_fast, CPU, m) {
  m.impl("queue_topk_cpp", TORCH_BOX(&maect_fast::queue_topk::queue_topk));
  m.impl("draw_ranks_cpp", TORCH_BOX(&maect_fast::queue_topk::draw_ranks));
}
