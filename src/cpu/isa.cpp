#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace flash_attn_res::cpu {

// Each file of targets/ defines one of these.
namespace portable {
extern const KernelTable kKernels;
}
namespace neon {
extern const KernelTable kKernels;
}
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
namespace avx512_bf16 {
extern const KernelTable kKernels;
}

namespace {

/// One instruction set: its kernels, null where the build has none, and the machine's word on it.
struct Target {
  const char* name;
  const KernelTable* kernels;
  bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
// The compiler's run-time support also asks the operating system whether it saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

/// Indexed by Isa.
constexpr Target kTargets[kNumIsas] = {
    {"portable", &portable::kKernels, always},
#if defined(__aarch64__)
    {"neon", &neon::kKernels, always},
#else
    {"neon", nullptr, always},
#endif
#if defined(__x86_64__)
    {"avx2", &avx2::kKernels, has_avx2},
    {"avx512", &avx512::kKernels, has_avx512},
    {"avx512_bf16", &avx512_bf16::kKernels, has_avx512_bf16},
#else
    {"avx2", nullptr, always},
    {"avx512", nullptr, always},
    {"avx512_bf16", nullptr, always},
#endif
};

const Target& target_of(Isa isa) { return kTargets[static_cast<int>(isa)]; }

Isa detect() {
  Isa best = Isa::kPortable;
  const char* wanted = std::getenv("FLASH_ATTN_RES_CPU_ISA");
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!available(isa)) {
      continue;
    }
    best = isa;
    if (wanted != nullptr && std::strcmp(wanted, name_of(isa)) == 0) {
      return isa;
    }
  }
  return best;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{detect()};
  return isa;
}

}  // namespace

const char* name_of(Isa isa) { return target_of(isa).name; }

bool available(Isa isa) {
  const Target& target = target_of(isa);
  return target.kernels != nullptr && target.supported();
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void use_isa(Isa isa) { active().store(isa, std::memory_order_relaxed); }

const KernelTable& kernels() { return *target_of(active_isa()).kernels; }

}  // namespace flash_attn_res::cpu
