"""Events of a GPU are told apart too, on records written by hand: the same records as torch.profiler's."""

from __future__ import annotations

import pytest

from freezekit.profiling.events import PHASES, Event, nest, outermost_operators, phases_of_kernel, phases_of_operator
from freezekit.profiling.table import COLUMNS, compare, tabulate


def op(name: str, start: int, end: int, correlation: int = 0, thread: int = 1, inputs: list | None = None) -> Event:
    return Event(name, start, end, thread=thread, correlation=correlation, inputs=inputs or [])


def kernel(name: str, start: int, launched_by: int) -> Event:
    return Event(name, start, start + 10, on_device=True, launched_by=launched_by)


def backward(mask: list[bool]) -> Event:
    return op("aten::convolution_backward", 0, 100, correlation=7, inputs=[None, None, None, mask])


def test_nesting_is_by_interval_and_thread() -> None:
    outer, inner, after, other = (
        op("a::a", 0, 100),
        op("b::b", 10, 90),
        op("c::c", 100, 110),
        op("d::d", 20, 30, thread=2),
    )
    nest([after, inner, other, outer])
    assert inner.parent is outer
    assert after.parent is None
    assert other.parent is None
    assert outer.children == [inner]


def test_regions_are_no_operators_and_do_not_hide_any() -> None:
    events = nest(
        [
            op("autograd::engine::evaluate_function: ConvolutionBackward0", 0, 100),
            op("ConvolutionBackward0", 1, 99),
            op("aten::convolution_backward", 2, 98, inputs=[[True, True, False]]),
            op("aten::mkldnn_convolution_backward", 3, 97),
        ]
    )
    assert [event.name for event in outermost_operators(events)] == ["aten::convolution_backward"]


@pytest.mark.parametrize(
    ("mask", "phases"),
    [
        ([True, False, False], ("dgrad",)),
        ([False, True, True], ("wgrad", "db")),
        ([True, True, True], ("dgrad", "wgrad", "db")),
        ([False, False, False], ()),
    ],
)
def test_output_mask_tells_the_gradients(mask: list[bool], phases: tuple[str, ...]) -> None:
    assert phases_of_operator(backward(mask)) == phases


def test_a_missing_mask_is_an_error_and_no_guess() -> None:
    with pytest.raises(ValueError, match="output_mask"):
        phases_of_operator(op("aten::convolution_backward", 0, 1))


def test_a_sum_is_a_bias_gradient_only_inside_the_convolutions_node() -> None:
    node, inside, outside = op("FreezekitConv2dBackward", 0, 50), op("aten::sum", 10, 20), op("aten::sum", 60, 70)
    nest([node, inside, outside])
    assert phases_of_operator(inside) == ("db",)
    assert phases_of_operator(outside) == ()


@pytest.mark.parametrize(
    ("name", "mask", "phases"),
    [
        ("sm90_xmma_dgrad_implicit_gemm_bf16", [True, True, False], ("dgrad",)),
        ("void cudnn::cnn::wgrad2d_grouped_direct_kernel", [True, True, False], ("wgrad",)),
        ("conv_depthwise2d_backward_kernel<3, 1, float>", [True, True, False], ("dgrad",)),
        ("conv_depthwise2d_grad_weight_kernel<float>", [True, True, False], ("wgrad",)),
        ("conv_depthwise3d_cuda_backward_input_kernel<float>", [True, True, False], ("dgrad",)),
        ("conv_depthwise3d_cuda_backward_weight_kernel<float>", [True, True, False], ("wgrad",)),
        ("void cudnn::ops::nchwToNhwcKernel<float>", [True, True, False], ()),
        ("void cudnn::engines_precompiled::nhwcToNchwKernel<float>", [True, False, False], ()),
        ("a kernel that does not tell", [True, True, False], ("dgrad", "wgrad")),
        # A dgrad that a library runs with its fprop kernel: what was asked for decides.
        ("sm90_xmma_fprop_implicit_gemm_bf16", [True, False, False], ("dgrad",)),
    ],
)
def test_stock_kernels_by_what_launched_them(name: str, mask: list[bool], phases: tuple[str, ...]) -> None:
    launched = kernel(name, 200, 7)
    nest([backward(mask), launched])
    assert phases_of_kernel(launched) == phases


def test_freezekit_kernels_take_their_operators_phase_also_from_within_aten() -> None:
    inner = op("aten::convolution_backward", 10, 90, correlation=8, inputs=[[False, True, False]])
    launched = kernel("any_name", 200, 8)
    nest([op("freezekit::conv2d_wgrad", 0, 100, correlation=7), inner, launched])
    assert phases_of_kernel(launched) == ("wgrad",)


def test_dgrad_as_a_transposed_convolution_is_a_dgrad() -> None:
    launched = kernel("implicit_convolve_sgemm", 200, 8)
    nest([op("freezekit::conv2d_dgrad", 0, 100), op("aten::convolution", 10, 90, correlation=8), launched])
    assert phases_of_kernel(launched) == ("dgrad",)


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("void freezekit::conv2d_implicit_gemm_kernel<...>", ("dgrad", "epilogue")),
        ("void freezekit::depthwise_dgrad_stride2_kernel<...>", ("dgrad", "epilogue")),
        ("void freezekit::gate_kernel<float>", ("epilogue",)),
    ],
)
def test_kernels_of_a_fused_block(name: str, phases: tuple[str, ...]) -> None:
    launched = kernel(name, 200, 7)
    nest([op("freezekit::frozen_conv2d_dgrad", 0, 100, correlation=7), launched])
    assert phases_of_kernel(launched) == phases


def test_device_work_that_nobody_launched_has_no_phase() -> None:
    launched = kernel("dgrad_of_someone", 200, 99)
    nest([backward([True, True, True]), launched])
    assert phases_of_kernel(launched) == ()


def test_table_statistics() -> None:
    table = tabulate([("k", ("dgrad",), 10), ("k", ("dgrad",), 20), ("k", ("dgrad",), 60), ("k", (), 10)])
    first, second = table
    assert (first.total, first.instances, first.average, first.median) == (90, 3, 30.0, 20)
    assert (first.minimum, first.maximum, first.time_percent) == (10, 60, 90.0)
    assert first.stddev == pytest.approx(26.4575, abs=1e-4)
    assert (first.label, second.label, second.stddev) == ("k [dgrad]", "k", 0.0)
    assert str(table).splitlines()[0].split("  ")[-1] == COLUMNS[-1]


def test_diff_lists_kernels_of_either_side() -> None:
    before = tabulate([("wgrad", ("wgrad",), 30), ("gone", (), 5)])
    after = tabulate([("wgrad", ("wgrad",), 20), ("new", (), 50)])
    counts = {**dict.fromkeys(PHASES, 0), "wgrad": 1}
    difference = compare(before, {**counts, "wgrad": 3}, after, counts)
    assert difference.phases == {"wgrad": (3, 1)}
    assert [(c.name, c.instances) for c in difference.kernels] == [
        ("new", (0, 1)),
        ("wgrad [wgrad]", (1, 1)),
        ("gone", (1, 0)),
    ]
