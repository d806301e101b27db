"""The verbs of qft_utils.qat on small nets: widths, freezing, calibration, autocast, compilation, refusals."""

import copy

import numpy as np
import pytest
import torch
from test_qat import KINDS, MODELS, Net, assert_converted_agrees, images, layer_io, logits, seeded_net, train, trained
from torch import nn

from qft_utils.qat import calibrate, convert, float_layers, freeze, load, prepare, save, set_bits


def test_scheduled_widths_and_only():
    model = prepare(seeded_net())
    train(model, images())
    set_bits(model, 4, 6)
    set_bits(model, 8, only=["fc"])
    layers = {name: m for name, m in convert(model).named_modules() if hasattr(m, "packed")}
    assert [(m.packed.bits, m.input_quantizer.bits) for m in layers.values()] == [(4, 6), (4, 6), (8, 6)]
    assert np.isfinite(train(model, images())).all()


def test_a_learned_step_keeps_its_range_when_the_width_changes():
    model = prepare(seeded_net(), 4, 4, learned_step=True)
    train(model, images())
    before = model.conv1.weight_quantizer.step.detach().clone()
    set_bits(model, weight_bits=3)
    torch.testing.assert_close(model.conv1.weight_quantizer.step * 3, before * 7)


def test_freeze_holds_through_train():
    model = prepare(seeded_net())
    train(model, images())
    freeze(model)
    state = copy.deepcopy(model.state_dict())
    logits(model.eval().train(), images() * 5)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
    assert changed == []
    torch.testing.assert_close(logits(model.train(), images()), logits(model.eval(), images()))


def test_calibrate_observes_and_changes_nothing_else():
    net = seeded_net()
    model = prepare(net)
    with pytest.raises(RuntimeError, match="no input was observed"):
        convert(model)
    state = {key: value.clone() for key, value in model.state_dict().items() if "observer" not in key}
    calibrate(model, [images()])
    assert model.training and all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    out, expected = logits(convert(model), images()), logits(net.eval(), images())
    assert (out - expected).std() < 0.05 * expected.std()


def test_state_of_a_prepared_model_is_restored():
    for kind in KINDS:
        model = trained(seeded_net(), images(), **kind)
        other = prepare(Net(), **kind)
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other.eval(), images()), logits(model, images()))


def test_tied_weights_stay_tied(tmp_path):
    model = prepare(MODELS["gpt2"](), 4, learned_step=True)
    train(model, torch.randint(0, 99, (4, 8)))
    assert model.lm_head.weight is model.transformer.wte.weight
    packed = convert(model)
    assert packed.lm_head.packed is packed.transformer.wte.packed
    save(packed, tmp_path / "m")
    assert load(tmp_path / "m", MODELS["gpt2"]()).lm_head.packed.bits == 4


def test_zero_and_negative_batch_norm_weights():
    for granularity in ("channel", "tensor"):
        net = seeded_net()
        net.bn1.weight.data[:2] = torch.tensor([0.0, -1.0])
        assert_converted_agrees(trained(net, images(), granularity=granularity), images())


def test_channels_last_is_kept():
    net, x = seeded_net().to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)
    for model in (prepare(net), prepare(net, 4, learned_step=True)):
        assert layer_io(model, x)["conv2"][1].is_contiguous(memory_format=torch.channels_last)
        assert layer_io(model, x)["conv2"][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bf16_autocast(kind):
    model = prepare(seeded_net(), **kind)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, images(), 10)
    expected = train(prepare(seeded_net(), **kind), images(), 10)
    assert np.abs(np.subtract(losses, expected)).max() < 0.05
    assert model.conv1.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiled_trains_as_eager(backend, kind):
    model = prepare(seeded_net(), **kind)
    train(model, images(), 1, lr=0)  # a learned step starts from the first batch
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    np.testing.assert_allclose(train(compiled, images(), 5), train(other, images(), 5), rtol=2e-2)


def test_what_stays_float_is_listed():
    class Odd(nn.Linear):
        pass

    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = prepare(nn.Sequential(nn.Linear(4, 16), encoder, Odd(16, 16), nn.Linear(16, 2)), skip=["3"])
    assert float_layers(model) == {
        "1.self_attn": "MultiheadAttention", "1.self_attn.out_proj": "NonDynamicallyQuantizableLinear",
        "1.norm1": "LayerNorm", "1.norm2": "LayerNorm", "2": "Odd", "3": "Linear",
    }  # fmt: skip
    x = torch.randn(3, 5, 4)
    model(x)
    model[1].linear1.weight_quantizer.set_bits(2)
    out, model[1].linear1.weight.data[:] = logits(model.eval(), x), 0
    assert not torch.equal(out, logits(model, x)), "evaluation passed the layer by"
    assert logits(convert(model), x).shape == (3, 5, 2)


def test_a_relu_with_another_taker_stays():
    class Forked(Net):
        def forward(self, x):
            y = self.relu1(self.bn1(self.conv1(x)))
            return self.bn2(self.conv2(y)).mean() + y.mean()

    assert isinstance(prepare(Forked()).relu1, nn.ReLU6)
    assert isinstance(prepare(Net()).relu1, nn.Identity)


def test_untraceable_needs_pairs():
    class Untraceable(Net):
        def forward(self, x):
            return super().forward(x if x.mean() > 0 else -x)

    with pytest.raises(ValueError, match=r"cannot be traced .* pairs="):
        prepare(Untraceable())
    assert set(float_layers(prepare(Untraceable(), pairs={"conv1": "bn1"}))) == {"bn2"}
    with pytest.raises(ValueError, match="'fc' is no batch norm"):
        prepare(Untraceable(), pairs={"conv1": "fc"})


def test_prepared_and_converted_are_refused():
    model = prepare(seeded_net(), act_bits=None)
    packed = convert(model)
    for again, message in ((model, "prepared already"), (packed, "converted already")):
        with pytest.raises(ValueError, match=message):
            prepare(again)
    for verb in (convert, set_bits, freeze):
        with pytest.raises(ValueError, match="converted already"):
            verb(packed)
        with pytest.raises(ValueError, match="not prepared"):
            verb(Net())
    with pytest.raises(ValueError, match="not converted"):
        save(model, "never-written")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight_bits": 9}, "got 9"),
        ({"act_bits": 1}, "got 1"),
        ({"granularity": 7}, "conv1: groups of 7 do not divide a row of 27"),
        ({"granularity": "row"}, "granularity='row'"),
        ({"skip": ["conv9"]}, "conv9"),
        ({"skip": ["conv1", "conv2", "fc"]}, "no layer left to quantize"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prepare(Net(), **kwargs)
    with pytest.raises(ValueError, match="conv9"):
        set_bits(prepare(Net()), 4, only=["conv9"])


def test_wrong_files_are_refused_by_name(tmp_path):
    path = tmp_path / "m"
    save(convert(trained(seeded_net(), images(), weight_bits=4)), path)
    with pytest.raises(ValueError, match="conv1: the file holds weights of 4 bits, you ask for 8"):
        load(path, Net(), weight_bits=8)
    with pytest.raises(ValueError, match="conv1: the file holds inputs of 8 bits, you ask for 4"):
        load(path, Net(), act_bits=4)
    with pytest.raises(ValueError, match="conv1 is a quantized layer there, nothing in Linear"):
        load(path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"conv1 has shape \[8, 3, 3, 3\] there, \[4, 3, 3, 3\] in Net"):
        load(path, Net(channels=4))
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no safetensors file"):
        load(path, Net())
    assert list(tmp_path.iterdir()) == [path]
