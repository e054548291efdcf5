"""Peak memory and time of loading a checkpoint, in a process of its own, from float32 transformer shards to bfloat16.

The promise is a peak of at most the weights in the target type and 1 GiB, over what the imports take. `--size real` is
the released models' size: 33 GB on disk and 19.1 GiB in memory; with --picture a 256² picture is made as well.

    python benchmarks/loading.py [--size small|wide|real] [--folder EXISTING] [--memory 15GiB] [--dtype float32]
        [--weight-dtype bfloat16] [--files bfloat16] [--picture] [--steps 8] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from zimage.testing import build_checkpoint

CHILD = """
import json, re, sys, time
from pathlib import Path
from zimage import ZImagePipeline
def peak():  # GiB; not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
folder, dtype, picture, memory, weight_dtype, steps = sys.argv[1:]
imports, start = peak(), time.perf_counter()
pipe = ZImagePipeline.from_pretrained(
    folder, dtype=dtype, device="cpu", memory=memory, weight_dtype=weight_dtype or None
)
seconds, loaded = time.perf_counter() - start, peak()
modules = (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae)
weights = sum(p.numel() * p.element_size() for m in modules for p in m.parameters() if not p.is_meta) / 2**30
report = dict(imports_gib=imports, peak_gib=loaded, weights_gib=weights)
report.update(over_gib=loaded - imports - weights, load_s=seconds)
if picture == "True":
    start = time.perf_counter()
    options = dict(num_inference_steps=int(steps)) if steps else {}
    pipe("a red fox in snow", height=256, width=256, seed=7, progress=False, **options)
    report.update(picture_s=time.perf_counter() - start, picture_peak_gib=peak())
report = {name: round(value, 3) for name, value in report.items()}
report.update(plan=str(pipe.plan.placement), planned_gib=round(pipe.plan.device_peak / 2**30, 3))
print(json.dumps(report))
"""


def main() -> None:
    """Build what is missing, load it in a new process, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--memory", default="auto", help="what a plan may use, as for from_pretrained")
    parser.add_argument("--weight-dtype", default="", help="what layers are stored as, as for from_pretrained")
    parser.add_argument("--files", default="float32", help="type of the transformer's files that are built")
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--steps", default="", help="of the picture; as the recipe has it")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not folder.exists():
            build_checkpoint(folder, size=arguments.size, variant="turbo", transformer_dtype=arguments.files)
        asked = (str(arguments.picture), arguments.memory, arguments.weight_dtype, arguments.steps)
        command = [sys.executable, "-c", CHILD, str(folder), arguments.dtype, *asked]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout)
    print(json.dumps(figures, indent=2))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"loading-{arguments.size}-{arguments.dtype}-{date.today().isoformat()}.json"
        machine = f"{platform.machine()} CPU, {os.cpu_count()} cores"
        report = {
            "machine": machine,
            "size": arguments.size,
            "dtype": arguments.dtype,
            "files": "given" if arguments.folder else arguments.files,
            "memory": arguments.memory,
            "steps": arguments.steps or "recipe",
            **figures,
        }
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
