"""Makes reference.json: numbers of transformers for a small model with random weights.

    tunesmith init --config config.json --seed 11 --out model     (config.json: the "config" of reference.json)
    python reference.py model reference.json > new.json

The weights and rows are those of the old file, so that only what transformers computes from them is new. f32 on a
processor; AdamW with a learning rate of 1e-3, without decay, clipped at a norm of 1. The greedy tokens are the largest
logits of the whole prefix, token by token.
"""

import json
import sys

import torch
import transformers
from transformers import LlamaForCausalLM

folder, old = sys.argv[1], json.load(open(sys.argv[2]))
load = lambda: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
model = load()
rows = torch.tensor(old["rows"])
new = {
    "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}, f32 on a CPU",
    "config": old["config"],
    "seed": old["seed"],
    "rows": old["rows"],
}

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
curve = []
for step in range(len(old["curve"])):
    optimizer.zero_grad()
    output = model(input_ids=rows, labels=rows)
    output.loss.backward()
    if step == 0:
        new["loss"] = output.loss.item()
        new["logits_every_13th_of_the_last"] = [x for row in output.logits for x in row[-1, ::13].tolist()]
        new["gradient_norms"] = {name: p.grad.double().norm().item() for name, p in model.named_parameters()}
    curve.append([output.loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()])
    optimizer.step()

model = load()
ids = list(old["greedy"]["prompt"])
with torch.no_grad():
    while len(ids) < len(old["greedy"]["prompt"]) + len(old["greedy"]["new"]):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
new["greedy"] = {"prompt": old["greedy"]["prompt"], "new": ids[len(old["greedy"]["prompt"]):]}
new["curve"] = curve
print(json.dumps(new, separators=(",", ":")))
