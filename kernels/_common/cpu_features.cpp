// The instruction sets that this process may use: the CPU has them and the operating system saves
// their registers. SIMD code is chosen by these names at run time.

#include "cpu_features.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(const uint32_t leaf, const uint32_t subleaf) {
  Leaf out;
  __get_cpuid_count(leaf, subleaf, &out.eax, &out.ebx, &out.ecx, &out.edx);
  return out;
}

// Register states that the operating system saves on a context switch (XCR0).
uint64_t saved_states() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

std::string cpu_features() {
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTile = 0x60000;
  const Leaf basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const bool has_xsave = basic.ecx >> 27 & 1;
  const uint64_t saved = has_xsave ? saved_states() : 0;
  const struct {
    const char* name;
    uint32_t word;
    int bit;
    uint64_t needs;
  } features[] = {
      {"avx2", extended.ebx, 5, kYmm},         {"fma", basic.ecx, 12, kYmm},
      {"f16c", basic.ecx, 29, kYmm},           {"avx512f", extended.ebx, 16, kZmm},
      {"avx512bw", extended.ebx, 30, kZmm},    {"avx512vl", extended.ebx, 31, kZmm},
      {"avx512_vnni", extended.ecx, 11, kZmm}, {"avx512_bf16", more.eax, 5, kZmm},
      {"avx512_fp16", extended.edx, 23, kZmm}, {"amx_tile", extended.edx, 24, kTile},
      {"amx_bf16", extended.edx, 22, kTile},   {"amx_int8", extended.edx, 25, kTile},
  };
  std::string names;
  for (const auto& feature : features) {
    if ((feature.word >> feature.bit & 1) && (saved & feature.needs) == feature.needs) {
      names += names.empty() ? "" : " ";
      names += feature.name;
    }
  }
  return names;
}

#elif defined(__aarch64__)

std::string cpu_features() { return "neon"; }

#else

std::string cpu_features() { return ""; }

#endif

}  // namespace

namespace maect_fast {

bool cpu_has(const std::initializer_list<const char*> features) {
  static const std::string known = " " + cpu_features() + " ";
  for (const char* feature : features) {
    if (known.find(" " + std::string(feature) + " ") == std::string::npos) return false;
  }
  return true;
}

}  // namespace maect_fast

STABLE_TORCH_LIBRARY_FRAGMENT(maect_fast, m) { m.def("cpu_features() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(maect_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_features", TORCH_BOX(&cpu_features));
}
