"""Chapter 4's students: the sentiment classifier in few bits, trained with labels, with a teacher, or by stages.

The chapter builds its main functions by hand; the sweep behind it uses these.

    student = prepared(teacher, calibration)                   # 8 bits everywhere
    train(student, examples, Settings(1e-4, alpha=1.0), falling((8, 4, 3, 2), Settings(1e-4).steps))
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerBase, TrainingArguments

from qft_utils import data, qat, sentiment
from qft_utils.distillation import DistillationTrainer, WithTeacherLogits, cache_logits, hidden_loss
from qft_utils.qat.inspect import training_layers
from qft_utils.schedules import BitSchedule, BitScheduleCallback, BitStepper, direct

KEPT = ("bert.pooler.dense", "classifier")  # stay in 8 bits: the head is small


@dataclass(frozen=True)
class Settings:
    """A training of a student, the same for every contender but for what is compared."""

    learning_rate: float
    temperature: float = 2.0
    alpha: float = 0.0  # the teacher's weight: 0 is labels alone, 1 the teacher alone
    hidden: float = 0.0  # weight of the last hidden state's error; the teacher must be at hand for it
    sentences: int = 1_536  # that the teacher's own fine-tuning has not seen, each once
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of all steps
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.sentences // self.batch_size


MAX_LENGTH = 32  # tokens, in training


class Unpacked(nn.Module):
    """The model as a function of one batch (a mapping), to logits: what `qat.calibrate` and `kl_to` call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(**batch).logits


def unseen(tokenizer: PreTrainedTokenizerBase) -> sentiment.ReviewDataset:
    """The training sentences that chapter 1's fine-tuning leaves, cut to MAX_LENGTH."""
    train, settings = data.reviews("train"), sentiment.Settings()
    seen = train.sample(settings.sentences, random_state=settings.seed).index
    return sentiment.ReviewDataset(train.drop(seen), tokenizer, MAX_LENGTH)


def with_teacher(
    teacher: nn.Module, dataset: sentiment.ReviewDataset, tokenizer: PreTrainedTokenizerBase
) -> WithTeacherLogits:
    """The sentences, each with what the teacher says of it."""
    return WithTeacherLogits(dataset, cache_logits(teacher, dataset, DataCollatorWithPadding(tokenizer)))


def calibration_batches(tokenizer: PreTrainedTokenizerBase, count: int = 128, seed: int = 0) -> list[BatchEncoding]:
    """Batches of 32 training sentences that the fine-tuning has seen, without labels, drawn by `seed`."""
    train, settings = data.reviews("train"), sentiment.Settings()
    seen = train.sample(settings.sentences, random_state=settings.seed)
    texts = seen.text.sample(count, random_state=seed).tolist()
    texts.sort(key=len)  # little padding: a learned step starts from the mean of all that it meets
    parts = [texts[i : i + 32] for i in range(0, count, 32)]
    return [
        tokenizer(part, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt") for part in parts
    ]


def body(model: nn.Module) -> list[str]:
    """The layers of a prepared classifier whose widths change: all but its head."""
    return [name for name in training_layers(model) if name not in KEPT]


def prepared(model: nn.Module, calibration: Sequence[BatchEncoding]) -> nn.Module:
    """A copy of `model` with learned steps, 8 bits in weights and inputs: where every schedule starts from."""
    student = qat.prepare(model, 8, 8, learned_step=True)
    qat.calibrate(Unpacked(student), calibration)
    return student


def narrow(student: nn.Module, bits: int | Mapping[str, int]) -> nn.Module:
    """The same student, its body's weights in `bits`, or each layer in its own; new steps start from the weights."""
    widths = dict.fromkeys(body(student), bits) if isinstance(bits, int) else bits
    for name, width in widths.items():
        BitStepper(student, direct(width, 1), only=[name])
    return student


class HiddenStateTrainer(DistillationTrainer):
    """Adds `weight` times the error of the last hidden state (TinyBERT, equation 8)."""

    def __init__(self, *args, weight: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.weight = weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            words = {name: value for name, value in inputs.items() if name not in ("labels", "teacher_logits")}
            with torch.no_grad():
                target = self.teacher(**words, output_hidden_states=True).hidden_states[-1]
            loss = loss + self.weight * hidden_loss(outputs.hidden_states[-1], target, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss


def train(
    student: nn.Module,
    examples: WithTeacherLogits,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    schedule: BitSchedule | None = None,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Train in place by AdamW, linear warm-up and decay under bf16 autocast; ends in evaluation mode.

    examples: of which the seed draws the settings' number. schedule: widths of the body's weights, step by step.
    teacher: only where `settings.hidden` asks for it; the logits come with the examples otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(student, examples, tokenizer, settings, schedule, teacher, folder)
        trainer.train()
    return student.eval()


def _trainer(student, examples, tokenizer, settings, schedule, teacher, folder) -> DistillationTrainer:
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(settings.seed))[: settings.sentences]
    arguments = TrainingArguments(
        folder, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size, seed=settings.seed,
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, warmup_steps=settings.warmup,
        lr_scheduler_type="linear", bf16=True, train_sampling_strategy="group_by_length", report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    keywords = {
        "args": arguments, "data_collator": DataCollatorWithPadding(tokenizer), "temperature": settings.temperature,
        "alpha": settings.alpha, "train_dataset": [examples[i] for i in chosen.tolist()],
        "callbacks": [] if schedule is None else [BitScheduleCallback(schedule, only=body(student))],
    }  # fmt: skip
    if not settings.hidden:
        return DistillationTrainer(student, **keywords)
    student.config.output_hidden_states = True
    keywords["train_dataset"] = [
        {k: v for k, v in row.items() if k != "teacher_logits"} for row in keywords["train_dataset"]
    ]
    return HiddenStateTrainer(student, teacher=teacher, weight=settings.hidden, **keywords)


def shallow(model: nn.Module, layers: Sequence[int] = (0, 2, 4)) -> nn.Module:
    """A copy with only some of the encoder's layers, as DistilBERT begins (Sanh et al. 2019, arXiv 1910.01108)."""
    small = copy.deepcopy(model)
    small.bert.encoder.layer = nn.ModuleList(small.bert.encoder.layer[i] for i in layers)
    small.config.num_hidden_layers = len(layers)
    return small
