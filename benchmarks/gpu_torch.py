"""The torch side of `benchmarks.gpu`: `python gpu_torch.py decode|train SETTINGS OUT`.

Runs in any Python that has torch and transformers (for LoRA also peft), and imports nothing else of this
project. As usual: sdpa attention; training in bf16 autocast on f32 parameters with fused AdamW and gradient
checkpointing; `model.generate` on bf16 weights.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

PROMPT, NEW_TOKENS, WARM_UP, MEASURED = 18, 110, 3, 10


def model_of(settings: dict[str, Any], dtype: Any, device: str) -> Any:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: settings[name] for name in (*names, "num_key_value_heads")}
    config = transformers.LlamaConfig(**fields, max_position_embeddings=settings["seq_len"])
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def decode(settings: dict[str, Any], device: str) -> dict[str, Any]:
    model = model_of(settings, torch.bfloat16, device).eval()

    def seconds(batch: int, new_tokens: int) -> float:
        ids = torch.randint(0, settings["vocab_size"], (batch, PROMPT), device=device)
        times = []
        for _ in range(2 if settings["tiny"] else 4):
            synchronize(device)
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            synchronize(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    rows = []
    for batch in settings["batches"]:
        step = (seconds(batch, NEW_TOKENS) - seconds(batch, 1)) / (NEW_TOKENS - 1)
        rows.append({"batch": batch, "tokens_per_second": batch / step})
    return {"rows": rows}


def train(settings: dict[str, Any], device: str) -> dict[str, Any]:
    (batch,) = settings["batches"]
    while True:
        try:
            return train_at(batch, settings, device)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        torch.cuda.empty_cache()
        batch //= 2


def train_at(batch: int, settings: dict[str, Any], device: str) -> dict[str, Any]:
    model = model_of(settings, torch.bfloat16 if settings["lora"] else torch.float32, device).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings["lora"]:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(r=settings["lora_rank"], target_modules=targets))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    ids = torch.randint(0, settings["vocab_size"], (batch, settings["seq_len"]), device=device)
    times = []
    for _ in range(WARM_UP + (1 if settings["tiny"] else MEASURED)):
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        times.append(time.perf_counter() - start)
    step = statistics.median(times[WARM_UP:])
    return {
        "batch": batch,
        "tokens_per_second": batch * settings["seq_len"] / step,
        "loss": float(loss.detach()),
    }


def main() -> None:
    task, settings, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not settings["tiny"]:
        sys.exit("error: torch does not see a GPU")
    result = {"decode": decode, "train": train}[task](settings, device)
    library = {"torch": torch.__version__, "transformers": transformers.__version__}
    out.write_text(json.dumps({**result, **library}), encoding="utf-8")


if __name__ == "__main__":
    main()
