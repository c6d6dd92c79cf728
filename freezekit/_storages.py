"""Where a tensor's elements are, whatever its layout, and for how long autograd holds them."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor: of a sparse one those of its indices and values, of a wrapper those of what it wraps.

    >>> [storage.nbytes() for storage in storages_of(torch.eye(3).to_sparse())]  # 2 x 3 indices, 3 values
    [48, 12]
    """
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts: Iterable[Tensor] = (getattr(tensor, name) for name in names)
    elif tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    else:
        parts = sparse_parts(tensor)
    return [storage for part in parts for storage in storages_of(part)]


def sparse_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The indices and values that a sparse tensor is made of; nothing where it is of another layout."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()


class Packed:
    """What autograd holds in place of a tensor that it saves, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        with DisableTorchFunction():
            self.tensor: Tensor | None = tensor.detach()  # with its graph, a result would hold its own node
