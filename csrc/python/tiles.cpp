// freezekit._C.tiles: one launch of a kernel and tile of the caller's choosing, which select() may be judged by.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "python/bindings.h"
#include "torch/backends/native.h"

namespace freezekit {
namespace {

Sizes sizes_of(const at::Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }

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
  const Conv2dProblem p = make_problem(sizes_of(x), sizes_of(w), stride, padding, dilation, groups);
  if (sizes_of(y) != Sizes{p.n, p.k, p.p, p.q})
    throw py::value_error("the sizes of x, w and y do not make a convolution");
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
