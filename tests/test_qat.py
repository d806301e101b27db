"""qft_utils.qat against PyTorch's kernels and eager QAT, numpy in integers, and real architectures."""

import qft_utils  # noqa: F401  before torchvision

# isort: split
import copy
import os
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.ao.quantization as ao
import torchvision
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from qft_utils.observers import MovingAverage, Percentile
from qft_utils.qat import convert, float_layers, load, prepare, save

KINDS = [{}, {"granularity": "tensor"}, {"learned_step": True}, {"granularity": "tensor", "learned_step": True}]


class Net(nn.Module):
    """Two convolutions with batch norm, one of them depthwise, then a Linear; 10 classes."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, 2, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, groups=channels), nn.BatchNorm2d(channels)
        self.relu1, self.relu2, self.fc = nn.ReLU6(), nn.ReLU(), nn.Linear(channels, 10)

    def forward(self, x):
        x = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def seeded_net(**kwargs):
    torch.manual_seed(0)
    net = Net(**kwargs)
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.weight, -1, 1.5)  # batch norm weights may be negative
    return net


def images(count=16, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def train(model, x, steps=3, lr=0.02):
    """Losses of a few steps towards the classes 0, 1, 2, ..."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr, momentum=0.9), []
    for _ in range(steps):
        out = getattr(out := model(x), "logits", out).float()
        out = out.flatten(0, -2)
        loss = F.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model, x, **kwargs):
    """Prepared, trained a little, with running statistics of the last batch so that no signal fades."""
    model = prepare(model.train(), **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    assert np.isfinite(train(model, x)).all()
    return model.eval()


@torch.no_grad()
def logits(model, x):
    return getattr(out := model(x), "logits", out)


def layer_io(model, x):
    """{name: (input, output)} of every quantized layer, in one forward."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "folded_name"):
            hook = lambda m, i, o, n=name: seen.update({n: (i[0].clone(), o.clone())})  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    logits(model, x)
    for handle in handles:
        handle.remove()
    return seen


def assert_converted_agrees(model, x):
    """Each layer, on equal inputs: to float32's rounding of its sums. Nothing else differs."""
    packed = convert(model)
    for name, (given_, expected) in layer_io(model, x).items():
        assert expected.std() > 0, f"{name} is constant: the comparison would say nothing"
        out = packed.get_submodule(name)(given_)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())
    return packed


@pytest.mark.parametrize("bits", [4, 8])
def test_same_loss_curve_as_eager_prepare_qat(bits):
    """With equal grids. By default, eager QAT clips each channel's largest weight, which then gets no gradient
    (its symmetric scale is 2 max / (qmax - qmin), and qmin = -qmax - 1), and clips what outgrows an average.
    """
    half = 2 ** (bits - 1)
    act = ao.FakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, averaging_constant=1.0, quant_min=0, quant_max=2 * half - 1
    )
    weight = ao.FakeQuantize.with_args(
        observer=ao.MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0,
        quant_min=1 - half, quant_max=half - 1,
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
    )  # fmt: skip
    net = nn.Sequential(ao.QuantStub(), seeded_net()).train()
    net.qconfig, net[1].fc.qconfig = ao.QConfig(act, weight), ao.QConfig(nn.Identity, weight)
    net[1].relu1 = nn.ReLU()
    x = images(30) + 2 * torch.randn(10, 3, 1, 1).repeat(3, 1, 1, 1)  # classes differ in colour
    ours = prepare(net[1], bits, bits, observer=partial(MovingAverage, 1.0))
    fused = ao.fuse_modules_qat(net, [["1.conv1", "1.bn1", "1.relu1"], ["1.conv2", "1.bn2", "1.relu2"]])
    eager, curve = train(ao.prepare_qat(fused), x, 25, 0.05), train(ours, x, 25, 0.05)
    assert curve[-1] < 0.7 * curve[0]
    assert np.abs(np.subtract(curve, eager)).max() < {4: 0.06, 8: 0.006}[bits]


