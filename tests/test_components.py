"""How a pipeline comes to be: from a folder with diffusers' arguments, from components, from diffusers; and back.

Parts are shared and never copied, and those that do not belong together are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from zimage import CheckpointError, GenerationRequest, RequestError, ZImagePipeline
from zimage.files.recipe import pixel_digest

Options = dict[str, Any]


def digest(pipe: ZImagePipeline) -> str:
    """Of one small picture."""
    output = pipe("a fox", 64, 64, 2, any_size=True, seed=7, progress=False)
    return pixel_digest(output.images[0])


def test_loading_takes_diffusers_arguments(turbo_folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(
        str(turbo_folder), torch_dtype=torch.bfloat16, device="cpu", low_cpu_mem_usage=True, local_files_only=True
    )
    assert pipe.dtype == torch.bfloat16
    assert pipe.device == torch.device("cpu")
    assert {part.dtype for part in (pipe.transformer, pipe.text_encoder.model, pipe.autoencoder.vae)} == {pipe.dtype}
    assert (pipe.variant.name, pipe.shift) == ("turbo", 3.0)


def test_the_variant_can_be_said(turbo_folder: Path) -> None:
    """A turbo's weights with base's recipe: the caller knows better than the shift, which is kept."""
    pipe = ZImagePipeline.from_pretrained(turbo_folder, variant="base", dtype="float32", device="cpu")
    request = pipe.resolve(GenerationRequest("a"))
    assert (request.variant, request.num_inference_steps, request.guidance_scale, request.shift) == ("base", 50, 4, 3)
    with pytest.raises(RequestError, match="variant must be one of base, turbo, got 'edit'"):
        ZImagePipeline.from_pretrained(turbo_folder, variant="edit", dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_converted_pipeline_has_the_bits_of_one_loaded_so(
    own_turbo: ZImagePipeline, turbo_folder: Path, dtype: str
) -> None:
    """Weights are converted; the frequencies of the text encoder's rotary embedding are not."""
    loaded = ZImagePipeline.from_pretrained(turbo_folder, dtype=dtype, device="cpu")
    assert digest(own_turbo.to(dtype=dtype)) == digest(loaded)


def test_another_precision_gives_almost_the_same_picture(turbo: ZImagePipeline, own_turbo: ZImagePipeline) -> None:
    call: Options = {"prompt": "a", "height": 64, "width": 64, "any_size": True, "seed": 1, "output_type": "latent"}
    exact = turbo(**call).images
    assert torch.equal(own_turbo(**call).images, exact)
    assert own_turbo.to(torch.bfloat16) is own_turbo
    assert own_turbo.dtype == torch.bfloat16
    rounded = own_turbo(**call).images
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.05
    assert own_turbo.to("cpu", torch.float32).dtype == torch.float32
    assert own_turbo.to(device="cpu").to(dtype="float16").dtype == torch.float16
    assert own_turbo.to("float32").dtype == torch.float32
    assert own_turbo.to("cpu", "float16").dtype == own_turbo.to("float16", "cpu").dtype == torch.float16
    with pytest.raises(RequestError, match=r"dtype must be .*, got torch.float64"):
        own_turbo.to("float64")


def test_saved_and_loaded_again_it_gives_the_same_bits(turbo: ZImagePipeline, tmp_path: Path) -> None:
    turbo.save_pretrained(tmp_path / "copy", max_shard_size="1MB")
    copy = ZImagePipeline.from_pretrained(tmp_path / "copy", dtype="float32", device="cpu")
    assert digest(copy) == digest(turbo)
    assert copy.model["fingerprint"]
    with pytest.raises(RequestError, match="exists and is not an empty folder; choose another, or delete it first"):
        turbo.save_pretrained(tmp_path / "copy")


def test_components_are_shared_not_copied(turbo: ZImagePipeline, turbo_folder: Path) -> None:
    parts = diffusers.ZImagePipeline.from_pretrained(turbo_folder, dtype=torch.float32).components
    for model in ("transformer", "text_encoder", "vae"):
        for weight in parts[model].parameters():  # lie in a file's memory map, and on some CPUs alignment changes bits
            weight.data = weight.data.clone()
    pipe = ZImagePipeline(**parts)
    assert pipe.variant.name == "turbo"
    assert pipe.transformer.layers is parts["transformer"].layers
    assert pipe.autoencoder.vae is parts["vae"]
    assert pipe.text_encoder.model.layers[0] is parts["text_encoder"].layers[0]
    assert pipe.text_encoder.tokenizer is parts["tokenizer"]
    assert digest(pipe) == digest(turbo)
    theirs = pipe.to_diffusers()
    assert theirs.transformer is pipe.transformer
    assert digest(ZImagePipeline.from_diffusers(theirs)) == digest(turbo)
    theirs.vae = None
    with pytest.raises(CheckpointError, match="ZImagePipeline has no vae; pass a complete diffusers ZImagePipeline"):
        ZImagePipeline.from_diffusers(theirs)


def test_components_that_do_not_belong_together_are_refused(turbo: ZImagePipeline) -> None:
    parts = {
        "scheduler": 3.0,
        "vae": turbo.autoencoder.vae,
        "text_encoder": turbo.text_encoder.model,
        "tokenizer": turbo.text_encoder.tokenizer,
        "transformer": turbo.transformer,
    }
    foreign_vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    with pytest.raises(
        CheckpointError, match=r"in_channels is 16, the VAE's latent_channels is 4; take all parts from"
    ):
        ZImagePipeline(**{**parts, "vae": foreign_vae})
    foreign = diffusers.ZImageTransformer2DModel(
        dim=32, n_heads=2, n_layers=1, n_refiner_layers=1, n_kv_heads=2, axes_dims=[4, 6, 6], cap_feat_dim=48
    )
    with pytest.raises(CheckpointError, match="cap_feat_dim is 48, the text encoder's hidden_size is 64"):
        ZImagePipeline(**{**parts, "transformer": foreign})
    with pytest.raises(CheckpointError, match="scheduler's shift must be a number above 0"):
        ZImagePipeline(**{**parts, "scheduler": -1.0})
    with pytest.raises(CheckpointError, match="has no static shift; pass the checkpoint's scheduler"):
        ZImagePipeline(**{**parts, "scheduler": diffusers.DDIMScheduler()})
    with pytest.raises(CheckpointError, match="cannot tell which Z-Image model this is"):
        ZImagePipeline(**{**parts, "scheduler": 4.5})
    assert ZImagePipeline(**{**parts, "scheduler": 4.5}, variant="base").variant.name == "base"
