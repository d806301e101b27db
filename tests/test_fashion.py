"""The functions that chapter 2 builds are the ones that the package keeps: same batches, losses and weights."""

import ast
import importlib.util
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock

import pandas as pd
import pytest
import torch
import torchvision  # conftest has imported qft_utils before it: see qft_utils.compat
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from qft_utils import asset_table, assets, data, fashion, models
from tools.layout import ROOT

SOURCE = (ROOT / "notebooks" / "02_transfer_learning.py").read_text()
KEPT = ("to_input", "Pictures", "loader", "new_head", "body_of", "features", "fine_tune")
SETTINGS = fashion.Settings(images=50, epochs=2, batch_size=8, pixels=16, learning_rate=0.02)
FLIP_AND_SHIFT = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(28, padding=2)])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def chapter(defined_in) -> dict:
    return defined_in("02_transfer_learning", KEPT, ["(MEAN, STD)"])


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """60 pictures, each class with a square of its own in the noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (60,), generator=generator)
    images = torch.randint(0, 90, (60, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[14 * (label % 2) :, 5 * (label // 2) : 5 * (label // 2) + 5] += 150
    return images, labels


class Tiny(nn.Module):
    """A CNN with what chapter 2 asks of EfficientNet: blocks, a classifier, the width of its features."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        block = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3), nn.ReLU6())
        self.blocks = nn.Sequential(nn.Identity(), block)
        self.classifier = nn.Linear(12, 7)

    def forward(self, x):
        return self.classifier(self.blocks(self.conv_stem(x)).mean((2, 3)))


def tiny(seed: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny()


def batches_of(module, pictures, seed=3, augment=None):
    return module["loader"](module["Pictures"](*pictures, 16, augment), 8, seed)


def assert_same_tensors(ours, others):
    assert all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


def assert_same_batches(ours, others):
    for one, other in zip(ours, others, strict=True):
        assert_same_tensors(one, other)


def assert_same_state(model, other):
    assert list(model.state_dict()) == list(other.state_dict())
    assert_same_tensors(model.state_dict().values(), other.state_dict().values())


# Pictures


@pytest.mark.parametrize("pixels", [1, 17, 28, 64])
@pytest.mark.parametrize("count", [0, 1, 60])
def test_to_input_is_torchvisions_resize_and_normalize(chapter, pictures, pixels, count):
    images = pictures[0][:count]
    resized = v2.functional.resize_image(images[:, None] / 255, [pixels, pixels], antialias=False)
    expected = v2.functional.normalize(resized.expand(-1, 3, -1, -1), list(fashion.MEAN), list(fashion.STD))
    mine, theirs = (make(images, pixels) for make in (fashion.to_input, chapter["to_input"]))
    assert mine.shape == (count, 3, pixels, pixels)
    assert mine.is_contiguous(memory_format=torch.channels_last)
    assert mine.stride() == theirs.stride()
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(mine, expected)


def test_to_input_has_the_numbers_of_imagenet():
    """Torchvision's own weights come with the mean and the standard deviation that they were trained with."""
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    assert (tuple(transform.mean), tuple(transform.std)) == (fashion.MEAN, fashion.STD)


@pytest.mark.parametrize("grey", [0, 255])
def test_to_input_of_one_grey(grey):
    x = fashion.to_input(torch.full((2, 28, 28), grey, dtype=torch.uint8), 20)
    channels = (grey / 255 - torch.tensor(fashion.MEAN)) / torch.tensor(fashion.STD)
    torch.testing.assert_close(x, channels.reshape(1, 3, 1, 1).expand(2, 3, 20, 20))


@pytest.mark.parametrize("seed", [None, 3])
def test_same_batches_in_the_same_order(chapter, pictures, seed):
    mine, theirs = (batches_of(module, pictures, seed) for module in (vars(fashion), chapter))
    assert len(mine) == len(theirs) == 8
    for _ in range(2):  # each epoch has an order of its own
        assert_same_batches(mine, theirs)


def test_same_batches_with_augmentation(chapter, pictures):
    made = []
    for module in (vars(fashion), chapter):
        torch.manual_seed(1)
        made.append(list(batches_of(module, pictures, augment=FLIP_AND_SHIFT)))
    assert_same_batches(*made)
    plain = list(batches_of(vars(fashion), pictures))
    assert_same_tensors([labels for _, labels in made[0]], [labels for _, labels in plain])
    assert not any(torch.equal(changed, image) for (changed, _), (image, _) in zip(made[0], plain, strict=True))


def test_an_augmentation_is_drawn_for_each_picture(pictures):
    """A picture is flipped or not whatever the others of its batch are: both kinds are in one batch."""
    flip = v2.RandomHorizontalFlip()
    torch.manual_seed(0)
    changed, labels = fashion.Pictures(*pictures, 28, flip)[list(range(60))]
    plain = fashion.to_input(pictures[0], 28)
    flipped = [torch.equal(one, other.flip(-1)) for one, other in zip(changed, plain, strict=True)]
    kept = [torch.equal(one, other) for one, other in zip(changed, plain, strict=True)]
    assert [a != b for a, b in zip(flipped, kept, strict=True)] == [True] * 60
    assert 15 < sum(flipped) < 45
    assert torch.equal(labels, pictures[1])


def test_every_picture_comes_once_an_epoch():
    numbers = torch.arange(50)
    pictures = numbers.to(torch.uint8).reshape(-1, 1, 1).expand(-1, 28, 28), numbers
    batches = fashion.loader(fashion.Pictures(*pictures, 4), 16, seed=0)
    epochs = [[labels for _, labels in batches] for _ in range(2)]
    assert [len(labels) for labels in epochs[0]] == [16, 16, 16, 2]
    orders = [torch.cat(epoch).tolist() for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == numbers.tolist()
    assert orders[0] != orders[1]
    other = fashion.loader(fashion.Pictures(*pictures, 4), 16, seed=1)
    assert torch.cat([labels for _, labels in other]).tolist() not in orders
    in_order = fashion.loader(fashion.Pictures(*pictures, 4), 16)
    assert torch.cat([labels for _, labels in in_order]).tolist() == numbers.tolist()
    inputs, labels = next(iter(batches))
    assert torch.equal(inputs, fashion.to_input(pictures[0][labels], 4))  # a picture keeps its label


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_batches_take_the_first_pictures_of_their_part(pictures, split, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "fashion_mnist", lambda part: asked.append(part) or pictures)
    for count in (None, 20):
        (inputs, labels), *others = fashion.evaluation_batches(split, SETTINGS, count)
        assert not others
        assert torch.equal(labels, pictures[1][:count])
        assert torch.equal(inputs, fashion.to_input(pictures[0][:count], 16))
    train = fashion.train_batches(SETTINGS)
    assert len(train.dataset) == 50
    assert_same_batches(train, batches_of(vars(fashion), [of[:50] for of in pictures], SETTINGS.seed))
    assert asked == [split, split, "train"]


# Head and body


class Named(nn.Module):
    """Linear layers under the names of `heads`, in that order."""

    def __init__(self, *heads: str):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(27, 6))
        for name in heads:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


STAND_INS = {
    "fc": lambda: Named("fc"),
    "classifier": lambda: Named("z_first", "classifier"),  # the last in the model, not in the alphabet
    "1.2": lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(27, 5), nn.ReLU(), nn.Linear(5, 9), nn.ReLU())),
    "head.body.1": lambda: nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "head": Named()}),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_only_the_last_linear_layer_is_replaced(chapter, name):
    heads, before = [], STAND_INS[name]()
    for module in (vars(fashion), chapter):
        model = STAND_INS[name]()
        model.load_state_dict(before.state_dict())
        torch.manual_seed(2)
        assert module["new_head"](model) is model
        heads.append(model.get_submodule(name))
        for key, value in before.state_dict().items():
            assert key.startswith(f"{name}.") != torch.equal(model.state_dict()[key], value)
    old = before.get_submodule(name)
    torch.manual_seed(2)
    expected = nn.Linear(old.in_features, 10)
    for head in heads:
        assert (head.in_features, head.out_features, head.bias is not None) == (old.in_features, 10, True)
        assert_same_tensors(head.parameters(), expected.parameters())


