"""Rejection sampling: `python -m llama_jax.train.rejection_sampling POLICY REWARD PROMPTS OUT`.

It makes data for supervised finetuning as in Llama 2: the policy samples several answers to each prompt, and
the one with the highest reward is kept (arXiv 2307.09288, section 3.2.3). OUT is JSONL of conversations, to
train on with `train.objective = "sft"`.
"""

from __future__ import annotations

import dataclasses
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
from llama_jax.chat import chat_template, encode_chat
from llama_jax.console import terminal
from llama_jax.console.exit_status import exit_status
from llama_jax.console.parser import Parser
from llama_jax.decoding.arguments import pad_right
from llama_jax.errors import DataError, InputError
from llama_jax.storage import as_path

from .data.conversations import Conversation, read_messages, read_variables
from .data.records import BadRecord
from .scorer import Scorer

EXAMPLES = """
llama-jax train reward.toml --train.objective reward --train.run_dir runs/reward
python -m llama_jax.train.rejection_sampling smollm2-135m runs/reward prompts.jsonl best.jsonl --samples 8
llama-jax train configs/sft_smollm2.toml --data.files best.jsonl
"""


def read_prompts(path: Path) -> list[Conversation]:
    """Reads prompts: JSONL with `messages` (trailing answers are dropped) or `prompt`, a text or messages.

    `tools` and `chat_template_kwargs` go to the template, as in training.

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
            name = "messages" if "messages" in record else "prompt"
            if name == "prompt" and isinstance(record[name], str):
                record[name] = [{"role": "user", "content": record[name]}]
            messages, variables = read_messages(record, name), read_variables(record)
        except (ValueError, TypeError, KeyError, RecursionError, BadRecord) as error:
            problem = error.message if isinstance(error, BadRecord) else "no object with messages or prompt"
            raise DataError(f"{path}:{number}: {problem}; fix or remove the line") from None
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"{path}:{number}: no user message to answer; fix or remove the line")
        prompts.append(Conversation(messages, len(messages), variables))
    if not prompts:
        raise DataError(f"{path}: contains no prompts; give a JSONL file with messages or prompt")
    return prompts


def best_of_n(
    model: lj.Model,
    scorer: Scorer,
    prompts: Sequence[Conversation],
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
      model: the policy; on a mesh over several processes each must make the same call, and each gets all
        records.
      scorer: the reward model.
      prompts: conversations that end with a user message.
      samples: answers per prompt.
      max_new_tokens, temperature, top_p: sampling arguments.
      seed: of the samples; those of a prompt depend on the seed and the prompt's index only.
      template: the policy's chat template; empty for the one that came with it.

    Yields:
      `messages`, `reward`, `rewards` of all distinct, non-empty answers, and the template's variables, such
      as `tools`; nothing if there is no answer.
    """
    chat = chat_template(model.tokenizer, template or None)
    sampling, _ = model.sampling(temperature=temperature, top_p=top_p)
    for index, prompt in enumerate(prompts):
        tokens, lengths = pad_right([encode_chat(model.tokenizer, chat, prompt.messages, **prompt.variables)])
        with model.on_mesh():
            out = lj.generate(
                model.config,
                model.params,
                tokens,
                lengths,
                jax.random.fold_in(jax.random.key(seed), index),
                sampling,
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
        conversations = [
            dataclasses.replace(prompt, messages=[*prompt.messages, {"role": "assistant", "content": text}])
            for text in answers
        ]
        rewards = scorer.scores(conversations)[:, 0]
        best = int(rewards.argmax())
        others = {name: value for name, value in prompt.variables.items() if name != "tools"}
        yield {
            "messages": conversations[best].messages,
            **({"tools": prompt.variables["tools"]} if "tools" in prompt.variables else {}),
            **({"chat_template_kwargs": others} if others else {}),
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
    out = as_path(args.out)
    if out.exists():
        raise InputError(f"{out}: already exists; remove it, or give another output file")
    prompts = read_prompts(as_path(args.prompts))
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
