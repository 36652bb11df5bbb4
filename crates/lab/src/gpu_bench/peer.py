"""One training step of `tunesmith gpu-bench` in transformers + PEFT, timed.

Reads a JSON object from standard input and writes one to standard output:

    config      fields of a Llama config.json
    method      "lora" (rank 16 on all linear layers), "qlora" (the same over NF4 with double quantisation), or "full"
    tokens      tokens of a step, one document
    steps       steps that are timed, after some to warm up
    optim       "adamw", or "adamw_8bit": bitsandbytes' AdamW with moments of 8 bits
    dtype       "bf16" or "f32"
    checkpointing   whether blocks run a second time in the backward pass; done anyway where memory does not suffice otherwise
    compile     whether the model goes through torch.compile
    device      such as "cuda:0" or "cpu"

A step is: zero gradients, forward with the mean cross-entropy of all tokens, backward, clip at 1, AdamW.
"""

import json
import sys
import time

import peft
import torch
import transformers


def random_model(case, device, dtype):
    """Random weights, made where they are used; a full model keeps f32 weights, as mixed precision does."""
    config = transformers.LlamaConfig(**case["config"])
    kept = torch.float32 if case["method"] == "full" else dtype
    torch.set_default_dtype(kept)
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    return model


def quantise(model, device):
    """Linear layers of the blocks in NF4 with double quantisation."""
    import bitsandbytes as bnb

    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                new = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=linear.weight.dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                new.weight = bnb.nn.Params4bit(
                    linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                setattr(part, name, new.to(device))
    return model


def trained(case, device, dtype, checkpointing):
    model = random_model(case, device, dtype)
    if case["method"] == "qlora":
        model = quantise(model, device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case["method"] != "full":
        if checkpointing:
            model.enable_input_require_grads()
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    model.train()
    return model


def measure(case, device, dtype, checkpointing):
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(1)
    model = trained(case, device, dtype, checkpointing)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case["optim"] == "adamw_8bit":
        import bitsandbytes as bnb

        optimizer = bnb.optim.AdamW8bit(parameters, lr=1e-5, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=on_gpu)
    ids = torch.randint(case["config"]["vocab_size"], (1, case["tokens"]), device=device)
    run = torch.compile(model) if case["compile"] else model

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    def wait():
        if on_gpu:
            torch.cuda.synchronize(device)

    first_loss = float(step())
    for _ in range(4 if case["compile"] else 1):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(case["steps"]):
        step()
    wait()
    seconds = time.perf_counter() - start
    return {
        "tokens_per_s": case["tokens"] * case["steps"] / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "first_loss": first_loss,
        "checkpointing": checkpointing,
        "compiled": case["compile"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def main():
    case = json.load(sys.stdin)
    device = torch.device(case["device"])
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[case["dtype"]]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    out_of_memory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    try:
        result = measure(case, device, dtype, case["checkpointing"])
    except out_of_memory:
        if case["checkpointing"]:
            raise
        result = None
    if result is None:
        # Outside the handler, so that what the failed attempt held is free.
        result = measure(case, device, dtype, True)
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
