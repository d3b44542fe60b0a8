// What this CPU and operating system can run.
#pragma once

#include <initializer_list>

namespace maect_fast {

// Whether all of these instruction sets, named as in /proc/cpuinfo, may be used.
bool cpu_has(std::initializer_list<const char*> features);

// What the files compiled for AVX-512 use at least.
inline bool cpu_has_avx512() { return cpu_has({"avx512f", "avx512bw", "avx512vl", "avx2", "fma"}); }

}  // namespace maect_fast
