"""A draft, not yet run: chapter 5's runs. As sweep_lm.py, `make sweeps NAME=lm` would write results/sweeps/lm.json.

All of them fine-tune the packaged model on plots for the same steps, and are judged by perplexity on plots of other
films. Parts, by the name in `part`: "grid" (a learning rate for each method, on the validation part), "main" (methods,
three seeds, the test part; QLoRA also merged and rounded again), "choice" (schedule, weight decay, warm-up, rank and
the adapters' beginning, one change at a time from QLoRA or LoRA, on the validation part; optimizers are in the grid).
Methods: "qlora" (LoRA on packed integers), "lora_float" (on the dequantized copy), "full" (all of its weights), "qat"
(all of its weights, rounded to torchao's int4 in groups of 32 in every step, and converted in the end).
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import qft_utils.compat  # noqa: F401  first: peft and Trainer import torchvision

# isort: split
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig
from transformers import AutoModelForCausalLM, GgufConfig

from qft_utils import assets, data, finetune_lm, gguf_files, language, tuning
from qft_utils.finetune_lm import PACKAGED, Settings
from qft_utils.packed import Int4Linear
from qft_utils.sweeps import Journal

CODE = ["experiments/draft_sweep_lm.py"]
CODE += [f"qft_utils/{n}.py" for n in ("data", "finetune_lm", "gguf_blocks", "gguf_files", "language", "packed")]
CODE += [f"qft_utils/{n}.py" for n in ("packed_base", "packed_tables", "tuning")]

NAME = "SmolLM2-135M-Instruct"
SEEDS = (0, 1, 2)
METHODS = {"qlora": "lora", "lora_float": "lora", "full": "full", "qat": "full"}
LADDERS = {"lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)}  # begin in the middle
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
BASE = Settings(steps=30)
JUDGES = {"validation": 80, "test": 200}  # documents, drawn once
OPTIMIZERS = {"sgd": (0.1, 0.3, 1.0, 3.0, 10.0), "adafactor": LADDERS["lora"]}  # with rates of their own
CHOICES = {  # by name: the method, and what is changed; the learning rate stays
    "qlora": ("qlora", {}), "cosine": ("qlora", {"schedule": "cosine"}),
    "constant": ("qlora", {"schedule": "constant_with_warmup"}), "no warm-up": ("qlora", {"warmup": 0.0}),
    "weight decay 0.1": ("qlora", {"weight_decay": 0.1}), "rank 4": ("qlora", {"rank": 4, "lora_alpha": 8}),
    "lora_float": ("lora_float", {}), "pissa": ("lora_float", {"init": "pissa"}),
}  # fmt: skip


class Bench:
    """The rows that all runs train on, and the documents that judge them."""

    def __init__(self) -> None:
        self.path = assets.locate(NAME) / PACKAGED[NAME]
        _, self.tokenizer = gguf_files.load(self.path)
        documents = self.documents("train")
        self.rows = language.pack(documents, BASE.length, self.tokenizer.pad_token_id)
        self.parts = {part: self.documents(part) for part in ("validation", "test")}

    def documents(self, part: str) -> list[list[int]]:
        texts = data.plots(part).text
        if part in JUDGES:
            texts = texts.sample(JUDGES[part], random_state=0)
        return language.documents(texts.tolist(), self.tokenizer, BASE.length)

    def base(self, method: str) -> nn.Module:
        if method == "qlora":
            return gguf_files.load(self.path)[0]
        dequantized = GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(
            self.path.parent, gguf_file=self.path.name, quantization_config=dequantized
        )

    def tuned(self, method: str, settings: Settings) -> nn.Module:
        model = finetune_lm.prepare(self.base(method), settings)
        if method == "qat":
            quantize_(model, QATConfig(INT4, step="prepare"), filter_fn=_inner)
        finetune_lm.train(model, self.rows, settings)
        if method == "qat":
            quantize_(model, QATConfig(INT4, step="convert"), filter_fn=_inner)
        return model

    def judged(self, model: nn.Module, part: str, prefix: str = "") -> dict[str, float]:
        losses = language.document_losses(model, self.parts[part])
        value = language.perplexity(losses)
        mean = sum(losses.nats) / sum(losses.tokens)
        return {f"{prefix}{k}": v for k, v in (value.as_dict() | {"loss": mean}).items()}


def _inner(module: nn.Module, name: str) -> bool:
    """Linear layers but the head, whose weight is the word table's."""
    return isinstance(module, nn.Linear) and "lm_head" not in name


def merged_losses(bench: Bench, model: nn.Module, part: str) -> dict[str, float]:
    """The adapters added to the integers and rounded to them again."""
    into = bench.base("qlora")
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            whole = module.base_layer.dequantize() + module.get_delta_weight("default").float()
            into.set_submodule(name, Int4Linear.from_float(whole))
    return bench.judged(into, part, "merged_")


def main() -> None:
    torch.set_num_threads(2)
    journal, bench, chosen = Journal("lm", CODE), Bench(), {}

    def tried(method: str, rate: float, optimizer: str = BASE.optimizer) -> float:
        settings = replace(BASE, method=METHODS[method], learning_rate=rate, optimizer=optimizer)
        keys = {"part": "grid", "method": method, "optimizer": optimizer, "learning_rate": rate}
        loss = journal.run(keys, lambda: finite(bench.judged(bench.tuned(method, settings), "validation")))["loss"]
        return math.inf if loss is None else loss

    for method, kind in METHODS.items():
        chosen[method] = tuning.search(lambda rate, m=method: tried(m, rate), LADDERS[kind], 1)
    for optimizer, ladder in OPTIMIZERS.items():
        tuning.search(lambda rate, o=optimizer: tried("qlora", rate, o), ladder, 1)
    for seed in SEEDS:
        for method, kind in METHODS.items():
            settings = replace(BASE, method=kind, learning_rate=chosen[method], seed=seed)

            def made(m: str = method, s: Settings = settings) -> dict[str, float]:
                model = bench.tuned(m, s)
                return bench.judged(model, "test") | (merged_losses(bench, model, "test") if m == "qlora" else {})

            journal.run({"part": "main", "method": method, "learning_rate": chosen[method], "seed": seed}, made)
    for name, (method, changes) in CHOICES.items():
        settings = replace(BASE, **{"learning_rate": chosen[method]} | changes)
        keys = {"part": "choice", "name": name, "method": method, "seed": settings.seed}
        journal.run(keys, lambda m=method, s=settings: finite(bench.judged(bench.tuned(m, s), "validation")))
    print(f"wrote {journal.write().name}")


def finite(measured: Mapping[str, float]) -> dict[str, float | None]:
    """A run that diverged has None."""
    return {name: value if math.isfinite(value) else None for name, value in measured.items()}


if __name__ == "__main__":
    main()
