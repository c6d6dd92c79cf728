"""A fast wrong kernel never gets a time: every result is compared with stock's first."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class WrongResult(RuntimeError):
    """A side whose results differ from stock's."""


def tolerance(dtype: torch.dtype, length: int, tf32: bool = False) -> float:
    """How far two right results may be apart, relative to the largest element of stock's.

    An element is a sum of `length` products. Two orders of summation differ by about sqrt(length) roundings of the
    accumulator; each product carries the rounding of its factors, and the result is rounded to `dtype` once more.
    """
    accumulator = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    factor = 2.0**-10 if tf32 else torch.finfo(dtype).eps
    return 4 * factor + 4 * accumulator * length**0.5


def largest_error(result: Tensor, stock: Tensor, moved: Tensor | float = 0.0) -> float:
    """The largest difference of two tensors, relative to the largest element of `stock`.

    `moved` is subtracted from each element's difference first.
    """
    if not stock.numel():
        return 0.0
    difference = ((result.detach().double() - stock.detach().double()).abs() - moved).max().item()
    scale = stock.detach().double().abs().max().item()
    return difference / scale if scale else difference


def check(
    case: str,
    side: str,
    results: Mapping[str, Tensor],
    stock: Mapping[str, Tensor],
    tolerances: Mapping[str, float],
    moves: Callable[[], Mapping[str, Tensor]] | None = None,
) -> float:
    """Compares a side's results with stock's.

    Args:
        case, side: for the message.
        results, stock: tensors by name, such as "y", "dx", "dw"; both must hold the same names.
        tolerances: the largest error allowed, by the same names.
        moves: how far each element of stock's own results moves as its layers round otherwise, by the same names.
            Where a ReLU's pre-activation is within rounding of zero, two right networks may take different sides of
            it, and what depends on it differs by more than rounding: by as much as stock differs from itself. Called
            only if an element exceeds its tolerance; its result is subtracted from the difference.

    Returns:
        The largest error as a fraction of its tolerance, at most 1.

    Raises:
        WrongResult: naming the tensor, its error and the tolerance.
    """
    if results.keys() != stock.keys():
        raise WrongResult(f"{case}: {side} gave {sorted(results)}, stock gave {sorted(stock)}")
    worst = 0.0
    for name, expected in stock.items():
        result = results[name]
        if result.shape != expected.shape or result.dtype != expected.dtype:
            raise WrongResult(
                f"{case}: {side}'s {name} is {result.dtype} {tuple(result.shape)}, "
                f"stock's is {expected.dtype} {tuple(expected.shape)}"
            )
        error = largest_error(result, expected)
        if error > tolerances[name] and moves is not None:
            error = max(largest_error(result, expected, moves()[name]), 0.0)
        # Written this way round so that NaN fails too.
        if not error <= tolerances[name]:
            raise WrongResult(
                f"{case}: {side}'s {name} differs from stock's by {error:.3g} of its largest element, "
                f"more than the {tolerances[name]:.3g} that rounding explains"
            )
        worst = max(worst, error / tolerances[name])
    return worst
