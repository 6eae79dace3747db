// Copies that are made as late as may be: when they are waited for, by the thread that asked.
#pragma once

#include <deque>
#include <vector>

#include "cuda_runtime_api.h"

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
inline thread_local std::vector<Copy> open_group[256];
inline thread_local std::deque<std::vector<Copy>> copies_under_way[256];

}  // namespace emulator

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::open_group[threadIdx.x].push_back({to, from, bytes});
}
inline void __pipeline_commit() {
  auto& group = emulator::open_group[threadIdx.x];
  emulator::copies_under_way[threadIdx.x].push_back(std::move(group));
  group.clear();
}
inline void __pipeline_wait_prior(size_t left) {
  auto& groups = emulator::copies_under_way[threadIdx.x];
  for (; groups.size() > left; groups.pop_front())
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}
