// The order of a step's spans.

#include <algorithm>
#include <cstdint>
#include <utility>

#include "ops.h"

namespace baton {
namespace {

// Positions of leading blocks that two spans have in common and see as a whole.
int64_t common_positions(const Span& a, const Span& b, int64_t block_size) {
  const int64_t most = std::min(a.start + a.queries, b.start + b.queries) / block_size;
  return (std::mismatch(a.blocks, a.blocks + most, b.blocks).first - a.blocks) * block_size;
}

}  // namespace

void order_spans(Span* spans, int64_t num_spans, int64_t block_size) {
  const auto blocks = [&](const Span& span) { return (span.start + span.queries) / block_size; };
  const auto before = [&](const Span& a, const Span& b) {
    return std::lexicographical_compare(a.blocks, a.blocks + blocks(a), b.blocks,
                                        b.blocks + blocks(b));
  };
  for (Span *first = spans, *end = spans + num_spans, *last; first < end; first = last) {
    const auto alike = [&, head = *first](const Span& span) {
      return span.queries == head.queries && span.blocks[0] == head.blocks[0];
    };
    last = first + 1;
    first->shared = 0;
    if (std::none_of(last, end, alike)) continue;  // what is not shared stays where it is
    last = std::stable_partition(last, end, alike);
    std::sort(first, last, before);  // the longer tables are alike, the closer they get
    first->shared = 0;
    for (Span* span = first + 1; span < last; ++span) {
      span->shared = common_positions(span[-1], *span, block_size);
    }
  }
}

}  // namespace baton
