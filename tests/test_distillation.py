"""Distillation against closed forms, scipy, numpy, transformers' own losses, and one big batch for two small ones."""

import copy

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy.stats import entropy
from torch import nn, tensor
from torch.nn import functional as F

from qft_utils import distillation as kd
from qft_utils import qat
from qft_utils.distillation import attention_loss, distillation_loss, hidden_loss

pytestmark = pytest.mark.usefixtures("one_thread")
SEQUENCES, TOKENS = tf.BertForSequenceClassification, tf.BertForTokenClassification


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft(student, teacher, temperature=2.0, **keywords):
    return distillation_loss(student, teacher, temperature=temperature, alpha=1, **keywords)


@settings(deadline=None, max_examples=50)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=2), classes=st.integers(2, 6),
    seed=st.integers(0, 99), temperature=st.floats(0.5, 20), alpha=st.floats(0, 1),
)  # fmt: skip
def test_loss_is_scipys(shape, classes, seed, temperature, alpha):
    student, teacher = (normal(*shape, classes, seed=seed + i, scale=3) for i in (0, 1))
    labels = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    p, q = ((z.flatten(0, -2) / temperature).softmax(-1).numpy() for z in (teacher, student))
    expected = alpha * temperature**2 * entropy(p, q, axis=-1).mean()
    expected += (1 - alpha) * F.cross_entropy(student.flatten(0, -2), labels.flatten()).item()
    loss = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_equal_logits_and_the_ends_of_alpha():
    student, teacher, labels = normal(5, 4), normal(5, 4, seed=1), tensor([0, 3, 1, 1, 2])
    assert soft(student + 7, student).item() == pytest.approx(0, abs=1e-12)
    assert distillation_loss(student, teacher, labels, temperature=3, alpha=0) == F.cross_entropy(student, labels)
    student[0, 0] = teacher[0, 0] = -torch.inf  # the first label: its cross-entropy is infinite, but has no weight
    assert soft(student, teacher, labels=labels) == soft(student, teacher) > 0.01


def test_high_temperature_limit_of_hinton_section_2_1():
    student, teacher = normal(6, 5).requires_grad_(), normal(6, 5, seed=1)
    centred = [z.detach() - z.detach().mean(-1, keepdim=True) for z in (student, teacher)]
    difference = centred[0] - centred[1]
    loss = soft(student, teacher, 1e5)
    assert loss.item() == pytest.approx((difference**2).sum(-1).mean().item() / (2 * 5), rel=1e-3)
    loss.backward()
    torch.testing.assert_close(student.grad, difference / (6 * 5), rtol=1e-3, atol=1e-5)  # N C


def test_gradients():
    student, teacher = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1).requires_grad_()
    labels = tensor([[0, 1, -100], [3, -100, 2]])
    options = {"temperature": 2.5, "alpha": 0.3}
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, teacher, labels, **options), student)
    soft(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_squared_temperature_keeps_the_scale_of_gradients():
    """Without the factor, the gradient at T = 100 would be 1600 times smaller than at T = 2.5."""
    student, teacher = normal(8, 4, scale=0.1).requires_grad_(), normal(8, 4, seed=1, scale=0.1)
    norms = [torch.autograd.grad(soft(student, teacher, t), student)[0].norm() for t in (2.5, 100)]
    torch.testing.assert_close(norms[0], norms[1], rtol=0.05, atol=0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), alpha=st.sampled_from([0, 0.4, 1]))
def test_ignored_positions_have_no_influence(seed, alpha):
    student, teacher, out = normal(3, 4, 5, seed=seed), normal(3, 4, 5, seed=seed + 1), normal(3, 4, seed=seed) > 0
    labels = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(seed))
    out[0, 0] = False
    alone = distillation_loss(student[~out], teacher[~out], labels[~out], temperature=2, alpha=alpha)
    student[out], teacher[out], labels[out] = 1e9, float("nan"), -100
    torch.testing.assert_close(distillation_loss(student, teacher, labels, temperature=2, alpha=alpha), alone)


@pytest.mark.parametrize("masked_too", [False, True])
def test_a_class_the_teacher_masks_counts_as_zero(masked_too):
    student, teacher = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    teacher[:, 2] = -torch.inf
    masked = student.masked_fill(tensor([False, False, masked_too, False]), -torch.inf)
    p, q = ((z.detach() / 2).softmax(-1).numpy() for z in (teacher, masked))
    loss = soft(masked, teacher)
    assert loss.item() == pytest.approx(4 * entropy(p, q, axis=-1).mean())
    loss.backward()
    assert student.grad.isfinite().all()
    assert soft(teacher, student.detach()).item() == torch.inf


