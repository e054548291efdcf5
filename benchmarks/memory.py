"""Memory budgets: the peak that was planned beside the one that was measured, and what a budget costs in time.

On a CUDA device: random weights in the released models' sizes (`--size real`, 20 GB on disk unless --folder is given),
the Turbo recipe at 1024², each budget in a process of its own whose allocator is capped to it; the peak is what the
allocator reserved. Times are those of the denoising steps after a first picture, beside everything resident and beside
the time that computing and copying take alone. Then diffusers' own ways to need less memory, without a cap. Elsewhere a
simulated device that counts every tensor and enforces the budget, with `small` at 512², and no times.

    python benchmarks/memory.py [--size real] [--folder EXISTING] [--budgets 80GB,16GB,12GB,8GB,4GB] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch

from zimage import GenerationRequest, ZImagePipeline
from zimage.bench.report import write
from zimage.memory.meter import AllocationMeter
from zimage.memory.plan import gib, parse_memory
from zimage.memory.planner import fit_picture
from zimage.testing import build_checkpoint

PROMPT = "a red fox in the snow next to an old wooden house under a blue sky"
GOALS = {"16GB": 13.5, "12GB": 10.5, "8GB": 6.5, "4GB": 3.4}
"""GiB that the peak at 1024² should stay within."""
PEERS: dict[str, Callable[[Any], Any]] = {
    "diffusers, on the card": lambda pipe: pipe.to("cuda"),
    "diffusers, enable_model_cpu_offload": lambda pipe: pipe.enable_model_cpu_offload(),
    "diffusers, enable_sequential_cpu_offload": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "diffusers, enable_group_offload": lambda pipe: pipe.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1, use_stream=True
    ),
}
"""What diffusers offers, through its own hooks and those of accelerate."""


def main() -> None:
    """Run every budget and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--budgets")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "BUDGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if arguments.child:
        folder, budget = arguments.child
        measure = peer if budget in PEERS else on_cuda if cuda else simulated
        print(json.dumps(measure(folder, budget)))
        return
    size = arguments.size or ("real" if cuda else "small")
    budgets = (arguments.budgets or ("80GB,16GB,12GB,8GB,4GB" if cuda else "1GB,380MB,360MB,330MB")).split(",")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not folder.exists():
            build_checkpoint(folder, size=size, variant="turbo", dtype="bfloat16")
        rows = [run(folder, budget) for budget in (*budgets, *(PEERS if cuda else ()))]
    resident = rows[0].get("denoising_s")
    for row in rows:
        if resident and "denoising_s" in row:
            row["times_resident"] = row["denoising_s"] / resident
        if resident and "copying_s" in row:
            row["times_bound"] = row["denoising_s"] / max(resident, row["copying_s"])
        print(line(row), flush=True)
    if arguments.output:
        keep(rows, size, arguments.output)


def run(folder: Path, budget: str) -> dict[str, Any]:
    """One budget in a new process."""
    command = [sys.executable, __file__, "--child", str(folder), budget]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"budget": budget, "failed": done.returncode}
    return {"budget": budget, **json.loads(done.stdout.splitlines()[-1])}


def on_cuda(folder: str, budget: str) -> dict[str, Any]:
    """Peaks and times of a picture of 1024² on a card of that size."""
    device = torch.device("cuda", torch.cuda.current_device())  # the cap is refused for one without a number
    total = torch.cuda.get_device_properties(device).total_memory
    amount = parse_memory(budget) or total
    torch.cuda.set_per_process_memory_fraction(min(1.0, amount / total), device)
    start = time.perf_counter()
    pipe = ZImagePipeline.from_pretrained(folder, dtype="bfloat16", device="cuda", memory=budget)
    load_s = time.perf_counter() - start
    assert pipe.plan is not None
    request = pipe.resolve(GenerationRequest(PROMPT, seed=7, height=1024, width=1024))
    report = predicted(pipe, 1024, request.max_sequence_length)
    denoise(pipe, request)
    times = [denoise(pipe, request) for _ in range(3)]
    placement = pipe.plan.placement
    streamed = len(placement.streamed) + (0 if placement.context_resident else len(pipe.plan.sizes.context_blocks))
    return report | {
        "placement": str(placement),
        "measured": torch.cuda.max_memory_reserved(device),
        "allocated": torch.cuda.max_memory_allocated(device),
        "stepped_down": list(pipe.plan.stepped_down),
        "load_s": load_s,
        "denoising_s": statistics.median(times),
        "copying_s": request.num_inference_steps * streamed * copy_time(2 * max(pipe.plan.sizes.blocks), device),
    }


