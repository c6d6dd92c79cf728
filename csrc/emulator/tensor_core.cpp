// ldmatrix and mma (PTX ISA 9.7.14.5): fragments as kernels/ptx.h lays them out.
#include "emulator/half_types.h"
#include "emulator/warp.h"

namespace freezekit::emulator {
namespace {

struct LoadMatrix {
  int matrices;
  bool transposed;
  const void* address;
  uint4 row;
  uint32_t* fragment;
};

// The eight rows of a matrix are read at once, each from four of the 32 banks of four bytes: all banks are busy just
// once where the rows' addresses differ modulo 128 bytes. Lanes that read the same row share it.
bool conflicts(void* const* rows) {
  for (int i = 0; i < 8; i++) {
    for (int j = 0; j < i; j++) {
      const auto a = reinterpret_cast<uintptr_t>(static_cast<LoadMatrix*>(rows[i])->address);
      const auto b = reinterpret_cast<uintptr_t>(static_cast<LoadMatrix*>(rows[j])->address);
      if (a != b && a % 128 == b % 128) return true;
    }
  }
  return false;
}

void combine_ldmatrix(void* const (&lanes)[kWarpSize]) {
  const auto& first = *static_cast<LoadMatrix*>(lanes[0]);
  for (void* lane : lanes) {
    const auto& other = *static_cast<LoadMatrix*>(lane);
    if (other.matrices != first.matrices || other.transposed != first.transposed) {
      fail("lanes of a warp meet at different forms of ldmatrix");
    }
  }
  for (int m = 0; m < first.matrices; m++) {
    uint16_t element[8][8];
    for (int r = 0; r < 8; r++) std::memcpy(element[r], &static_cast<LoadMatrix*>(lanes[8 * m + r])->row, 16);
    counters.ldmatrix_phases++;
    counters.ldmatrix_conflicts += conflicts(lanes + 8 * m);
    for (int lane = 0; lane < kWarpSize; lane++) {
      const int r = lane / 4, c = 2 * (lane % 4);
      const uint32_t low = first.transposed ? element[c][r] : element[r][c];
      const uint32_t high = first.transposed ? element[c + 1][r] : element[r][c + 1];
      static_cast<LoadMatrix*>(lanes[lane])->fragment[m] = low | high << 16;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

float low_bf16(uint32_t pair) { return bits_float(pair << 16); }
float high_bf16(uint32_t pair) { return bits_float(pair & 0xffff0000u); }
float low_f16(uint32_t pair) { return half_value(static_cast<uint16_t>(pair)); }
float high_f16(uint32_t pair) { return half_value(static_cast<uint16_t>(pair >> 16)); }
float tf32(uint32_t bits) { return bits_float(bits & ~0x1fffu); }

// Products of two such numbers are exact in fp32; sums are rounded to nearest, one after another. A GPU sums in an
// order, and with a rounding, that are not documented.
template <int K>
void multiply_add(const float (&a)[16][K], const float (&b)[8][K], void* const (&lanes)[kWarpSize]) {
  counters.mma++;
  for (int lane = 0; lane < kWarpSize; lane++) {
    float* d = static_cast<Mma*>(lanes[lane])->d;
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = d[i];
      for (int k = 0; k < K; k++) sum += a[row][k] * b[column][k];
      d[i] = sum;
    }
  }
}

template <float (*Low)(uint32_t), float (*High)(uint32_t)>
void combine_m16n8k16(void* const (&lanes)[kWarpSize]) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const auto& operand = *static_cast<Mma*>(lanes[lane]);
    const int g = lane / 4, k = 2 * (lane % 4);
    for (int i = 0; i < 4; i++) {
      a[g + 8 * (i % 2)][k + 8 * (i / 2)] = Low(operand.a[i]);
      a[g + 8 * (i % 2)][k + 8 * (i / 2) + 1] = High(operand.a[i]);
    }
    for (int i = 0; i < 2; i++) {
      b[g][k + 8 * i] = Low(operand.b[i]);
      b[g][k + 8 * i + 1] = High(operand.b[i]);
    }
  }
  multiply_add(a, b, lanes);
}

void combine_m16n8k8_tf32(void* const (&lanes)[kWarpSize]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const auto& operand = *static_cast<Mma*>(lanes[lane]);
    const int g = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][k + 4 * (i / 2)] = tf32(operand.a[i]);
    for (int i = 0; i < 2; i++) b[g][k + 4 * i] = tf32(operand.b[i]);
  }
  multiply_add(a, b, lanes);
}

constexpr CollectiveKind kLdmatrix{"ldmatrix", true, false, combine_ldmatrix};
constexpr CollectiveKind kMmaBf16{"mma.m16n8k16.bf16", true, false, combine_m16n8k16<low_bf16, high_bf16>};
constexpr CollectiveKind kMmaF16{"mma.m16n8k16.f16", true, false, combine_m16n8k16<low_f16, high_f16>};
constexpr CollectiveKind kMmaTf32{"mma.m16n8k8.tf32", true, false, combine_m16n8k8_tf32};

void mma(const CollectiveKind& kind, float* d, const uint32_t* a, const uint32_t* b) {
  Mma operand{d, a, b};
  collective(kFullMask, kind, &operand);
}

}  // namespace

void check_ldmatrix_row(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("ldmatrix: an address is not a multiple of 16");
  if (!is_shared(address, 16)) fail("ldmatrix does not read inside shared memory");
}

void ldmatrix(uint32_t* fragment, int matrices, bool transposed, const void* address, const uint4& row) {
  LoadMatrix operand{matrices, transposed, address, row, fragment};
  collective(kFullMask, kLdmatrix, &operand);
}

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b) { mma(kMmaBf16, d, a, b); }
void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b) { mma(kMmaF16, d, a, b); }
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b) { mma(kMmaTf32, d, a, b); }

}  // namespace freezekit::emulator
