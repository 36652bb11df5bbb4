"""One training step of Hugging Face transformers (and PEFT) on the CPU, timed: what tunesmith is measured against.

`cargo xtask bench-peer --python PYTHON` calls this; by hand:

    python docs/bench/peer_train.py --model FOLDER_OR_GGUF --method lora --batch 4 --seq 512 --steps 4

Needs torch, transformers and peft (and gguf for a .gguf file). Prints one line of JSON.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers


def load(source: Path):
    """The model in f32 with PyTorch's fused attention, which is the fastest it has on a CPU."""
    options = dict(dtype=torch.float32, attn_implementation="sdpa")
    if source.suffix == ".gguf":
        folder = source.parent
        options["gguf_file"] = source.name
    else:
        folder = source
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)
    model.config.use_cache = False
    return model


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--method", choices=["lora", "full"], required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = load(args.model)
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    if args.method == "lora":
        import peft

        versions["peft"] = peft.__version__
        adapter = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, adapter)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)

    def step() -> float:
        ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq))
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    step()  # warms up: allocations, thread pools, code paths chosen at first use
    seconds = [step() for _ in range(args.steps)]
    tokens = args.batch * args.seq
    result = dict(
        method=args.method,
        batch=args.batch,
        seq=args.seq,
        threads=torch.get_num_threads(),
        tokens_per_s=round(tokens / statistics.median(seconds), 1),
        best=round(tokens / min(seconds), 1),
        peak_rss_gb=round(peak_memory_gb(), 2),
        versions=versions,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
