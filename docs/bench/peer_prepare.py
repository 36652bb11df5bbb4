"""Rows of JSONL to token ids by Hugging Face datasets and a fast tokenizer: what `tunesmith prepare` is measured against.

`cargo xtask bench-prepare --python PYTHON` calls this; by hand:

    python docs/bench/peer_prepare.py --tokenizer FOLDER --data ROWS.jsonl

Needs datasets and transformers. Every row becomes the ids of its text and an end token, in batches of a thousand rows and
--processes processes, as `datasets.map` is used before training. Packing is not done here. Prints one line of JSON.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import transformers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(args.tokenizer))
    end = tokenizer.eos_token_id

    def tokenize(batch: dict) -> dict:
        ids = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [row + [end] for row in ids]}

    with tempfile.TemporaryDirectory(dir=args.data.parent) as cache:
        start = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(args.data), split="train", cache_dir=cache)
        loaded = time.perf_counter()
        tokens = rows.map(
            tokenize, batched=True, num_proc=args.processes, remove_columns=rows.column_names, load_from_cache_file=False
        )
        done = time.perf_counter()
        # From the columns themselves, after the clock has stopped.
        count = sum(len(column.flatten()) for column in tokens.data.column("input_ids").chunks)
    # Kilobytes on Linux. The processes of the map are children; each has about as much as the largest.
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        json.dumps(
            {
                "rows": len(rows),
                "tokens": count,
                "load_s": loaded - start,
                "map_s": done - loaded,
                "rss_gb": (own + args.processes * child) / 1e6,
                "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
