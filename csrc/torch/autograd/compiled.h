// Compiled autograd (torch._dynamo.compiled_autograd): it traces a backward pass as a function of what nodes saved.
//
// A node says what a compiled pass depends on (compiled_args), and offers its apply as a pure function of values that
// fit into an fx graph. What every node does around that function stands here.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <optional>
#include <string>
#include <vector>

namespace freezekit {

using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::PackedArgs;
using torch::dynamo::autograd::SwapSavedVariables;

using FunctionalApply = torch::autograd::variable_list (*)(const torch::autograd::variable_list& grads,
                                                           const std::vector<c10::IValue>& arguments);

// Puts a call of `apply` with these arguments into the graph being traced; returns what stands for its results there.
inline torch::autograd::variable_list trace_call(const torch::autograd::Node& node, const std::string& name,
                                                 FunctionalApply apply, const torch::autograd::variable_list& grads,
                                                 PackedArgs arguments, SwapSavedVariables& saved) {
  namespace compiler = torch::dynamo::autograd;
  using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
  const auto metadata = compiler::IValuePacker<Metadata>::pack(compiler::get_input_metadata(node.next_edges()));
  std::vector<at::TypePtr> schema;
  for (const auto& value : arguments.vec()) {
    // A tensor's own type would fix its shape.
    schema.push_back(value.isTensor() ? at::TensorType::get() : value.type());
  }
  const auto& python = compiler::getPyCompilerInterface();
  const std::string bound = python->bind_function(saved.get_py_compiler(), name, apply, schema,
                                                  /*is_custom_function=*/true, /*is_traceable=*/true);
  return python->call_function(saved.get_py_compiler(), "apply_functional", bound, grads, arguments.vec(), metadata);
}

}  // namespace freezekit
