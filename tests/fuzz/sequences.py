"""Random lives of a model: freeze, train, save, copy, convert, fuse and back, beside a stock twin."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

import freezekit as fk
from freezekit.fusion import fusion_report

LAYERS = ["0", "1", "3", "4", "7.conv", "7.bn", "8"]
BLOCKS = [("0", "1"), ("3", "4"), ("7.conv", "7.bn")]  # what fuse makes one operator of, once frozen
LENGTH = 16


class Residual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def _stock(rng: random.Random) -> nn.Sequential:
    c = rng.choice([2, 4])
    mode = rng.choice(["zeros", "reflect", "circular"])
    return nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1, padding_mode=mode),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        nn.Conv2d(c, c, rng.choice([1, 3]), stride=rng.choice([1, 2]), groups=rng.choice([1, c]), bias=False),
        nn.BatchNorm2d(c),
        rng.choice([nn.ReLU(inplace=True), nn.LeakyReLU(0.1)]),
        rng.choice([nn.MaxPool2d(2, stride=1), nn.Dropout(0.2)]),
        Residual(c),
        nn.Conv2d(c, 2, 2, padding="same", dilation=rng.choice([1, 2])),
    ).double()


class Pair:
    """freezekit's model and its twin, in float64, and what is frozen in both."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        torch.manual_seed(rng.randrange(2**31))
        self.stock = _stock(rng)
        self.ours = fk.convert(copy.deepcopy(self.stock))
        if rng.random() < 0.5:
            fk.fuse(self.ours)
        self.frozen: set[str] = set()
        self.fused = 0  # training steps of which a part ran as one operator
        self.optimizers()

    @property
    def nets(self) -> tuple[nn.Sequential, nn.Sequential]:
        return self.ours, self.stock

    def optimizers(self) -> None:
        kind = self.rng.choice([torch.optim.SGD, torch.optim.AdamW])
        settings = dict(lr=0.01, momentum=0.9) if kind is torch.optim.SGD else dict(lr=0.01)
        self.optims = [kind(net.parameters(), **settings) for net in self.nets]

    def hold(self) -> None:
        """What freezekit promises of frozen batch norm, done by hand for the twin."""
        for name in self.frozen:
            self.stock.get_submodule(name).eval()

    # The steps. Each does the same to both.

    def freeze(self) -> None:
        self._freeze(self.rng.choice(LAYERS))

    def freeze_block(self) -> None:
        self._freeze(*self.rng.choice(BLOCKS))

    def _freeze(self, *names: str) -> None:
        fk.freeze(self.ours, *names, optimizer=self.optims[0])
        self.frozen.update(names)
        for name in names:
            for p in self.stock.get_submodule(name).parameters():
                p.requires_grad_(False)
                p.grad = None
        self.hold()

    def unfreeze(self) -> None:
        if not self.frozen:
            return
        name = self.rng.choice(sorted(self.frozen))
        fk.unfreeze(self.ours, name, optimizer=self.optims[0])
        self.frozen.discard(name)
        self.stock.get_submodule(name).requires_grad_(True).train(self.stock.training)

    def step(self) -> None:
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        if self.rng.random() < 0.3:
            x = x.to(memory_format=torch.channels_last)
        needs = self.rng.random() < 0.5
        self.fused += any(row.fused for row in fusion_report(self.ours))
        found, seed = [], self.rng.randrange(2**31)
        for net, optim in zip(self.nets, self.optims):
            torch.manual_seed(seed)  # dropout drops the same in both
            leaf = x.clone().requires_grad_(needs)
            y = net(leaf)
            optim.zero_grad()
            if y.requires_grad:
                y.square().mean().backward()
                optim.step()
            found.append({"y": y, "x": leaf.grad, **{n: p.grad for n, p in net.named_parameters()}})
        self.same(*found)

    def look(self) -> None:
        x = torch.randn(1, 3, 9, 7, dtype=torch.float64)
        found, seed = [], self.rng.randrange(2**31)
        with self.rng.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])():
            for net in self.nets:
                torch.manual_seed(seed)
                found.append({"y": net(x)})
        self.same(*found)

    def mode(self) -> None:
        training = self.rng.random() < 0.6
        for net in self.nets:
            net.train(training)
        self.hold()

    def save_and_load(self) -> None:
        """The state dictionaries change places."""
        states = []
        for net in self.nets:
            buffer = io.BytesIO()
            torch.save(net.state_dict(), buffer)
            buffer.seek(0)
            states.append(torch.load(buffer, weights_only=True))
        self.ours.load_state_dict(states[1])
        self.stock.load_state_dict(states[0])

    def copy(self) -> None:
        how: Callable[[nn.Module], nn.Module]
        how = self.rng.choice([copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
        self.ours, self.stock = how(self.ours), how(self.stock)
        self.optimizers()

    def convert(self) -> None:
        fk.convert(self.ours)

    def revert(self) -> None:
        fk.revert(self.ours)

    def fuse(self) -> None:
        fk.fuse(self.ours)

    def unfuse(self) -> None:
        fk.unfuse(self.ours)

    def layout(self) -> None:
        order = self.rng.choice([torch.channels_last, torch.contiguous_format])
        for net in self.nets:
            net.to(memory_format=order)

    def edit(self) -> None:
        value = self.rng.random()
        for net in self.nets:
            with torch.no_grad():
                net[0].weight.mul_(1 + value / 10)

    def same(self, ours: dict[str, Tensor | None], stock: dict[str, Tensor | None]) -> None:
        assert ours.keys() == stock.keys()
        for name, right in stock.items():
            mine = ours[name]
            assert (mine is None) == (right is None), f"{name} is {mine}, in the twin {right}"
            if mine is not None and right is not None:
                torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")

    def compare_state(self) -> None:
        self.same(dict(self.ours.state_dict()), dict(self.stock.state_dict()))
        flags = [[p.requires_grad for p in net.parameters()] for net in self.nets]
        assert flags[0] == flags[1], f"requires_grad {flags[0]}, in the twin {flags[1]}"


STEPS = [Pair.freeze] * 2 + [Pair.freeze_block] * 4 + [Pair.unfreeze] * 3 + [Pair.step] * 7 + [Pair.look] * 2
STEPS += [Pair.mode, Pair.save_and_load, Pair.copy, Pair.layout, Pair.edit]
STEPS += [Pair.convert, Pair.convert, Pair.revert, Pair.fuse, Pair.fuse, Pair.unfuse]


def check(rng: random.Random) -> Pair:
    """One life; raises AssertionError, naming the steps so far, where the twins part."""
    pair, done = Pair(rng), []
    for _ in range(LENGTH):
        step = rng.choice(STEPS)
        done.append(step.__name__)
        try:
            step(pair)
            pair.compare_state()
        except Exception as error:
            raise AssertionError(f"after {', '.join(done)}: {error!r}") from error
    return pair
