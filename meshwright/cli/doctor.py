"""``meshwright doctor``: what this machine has, and whether processes can talk."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from meshwright import __version__
from meshwright.cli.options import JsonOption
from meshwright.cli.output import output_for
from meshwright.cluster import detect_machine
from meshwright.cluster.detect import detect_gpus
from meshwright.errors import BadRequest, PlannerError
from meshwright.records import describe_machine, describe_software
from meshwright.units import format_bytes

__all__ = ["check_gloo", "doctor"]

_GLOO_TIMEOUT_S = 60.0
_OPTIONAL = ("transformers", "wandb")

_GLOO_PROGRAM = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
rank = int(sys.argv[2])
store = dist.FileStore(sys.argv[1], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
dist.destroy_process_group()
sys.exit(0 if float(total) == 3.0 else 1)
"""


def doctor(json_output: JsonOption = False) -> None:
    """Show versions, cores, memory and devices, and try an all-reduce of two processes."""
    with output_for(as_json=json_output) as out:
        machine, software = describe_machine(), describe_software()
        problems: list[str] = []
        has_torch = "torch" in software.packages
        if not has_torch:
            problems.append("torch is not installed; run `pip install torch`")
        gloo = check_gloo() if has_torch else "torch is not installed"
        if has_torch and gloo is not None:
            problems.append(f"two processes cannot talk through gloo: {gloo}")
        try:
            cluster, gpus = detect_machine().name, [gpu.driver_name for gpu in detect_gpus()]
        except PlannerError as error:
            cluster, gpus = None, []
            problems.append(str(error))
        answer: dict[str, Any] = {
            "meshwright": __version__,
            "python": software.python,
            "packages": software.packages,
            "optional": {name: _version(name) for name in _OPTIONAL},
            "processor": machine.processor,
            "num_cores": machine.num_cores,
            "memory_bytes": machine.memory_bytes,
            "system": machine.system,
            "gpus": gpus,
            "cluster": cluster,
            "gloo_works": gloo is None,
            "problems": problems,
        }
        shown = answer | {
            "packages": ", ".join(f"{name} {text}" for name, text in software.packages.items()),
            "optional": ", ".join(
                f"{name} {text or 'not installed'}" for name, text in answer["optional"].items()
            ),
            "memory_bytes": format_bytes(machine.memory_bytes),
            "gpus": ", ".join(gpus) or "none",
            "gloo_works": "yes" if gloo is None else "no",
            "problems": "; ".join(problems) or "none",
        }
        from meshwright import report

        out.show(report.facts_table({name.replace("_", " "): shown[name] for name in shown}))
        out.document(answer)
    if problems:
        raise BadRequest(f"doctor: {problems[0]}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_gloo(program: str = _GLOO_PROGRAM, *, timeout_s: float = _GLOO_TIMEOUT_S) -> str | None:
    """Why two processes could not add two numbers through gloo; ``None`` where they could."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        store = str(Path(folder) / "store")
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, store, str(rank)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            for rank in range(2)
        ]
        try:
            said = [process.communicate(timeout=timeout_s)[1] for process in processes]
        except subprocess.TimeoutExpired:
            return f"no answer within {timeout_s:g} s"
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return lines[-1] if lines else f"a process ended with status {process.returncode}"
    return None
