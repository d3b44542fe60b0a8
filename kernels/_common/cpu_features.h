// What this CPU and operating system can run.
#pragma once

#include <initializer_list>

namespace maect_fast {

// Whether all of these instruction sets, named as in /proc/cpuinfo, may be used.
bool cpu_has(std::initializer_list<const char*> features);

}  // namespace maect_fast
