"""Random lives of a model: freeze, train, save, copy, convert, beside a stock twin that lives the same life."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

import freezekit as fk

LAYERS = ["0", "1", "3", "4", "6"]


def _stock(rng: random.Random) -> nn.Sequential:
    c = rng.choice([2, 4])
    mode = rng.choice(["zeros", "reflect", "circular"])
    return nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1, padding_mode=mode),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        nn.Conv2d(c, c, rng.choice([1, 3]), stride=rng.choice([1, 2]), groups=rng.choice([1, c]), bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        nn.Conv2d(c, 2, 2, padding="same", dilation=rng.choice([1, 2])),
    ).double()


class Pair:
    """freezekit's model and its twin, in float64, and what is frozen in both."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        torch.manual_seed(rng.randrange(2**31))
        self.stock = _stock(rng)
        self.ours = fk.convert(copy.deepcopy(self.stock))
        self.frozen: set[str] = set()
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
            self.stock[int(name)].eval()

    # The steps. Each does the same to both.

    def freeze(self) -> None:
        name = self.rng.choice(LAYERS)
        fk.freeze(self.ours, name, optimizer=self.optims[0])
        self.frozen.add(name)
        for p in self.stock[int(name)].parameters():
            p.requires_grad_(False)
            p.grad = None
        self.hold()

    def unfreeze(self) -> None:
        if not self.frozen:
            return
        name = self.rng.choice(sorted(self.frozen))
        fk.unfreeze(self.ours, name, optimizer=self.optims[0])
        self.frozen.discard(name)
        self.stock[int(name)].requires_grad_(True)
        self.stock[int(name)].train(self.stock.training)

    def step(self) -> None:
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        if self.rng.random() < 0.3:
            x = x.to(memory_format=torch.channels_last)
        needs = self.rng.random() < 0.5
        found = []
        for net, optim in zip(self.nets, self.optims):
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
        with self.rng.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])():
            self.same({"y": self.ours(x)}, {"y": self.stock(x)})

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


STEPS = [Pair.freeze] * 3 + [Pair.unfreeze] * 2 + [Pair.step] * 6 + [Pair.look] * 2
STEPS += [Pair.mode, Pair.save_and_load, Pair.copy, Pair.convert, Pair.layout, Pair.edit]


def check(rng: random.Random) -> None:
    """One life of 12 steps; raises AssertionError, naming the steps so far, where the twins part."""
    pair, done = Pair(rng), []
    for _ in range(12):
        step = rng.choice(STEPS)
        done.append(step.__name__)
        try:
            step(pair)
            pair.compare_state()
        except Exception as error:
            raise AssertionError(f"after {', '.join(done)}: {error!r}") from error
