"""Where a tensor's elements are, whatever its layout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_BY_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_BY_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor: of a sparse one those of its indices and values, of a wrapper those of what it wraps.

    >>> [storage.nbytes() for storage in storages_of(torch.eye(3).to_sparse())]  # 2 x 3 indices, 3 values
    [48, 12]
    """
    parts: tuple[Tensor, ...]
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = tuple(getattr(tensor, name) for name in names)
    elif tensor.layout is torch.sparse_coo:
        parts = tensor._indices(), tensor._values()
    elif tensor.layout in _BY_ROWS:
        parts = tensor.crow_indices(), tensor.col_indices(), tensor.values()
    elif tensor.layout in _BY_COLUMNS:
        parts = tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    else:
        return [tensor.untyped_storage()] if tensor.layout is torch.strided else []
    return [storage for part in parts for storage in storages_of(part)]