@pytest.mark.parametrize(("name", "head"), [("mobilenet_v2", "classifier.1"), ("resnet18", "fc")])
def test_a_new_head_for_torchvisions_models(name, head):
    model = torchvision.models.get_model(name, weights=None)
    weights = [p for n, p in model.named_parameters() if not n.startswith(head)]
    fashion.new_head(model, 4).eval()
    assert [p for n, p in model.named_parameters() if not n.startswith(head)] == weights
    kernels = [p for p in weights if p.ndim == 4]
    assert len(kernels) >= 20
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    x, caught = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last), []
    model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        assert model(x).shape == (2, 4)
        assert torch.equal(fashion.body_of(model)(x), caught[0])


def test_the_body_is_a_copy_without_the_head(chapter):
    model = tiny().train()
    for module in (vars(fashion), chapter):
        body = module["body_of"](model)
        assert not body.training
        assert isinstance(model.classifier, nn.Linear)
        assert model.training
        x = torch.randn(3, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(model.classifier(body(x)), model.eval()(x))
        model.train()
        with torch.no_grad():
            body.conv_stem.weight.zero_()
        assert model.conv_stem.weight.abs().min() > 0


def test_same_features_in_the_order_of_the_batches(chapter, pictures):
    body = fashion.body_of(tiny())
    mine, theirs = (m["features"](body, batches_of(m, pictures)) for m in (vars(fashion), chapter))
    assert_same_tensors(mine.tensors, theirs.tensors)
    batches = list(batches_of(vars(fashion), pictures))
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    torch.testing.assert_close(mine.tensors[0], body(inputs))
    assert torch.equal(mine.tensors[1], labels)
    assert mine.tensors[0].shape == (60, 12)
    assert not mine.tensors[0].requires_grad


# Fine-tuning


def tuned(module, pictures, settings=SETTINGS, augment=None, model=None, **options):
    torch.manual_seed(7)  # of the augmentation
    model = module["new_head"](model or tiny())
    validation = batches_of(module, [of[:20] for of in pictures], seed=None)
    batches = module["loader"](module["Pictures"](*pictures, 16, augment), settings.batch_size, settings.seed)
    return model, module["fine_tune"](model, batches, validation, settings, **options)


def losses(history) -> dict:
    return {name: column for name, column in asdict(history).items() if name != "seconds"}


@pytest.mark.parametrize("augment", [None, FLIP_AND_SHIFT])
@pytest.mark.parametrize("options", [{}, {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}])
def test_same_losses_and_weights_to_the_bit(chapter, pictures, augment, options):
    made = [tuned(module, pictures, SETTINGS, augment, **options) for module in (vars(fashion), chapter)]
    (model, mine), (other, theirs) = made
    assert losses(mine) == losses(theirs)
    assert len(mine.train_loss) == SETTINGS.epochs
    assert mine.train_loss[-1] < mine.train_loss[0]
    assert not model.training
    assert_same_state(model, other)


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 0.01}, {"weight_decay": 0.5}, {"epochs": 1}, {"seed": 1}, {"batch_size": 7}],
    ids=lambda change: next(iter(change)),
)
def test_the_weights_depend_on_every_setting(pictures, change):
    """So equal weights are no accident: another setting shows in them."""
    made = [tuned(vars(fashion), pictures, replace(SETTINGS, **c))[0] for c in ({}, change)]
    assert not torch.equal(*(model.classifier.weight for model in made))


