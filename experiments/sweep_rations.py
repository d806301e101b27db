"""Chapter 4's second sweep: `make sweeps NAME=rations` writes `results/sweeps/rations.json`; it needs schedules.json.

Parts: "cost" (sensitivities with fresh steps, and bytes), "budget" (allocated by them, and at random, at the bytes of
three bits everywhere), "grid" and "eight" (eight bits directly, at a learning rate of its own: the rival of a rising
schedule), "late" (a falling schedule that leaves five eighths of its steps to two bits), "rates" (labels and the
teacher alone, direct, at three learning rates with three seeds, on the validation part: did the grid's single runs,
judged by their loss, choose well?).
"""

from functools import partial

import qft_utils.compat  # noqa: F401  first: transformers' Trainer imports torchvision

# isort: split
import torch
from sweep_schedules import BEGIN, CODE, RATES, SEEDS, STEPS, WIDTHS, Bench, at_widths, by_schedule, tables, tried

from qft_utils import allocation, evidence, narrowing, schedules, tuning
from qft_utils.narrowing import Settings
from qft_utils.sweeps import Journal, load_sweep

FILES = [*CODE, "experiments/sweep_rations.py", "qft_utils/evidence.py", "results/sweeps/schedules.json"]
LATE = schedules.falling((8, 4, 3, 2), STEPS, shares=(1, 1, 1, 5))


def measured(bench: Bench) -> dict[str, dict]:
    """KL to the float model when one layer alone is narrowed, nats a sentence, and the bytes of each width."""
    batches = narrowing.calibration_batches(bench.tokenizer, 96, seed=1)
    student, score = bench.student(0), allocation.kl_to(narrowing.Unpacked(bench.teacher), batches)
    cost = evidence.fresh_sensitivity(student, lambda model: score(narrowing.Unpacked(model)), WIDTHS)
    return {"cost": cost, "sizes": evidence.body_sizes(student, WIDTHS)}


def falling_late(bench: Bench, rate: float, seed: int) -> dict[str, float]:
    student, settings = bench.student(seed), Settings(rate, seed=seed)
    return bench.reported(narrowing.train(student, bench.examples, bench.tokenizer, settings, LATE))


def main() -> None:
    torch.set_num_threads(2)
    runs = load_sweep("results/sweeps/schedules.json")["runs"]
    rates = {(r["schedule"], r["loss_of"]): r["learning_rate"] for r in runs if r["part"] == "main"}
    journal, bench, rate = Journal("rations", FILES), Bench(), rates["direct", "label_free"]
    stored = journal.run({"part": "cost"}, partial(measured, bench))
    cost, sizes = tables(stored)
    budget = sum(of[3] for of in sizes.values())
    allocated = allocation.allocate(cost, sizes, budget)
    drawn = allocation.random_allocations(sizes, budget, count=len(SEEDS), seed=0, slack=0.01)
    for seed in SEEDS:
        for name, bits in {"allocated": allocated, "random": drawn[seed]}.items():
            keys = {"part": "budget", "name": name, "widths": bits, "learning_rate": rate, "seed": seed}
            journal.run(keys, lambda b=bits, s=seed: bench.reported(at_widths(bench, b, s, rate)))

    def loss_at(rate: float) -> float:
        keys = {"part": "grid", "schedule": "direct_w8", "loss_of": "label_free", "learning_rate": rate}
        return journal.run(keys, partial(tried, bench, partial(at_widths, bench, 8, 0), rate))["loss"]

    own = tuning.search(loss_at, RATES, BEGIN)
    for seed in SEEDS:
        keys = {"part": "eight", "learning_rate": own, "seed": seed}
        journal.run(keys, lambda s=seed: bench.reported(at_widths(bench, 8, s, own)))
        keys = {"part": "late", "learning_rate": rates["falling", "labels"], "seed": seed}
        journal.run(keys, partial(falling_late, bench, rates["falling", "labels"], seed))
    for seed in SEEDS:
        for tried_rate in RATES[1:4]:
            for loss in ("labels", "label_free"):
                keys = {"part": "rates", "loss_of": loss, "learning_rate": tried_rate, "seed": seed}
                model = partial(by_schedule, bench, "direct", loss, seed, tried_rate)
                journal.run(keys, lambda m=model: bench.judged(m(), "validation"))
    print(f"wrote {journal.write().name}")


if __name__ == "__main__":
    main()
