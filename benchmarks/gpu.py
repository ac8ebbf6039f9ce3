"""Correctness and speed on one NVIDIA GPU, in at most 12 minutes: `make gpu`, or `python -m benchmarks.gpu`.

  correctness  logits, gradients and generated tokens beside the CPU's in f32, by every attention backend
  decode_7b    tokens/s at batch 1, 8 and 64, and the share of the memory's bandwidth
  train_*      MFU of a training step: 1B and 3B in full, 7B by LoRA
  torch_*      the same by torch and transformers, where a Python here has both and CUDA

Each part runs in its own process, so that none finds memory taken or ends the others; what no longer fits
into the time is left out by name. The result is one JSON object, with shapes, versions, commit and date.
`--tiny` runs all of it in tiny shapes on any device, the CPU too: it tests this script, and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_shapes import DECODE_BATCHES, TRAIN, shapes
from llama_jax.train.gpu import has_nvidia_gpu, prepare_environment

ROOT = Path(__file__).parents[1]
PARTS = ("correctness", "decode_7b", "train_1b", "train_3b", "train_7b_lora")
TORCH_PARTS = ("torch_decode_7b", "torch_train_1b", "torch_train_3b", "torch_train_7b_lora")
ENOUGH_S = 45.0  # a part is not begun with less time left
_HAS_TORCH = "import torch, transformers; assert {cpu} or torch.cuda.is_available()"


def torch_python(asked: str | None, *, tiny: bool) -> str | None:
    """A Python that has torch, transformers and CUDA: the one asked for, this one, or that on the path."""
    code = _HAS_TORCH.format(cpu=tiny)
    for python in [asked] if asked else [sys.executable, shutil.which("python3")]:
        if python and subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0:
            return python
    return None


def command_of(part: str, out: Path, torch: str | None, *, tiny: bool) -> list[str]:
    """The command that runs a part and writes its result."""
    if not part.startswith("torch_"):
        return [sys.executable, "-m", "benchmarks.gpu_parts", part, str(out), *["--tiny"] * tiny]
    name = part.removeprefix("torch_")
    shape = shapes(tiny)["7b" if name.startswith("decode") else name.split("_")[1]]
    batches = DECODE_BATCHES[: 1 if tiny else None] if name.startswith("decode") else [shape.batch]
    settings = {**shape.as_dict(), "batches": list(batches), "lora": name.endswith("lora"), "tiny": tiny}
    script = str(ROOT / "benchmarks" / "gpu_torch.py")
    return [str(torch), script, name.split("_")[0], json.dumps(settings), str(out)]


def run_part(part: str, torch: str | None, seconds: float, *, tiny: bool) -> dict[str, Any]:
    """The result of a part, or `error`: why it has none."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        started = time.monotonic()
        with log.open("wb") as file:
            try:
                status = subprocess.run(
                    command_of(part, out, torch, tiny=tiny),
                    cwd=ROOT,
                    stdout=file,
                    stderr=file,
                    timeout=seconds,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return {"error": f"not done after {seconds:.0f} s"}
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if status or not out.exists():
            return {"error": f"status {status}: {lines[-1][:400] if lines else 'no output'}"}
        return {**json.loads(out.read_text()), "seconds": round(time.monotonic() - started, 1)}


def commit() -> str | None:
    """The commit of this checkout; None outside of one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python, the driver, and the packages that compute."""
    found = {"python": sys.version.split()[0]}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in ("jax", "jaxlib", "flax", "optax", "llama-jax") or name.startswith(
            ("jax-cuda", "nvidia-c")
        ):
            found[name] = distribution.version
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found["driver"] = done.stdout.strip().partition("\n")[0]
    return found


def measure(parts: list[str], minutes: float, torch: str | None, *, tiny: bool) -> dict[str, Any]:
    """Runs the parts one after the other; the report."""
    deadline = time.monotonic() + 60 * minutes
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "tiny": tiny,
        "settings": {
            "steps": TRAIN,
            "shapes": {name: shape.as_dict() for name, shape in shapes(tiny).items()},
            "decode_batches": list(DECODE_BATCHES),
        },
        "parts": {},
    }
    for part in parts:
        left = deadline - time.monotonic()
        if part.startswith("torch_") and torch is None:
            result = {"error": "no Python here has torch, transformers and CUDA; --torch PYTHON names one"}
        elif left < ENOUGH_S:
            result = {"error": f"left out: {max(left, 0):.0f} s were left of {minutes:g} minutes"}
        else:
            result = run_part(part, torch, left, tiny=tiny)
        report["parts"][part] = result
        print(f"{part}: {summary(result)}", file=sys.stderr, flush=True)
    return report


def summary(result: dict[str, Any]) -> str:
    """One line of a part's result."""
    if "error" in result:
        return result["error"]
    if "rows" in result:
        return "; ".join(
            f"batch {row['batch']}: {row['tokens_per_second']:,.0f} tokens/s"
            + (f", {row['bandwidth_share']:.0%} of bandwidth" if "bandwidth_share" in row else "")
            for row in result["rows"]
        )
    if "tokens_per_second" in result:
        mfu = f", MFU {result['mfu']:.1%}" if result.get("mfu") else ""
        return f"{result['tokens_per_second']:,.0f} tokens/s at batch {result['batch']}{mfu}"
    return ", ".join(f"{name} {value:.1e}" for name, value in result["differences"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", help="a file for the JSON object, instead of standard output")
    parser.add_argument("--minutes", type=float, default=12.0, help="time for all parts")
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS + TORCH_PARTS)}")
    parser.add_argument("--torch", metavar="PYTHON", help="the Python of the torch side")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any device")
    args = parser.parse_args()
    parts = args.only.split(",") if args.only else [*PARTS, *TORCH_PARTS]
    if unknown := [part for part in parts if part not in PARTS + TORCH_PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS + TORCH_PARTS)}")
    if not args.tiny and not has_nvidia_gpu():
        print("error: this machine has no NVIDIA GPU; --tiny tests the script on the CPU", file=sys.stderr)
        sys.exit(2)
    prepare_environment()
    torch = torch_python(args.torch, tiny=args.tiny) if set(parts) & set(TORCH_PARTS) else None
    report = measure(parts, args.minutes, torch, tiny=args.tiny)
    text = json.dumps(report, indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if any("error" in report["parts"][part] for part in parts if not part.startswith("torch_")):
        sys.exit(1)


if __name__ == "__main__":
    main()
