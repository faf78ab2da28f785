// The products of tiles that products of matrices and attention are made of. There are two of each
// header that needs to know how: for AMX, and for AVX-512 BF16 where there is no AMX. A library has
// one of them; both are compiled from the same sources, and what they compute is laid out alike.
//
// Either adds a product's pairs of values (an even column and the one behind it) in order of depth,
// in the same way whichever operand is the left one. So results have the same bits in any division
// of the work; AMX and AVX-512 round at different places, and differ from each other.
#pragma once

namespace baton {

// What was stored before is in memory for what is loaded after, as far as the compiler goes.
inline void settle() { asm volatile("" ::: "memory"); }

}  // namespace baton

#ifdef BATON_AVX512
#include "tile_avx512.h"
#else
#include "tile_amx.h"
#endif
