"""What a run was asked for: the command line, checked."""

from dataclasses import dataclass

import torch

from freezekit._tf32 import allows_tf32

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The exit code where `--until` left cases out and no other failed, as for tools/gpu_check.
NOT_RUN = 77


@dataclass(frozen=True)
class Settings:
    """How to measure; the command line says more of what has a name there.

    Attributes:
        batch: images; None lets a section choose for the device.
        rounds: the most interleaved rounds per case; fewer where `budget` ends first, but at least `least_rounds`.
        budget: seconds of timing per case.
        seed: of inputs, weights and the order within rounds.
        cold: on a GPU, clear the L2 cache before each timing.
        thorough: every regime of `models`, not just the three that matter most.
        sides: stock first.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int | None = None
    rounds: int = 15
    least_rounds: int = 5
    budget: float = 1.0
    seed: int = 0
    cold: bool = True
    quick: bool = False
    thorough: bool = False
    everything: bool = False
    sides: tuple[str, ...] = ("stock", "freezekit")
    parts: tuple[str, ...] = ("step",)
    layer_lists: tuple[str, ...] = ("resnet50",)

    @property
    def tf32(self) -> bool:
        """Whether fp32 convolutions may round their factors to tf32."""
        return self.device.type == "cuda" and self.dtype is torch.float32 and allows_tf32()
