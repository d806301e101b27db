"""Chapter 5's runs, results/sweeps/lm.json: `make sweeps NAME=lm`, about an hour on two cores.

All of them fine-tune the packaged model on plots for the same steps and rows, and are judged on plots of other films.
Parts, by the name in `part`:

- "grid": a learning rate for each method and each optimizer that needs its own, one seed, on the validation part;
- "main": the methods, three seeds, on the test part, with the nats of each document. What has been trained in float
  is then rounded to the file's formats, and judged again ("rounded");
- "sentiment": the label as the next token, against chapter 1's encoder on the same sentences;
- "choice": one change at a time, on the validation part; "qlora" and "lora_float" without a change are the controls.

Methods: "qlora" (LoRA on packed integers), "lora_float" (on the dequantized copy: the same function but for the
kernel's rounding, so it has QLoRA's rate), "full" (all of the copy's weights), "qat" (the same, rounded to the file's
own Q4_1 in each step), "qat_torchao" (the same, by torchao's int4 recipe, symmetric; it has qat's rate).
NF4 and LoftQ are simulated: the copy's weights are rounded and stay float. LoftQ (Li et al. 2023, algorithm 1, with
one iteration) is written out here, since PEFT's own asks for a CUDA device.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import qft_utils.compat  # noqa: F401  first: peft and Trainer import torchvision

# isort: split
import pandas as pd
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, GgufConfig
from transformers.utils import logging

from qft_utils import assets, data, finetune_lm, gguf_files, language, models, prompts, sentiment, tuning
from qft_utils.finetune_lm import PACKAGED, Settings
from qft_utils.gguf_blocks import group_parts, quantized
from qft_utils.pack_model import pack_model
from qft_utils.packed import Int4Linear
from qft_utils.sweeps import Journal

CODE = ["experiments/sweep_lm.py"]
CODE += [f"qft_utils/{n}.py" for n in ("data", "finetune_lm", "gguf_blocks", "gguf_files", "language", "packed")]
CODE += [f"qft_utils/{n}.py" for n in ("pack_model", "packed_base", "packed_tables", "prompts", "sentiment",
                                        "tuning")]  # fmt: skip

NAME = "SmolLM2-135M-Instruct"
SEEDS = (0, 1, 2)
BASE = Settings(steps=16)
JUDGES = {"validation": 40, "test": 100}  # plots, drawn once; chapter 5 draws the same
LADDERS = {
    "qlora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "qat": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "sgd": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "adafactor": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
KIND = {"qlora": "lora", "lora_float": "lora", "full": "full", "qat": "full", "qat_torchao": "full"}
RATE_OF = {"lora_float": "qlora", "qat_torchao": "qat"}
MAIN = {"qlora": SEEDS, "full": SEEDS, "qat": SEEDS, "lora_float": SEEDS[:1], "qat_torchao": SEEDS}
CHOICES = {  # by name: the method, and what is changed; the learning rate stays
    "constant": ("qlora", {"schedule": "constant_with_warmup"}), "cosine": ("qlora", {"schedule": "cosine"}),
    "no warm-up": ("qlora", {"warmup": 0.0}), "weight decay 0.1": ("qlora", {"weight_decay": 0.1}),
    "8-bit AdamW": ("qlora", {"optimizer": "adamw_8bit"}),
    "lora_float": ("lora_float", {}), "pissa": ("lora_float", {"init": "pissa_niter_4"}),
    "nf4": ("nf4", {}), "loftq": ("loftq", {}),
}  # fmt: skip
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


class RoundQ41(nn.Module):
    """A weight as Q4_1 would hold it; the straight-through estimator's gradient."""

    def forward(self, weight: Tensor) -> Tensor:
        codes, scale, minimum = group_parts(quantized(weight, 4), 4)
        groups = torch.addcmul(minimum.float()[..., None], codes.view(*scale.shape, 32), scale.float()[..., None])
        return weight + (groups.flatten(1) - weight).detach()


