"""Chapter 4's third sweep: `make sweeps NAME=seeds` writes `results/sweeps/seeds.json`; it needs the other two.

Three seeds left two questions open: does a teacher beside the labels help, and do rations chosen by need? Here are
three more seeds of just these contenders, at the settings of the first ones. Parts: "main" (direct, by loss) and
"budget" (three bits everywhere, allocated, at random).
"""

from functools import partial

import qft_utils.compat  # noqa: F401  first: transformers' Trainer imports torchvision

# isort: split
import torch
from sweep_rations import FILES as BEFORE
from sweep_schedules import Bench, at_widths, by_schedule, tables

from qft_utils import allocation
from qft_utils.sweeps import Journal, load_sweep

FILES = [*BEFORE, "experiments/sweep_seeds.py", "results/sweeps/rations.json"]
SEEDS = (3, 4, 5)


def main() -> None:
    torch.set_num_threads(2)
    first, second = (load_sweep(f"results/sweeps/{name}.json")["runs"] for name in ("schedules", "rations"))
    rates = {r["loss_of"]: r["learning_rate"] for r in first if r["part"] == "main" and r["schedule"] == "direct"}
    _, sizes = tables(next(r for r in second if r["part"] == "cost"))
    allocated = next(r["widths"] for r in second if r["part"] == "budget" and r["name"] == "allocated")
    budget = sum(of[3] for of in sizes.values())
    drawn = allocation.random_allocations(sizes, budget, count=SEEDS[-1] + 1, seed=0, slack=0.01)
    journal, bench = Journal("seeds", FILES), Bench()
    for seed in SEEDS:
        for loss in ("labels", "distillation"):
            keys = {"part": "main", "schedule": "direct", "loss_of": loss, "learning_rate": rates[loss], "seed": seed}
            model = partial(by_schedule, bench, "direct", loss, seed, rates[loss])
            journal.run(keys, lambda m=model: bench.reported(m()))
        for name, bits in {"3": 3, "allocated": allocated, "random": drawn[seed]}.items():
            rate = rates["label_free"]
            keys = {"part": "budget", "name": name, "widths": bits, "learning_rate": rate, "seed": seed}
            journal.run(keys, lambda b=bits, s=seed, r=rate: bench.reported(at_widths(bench, b, s, r)))
    print(f"wrote {journal.write().name}")


if __name__ == "__main__":
    main()
