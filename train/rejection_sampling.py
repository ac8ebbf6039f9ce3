"""Rejection sampling: `python -m llama_jax.train.rejection_sampling POLICY REWARD PROMPTS OUT`.

It makes data for supervised finetuning as in Llama 2: the policy samples several answers to each prompt, and
the one with the highest reward is kept (arXiv 2307.09288, section 3.2.3). OUT is JSONL of conversations, to
train on with `train.objective = "sft"`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

import llama_jax as lj
from llama_jax.chat import chat_template, encode_chat, validate_messages
from llama_jax.console import terminal
from llama_jax.console.exit_status import exit_status
from llama_jax.console.parser import Parser
from llama_jax.decoding.arguments import pad_right
from llama_jax.errors import DataError, InputError

from .scorer import Scorer

EXAMPLES = """
llama-jax train reward.toml --train.objective reward --train.run_dir runs/reward
python -m llama_jax.train.rejection_sampling smollm2-135m runs/reward prompts.jsonl best.jsonl --samples 8
llama-jax train configs/sft_smollm2.toml --data.files best.jsonl
"""

Messages = list[dict[str, str]]


def read_prompts(path: Path) -> list[Messages]:
    """Reads prompts: JSONL with `messages` (trailing answers are dropped) or `prompt`, a text or messages.

    Raises:
      DataError: naming file and line.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSONL file of prompts") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = record["messages"] if "messages" in record else record["prompt"]
            messages = (
                [{"role": "user", "content": prompt}]
                if isinstance(prompt, str)
                else validate_messages(prompt)
            )
        except (ValueError, TypeError, KeyError, RecursionError, InputError) as error:
            problem = str(error) if isinstance(error, InputError) else "no object with messages or prompt"
            raise DataError(f"{path}:{number}: {problem}; fix or remove the line") from None
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"{path}:{number}: no user message to answer; fix or remove the line")
        prompts.append(messages)
    if not prompts:
        raise DataError(f"{path}: contains no prompts; give a JSONL file with messages or prompt")
    return prompts


def best_of_n(
    model: lj.Model,
    scorer: Scorer,
    prompts: Sequence[Messages],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    template: str = "",
) -> Iterator[dict[str, Any]]:
    """Samples answers to each prompt, and yields the conversation with the highest reward.

    Args:
      model: the policy.
      scorer: the reward model.
      prompts: conversations that end with a user message.
      samples: answers per prompt.
      max_new_tokens, temperature, top_p: sampling arguments.
      seed: of the samples; those of a prompt depend on the seed and the prompt's index only.
      template: the policy's chat template; empty for the one that came with it.

    Yields:
      `messages`, `reward`, and `rewards` of all distinct, non-empty answers; nothing if there is none.
    """
    chat = chat_template(model.tokenizer, template or None)
    for index, messages in enumerate(prompts):
        tokens, lengths = pad_right([encode_chat(model.tokenizer, chat, messages)])
        out = lj.generate(
            model.config,
            model.params,
            tokens,
            lengths,
            jax.random.fold_in(jax.random.key(seed), index),
            lj.Sampling(temperature=temperature, top_p=top_p),
            max_new_tokens=max_new_tokens,
            eos_id=model.tokenizer.eos_ids,
            num_return_sequences=samples,
        )
        ids, ends = np.asarray(out.tokens).reshape(samples, -1), np.asarray(out.lengths).reshape(samples)
        texts = [
            model.tokenizer.decode(row[:end].tolist()).strip() for row, end in zip(ids, ends, strict=True)
        ]
        answers = list(dict.fromkeys(text for text in texts if text))
        if not answers:
            continue
        conversations = [[*messages, {"role": "assistant", "content": text}] for text in answers]
        rewards = scorer.scores(conversations)[:, 0]
        best = int(rewards.argmax())
        yield {
            "messages": conversations[best],
            "reward": float(rewards[best]),
            "rewards": [float(reward) for reward in rewards],
        }


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      LlamaJaxError: for invalid data or arguments.
    """
    parser = Parser(
        "python -m llama_jax.train.rejection_sampling",
        "Sample several answers to each prompt and keep the one with the highest reward.",
        EXAMPLES,
    )
    parser.add_argument("policy", metavar="MODEL", help="the model that answers: a path or a known name")
    reward_help = 'a run with train.objective = "reward", or a Hugging Face directory of a reward model'
    parser.add_argument("reward", metavar="REWARD", help=reward_help)
    parser.add_argument("prompts", metavar="PROMPTS", help="JSONL with messages or prompt")
    parser.add_argument("out", metavar="OUT", help="the JSONL file to write, once all prompts are answered")
    parser.add_argument("--samples", type=int, default=4, help="answers per prompt (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="per answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--template", default="", help="chat template for models that come with none")
    args = parser.parse(argv)
    if args.samples < 1:
        raise InputError(f"--samples is {args.samples}; it must be at least 1")
    out = Path(args.out)
    if out.exists():
        raise InputError(f"{out}: already exists; remove it, or give another output file")
    prompts = read_prompts(Path(args.prompts))
    scorer = Scorer.load(args.reward, template=args.template)
    if scorer.objective != "reward":
        raise InputError(f"{args.reward}: was trained to {scorer.objective}; give a reward model")
    model = lj.load(args.policy, scan_layers=False)
    records = best_of_n(
        model,
        scorer,
        prompts,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        template=args.template,
    )
    count, total_gain = _write(out, records, len(prompts))
    terminal.note(
        f"{out}: the best of {args.samples} answers to {count} of {len(prompts)} prompts; its reward is "
        f"{total_gain / max(count, 1):.3f} above the mean"
    )


def _write(out: Path, records: Iterator[dict[str, Any]], num_prompts: int) -> tuple[int, float]:
    """Writes the records; returns their number, and the sum of (best reward - mean reward)."""
    console = Console(stderr=True)
    partial = out.with_name(out.name + ".partial")
    count, total_gain = 0, 0.0
    try:
        with (
            Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
            partial.open("w", encoding="utf-8") as file,
        ):
            for record in bar.track(records, total=num_prompts, description="answering"):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
                total_gain += record["reward"] - float(np.mean(record["rewards"]))
        partial.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; choose another output file") from None
    finally:
        partial.unlink(missing_ok=True)
    return count, total_gain


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