class Bench:
    """The rows that all runs train on, and the documents that judge them."""

    def __init__(self) -> None:
        self.path = assets.locate(NAME) / PACKAGED[NAME]
        self.packed, self.tokenizer = gguf_files.load(self.path)
        self.dense = AutoModelForCausalLM.from_pretrained(
            self.path.parent, gguf_file=self.path.name, quantization_config=GgufConfig(dequantize=True)
        )
        self.rows = language.pack(self.documents("train"), BASE.length, self.tokenizer.pad_token_id)
        self.parts = {part: self.documents(part) for part in JUDGES}

    def documents(self, part: str) -> list[list[int]]:
        texts = data.plots(part).text
        if part in JUDGES:
            texts = texts.sample(JUDGES[part], random_state=0)
        return language.documents(texts.tolist(), self.tokenizer, BASE.length)

    def prepared(self, method: str, settings: Settings) -> nn.Module:
        """A model of its own, ready to train by this method."""
        if method == "qlora":
            return finetune_lm.prepare(copy.deepcopy(self.packed), settings)
        model = copy.deepcopy(self.dense)
        errors = round_to_nf4(model) if method in ("nf4", "loftq") else []
        model = finetune_lm.prepare(model, settings)
        if method == "loftq":
            begin_with_errors(model, errors)
        if method == "qat":
            for layer in inner_layers(model):
                parametrize.register_parametrization(layer, "weight", RoundQ41())
        if method == "qat_torchao":
            quantize_(model, QATConfig(INT4, step="prepare"), filter_fn=is_inner)
        return model

    def tuned(self, method: str, settings: Settings, rows: object = None) -> nn.Module:
        model = self.prepared(method, settings)
        finetune_lm.train(model, self.rows if rows is None else rows, settings)
        if method == "qat":
            for layer in inner_layers(model):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        if method == "qat_torchao":
            quantize_(model, QATConfig(INT4, step="convert"), filter_fn=is_inner)
        return model

    def judged(self, model: nn.Module, part: str) -> dict[str, object]:
        losses = language.document_losses(model, self.parts[part])
        made = language.perplexity(losses).as_dict() | {"loss": sum(losses.nats) / sum(losses.tokens)}
        return made | ({"nats": [round(n, 3) for n in losses.nats]} if part == "test" else {})

    def rounded(self, method: str, model: nn.Module) -> nn.Module | None:
        """What was trained, in the file's own formats; None where that is not to be seen."""
        if method == "qlora":
            return merged_q4(copy.deepcopy(self.packed), model)
        return pack_model(model) if method in ("full", "qat") else None


def is_inner(module: nn.Module, name: str) -> bool:
    """Linear layers but the head, whose weight is the word table's."""
    return isinstance(module, nn.Linear) and "lm_head" not in name


def inner_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for name, module in model.named_modules() if is_inner(module, name)]


def merged_q4(into: nn.Module, model: nn.Module) -> nn.Module:
    """The adapters added to the integers, and the sums rounded to Q4_1."""
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            whole = module.base_layer.dequantize() + module.get_delta_weight("default").float()
            into.set_submodule(name, Int4Linear.from_float(whole))
    return into


@torch.no_grad()
def round_to_nf4(model: nn.Module) -> list[Tensor]:
    """Rounds the weights of the inner layers to NF4 in blocks of 64; returns what each has lost."""
    errors = []
    for layer in inner_layers(model):
        exact = layer.weight.clone()
        layer.weight.copy_(dequantize_4bit(*quantize_4bit(exact, blocksize=64, quant_type="nf4")))
        errors.append(exact - layer.weight)
    return errors


