// Which instruction set runs: chosen once, from what the processor has.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace guard_ops::cpu {

namespace baseline {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

const Kernels* kernels(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return &baseline::table;
#if defined(__x86_64__)
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &avx2::table;
  }
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &avx512::table;
  }
#endif
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    if (const char* asked = std::getenv("GUARD_OPS_CPU_ISA")) {
      if (const Kernels* found = kernels(asked)) return *found;
    }
    for (const char* name : {"avx512", "avx2"}) {
      if (const Kernels* found = kernels(name)) return *found;
    }
    return baseline::table;
  }();
  return chosen;
}

}  // namespace guard_ops::cpu
