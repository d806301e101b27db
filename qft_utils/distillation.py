"""Knowledge distillation: a student, say one that `qat.prepare` has narrowed, learns what its teacher puts out.

    trainer = DistillationTrainer(student, args, teacher=teacher, temperature=2.0, alpha=0.5, train_dataset=dataset)

Where a data set gives the same examples in every epoch, the teacher need only run once:

    carried = WithTeacherLogits(dataset, cache_logits(teacher, dataset, collate))
    trainer = DistillationTrainer(student, args, temperature=2.0, alpha=0.5, train_dataset=carried)

Sources: Hinton et al. 2015 (arXiv 1503.02531) for logits, TinyBERT (Jiao et al. 2020, arXiv 1909.10351) for hidden
states, MiniLM (Wang et al. 2020, arXiv 2002.10957) for attention. A loss has shape (); divergences are in nats.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IGNORED = -100  # the label of a position that does not count, as in F.cross_entropy
COLUMN = "teacher_logits"


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, temperature: float, alpha: float
) -> Tensor:
    """alpha * T^2 * KL(teacher || student) at temperature T + (1 - alpha) * cross-entropy (Hinton et al., section 2).

    student_logits, teacher_logits: (N, C) or (N, L, C); the teacher's get no gradient.
    labels: classes (N,) or (N, L); positions with label -100 are left out of both terms. Both are means over the rest.
    alpha: 0 to 1, the teacher's weight. Label-free is alpha=1, and without labels nothing else is accepted: no weight
        of theirs is dropped in silence. With alpha=1, labels only say which positions count.
    A class with the teacher's logit at -inf adds 0, whatever the student's is; the student's alone at -inf makes the
    loss infinite, as the divergence is. Raises ValueError for shapes that do not match, fewer than two classes,
    alpha or temperature out of range, and where no position is left.
    """
    _check_settings(temperature, alpha)
    _check_classes(student_logits.shape[-1], teacher_logits.shape[-1])
    _check_same("logits", student_logits, teacher_logits)
    if labels is None and alpha != 1:
        raise ValueError(f"alpha={alpha} gives labels a weight, but there are none: pass labels, or alpha=1")
    kept = student_logits.new_ones(student_logits.shape[:-1]).bool() if labels is None else labels.ne(IGNORED)
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = (_select(z, kept).to(precise) for z in (student_logits, teacher_logits.detach()))  # M, C
    log_q, log_p = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    soft = temperature**2 * _kl(log_p, log_q).mean()
    if alpha == 1:
        return soft
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, labels[kept])


def hidden_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor, projection: nn.Module | None = None
) -> Tensor:
    """Mean squared error of hidden states, over positions and width (TinyBERT, equation 8).

    student_hidden (N, L, D), teacher_hidden (N, L, E); mask (N, L) is 0 at padding, which is left out.
    projection: where D is not E, `nn.Linear(D, E, bias=False)`; it is learned, so the optimizer must have it.
    Raises ValueError for shapes that do not match, and for a batch of nothing but padding.
    """
    projected = student_hidden if projection is None else projection(student_hidden)  # N, L, E
    have, need = projected.shape[-1], teacher_hidden.shape[-1]
    if have != need:
        linear = f"nn.Linear({student_hidden.shape[-1]}, {need}, bias=False)"
        raise ValueError(f"width {have} of the student, {need} of the teacher: pass projection={linear}, and train it")
    kept = mask.bool()
    return F.mse_loss(_select(projected, kept), _select(teacher_hidden, kept).detach())


def attention_loss(student_attention: Tensor, teacher_attention: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of attention, a mean over heads and over the queries of the batch (MiniLM, section 3.1).

    Both (N, heads, L, L), queries before keys: `outputs.attentions[-1]` of a model that was loaded with
    `attn_implementation="eager"` and called with `output_attentions=True`; mask (N, L) is 0 at padding.
    Raises ValueError for shapes that do not match, a batch of nothing but padding, and rows that do not add up to 1:
    what transformers returns in training mode has been through dropout, so set `attention_probs_dropout_prob=0`.
    """
    _check_same("attention", student_attention, teacher_attention)
    kept = mask.bool()
    padded = ~kept[:, None, None]  # N, 1, 1, L
    p = _select(teacher_attention.detach().transpose(1, 2).masked_fill(padded, 0), kept)  # M, heads, L
    q = _select(student_attention.transpose(1, 2).masked_fill(padded, 0), kept)
    _check_rows(teacher=p, student=q)
    return _kl(p.log(), q.clamp_min(torch.finfo(q.dtype).tiny).log()).mean()  # finite where a probability underflows


