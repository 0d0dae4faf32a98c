"""The operator part of the packaged data set: one command, at most 9 minutes, well under 64 MB.

    python -m benchmarks.campaign_ops --store records --budget 8m                 (on a GPU)
    python -m benchmarks.campaign_ops --store records --budget 8m --device cpu --threads 1

Phases share the budget; what one leaves goes to the next. Each is ``meshwright profile ops``: first
the exact sizes of models cut by tensor parallelism, then sizes drawn over every family and dtype,
the least certain first. Run again on the same store it goes on where it ended; another seed draws
other sizes. At the end the store is joined into few files.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch

from meshwright.cli.main import main as meshwright
from meshwright.cli.options import parse_duration_s
from meshwright.records import RecordStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One call of the verb."""

    share: float
    """Of the budget."""
    words: str


GPU_PHASES = (
    Phase(share=0.20, words="--model gpt2-xl?num_layers=4 --tp 1,2,4 --batch 8 --dtype bf16,fp32"),
    Phase(share=0.15, words="--model llama3-8b?num_layers=2 --tp 1,2,4,8 --batch 1 --dtype bf16"),
    Phase(share=0.10, words="--model bert-large --tp 1,2,4 --batch 32 --dtype bf16,fp32"),
    Phase(share=0.05, words="--model vit-l16 --tp 1,2 --batch 64 --dtype bf16"),
    Phase(share=0.10, words="--model resnet-50 --batch 64 --dtype bf16,tf32,fp32"),
    Phase(share=0.40, words="--shapes 48"),
)

CPU_PHASES = (
    Phase(share=0.20, words="--model gpt2 --tp 1,2 --batch 1 --seq-len 256 --dtype fp32,bf16"),
    Phase(share=0.10, words="--model bert-base --batch 1 --seq-len 128 --dtype fp32"),
    Phase(share=0.10, words="--model vit-b16 --batch 1 --dtype fp32"),
    Phase(share=0.10, words="--model resnet-50 --batch 1 --dtype fp32"),
    Phase(share=0.50, words="--shapes 24"),
)


def run_phases(
    phases: tuple[Phase, ...], *, budget_s: float, common: list[str]
) -> list[tuple[str, int]]:
    """Status of each phase, in order; a phase may use what those before it left."""
    start_s = time.monotonic()
    share_so_far = 0.0
    statuses = []
    for phase in phases:
        share_so_far += phase.share
        left_s = share_so_far * budget_s - (time.monotonic() - start_s)
        if left_s < 1.0:
            print(f"no time left for {phase.words}", flush=True)
            continue
        print(f"{phase.words}: up to {left_s:.0f} s", flush=True)
        budget = ["--budget", f"{left_s:.1f}s"]
        status = meshwright(["profile", "ops", *common, *phase.words.split(), *budget])
        statuses.append((phase.words, status))
        if status == 130:
            break
    return statuses


def main() -> None:
    """All phases, then one store of few files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True)
    parser.add_argument("--budget", default="8m")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", default=None, help="most memory of one operator")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    common = ["--store", options.store, "--device", device, "--seed", str(options.seed)]
    if options.threads is not None:
        common += ["--threads", str(options.threads)]
    if options.memory is not None:
        common += ["--memory", options.memory]
    if options.cpu_time:
        common.append("--cpu-time")
    statuses = run_phases(
        GPU_PHASES if device == "cuda" else CPU_PHASES,
        budget_s=parse_duration_s(options.budget),
        common=common,
    )
    store = RecordStore(options.store)
    store.compact()
    num_records = sum(store.count()[0].values())
    num_bytes = sum(path.stat().st_size for path in store.path.iterdir())
    print(f"{num_records} records, {num_bytes / 1e6:.1f} MB in {options.store}")
    failed = [words for words, status in statuses if status != 0]
    if failed:
        raise SystemExit(f"not finished: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
