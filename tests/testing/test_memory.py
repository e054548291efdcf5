"""The random models made in memory are those of the folder, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline as DiffusersPipeline

from zimage import ZImagePipeline
from zimage.testing import build_checkpoint, build_diffusers

PARTS = ("transformer", "text_encoder", "vae")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, None), (torch.bfloat16, "bfloat16")])
def test_the_same_bits_as_the_folder(tiny: Path, dtype: torch.dtype, name: str | None) -> None:
    built = build_diffusers(dtype=name)  # type: ignore[arg-type]
    loaded = DiffusersPipeline.from_pretrained(tiny, dtype=dtype)
    for part in PARTS:
        ours, theirs = getattr(built, part).state_dict(), getattr(loaded, part).state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == dtype for key in ours)
        tables = dict(getattr(loaded, part).named_buffers())
        assert {key: table.dtype for key, table in tables.items()} == {
            key: table.dtype for key, table in getattr(built, part).named_buffers()
        }
        assert all(torch.equal(table, tables[key]) for key, table in getattr(built, part).named_buffers())
    assert built.scheduler.config.shift == loaded.scheduler.config.shift == 3.0
    assert built.tokenizer("a red fox").input_ids == loaded.tokenizer("a red fox").input_ids


def test_a_pipeline_over_it_is_the_variant_asked_for(tmp_path: Path) -> None:
    pipe = ZImagePipeline.from_diffusers(build_diffusers(variant="base", seed=3))
    folder = build_checkpoint(tmp_path / "base", variant="base", seed=3)
    other = ZImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
    assert pipe.variant.name == "base"
    options = {"height": 64, "width": 64, "any_size": True, "num_inference_steps": 1, "seed": 1, "progress": False}
    one, two = (each("a fox", output_type="pt", **options).images for each in (pipe, other))  # type: ignore[arg-type]
    assert torch.equal(one, two)


def test_a_size_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="size must be one of 'tiny', 'small', 'wide', 'real', got 'huge'"):
        build_diffusers(size="huge")  # type: ignore[arg-type]
