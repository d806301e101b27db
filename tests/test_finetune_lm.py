"""The training script: one process and two, stopped and resumed, on a tiny packed model and a tiny dense one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from qft_utils import finetune_lm, gguf_files, language
from qft_utils.finetune_lm import Settings
from tests.tiny_gguf import CONFIG, write

SMALL = Settings(steps=6, batch_size=2, length=32, rank=4, lora_alpha=8, learning_rate=1e-2)
TEXTS = "\n\n".join(f"the {word} and the moth, {word * 3}" for word in ("path", "math", "bath", "oath") * 6)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text(TEXTS)
    return tmp_path / "texts.txt"


def rows(tokenizer, length=32):
    return language.pack(language.documents(TEXTS.split("\n\n"), tokenizer, length), length, tokenizer.pad_token_id)


def options(model, written, output, **changes):
    given = {"model": model, "texts": written, "output": output, "steps": 6, "batch-size": 2, "length": 32, "rank": 4}
    return [part for name, value in (given | changes).items() for part in (f"--{name}", str(value))]


def run(command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )  # fmt: skip


def losses_of(output):
    return json.loads((output / "losses.json").read_text())


def test_lora_learns_on_packed_weights_and_leaves_them_alone(file):
    model, tokenizer = gguf_files.load(file)
    before = [m.blocks() for m in model.modules() if isinstance(m, finetune_lm.Int4Linear)]
    tuned = finetune_lm.prepare(model, SMALL)
    losses = finetune_lm.train(tuned, rows(tokenizer), SMALL)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.2
    after = [m.blocks() for m in model.modules() if isinstance(m, finetune_lm.Int4Linear)]
    assert len(before) == 14 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_full_fine_tuning_of_a_dense_model(file):
    _, tokenizer = gguf_files.load(file)
    torch.manual_seed(0)
    settings = Settings(**vars(SMALL) | {"method": "full"})
    model = finetune_lm.prepare(LlamaForCausalLM(CONFIG), settings)
    losses = finetune_lm.train(model, rows(tokenizer), settings)
    assert losses[-1] < losses[0] - 0.2


def test_what_cannot_train_is_refused(file):
    model, tokenizer = gguf_files.load(file)
    with pytest.raises(ValueError, match="have no gradient; use lora"):
        finetune_lm.prepare(model, Settings(method="full"))
    with pytest.raises(ValueError, match="method 'prefix'"):
        finetune_lm.prepare(model, Settings(method="prefix"))


def test_processes_must_share_a_batch_evenly(file, monkeypatch):
    model, tokenizer = gguf_files.load(file)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="2 rows a step for 3 processes"):
        finetune_lm.train(model, rows(tokenizer), SMALL)


@pytest.mark.slow
def test_two_processes_do_what_one_does(file, texts, tmp_path):
    """To the tolerance of bf16, in which two halves of a batch are added up in another order."""
    module = ["-m", "qft_utils.finetune_lm"]
    one = run([sys.executable, *module, *options(file, texts, tmp_path / "one")])
    assert one.returncode == 0, one.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = run([*torchrun, *module, *options(file, texts, tmp_path / "two")])
    assert two.returncode == 0, two.stderr
    alone, together = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(alone) == len(together) == 6
    assert together == pytest.approx(alone, rel=2e-3)
    assert alone[-1] < alone[0]


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(file, texts, tmp_path):
    whole = options(file, texts, tmp_path / "whole")
    assert finetune_lm.main(whole) == 0
    stopped = options(file, texts, tmp_path / "stopped", **{"save-every": 3})
    # Killed after its fourth step: nothing but the checkpoint of the third is left.
    code = (
        "import os, sys\nfrom qft_utils import finetune_lm\nfrom transformers import TrainerCallback, Trainer\n"
        "step = Trainer.training_step\ncount = []\n"
        "def training_step(*a, **k):\n    count.append(1)\n    if len(count) == 5: os._exit(9)\n"
        "    return step(*a, **k)\n"
        "Trainer.training_step = training_step\nfinetune_lm.main(sys.argv[1:])"
    )
    assert run([sys.executable, "-c", code, *stopped]).returncode == 9
    assert [p.name for p in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    assert finetune_lm.main([*stopped, "--resume"]) == 0
    assert losses_of(tmp_path / "stopped") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-4)


def test_the_result_can_be_loaded_again(file, texts, tmp_path):
    from peft import PeftModel

    assert finetune_lm.main(options(file, texts, tmp_path / "out")) == 0
    model, _ = gguf_files.load(file)
    before = model(torch.tensor([[1, 2, 3]])).logits
    tuned = PeftModel.from_pretrained(model, tmp_path / "out")
    assert not torch.equal(tuned(torch.tensor([[1, 2, 3]])).logits, before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"texts": "nowhere.txt"}, "nowhere.txt is no file"),
        ({"model": "nowhere.gguf"}, "nowhere.gguf is not there"),
        ({"method": "full"}, "have no gradient"),
        ({"length": 1}, "length 1 leaves nothing"),
    ],
)
def test_errors_are_one_line(file, texts, tmp_path, capsys, change, message):
    assert finetune_lm.main(options(**{"model": file, "written": texts, "output": tmp_path / "out"} | change)) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_empty_file_of_texts(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        finetune_lm.read_texts(str(tmp_path / "empty.txt"))


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune_lm.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name.replace('_', '-')}" in shown for name in vars(SMALL))
