"""The launch recipes: they restart a run after the statuses that are worth it, and launchers can read them.

`launch_schemas.json` is JobSet's schema, without descriptions, and xpk's flags; it says from which versions.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_jax.errors import ExitStatus

LAUNCH = Path(__file__).parents[1] / "docs" / "launch"
GUIDE = (Path(__file__).parents[1] / "docs" / "launch.md").read_text()
SCHEMAS = json.loads((Path(__file__).parent / "launch_schemas.json").read_text())
FINAL = {int(status) for status in ExitStatus if not status.restart}
RETRIED = {int(status) for status in ExitStatus if status.restart} | {128 + 6, 128 + 9, 128 + 15}


def test_final_and_retried_statuses_are_disjoint():
    assert {2, 3} == FINAL
    assert not FINAL & RETRIED


def test_the_job_set_fails_for_good_on_final_statuses_alone():
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]
    spec = job["spec"]
    (rule,), (container,) = spec["podFailurePolicy"]["rules"], spec["template"]["spec"]["containers"]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "In" and set(codes["values"]) == FINAL
    assert codes["containerName"] == container["name"]
    assert container["command"][:2] == ["llama-jax", "train"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0


def test_xpk_restarts_on_the_retried_statuses():
    """By default, on 42 and 127 to 255: `get_restart_exit_codes` in its commands/workload.py."""
    restarts = {42, *range(127, 256)}
    assert restarts > RETRIED and not FINAL & restarts


def problems(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Where a manifest does not fit an OpenAPI schema; unknown fields included, as for `kubectl apply`."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if not schema:
        return [f"{path}: not in launch_schemas.json, which has of JobSet's schema what the recipe uses"]
    kind = schema.get("type", "any")
    if kind != "any" and (not isinstance(value, kinds[kind]) or (kind == "integer" and value is True)):
        return [f"{path} is {value!r}, not of type {kind}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path} is {value!r}, not one of {schema['enum']}"]
    found = [f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value]
    if isinstance(value, list):
        return found + [
            x for i, each in enumerate(value) for x in problems(each, schema["items"], f"{path}[{i}]")
        ]
    for name, inner in value.items() if isinstance(value, dict) and len(schema) > 1 else ():
        known = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        found += [f"{path}.{name} is unknown"] if known is None else problems(inner, known, f"{path}.{name}")
    return found


def test_the_job_set_fits_its_schema():
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert problems(manifest, SCHEMAS["jobset"]) == []
    policy = manifest["spec"]["failurePolicy"]
    policy |= {"restartStrategy": "Sometimes", "maxRestart": 50, "maxRestarts": "50"}
    del policy["rules"][0]["name"]
    assert [problem.partition(" is ")[0] for problem in problems(manifest, SCHEMAS["jobset"])] == [
        ".spec.failurePolicy.maxRestarts",
        ".spec.failurePolicy.restartStrategy",
        ".spec.failurePolicy.rules[0].name",
        ".spec.failurePolicy.maxRestart",
    ]


def test_the_flags_of_xpk_exist():
    block = GUIDE.partition("## GKE with xpk")[2].partition("```\n")[2].partition("```")[0]
    block = re.sub(r"\\\n *", " ", block)
    (shared,) = re.findall(r'export FLAGS="(.*)"', block)
    commands = [
        shlex.split(line.replace("$FLAGS", shared)) for line in re.findall(r"^xpk (.*)$", block, re.MULTILINE)
    ]
    assert len(commands) == 5
    for verb, noun, *arguments in commands:
        known = SCHEMAS["xpk"][f"{verb} {noun}"]
        flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert flags <= set(known["flags"]) and set(known["required"]) <= flags
        assert sum(not argument.startswith("--") for argument in arguments) == len(known["positional"])


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", LAUNCH / "train.sbatch"], check=True)


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed")
def test_slurm_accepts_the_script():
    subprocess.run(["sbatch", "--test-only", LAUNCH / "train.sbatch", "x.toml"], check=True)


def test_the_systemd_unit_does_not_restart_after_final_statuses():
    assert f"RestartPreventExitStatus={' '.join(map(str, sorted(FINAL)))}`" in GUIDE


@pytest.mark.parametrize("status", [0, *sorted(FINAL | RETRIED)])
@pytest.mark.parametrize("restarts", [0, 50])
def test_the_slurm_script_requeues(tmp_path, status, restarts):
    """With stand-ins for `srun`, which exits with the status, and `scontrol`."""
    for name, line in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(["bash", LAUNCH / "train.sbatch", "x.toml"], env=environment, check=False)
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == (status in RETRIED and restarts < 50)