@pytest.mark.parametrize("options", [{"augment": FLIP_AND_SHIFT}, {"loss": F.multi_margin_loss}], ids=" ".join)
def test_the_weights_depend_on_every_choice(pictures, options):
    plain, changed = (tuned(vars(fashion), pictures, **o)[0].classifier.weight for o in ({}, options))
    assert not torch.equal(plain, changed)


def test_what_is_frozen_stays(pictures):
    start = tiny()
    start.conv_stem.requires_grad_(False)
    start.blocks.requires_grad_(False)
    model, _ = tuned(vars(fashion), pictures, model=start)
    before, after = tiny().state_dict(), model.state_dict()
    body = [name for name in before if not name.startswith("classifier")]
    assert all(torch.equal(before[name], after[name]) for name in body)
    torch.manual_seed(7)
    assert not torch.equal(nn.Linear(12, 10).weight, model.classifier.weight)


# The chapter and its recipe


def test_the_chapter_takes_its_settings_from_the_package():
    made = {
        ast.unparse(node.value)
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "settings"
    }
    assert made == {"fashion.Settings()"}


def cell(having: str) -> str:
    """The one code cell of the chapter that holds these words."""
    (found,) = [cell for cell in SOURCE.split("\n# %%") if having in cell and not cell.startswith(" [markdown]")]
    return found.partition("\n")[2]


CELLS = ("def part(", "creature = models.load_cnn(", "creature = new_head(", "def train_head(", 'right["frozen"] =')
CELLS += ('assets.keep("fashion"',)


def test_train_is_the_whole_of_the_chapters_fine_tuning(chapter, pictures, monkeypatch):
    """The chapter's cells up to the fine-tuned network, run on a tiny one, against `fashion.train()`."""
    kept = []
    monkeypatch.setattr(models, "load_cnn", lambda *_: tiny())
    monkeypatch.setattr(data, "fashion_mnist", lambda split: pictures)
    monkeypatch.setattr(fashion, "Settings", lambda: SETTINGS)
    monkeypatch.setattr(assets, "keep", lambda name, model, seconds: kept.append((name, model)))
    best = pd.DataFrame({"learning_rate": [0.01], "weight_decay": [0.1]}, index=["frozen"])
    namespace = chapter | {"settings": SETTINGS, "device": torch.device("cpu"), "best": best, "results": MagicMock()}
    for having in CELLS:
        exec(cell(having), namespace)
    (name, theirs), mine = kept[0], fashion.train()
    assert name in assets.RECIPES
    assert_same_state(mine, theirs)


def test_the_recipe_names_what_decides_the_result():
    recipe = assets.RECIPES["fashion"]
    assert recipe.module == fashion.__name__
    assert callable(fashion.build)
    assert callable(fashion.train)
    assert set(recipe.data) <= set(asset_table.ASSETS)
    assert all(importlib.util.find_spec(module).origin for module in recipe.code)
    statements = ast.parse(Path(fashion.__file__).read_text()).body
    imports = [s for s in statements if isinstance(s, ast.ImportFrom) and s.module == "qft_utils"]
    used = {f"qft_utils.{alias.name}" for statement in imports for alias in statement.names}
    assert set(recipe.code) == used | {fashion.__name__}


def test_build_is_what_training_starts_from():
    one, other = fashion.build(), fashion.build()
    torch.manual_seed(fashion.Settings().seed)
    body, whole = one.state_dict(), models.load_cnn().state_dict()
    assert_same_tensors(one.classifier.parameters(), nn.Linear(1280, len(data.FASHION_CLASSES)).parameters())
    assert_same_state(one, other)
    assert all(torch.equal(body[name], whole[name]) for name in whole if not name.startswith("classifier"))