def test_nan_is_not_hidden_and_half_precision_is_not_lost():
    student, teacher = normal(3, 4).bfloat16(), normal(3, 4, seed=1).bfloat16()
    assert soft(student, teacher) == soft(student.float(), teacher.float())
    teacher[1, 1] = torch.nan
    assert soft(student, teacher).isnan()


BAD = [
    ({"teacher_logits": normal(4, 5)}, "vocabularies or label counts differ: 3 of the student, 5 of the teacher"),
    ({"teacher_logits": normal(2, 3)}, r"\(4, 3\) of the student, \(2, 3\) of the teacher"),
    ({"student_logits": normal(4, 1), "teacher_logits": normal(4, 1)}, "1 class has always probability 1"),
    ({"temperature": 0}, "temperature=0"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"alpha": 1.1}, r"alpha=1\.1"), ({"alpha": -0.1}, r"alpha=-0\.1"),
    ({"labels": None}, r"alpha=0\.5 gives labels a weight, but there are none"),
    ({"labels": torch.zeros(4, 2).long()}, r"labels or mask \(4, 2\) for \(4, 3\)"),
    ({"labels": torch.full((4,), -100)}, "none of 4 positions"),
    ({"student_logits": normal(0, 3), "teacher_logits": normal(0, 3), "labels": torch.zeros(0).long()}, "none of 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(change, message):
    good = {"student_logits": normal(4, 3), "teacher_logits": normal(4, 3), "labels": torch.zeros(4).long()}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**({**good, "temperature": 2.0, "alpha": 0.5} | change))


MASK = tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def spoil(values: torch.Tensor) -> torch.Tensor:
    """Other values at padding: of hidden states at positions, of attention at queries and keys."""
    out = MASK == 0
    if values.dim() == 3:
        return values.masked_fill(out[..., None], 1e9)
    return values.masked_fill(out[:, None, None], 0.7).masked_fill(out[:, None, :, None], 5.0)


def test_hidden_loss():
    projection = nn.Linear(6, 9, bias=False).double()
    student, teacher = normal(3, 4, 6).requires_grad_(), normal(3, 4, 9, seed=1).requires_grad_()
    projected = student.detach().numpy() @ projection.weight.detach().numpy().T
    errors = [(projected[n, t] - teacher[n, t].tolist()) ** 2 for n, t in np.argwhere(MASK.numpy())]
    loss = hidden_loss(student, teacher, MASK, projection)
    assert loss.item() == pytest.approx(np.mean(errors))
    assert hidden_loss(spoil(student), spoil(teacher), MASK, projection) == loss
    assert hidden_loss(teacher, teacher, MASK) == 0
    loss.backward()
    assert teacher.grad is None and projection.weight.grad.abs().sum() > 0 and student.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"width 6 of the student, 9 of the teacher: .*nn\.Linear\(6, 9"):
        hidden_loss(student, teacher, MASK)
    with pytest.raises(ValueError, match="none of 12 positions"):
        hidden_loss(teacher, teacher, MASK * 0)


def attention(seed: int) -> torch.Tensor:
    scores = normal(3, 2, 4, 4, seed=seed, scale=2).masked_fill(MASK[:, None, None] == 0, -torch.inf)
    return scores.softmax(-1).requires_grad_()


def test_attention_loss():
    student, teacher, queries = attention(0), attention(1), np.argwhere(MASK.numpy())
    rows = [entropy(teacher[n, h, t].tolist(), student[n, h, t].tolist()) for n, t in queries for h in range(2)]
    loss = attention_loss(student, teacher, MASK)
    assert loss.item() == pytest.approx(np.mean(rows))
    assert attention_loss(spoil(student), spoil(teacher), MASK) == loss
    assert attention_loss(teacher, teacher, MASK).item() == pytest.approx(0, abs=1e-12)
    loss.backward()
    assert teacher.grad is None and student.grad.isfinite().all() and student.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="same number of heads"):
        attention_loss(student, teacher[:, :1], MASK)
    underflown = torch.eye(4).expand(3, 2, 4, 4)
    assert attention_loss(underflown, torch.full_like(underflown, 0.25), torch.ones(3, 4)).isfinite()


