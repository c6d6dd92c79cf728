"""What clients do with a model beyond calling it: look at classes, merge, attribute, attack, freeze and unfreeze."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from bench.packages import missing
from tests.clients.cases import Classifier, adapted, unet
from tests.clients.harness import STOCK, WAYS, Way
from tests.models.test_regimes import settle

pytestmark = pytest.mark.full
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def need(*clients: str) -> None:
    for client in clients:
        if why := missing(client):
            pytest.skip(why)


def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def labels() -> Tensor:
    return torch.arange(4)


# peft


@ways
def test_adapters_by_class_name(way: Way) -> None:
    """How LoRA trainers choose layers: by the name of their class, which only `enabled` leaves."""
    need("peft")
    names = ["conv1", "conv2", "conv3", "conv4"]
    model = way.prepare(Classifier())
    with way.within():
        found = [name for name, module in model.named_modules() if type(module).__name__ == "Conv2d"]
        inherited = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert inherited == names
    assert found == (names if way is WAYS["enabled"] else [])


@ways
def test_adapters_put_into_a_converted_model(way: Way) -> None:
    need("peft")
    import peft

    def step(way: Way) -> list[Tensor]:
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["conv2", "conv4"], r=4, init_lora_weights=False)
        model = peft.get_peft_model(way.prepare(settle(Classifier())), config).eval()
        with way.within():
            y = model(images())
        return [y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]

    for ours, stock in zip(step(way), step(STOCK), strict=True):
        torch.testing.assert_close(ours, stock)


@ways
def test_merging_adapters_is_seen_at_the_next_call(way: Way) -> None:
    """Merging writes through `.data`, which no version counter shows."""
    need("peft")

    def values(way: Way) -> list[Tensor]:
        torch.manual_seed(0)
        model = way.prepare(settle(adapted("conv2", "conv4", r=4)()))
        found = []
        with way.within(), torch.no_grad():
            for act in (lambda: None, model.merge_adapter, model.unmerge_adapter, model.disable_adapter_layers):
                act()
                found.append(model(images()))
            model.enable_adapter_layers()
            found.append(model.merge_and_unload()(images()))
        return found

    ours, stock = values(way), values(STOCK)
    assert not torch.allclose(stock[0], stock[3])
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


# captum


def attributions(kind: str, model: nn.Module) -> Tensor:
    import captum.attr

    method: dict[str, Any] = {
        "IntegratedGradients": lambda: captum.attr.IntegratedGradients(model).attribute(images(), target=1, n_steps=4),
        "Saliency": lambda: captum.attr.Saliency(model).attribute(images().requires_grad_(), target=1),
        "DeepLift": lambda: captum.attr.DeepLift(model).attribute(images(), target=1),
        "GuidedBackprop": lambda: captum.attr.GuidedBackprop(model).attribute(images().requires_grad_(), target=1),
        "LayerGradCam": lambda: captum.attr.LayerGradCam(model, model.conv4).attribute(images(), target=1),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks on the model, which captum warns that it sets
        return method[kind]().detach()


class Attributed(nn.Module):
    """DeepLift wants each activation to be a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv4, self.bn4, self.relu4 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        return self.head(self.relu4(self.bn4(self.conv4(x))).mean((2, 3)))


def frozen_net() -> nn.Module:
    torch.manual_seed(0)
    return settle(Attributed()).eval().requires_grad_(False)


KINDS = ("IntegratedGradients", "Saliency", "GuidedBackprop", "LayerGradCam")


# DeepLift finds its rules by exact class, so that converted layers have none: of the ways only `enabled` suits it.
@pytest.mark.parametrize(("way", "kind"), [*((way, kind) for way in WAYS for kind in KINDS), ("enabled", "DeepLift")])
def test_attributions(way: str, kind: str) -> None:
    need("captum")
    expected = attributions(kind, frozen_net())
    model = WAYS[way].prepare(frozen_net())
    with WAYS[way].within():
        found = attributions(kind, model)
    torch.testing.assert_close(found, expected)


# torchattacks


@ways
def test_an_attack(way: Way) -> None:
    """Of a net in train mode whose norms `freeze` holds: the attack goes to eval mode and back by itself."""
    need("torchattacks")
    import torchattacks

    def attack(way: Way) -> Tensor:
        model = way.prepare(settle(Classifier().train()))
        fk.freeze(model, norm="freeze")
        modes = [module.training for module in model.modules()]
        statistics = [buffer.clone() for buffer in model.buffers()]
        with way.within():
            found = torchattacks.PGDL2(model, eps=1.0, alpha=0.3, steps=3, random_start=False)(images(), labels())
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), statistics, strict=True))
        assert all(p.grad is None for p in model.parameters())
        return found

    torch.manual_seed(0)
    expected = attack(STOCK)
    torch.manual_seed(0)
    assert not torch.equal(expected, images())
    torch.testing.assert_close(attack(way), expected)


# Lightning


