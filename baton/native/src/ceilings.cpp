// What this machine can do at best, measured like an operation: products and memory are judged by it.
#include <immintrin.h>

#include <algorithm>
#include <chrono>

#include "ops.h"
#include "tile.h"

namespace baton {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds that `work` takes, from when all members are there until all are done. Nobody begins
// before everybody has looked at the clock: a member that the kernel wakes late would otherwise time
// what the others left to do.
template <typename Work>
double time_together(Member& member, Work&& work) {
  member.barrier();
  const auto start = Clock::now();
  member.barrier();
  work();
  member.barrier();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Reads all of [data, data + bytes), bytes a multiple of 256; the result depends on all of it.
__m512i read_all(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kLead = 1024;
  __m512i sum[4] = {};
  for (int64_t at = 0; at < bytes; at += 256) {
    for (int part = 0; part < 4; ++part) {
      _mm_prefetch(reinterpret_cast<const char*>(data) + at + kLead + part * 64, _MM_HINT_T0);
      sum[part] = _mm512_xor_si512(sum[part], _mm512_load_si512(data + at + part * 64));
    }
  }
  return _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
}

}  // namespace

double matrix_peak(Member& member, int64_t steps) {
  static constexpr TileConfig kFull = tile_config({16, 16, 16, 16, 16, 16, 16, 16});
  alignas(64) static constexpr bf16 kZeros[4 * kTileRows * kTileDepth] = {};
  const Tiles tiles(kFull);
  const double seconds = time_together(member, [&] { multiply_repeatedly(kZeros, kZeros, steps); });
  constexpr double kStepFlop = 2.0 * 2 * kTileRows * 2 * kTileRows * kTileDepth;
  return kStepFlop * static_cast<double>(steps) * member.size() / seconds;
}

double read_bandwidth(Member& member, const uint8_t* data, int64_t bytes) {
  constexpr int64_t kPart = 1 << 20;
  __m512i sum = {};
  const double seconds = time_together(member, [&] {
    member.for_each((bytes + kPart - 1) / kPart, [&](int64_t part) {
      const int64_t size = std::min(kPart, bytes - part * kPart);
      sum = _mm512_xor_si512(sum, read_all(data + part * kPart, size));
    });
  });
  asm volatile("" ::"v"(sum));  // the compiler must not leave out the reading
  return static_cast<double>(bytes) / seconds;
}

}  // namespace baton