def bert(kind=SEQUENCES, seed=0, hidden=16, dropout=0.0, labels=3, **config) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "initializer_range": 0.5}
    return kind(tf.BertConfig(hidden_size=hidden, max_position_embeddings=8, num_labels=labels, **sizes, **config))


def bert_teacher(**config) -> nn.Module:
    return bert(seed=1, hidden=24, dropout=0.3, **config).train()


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1, "initializer_range": 0.5}
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))


def examples(count: int = 16, labels: str | None = "sequence") -> list[dict]:
    torch.manual_seed(2)
    ids, masks = torch.randint(20, (count, 6)), (torch.arange(6) < torch.randint(3, 7, (count, 1))).long()
    kinds = {"sequence": torch.randint(3, (count,)), "token": torch.randint(3, (count, 6)).where(masks > 0, -100)}
    rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]
    return rows if labels is None else [r | {"labels": y} for r, y in zip(rows, kinds[labels], strict=True)]


def trainer(folder, model, data, *, steps=4, alpha=0.5, teacher=None, **changes) -> kd.DistillationTrainer:
    given = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    given |= {"lr_scheduler_type": "constant", "disable_tqdm": True, "report_to": "none", "use_cpu": True} | changes
    data = {"train_dataset": data, "eval_dataset": data, "data_collator": tf.default_data_collator}
    args = tf.TrainingArguments(str(folder), max_steps=steps, **given)
    return kd.DistillationTrainer(model, args, teacher=teacher, temperature=2.0, alpha=alpha, **data)


def curve(made: kd.DistillationTrainer) -> list[float]:
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def training_loss(made: kd.DistillationTrainer, batch: dict) -> float:
    return made.compute_loss(made.model.train(), batch).item()


def test_attentions_that_transformers_returns():
    batch = tf.default_data_collator(examples(4, None)) | {"output_attentions": True}
    student, teacher = (bert(seed=seed, dropout=0.3, attn_implementation="eager").eval() for seed in (0, 1))
    known = teacher(**batch).attentions[-1]
    assert 0 < attention_loss(student(**batch).attentions[-1], known, batch["attention_mask"]) < 10
    with pytest.raises(ValueError, match="student's attention.*attention_probs_dropout_prob=0"):
        attention_loss(student.train()(**batch).attentions[-1], known, batch["attention_mask"])


@pytest.mark.parametrize("carrier", ["wrapper", "column"])
def test_cached_logits_give_the_curve_of_the_live_teacher(tmp_path, carrier):
    teacher, data = bert_teacher(), examples()
    teacher.dropout.eval()  # a mode of its own, which caching keeps
    modes, random = [m.training for m in teacher.modules()], torch.get_rng_state()
    logits = kd.cache_logits(teacher, data, tf.default_data_collator, batch_size=5)
    assert [m.training for m in teacher.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    row = {name: value[None] for name, value in data[9].items()}
    torch.testing.assert_close(logits[9:10], teacher.eval()(**row).logits.detach())
    carried = kd.WithTeacherLogits(data, logits)
    if carrier == "column":
        rows = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in data])
        carried = rows.add_column("teacher_logits", list(logits.numpy())).add_column("text", ["?"] * 16)
    live, cached = trainer(tmp_path, bert(), data, teacher=bert_teacher()), trainer(tmp_path, bert(), carried)
    assert curve(live) == pytest.approx(curve(cached), rel=1e-5)
    assert not any(module.training for module in live.teacher.modules())
    assert live.evaluate()["eval_loss"] == pytest.approx(cached.evaluate()["eval_loss"], rel=1e-4)


def test_caching_and_carrying_refuse():
    with pytest.raises(ValueError, match="data set is empty"):
        kd.cache_logits(bert(), [], tf.default_data_collator)
    with pytest.raises(ValueError, match="per token"):
        kd.cache_logits(bert(TOKENS), examples(4), tf.default_data_collator)
    with pytest.raises(ValueError, match="4 examples, 3 rows"):
        kd.WithTeacherLogits(examples(4), normal(3, 3))


