// Exhaustive small cases of csrc/core's index maths, each against its definition. Prints the first case that fails.
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "core/fast_divide.h"
#include "core/gather.h"
#include "core/mask.h"
#include "core/pixel_box.h"
#include "core/shared_tile.h"

using namespace freezekit;

#define REQUIRE(condition, ...)        \
  do {                                 \
    if (!(condition)) {                \
      std::printf("%s: ", #condition); \
      std::printf(__VA_ARGS__);        \
      std::printf("\n");               \
      std::exit(1);                    \
    }                                  \
  } while (0)

namespace {

void fast_divide() {
  const auto check = [](int32_t x, int32_t d) {
    int32_t remainder;
    const int32_t quotient = FastDivide(d).divide(x, &remainder);
    REQUIRE(quotient == x / d && remainder == x % d, "%d / %d gave %d rest %d", x, d, quotient, remainder);
  };
  for (int32_t d = 1; d < 300; ++d) {
    for (int32_t x = 0; x < 2000; ++x) check(x, d);
  }
  std::vector<int32_t> edges;
  for (int bit = 0; bit < 31; ++bit) {
    for (int64_t delta = -2; delta <= 2; ++delta) {
      const int64_t value = (int64_t{1} << bit) + delta;
      if (value > 0 && value <= INT32_MAX) edges.push_back(static_cast<int32_t>(value));
    }
  }
  for (const int64_t value : {3ll, 7ll, 641ll, 6700417ll, 715827883ll, 2147483647ll}) edges.push_back(value);
  for (const int32_t d : edges) {
    for (const int32_t x : edges) check(x, d);
    for (int64_t multiple = d; multiple <= INT32_MAX; multiple += multiple) {
      for (int64_t x = multiple - 1; x <= multiple + 1 && x <= INT32_MAX; ++x) check(static_cast<int32_t>(x), d);
    }
  }
}

// (output, filter index, input) triples that an axis visits, inputs outside left out; none may come twice.
using Visits = std::set<std::vector<int32_t>>;
void visit(const GatherAxis& axis, int32_t in_size, Visits* visits) {
  for (int32_t i = 0; i < axis.count; ++i) {
    for (int32_t t = 0; t < axis.taps; ++t) {
      const int32_t in = axis.in_first + i * axis.in_stride + t * axis.in_step;
      if (in < 0 || in >= in_size) continue;
      const bool fresh =
          visits->insert({axis.out_first + i * axis.out_step, axis.filter_first + t * axis.filter_step, in}).second;
      REQUIRE(fresh, "output %d, tap %d visited twice", i, t);
    }
  }
}

void gather_axis(const ConvAxis& axis) {
  Visits fprop, dgrad, fprop_expected, dgrad_expected;
  visit(fprop_axis(axis), axis.x, &fprop);
  std::vector<int> covered(axis.x, 0);
  int32_t taps = 0;
  for (int32_t phase = 0; phase < dgrad_phases(axis); ++phase) {
    const GatherAxis gather = dgrad_axis(axis, phase);
    visit(gather, axis.y, &dgrad);
    for (int32_t i = 0; i < gather.count; ++i) ++covered[gather.out_first + i * gather.out_step];
    taps += gather.taps;
    REQUIRE(gather.count > 0, "phase %d of stride %d has no outputs", phase, axis.stride);
  }
  for (int32_t y = 0; y < axis.y; ++y) {
    for (int32_t r = 0; r < axis.taps; ++r) {
      const int32_t x = y * axis.stride - axis.pad + r * axis.dilation;
      if (x < 0 || x >= axis.x) continue;
      fprop_expected.insert({y, r, x});
      dgrad_expected.insert({x, r, y});
    }
  }
  REQUIRE(fprop == fprop_expected && dgrad == dgrad_expected, "x %d y %d taps %d pad %d stride %d dilation %d", axis.x,
          axis.y, axis.taps, axis.pad, axis.stride, axis.dilation);
  for (const int count : covered) REQUIRE(count == 1, "an output of dgrad belongs to %d phases", count);
  // No wasted work: over all phases a tap is met once at most, where a dense gather would meet it `stride` times.
  REQUIRE(taps <= axis.taps, "%d taps in all phases, the filter has %d", taps, axis.taps);
}

void gather_axes() {
  for (int32_t x = 1; x <= 9; ++x)
    for (int32_t taps = 1; taps <= 7; ++taps)
      for (int32_t pad = 0; pad <= 4; ++pad)
        for (int32_t stride = 1; stride <= 5; ++stride)
          for (int32_t dilation = 1; dilation <= 4; ++dilation) {
            const int64_t y = output_size(x, taps, pad, stride, dilation);
            if (x + 2 * pad >= dilation * (taps - 1) + 1) {
              gather_axis({x, static_cast<int32_t>(y), taps, pad, stride, dilation});
            }
          }
}

// Rows decode to every (n, i, j) of the phase in order, and the outputs of all phases cover the tensor once.
void gather_rows() {
  for (int32_t h = 1; h <= 5; ++h)
    for (int32_t w = 1; w <= 5; ++w)
      for (int32_t stride = 1; stride <= 6; ++stride) {
        Conv2dProblem p;
        p.n = 2, p.c = 3, p.h = h, p.w = w, p.k = 4, p.r = p.s = 1, p.stride_h = stride, p.stride_w = stride + 1;
        p.p = output_size(h, 1, 0, p.stride_h, 1), p.q = output_size(w, 1, 0, p.stride_w, 1);
        for (const Operator op : {Operator::fprop, Operator::dgrad}) {
          const Gather g = make_gather(op, p);
          std::set<int64_t> offsets;
          for (int32_t a = 0; a < g.phases_h; ++a)
            for (int32_t b = 0; b < g.phases_w; ++b) {
              const GatherAxis axis_h = g.axis_h(a), axis_w = g.axis_w(b);
              const int32_t rows = g.batch * axis_h.count * axis_w.count;
              REQUIRE(rows <= g.max_rows(), "phase (%d, %d) has more rows than phase (0, 0)", a, b);
              for (int32_t m = 0; m < rows; ++m) {
                int32_t i, j;
                const int32_t n = g.decode_row(m, a, b, &i, &j);
                REQUIRE((n * axis_h.count + i) * axis_w.count + j == m && i < axis_h.count && j < axis_w.count,
                        "row %d of phase (%d, %d) decoded to %d, %d, %d", m, a, b, n, i, j);
                offsets.insert(
                    g.out_offset(n, axis_h.out_first + i * axis_h.out_step, axis_w.out_first + j * axis_w.out_step));
              }
            }
          const int64_t channels = static_cast<int64_t>(g.out_c) * g.groups;
          REQUIRE(static_cast<int64_t>(offsets.size()) == 2ll * g.out_h * g.out_w, "%zu outputs", offsets.size());
          REQUIRE(*offsets.rbegin() == (2ll * g.out_h * g.out_w - 1) * channels, "last offset");
        }
      }
}

// Of each phase: its box holds one pixel an output, and pixel and offset lead to what the gather reads.
void pixel_box(const ConvAxis& axis, bool dgrad) {
  const int32_t in = dgrad ? axis.y : axis.x, out = dgrad ? axis.x : axis.y;
  const int32_t phases = dgrad ? dgrad_phases(axis) : 1, wider = dgrad ? axis.x % axis.stride : 0;
  const auto gather = [&](int32_t phase) { return dgrad ? dgrad_axis(axis, phase) : fprop_axis(axis); };
  const PixelBox box = make_pixel_box(phases, dgrad ? axis.stride : 1, in, out, gather);
  for (int32_t phase = 0; phase < phases; ++phase) {
    const GatherAxis g = gather(phase);
    int32_t pixels = 0;
    for (int32_t at = box.lower; at <= in - 1 + box.upper[box_of_phase(phase, wider)]; at += box.stride) ++pixels;
    REQUIRE(pixels == g.count, "phase %d has %d outputs, its box %d pixels", phase, g.count, pixels);
    for (int32_t t = 0; t < g.taps; ++t) {
      const int32_t offset = box.offset(g, t);
      REQUIRE(offset >= 0 && offset <= box.max_offset, "tap %d is %d away", t, offset);
      for (int32_t i = 0; i < g.count; ++i) {
        REQUIRE(box.pixel(i) + offset == g.in_first + i * g.in_stride + t * g.in_step, "output %d, tap %d", i, t);
      }
    }
  }
}

void pixel_boxes() {
  for (int32_t x = 1; x <= 9; ++x)
    for (int32_t taps = 1; taps <= 7; ++taps)
      for (int32_t pad = 0; pad <= 4; ++pad)
        for (int32_t stride = 1; stride <= 5; ++stride)
          for (int32_t dilation = 1; dilation <= 4; ++dilation) {
            if (x + 2 * pad < dilation * (taps - 1) + 1) continue;
            const auto y = static_cast<int32_t>(output_size(x, taps, pad, stride, dilation));
            for (const bool dgrad : {false, true}) pixel_box({x, y, taps, pad, stride, dilation}, dgrad);
          }
  PixelBox box;
  REQUIRE(fits_map(box), "the smallest box fits");
  for (int32_t PixelBox::* field : {&PixelBox::lower, &PixelBox::stride, &PixelBox::max_offset}) {
    PixelBox large = box;
    large.*field = 256;
    REQUIRE(!fits_map(large), "256 does not fit");
  }
  PixelBox far = box;
  far.max_offset = 254;
  REQUIRE(fits_map(far), "a tap 254 away fits");
  far.max_offset = 255;
  REQUIRE(!fits_map(far), "CUTLASS stops at 254, and so does this");
  box.lower = -129;
  REQUIRE(!fits_map(box), "a corner of -129 does not fit");
}

// What the hardware makes of a descriptor: PTX ISA, "Strides" and "Canonical Layouts" of the 128-byte swizzle.
uint32_t described(uint64_t descriptor, uint32_t across, uint32_t down, uint32_t byte) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  return swizzled(field(0) + across * field(16) + down / 8 * field(32) + down % 8 * 128 + byte);
}

// Descriptors lead to where copies have put each byte: row by row of 128 bytes, panel after panel.
void shared_tiles() {
  const uint32_t tile = 5 * 1024;
  std::set<uint32_t> places;
  for (uint32_t at = tile; at < tile + 1024; ++at) {
    places.insert(swizzled(at));
    REQUIRE(swizzled(at) % 16 == at % 16 && swizzled(at) / 128 == at / 128, "byte %u leaves its chunk or row", at);
  }
  REQUIRE(places.size() == 1024 && *places.begin() == tile && *places.rbegin() == tile + 1023, "no permutation");
  for (uint32_t column = 0; column < 128; column += 16) {
    std::set<uint32_t> banks;
    for (uint32_t row = 0; row < 8; ++row) banks.insert(swizzled(tile + row * 128 + column) % 128);
    REQUIRE(banks.size() == 8, "chunks of a column share banks");
  }
  for (int32_t step = 0; step < 4; ++step)
    for (uint32_t row = 0; row < 256; ++row)
      for (uint32_t byte = 0; byte < 32; ++byte) {
        const uint32_t at = described(k_major_descriptor(tile, step), 0, row, byte);
        REQUIRE(at == swizzled(tile + row * 128 + static_cast<uint32_t>(step) * 32 + byte), "K-major, row %u", row);
      }
  const uint32_t panel = 64 * 128;
  for (int32_t step = 0; step < 4; ++step)
    for (uint32_t l = 0; l < 16; ++l)
      for (uint32_t mn = 0; mn < 256; ++mn) {
        const uint32_t at = described(mn_major_descriptor(tile, panel, step), mn / 64, l, mn % 64 * 2);
        const uint32_t row = static_cast<uint32_t>(step) * 16 + l;
        REQUIRE(at == swizzled(tile + mn / 64 * panel + row * 128 + mn % 64 * 2), "MN-major, column %u", mn);
      }
}

void masks() {
  for (int32_t element = 0; element < 70; ++element)
    for (int32_t count = 1; count <= 8; ++count)
      for (uint32_t bits = 0; bits < (1u << count); ++bits) {
        std::vector<uint32_t> mask(mask_words(element + count) + 1, 0);
        const MaskParts parts = split_mask_run(bits, element, count);
        mask[element / 32] |= parts.first;
        mask[element / 32 + 1] |= parts.second;
        REQUIRE(mask.back() == 0, "a bit beyond the last word, element %d count %d", element, count);
        for (int32_t i = 0; i < element + count; ++i) {
          const bool expected = i >= element && (bits >> (i - element) & 1);
          REQUIRE((mask[i / 32] >> i % 32 & 1) == expected, "bit %d of run %d + %d", i, element, count);
        }
        mask.resize(mask_words(element + count));  // a read beyond it is for a sanitizer to see
        REQUIRE(mask_run(mask.data(), element, count) == bits, "run %d + %d", element, count);
      }
}

void limits() {
  Conv2dProblem p;
  p.n = p.c = p.h = p.w = p.k = p.r = p.s = p.p = p.q = 1;
  REQUIRE(fits_int32(p), "the smallest problem fits");
  for (int64_t Conv2dProblem::* size :
       {&Conv2dProblem::n, &Conv2dProblem::c, &Conv2dProblem::h, &Conv2dProblem::w, &Conv2dProblem::k,
        &Conv2dProblem::r, &Conv2dProblem::s, &Conv2dProblem::p, &Conv2dProblem::q, &Conv2dProblem::pad_h,
        &Conv2dProblem::pad_w, &Conv2dProblem::stride_h, &Conv2dProblem::stride_w, &Conv2dProblem::dilation_h,
        &Conv2dProblem::dilation_w}) {
    Conv2dProblem large = p;
    large.*size = int64_t{1} << 31;
    REQUIRE(!fits_int32(large), "a size of 2^31 does not fit");
  }
  Conv2dProblem product = p;
  product.n = 1 << 12, product.h = 1 << 12, product.w = 1 << 12;
  REQUIRE(!fits_int32(product), "2^36 positions do not fit");
}

}  // namespace

int main() {
  fast_divide();
  gather_axes();
  gather_rows();
  pixel_boxes();
  shared_tiles();
  masks();
  limits();
  return 0;
}
