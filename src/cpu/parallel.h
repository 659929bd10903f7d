// Threads of the CPU backend: the caller's Executor, else OpenMP where it is built in, else none.

#ifndef FLASH_ATTN_RES_CPU_PARALLEL_H_
#define FLASH_ATTN_RES_CPU_PARALLEL_H_

#include <cstdint>
#include <type_traits>

#include "flash_attn_res/types.h"

namespace flash_attn_res::cpu {

/// Runs task(context, i) for every i in [0, count) and returns when all are done.
void run_tasks(const Executor* executor, int64_t count, void (*task)(void* context, int64_t index),
               void* context);

/// The same for anything that can be called with an index.
template <class Task>
void for_each_task(const Executor* executor, int64_t count, Task&& task) {
  using Plain = std::remove_reference_t<Task>;
  run_tasks(
      executor, count, [](void* context, int64_t index) { (*static_cast<Plain*>(context))(index); },
      &task);
}

}  // namespace flash_attn_res::cpu

#endif  // FLASH_ATTN_RES_CPU_PARALLEL_H_
