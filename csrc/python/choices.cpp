// freezekit._C.choices: measured choices between ATen and freezekit's kernels, seen from Python.
#include "torch/backends/choices.h"

#include <pybind11/stl.h>

#include "python/bindings.h"

namespace freezekit {

void bind_choices(py::module_& parent) {
  py::module_ m = parent.def_submodule("choices", "What backend 'auto' has measured.");
  m.attr("rule") = choices::kRule;
  m.def("tune", [](const std::string& candidate) { choices::set_tuning(parse_backend(candidate)); });
  m.def("stop", [] { choices::set_tuning(std::nullopt); });
  m.def("clear", &choices::clear);
  m.def("set", [](const std::string& key, double aten_seconds, double native_seconds, bool agree) {
    choices::set(key, {aten_seconds, native_seconds, agree});
  });
  m.def("all", [] {
    std::vector<std::tuple<std::string, double, double, bool>> rows;
    for (const auto& [key, m] : choices::all()) rows.emplace_back(key, m.aten_seconds, m.native_seconds, m.agree);
    return rows;
  });
}

}  // namespace freezekit
