"""Cheap pictures of latents: close to the colours of the real ones, by a map that is fitted or a small decoder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage import CheckpointError, GenerationRequest, RequestError, ZImagePipeline
from zimage.legs import RelayOutput
from zimage.models.preview import LinearPreview, fit_preview, patterns
from zimage.output import ZImageOutput


@pytest.fixture(scope="module")
def demo() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained("demo-turbo", dtype="float32", device="cpu")


def pixels(image: Image.Image, size: tuple[int, int]) -> Any:
    return np.asarray(image.resize(size, Image.Resampling.BOX), dtype=np.float64) / 255


def explained(preview: Image.Image, picture: Image.Image) -> float:
    """The share of the variance of a picture's colours, mean over 8 x 8 pixels, that a preview explains."""
    made, wanted = (pixels(image, preview.size) for image in (preview, picture))
    return float(1 - ((made - wanted) ** 2).mean() / ((wanted - wanted.mean((0, 1))) ** 2).mean())


def test_steps_show_what_they_expect(demo: ZImagePipeline) -> None:
    request = GenerationRequest("a red circle left of a blue square", seed=7)
    shares, image = [], None
    steps = list(demo.stream(request))
    image = steps[-1].image
    assert image is not None
    for step in steps:
        preview = step.preview()
        assert (preview.mode, preview.size) == ("RGB", (16, 16))
        shares.append(explained(preview, image))
    assert shares[-1] > 0.75
    assert shares[0] < shares[3] < shares[-1] + 0.05
    assert demo.preview(steps[3].denoised[0]).tobytes() == steps[3].preview().tobytes()


def test_a_step_is_pickled_without_its_pipeline(demo: ZImagePipeline) -> None:
    step, _ = demo.stream(GenerationRequest("a red circle", seed=3, num_inference_steps=2))
    again = pickle.loads(pickle.dumps(step))
    assert (again.index, again.sigma, again.request) == (step.index, step.sigma, step.request)
    assert torch.equal(again.denoised, step.denoised)
    assert demo.preview(again.denoised).tobytes() == step.preview().tobytes()
    with pytest.raises(RequestError, match=r"has no pipeline .* pass its denoised to a pipeline's preview"):
        again.preview()
    assert step != again
    assert "tensor" not in repr(step)


def test_outputs_compare_as_objects() -> None:
    for kind in (ZImageOutput, RelayOutput):
        one, other = (kind(np.zeros((2, 4, 4, 3)), ()) for _ in range(2))
        assert one != other
        assert len({one, one, other}) == 2


def test_previews_change_no_picture(demo: ZImagePipeline) -> None:
    request = GenerationRequest("a red circle", seed=3)
    expected = demo(request, progress=False).images[0]  # type: ignore[union-attr]
    for step in demo.stream(request):
        step.preview()
    assert step.image is not None
    assert step.image.tobytes() == expected.tobytes()


