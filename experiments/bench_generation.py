"""Generation with SmolLM2-135M, a token at a time: what each way of keeping the weights costs in time.

`make bench NAME=generation` runs it and writes `results/bench_generation.json`. "eager" is transformers' `generate`;
"compiled" is a plain loop over a static cache whose step went through torch.compile. All are greedy from the same
prompt, in turns, on two threads. NF4 is made from the dequantized Q4_1 file, so it is a second quantization.
"""

import copy
import json
import time
import warnings
from collections.abc import Callable

import qft_utils.compat  # noqa: F401  first: transformers imports torchvision

# isort: split
import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torchao.quantization import to_nf4
from transformers import AutoModelForCausalLM, GgufConfig, StaticCache

from qft_utils import assets, gguf_files, measure, storage
from qft_utils.finetune_lm import PACKAGED

NAME, TOKENS, ROUNDS, PROMPT = "SmolLM2-135M-Instruct", 64, 9, "Once upon a time, a detective"


def models() -> tuple[dict[str, nn.Module], Tensor]:
    path = assets.locate(NAME) / PACKAGED[NAME]
    packed, tokenizer = gguf_files.load(path)
    exact = GgufConfig(dequantize=True)
    dense = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, quantization_config=exact).eval()
    half = copy.deepcopy(dense).bfloat16()
    made = {"float32": dense, "bf16": half, "packed_q4": packed, "nf4_bitsandbytes": with_bitsandbytes(half)}
    return made | {"nf4_torchao": with_torchao(half)}, tokenizer(PROMPT, return_tensors="pt").input_ids


def with_bitsandbytes(model: nn.Module) -> nn.Module:
    def layer(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        return made.to("cpu")

    return with_layers(model, layer)


def with_torchao(model: nn.Module) -> nn.Module:
    def layer(linear: nn.Linear) -> nn.Module:
        made = nn.Linear(linear.in_features, linear.out_features, bias=False)
        made.weight = nn.Parameter(to_nf4(linear.weight.detach(), 64, 64), requires_grad=False)
        return made

    return with_layers(model, layer)


def with_layers(model: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy whose linear layers, but for the head, are made anew."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, layer(module))
    return model.eval()


def eager(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        made = model.generate(ids, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return made[:, ids.shape[1] :]

    return call


def compiled(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    cache = StaticCache(config=model.config, max_cache_len=128)

    def step(token: Tensor, position: Tensor) -> Tensor:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    fast = torch.compile(step)

    def call() -> Tensor:
        cache.reset()
        tokens = [step(ids, torch.arange(ids.shape[1])[None])]
        for place in range(ids.shape[1], ids.shape[1] + TOKENS - 1):
            tokens.append(fast(tokens[-1], torch.tensor([[place]])))
        return torch.cat(tokens, 1)

    return call


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    made, ids = models()
    calls, compile_seconds = {f"{name}, eager": eager(model, ids) for name, model in made.items()}, {}
    for name in ("float32", "bf16", "packed_q4"):
        call, begin = compiled(made[name], ids), time.perf_counter()
        if not torch.equal(call(), calls[f"{name}, eager"]()):
            print(f"{name}: the compiled loop says other tokens than the eager one")  # bf16 rounds in another order
        compile_seconds[f"{name}, compiled"] = round(time.perf_counter() - begin, 1)
        calls[f"{name}, compiled"] = call
    times, rows = measure.latency(calls, rounds=ROUNDS, warmup=1), {}
    for name, timed in times.items():
        ratio = measure.speed_ratio(times["float32, eager"], timed)
        rows[name] = {"median_ms": timed.median, "q1_ms": timed.q1, "q3_ms": timed.q3, "speed": ratio.as_dict()}
        rows[name]["compile_seconds"] = compile_seconds.get(name)
        print(f"{name:26s}{TOKENS * 1000 / timed.median:6.1f} tokens/s  x{ratio.value:.2f}", flush=True)
    content = {"benchmark": "generation, a token at a time", "model": NAME, "tokens": TOKENS, "rounds": ROUNDS}
    content |= {"environment": storage.environment(), "seconds": time.perf_counter() - start}
    path = storage.ROOT / "results" / "bench_generation.json"
    storage.write_json(path, json.loads(json.dumps(content | {"contenders": rows})))
    print(f"wrote {path.relative_to(storage.ROOT)}")


if __name__ == "__main__":
    main()
