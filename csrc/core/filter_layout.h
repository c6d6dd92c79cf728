// Where an element of a filter is in the two layouts that kernels read, dense, groups one after another.
//
//   KRSC: group, k, r, s, c     fprop and wgrad; with k over the whole K it is the usual K x R x S x C/G
//   CRSK: group, c, r, s, k     W', which dgrad reads as if it were the KRSC filter of an fprop from dy to dx
//
// W' is only transposed. The rotation by 180 degrees and the choice of taps of a strided dgrad are in core/gather.h, so
// that one W' serves every stride and padding.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace freezekit {

// k and c count within the group; tap = r * S + s.
struct FilterElement {
  int32_t group, k, tap, c;
};

struct FilterExtent {
  int32_t k, taps, c;  // of one group
};

FK_HOST_DEVICE int64_t krsc_offset(const FilterElement& e, const FilterExtent& size) {
  return ((static_cast<int64_t>(e.group) * size.k + e.k) * size.taps + e.tap) * size.c + e.c;
}

FK_HOST_DEVICE int64_t crsk_offset(const FilterElement& e, const FilterExtent& size) {
  return ((static_cast<int64_t>(e.group) * size.c + e.c) * size.taps + e.tap) * size.k + e.k;
}

}  // namespace freezekit
