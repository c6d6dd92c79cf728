// freezekit._C.tiles: one launch of a kernel and tile of the caller's choosing, which select() may be judged by.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "python/bindings.h"
#include "torch/backends/native.h"

namespace freezekit {
namespace {

using Pair = std::array<int64_t, 2>;

Conv2dProblem problem_of(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, const Pair& stride,
                         const Pair& padding, const Pair& dilation, int64_t groups) {
  Conv2dProblem p;
  p.n = x.size(0), p.c = x.size(1), p.h = x.size(2), p.w = x.size(3);
  p.k = w.size(0), p.r = w.size(2), p.s = w.size(3);
  p.stride_h = stride[0], p.stride_w = stride[1], p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1], p.groups = groups;
  p.p = output_size(p.h, p.r, p.pad_h, p.stride_h, p.dilation_h);
  p.q = output_size(p.w, p.s, p.pad_w, p.stride_w, p.dilation_w);
  const std::array<int64_t, 4> output = {p.n, p.k, p.p, p.q};
  if (w.size(1) * groups != p.c || p.k % groups != 0 || y.sizes() != c10::IntArrayRef(output)) {
    throw py::value_error("the sizes of x, w and y do not make a convolution");
  }
  return p;
}

// Writes y (conv2d), x (conv2d_dgrad) or w (conv2d_wgrad) of three dense channels_last tensors. False: this kernel
// does not take the problem, or has no such config.
bool launch(int op, const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, const Pair& stride,
            const Pair& padding, const Pair& dilation, int64_t groups, int family, int config, int split_k) {
  for (const at::Tensor* t : {&x, &w, &y}) {
    if (t->dim() != 4 || !t->is_contiguous(at::MemoryFormat::ChannelsLast) || t->device() != x.device() ||
        t->scalar_type() != x.scalar_type()) {
      throw py::value_error("x, w and y must be dense channels_last tensors of one dtype, on one device");
    }
  }
  const DType dtype = native::kernel_dtype(x);
  const Conv2dProblem p = problem_of(x, w, y, stride, padding, dilation, groups);
  const KernelLibrary& library = kernel_library(x.is_cuda() ? Backend::native : Backend::emulated);
  const c10::DeviceGuard guard(x.device());
  Selection selection;
  selection.family = static_cast<Family>(family), selection.config = config, selection.split_k = split_k;
  selection.workspace_bytes = static_cast<size_t>(w.numel()) * 8 * static_cast<size_t>(split_k);  // for any family
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(selection.workspace_bytes)}, x.options().dtype(at::kByte));
  const Status status =
      library.table->conv2d(static_cast<Operator>(op), selection, p, dtype, {x.data_ptr(), w.data_ptr(), y.data_ptr()},
                            {}, workspace.mutable_data_ptr(), native::stream_of(x));
  if (status == Status::invalid_argument || status == Status::unsupported) return false;
  native::check_status(status, "of the tile that was asked for", library);
  return true;
}

}  // namespace

void bind_tiles(py::module_& parent) {
  py::module_ m = parent.def_submodule("tiles", "Launches with a kernel and a tile of the caller's choosing.");
  m.def("launch", &launch, "Whether it ran: operator 0 to 2, x, w, y, geometry, family, config, split_k.",
        py::arg("operator"), py::arg("x"), py::arg("w"), py::arg("y"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("family"), py::arg("config"), py::arg("split_k"));
}

}  // namespace freezekit
