#include "torch/common/bit_mask.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>

#include <algorithm>
#include <vector>

#include "torch/common/unseen.h"

namespace freezekit {
namespace {

// Dimensions from the outermost in memory to the innermost; sizes of 1 do not count.
std::vector<int64_t> memory_order(SymIntArrayRef stride) {
  std::vector<int64_t> order(stride.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return stride[a] > stride[b]; });
  return order;
}

}  // namespace

Tensor empty_bits(const Tensor& like) {
  const c10::SymInt words = (like.sym_numel() + 31) / 32;
  return empty_beside(like, words, at::MemoryFormat::Contiguous, at::kInt);
}

Tensor pack_bits(const Tensor& mask) {
  const auto stride = mask.sym_strides();
  const Tensor flat = mask.permute(memory_order(stride)).reshape(-1).to(at::kInt);
  const c10::SymInt words = (mask.sym_numel() + 31) / 32;
  const Tensor padded = at::constant_pad_nd_symint(flat, {c10::SymInt(0), words * 32 - mask.sym_numel()});
  const Tensor position = at::arange(32, flat.options());
  return padded.view_symint({words, c10::SymInt(32)}).bitwise_left_shift(position).sum({1}, false, at::kInt);
}

Tensor unpack_bits(const Tensor& bits, SymIntArrayRef size, SymIntArrayRef stride) {
  const auto order = memory_order(stride);
  std::vector<c10::SymInt> ordered;
  std::vector<int64_t> back(order.size());
  c10::SymInt numel = 1;
  for (size_t i = 0; i < order.size(); ++i) {
    ordered.push_back(size[order[i]]);
    back[order[i]] = static_cast<int64_t>(i);
    numel *= size[order[i]];
  }
  const Tensor position = at::arange(32, bits.options());
  const Tensor spread = bits.unsqueeze(1).bitwise_right_shift(position).bitwise_and(1).flatten();
  return spread.narrow_symint(0, 0, numel).view_symint(ordered).permute(back).to(at::kBool);
}

}  // namespace freezekit