@ways
def test_backbone_finetuning(way: Way) -> None:
    """Lightning freezes before training and unfreezes at an epoch; its callback may leave both to freezekit."""
    need("lightning")
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.head = way_now.prepare(settle(Attributed())), nn.Linear(10, 10)
            self.modes: list[tuple[bool, bool]] = []

        def training_step(self, batch: list[Tensor]) -> Tensor:
            self.modes.append((self.backbone.bn1.training, self.backbone.conv1.weight.requires_grad))
            return F.cross_entropy(self.head(self.backbone(batch[0]).relu()), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    class ByFreezekit(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            fk.freeze(pl_module.backbone, norm="freeze")

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch == 1:
                fk.unfreeze(pl_module.backbone)
                optimizer.add_param_group({"params": list(pl_module.backbone.parameters())})

    def fit(way: Way, callback: BaseFinetuning) -> Task:
        nonlocal way_now
        way_now = way
        task = Task()
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(), labels()), batch_size=2)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet)
        with warnings.catch_warnings(), way.within():
            warnings.simplefilter("ignore")  # of few workers
            trainer.fit(task, data)
        return task

    way_now = STOCK
    for make in (lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False), ByFreezekit):
        ours, stock = fit(way, make()), fit(STOCK, make())
        assert ours.modes == stock.modes
        held = make is not ByFreezekit  # Lightning keeps norms learning and in train mode
        assert stock.modes == [(held, False)] * 2 + [(True, True)] * 2
        for (name, a), b in zip(stock.state_dict().items(), ours.state_dict().values(), strict=True):
            torch.testing.assert_close(b, a, msg=name)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_end", "on_validation_end"])
def test_a_norm_unfrozen_in_a_validation_trains_from_the_first_step_after_it(hook: str) -> None:
    """Lightning writes the eval mode back that it recorded of the norm while that was held."""
    need("lightning")
    import lightning.pytorch as pl

    class Unfreezing(pl.Callback):
        def unfreeze(self, trainer: Any, task: Any) -> None:
            if not trainer.sanity_checking:
                fk.unfreeze(task.backbone)

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.LazyLinear(10)
            self.modes: list[bool] = []

        def training_step(self, batch: list[Tensor]) -> Tensor:
            self.modes.append(self.backbone[1].training)
            return F.cross_entropy(self.head(self.backbone(batch[0]).flatten(1)), batch[1])

        def validation_step(self, batch: list[Tensor]) -> None:
            self.head(self.backbone(batch[0]).flatten(1))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    setattr(Unfreezing, hook, Unfreezing.unfreeze)
    task, data = Task(), torch.utils.data.TensorDataset(images(), labels())
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    task.head(task.backbone(images()).flatten(1))
    fk.freeze(task.backbone, norm="freeze")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[Unfreezing()], enable_model_summary=False, **quiet)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(task, loader, loader)
    assert task.modes[:3] == [False, False, False]
    assert all(task.modes[3:])
    assert len([w for w in told if w.category is fk.freezing.NormWarning]) == 1


# fastai


@ways
def test_a_learner_freezes_and_unfreezes(way: Way) -> None:
    need("fastai")
    from fastai.vision.all import SGD, DataLoader, DataLoaders, Learner, params, xresnet18

    def fit(way: Way) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = way.prepare(settle(xresnet18(n_out=10)))
        data = DataLoader(list(zip(images(), labels(), strict=True)), bs=4)
        halves = lambda model: [params(nn.ModuleList(list(model)[part])) for part in (slice(6), slice(6, None))]  # noqa: E731
        learner = Learner(DataLoaders(data, data), model, F.cross_entropy, opt_func=SGD, splitter=halves)
        with learner.no_bar(), learner.no_logging(), way.within():
            learner.freeze()
            learner.fit(1, lr=0.01)
            learner.unfreeze()
            learner.fit(1, lr=0.01)
        return model.state_dict()

    stock, ours = fit(STOCK), fit(way)
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


# torchvision, timm, diffusers


def test_features_are_extracted_alike() -> None:
    need("torchvision")
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model = settle(resnet18(weights=None)).eval().requires_grad_(False)
    nodes = ["layer1.0.relu", "layer2.0.downsample.1", "layer3", "flatten"]
    stock = create_feature_extractor(model, nodes)(images())
    with fk.enabled():
        ours = create_feature_extractor(model, nodes)(images())
    assert list(ours) == list(stock) == nodes
    for name in nodes:
        assert torch.equal(ours[name], stock[name]), name


@ways
def test_checkpointing_of_timm_and_diffusers(way: Way) -> None:
    need("timm", "diffusers")
    from timm import create_model

    def gradient(model: nn.Module, x: Tensor, *args: Any) -> Tensor:
        x = x.clone().requires_grad_()
        with way_now.within():  # a checkpoint's forward runs in the backward pass too
            y = model(x, *args)
            y = y if isinstance(y, Tensor) else y.sample
            return torch.autograd.grad(y.square().sum(), x)[0]

    torch.manual_seed(0)
    classifier, denoiser = settle(create_model("resnet18", num_classes=10)), unet()
    classifier.requires_grad_(False).eval().set_grad_checkpointing()
    denoiser.train().enable_gradient_checkpointing()
    for stock, args in ((classifier, (images(),)), (denoiser, (torch.randn(2, 4, 16, 16), 10, torch.randn(2, 5, 16)))):
        model, way_now = way.prepare(copy.deepcopy(stock)), way
        ours = gradient(model, *args)
        way_now = STOCK
        torch.testing.assert_close(ours, gradient(stock, *args))


# ultralytics


@ways
def test_yolo_s_own_fusion(way: Way) -> None:
    """It folds batch norms into new convolutions, for inference."""
    need("ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    stock = settle(DetectionModel("yolov8n.yaml", nc=5, verbose=False)).eval()
    ours = way.prepare(copy.deepcopy(stock))
    with torch.no_grad(), way.within():
        found, expected = (model.fuse(verbose=False)(torch.rand(1, 3, 64, 64).fill_(0.3))[0] for model in (ours, stock))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
