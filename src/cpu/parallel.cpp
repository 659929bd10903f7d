#include "cpu/parallel.h"

namespace flash_attn_res::cpu {

void run_tasks(const Executor* executor, int64_t count, void (*task)(void* context, int64_t index),
               void* context) {
  // Waking threads for a single task would cost more than it could save.
  if (count > 1 && executor != nullptr && executor->run != nullptr) {
    executor->run(executor->pool, count, task, context);
    return;
  }
#if defined(FLASH_ATTN_RES_OPENMP)
  // Tasks are handed out one by one: they are few and long, and cores do not all run at one speed.
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
#endif
  for (int64_t i = 0; i < count; ++i) {
    task(context, i);
  }
}

}  // namespace flash_attn_res::cpu
