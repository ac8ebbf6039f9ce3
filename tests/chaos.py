"""Kills a run again and again: `python -m tests.chaos [--kills 20] [--seed 0] [--json]` (ten minutes).

First runs of two and four processes, over gloo on this machine, are compared with one process that has all
their devices. Then one process of a run, any one at any time, is killed by SIGKILL; the others have to end by
themselves, with a status that launchers retry, and the run is resumed by another number of processes. After
the last kill it is finished and compared with a run that was never broken, bit for bit: the loss of every
step, every array of the last checkpoint, and the rows that every step was trained on, so that no document is
lost or repeated.

Every sum of the step is over two devices: over four, gloo adds in another order than XLA within a process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import ExitStatus

DEVICES = 4
PROCESSES = (1, 2, 4)
HEARTBEAT_SECONDS = 10
START_SECONDS = 240  # until the first step, on a machine that is not idle
MESH = ("--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 2)
# The norm of the gradient is a sum over all devices, so it must not scale the gradient.
FLAGS = (*MESH, "--optimizer.max_grad_norm", 0, "--eval.every", 0, "--checkpoint.every", 10)
RETRIED = {-6, -9, *(int(status) for status in ExitStatus if status.restart)}


def train_recording_rows(argv: Sequence[str]) -> int:
    """`llama-jax train`, which also writes a checksum of every row; the first argument says where."""
    from llama_jax.cli import main
    from llama_jax.train.loop import Loop

    path, *arguments = argv
    next_batch = Loop._next_batch
    file = Path(path).open("a")  # noqa: SIM115  # until the process is killed

    def recorded(loop: Loop) -> Mapping[str, Any]:
        batch = next_batch(loop)
        rows = [zlib.crc32(row.tobytes()) for row in batch["tokens"]]
        file.write(json.dumps({"step": loop.steps_done + 1, "rows": rows}) + "\n")
        file.flush()
        return batch

    Loop._next_batch = recorded  # type: ignore[method-assign]
    return main(["train", *arguments])


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    from tests.train.fork_server import ForkServer
    from tests.train.processes import Workshop, environment

    (folder / "output").mkdir()
    server = ForkServer(environment(folder / "compiled"), folder / "output")
    workshop = Workshop(folder, server).set_up()
    try:
        result = Chaos(workshop, random.Random(args.seed)).run(args.kills)
    finally:
        server.close()
    shutil.rmtree(folder)  # kept after a failure
    print(json.dumps(result) if args.json else "\n".join(f"{name}: {x}" for name, x in result.items()))
    return 0


class Chaos:
    """The runs of one folder; see the module."""

    def __init__(self, workshop: Any, rng: random.Random) -> None:
        self.workshop, self.rng, self.starts = workshop, rng, 0

    def run(self, kills: int) -> dict[str, Any]:
        """Kills that often; raises an AssertionError where something differs."""
        from llama_jax.eval.goodput import describe, read_goodput
        from tests.train.processes import assert_same, losses

        same, run = 20, self.workshop.folder / "chaos"
        for count in PROCESSES:
            self.finish(f"whole-{count}", count, same)
            if count > 1:
                self.compare("whole-1", f"whole-{count}", same)
                say(f"{count} processes: {same} steps as one, bit for bit")
        killed, statuses, count = [], [], 1
        while len(killed) < kills:
            count = self.rng.choice([other for other in PROCESSES if other != count])
            killed.append(self.kill_one("chaos", count, statuses))
            say(f"kill {len(killed)}: {killed[-1]}")
        last = (max(losses(run)) // 10 + 2) * 10
        self.finish("chaos", self.rng.choice(PROCESSES), last)
        self.finish("unbroken", 1, last)
        self.compare("unbroken", "chaos", last)
        assert_same(self.workshop.folder / "unbroken", run, last)
        goodput = read_goodput(run)
        assert goodput is not None
        return {
            "kills": len(killed),
            "by number of processes": {n: sum(each["processes"] == n for each in killed) for n in PROCESSES},
            "steps": last,
            "steps repeated": goodput.lost_steps,
            "statuses of the survivors": {status: statuses.count(status) for status in sorted(set(statuses))},
            "longest time until the survivors had ended": max(each["ended_after"] for each in killed),
            "goodput": describe(goodput),
        }

    def start(self, name: str, count: int, steps: int) -> list[Any]:
        """Starts the processes of a run."""
        self.starts += 1
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        shared = [self.workshop.config, "--train.run_dir", name, "--train.steps", steps, *FLAGS]
        together = ("--distributed.coordinator", address, "--distributed.num_processes", count)
        together = (*together, "--distributed.heartbeat_seconds", HEARTBEAT_SECONDS)
        started = []
        for index in range(count):
            own = (*together, "--distributed.process_id", index) if count > 1 else ()
            rows = self.workshop.folder / f"{name}-rows-{self.starts:03}-{index}"
            function = f"tests.chaos:{train_recording_rows.__name__}"
            started.append(
                self.workshop.server.start(
                    function, (rows, *shared, *own), devices=DEVICES // count, cwd=self.workshop.folder
                )
            )
        return started

    def finish(self, name: str, count: int, steps: int) -> None:
        """Trains up to a step."""
        done = [(process.communicate(timeout=600), process) for process in self.start(name, count, steps)]
        for (_, errors), process in done:
            assert process.returncode == 0, errors

    def kill_one(self, name: str, count: int, statuses: list[int]) -> dict[str, Any]:
        """Resumes a run, kills one of its processes, and waits for the others to end."""
        from tests.train.processes import records

        run = self.workshop.folder / name
        before = len(records(run))
        processes = self.start(name, count, 1_000_000)
        begin, early = time.monotonic(), self.rng.random() < 0.2
        while not early and time.monotonic() - begin < START_SECONDS:
            if len(records(run)) != before and max((x["step"] for x in records(run)), default=0) > before:
                break
            time.sleep(0.05)
        time.sleep(self.rng.uniform(0, 3 if early else 1.5))
        victim = self.rng.randrange(count)
        processes[victim].kill()
        killed = time.monotonic()
        for index, process in enumerate(processes):
            _, errors = process.communicate(timeout=START_SECONDS)
            if index != victim:
                assert process.returncode in RETRIED, (process.returncode, errors)
                statuses.append(process.returncode)
        step = max((record["step"] for record in records(run)), default=0)
        seconds = round(time.monotonic() - killed, 1)
        return {"processes": count, "victim": victim, "early": early, "step": step, "ended_after": seconds}

    def compare(self, left: str, right: str, last: int) -> None:
        """Losses, the last checkpoint, and the rows of every step."""
        from tests.train.processes import assert_same, losses

        folder = self.workshop.folder
        assert losses(folder / left) == losses(folder / right)
        assert len(losses(folder / left)) == last
        assert_same(folder / left, folder / right, last)
        rows = self.rows(left)
        assert sorted(rows) == list(range(1, last + 1)) and all(len(each) == 8 for each in rows.values())
        assert rows == self.rows(right)

    def rows(self, name: str) -> dict[int, list[int]]:
        """The checksums of the rows of every step, of the last start that ran it."""
        by_step: dict[int, dict[str, set[tuple[int, ...]]]] = {}
        for path in sorted(self.workshop.folder.glob(f"{name}-rows-*")):
            start = path.name.split("-")[-2]
            for line in path.read_text().splitlines():
                if line.endswith("}"):
                    record = json.loads(line)
                    by_start = by_step.setdefault(record["step"], {})
                    by_start.setdefault(start, set()).add(tuple(record["rows"]))  # two may read the same
        last = {step: by_start[max(by_start)] for step, by_start in by_step.items()}
        return {step: sorted(row for rows in shards for row in rows) for step, shards in last.items()}


def say(text: str) -> None:
    """Reports progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
