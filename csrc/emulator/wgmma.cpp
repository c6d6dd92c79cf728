// wgmma.mma_async (PTX ISA 9.7.15): asynchronous products of a warpgroup, operands in shared memory.
//
// Each warp's 16 rows are computed apart, once the warp's lanes have met. Accumulators are NaN from the issue to the
// wait that covers it; what they really are is kept here, so that one changed in between without a fence shows.
#include <cmath>
#include <cstring>
#include <vector>

#include "emulator/block.h"
#include "emulator/half_types.h"
#include "emulator/tensor_copy.h"
#include "emulator/tsan.h"
#include "emulator/warp.h"

namespace freezekit::emulator {
namespace {

constexpr int kGroupWarps = 4, kRows = 16;  // warps of a warpgroup, rows of one of them
constexpr int kMaxColumns = 256, kMaxDepth = 16;

struct Product {
  float* d;
  WgmmaType type;
  int n, transposed;
  uint64_t a, b;

  bool same_instruction(const Product& other) const {
    return type == other.type && n == other.n && transposed == other.transposed && a == other.a && b == other.b;
  }
};

struct Pending {
  Product product;
  int group;
  bool computed;
};

// What a warp has in flight.
struct Products {
  std::vector<Pending> pending;  // in the order of issue
  size_t retired = 0;            // of them; the rest is in flight
  int committed = 0;
  bool fenced = false;
  float* d[kWarpSize] = {};               // the accumulators of each lane,
  float values[kRows][kMaxColumns] = {};  // and what they hold in truth
  int columns = 0;
  uint64_t digest = 0, issued = 0;  // warps of a group must issue the same
};

Products of_warps[kMaxThreads / kWarpSize];

int my_warp() { return index_of(*current) / kWarpSize; }

int depth_of(WgmmaType type) { return type == WgmmaType::tf32 ? 8 : 16; }
uint32_t size_of(WgmmaType type) { return type == WgmmaType::tf32 ? 4 : 2; }

// The matrix descriptor (PTX ISA, "Matrix Descriptor Format"): addresses and offsets without their 4 low bits.
struct Descriptor {
  uint32_t start, leading, stride, base_offset, mode;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7), mode(bits >> 62) {}
};

// Where element (mn, k) is. K-major: rows of 128 bytes along k, eight rows per atom, atoms `stride` apart along mn.
// MN-major: rows of 128 bytes along mn, eight k per atom, atoms `leading` apart along mn and `stride` apart along k.
uint32_t address_of(const Descriptor& at, WgmmaType type, bool mn_major, int mn, int k) {
  const uint32_t size = size_of(type);
  const auto i = static_cast<uint32_t>(mn), l = static_cast<uint32_t>(k);
  if (!mn_major) return swizzle(at.start + i / 8 * at.stride + i % 8 * kSwizzleBytes + l * size);
  const uint32_t across = kSwizzleBytes / size;
  return swizzle(at.start + i / across * at.leading + l / 8 * at.stride + l % 8 * kSwizzleBytes + i % across * size);
}

float value_at(const unsigned char* p, WgmmaType type) {
  if (type == WgmmaType::tf32) {
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    return bits_float(bits & ~0x1fffu);
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return type == WgmmaType::bf16 ? bits_float(uint32_t{bits} << 16) : half_value(bits);
}

// Calls f(16 bytes, mn, k) for each chunk of the operand that holds elements (mn, k) on, along its major dimension.
template <class F>
void for_each_chunk(uint64_t descriptor, const Product& product, bool mn_major, int first, int count, const F& f) {
  const Descriptor at(descriptor);
  const int depth = depth_of(product.type), chunk = 16 / static_cast<int>(size_of(product.type));
  for (int mn = first; mn < first + count; mn += mn_major ? chunk : 1) {
    for (int k = 0; k < depth; k += mn_major ? 1 : chunk) {
      f(static_cast<unsigned char*>(shared_pointer(address_of(at, product.type, mn_major, mn, k), 16)), mn - first, k);
    }
  }
}

// Element (first + mn, k) to out[k][mn].
template <int kCount>
void load_operand(float (&out)[kMaxDepth][kCount], uint64_t descriptor, const Product& product, bool mn_major,
                  int first, int count) {
  const auto size = static_cast<int>(size_of(product.type));
  for_each_chunk(descriptor, product, mn_major, first, count, [&](const unsigned char* from, int mn, int k) {
    for (int e = 0; e < 16 / size; e++) {
      (mn_major ? out[k][mn + e] : out[k + e][mn]) = value_at(from + e * size, product.type);
    }
  });
}

void check(const Product& product) {
  const bool tf32 = product.type == WgmmaType::tf32;
  if (product.n < 8 || product.n > kMaxColumns || product.n % 8) fail("wgmma of %d columns", product.n);
  if (tf32 && product.transposed) fail("wgmma of tf32 takes K-major operands only");
  for (const uint64_t bits : {product.a, product.b}) {
    const Descriptor at(bits);
    if (at.mode != 1) fail("wgmma: a descriptor without the 128-byte swizzle is not emulated");
    if (at.base_offset) fail("wgmma: a descriptor with a base offset is not emulated");
    if (at.start / kSwizzleBytes % 8) fail("wgmma: a descriptor without a base offset begins inside a swizzle atom");
    if (at.stride % 1024 || at.stride == 0)
      fail("wgmma: a stride of %u bytes between swizzle atoms of 1024", at.stride);
  }
}

// The operands of a warp are read on behalf of one of its lanes, all of which know by now that they have landed.
void tell_tsan_of_reads(const Product& product, int first_row) {
  const auto read = [](const unsigned char* chunk, int, int) { tsan_read(chunk, 16); };
  for_each_chunk(product.a, product, product.transposed & 1, first_row, kRows, read);
  for_each_chunk(product.b, product, product.transposed & 2, 0, product.n, read);
}

void multiply(Products& warp, const Product& product, int first_row) {
  static float a[kMaxDepth][kRows], b[kMaxDepth][kMaxColumns];
  load_operand(a, product.a, product, product.transposed & 1, first_row, kRows);
  load_operand(b, product.b, product, product.transposed & 2, 0, product.n);
  for (int row = 0; row < kRows; row++) {
    for (int k = 0; k < depth_of(product.type); k++) {
      for (int column = 0; column < product.n; column += 8) {
        float* const sums = warp.values[row] + column;  // eight at a time, for g++ to make vectors of them
        for (int j = 0; j < 8; j++) sums[j] += a[k][row] * b[k][column + j];
      }
    }
  }
}

// Calls f(accumulator i of a lane, element of the 16 x n matrix that it holds).
template <class F>
void for_each_accumulator(Products& warp, int lane, const F& f) {
  for (int i = 0; i < warp.columns / 2; i++) {
    f(warp.d[lane][i], warp.values[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2]);
  }
}

void compute(Products& warp, int index, int groups) {
  for (Pending& pending : warp.pending) {
    if (pending.computed || pending.group >= groups) continue;
    multiply(warp, pending.product, index % kGroupWarps * kRows);
    pending.computed = true;
  }
}

// Finishes what was issued in the first `groups` groups; accumulators can be read once nothing is in flight.
void retire(Products& warp, int index, int groups) {
  compute(warp, index, groups);
  while (warp.retired < warp.pending.size() && warp.pending[warp.retired].group < groups) warp.retired++;
  if (warp.pending.empty() || warp.retired < warp.pending.size()) return;
  warp.pending.clear();
  warp.retired = 0;
  for (int lane = 0; lane < kWarpSize; lane++) {
    for_each_accumulator(warp, lane, [](float& accumulator, float value) { accumulator = value; });
  }
}

// Takes up accumulators that nothing is in flight for, as they stand.
void adopt(Products& warp, void* const (&lanes)[kWarpSize], int columns) {
  bool changed = warp.columns != columns;
  warp.columns = columns;
  for (int lane = 0; lane < kWarpSize; lane++) {
    float* const d = static_cast<Product*>(lanes[lane])->d;
    changed = changed || warp.d[lane] != d;
    warp.d[lane] = d;
    for_each_accumulator(warp, lane, [&](float accumulator, float& value) {
      changed = changed || float_bits(accumulator) != float_bits(value);
      value = accumulator;
    });
  }
  if (changed && !warp.fenced) fail("wgmma: accumulators were written before it, without a wgmma.fence");
}

void check_same(const Products& warp, void* const (&lanes)[kWarpSize]) {
  const auto& first = *static_cast<Product*>(lanes[0]);
  for (int lane = 0; lane < kWarpSize; lane++) {
    const auto& other = *static_cast<Product*>(lanes[lane]);
    if (!first.same_instruction(other)) fail("lanes of a warp meet at different forms of wgmma");
    if (warp.pending.empty()) continue;
    if (other.d != warp.d[lane] || other.n != warp.columns) {
      fail("wgmma: other accumulators while some are in flight are not emulated");
    }
  }
}

void combine_products(void* const (&lanes)[kWarpSize]) {
  const auto& first = *static_cast<Product*>(lanes[0]);
  const int index = my_warp();
  Products& warp = of_warps[index];
  check_same(warp, lanes);
  check(first);
  counters.wgmma++;
  if (kThreadSanitizer) tell_tsan_of_reads(first, index % kGroupWarps * kRows);
  if (warp.pending.empty()) adopt(warp, lanes, first.n);
  warp.fenced = false;
  warp.digest = (warp.digest ^ first.a ^ first.b << 1 ^ static_cast<uint64_t>(first.n)) * 1099511628211u;
  warp.issued++;
  for (int lane = 0; lane < kWarpSize; lane++) {
    for_each_accumulator(warp, lane, [](float& accumulator, float) { accumulator = std::nanf(""); });
  }
  {
    const AsHost as_host;
    warp.pending.push_back({first, warp.committed, false});
  }
  if (lands_at_once()) compute(warp, index, warp.committed + 1);
}

void combine_fences(void* const (&)[kWarpSize]) { of_warps[my_warp()].fenced = true; }
void combine_commits(void* const (&)[kWarpSize]) { of_warps[my_warp()].committed++; }

void combine_waits(void* const (&lanes)[kWarpSize]) {
  Products& warp = of_warps[my_warp()];
  retire(warp, my_warp(), warp.committed - *static_cast<int*>(lanes[0]));
}

constexpr CollectiveKind kWgmma{"wgmma", true, false, combine_products};
constexpr CollectiveKind kFence{"wgmma.fence", true, false, combine_fences};
constexpr CollectiveKind kCommit{"wgmma.commit_group", true, false, combine_commits};
constexpr CollectiveKind kWait{"wgmma.wait_group", true, true, combine_waits};
constexpr CollectiveKind kSetMaxRegisters{"setmaxnreg", true, false, nullptr};

}  // namespace

void begin_wgmma() {
  for (Products& warp : of_warps) {
    warp.pending.clear();
    warp.retired = 0;
    warp.committed = warp.columns = 0;
    warp.fenced = false;
    warp.digest = warp.issued = 0;
    for (float*& d : warp.d) d = nullptr;
  }
}

void check_no_wgmma_in_flight() {
  if (!of_warps[my_warp()].pending.empty()) fail("a warp ends with a wgmma that it has not waited for");
  if (block.alive > 1) return;
  for (size_t i = 0; i < block.threads.size() / kWarpSize; i++) {
    const Products& warp = of_warps[i];
    const Products& first = of_warps[i / kGroupWarps * kGroupWarps];
    if (warp.digest == first.digest && warp.issued == first.issued) continue;
    fail("the warps of a warpgroup have issued different wgmmas: %llu and %llu of them",
         static_cast<unsigned long long>(first.issued), static_cast<unsigned long long>(warp.issued));
  }
}

void wgmma(float* d, WgmmaType type, int n, int transposed, uint64_t a, uint64_t b) {
  Product operand{d, type, n, transposed, a, b};
  collective(kFullMask, kWgmma, &operand);
}

void wgmma_fence() { collective(kFullMask, kFence, nullptr); }
void wgmma_commit() { collective(kFullMask, kCommit, nullptr); }
void wgmma_wait(int newest_groups_in_flight) { collective(kFullMask, kWait, &newest_groups_in_flight); }

void set_max_registers(int registers) {
  if (registers < 24 || registers > 256 || registers % 8) fail("setmaxnreg to %d registers", registers);
  collective(kFullMask, kSetMaxRegisters, nullptr);
}

}  // namespace freezekit::emulator
