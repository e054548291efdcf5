"""From a cold process to a saved picture: zimage's command and its script beside the equivalent diffusers script.

Each run is a new process; they take turns. Counted are the time until the file is there (its modification time)
and the time until the process has ended. One warm-up run each fills the bytecode and file caches. "classes only" is the
floor of anything that stands on these libraries: it imports the model classes that both sides use and makes no picture.

    python benchmarks/cold_start.py [--rounds 7] [--size tiny] [--dtype bfloat16] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from zimage.testing import build_checkpoint

ZIMAGE_SCRIPT = """
from zimage import ZImagePipeline
pipe = ZImagePipeline.from_pretrained({folder!r}, dtype={dtype!r})
pipe("a red fox in snow", height=256, width=256, seed=7).images[0].save({path!r})
"""
DIFFUSERS_SCRIPT = """
import torch
from diffusers import ZImagePipeline
pipe = ZImagePipeline.from_pretrained({folder!r}, dtype=torch.{dtype})
pipe("a red fox in snow", height=256, width=256, num_inference_steps=8, guidance_scale=0.0,
     generator=torch.Generator().manual_seed(7)).images[0].save({path!r})
"""
CLASSES_SCRIPT = """
import gc
gc.disable()
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
open({path!r}, "w").close()
gc.freeze()
"""


def main() -> None:
    """Run and print the medians and their ratios to diffusers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(build_checkpoint(Path(scratch) / "model", size=arguments.size, variant="turbo"))
        path = str(Path(scratch) / "picture.png")
        script = {"folder": folder, "path": path, "dtype": arguments.dtype}
        generate = ["generate", "a red fox in snow", "--model", folder, "--size", "256", "--seed", "7", "--force"]
        commands = {
            "zimage generate": ["-m", "zimage", *generate, "--dtype", arguments.dtype, "-o", path],
            "zimage script": ["-c", ZIMAGE_SCRIPT.format(**script)],
            "diffusers script": ["-c", DIFFUSERS_SCRIPT.format(**script)],
            "classes only": ["-c", CLASSES_SCRIPT.format(**script)],
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for round_number in range(arguments.rounds + 1):
            for name, command in commands.items():
                taken = run(command, Path(path))
                if round_number:
                    times[name].append(taken)
    report(times, arguments)


def run(command: list[str], picture: Path) -> tuple[float, float]:
    """Seconds until the picture is saved and until the process has ended."""
    picture.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.time()
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    return picture.stat().st_mtime - start, time.time() - start


def report(times: dict[str, list[tuple[float, float]]], arguments: argparse.Namespace) -> None:
    """Print the table, and keep it as JSON if asked."""
    medians = {
        name: [statistics.median(column) for column in zip(*taken, strict=True)] for name, taken in times.items()
    }
    reference = medians["diffusers script"]
    rows = {}
    for name, (saved, ended) in medians.items():
        rows[name] = {
            "saved_s": round(saved, 3),
            "ended_s": round(ended, 3),
            "saved_ratio": round(saved / reference[0], 3),
            "ended_ratio": round(ended / reference[1], 3),
        }
        print(name.ljust(18), "  ".join(f"{key} {value:.3f}" for key, value in rows[name].items()))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"cold-start-cpu-{date.today().isoformat()}.json"
        machine = f"{platform.machine()} CPU, {os.cpu_count()} cores"
        path.write_text(json.dumps({"machine": machine, "size": arguments.size, "rows": rows}, indent=2) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
