#include "tests/emulator/conv_reference.h"

using freezekit::Conv2dProblem;
using freezekit::Operator;

std::vector<double> conv_reference(Operator op, const Conv2dProblem& p, const std::vector<double>& first,
                                   const std::vector<double>& second) {
  const int64_t c_group = p.c_per_group(), k_group = p.k_per_group();
  const int64_t numel = op == Operator::fprop ? p.y_numel() : op == Operator::dgrad ? p.x_numel() : p.filter_numel();
  std::vector<double> result(static_cast<size_t>(numel), 0.0);
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  for (int64_t n = 0; n < p.n; n++)
    for (int64_t y = 0; y < p.p * p.q; y++)
      for (int64_t tap = 0; tap < p.r * p.s; tap++) {
        const int64_t h = y / p.q * p.stride_h - p.pad_h + tap / p.s * p.dilation_h;
        const int64_t w = y % p.q * p.stride_w - p.pad_w + tap % p.s * p.dilation_w;
        if (h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
        for (int64_t k = 0; k < p.k; k++)
          for (int64_t c = 0; c < c_group; c++) {
            const size_t of_x = at(((n * p.h + h) * p.w + w) * p.c + k / k_group * c_group + c);
            const size_t of_y = at((n * p.p * p.q + y) * p.k + k);
            const size_t of_filter = at((k * p.r * p.s + tap) * c_group + c);
            if (op == Operator::fprop) result[of_y] += first[of_x] * second[of_filter];
            if (op == Operator::dgrad) result[of_x] += first[of_y] * second[of_filter];
            if (op == Operator::wgrad) result[of_filter] += first[of_y] * second[of_x];
          }
      }
  return result;
}
