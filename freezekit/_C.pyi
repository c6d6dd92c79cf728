from collections.abc import Callable, Sequence
from typing import Any, NoReturn

def has_cuda_kernels() -> bool: ...
def refuse(what: str, backend: str, why: str) -> NoReturn: ...
def set_emulator_path(path: str) -> None: ...
def set_hopper(allowed: bool) -> None: ...
def set_launch_log(enabled: bool) -> None: ...
def take_launch_log() -> list[dict[str, Any]]: ...
def select(
    operator: str,
    dtype: str,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int] = ...,
    padding: Sequence[int] = ...,
    dilation: Sequence[int] = ...,
    groups: int = ...,
    *,
    sm: int = ...,
    sm_count: int = ...,
    allow_tf32: bool = ...,
    deterministic: bool = ...,
    hopper: bool = ...,
    device: str = ...,
    channels_last: bool = ...,
) -> dict[str, Any]: ...

class blocks:
    @staticmethod
    def know(convs: frozenset[Any], norms: dict[Any, bool], activations: dict[Any, str]) -> None: ...
    @staticmethod
    def run(
        x: Any,
        conv: Any,
        norm: Any,
        activation: Any,
        residual: Any,
        channels_last: bool | None,
        backend: str,
        shared: bool,
        /,
    ) -> Any: ...

class quick:
    @staticmethod
    def activation(input: Any, kind: str, a: float, b: float, inplace: bool, backend: str, /) -> Any: ...
    @staticmethod
    def batch_norm(input: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: Any, /) -> Any: ...
    @staticmethod
    def conv2d(
        input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, backend: str, /
    ) -> Any: ...

class choices:
    rule: str

    @staticmethod
    def emulate(handicap: float | None) -> None: ...
    @staticmethod
    def clear() -> None: ...
    @staticmethod
    def load(key: str, aten_seconds: float, native_seconds: float, agree: bool, note: str) -> None: ...
    @staticmethod
    def admit_hopper(emulated: bool) -> None: ...
    @staticmethod
    def all() -> list[tuple[str, float, float, bool, str]]: ...

class tiles:
    @staticmethod
    def launch(
        operator: int,
        x: Any,
        w: Any,
        y: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        family: int,
        config: int,
        split_k: int,
    ) -> bool: ...

class enable:
    @staticmethod
    def on(is_compiled: Callable[[Any], bool]) -> list[str]: ...
    @staticmethod
    def off() -> None: ...
    @staticmethod
    def set_watched(watched: bool) -> None: ...
    @staticmethod
    def operators() -> list[str]: ...
