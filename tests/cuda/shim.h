// A GPU's block of threads on one CPU thread, for the kernels of src/vptq/ops/cuda as plain C++.
//
// Takes device.cuh's place. Every thread of a block is a fiber; it runs until it has to wait for its warp or its block.
// What a GPU leaves to chance is the worst case here: shared memory begins as NaN, lanes take turns in both orders, threads
// that wait for each other in vain end the program, and so do bytes written beyond a block's shared memory.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define VPTQ_DEVICE inline
#define __global__
#define __launch_bounds__(...)
using std::max;
using std::min;

namespace shim {

struct Index {
  int x, y;
};
enum Wait { kNone, kWarp, kBlock, kDone };

constexpr int kStack = 64 << 10, kSharedBytes = 256 << 10, kWarpSize = 32;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  Index index{};
  Wait wait = kNone;
  int shuffles = 0;
};

inline Thread* current;
inline Index block, grid, threads;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline std::vector<float> exchanged;  // [warps, 2, lanes]
alignas(16) inline char shared[kSharedBytes];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block (%d, %d): %s\n", block.x, block.y, what);
  std::abort();
}

inline void wait_for(Wait what) {
  current->wait = what;
  swapcontext(&current->context, &scheduler);
}

inline void enter() {
  kernel();
  wait_for(kDone);
}

inline bool all_wait(std::vector<Thread>& fibers, size_t begin, size_t end, Wait what) {
  return std::all_of(fibers.begin() + begin, fibers.begin() + end, [&](const Thread& t) { return t.wait == what; });
}

inline void run_block(std::vector<Thread>& fibers) {
  std::memset(shared, 0xFF, kSharedBytes);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Thread& fiber = fibers[i];
    fiber.index = {static_cast<int>(i), 0};
    fiber.wait = kNone;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool backwards = false; !all_wait(fibers, 0, fibers.size(), kDone); backwards = !backwards) {
    bool moved = false;
    for (size_t warp = 0; warp < fibers.size(); warp += kWarpSize) {
      for (size_t lane = 0; lane < kWarpSize; ++lane) {
        const size_t i = warp + (backwards ? kWarpSize - 1 - lane : lane);
        if (fibers[i].wait != kNone) continue;
        current = &fibers[i];
        swapcontext(&scheduler, &current->context);
        moved = true;
      }
      if (all_wait(fibers, warp, warp + kWarpSize, kWarp)) {
        for (size_t i = warp; i < warp + kWarpSize; ++i) fibers[i].wait = kNone;
        moved = true;
      }
    }
    if (all_wait(fibers, 0, fibers.size(), kBlock)) {
      for (Thread& fiber : fibers) fiber.wait = kNone;
      moved = true;
    }
    if (!moved) fail("threads wait for each other");
  }
}

inline void launch(Index blocks, int threads_a_block, int shared_bytes, std::function<void()> body) {
  grid = blocks;
  threads = {threads_a_block, 1};
  kernel = std::move(body);
  std::vector<Thread> fibers(threads_a_block);
  exchanged.assign(2 * threads_a_block, 0.0f);
  for (block.y = 0; block.y < grid.y; ++block.y) {
    for (block.x = 0; block.x < grid.x; ++block.x) {
      run_block(fibers);
      const char* end = shared + kSharedBytes;
      if (std::any_of(shared + shared_bytes, const_cast<char*>(end), [](char c) { return c != '\xFF'; })) {
        fail("wrote beyond its shared memory");
      }
    }
  }
}

}  // namespace shim

#define threadIdx (shim::current->index)
#define blockIdx (shim::block)
#define gridDim (shim::grid)
#define blockDim (shim::threads)

inline void __syncthreads() { shim::wait_for(shim::kBlock); }
inline void __syncwarp() { shim::wait_for(shim::kWarp); }

inline char* shared_memory() { return shim::shared; }

inline float swap_lanes(float value, int distance) {
  const int thread = threadIdx.x, lane = thread % shim::kWarpSize;
  float* slots = shim::exchanged.data() + (thread - lane) * 2 + shim::current->shuffles++ % 2 * shim::kWarpSize;
  slots[lane] = value;
  __syncwarp();
  return slots[lane ^ distance];
}

inline unsigned straddling(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}

struct Half {
  static float widen(unsigned bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return sign * (fraction ? NAN : INFINITY);
    return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24));
  }
  static unsigned short narrow(float value) {
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return sign | 0x7E00;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7C00;
    const int exponent = size > 0 ? std::max(std::ilogb(size), -14) : -14;
    const int fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // ties to even
    return static_cast<unsigned short>(sign + ((exponent + 14) << 10) + fraction);
  }
  static unsigned add(unsigned a, unsigned b) {
    const unsigned low = narrow(widen(a & 0xFFFF) + widen(b & 0xFFFF));
    return low | static_cast<unsigned>(narrow(widen(a >> 16) + widen(b >> 16))) << 16;
  }
};

struct BFloat16 {
  static float widen(unsigned bits) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static unsigned short narrow(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return static_cast<unsigned short>(bits >> 16 | 0x40);
    return static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  static unsigned add(unsigned a, unsigned b) {
    const unsigned low = narrow(widen(a & 0xFFFF) + widen(b & 0xFFFF));
    return low | static_cast<unsigned>(narrow(widen(a >> 16) + widen(b >> 16))) << 16;
  }
};
