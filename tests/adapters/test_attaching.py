"""What adapters compute, that they leave no trace when they are taken off, and none when they do not fit."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage import AdapterReport, ZImagePipeline, ZImageWarning
from zimage.adapters.layers import AdaptedLayer
from zimage.errors import AdapterError, RequestError

SCALE = 0.5
Reference = dict[str, tuple[Tensor, Tensor]]
Draw = Callable[..., Tensor]
Checksum = Callable[[ZImagePipeline], str]
WriteLora = Callable[..., Path]


@pytest.fixture(scope="session")
def without(turbo: ZImagePipeline, draw: Draw) -> Tensor:
    """The picture of the model as it is."""
    return draw(turbo)


@pytest.fixture(scope="session")
def with_ink(turbo_folder: Path, reference: Reference, draw: Draw) -> Tensor:
    """The picture of the model whose weights have the reference merged into them."""
    merged = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    with torch.no_grad():
        for module, (down, up) in reference.items():
            merged.transformer.get_submodule(module).weight += SCALE * up @ down
    return draw(merged)


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding in float32."""
    return bool(torch.allclose(one, other, rtol=0, atol=2e-4))


def of_layer(module: str, down: Tensor) -> dict[str, Tensor]:
    """A LoRA of one layer of 64 rows."""
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": torch.ones(64, len(down))}


def test_a_lora_is_what_merging_it_is(
    pipe: ZImagePipeline, ink: Path, draw: Draw, without: Tensor, with_ink: Tensor
) -> None:
    report = pipe.load_adapter(ink)
    assert isinstance(report, AdapterReport)
    assert pipe.adapters == {"ink": 1.0}
    drawn = draw(pipe)
    assert close(drawn, with_ink)
    assert (drawn - without).abs().max() > 0.1


def test_every_format_is_the_same_picture(pipe: ZImagePipeline, in_format: Path, ink: Path, draw: Draw) -> None:
    pipe.load_adapter(ink, "reference")
    expected = draw(pipe)
    pipe.load_adapter(in_format, "other")
    assert torch.equal(draw(pipe, adapters={"other": 1.0}), expected)


def test_taking_off_restores_every_bit_and_every_module(
    pipe: ZImagePipeline, ink: Path, draw: Draw, without: Tensor, checksum: Checksum
) -> None:
    before, names = checksum(pipe), list(pipe.transformer.state_dict())
    pipe.load_adapter(ink, "one")
    pipe.load_adapter(ink, "two")
    adapted = [layer for layer in pipe.transformer.modules() if isinstance(layer, AdaptedLayer)]
    assert len(adapted) == len(pipe._attachments["one"].deltas)
    assert list(pipe.transformer.state_dict()) == names
    assert checksum(pipe) != before
    assert torch.equal(draw(pipe, adapters={}), without)
    pipe.delete_adapters("one")
    assert not torch.equal(draw(pipe), without)
    pipe.delete_adapters(["two"])
    assert checksum(pipe) == before
    assert torch.equal(draw(pipe), without)


def test_a_thousand_times_on_and_off_leave_nothing(
    pipe: ZImagePipeline, write_lora: WriteLora, checksum: Checksum
) -> None:
    before, attachments = checksum(pipe), pipe._attachments
    layers = ("layers.0.attention.to_q", "cap_embedder.1")
    pipe.load_adapter(
        write_lora(of_layer(layers[0], torch.ones(4, 64)) | of_layer(layers[1], torch.ones(4, 64))), "ink"
    )
    adapter = attachments["ink"]
    pipe.delete_adapters("ink")

    def cycle() -> None:
        attachments.attach("ink", adapter)
        attachments.detach("ink")

    cycle()
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(1000):
        cycle()
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert checksum(pipe) == before


def test_what_was_loaded_is_let_go_of(pipe: ZImagePipeline, ink: Path, draw: Draw) -> None:
    pipe.load_adapter(ink)
    draw(pipe)
    adapter = pipe._attachments["ink"]
    watched = [weakref.ref(adapter), *(weakref.ref(part.up) for part in pipe._attachments._parts["ink"].values())]
    watched += [weakref.ref(delta.down) for delta in adapter.deltas.values()]
    del adapter
    pipe.unload_lora_weights()
    gc.collect()
    assert len(watched) > 50
    assert all(one() is None for one in watched)


