// The C interface of the ceilings: what `threads` threads of this machine reach at best.
// baton/native/ceilings.py mirrors the functions.

#include <chrono>
#include <exception>

#include "memory.h"
#include "ops.h"
#include "team.h"

namespace baton {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds of one product of ones: [rows, depth] times a packed weight [out, depth].
double product_seconds(Team& team, int64_t rows, int64_t out, int64_t depth,
                       int32_t repeats) {
  const int64_t padded = round_up(depth, kTileDepth);
  Memory plain(out * depth * 2), weight(packed_size(out, depth) * 2);
  Memory left(round_up(rows, kTileRows) * padded * 2), result(rows * out * 2);
  auto values = [](Memory& memory) { return reinterpret_cast<bf16*>(memory.data()); };
  for (Memory* memory : {&plain, &left}) {
    for (int64_t i = 0; i < memory->size() / 2; ++i) values(*memory)[i] = 0x3f80;
  }
  const Packed packed{values(weight), out, padded};
  double best = 0;
  team.run([&](Member& member) {
    pack(member, values(plain), out, depth, values(weight));
    for (int repeat = 0; repeat < repeats; ++repeat) {
      member.barrier();
      const auto start = Clock::now();
      member.barrier();  // nobody begins before: see time_together in ceilings.cpp
      multiply(member, values(left), rows, packed, nullptr, values(result), out);
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (member.index() == 0 && (repeat == 0 || seconds < best)) best = seconds;
    }
  });
  return best;
}

}  // namespace
}  // namespace baton

namespace {

// 0, or 1 where memory or threads are lacking.
template <typename Body>
int32_t measured(int32_t threads, Body&& body) noexcept {
  try {
    baton::Team team(threads, {});
    body(team);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// FLOP per second of tile products on operands in the first-level caches.
int32_t baton_matrix_peak(int32_t threads, int64_t steps, double* rate) {
  return measured(threads, [&](baton::Team& team) {
    team.run([&](baton::Member& member) {
      const double seen = baton::matrix_peak(member, steps);
      if (member.index() == 0) *rate = seen;
    });
  });
}

// Bytes per second of reading [data, data + bytes), aligned to 64, bytes a multiple of 256.
int32_t baton_read_bandwidth(int32_t threads, const uint8_t* data, int64_t bytes, double* rate) {
  return measured(threads, [&](baton::Team& team) {
    team.run([&](baton::Member& member) {
      const double seen = baton::read_bandwidth(member, data, bytes);
      if (member.index() == 0) *rate = seen;
    });
  });
}

// FLOP per second of the best of `repeats` products of packed operands.
int32_t baton_product_rate(int32_t threads, int64_t rows, int64_t out, int64_t depth,
                           int32_t repeats, double* rate) {
  return measured(threads, [&](baton::Team& team) {
    const double flop = 2.0 * static_cast<double>(rows) * static_cast<double>(out) *
                        static_cast<double>(depth);
    *rate = flop / baton::product_seconds(team, rows, out, depth, repeats);
  });
}

}  // extern "C"
#pragma GCC visibility pop
