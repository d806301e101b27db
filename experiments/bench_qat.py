"""One training step of EfficientNet-Lite0 under each kind of quantization-aware training: time and peak memory.

`make bench` runs it and writes `results/bench_qat.json`. Every contender does the same work on the same batch (64
pictures of 64 pixels, AdamW, cross-entropy, two threads) and takes its turn in every round. The peak memory of each is
that of a process of its own. Weights are random: time does not depend on them.
"""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import qft_utils.compat  # noqa: F401  first: timm imports torchvision

# isort: split
import timm
import torch
from torch import nn

from qft_utils import measure, qat, storage

SIZE, BATCH, CLASSES, ROUNDS = 64, 64, 10, 30


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("efficientnet_lite0", num_classes=CLASSES).to(memory_format=torch.channels_last).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(memory_format=torch.channels_last)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def ours() -> nn.Module:
    return qat.prepare(network())


def ours_learned_step() -> nn.Module:
    return qat.prepare(network(), learned_step=True)


def eager() -> nn.Module:
    """Matches exact types, so timm's batch norm (a subclass) stays beside the convolution, unfolded."""
    model = network()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(model)


def fx() -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(network(), get_default_qat_qconfig_mapping("x86"), (batch()[0],))


def pt2e() -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(network(), (batch()[0],)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return move_exported_model_to_train(prepare_qat_pt2e(exported, quantizer))


def compiled(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: torch.compile(build())


EAGERLY = {"float32": network, "ours": ours, "ours_learned_step": ours_learned_step, "eager": eager, "fx": fx,
           "pt2e": pt2e}  # fmt: skip
COMPILED = {"float32_compiled": compiled(network), "ours_compiled": compiled(ours)}
CONTENDERS = EAGERLY | COMPILED


def make_step(model: nn.Module) -> Callable[[], None]:
    x, y = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory_mb(name: str) -> float:
    """Peak resident memory of a process that takes five steps of one contender."""
    command = [sys.executable, __file__, "--peak", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")  # the deprecated routes say so at every call; the chapter shows it
    if sys.argv[1:2] == ["--peak"]:
        step = make_step(CONTENDERS[sys.argv[2]]())
        for _ in range(5):
            step()
        print(storage.peak_memory_mb())
        return
    start = time.perf_counter()
    peaks = {name: peak_memory_mb(name) for name in CONTENDERS}
    steps = {}
    for name, build in CONTENDERS.items():
        print(f"preparing {name}", flush=True)
        steps[name] = make_step(build())
    times = measure.latency(steps, rounds=ROUNDS, warmup=3)
    rows = {}
    for name, timed in times.items():
        ratio = measure.speed_ratio(timed, times["float32"])
        rows[name] = {"median_ms": timed.median, "q1_ms": timed.q1, "q3_ms": timed.q3, "peak_memory_mb": peaks[name]}
        rows[name]["ratio_to_float32"] = ratio.as_dict()
        print(f"{name:20s}{timed.median:8.0f} ms  x{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]", flush=True)
    content = {"benchmark": "one training step of EfficientNet-Lite0", "pixels": SIZE, "batch": BATCH}
    content |= {"rounds": ROUNDS, "environment": storage.environment(), "seconds": time.perf_counter() - start}
    path = storage.ROOT / "results" / "bench_qat.json"
    storage.write_json(path, json.loads(json.dumps(content | {"contenders": rows})))
    print(f"wrote {path.relative_to(storage.ROOT)}")


if __name__ == "__main__":
    main()