def test_what_does_not_fit_leaves_no_trace(
    pipe: ZImagePipeline, ink: Path, write_lora: WriteLora, draw: Draw, without: Tensor, checksum: Checksum
) -> None:
    before, whole = checksum(pipe), ink.read_bytes()
    good = of_layer("layers.0.attention.to_q", torch.ones(4, 64))
    bad: list[tuple[bytes | dict[str, Tensor], str]] = [
        (whole[: len(whole) // 2], "not a whole safetensors file"),
        ({**good, **of_layer("layers.1.attention.to_q", torch.ones(4, 65))}, "do not fit"),
        ({**good, **of_layer("layers.1.attention.to_q", torch.full((4, 64), torch.nan))}, "NaN"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 64)}, "looks like one for Flux"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(4, 64)}, "looks like one for Stable Diff"),
    ]
    for content, message in bad:
        file = write_lora(good)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            write_lora(content)
        with pytest.raises(AdapterError, match=message):
            pipe.load_adapter(file)
        assert pipe.adapters == {}
        assert checksum(pipe) == before
    pipe.load_adapter(ink)
    with pytest.raises(AdapterError, match="there is an adapter named 'ink' already; choose another name"):
        pipe.load_adapter(write_lora(good), "ink")
    assert pipe.adapters == {"ink": 1.0}
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), without)


