// The choice among an op's sets of inner loops.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

namespace maect_fast {

// One set, compiled for one instruction set.
template <class Simd>
struct Named {
  const char* name;
  const Simd* simd;
};

template <class Simd>
std::string names(const std::vector<Named<Simd>>& all) {
  std::string joined;
  for (const Named<Simd>& one : all) joined += (joined.empty() ? "" : " ") + std::string(one.name);
  return joined;
}

// The set of that name; the first of all if `name` is empty.
template <class Simd>
const Simd& choose(const std::vector<Named<Simd>>& all, const std::string& name) {
  for (const Named<Simd>& one : all) {
    if (name.empty() || name == one.name) return *one.simd;
  }
  STD_TORCH_CHECK(false, "simd: expected one of ", names(all), ", got ", name);
}

}  // namespace maect_fast
