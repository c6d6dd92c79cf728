"""The ways in which a network is frozen in tests, and the least that its formulas let it keep in each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
PIECEWISE = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Prompted(nn.Module):
    """A network with a learnt tensor added to its input."""

    def __init__(self, model: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.prompt = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + self.prompt)


def first_part(model: nn.Module) -> nn.Module:
    """layer1 of a residual network, else the first child with parameters."""
    found = getattr(model, "layer1", None)
    return found or next(child for child in model.children() if any(True for _ in child.parameters()))


def all_frozen(model: nn.Module, x: Tensor) -> nn.Module:
    x.requires_grad_()
    return model.requires_grad_(False)


def first_part_learns(model: nn.Module, x: Tensor) -> nn.Module:
    model.requires_grad_(False)
    first_part(model).requires_grad_(True)
    return model


def biases_learn(model: nn.Module, x: Tensor) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def norms_learn(model: nn.Module, x: Tensor) -> nn.Module:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.requires_grad_(True)
    return model


def prompt_learns(model: nn.Module, x: Tensor) -> nn.Module:
    return Prompted(model.requires_grad_(False), tuple(x.shape[1:]))


def all_learn(model: nn.Module, x: Tensor) -> nn.Module:
    return model.requires_grad_(True)


REGIMES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "all-frozen": all_frozen,
    "first-part-learns": first_part_learns,
    "biases-learn": biases_learn,
    "norms-learn": norms_learn,
    "prompt-learns": prompt_learns,
}


class Minimum:
    """Counts while a stock model of the layers below runs: what each layer's gradient formula reads, and no more.

    layer            for the gradients asked for it reads
    conv, linear     its input, if the weight learns; parameters count for nothing
    batch norm       its input, if the weight learns or it normalises by batch; then two statistics per channel too
    ReLU and alike   one bit per element, if its input needs a gradient
    max pooling      one byte per output element, likewise
    sums, averages   nothing

    A tensor that several layers read counts once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[int, Tensor] = {}
        self.bytes_of_codes = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0]
        learns = any(p.requires_grad for n, p in module.named_parameters(recurse=False) if n == "weight")
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            self._read(x, learns)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            by_batch = module.training and output.requires_grad
            self._read(x, learns or by_batch)
            self.bytes_of_codes += 2 * module.num_features * x.element_size() * by_batch
        elif isinstance(module, PIECEWISE):
            self.bytes_of_codes += (output.numel() + 31) // 32 * 4 * output.requires_grad
        elif isinstance(module, nn.MaxPool2d):
            self.bytes_of_codes += output.numel() * output.requires_grad
        elif not isinstance(module, nn.AdaptiveAvgPool2d):
            raise TypeError(f"no formula for {type(module).__name__}")

    def _read(self, tensor: Tensor, wanted: bool) -> None:
        if wanted:
            self.tensors[tensor.untyped_storage()._cdata] = tensor

    def run(self, x: Tensor) -> int:
        """Bytes for one forward pass; `x` counts where a layer reads it."""
        leaves = [m for m in self.model.modules() if not any(True for _ in m.children())]
        handles = [m.register_forward_hook(self) for m in leaves]
        try:
            self.model(x * 1)
        finally:
            for handle in handles:
                handle.remove()
        return self.bytes_of_codes + sum(t.untyped_storage().nbytes() for t in self.tensors.values())