def test_the_map_is_the_best_for_the_patterns_and_the_same_each_time(
    demo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage.models.preview.SIDE", 128)
    vae = demo.autoencoder.vae
    fitted, again = fit_preview(vae), fit_preview(vae)
    assert torch.equal(fitted.weights, again.weights)
    assert (fitted.weights.shape, fitted.offset.shape) == ((16, 3), (3,))

    def error(preview: LinearPreview) -> float:
        total = 0.0
        for pattern in patterns():
            with torch.no_grad():
                encoded = vae.encode(pattern * 2 - 1).latent_dist.mode()
            values = ((encoded - vae.config.shift_factor) * vae.config.scaling_factor).movedim(1, -1)
            wanted = torch.nn.functional.avg_pool2d(pattern, 8).movedim(1, -1)
            total += float((values @ preview.weights + preview.offset - wanted).square().sum())
        return total

    least = error(fitted)
    for change in (0.01, -0.01):
        assert error(LinearPreview(fitted.weights + change, fitted.offset)) > least
        assert error(LinearPreview(fitted.weights, fitted.offset + change)) > least


def test_the_map_is_for_latents_as_the_transformer_has_them(demo: ZImagePipeline) -> None:
    """Another scale and shift of the same latents make another map to the same colours."""
    vae, config = demo.autoencoder.vae, demo.autoencoder.vae.config
    other = SimpleNamespace(scaling_factor=2 * config.scaling_factor, shift_factor=config.shift_factor + 0.5)
    plain, scaled = (
        fit_preview(SimpleNamespace(config=one, encode=vae.encode, parameters=vae.parameters))
        for one in (config, other)
    )
    latents = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    raw = latents / config.scaling_factor + config.shift_factor
    moved = (raw - other.shift_factor) * other.scaling_factor
    expected = latents @ plain.weights + plain.offset
    torch.testing.assert_close(moved @ scaled.weights + scaled.offset, expected, atol=1e-3, rtol=0)
    assert not torch.allclose(scaled.weights, plain.weights, atol=1e-2)


def test_colours_beyond_the_range_and_no_numbers_at_all() -> None:
    preview = LinearPreview(torch.eye(3), torch.zeros(3))
    latents = torch.tensor([[2.0, -1.0, 0.5], [torch.nan, torch.inf, -torch.inf]]).T.reshape(1, 3, 1, 2)
    assert np.asarray(preview(latents)).tolist() == [[[255, 0, 128], [0, 0, 0]]]


@pytest.mark.parametrize("latents", [torch.zeros(2, 16, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(16), "latents"])
def test_other_tensors_are_refused(demo: ZImagePipeline, latents: Any) -> None:
    with pytest.raises(RequestError, match=r"latents must be a tensor \(1, 16, h, w\), got "):
        demo.preview(latents)


def test_half_precision_has_previews(turbo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of smaller patterns: a CPU without instructions for half precision is slow with it."""
    monkeypatch.setattr("zimage.models.preview.SIDE", 64)
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="bfloat16", device="cpu")
    assert pipe.preview(torch.zeros(1, 16, 8, 12)).size == (12, 8)


def build_tiny(folder: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "latent_channels": 16,
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    }
    options |= {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, **changes}
    torch.manual_seed(0)
    AutoencoderTiny(**options).save_pretrained(folder)
    return folder


def test_a_small_decoder(demo: ZImagePipeline, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "tiny", scaling_factor=2.0, shift_factor=0.25)
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    linear = demo.preview(latents)
    demo.set_preview(folder)
    try:
        made = demo.preview(latents)
        theirs = AutoencoderTiny.from_pretrained(folder)
        with torch.no_grad():
            expected = theirs.decode(latents / 2.0 + 0.25).sample.mul(0.5).add(0.5).clamp(0, 1)
        assert made.size == (48, 32)
        wanted = expected[0].movedim(0, -1).mul(255).round().to(torch.uint8).numpy()
        assert np.array_equal(np.asarray(made), wanted)
    finally:
        demo.set_preview()
    assert demo.preview(latents).tobytes() == linear.tobytes()


def test_taef1_comes_from_the_hub(demo: ZImagePipeline, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json of madebyollin/taef1 is not in the cache .* downloads are"):
        demo.set_preview("taef1", cache_dir=tmp_path, local_files_only=True)


def truncate(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def leave_out(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.layers.0.weight"]
    save_file(tensors, weights)


def another_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))


def without_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (truncate, "model.safetensors cannot be loaded: .*; download it again"),
        (leave_out, r"does not have the tensors of .*: decoder\.layers\.0\.weight; download it again"),
        (another_class, "is of 'AutoencoderKL'; a preview needs an AutoencoderTiny"),
        (without_weights, "has no diffusion_pytorch_model.safetensors; a decoder for previews has config.json and"),
    ],
)
def test_a_decoder_that_cannot_be_used(demo: ZImagePipeline, tmp_path: Path, change: Any, said: str) -> None:
    folder = build_tiny(tmp_path / "tiny")
    change(folder)
    with pytest.raises(CheckpointError, match=said):
        demo.set_preview(folder)


def test_a_decoder_for_other_latents_and_a_folder_that_is_none(demo: ZImagePipeline, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="for latents of 4 channels, this model's have 16; 'taef1' is made for"):
        demo.set_preview(build_tiny(tmp_path / "tiny", latent_channels=4))
    with pytest.raises(CheckpointError, match=r"there is no folder .*none; give one with config.json"):
        demo.set_preview(tmp_path / "none")
    for wrong in (None, 5):
        with pytest.raises(
            RequestError, match=r"decoder must be 'linear', 'taef1', a hub id or a folder, got (None|int)"
        ):
            demo.set_preview(wrong)  # type: ignore[arg-type]
