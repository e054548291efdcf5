"""Two models that are loaded as one: what they share, what the plan says, and which two do not belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage import (
    CheckpointError,
    GenerationRequest,
    NotEnoughMemory,
    Relay,
    RequestError,
    ZImagePipeline,
    ZImageWarning,
)
from zimage.memory.pairs import PairPlan, plan_pair
from zimage.memory.plan import Budget, Plan
from zimage.memory.planner import fit_picture
from zimage.memory.sizes import ModelSizes
from zimage.runtime import portable_path
from zimage.testing import build_checkpoint, build_controlnet

PICTURE: dict[str, Any] = {
    "handover": 0.8, "height": 64, "width": 64, "any_size": True, "num_inference_steps": 3, "seed": 5,
    "output_type": "latent", "progress": False,
}  # fmt: skip


def load(base: Path | str, turbo: Path | str, **options: Any) -> Relay:
    return Relay.from_pretrained(base, turbo, **{"device": "cpu", "dtype": "float32", **options})


def draw(relay: Relay, prompt: str = "a fox", **options: Any) -> torch.Tensor:
    drawn: torch.Tensor = relay(prompt, **{**PICTURE, **options})[0]
    return drawn


@pytest.fixture(scope="module")
def expected(base_folder: Path, turbo_folder: Path) -> torch.Tensor:
    return draw(load(base_folder, turbo_folder), negative_prompt="blurry")


def test_what_both_need_is_loaded_once(base_folder: Path, turbo_folder: Path) -> None:
    relay = load(base_folder, turbo_folder)
    assert relay.turbo.text_encoder is relay.base.text_encoder
    assert relay.turbo.autoencoder is relay.base.autoencoder
    assert relay.turbo.transformer is not relay.base.transformer
    assert not any(one.is_meta for one in relay.turbo.transformer.parameters())
    assert [pipe.variant.name for pipe in (relay.base, relay.turbo)] == ["base", "turbo"]
    assert [pipe.model["source"] for pipe in (relay.base, relay.turbo)] == [str(base_folder), str(turbo_folder)]
    assert relay.plan is not None
    assert relay.plan.sizes.transformer == 2 * relay.base.plan.sizes.transformer  # type: ignore[union-attr]
    assert relay.plan.sizes.text_encoder == relay.base.plan.sizes.text_encoder  # type: ignore[union-attr]
    with ZImagePipeline.from_pretrained(turbo_folder, device="cpu", dtype="float32") as alone:
        options = {name: value for name, value in PICTURE.items() if name != "handover"}
        assert torch.equal(alone("a fox", **options)[0], draw(relay, handover=1))  # type: ignore[index]


def test_reprs_are_one_line(base_folder: Path, turbo_folder: Path) -> None:
    relay = load(base_folder, turbo_folder)
    base, turbo = (
        f"<ZImagePipeline: {folder.name} from {portable_path(folder)}" for folder in (base_folder, turbo_folder)
    )
    assert repr(relay.base) == f"{base}, cpu, float32>"
    assert repr(relay) == f"<Relay: {base}, cpu, float32>, {turbo}, cpu, float32>>"
    again = ZImagePipeline.from_diffusers(relay.turbo.to_diffusers())
    assert repr(again) == "<ZImagePipeline: turbo from parts, cpu, float32>"
    relay.close()
    assert repr(relay) == f"<Relay: {base}, closed>, {turbo}, closed>>"


def streaming(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let both be loaded for a plan in which layers pass through, read from their files."""

    def planned(base: ModelSizes, turbo: ModelSizes, make: Callable[[ModelSizes], Plan]) -> PairPlan:
        def changed(sizes: ModelSizes) -> Plan:
            plan = make(sizes)
            files = {"slots": 2, "text_source": "files", "block_source": "files"}
            return replace(plan, placement=replace(plan.placement, **files, **changes))

        return plan_pair(base, turbo, changed)

    monkeypatch.setattr("zimage.pairing.plan_pair", planned)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_encoder": "streamed"},
        {"resident_blocks": 1},
        {"text_encoder": "streamed", "resident_blocks": 0, "context_resident": False},
    ],
)
def test_what_passes_through_the_device_gives_the_same_bits(
    base_folder: Path,
    turbo_folder: Path,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    streaming(monkeypatch, **changes)
    with load(base_folder, turbo_folder) as relay:
        away = [parameter.is_meta for pipe in (relay.base, relay.turbo) for parameter in pipe.transformer.parameters()]
        assert any(away) == ("resident_blocks" in changes)
        for prompt in ("an owl", "a fox"):
            drawn = draw(relay, prompt, negative_prompt="blurry")
        assert torch.equal(drawn, expected)
        alone = draw(relay, "a new prompt", handover=1)
        assert torch.equal(draw(relay, "a new prompt", handover=1), alone)
        layers = relay.base.text_encoder.model.layers
        assert all(one.is_meta for one in layers.parameters()) == ("text_encoder" in changes)


def test_moving_one_model_leaves_the_shared_text_encoder_to_the_other(
    base_folder: Path, turbo_folder: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    streaming(monkeypatch, text_encoder="streamed")
    with load(base_folder, turbo_folder) as relay:
        relay.turbo.enable_sequential_cpu_offload()
        assert all(one.is_meta for one in relay.turbo.transformer.layers[0].attention.parameters())
        assert not any(one.is_meta for one in relay.base.transformer.parameters())
        relay.base.text_encoder.forget()
        assert torch.equal(draw(relay, negative_prompt="blurry"), expected)
        relay.turbo.close()
        options = {name: value for name, value in PICTURE.items() if name != "handover"}
        relay.base("another prompt", **options)


def test_a_budget_that_is_too_small_for_both_in_full_is_kept(base_folder: Path, turbo_folder: Path) -> None:
    whole = load(base_folder, turbo_folder).plan
    assert whole is not None
    amount = int((whole.device_peak - 300_000) / 0.9)
    with load(base_folder, turbo_folder, memory=amount) as relay:
        assert relay.plan is not None
        assert relay.plan.device_peak <= relay.plan.budget.device < whole.device_peak
        assert relay.plan.placement != whole.placement
        held = {id(one): one for pipe in (relay.base, relay.turbo)
                for model in (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae)
                for one in model.parameters() if not one.is_meta}  # fmt: skip
        assert sum(one.nbytes for one in held.values()) <= relay.plan.device_peak


def devices(pipe: ZImagePipeline) -> list[int]:
    assert pipe.plan is not None
    return [stage.device for stage in pipe.plan.stages]


def held(relay: Relay) -> int:
    """Bytes on the device of all that both models are made of and have beside them."""
    models = [one for pipe in (relay.base, relay.turbo)
              for one in (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae)]  # fmt: skip
    models += [pipe.controlnet.net for pipe in (relay.base, relay.turbo) if pipe.controlnet is not None]
    tensors = {one.data_ptr(): one.nbytes for model in models for one in model.parameters() if not one.is_meta}
    return sum(tensors.values()) + sum(pipe._attachments.bytes for pipe in (relay.base, relay.turbo))


@pytest.mark.parametrize("order", ["base", "turbo"])
def test_what_is_beside_one_model_is_taken_from_what_the_other_may_use(
    base_folder: Path, turbo_folder: Path, expected: torch.Tensor, tmp_path: Path, order: str
) -> None:
    """Whichever of the two has it: an adapter on the first that is loaded, then a ControlNet on the other."""
    whole = load(base_folder, turbo_folder).plan
    assert whole is not None
    net = build_controlnet(tmp_path / "net", version="1.0")
    name = "layers.0.attention.to_q.lora"
    save_file(
        {f"{name}_A.weight": torch.ones(2, 64), f"{name}_B.weight": torch.zeros(64, 2)}, tmp_path / "ink.safetensors"
    )
    with load(base_folder, turbo_folder, memory=int((whole.device_peak + 100_000) / 0.9)) as relay:
        assert relay.plan is not None
        assert relay.plan.placement == whole.placement
        one, other = (relay.base, relay.turbo) if order == "base" else (relay.turbo, relay.base)
        before = [devices(pipe) for pipe in (one, other)]
        one.load_adapter(tmp_path / "ink.safetensors")
        ink = 4 * 2 * (64 + 64)
        assert [devices(pipe) for pipe in (one, other)] == [[need + ink for need in needs] for needs in before]
        assert other.plan is not None
        assert other.plan.placement == whole.placement
        steered = other.load_controlnet(net).bytes + ink
        assert steered > 100_000
        assert relay.base.plan is not None
        assert relay.turbo.plan is not None
        assert relay.base.plan.sizes.adapters == relay.turbo.plan.sizes.adapters == steered
        assert [pipe.plan.sizes.control_blocks for pipe in (one, other) if pipe.plan] == [0, 4]
        for pipe in (relay.base, relay.turbo):
            assert pipe.plan is not None
            assert pipe.plan.placement.text_encoder == "streamed"
            assert pipe.plan.device_peak <= pipe.plan.budget.device
            assert f"the ControlNet {net} needed room; since then: text encoder st" in pipe.plan.stepped_down[-1]
        assert held(relay) <= relay.plan.budget.device
        assert torch.equal(draw(relay, negative_prompt="blurry"), expected)


def test_a_picture_that_leaves_no_room_for_what_is_beside_the_other_model_is_refused(
    base_folder: Path, turbo_folder: Path, tmp_path: Path
) -> None:
    """Until that is let go of."""
    net = build_controlnet(tmp_path / "net", version="1.0")
    with load(base_folder, turbo_folder) as relay:
        size = relay.turbo.load_controlnet(net).bytes
        relay.turbo.unload_controlnet()
        plan = relay.base._plan
        assert plan is not None
        room = fit_picture(plan, 512, 512, 512, least_strips=1)[0].device_peak + size // 2
        plan = replace(plan, budget=Budget(device=room, host=None, name="little"))
        relay.base._plan = relay.turbo._plan = fit_picture(plan, 256, 256, 512)[0]
        before, request = devices(relay.base), relay.resolve(GenerationRequest("a fox", height=512, width=512))
        relay._fit(request)
        relay.turbo.load_controlnet(net)
        assert devices(relay.base) == [need + size for need in before]
        with pytest.raises(NotEnoughMemory, match=r"512x512 does not fit in little: decoding needs"):
            relay.base(request.base)
        with pytest.raises(NotEnoughMemory, match=r"512x512 does not fit in little: decoding needs"):
            relay.stream(request)
        relay.turbo.close()
        assert devices(relay.base) == before
        relay.base._fit(request.base)


@pytest.mark.parametrize("what", ["net", "ink.safetensors"])
def test_layers_of_the_other_model_that_cannot_be_moved_leave_plans_that_are_true(
    base_folder: Path,
    turbo_folder: Path,
    expected: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """What was moved for it before stays so, nothing that is not loaded is counted, and it can be tried again."""
    net, name = build_controlnet(tmp_path / "net", version="1.0"), "layers.0.attention.to_q.lora"
    ink = {f"{name}_A.weight": torch.ones(500, 64), f"{name}_B.weight": torch.zeros(64, 500)}
    save_file(ink, tmp_path / "ink.safetensors")

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no more")

    whole = load(base_folder, turbo_folder).plan
    assert whole is not None
    with load(base_folder, turbo_folder, memory=int((whole.device_peak + 100_000) / 0.9)) as relay:
        put = relay.base.load_controlnet if what == "net" else relay.base.load_adapter
        with monkeypatch.context() as patch:
            patch.setattr(relay.turbo._residency, "place", out_of_memory)
            with pytest.raises(NotEnoughMemory, match="memory ran out while"):
                put(tmp_path / what)
        placements = [pipe.plan.placement for pipe in (relay.base, relay.turbo) if pipe.plan]
        assert [one.text_encoder for one in placements] == ["streamed", "resident"]
        assert all(one.is_meta for one in relay.base.text_encoder.model.layers.parameters())
        assert [pipe.plan.sizes.adapters for pipe in (relay.base, relay.turbo) if pipe.plan] == [0, 0]
        assert torch.equal(draw(relay, negative_prompt="blurry"), expected)
        put(net if what == "net" else tmp_path / what)
        assert relay.turbo.plan is not None
        assert relay.turbo.plan.placement.text_encoder == "streamed"


def test_what_does_not_fit_beside_the_other_model_leaves_no_trace(
    base_folder: Path, turbo_folder: Path, tmp_path: Path
) -> None:
    net = build_controlnet(tmp_path / "net", version="1.0")
    with load(base_folder, turbo_folder) as relay:
        plan = relay.base.plan
        assert plan is not None
        relay.base._plan = replace(plan, budget=replace(plan.budget, device=10**7))
        before = [pipe._plan for pipe in (relay.base, relay.turbo)]
        with pytest.raises(NotEnoughMemory, match=r"the ControlNet .* does not fit: with .* needs"):
            relay.turbo.load_controlnet(net)
        assert relay.turbo.controlnet is None
        assert [pipe._plan for pipe in (relay.base, relay.turbo)] == before


def test_weights_in_fewer_bits_are_of_both(base_folder: Path, turbo_folder: Path) -> None:
    with load(base_folder, turbo_folder, weight_dtype="int8") as relay:
        assert relay.base.weights == relay.turbo.weights == "int8"
        recipe = relay("a fox", **{**PICTURE, "output_type": "pil"})[0][0].recipe
        assert recipe.runtime["weights"] == recipe.turbo.runtime["weights"] == "int8"
        assert relay.replay(recipe).same_bits
    with pytest.raises(RequestError, match="weight_dtype must be"):
        load(base_folder, turbo_folder, weight_dtype="int3")


def test_attention_is_that_of_both(base_folder: Path, turbo_folder: Path) -> None:
    with load(base_folder, turbo_folder, attention_backend="_native_math") as relay:
        assert (relay.base.attention_backend, relay.turbo.attention_backend) == ("_native_math", "_native_math")
    with pytest.raises(RequestError, match="got 'flash3'"):
        Relay.from_pretrained("nowhere/base", "nowhere/turbo", attention_backend="flash3")


def test_the_order_is_base_and_then_turbo(base_folder: Path, turbo_folder: Path, base: Any, turbo: Any) -> None:
    for make in (load, lambda *pair: Relay(*(base if one == base_folder else turbo for one in pair))):
        with pytest.raises(RequestError, match="change their order"):
            make(turbo_folder, base_folder)
        with pytest.raises(RequestError, match="it needs one model of each kind"):
            make(base_folder, base_folder)
    with pytest.raises(RequestError, match="base must be a ZImagePipeline, got str"):
        Relay("base", turbo)  # type: ignore[arg-type]


def test_models_with_another_vae_or_text_encoder_are_refused(base_folder: Path, tmp_path: Path, base: Any) -> None:
    other = build_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"do not share their VAE.*the values of"):
        load(base_folder, other)
    shutil.rmtree(other / "vae")
    shutil.copytree(base_folder / "vae", other / "vae")
    with pytest.raises(CheckpointError, match=r"do not share their text encoder.*the values of"):
        load(base_folder, other)
    turbo = ZImagePipeline.from_pretrained(other, device="cpu", dtype="float32")
    with pytest.raises(RequestError, match=r"do not share their text encoder.*the values of"):
        Relay(base, turbo)


@pytest.mark.parametrize("stored", ["in files", "in fewer bits"])
def test_a_text_encoder_that_is_not_at_hand_is_compared_by_its_files(
    base: ZImagePipeline, turbo_folder: Path, tmp_path: Path, stored: str
) -> None:
    folder = shutil.copytree(turbo_folder, tmp_path / "turbo")

    def loaded() -> ZImagePipeline:
        kind = "int8" if stored == "in fewer bits" else None
        pipe = ZImagePipeline.from_pretrained(folder, device="cpu", dtype="float32", weight_dtype=kind)
        if stored == "in files":
            pipe.enable_model_cpu_offload(device="cpu")
        return pipe

    Relay(base, loaded())
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = "layers.0.mlp.down_proj.weight"
    tensors[f"model.{name}"] = tensors[f"model.{name}"].flip(0)
    save_file(tensors, file)
    other = loaded()
    with pytest.raises(RequestError, match=f"do not share their text encoder.*: the values of {name} differ"):
        Relay(base, other)
    if stored == "in fewer bits":
        shutil.rmtree(folder)
        Relay(base, other)  # nothing is left to compare


def test_pipelines_that_differ_where_they_compute_are_refused(turbo_folder: Path, base: Any) -> None:
    turbo = ZImagePipeline.from_pretrained(turbo_folder, device="cpu", dtype="bfloat16")
    with pytest.raises(RequestError, match=r"one dtype, base has torch\.float32 and turbo torch\.bfloat16"):
        Relay(base, turbo)
    turbo = ZImagePipeline.from_pretrained(turbo_folder, device="cpu", dtype="float32")
    relay = Relay(base, turbo)
    turbo.to(torch.bfloat16)
    with pytest.raises(RequestError, match=r"one dtype, base has torch\.float32 and turbo torch\.bfloat16"):
        draw(relay)
    turbo = ZImagePipeline.from_pretrained(turbo_folder, device="cpu", dtype="float32")
    for setting, value in (("shift_factor", r"0\.1159"), ("scaling_factor", r"0\.3611")):
        setattr(turbo.autoencoder.vae.config, setting, 0.5)
        with pytest.raises(RequestError, match=rf"do not share their VAE.*{setting} is {value} and 0\.5"):
            Relay(base, turbo)


def test_the_plans_own_choice_of_weights_is_said(
    base_folder: Path, turbo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(base: ModelSizes, turbo: ModelSizes, make: Any) -> PairPlan:
        return plan_pair(base, turbo, lambda sizes: make(sizes, weights="int8"))

    monkeypatch.setattr("zimage.pairing.plan_pair", planned)
    with pytest.warns(ZImageWarning, match="stored in int8") as said:
        load(base_folder, turbo_folder)
    assert said[0].filename == __file__
