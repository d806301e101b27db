"""Fine-tune a causal language model: LoRA on a packed four-bit GGUF file (QLoRA), LoRA or everything on a dense model.

    python -m qft_utils.finetune_lm --texts plots --output tuned              # the book's packaged model
    torchrun --nproc-per-node 2 -m qft_utils.finetune_lm --texts plots --output tuned
    python -m qft_utils.finetune_lm --output tuned ... --resume              # goes on from the last checkpoint

However many processes share the work, `--batch-size` is what they do in one step together, so the result is the same.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import qft_utils.compat  # noqa: F401  first: peft and Trainer import torchvision

# isort: split
import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from qft_utils import assets, data, gguf_files, language, models, storage
from qft_utils.packed import Int4Linear

PACKAGED = {"SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct.Q4_1.gguf"}


@dataclass(frozen=True)
class Settings:
    """One training. On a packed model `lora` is QLoRA."""

    method: str = "lora"  # or full
    steps: int = 100
    batch_size: int = 4  # rows a step, over all processes
    length: int = 128  # tokens a row
    learning_rate: float = 1e-3
    schedule: str = "linear"  # as transformers names them: cosine, constant_with_warmup, ...
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.0
    optimizer: str = "adamw_torch"  # as transformers names them: sgd, adafactor, ...
    rank: int = 16
    lora_alpha: int = 32
    init: str = "true"  # of the adapters: true is LoRA's own, zeros in B; pissa, ... as peft names them
    seed: int = 0


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer: a GGUF file, packed; a folder, or a hub's name, dense. Raises as the loaders do."""
    if name in PACKAGED:
        return gguf_files.load(assets.locate(name) / PACKAGED[name])
    if name.endswith(".gguf"):
        return gguf_files.load(name)
    if not Path(name).is_dir():
        return models.load_causal_lm(name)
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def prepare(model: PreTrainedModel, settings: Settings) -> torch.nn.Module:
    """The model with what trains: adapters on every linear layer but the head, or, by `full`, all of its own weights.

    Raises ValueError for `full` on packed integers, which no gradient can move, and for an unknown method.
    """
    packed = any(isinstance(module, Int4Linear) for module in model.modules())
    set_seed(settings.seed)
    if settings.method == "lora":
        init = {"true": True, "false": False}.get(settings.init, settings.init)
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM",
            init_lora_weights=init,
        )  # fmt: skip
        return get_peft_model(model, config)
    if settings.method != "full":
        raise ValueError(f"method {settings.method!r}: lora or full")
    if packed:
        raise ValueError("method full: packed four-bit integers have no gradient; use lora, or load the model dense")
    return model.requires_grad_(True)


def train(
    model: torch.nn.Module,
    rows: datasets.Dataset,
    settings: Settings,
    output: str | Path | None = None,
    resume: bool = False,
    save_every: int = 50,
    **arguments: Any,
) -> list[float]:
    """Train in place on rows of `language.pack`, under bf16 autocast; returns the loss of each step, nats a token.

    output: a folder for checkpoints, from whose last one `resume` goes on; without it nothing is saved.
    arguments: further `TrainingArguments`. Raises ValueError where the processes do not share a batch evenly.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % world:
        raise ValueError(f"{settings.batch_size} rows a step for {world} processes: the batch size must be a multiple")
    cpu = not torch.cuda.is_available()
    chosen = {
        "output_dir": str(output or "unsaved"), "max_steps": settings.steps, "seed": settings.seed, "bf16": True,
        "per_device_train_batch_size": settings.batch_size // world, "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule, "warmup_steps": settings.warmup, "optim": settings.optimizer,
        "weight_decay": settings.weight_decay, "logging_steps": 1, "report_to": [], "use_cpu": cpu,
        "ddp_backend": "gloo" if cpu and world > 1 else None, "save_steps": save_every, "save_total_limit": 2,
        "save_strategy": "steps" if output else "no", "disable_tqdm": not sys.stderr.isatty(),
    }  # fmt: skip
    trainer = Trainer(
        model, TrainingArguments(**chosen | arguments), data_collator=default_data_collator, train_dataset=rows
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume and output is not None and any(Path(output).glob("checkpoint-*")))
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def read_texts(name: str) -> list[str]:
    """`plots`: the book's training plots; else a UTF-8 file of documents with an empty line between them.

    Raises ValueError for a file without a document, FileNotFoundError for one that is not there.
    """
    if name == "plots":
        return data.plots("train").text.tolist()
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is no file: name one, or say `plots` for the book's own")
    found = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    if not found:
        raise ValueError(f"{name} holds no text: put documents into it, with an empty line between them")
    return found


def parser() -> argparse.ArgumentParser:
    """The options: one for each of `Settings`, with its default."""
    made = argparse.ArgumentParser("python -m qft_utils.finetune_lm", description=__doc__.splitlines()[0])
    made.add_argument("--model", default="SmolLM2-135M-Instruct", help="a .gguf file, a folder, or a hub's name")
    made.add_argument("--texts", required=True, help="`plots`, or a file: documents with an empty line between them")
    made.add_argument("--output", required=True, help="folder for checkpoints, the result and its losses")
    made.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    made.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    for field in fields(Settings):
        made.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default,
                          help=f"default: {field.default}")  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, then write the adapter or the model, and `losses.json`, into the output folder."""
    options = parser().parse_args(arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    try:
        model, tokenizer = load(options.model)
        parts = language.documents(read_texts(options.texts), tokenizer, settings.length)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        rows = language.pack(parts, settings.length, pad)
        model = prepare(model, settings)
        losses = train(model, rows, settings, options.output, options.resume, options.save_every)
    except (ValueError, FileNotFoundError, assets.MissingAsset, assets.CorruptAsset) as error:
        print(error, file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        storage.write_json(Path(options.output) / "losses.json", losses)
        print(f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
