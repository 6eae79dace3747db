// Threads for blocks, and in each of them fibers for the block's threads.
#pragma once

#include <sched.h>
#include <ucontext.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cuda_pipeline_primitives.h"

namespace emulator {

thread_local Index thread;
thread_local int exchanged[256][2];

namespace {

constexpr int kBlockThreads = 256;
constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

// One block's scheduler; whatever thread runs a block has one.
struct Block {
  std::vector<Fiber> fibers{kBlockThreads};
  ucontext_t scheduler;
  std::vector<int> runnable;
  std::vector<int> waiting[kBlockThreads / 32 + 1];  // at the warps' barriers and the block's
  std::mt19937 random;
  void (*kernel)();

  // False if some fibers wait for others that have ended.
  bool run(void (*entry)(), uint32_t seed) {
    random.seed(seed);
    kernel = entry;
    for (int i = 0; i < kBlockThreads; ++i) {
      Fiber& fiber = fibers[i];
      copies_under_way[i].clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, [] { of_this_thread().kernel(); }, 0);
      runnable.push_back(i);
    }
    while (!runnable.empty()) {
      std::swap(runnable[random() % runnable.size()], runnable.back());
      thread.x = runnable.back();
      runnable.pop_back();
      swapcontext(&scheduler, &fibers[thread.x].context);
    }
    bool all_ended = true;
    for (std::vector<int>& left : waiting) all_ended &= left.empty(), left.clear();
    return all_ended;
  }

  static Block& of_this_thread() {
    thread_local Block block;
    return block;
  }
};

// Threads that wait for blocks to run. They are never joined: they live as long as the process.
class Workers {
 public:
  void run(int count, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    body_ = &body;
    left_ = count_ = count;
    ++generation_;
    for (; threads_ < count; ++threads_)
      std::thread([this, index = threads_, seen = generation_ - 1] { serve(index, seen); }).detach();
    changed_.notify_all();
    changed_.wait(lock, [&] { return left_ == 0; });
  }

 private:
  void serve(int index, long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= count_) continue;
      lock.unlock();
      (*body_)(index);
      lock.lock();
      if (--left_ == 0) changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(int)>* body_ = nullptr;
  int threads_ = 0, count_ = 0, left_ = 0;
  long generation_ = 0;
};

Workers& workers() {
  static Workers* const workers = new Workers;
  return *workers;
}

std::atomic<int> arrived, generation;

}  // namespace

// Mostly short: where processors are few and busy, giving one up costs a time slice.
void delay() {
  const uint32_t chance = Block::of_this_thread().random();
  if (chance % 64 == 0) sched_yield();
  for (volatile uint32_t left = chance / 64 % 1024; left > 0; left = left - 1) {
  }
}

void wait(Barrier barrier) {
  Block& block = Block::of_this_thread();
  const int self = thread.x;
  const bool of_warp = barrier == Barrier::kWarp;
  std::vector<int>& here = block.waiting[of_warp ? self / 32 : kBlockThreads / 32];
  here.push_back(self);
  if (here.size() == (of_warp ? 32u : static_cast<unsigned>(kBlockThreads))) {
    block.runnable.insert(block.runnable.end(), here.begin(), here.end());
    here.clear();
  }
  swapcontext(&block.fibers[self].context, &block.scheduler);
}

void wait_for_all_blocks() {
  delay();
  const int now = generation.load(std::memory_order_acquire);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) == gridDim.x - 1) {
    arrived.store(0, std::memory_order_relaxed);
    generation.store(now + 1, std::memory_order_release);
  } else {
    while (generation.load(std::memory_order_acquire) == now) sched_yield();
  }
}

}  // namespace emulator

thread_local Index blockIdx, gridDim;
