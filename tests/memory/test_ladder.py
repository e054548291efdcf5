"""Memory that runs out, anywhere: the picture is finished with less, its bits stay, and what cannot be is said."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zimage import GenerationRequest, NotEnoughMemory, ZImagePipeline
from zimage.memory.ladder import is_out_of_memory, once, with_less
from zimage.memory.meter import AllocationMeter
from zimage.memory.plan import Plan
from zimage.memory.residency import Residency
from zimage.models.autoencoder import Autoencoder
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES


def fox(side: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


PLACE = Residency.place
TINY: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 4, "any_size": True}
FROM_IMAGE: dict[str, Any] = {**TINY, "image": fox(64), "strength": 1.0}
LARGE: dict[str, Any] = {"height": 192, "width": 192, "any_size": True, "num_inference_steps": 2, "seed": 4}
WIDER: dict[str, Any] = {**LARGE, "height": 384, "width": 384, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def least_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one layer of each kind, so that all that is done is done once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", replace(SIZES["tiny"], n_layers=1, n_refiner_layers=1, text_layers=2))
        return build_checkpoint(tmp_path_factory.mktemp("least") / "model", variant="base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of few layers, but text layers so wide that there is something to evict."""
    least = {"n_layers": 1, "n_refiner_layers": 1, "text_layers": 6, "intermediate_size": 512}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", replace(SIZES["tiny"], **least))
        return build_checkpoint(tmp_path_factory.mktemp("base") / "model", variant="base")


@pytest.fixture
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting a test run's garbage takes longer than a picture."""
    monkeypatch.setattr("zimage.memory.ladder.gc.collect", lambda: 0)


def load(folder: Path, dtype: str = "float32", **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cpu", dtype=dtype, **options)


def draw(pipe: ZImagePipeline, **options: Any) -> Any:
    pipe.text_encoder.forget()
    return pipe("a fox", progress=False, **options)


def pixels(pipe: ZImagePipeline, **options: Any) -> np.ndarray[Any, Any]:
    return np.asarray(draw(pipe, **options).images[0], dtype=np.int16)


def weights(pipe: ZImagePipeline) -> Iterator[torch.Tensor]:
    for model in (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae):
        yield from (parameter for parameter in model.parameters() if not parameter.is_meta)


def held(pipe: ZImagePipeline) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights(pipe))


def device(pipe: ZImagePipeline, capacity: int | None = None, fail_at: int | None = None) -> AllocationMeter:
    """A device that holds the weights of `pipe` already."""
    meter = AllocationMeter(device="cpu")
    meter.adopt(weights(pipe))
    meter.allocations, meter.capacity, meter.fail_at = 0, capacity, fail_at
    return meter