@torch.no_grad()
def cache_logits(
    teacher: nn.Module, dataset: Any, collate: Callable[[list], Mapping[str, Tensor]], batch_size: int = 32
) -> Tensor:
    """The teacher's logits (N, C) on the CPU, in the order of the data set, computed in evaluation mode.

    collate: makes a batch of examples, as transformers' data collators do. The teacher ends in the mode it was in.
    A `datasets.Dataset` can carry the result as a column: `dataset.add_column("teacher_logits", list(logits.numpy()))`.
    Raises ValueError for an empty data set, and for logits per token, whose length goes by the batch.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there are no teacher logits to cache")
    device, parts = next(teacher.parameters()).device, []
    modes = {module: module.training for module in teacher.modules()}
    teacher.eval()
    try:
        # A generator of its own: a loader draws a number from it, and torch's random state shall stay.
        for batch in DataLoader(dataset, batch_size, collate_fn=collate, generator=torch.Generator()):
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            parts.append(_logits(teacher(**inputs)).cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if parts[0].dim() != 2:
        raise ValueError(f"logits {tuple(parts[0].shape)} per token cannot be cached: give the trainer teacher=")
    return torch.cat(parts)


class WithTeacherLogits(Dataset):
    """The examples of `dataset`, each with its row of `logits` (N, C); ValueError where the lengths differ."""

    def __init__(self, dataset: Any, logits: Tensor):
        if len(dataset) != len(logits):
            raise ValueError(f"{len(dataset)} examples, {len(logits)} rows of logits: cache them for this data set")
        self.dataset, self.logits = dataset, logits

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], COLUMN: self.logits[index].tolist()}  # pads like a list, stacks like a tensor


class DistillationTrainer(Trainer):
    """transformers' Trainer with `distillation_loss`; the other arguments are Trainer's.

    teacher: a module that reads the student's batches, less the labels. It is moved to the student's device, stays in
        evaluation mode and without gradients, and is in no checkpoint. Without it, every training batch carries the
        column "teacher_logits", which `remove_unused_columns` then spares.
    temperature, alpha: as in `distillation_loss`; alpha=1 trains without labels, should there be any.
    The logged "loss" is the distillation loss; "eval_loss" is the model's own, cross-entropy with the labels, so that
    it compares with other trainings, and takes no teacher. A causal language model's labels are shifted by one, as it
    predicts the next token. Logits per token without labels count where attention_mask is 1.
    Gradient accumulation: positions with a label weigh the same in all micro-batches of a step. Where the batches have
    no labels, or the model's `forward` takes no `num_items_in_batch`, micro-batches do, as in Trainer.
    Raises ValueError for settings out of range or without effect, different numbers of classes, a teacher that shares
    parameters with the student, and several GPUs in one process; when training begins, where not exactly one of
    teacher and column is there, or labels are missing that alpha needs.
    """

    def __init__(self, *args: Any, teacher: nn.Module | None = None, temperature: float, alpha: float, **kwargs: Any):
        _check_settings(temperature, alpha)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs in one process: use torchrun, or set CUDA_VISIBLE_DEVICES=0")
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ValueError("compute_loss_func and label_smoothing_factor would have no effect: leave them out")
        if teacher is not None:
            _check_teacher(self.model, teacher)
        self.temperature, self.alpha = temperature, alpha
        self._loss_shifts_labels = _predicts_next(self.model)  # Trainer's own guess, by which it counts, misses GPT-2
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The distillation loss while `model` trains, else Trainer's."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels, cached = inputs.pop("labels", None), inputs.pop(COLUMN, None)
        teacher_logits = self._teacher_logits(inputs, cached)
        outputs = model(**inputs)
        logits = _logits(outputs)
        if labels is not None and self._loss_shifts_labels:
            logits, teacher_logits, labels = logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:]
        elif labels is None and self.alpha == 1 and logits.dim() == 3 and "attention_mask" in inputs:
            labels = torch.where(inputs["attention_mask"].bool(), 0, IGNORED)  # only says which positions count
        loss = distillation_loss(logits, teacher_logits, labels, temperature=self.temperature, alpha=self.alpha)
        if num_items_in_batch is not None:  # labels in all micro-batches of the step, whose losses Trainer adds up
            loss = loss * labels.ne(IGNORED).sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:  # counted over all processes, but DDP averages gradients
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _teacher_logits(self, inputs: dict[str, Tensor], cached: Tensor | None) -> Tensor:
        if (self.teacher is None) == (cached is None):
            found = "neither" if cached is None else "both"
            raise ValueError(f'need teacher= or the column "{COLUMN}" in every batch, exactly one: found {found}')
        if self.teacher is None:
            return cached
        with torch.no_grad():
            return _logits(self.teacher(**inputs))

    def prediction_step(self, model, inputs, *arguments, **keywords):
        """Trainer's, without the teacher's column, which the model does not know."""
        inputs = {name: value for name, value in inputs.items() if name != COLUMN}
        return super().prediction_step(model, inputs, *arguments, **keywords)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [name for name in self._signature_columns if name != COLUMN] + [COLUMN]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; 0 log 0 = 0."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).masked_fill(log_p.isneginf(), 0).sum(-1)


def _logits(outputs: Any) -> Tensor:
    return getattr(outputs, "logits", outputs)


def _select(values: Tensor, kept: Tensor) -> Tensor:
    """The kept positions (N,) or (N, L) of `values` (N, ...) or (N, L, ...), as (M, ...)."""
    if kept.shape != values.shape[: kept.dim()]:
        raise ValueError(f"labels or mask {tuple(kept.shape)} for {tuple(values.shape)}: pass one value per position")
    if not kept.any():
        raise ValueError(f"none of {kept.numel()} positions counts: the batch is empty, or all padding or {IGNORED}")
    return values[kept]


def _classes(model: nn.Module) -> int | None:
    """The length of the model's logits, if the model knows."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(getattr(model, "config", None), "num_labels", None) if head is None else head.out_features