def test_memory_that_runs_out_while_loading_leaves_no_trace(
    pipe: ZImagePipeline, ink: Path, checksum: Checksum, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zimage.errors import NotEnoughMemory

    before, made = checksum(pipe), []

    def short(*arguments: Any) -> Any:
        made.append(arguments)
        if len(made) == 7:
            raise torch.OutOfMemoryError("no more")
        return make_part(*arguments)

    from zimage.adapters.layers import make_part

    monkeypatch.setattr("zimage.adapters.attaching.make_part", short)
    with pytest.raises(NotEnoughMemory, match="memory ran out while the adapter 'ink' was loaded"):
        pipe.load_adapter(ink)
    assert len(made) == 7
    assert (checksum(pipe), pipe.adapters) == (before, {})


def test_unmatched_keys_are_warned_of(pipe: ZImagePipeline, write_lora: WriteLora) -> None:
    tensors = of_layer("layers.0.attention.to_q", torch.ones(4, 64))
    with pytest.warns(ZImageWarning, match="act; 1 are of no layer or part that is known, such as 'what.is.this'"):
        report = pipe.load_adapter(write_lora({**tensors, "what.is.this": torch.ones(1)}))
    assert report.unmatched == ("what.is.this",)
    with pytest.warns(ZImageWarning, match="was trained for base, as its metadata says"):
        pipe.load_adapter(write_lora(tensors, {"ss_base_model_version": "z-image-base"}), "for base")


def test_a_warning_that_is_an_error_leaves_no_trace(
    pipe: ZImagePipeline, write_lora: WriteLora, checksum: Checksum
) -> None:
    before = checksum(pipe)
    file = write_lora({**of_layer("layers.0.attention.to_q", torch.ones(4, 64)), "what.is.this": torch.ones(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZImageWarning, match=r"such as 'what\.is\.this'"):
            pipe.load_adapter(file)
    assert (pipe.adapters, checksum(pipe)) == ({}, before)


def test_two_add_up(
    pipe: ZImagePipeline, reference: Reference, write_lora: WriteLora, draw: Draw, with_ink: Tensor
) -> None:
    """Each with half of the layers, at twice and at half the strength that its file was made for."""
    for number, factor in ((0, 0.5), (1, 2.0)):
        tensors = {}
        for module, (down, up) in list(reference.items())[number::2]:
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up * SCALE * factor}
        pipe.load_adapter(write_lora(tensors), f"half {number}", strength=1 / factor)
    assert pipe.adapters == {"half 0": 2.0, "half 1": 0.5}
    assert close(draw(pipe), with_ink)


def test_one_picture_has_the_same_bits_whatever_else_is_loaded(pipe: ZImagePipeline, ink: Path, draw: Draw) -> None:
    pipe.load_adapter(ink, "b")
    alone = draw(pipe)
    pipe.load_adapter(ink, "a", strength=0.0)
    pipe.load_adapter(ink, "c", strength=0.0)
    assert torch.equal(draw(pipe), alone)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_is_what_merging_it_is(
    strength: float, pipe: ZImagePipeline, turbo_folder: Path, reference: Reference, write_lora: WriteLora, draw: Draw
) -> None:
    """Strength goes from the weights that were to those that were trained, in a straight line; biases stay."""
    merged = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    tensors, generator = {}, torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module, (down, up) in reference.items():
            lengths = torch.rand(len(up), generator=generator) + 0.5
            stem = f"transformer.{module}"
            tensors |= {
                f"{stem}.lora_A.weight": down,
                f"{stem}.lora_B.weight": up,
                f"{stem}.alpha": torch.tensor(2.0),
                f"{stem}.lora_magnitude_vector": lengths,
            }
            weight = merged.transformer.get_submodule(module).weight
            moved = weight + SCALE * up @ down
            trained = moved / moved.norm(dim=1, keepdim=True) * lengths[:, None]
            weight += strength * (trained - weight)
    pipe.load_adapter(write_lora(tensors), "dora", strength=strength)
    assert close(draw(pipe), draw(merged))


def test_it_follows_the_pipeline_to_another_precision(own_turbo: ZImagePipeline, ink: Path, draw: Draw) -> None:
    own_turbo.load_adapter(ink)
    drawn = draw(own_turbo)
    own_turbo.to(torch.bfloat16)
    assert {part.up.dtype for part in own_turbo._attachments._parts["ink"].values()} == {torch.bfloat16}
    narrow = draw(own_turbo)
    assert 0 < (narrow - drawn).abs().max() < 0.5
    own_turbo.unload_lora_weights()
    own_turbo.load_adapter(ink)
    assert torch.equal(draw(own_turbo), narrow)


def test_closing_takes_adapters_off_modules_that_were_handed_in(
    turbo_folder: Path, ink: Path, checksum: Checksum
) -> None:
    owner = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    before = checksum(owner)
    with ZImagePipeline.from_diffusers(owner.to_diffusers()) as borrower:
        borrower.load_adapter(ink)
        assert checksum(owner) != before
        with pytest.raises(AdapterError, match="another pipeline has adapters on the same transformer"):
            owner.load_adapter(ink)
        assert owner.adapters == {}
    assert checksum(owner) == before
    with pytest.raises(RequestError, match="this pipeline was closed"):
        borrower.load_adapter(ink)


def test_adapters_of_one_pipeline_do_not_act_in_pictures_of_another_with_its_modules(
    turbo_folder: Path, ink: Path, draw: Draw, without: Tensor
) -> None:
    """Also not in one that another thread draws meanwhile: it waits for the step that is being taken."""
    owner = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    borrower = ZImagePipeline.from_diffusers(owner.to_diffusers())
    borrower.load_adapter(ink)
    drawn: list[Future[Tensor]] = []
    with ThreadPoolExecutor(1) as pool:

        def meanwhile(*_: Any) -> None:
            if not drawn:
                drawn.append(pool.submit(draw, owner))
                wait(drawn, timeout=0.5)

        with owner.transformer.all_final_layer["2-1"].linear.register_forward_pre_hook(meanwhile):
            assert not torch.equal(draw(borrower), without)
        assert torch.equal(drawn[0].result(), without)


def test_a_saved_pipeline_is_the_model_without_adapters(
    pipe: ZImagePipeline, ink: Path, draw: Draw, without: Tensor, tmp_path: Path
) -> None:
    pipe.load_adapter(ink)
    pipe.save_pretrained(tmp_path / "saved")
    saved = ZImagePipeline.from_pretrained(tmp_path / "saved", dtype="float32", device="cpu", variant="turbo")
    assert torch.equal(draw(saved), without)