def denoise(pipe: ZImagePipeline, request: Any) -> float:
    """Seconds from the end of the first step to the end of the last, scaled to all of them; the picture is decoded."""
    ends = []
    for _ in pipe.stream(request):
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
    # The last step's time has the decode in it, which is another stage.
    steps = [after - before for before, after in pairwise(ends[:-1])]
    return statistics.median(steps) * request.num_inference_steps


def peer(folder: str, name: str) -> dict[str, Any]:
    """Peak and time of diffusers' pipeline, for the same picture."""
    pipe = diffusers.ZImagePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    PEERS[name](pipe)
    pipe.set_progress_bar_config(disable=True)
    ends: list[float] = []

    def note(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return values

    times = []
    for seed in range(4):
        ends.clear()
        generator = torch.Generator("cpu").manual_seed(seed)
        pipe(
            PROMPT, height=1024, width=1024, num_inference_steps=9, guidance_scale=0.0, generator=generator,
            callback_on_step_end=note,
        )  # fmt: skip
        times.append(8 * statistics.median(after - before for before, after in pairwise(ends[:8])))
    return {
        "measured": torch.cuda.max_memory_reserved(),
        "allocated": torch.cuda.max_memory_allocated(),
        "denoising_s": statistics.median(times[1:]),
    }


def copy_time(size: int, device: torch.device) -> float:
    """Seconds that a layer of `size` bytes takes from page-locked memory to the device, alone."""
    if not size:
        return 0.0
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    place = torch.empty(size, dtype=torch.uint8, device=device)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        place.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def simulated(folder: str, budget: str) -> dict[str, Any]:
    """Peaks of a picture of 512² on a device in miniature of that size."""
    pipe = ZImagePipeline.from_pretrained(folder, dtype="bfloat16", device="cpu", memory=budget)
    assert pipe.plan is not None
    report = predicted(pipe, 512, 512)
    models = (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae)
    meter = AllocationMeter(parse_memory(budget), device="cpu")
    meter.adopt(parameter for model in models for parameter in model.parameters() if not parameter.is_meta)
    with meter:
        pipe(PROMPT, height=512, width=512, num_inference_steps=2, seed=7, progress=False)
    return report | {
        "placement": str(pipe.plan.placement),
        "measured": meter.peak,
        "stepped_down": list(pipe.plan.stepped_down),
    }


def predicted(pipe: ZImagePipeline, side: int, tokens: int) -> dict[str, Any]:
    """What the plan says of a picture of this size, before it is drawn."""
    assert pipe.plan is not None
    fitted, _ = fit_picture(pipe.plan, side, side, tokens, together=0)
    return {"predicted": fitted.device_peak, "strip_levels": fitted.placement.strip_levels}


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    if "failed" in row:
        return f"{row['budget']:>7}  failed: exit code {row['failed']}"
    if row["budget"] in PEERS:
        speed = f"denoising {row['denoising_s']:.2f} s, {row.get('times_resident', math.nan):.2f} x resident"
        return f"{row['budget']}  measured {gib(row['measured'])}  {speed}"
    ratio = row["measured"] / row["predicted"]
    said = f"{row['budget']:>7}  predicted {gib(row['predicted'])}  measured {gib(row['measured'])}  ratio {ratio:.3f}"
    if "denoising_s" in row:
        said += f"  denoising {row['denoising_s']:.2f} s, {row.get('times_resident', math.nan):.2f} x resident"
        said += f", {row.get('times_bound', math.nan):.2f} x max(compute, copy)"
    goal = f" (goal {GOALS[row['budget']]} GiB)" if row["budget"] in GOALS else ""
    return f"{said}{goal}  {row['placement']}{'  stepped down' if row['stepped_down'] else ''}"


def keep(rows: list[dict[str, Any]], size: str, folder: Path) -> None:
    """The table as JSON, with machine and versions."""
    cuda = torch.cuda.is_available()
    machine = (
        torch.cuda.get_device_name() if cuda else f"simulated device, {platform.machine()}, {os.cpu_count()} cores"
    )
    report = {
        "machine": machine,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "size": size,
        "rows": rows,
    }
    name = f"memory-{'cuda' if cuda else 'simulated'}-{report['date']}"
    print(f"wrote {write(report, folder, name)}")


if __name__ == "__main__":
    main()