@torch.no_grad()
def begin_with_errors(model: nn.Module, errors: Sequence[Tensor]) -> None:
    """Adapters whose product is, as well as their rank allows, what the rounding has lost."""
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    for module, error in zip(adapted, errors, strict=True):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight  # r, K and N, r
        u, s, vh = torch.linalg.svd(error / module.scaling["default"], full_matrices=False)
        b.copy_(u[:, : len(a)] * s[: len(a)].sqrt())
        a.copy_(s[: len(a), None].sqrt() * vh[: len(a)])


# --- sentiment -------------------------------------------------------------------------------------------------------

SENTENCES = {"train": 300, "validation": 200, "test": 400}
LM_LADDER = (3e-4, 1e-3, 3e-3)
ENCODER_LADDER = (3e-5, 1e-4, 3e-4)
EPOCHS = (1, 10)  # the encoder's: as often as the language model sees each sentence, and more
SHOTS = 4


def sentences(part: str, seed: int = 0) -> pd.DataFrame:
    """Review sentences: the training part's differ from seed to seed, those that judge do not."""
    return data.reviews(part).sample(SENTENCES[part], random_state=seed if part == "train" else 0)


def tuned_on_labels(bench: Bench, rate: float, seed: int) -> nn.Module:
    """QLoRA on the answer's token alone; each sentence is seen once."""
    frame, answers = sentences("train", seed), prompts.answers(bench.tokenizer)
    asked = prompts.prompts(frame.text.tolist(), bench.tokenizer)
    parts = [[*ids, answers[label]] for ids, label in zip(asked, frame.label, strict=True)]
    rows = language.pack(parts, BASE.length, bench.tokenizer.pad_token_id, list(map(len, asked)))
    steps = math.ceil(len(rows) / BASE.batch_size)
    return bench.tuned("qlora", replace(BASE, learning_rate=rate, seed=seed, steps=steps), rows)


def asked_of_model(bench: Bench, model: nn.Module, part: str, shots: Sequence[tuple[str, int]] = ()) -> dict:
    frame = sentences(part)
    asked = prompts.prompts(frame.text.tolist(), bench.tokenizer, shots)
    return judged_labels(-language.label_losses(model, asked, prompts.answers(bench.tokenizer)), frame)


def asked_of_encoder(rate: float, seed: int, epochs: int, part: str) -> dict[str, float]:
    """Chapter 1's encoder, trained on the same sentences."""
    settings = sentiment.Settings(SENTENCES["train"], epochs, batch_size=16, learning_rate=rate, seed=seed)
    torch.manual_seed(seed)
    model, tokenizer = models.load_encoder()
    dataset = sentiment.ReviewDataset(sentences("train", seed), tokenizer)
    sentiment.fine_tune(model, sentiment.loader(dataset, tokenizer, settings.batch_size, seed), settings)
    judges = sentiment.ReviewDataset(frame := sentences(part), tokenizer)
    with torch.inference_mode():
        logits = model(**DataCollatorWithPadding(tokenizer)([judges[i] for i in range(len(judges))])).logits
    return judged_labels(logits, frame)


def judged_labels(logits: Tensor, frame: pd.DataFrame) -> dict[str, float]:
    labels, said = torch.tensor(frame.label.tolist()), logits.argmax(1)
    return {
        "accuracy": (said == labels).float().mean().item(),
        "says_fresh": said.float().mean().item(),
        "loss": nn.functional.cross_entropy(logits, labels).item(),
    }


