"""For tests where there is no GPU: freezekit's CUDA kernels, emulated on a CPU.

What passes here is *emulated*: the kernels' own source ran, not their machine code.
"""

from freezekit import _extension
from freezekit._arguments import check_flag
from freezekit.backends import switched


class emulated(switched):
    """Context manager: ``freezekit.backend("native")`` for CPU tensors, on which the kernels' source runs, slowly.

    Args:
        hopper: as for `freezekit.backend`.

    Raises:
        RuntimeError: if the emulated kernels are not there. An installed package is without them: they are built in a
            source folder, by ``make build``.
        TypeError: if `hopper` is not a bool.

    >>> import torch, freezekit as fk
    >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    >>> with fk.testing.emulated():
    ...     print(fk.functional.conv2d(x, w).item())
    9.0
    """

    def __init__(self, *, hopper: bool = False) -> None:
        check_flag("hopper", hopper)
        if not _extension.emulated_kernels().exists():
            raise RuntimeError(
                "the emulated kernels are not built: they are for freezekit's tests, and `make build` in its source "
                "folder builds them"
            )
        super().__init__("emulated", hopper)
