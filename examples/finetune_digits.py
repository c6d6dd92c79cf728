"""Fine-tune a small CNN on handwritten digits: learn 0 to 4, freeze, learn 5 to 9.

The data is scikit-learn's own (1797 images of 8x8, no download): ``pip install freezekit[examples]``. Three ways to
learn the second half are compared, with what each costs, on stock layers and on freezekit's:

* all trainable
* features frozen: only the head learns. Nothing before the frozen layers learns, so backward never reaches them.
* middle frozen: the first block and the head learn, and backward passes through the frozen layers between.

Run ``python examples/finetune_digits.py``; it takes under a minute on a CPU.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import freezekit as fk
from freezekit.auditing import audit
from freezekit.freezing import freeze

BATCH = 64
FREEZE: dict[str, tuple[str, ...]] = {
    "all trainable": (),
    "features frozen": ("stem", "body"),
    "middle frozen": ("body",),
}


class Net(nn.Module):
    """stem: one block; body: four blocks; head: ten classes. A block is convolution, batch norm, ReLU."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = self.block(1, width)
        self.body = nn.Sequential(*[self.block(width, width) for _ in range(4)])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))

    @staticmethod
    def block(c: int, k: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(c, k, 3, padding=1), nn.BatchNorm2d(k), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) in [0, 1] and their classes (N,), for training and for testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, low: int, high: int) -> Digits:
        """The digits from ``low`` to ``high``, every fifth for testing."""
        from sklearn.datasets import load_digits

        data = load_digits()
        x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
        y = torch.tensor(data.target)
        wanted = (y >= low) & (y <= high)
        x, y = x[wanted], y[wanted]
        test = torch.arange(len(y)) % 5 == 0
        return cls(x[~test], y[~test], x[test], y[test])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.y), (BATCH,), generator=torch.Generator().manual_seed(step))
        return self.x[chosen], self.y[chosen]


def accuracy(model: nn.Module, digits: Digits) -> float:
    was = model.training
    model.eval()
    with torch.no_grad():
        right = (model(digits.test_x).argmax(1) == digits.test_y).float().mean()
    model.train(was)
    return float(right)


@dataclass
class Run:
    """One way to fine-tune, step by step, so that the ways can take turns and share the machine's moods."""

    name: str
    library: str
    model: Net
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        self.seconds: list[float] = []

    @classmethod
    def start(cls, name: str, library: str, pretrained: Net) -> Run:
        model = copy.deepcopy(pretrained)
        if library == "freezekit":
            fk.convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        if FREEZE[name]:
            freeze(model, *FREEZE[name], optimizer=optimizer)
        model.train()
        audit(model, optimizer).raise_for_errors()
        return cls(name, library, model, optimizer)

    def step(self, digits: Digits, step: int) -> None:
        x, y = digits.batch(step)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)


def pretrain(digits: Digits, steps: int) -> Net:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        x, y = digits.batch(step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def fine_tune(pretrained: Net, digits: Digits, steps: int) -> list[Run]:
    """Every way on both libraries, their steps interleaved."""
    runs = [Run.start(name, library, pretrained) for name in FREEZE for library in ("torch", "freezekit")]
    for step in range(steps):
        for run in runs:
            run.step(digits, step)
    return runs


def show(runs: list[Run], pretrained: Net, digits: Digits, console: Console) -> None:
    table = Table(title="Fine-tuning on 5 to 9 after learning 0 to 4", title_justify="left")
    for column in ("way", "layers of", "accuracy on 5-9", "step, ms (median)", "KiB kept for backward", "parameters"):
        table.add_column(column, justify="right" if column not in ("way", "layers of") else "left")
    for run in runs:
        trains = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        kept = fk.explain(run.model, digits.batch(0)[0]).bytes_kept / 1024
        table.add_row(run.name, run.library, f"{accuracy(run.model, digits):.1%}", f"{1000 * median(run.seconds):.1f}",
                      f"{kept:.0f}", f"{trains}", end_section=run.library == "freezekit")  # fmt: skip
    console.print(table)
    before = pretrained.state_dict()
    held = [(n, v) for run in runs if FREEZE[run.name] for n, v in run.model.state_dict().items()
            if n.startswith(FREEZE[run.name])]  # fmt: skip
    moved = [n for n, v in held if not torch.equal(v, before[n])]
    console.print(f"frozen tensors that moved, running statistics included: {len(moved)} of {len(held)}")


def main(pretrain_steps: int = 150, steps: int = 100) -> None:
    torch.set_num_threads(1)
    console = Console(width=120)
    first, second = Digits.of(0, 4), Digits.of(5, 9)
    pretrained = pretrain(first, pretrain_steps)
    console.print(f"accuracy on 0-4 after {pretrain_steps} steps: {accuracy(pretrained, first):.1%}")
    show(fine_tune(pretrained, second, steps), pretrained, second, console)


if __name__ == "__main__":
    main()