def test_a_prepared_student_comes_closer_and_its_checkpoint_has_no_teacher(tmp_path):
    teacher, student = bert_teacher(), qat.prepare(bert(), 4, 8)
    before, saving = copy.deepcopy(teacher.state_dict()), {"save_strategy": "steps", "save_steps": 50}
    states = set()
    teacher.register_forward_hook(lambda module, *_: states.add((module.training, torch.is_grad_enabled())))
    settings = {"alpha": 1, "steps": 50, "learning_rate": 1e-2} | saving
    made = trainer(tmp_path, student, examples(labels=None), teacher=teacher, **settings)
    losses = curve(made)
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert states == {(False, False)}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert trained == set(map(id, student.parameters()))
    with safe_open(tmp_path / "checkpoint-50" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(student.state_dict())


@pytest.mark.parametrize("labels", ["sequence", "token", None])
@pytest.mark.parametrize("counts", [True, False])
def test_accumulation_is_one_big_batch(tmp_path, monkeypatch, labels, counts):
    """With SGD at rate 1, the first step is the gradient. Per token, not all micro-batches have as many labels."""
    kind = TOKENS if labels == "token" else SEQUENCES
    monkeypatch.setattr(kind, "accepts_loss_kwargs", counts, raising=False)
    data, steps = examples(8, labels), []
    if labels == "token" and not counts:
        data = [row | {"labels": row["labels"].index_fill(0, tensor([3, 4, 5]), -100)} for row in data]  # 12 and 12
    for size, parts in ((8, 1), (4, 2)):
        given = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "steps": 1, "alpha": 0.5 if labels else 1}
        given |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        made = trainer(tmp_path, bert(kind), data, teacher=bert(kind, seed=1, hidden=24), **given)
        made.train()
        steps.append(nn.utils.parameters_to_vector(made.model.parameters()).detach())
    assert (steps[0] - nn.utils.parameters_to_vector(bert(kind).parameters())).norm() > 0.01
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-5)


class Strict(SEQUENCES):
    """Takes no other arguments."""

    def forward(self, input_ids, attention_mask, labels=None):
        return super().forward(input_ids, attention_mask, labels=labels)


def test_evaluation_reports_cross_entropy(tmp_path):
    student, data = bert(Strict), examples()
    made, batch = trainer(tmp_path, student, data, teacher=bert_teacher()), tf.default_data_collator(data)
    expected = F.cross_entropy(student.eval()(**batch).logits, batch["labels"]).item()
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert made.predict(kd.WithTeacherLogits(data, torch.zeros(16, 3))).predictions.shape == (16, 3)


def test_causal_labels_are_shifted_and_counted(tmp_path):
    data = examples(8, "token")
    made = trainer(tmp_path, gpt2(), data, teacher=gpt2(1), alpha=0, steps=1)
    expected = made.model(**tf.default_data_collator(data)).loss.item()
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert curve(made) == pytest.approx([expected], rel=1e-5)


def test_tokens_without_labels_leave_padding_out(tmp_path):
    batch, teacher = tf.default_data_collator(examples(4, None)), bert(TOKENS, seed=1).eval()
    made, mask = trainer(tmp_path, bert(TOKENS), [], teacher=teacher, alpha=1), batch["attention_mask"].bool()
    expected = soft(made.model(**batch).logits[mask], teacher(**batch).logits[mask]).item()
    assert training_loss(made, batch) == pytest.approx(expected, rel=1e-5)


def test_the_trainer_refuses(tmp_path):
    student, data = bert(), examples()
    with pytest.raises(ValueError, match="3 of the student, 5 of the teacher"):
        trainer(tmp_path, student, data, teacher=bert_teacher(labels=5))
    with pytest.raises(ValueError, match="20 of the student, 3 of the teacher"):
        trainer(tmp_path, gpt2(), data, teacher=bert_teacher())
    with pytest.raises(ValueError, match="shares parameters"):
        trainer(tmp_path, student, data, teacher=student)
    with pytest.raises(ValueError, match="alpha=2"):
        trainer(tmp_path, student, data, alpha=2)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer(tmp_path, student, data, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="exactly one: found neither"):
        training_loss(trainer(tmp_path, student, data), tf.default_data_collator(data))
    carried = kd.WithTeacherLogits(data, torch.zeros(16, 3))
    with pytest.raises(ValueError, match="exactly one: found both"):
        trainer(tmp_path, student, carried, teacher=bert_teacher()).train()
    made = trainer(tmp_path, student, data, teacher=bert_teacher())
    with pytest.raises(ValueError, match="labels a weight, but there are none"):
        training_loss(made, {"input_ids": data[0]["input_ids"][None]})