def _predicts_next(model: nn.Module) -> bool:
    """Whether it is one of AutoModelForCausalLM's, also inside an adapter of PEFT."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _check_settings(temperature: float, alpha: float) -> None:
    if not 0 < temperature < float("inf") or not 0 <= alpha <= 1:
        raise ValueError(f"need temperature > 0 and alpha from 0 to 1: got temperature={temperature}, alpha={alpha}")


def _check_same(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} of the student, {tuple(teacher.shape)} of the teacher"
        raise ValueError(f"{what} {shapes}: give both the same batch and, for attention, the same number of heads")


def _check_classes(student: int, teacher: int) -> None:
    if student != teacher:
        counts = f"vocabularies or label counts differ: {student} of the student, {teacher} of the teacher"
        raise ValueError(f"{counts}. Give both models the same num_labels, or tokenizer and vocabulary size")
    if student < 2:
        raise ValueError(f"{student} class has always probability 1: use F.mse_loss for a regression")


def _check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    if set(student.parameters()) & set(teacher.parameters()):
        raise ValueError("the teacher shares parameters with the student: pass a copy.deepcopy of it, made before")
    counts = _classes(student), _classes(teacher)
    if None not in counts:
        _check_classes(*counts)


def _check_rows(**attention: Tensor) -> None:
    for name, rows in attention.items():
        worst = (rows.detach().sum(-1) - 1).abs().max().item()
        if not worst < 2**-6:  # more than rounding to bfloat16 does
            remedy = "set attention_probs_dropout_prob=0, and give both models the mask"
            raise ValueError(f"rows of the {name}'s attention add up to 1 only within {worst:.2g}: {remedy}")
