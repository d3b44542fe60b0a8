// The rows of a matrix of any floating dtype and layout, read as fp32.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace maect_fast {

class Rows {
 public:
  explicit Rows(const torch::stable::Tensor& matrix)
      : data_(matrix.const_data_ptr()),
        dtype_(matrix.scalar_type()),
        count_(matrix.size(0)),
        dim_(matrix.size(1)),
        row_stride_(matrix.stride(0)),
        stride_(matrix.stride(1)) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(
        dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half,
        "expected rows in float32, bfloat16 or float16");
  }

  int64_t count() const { return count_; }
  int64_t dim() const { return dim_; }

  // The row itself if it can be read where it is, else a copy in `buffer` [dim].
  const float* get(const int64_t row, float* buffer) const {
    using torch::headeronly::ScalarType;
    if (dtype_ == ScalarType::Float) {
      const float* from = static_cast<const float*>(data_) + row * row_stride_;
      return stride_ == 1 ? from : widen(from, buffer);
    }
    if (dtype_ == ScalarType::BFloat16) {
      return widen(static_cast<const torch::headeronly::BFloat16*>(data_) + row * row_stride_,
                   buffer);
    }
    return widen(static_cast<const torch::headeronly::Half*>(data_) + row * row_stride_, buffer);
  }

  // Starts to load a row that will be needed soon.
  void prefetch(const int64_t row) const {
    constexpr int64_t kCacheLine = 64;
    if (dtype_ != torch::headeronly::ScalarType::Float || stride_ != 1) return;
    const char* from =
        reinterpret_cast<const char*>(static_cast<const float*>(data_) + row * row_stride_);
    const int64_t num_bytes = dim_ * static_cast<int64_t>(sizeof(float));
    for (int64_t i = 0; i < num_bytes; i += kCacheLine) __builtin_prefetch(from + i, 0, 2);
  }

 private:
  template <class Item>
  const float* widen(const Item* from, float* buffer) const {
    if (stride_ == 1) {
      for (int64_t d = 0; d < dim_; ++d) buffer[d] = static_cast<float>(from[d]);
    } else {
      for (int64_t d = 0; d < dim_; ++d) buffer[d] = static_cast<float>(from[d * stride_]);
    }
    return buffer;
  }

  const void* data_;
  torch::headeronly::ScalarType dtype_;
  int64_t count_, dim_, row_stride_, stride_;
};

}  // namespace maect_fast