def integer_conv(layer, x):
    """numpy: integers in, an integer sum of products, one multiplication and the bias at the end."""
    fixed, weight = layer.input_quantizer, layer.packed
    zero = fixed.zero_point.item()
    q = np.clip(np.rint(x * np.float32(1 / fixed.scale)).astype(np.int64) + zero, int(fixed.qmin), int(fixed.qmax))
    w = weight.integers().numpy().astype(np.int64)
    w = w.reshape(*w.shape, *[1] * (4 - w.ndim))
    stride, pad, groups = getattr(layer, "stride", (1, 1))[0], getattr(layer, "padding", (0, 0))[0], 1
    groups = getattr(layer, "groups", 1)
    q = np.pad(q.reshape(*q.shape, *[1] * (4 - q.ndim)) - zero, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    windows = np.lib.stride_tricks.sliding_window_view(q, w.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    windows = windows.reshape(len(q), groups, -1, *windows.shape[2:])
    total = np.einsum("ngchwij,gocij->ngohw", windows, w.reshape(groups, -1, *w.shape[1:]))
    scale = weight.scale.double().numpy() * fixed.scale.item()
    out = total.reshape(len(q), -1, *total.shape[3:]) * np.broadcast_to(scale, len(w)).reshape(-1, 1, 1)
    return out + layer.bias.detach().double().numpy().reshape(-1, 1, 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_converted_equals_numpy_in_integers(kind, bits):
    packed = convert(trained(seeded_net(), images(), weight_bits=bits, act_bits=bits, **kind))
    for name, (x, expected) in layer_io(packed, images()).items():
        out = integer_conv(packed.get_submodule(name), x.numpy()).reshape(expected.shape)
        np.testing.assert_allclose(out, expected.numpy(), rtol=0, atol=1e-5 * max(1, expected.abs().max()))


@pytest.mark.parametrize("kind", [*KINDS, {"observer": partial(Percentile, 99.0)}, {"act_bits": None}], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_converted_agrees_with_prepared(kind, bits, tmp_path):
    model = trained(seeded_net(), images(), weight_bits=bits, **kind)
    packed = assert_converted_agrees(model, images())
    save(packed, tmp_path / "m")
    assert torch.equal(logits(load(tmp_path / "m", Net()), images()), logits(packed, images()))


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_on_disk(bits, tmp_path):
    model = prepare(nn.Linear(256, 512, bias=False), bits, act_bits=None)
    save(convert(model), tmp_path / "m")
    scales = 512 * 4
    assert 0 <= os.path.getsize(tmp_path / "m") - 256 * 512 * bits // 8 - scales < 600  # the header


MODELS = {
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "lite0": lambda: timm.create_model("efficientnet_lite0", num_classes=10),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=99, n_positions=16, bos_token_id=0, eos_token_id=0)),
    "bert": lambda: BertForSequenceClassification(BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)),
}  # fmt: skip
STAYS_FLOAT = {"gpt2": {"LayerNorm"}, "bert": {"LayerNorm"}}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("resnet50", "lite0") else []) for n in MODELS]
)
def test_architectures(name, tmp_path):
    torch.manual_seed(0)
    float_model, text = MODELS[name](), name in ("gpt2", "bert")
    x = torch.randint(0, 99, (4, 8)) if text else images(8, 32)
    before = copy.deepcopy(float_model.state_dict())
    model = trained(float_model, x, weight_bits=4)
    assert set(float_layers(model).values()) == STAYS_FLOAT.get(name, set())
    packed = assert_converted_agrees(model, x)
    save(packed, tmp_path / "m")
    assert torch.equal(logits(load(tmp_path / "m", MODELS[name](), weight_bits=4), x), logits(packed, x))
    assert all(torch.equal(before[key], value) for key, value in float_model.state_dict().items())