def run_sentiment(journal: Journal, bench: Bench) -> None:
    def keys(model: str, **more: object) -> dict[str, object]:
        return {"part": "sentiment", "model": model} | more

    journal.run(keys("zero_shot"), lambda: asked_of_model(bench, bench.packed, "test"))
    for seed in SEEDS:
        frame = data.reviews("train").groupby("label").sample(SHOTS // 2, random_state=seed)
        shots = list(frame.sample(frac=1, random_state=seed)[["text", "label"]].itertuples(index=False, name=None))
        journal.run(keys("few_shot", seed=seed), lambda s=shots: asked_of_model(bench, bench.packed, "test", s))

    def lm(rate: float, seed: int, part: str) -> dict[str, float]:
        made = lambda: asked_of_model(bench, tuned_on_labels(bench, rate, seed), part)  # noqa: E731
        return journal.run(keys("tuned", judged_on=part, learning_rate=rate, seed=seed), made)

    rate = tuning.search(lambda r: lm(r, 0, "validation")["loss"], LM_LADDER, 0)
    for seed in SEEDS:
        lm(rate, seed, "test")
    for epochs in EPOCHS:

        def encoder(rate: float, seed: int, part: str, epochs: int = epochs) -> dict[str, float]:
            made = lambda: asked_of_encoder(rate, seed, epochs, part)  # noqa: E731
            settings = keys("encoder", epochs=epochs, judged_on=part, learning_rate=rate, seed=seed)
            return journal.run(settings, made)

        rate = tuning.search(lambda r, run=encoder: run(r, 0, "validation")["loss"], ENCODER_LADDER, 0)
        for seed in SEEDS:
            encoder(rate, seed, "test")


# --- plots -----------------------------------------------------------------------------------------------------------


def rates(journal: Journal, bench: Bench) -> dict[str, float]:
    """The best learning rate of each method and optimizer, one seed, on the validation part."""

    def loss(name: str, rate: float) -> float:
        method, optimizer = (name, BASE.optimizer) if name in KIND else ("qlora", name)
        settings = replace(BASE, method=KIND[method], learning_rate=rate, optimizer=optimizer)
        keys = {"part": "grid", "method": method, "optimizer": optimizer, "learning_rate": rate}
        made = journal.run(keys, lambda: finite(bench.judged(bench.tuned(method, settings), "validation")))
        return math.inf if made["loss"] is None else made["loss"]

    return {name: tuning.search(lambda r, n=name: loss(n, r), ladder, 1) for name, ladder in LADDERS.items()}


def run_main(journal: Journal, bench: Bench, chosen: Mapping[str, float]) -> None:
    base = lambda: bench.judged(bench.packed, "test")  # noqa: E731
    journal.run({"part": "main", "method": "untrained"}, base)
    for seed, method in [(s, m) for s in SEEDS for m, seeds in MAIN.items() if s in seeds]:
        rate = chosen[RATE_OF.get(method, method)]
        settings = replace(BASE, method=KIND[method], learning_rate=rate, seed=seed)

        def made(method: str = method, settings: Settings = settings) -> dict[str, object]:
            model = bench.tuned(method, settings)
            found = bench.judged(model, "test")
            rounded = bench.rounded(method, model)
            return found | ({"rounded": bench.judged(rounded, "test")} if rounded is not None else {})

        journal.run({"part": "main", "method": method, "learning_rate": rate, "seed": seed}, made)


def run_choices(journal: Journal, bench: Bench, rate: float) -> None:
    for name, (method, changes) in CHOICES.items():
        settings = replace(BASE, **{"learning_rate": rate} | changes)
        keys = {"part": "choice", "name": name, "method": method, "learning_rate": rate, "seed": settings.seed}
        made = lambda m=method, s=settings: finite(bench.judged(bench.tuned(m, s), "validation"))  # noqa: E731
        journal.run(keys, made)


def finite(measured: Mapping[str, float]) -> dict[str, float | None]:
    """A run that diverged has None."""
    return {name: value if math.isfinite(value) else None for name, value in measured.items()}


def main() -> None:
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", module="torch|peft|transformers")
    logging.disable_progress_bar()
    journal, bench = Journal("lm", CODE), Bench()
    chosen = rates(journal, bench)
    run_main(journal, bench, chosen)
    run_sentiment(journal, bench)
    run_choices(journal, bench, chosen["qlora"])
    print(f"wrote {journal.write().name}")


if __name__ == "__main__":
    main()
