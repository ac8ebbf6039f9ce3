"""Rejection sampling: `python -m llama_jax.train.rejection_sampling POLICY REWARD PROMPTS OUT`.

New data for supervised finetuning, as Llama 2 made it: for each prompt the policy writes several answers, and
the one that the reward model likes best is kept (arXiv 2307.09288, section 3.2.3). OUT is JSONL of
conversations, to train on with `train.objective = "sft"`.
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
from llama_jax.chat import chat_template, checked_messages, encode_chat
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


def prompts_of(path: Path) -> list[Messages]:
    """Reads prompts: JSONL with `messages` (answers at the end are dropped) or `prompt`, text or messages.

    Raises:
      DataError: naming file and line.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSONL file of prompts") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            held = record["messages"] if "messages" in record else record["prompt"]
            messages = (
                [{"role": "user", "content": held}] if isinstance(held, str) else checked_messages(held)
            )
        except (ValueError, TypeError, KeyError, RecursionError, InputError) as error:
            what = str(error) if isinstance(error, InputError) else "no object with messages or prompt"
            raise DataError(f"{path}:{number}: {what}; mend it, or take it out") from None
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"{path}:{number}: no turn of the user's to answer; mend it, or take it out")
        found.append(messages)
    if not found:
        raise DataError(f"{path}: holds no prompts; give a JSONL file with messages or prompt")
    return found


def best_of(
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
    """Yields for each prompt its conversation with the best answer, and how all of them were judged.

    Args:
      model: the policy.
      scorer: the reward model.
      prompts: conversations that end with the user's turn.
      samples: answers a prompt.
      max_new_tokens, temperature, top_p: of the answers.
      seed: of the draws; a prompt's own depend on it and on the prompt's number alone.
      template: the policy's chat template; empty is the one that came with it.

    Yields:
      `messages`, `reward`, and `rewards` of all answers that say something; nothing where none does.
    """
    chat = chat_template(model.tokenizer, template or None)
    for number, messages in enumerate(prompts):
        tokens, lengths = pad_right([encode_chat(model.tokenizer, chat, messages)])
        out = lj.generate(
            model.config,
            model.params,
            tokens,
            lengths,
            jax.random.fold_in(jax.random.key(seed), number),
            lj.Sampling(temperature=temperature, top_p=top_p),
            max_new_tokens=max_new_tokens,
            eos_id=model.tokenizer.eos_ids,
            num_return_sequences=samples,
        )
        ids, ends = np.asarray(out.tokens).reshape(samples, -1), np.asarray(out.lengths).reshape(samples)
        said = [
            model.tokenizer.decode(row[:end].tolist()).strip() for row, end in zip(ids, ends, strict=True)
        ]
        answers = list(dict.fromkeys(text for text in said if text))
        if not answers:
            continue
        whole = [[*messages, {"role": "assistant", "content": text}] for text in answers]
        rewards = scorer.scores(whole)[:, 0]
        best = int(rewards.argmax())
        yield {
            "messages": whole[best],
            "reward": float(rewards[best]),
            "rewards": [float(reward) for reward in rewards],
        }


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      LlamaJaxError: for bad input, the data's or the command line's.
    """
    parser = Parser(
        "python -m llama_jax.train.rejection_sampling",
        "Sample several answers to each prompt and keep the one that a reward model likes best.",
        EXAMPLES,
    )
    parser.add_argument("policy", metavar="MODEL", help="who answers: a path or a known name")
    judge = 'a run with train.objective = "reward", or a Hugging Face directory of a reward model'
    parser.add_argument("reward", metavar="REWARD", help=judge)
    parser.add_argument("prompts", metavar="PROMPTS", help="JSONL with messages or prompt")
    parser.add_argument("out", metavar="OUT", help="the JSONL file to write; it appears when it is whole")
    parser.add_argument("--samples", type=int, default=4, help="answers a prompt (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the draws (default: 1)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of the draws (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--template", default="", help="the chat template of models that come with none")
    args = parser.parse(argv)
    if args.samples < 1:
        raise InputError(f"--samples is {args.samples}; it must be at least 1")
    out = Path(args.out)
    if out.exists():
        raise InputError(f"{out}: is there already; remove it, or give another file to write to")
    prompts = prompts_of(Path(args.prompts))
    scorer = Scorer.load(args.reward, template=args.template)
    if scorer.objective != "reward":
        raise InputError(f"{args.reward}: is for {scorer.objective}, no reward model; give one that is")
    model = lj.load(args.policy, scan_layers=False)
    made = best_of(
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
    kept, gained = _write(out, made, len(prompts))
    terminal.note(
        f"{out}: the best of {args.samples} answers to {kept} of {len(prompts)} prompts; its reward is "
        f"{gained / max(kept, 1):.3f} above the mean"
    )


def _write(out: Path, made: Iterator[dict[str, Any]], count: int) -> tuple[int, float]:
    """Writes the records; returns how many, and by how much in all the best beat the mean."""
    console = Console(stderr=True)
    partial = out.with_name(out.name + ".partial")
    kept, gained = 0, 0.0
    try:
        with (
            Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
            partial.open("w", encoding="utf-8") as file,
        ):
            for record in bar.track(made, total=count, description="answering"):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                kept += 1
                gained += record["reward"] - float(np.mean(record["rewards"]))
        partial.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; write elsewhere") from None
    finally:
        partial.unlink(missing_ok=True)
    return kept, gained


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
