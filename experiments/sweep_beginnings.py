"""A learning rate of its own for PiSSA: results/sweeps/beginnings.json. `make sweeps NAME=beginnings`, three minutes.

`sweep_lm.py` gave PiSSA the rate that is best for LoRA, and there it all but diverged: its adapters begin with the
largest directions of the weights, so the same rate moves much more. Here it has a ladder, as every other method had;
seen after that first run, which the chapter says. One seed, the validation part.
"""

import warnings
from dataclasses import replace

import torch
from sweep_lm import BASE, CODE, Bench, finite
from transformers.utils import logging

from qft_utils import tuning
from qft_utils.sweeps import Journal

LADDER = (3e-5, 1e-4, 3e-4, 1e-3)  # 3e-3 is in the other sweep


def main() -> None:
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", module="torch|peft|transformers")
    logging.disable_progress_bar()
    journal, bench = Journal("beginnings", ["experiments/sweep_beginnings.py", *CODE]), Bench()

    def loss(rate: float) -> float:
        settings = replace(BASE, init="pissa_niter_4", learning_rate=rate)
        keys = {"part": "grid", "method": "pissa", "learning_rate": rate}
        made = journal.run(keys, lambda: finite(bench.judged(bench.tuned("lora_float", settings), "validation")))
        return made["loss"]

    tuning.search(loss, LADDER, 1)
    print(f"wrote {journal.write().name}")


if __name__ == "__main__":
    main()
