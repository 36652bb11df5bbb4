"""One training step of Hugging Face transformers (and PEFT) on the CPU, timed: what tunesmith is measured against.

`cargo xtask bench-peer --python PYTHON` calls this; by hand:

    python docs/bench/peer_train.py --model FOLDER_OR_GGUF --method lora --batch 4 --seq 512 --steps 4
    python docs/bench/peer_train.py --model FOLDER_OR_GGUF --method lora --batch 32 --data ROWS.jsonl

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


def padded_batches(args) -> list:
    """The rows of --data in their order, --batch at a time, padded to the longest of each batch; padding carries no loss.

    A row is its text and an end token, as the other program trains it; all but its first token are predicted.
    """
    gguf = dict(gguf_file=args.model.name) if args.model.suffix == ".gguf" else {}
    folder = args.model.parent if gguf else args.model
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **gguf)
    texts = [json.loads(line)["text"] for line in args.data.read_text(encoding="utf-8").splitlines()]
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    batches = []
    for start in range(0, len(rows), args.batch):
        part = rows[start : start + args.batch]
        longest = max(map(len, part))

        def pad(values: list, filler: int) -> list:
            return values + [filler] * (longest - len(values))

        batches.append(
            dict(
                input_ids=torch.tensor([pad(row, tokenizer.eos_token_id) for row in part]),
                attention_mask=torch.tensor([pad([1] * len(row), 0) for row in part]),
                labels=torch.tensor([pad(row, -100) for row in part]),
            )
        )
    return batches


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--method", choices=["lora", "full"], required=True)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a row (random tokens only)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps (random tokens only)")
    parser.add_argument("--ckpt", action="store_true", help="gradient checkpointing: recompute every block")
    parser.add_argument("--data", type=Path, help='JSON rows with "text": train on each once, in padded batches')
    args = parser.parse_args()

    torch.manual_seed(0)
    model = load(args.model)
    vocabulary = model.config.vocab_size
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    if args.ckpt:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
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

    def step(batch: dict) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    if args.data:
        batches = padded_batches(args)
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        step(batches[0])
        seconds = [step(batch) for batch in batches]
        speed = sum(counts) / sum(seconds)
        best = max(count / second for count, second in zip(counts, seconds))
        padded = sum(batch["input_ids"].numel() for batch in batches)
        data = dict(steps=len(batches), trained_tokens=sum(counts), padded_tokens=padded)
    else:

        def random_batch() -> dict:
            ids = torch.randint(0, vocabulary, (args.batch, args.seq))
            return dict(input_ids=ids, labels=ids)

        step(random_batch())  # warms up: allocations, thread pools, code paths chosen at first use
        seconds = [step(random_batch()) for _ in range(args.steps)]
        tokens = args.batch * args.seq
        speed, best, data = tokens / statistics.median(seconds), tokens / min(seconds), {}
    result = dict(
        method=args.method,
        batch=args.batch,
        seq=args.seq,
        threads=torch.get_num_threads(),
        tokens_per_s=round(speed, 1),
        best=round(best, 1),
        peak_rss_gb=round(peak_memory_gb(), 2),
        versions=versions,
        **data,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
