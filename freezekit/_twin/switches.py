"""Torch's own switches, and random generators, as they were before a run that may have set them."""

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

Switch = tuple[Callable[[], Any], Callable[[Any], object]]  # how it is read, and set

_TINY = 1e-310  # less than any normal number in float64


def _attributes(owner: Any, names: str) -> Iterator[Switch]:
    return ((partial(getattr, owner, name), partial(setattr, owner, name)) for name in names.split())


def _default_device() -> torch.device | None:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _switches() -> Iterator[Switch]:
    """What the switches are; a setting before those that inherit it."""
    backends: Any = torch.backends
    yield torch.get_default_dtype, torch.set_default_dtype
    yield _default_device, torch.set_default_device
    yield torch.is_grad_enabled, torch.set_grad_enabled
    yield (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.autograd.set_detect_anomaly(*value),
    )
    yield torch._C._is_multithreading_enabled, torch._C._set_multithreading_enabled
    for device in torch._C._autocast_supported_devices():
        yield partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)
        yield partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device)
    yield torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    yield torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
    yield from _attributes(torch.utils.deterministic, "fill_uninitialized_memory")
    yield from _attributes(backends.cudnn, "enabled benchmark benchmark_limit deterministic")
    yield from _attributes(backends.mkldnn, "enabled deterministic")
    yield from _attributes(backends.opt_einsum, "enabled strategy")
    yield torch._C._get_float32_matmul_precision, torch.set_float32_matmul_precision
    for backend, operators in (("generic", "all"), ("cuda", "all matmul conv rnn"), ("mkldnn", "all matmul conv rnn")):
        for operator in operators.split():
            yield (
                partial(torch._C._get_fp32_precision_getter, backend, operator),
                partial(torch._C._set_fp32_precision_setter, backend, operator),
            )
    yield from _attributes(
        backends.cuda.matmul,
        "allow_fp16_reduced_precision_reduction allow_bf16_reduced_precision_reduction allow_fp16_accumulation",
    )
    for kind in ("flash", "mem_efficient", "math", "cudnn"):
        yield getattr(backends.cuda, f"{kind}_sdp_enabled"), getattr(backends.cuda, f"enable_{kind}_sdp")
    yield torch.get_num_threads, torch.set_num_threads
    yield torch.is_warn_always_enabled, torch.set_warn_always
    yield lambda: _TINY * 1.0 == 0.0, torch.set_flush_denormal
    for name in ("overwrite_module_params_on_conversion", "swap_module_params_on_conversion"):
        yield getattr(torch.__future__, f"get_{name}"), getattr(torch.__future__, f"set_{name}")
    if torch.cuda.is_initialized():
        yield torch.cuda.current_device, torch.cuda.set_device


@contextmanager
def switches_kept() -> Iterator[None]:
    """Context manager: at its end torch's switches are what they were."""
    before = []
    for read, put in _switches():
        try:
            before.append((read, put, read()))
        except RuntimeError:  # of settings that contradict each other, and of builds that lack one
            continue
    try:
        yield
    finally:
        for read, put, value in before:
            if read() != value:
                put(value)


_lock = threading.Lock()
_uncompiled: list[Any] = []  # what ends the stance, for each thread that is within it


@contextmanager
def uncompiled() -> Iterator[None]:
    """Context manager: compiled functions run as they are written.

    One whose first call is within a mode of operators is never compiled from then on.
    """
    with _lock:
        _uncompiled.append(None if _uncompiled else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            last = _uncompiled.pop()
            if last is not None:  # of all threads, which may end in any order
                last.__exit__(None, None, None)


@contextmanager
def random_numbers_kept(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Context manager: at its end the random generators of torch, Python and numpy are what they were."""
    on_gpu = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    state, numpy = random.getstate(), sys.modules.get("numpy")
    state_of_numpy = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(on_gpu):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(state_of_numpy)