class OncePerUnit(AllocationMeter):
    """Fails at allocation `number` of everything that is tried by itself, a prompt, a step or a decode, and not when
    that is tried again; `units` are their allocations, those of both tries."""

    def __init__(self, number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(device="cpu")
        self.units: list[int] = []

        def trying(*given: Any, **named: Any) -> Any:
            self.allocations, self.fail_at = 0, number
            made = with_less(*given, **named)
            self.units.append(self.allocations)
            self.fail_at = None
            return made

        monkeypatch.setattr("zimage.placed.with_less", trying)


class UntilLess(AllocationMeter):
    """Fails at the allocation `begin` and at every one after it, until layers are moved away."""

    def __init__(self, begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.begin, self.moved = begin, False

        def moving(residency: Residency, *given: Any) -> None:
            self.moved = True
            PLACE(residency, *given)

        monkeypatch.setattr(Residency, "place", moving)

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.allocations += 1
        if self.allocations >= self.begin and not self.moved:
            raise torch.OutOfMemoryError(f"at {self.allocations}")


@pytest.mark.long
@pytest.mark.no_cover
@pytest.mark.usefixtures("_no_collection")
def test_a_passing_failure_at_any_allocation_changes_nothing(
    least_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one of encoding prompts and an image, denoising with guidance and decoding: memory that came back is not
    done without."""
    pipe = load(least_folder)
    options = {**FROM_IMAGE, "guidance_scale": 2.0}
    expected = draw(pipe, **options).images[0].tobytes()
    with device(pipe) as whole:
        draw(pipe, **options)
    with OncePerUnit(None, monkeypatch) as meter:
        draw(pipe, **options)
    assert sum(meter.units) == whole.allocations > 300, "each is of a unit"
    for number in range(1, max(meter.units) + 1):
        with OncePerUnit(number, monkeypatch) as failing:
            output = draw(pipe, **options)
        for made, usual in zip(failing.units, meter.units, strict=True):
            assert (made > usual) == (usual >= number), f"allocation {number} of {meter.units}"
        assert output.images[0].tobytes() == expected, f"allocation {number}"
        assert output.stepped_down == ()


@pytest.mark.long
@pytest.mark.no_cover
@pytest.mark.usefixtures("_no_collection")
def test_memory_that_is_gone_at_any_allocation_is_done_without(
    least_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(least_folder)
    expected = pixels(whole, **FROM_IMAGE)
    with device(whole) as meter:
        draw(whole, **FROM_IMAGE)
    stages = set()
    for number in range(1, meter.allocations + 1, 25):
        pipe = load(least_folder)
        with UntilLess(number, monkeypatch):
            output = draw(pipe, **FROM_IMAGE)
        assert len(output.stepped_down) == 1, f"allocation {number}"
        stages.add(output.stepped_down[0].split()[0])
        assert np.array_equal(np.asarray(output.images[0]), expected), f"allocation {number}"
    assert stages == {"prompt", "image", "denoising", "decoding"}


def test_a_device_that_is_too_small_is_made_do_with(folder: Path) -> None:
    """By evicting the text encoder: the same bits, the rung is kept, and output and plan say so."""
    pipe = load(folder)
    expected = pixels(pipe, **LARGE)
    with device(pipe) as roomy:
        pixels(pipe, **LARGE)
    small = device(pipe, roomy.peak - 2**19)
    with small:
        output = draw(pipe, **LARGE)
        assert small.live <= small.capacity
        again = draw(pipe, **LARGE)
    assert np.array_equal(np.asarray(output.images[0]), expected)
    assert np.array_equal(np.asarray(again.images[0]), expected)
    (said,) = output.stepped_down
    assert said.startswith("decoding ran out of memory at 192x192 (")
    assert said.endswith("since then: text encoder streamed, transformer resident, decode whole")
    assert again.stepped_down == ()
    assert pipe.plan is not None
    assert pipe.plan.stepped_down == output.stepped_down
    assert pipe.plan.placement.text_encoder == "streamed"
    assert said in str(pipe.plan)
    assert all(parameter.is_meta for parameter in pipe.text_encoder.model.layers.parameters())


def test_a_decode_that_does_not_fit_is_done_in_strips(folder: Path) -> None:
    pipe = load(folder)
    pipe.enable_sequential_cpu_offload()  # all else that helps is done already
    expected = pixels(pipe, **WIDER)
    latents = draw(pipe, **WIDER, output_type="latent").images
    with device(pipe) as roomy:
        pipe.autoencoder.decode(latents, 1)
    with device(pipe, roomy.peak + 2**20):
        output = draw(pipe, **WIDER)
    assert output.stepped_down[-1].startswith("decoding ran out of memory at 384x384")
    assert "in strips" in output.stepped_down[-1]
    assert 0 < np.abs(np.asarray(output.images[0], dtype=np.int16) - expected).max() <= 2
    assert output.images[0].recipe.runtime["decode"].endswith("in strips")


def test_a_picture_that_nothing_helps_is_refused_and_the_next_is_drawn(least_folder: Path) -> None:
    """Where there is not even memory to move layers away."""
    pipe = load(least_folder)
    expected = pixels(pipe, **TINY)
    refused = pytest.raises(NotEnoughMemory, match=r"^memory ran out while layers were moved for this plan: ")
    with device(pipe, held(pipe) // 2), refused:
        draw(pipe, **TINY)
    assert np.array_equal(pixels(pipe, **TINY), expected)


def test_moving_layers_away_may_fail_too(folder: Path) -> None:
    """For want of memory to read a layer again and see that it is the same; what was moved by then stays so."""
    pipe = load(folder)
    expected = pixels(pipe, **TINY)
    refused = pytest.raises(NotEnoughMemory, match="memory ran out while layers were moved for this plan: 1024x1024, f")
    with device(pipe, held(pipe)), refused:
        draw(pipe, **TINY)
    assert np.array_equal(pixels(pipe, **TINY), expected)


def test_parts_that_were_handed_in(folder: Path) -> None:
    """Where the device is the host they have nowhere to go; the picture is refused, not broken."""
    loaded = load(folder)
    pipe = ZImagePipeline.from_diffusers(loaded.to_diffusers())
    assert pipe.plan is None
    with device(pipe, held(pipe)), pytest.raises(NotEnoughMemory, match="ran out of memory at 64x64"):
        draw(pipe, **TINY)
    assert np.array_equal(pixels(pipe, **TINY), pixels(loaded, **TINY))


def test_weights_that_were_changed_are_not_read_again_from_files(folder: Path) -> None:
    pipe = load(folder)
    with torch.no_grad():
        pipe.text_encoder.model.layers[1].mlp.up_proj.weight.mul_(2)
    expected = pixels(pipe, **TINY)
    with (
        device(pipe, held(pipe) + 500_000),
        pytest.raises(NotEnoughMemory, match=r"layers\.1\.mlp\.up_proj\.weight was changed"),
    ):
        draw(pipe, **TINY)
    assert np.array_equal(pixels(pipe, **TINY), expected)


def test_loading_steps_down_too(folder: Path) -> None:
    whole = load(folder)
    expected = pixels(whole, **TINY)
    with AllocationMeter(held(whole) - 2**16, device="cpu"):
        pipe = load(folder)
    assert plan_of(pipe).stepped_down[0].startswith("loading ran out of memory (")
    assert plan_of(pipe).placement.text_encoder == "streamed"
    assert np.array_equal(pixels(pipe, **TINY), expected)
    with AllocationMeter(2**16, device="cpu"), pytest.raises(NotEnoughMemory, match="ran out of memory at 1024x1024"):
        load(folder)


def test_a_stream_steps_down_too(folder: Path) -> None:
    pipe = load(folder)
    expected = pixels(pipe, **LARGE)
    with device(pipe) as roomy:
        pixels(pipe, **LARGE)
    pipe.text_encoder.forget()
    seen = []
    with device(pipe, roomy.peak - 2**19):
        for step in pipe.stream(GenerationRequest("a fox", **LARGE)):
            seen.append(step.index)
    assert seen == [0, 1]
    assert np.array_equal(np.asarray(step.image), expected)
    assert plan_of(pipe).stepped_down


def plan_of(pipe: ZImagePipeline) -> Plan:
    assert pipe.plan is not None
    return pipe.plan


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_a_step_that_is_taken_again_gives_the_same_bits_in_every_sampler(least_folder: Path, sampler: str) -> None:
    """Also where the sampler looks back at the step before."""
    pipe = load(least_folder)
    options = {**TINY, "num_inference_steps": 4, "sampler": sampler, "guidance_scale": 0.0}
    expected = pixels(pipe, **options)
    with device(pipe) as meter:
        draw(pipe, **options)
    for number in range(1, meter.allocations, 97):
        with device(pipe, fail_at=number):
            assert np.array_equal(pixels(pipe, **options), expected), f"allocation {number}"


def test_a_rung_counts_for_the_pictures_after_it(folder: Path) -> None:
    """What a later picture may use is what was found to be there, not what was promised."""
    pipe = load(folder)
    before = plan_of(pipe).budget.device
    with device(pipe) as roomy:
        draw(pipe, **LARGE)
    with device(pipe, roomy.peak - 1):
        draw(pipe, **LARGE)
    assert plan_of(pipe).budget.device < before
    assert plan_of(pipe).budget.name == "auto"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:129] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18.01 GB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyError("x"), False),
    ],
)
def test_which_errors_say_so(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_is_not_about_memory_passes() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        with_less(raising(RuntimeError("shapes")), pytest.fail)
    assert once(lambda: 3) == with_less(lambda: 3, pytest.fail) == 3


def test_it_is_tried_once_more_as_it_was_and_then_with_less_each_time() -> None:
    done: list[str] = []

    def compute() -> str:
        done.append("try")
        if done.count("less") < 3:
            raise torch.OutOfMemoryError(f"wanted {len(done)} bytes\nand so on")
        return "picture"

    def step_down(reason: str) -> None:
        done.extend([reason, "less"])

    assert with_less(compute, step_down) == "picture"
    assert done == [
        "try", "try", "wanted 2 bytes", "less", "try", "wanted 5 bytes", "less", "try", "wanted 8 bytes", "less", "try",
    ]  # fmt: skip


def test_the_allocator_of_the_cpu_says_so_too() -> None:
    reasons: list[str] = []

    def give_up(reason: str) -> None:
        reasons.append(reason)
        raise NotEnoughMemory("given up")

    with pytest.raises(NotEnoughMemory, match="given up"):
        with_less(lambda: torch.empty(2**62, dtype=torch.uint8), give_up)
    assert "allocate" in reasons[0]


def test_nothing_of_a_failed_try_is_held() -> None:
    """The tensors that the frames of the error had are gone before it is tried again, those in cycles too."""
    alive: list[Any] = []

    def compute() -> int:
        if alive:
            assert alive[0]() is None
            return 7
        large = torch.empty(10)
        alive.append(weakref.ref(large))
        cycle: list[Any] = [large]
        cycle.append(cycle)
        raise torch.OutOfMemoryError("no")

    assert with_less(compute, pytest.fail) == 7


def raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def test_a_plan_is_data(folder: Path) -> None:
    assert replace(plan_of(load(folder)), measured=None, stepped_down=("x",)).to_dict()["stepped_down"] == ("x",)


@pytest.mark.usefixtures("_no_collection")
def test_what_is_let_go_of_comes_before_any_rung() -> None:
    done: list[str] = []

    def compute() -> str:
        done.append("computed")
        if done.count("computed") < 3:
            raise MemoryError
        return "made"

    assert with_less(compute, lambda reason: done.append("stepped down"), lambda: done.append("let go")) == "made"
    assert done == ["computed", "let go", "computed", "let go", "stepped down", "computed"]


def test_an_image_that_cannot_be_encoded_whole_is_encoded_in_strips(least_folder: Path) -> None:
    """On a device that has room for one level in strips, and not for a whole encode."""
    pipe = load(least_folder)
    pipe.enable_sequential_cpu_offload()  # all else that helps is done already
    asked = {**WIDER, "num_inference_steps": 2, "image": fox(384), "strength": 0.5, "output_type": "latent"}
    image, noise = torch.from_numpy(fox(384)).movedim(-1, 0)[None] / 255, torch.zeros(1, 16, 48, 48)
    with device(pipe) as whole:
        expected = draw(pipe, **asked).images
    with device(pipe) as strips:
        pipe.autoencoder.encode(image, noise, 1)
    assert strips.peak < 0.65 * whole.peak
    with device(pipe, strips.peak + 2**20):
        output = draw(pipe, **asked)
        again = draw(pipe, **asked)
    assert output.stepped_down[-1].startswith("image ran out of memory at 384x384 (")
    assert output.stepped_down[-1].endswith("in strips")
    assert again.stepped_down == ()
    assert torch.equal(again.images, output.images)
    assert 0 < (output.images - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("stage", "most"), [("image", 1), ("decoding", 0)])
@pytest.mark.usefixtures("_no_collection")
def test_strips_are_taken_one_rung_at_a_time_and_the_ladder_ends(
    least_folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, most: int
) -> None:
    """Also where another stage needs more, so that by the budget alone a picture would get fewer strips again."""
    pipe, tried = load(least_folder), list[int]()
    compute = getattr(Autoencoder, name := {"image": "encode", "decoding": "decode"}[stage])

    def fails(self: Autoencoder, *given: Any) -> torch.Tensor:
        tried.append(given[-1])
        assert len(tried) < 20
        if tried[-1] <= most:
            raise torch.OutOfMemoryError("no")
        made: torch.Tensor = compute(self, *given)
        return made

    monkeypatch.setattr(Autoencoder, name, fails)
    asked = {**WIDER, "image": fox(384), "strength": 1.0, "output_type": "latent" if stage == "image" else "pt"}
    assert "in strips" in draw(pipe, **asked).stepped_down[-1]
    assert tried == sorted(tried)
    assert tried[-1] == most + 1
    most = 2
    with pytest.raises(NotEnoughMemory, match=f"^{stage} ran out of memory at 384x384, .* no more frugal plan"):
        draw(pipe, **asked)
