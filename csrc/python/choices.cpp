// freezekit._C.choices: what `auto` has decided between torch's operators and freezekit's kernels, seen from Python.
#include "torch/backends/choices.h"

#include <pybind11/stl.h>

#include "python/bindings.h"
#include "torch/backends/native.h"
#include "torch/backends/proof.h"

namespace freezekit {

void bind_choices(py::module_& parent) {
  py::module_ m = parent.def_submodule("choices", "What backend 'auto' has decided on the device at hand.");
  m.attr("rule") = choices::kRule;
  m.attr("passing_notes") = py::make_tuple(proof::kNoMemory, proof::kNoCode, proof::kUntold);
  m.def("emulate", &choices::emulate, py::arg("handicap"),
        "For tests: a CPU stands for a GPU, the times of the emulated kernels are multiplied; None ends it.");
  m.def("clear", &choices::clear);
  m.def("load",
        [](const std::string& key, double aten_seconds, double native_seconds, bool agree, const std::string& note) {
          choices::set(key, {aten_seconds, native_seconds, agree, note, /*loaded=*/true});
        });
  m.def(
      "admit_hopper",
      [](bool emulated) {
        const Backend on = emulated ? Backend::emulated : Backend::native;
        choices::Setting setting{};
        setting.device = emulated ? c10::DeviceType::CPU : c10::DeviceType::CUDA;
        setting.target = native::target_on(kernel_library(on), on);
        choices::Measurement passed;
        passed.agree = passed.loaded = true;
        choices::set(choices::hopper_key(setting), passed);
      },
      py::arg("emulated"), "The self-test of the kernels of sm_90a has passed on the current device.");
  m.def("all", [] {
    std::vector<std::tuple<std::string, double, double, bool, std::string>> rows;
    for (const auto& [key, m] : choices::all())
      rows.emplace_back(key, m.aten_seconds, m.native_seconds, m.agree, m.note);
    return rows;
  });
}

}  // namespace freezekit
