"""Which adapters act, and how strongly: set for all pictures or for one, never leaking from one to another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zimage import GenerationRequest, ZImagePipeline
from zimage.errors import AdapterError, RequestError
from zimage.files.png import Picture
from zimage.files.recipe import Recipe

Draw = Callable[..., Tensor]
Small = dict[str, Any]
WriteLora = Callable[..., Path]


def asked(small: Small, adapters: dict[str, float] | None, seed: int = 7, prompt: str = "a fox") -> GenerationRequest:
    return GenerationRequest(prompt, **small, seed=seed, adapters=adapters)


def pixels(image: Any) -> str:
    assert isinstance(image, Picture)
    assert image.recipe is not None
    return image.recipe.pixels


def alone(pipe: ZImagePipeline, request: GenerationRequest) -> str:
    """The digest of a picture of its own call."""
    output = pipe(request)
    assert not isinstance(output, tuple)
    return pixels(output.images[0])


@pytest.fixture
def two(pipe: ZImagePipeline, ink: Path) -> ZImagePipeline:
    """With "ink" acting by itself and "wash" waiting."""
    pipe.load_adapter(ink, "ink")
    pipe.load_adapter(ink, "wash", strength=0)
    return pipe


def test_a_call_says_its_own_and_the_next_has_what_was_set(two: ZImagePipeline, draw: Draw) -> None:
    usual, none = draw(two), draw(two, adapters={})
    strong = draw(two, adapters={"ink": 0.25, "wash": 0.5})
    assert two.adapters == {"ink": 1.0, "wash": 0.0}
    assert torch.equal(draw(two), usual)
    assert len({drawn.sum().item() for drawn in (usual, none, strong)}) == 3
    two.set_adapters(["wash", "ink"], [0.5, 0.25])
    assert torch.equal(draw(two), strong)
    two.set_adapters([])
    assert torch.equal(draw(two), none)


def test_strength_scales_what_is_added(pipe: ZImagePipeline, write_lora: WriteLora, draw: Draw) -> None:
    """Twice a quarter is a half of the same; a negative strength undoes a positive one."""
    down, up = torch.ones(4, 64) / 64, torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    file = write_lora({"layers.0.attention.to_v.lora_A.weight": down, "layers.0.attention.to_v.lora_B.weight": up})
    for name in "abc":
        pipe.load_adapter(file, name, strength=0)
    half = draw(pipe, adapters={"a": 0.5})
    none = draw(pipe, adapters={})
    assert (half - none).abs().max() > 1e-4
    assert torch.allclose(draw(pipe, adapters={"a": 0.25, "b": 0.25}), half, rtol=0, atol=1e-5)
    assert torch.allclose(draw(pipe, adapters={"a": 1.5, "b": -2.0, "c": 0.5}), none, rtol=0, atol=1e-5)


def test_the_resolved_request_says_which_act(two: ZImagePipeline, small_picture: Small) -> None:
    assert two.resolve(asked(small_picture, None)).adapters == (("ink", 1.0),)
    assert two.resolve(asked(small_picture, {})).adapters == ()
    resolved = two.resolve(asked(small_picture, {"wash": 2, "ink": 0}))
    assert resolved.adapters == (("wash", 2.0),)
    assert two.resolve(asked(small_picture, {"wash": 2, "ink": 1})).adapters == (("ink", 1.0), ("wash", 2.0))
    two.set_adapters([])
    assert two.resolve(resolved).adapters == (("wash", 2.0),)
    nothing = two.resolve(asked(small_picture, {}))
    two.set_adapters("ink")
    assert two.resolve(nothing).adapters == ()


def test_pictures_of_one_call_do_not_share_what_adapters_changed(two: ZImagePipeline, small_picture: Small) -> None:
    """Refined captions and modulations go through adapted layers too."""
    requests = [
        asked(small_picture, adapters) for adapters in ({}, {"ink": 1}, {"ink": 0.5}, {"wash": 1, "ink": 1}, {})
    ]
    expected = [alone(two, request) for request in requests]
    assert len(set(expected)) == 4
    output = two(requests)
    assert not isinstance(output, tuple)
    assert [pixels(image) for image in output.images] == expected
    assert [pixels(drawn.image) for drawn in two.generate_many(requests)] == expected


def test_streams_that_take_turns_keep_their_own(two: ZImagePipeline, small_picture: Small) -> None:
    requests = [asked(small_picture, adapters) for adapters in ({"ink": 1}, {}, {"ink": 0.5, "wash": 0.5})]
    expected = [alone(two, request) for request in requests]
    streams = [two.stream(request) for request in requests]
    ends = []
    for _ in range(small_picture["num_inference_steps"]):
        ends = [next(stream) for stream in streams]
        two.set_adapters("wash", 3.0)
    assert [pixels(step.image) for step in ends] == expected


def test_threads_keep_their_own(two: ZImagePipeline, small_picture: Small) -> None:
    requests = [asked(small_picture, {"ink": strength}) for strength in (0.0, 0.5, 1.0)]
    expected = [alone(two, request) for request in requests]
    found: dict[int, list[str]] = {}

    def work(number: int) -> None:
        found[number] = [alone(two, requests[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [expected[number]] * 3 for number in range(3)}


def test_an_error_in_a_step_lets_nothing_act_on(two: ZImagePipeline, draw: Draw, small_picture: Small) -> None:
    none = draw(two, adapters={})
    layer = two.transformer.layers[0].attention.to_q
    hook = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(two)
    hook.remove()
    assert two._attachments._switch.active == ()
    assert torch.equal(draw(two, adapters={}), none)


def test_an_adapter_that_goes_while_a_picture_is_made_is_an_error(
    two: ZImagePipeline, ink: Path, small_picture: Small
) -> None:
    stream = two.stream(asked(small_picture, {"ink": 1}))
    next(stream)
    two.delete_adapters("ink")
    two.load_adapter(ink, "ink")
    with pytest.raises(AdapterError, match="the adapter 'ink' was deleted while a picture was made with it"):
        next(stream)


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        ({"inc": 1}, AdapterError, "no adapter named 'inc': there are 'ink', 'wash'; load it first"),
        ({"inc": 0}, AdapterError, "no adapter named 'inc'"),
        ({"ink": "1"}, RequestError, "the strength of 'ink' must be a number from -100 to 100, got str '1'"),
        ({"ink": float("nan")}, RequestError, "must be a number from -100 to 100"),
        ({"ink": 101}, RequestError, "must be a number from -100 to 100"),
        (["ink"], RequestError, "adapters must map up to 64 names to strengths"),
        ({f"{number}": 1 for number in range(65)}, AdapterError, "no adapter named '0'"),
    ],
)
def test_what_cannot_act_is_refused(
    two: ZImagePipeline, small_picture: Small, adapters: Any, error: type[Exception], message: str
) -> None:
    for ask in (
        lambda: two("a fox", **small_picture, adapters=adapters),
        lambda: two.stream(asked(small_picture, adapters)),
    ):
        with pytest.raises(error, match=message):
            ask()


def test_without_any_a_name_says_to_load_it(turbo: ZImagePipeline, small_picture: Small) -> None:
    with pytest.raises(AdapterError, match="no adapter named 'ink': none is loaded; load it first with load_adapter"):
        turbo("a fox", **small_picture, adapters={"ink": 1})
    assert turbo.resolve(asked(small_picture, {})).adapters == ()


@pytest.mark.parametrize("name", ["", " ink", "a\nb", "x" * 65, 7])
def test_names_that_cannot_be(pipe: ZImagePipeline, ink: Path, name: Any) -> None:
    with pytest.raises(RequestError, match="name must be a text of 1 to 64 printable characters"):
        pipe.load_adapter(ink, name)


def test_a_folder_that_is_named_by_a_dot_has_a_name(
    pipe: ZImagePipeline, ink: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy" / "inner").mkdir(parents=True)
    (tmp_path / "toy" / "ink.safetensors").write_bytes(ink.read_bytes())
    (tmp_path / "linked").symlink_to(tmp_path / "toy")
    for folder, source in (("toy", "."), ("toy/inner", ".."), ("", "linked")):
        monkeypatch.chdir(tmp_path / folder)
        pipe.load_adapter(source)
        pipe.delete_adapters("linked" if source == "linked" else "toy")


def test_adapters_are_disabled_and_enabled_again(pipe: ZImagePipeline, ink: Path, draw: Draw) -> None:
    none = draw(pipe)
    for name, strength in (("toy", 0.5), ("off", 0.0), ("gone", 0.7)):
        pipe.load_adapter(ink, name, strength=strength)
    before = draw(pipe, adapters={"toy": 0.5})
    pipe.disable_lora()
    pipe.disable_lora()
    assert torch.equal(draw(pipe), none)
    assert pipe.get_active_adapters() == []
    pipe.delete_adapters("gone")
    pipe.load_adapter(ink, "gone", strength=0.0)
    pipe.enable_lora()
    assert pipe.adapters == {"toy": 0.5, "off": 0.0, "gone": 0.0}
    assert torch.equal(draw(pipe), before)
    pipe.disable_lora()
    pipe.set_adapters("off", 0.25)
    pipe.enable_lora()
    assert pipe.adapters == {"toy": 0.0, "off": 0.25, "gone": 0.0}


def test_scripts_for_diffusers_run(pipe: ZImagePipeline, ink: Path, draw: Draw) -> None:
    """Their order of loading, setting and scaling."""
    none = draw(pipe)
    pipe.load_lora_weights(ink.parent, weight_name=ink.name, adapter_name="toy")
    pipe.load_lora_weights(str(ink))
    assert pipe.get_list_adapters() == {"transformer": ["toy", "default_0"]}
    assert pipe.get_active_adapters() == ["toy"]
    toy = draw(pipe)
    pipe.set_adapters(["default_0"], adapter_weights=[0.5])
    assert pipe.get_active_adapters() == ["default_0"]
    half = draw(pipe)
    pipe.set_adapters("toy")
    assert torch.equal(draw(pipe, joint_attention_kwargs={"scale": 0.5}), half)
    assert torch.equal(draw(pipe, joint_attention_kwargs={"scale": 0.5}, adapters={"default_0": 2.0}), toy)
    assert torch.equal(draw(pipe), toy)
    pipe.delete_adapters("default_0")
    for merge in (pipe.fuse_lora, pipe.unfuse_lora):
        with pytest.raises(RequestError, match="leave fuse_lora and unfuse_lora out"):
            merge(lora_scale=0.7)
    with pytest.raises(RequestError, match=r"joint_attention_kwargs can be \{'scale': a number\}"):
        draw(pipe, joint_attention_kwargs={"gate": 1})
    with pytest.raises(AdapterError, match="no adapter named 'pixel'"):
        pipe.set_adapters(["toy", "pixel"])
    with pytest.raises(RequestError, match="adapter_weights has 2 entries for 1 names"):
        pipe.set_adapters(["toy"], [1.0, 2.0])
    assert pipe.adapters == {"toy": 1.0}
    pipe.set_adapters({"toy": 0.25})
    assert pipe.adapters == {"toy": 0.25}
    for weights in (np.array([0.5]), torch.tensor([0.5]), np.float32(0.5)):
        pipe.set_adapters(["toy"], adapter_weights=weights)
        assert pipe.adapters == {"toy": 0.5}
    pipe.load_adapter(ink, "wash")
    pipe.set_adapters(["toy", "wash"], adapter_weights=np.array([0.25, 0.75]))
    assert pipe.adapters == {"toy": 0.25, "wash": 0.75}
    pipe.delete_adapters("wash")
    for change, wrong in ((pipe.set_adapters, None), (pipe.set_adapters, [["toy"]]), (pipe.delete_adapters, 3)):
        with pytest.raises(RequestError, match="adapter_names must be a name, or a list of names, of adapters; got"):
            change(wrong)
    with pytest.raises(RequestError, match="an adapter's strength must be a number from -100 to 100, got int 101"):
        pipe.load_adapter("other.safetensors", strength=101)
    assert pipe.adapters == {"toy": 0.25}
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    assert torch.equal(draw(pipe), none)


def test_the_recipe_names_the_file_and_is_followed_only_with_it(
    two: ZImagePipeline, ink: Path, write_lora: WriteLora, small_picture: Small
) -> None:
    output = two("a fox", seed=7, **small_picture, adapters={"ink": 0.75})
    assert not isinstance(output, tuple)
    recipe = output.images[0].recipe
    digest = two._attachments["ink"].digest
    assert recipe.request.adapters == (("ink", 0.75),)
    assert recipe.adapters == {"ink": {"source": str(ink), "digest": digest}}
    assert Recipe.from_json(recipe.to_json()) == recipe
    two.set_adapters("wash", 5)
    assert two.replay(recipe).same_bits
    two.delete_adapters("ink")
    with pytest.raises(
        AdapterError, match=r"made with the adapter 'ink' from .* which is not loaded; load that with"
    ) as caught:
        two.replay(recipe)
    assert f"from {str(ink)!r} (SHA-256" in str(caught.value)
    tensors = {"layers.0.attention.to_q.lora_A.weight": torch.ones(4, 64)}
    two.load_adapter(write_lora({**tensors, "layers.0.attention.to_q.lora_B.weight": torch.ones(64, 4)}), "ink")
    with pytest.raises(AdapterError, match=r"which is another file here \(SHA-256"):
        two.replay(recipe)


def test_a_recipe_without_adapters_is_what_it_was(
    two: ZImagePipeline, turbo: ZImagePipeline, small_picture: Small
) -> None:
    """To the byte, and its replay has none whatever is set."""
    plain = turbo("a fox", seed=7, **small_picture, progress=False)
    output = two("a fox", seed=7, **small_picture, adapters={})
    assert not isinstance(output, tuple)
    assert not isinstance(plain, tuple)
    assert output.images[0].recipe.to_json() == plain.images[0].recipe.to_json()
    assert "adapters" not in output.images[0].recipe.to_json()
    assert two.replay(plain.images[0].recipe).same_bits


def test_recipes_of_adapters_are_checked(two: ZImagePipeline, small_picture: Small) -> None:
    output = two("a fox", seed=7, **small_picture)
    assert not isinstance(output, tuple)
    text = output.images[0].recipe.to_json()
    assert '"adapters": [["ink", 1.0]]' in text
    for old, new, message in (
        ('[["ink", 1.0]]', '[["ink", 1.0, 2]]', "adapters must be pairs of a name and a strength"),
        ('[["ink", 1.0]]', '[["ink", "1"]]', "the strength of 'ink' must be a number"),
        ('[["ink", 1.0]]', '[["other", 1.0]]', "adapters lacks: other"),
        ('[["ink", 1.0]]', "[]", "adapters has unknown entries: ink"),
        ('"digest"', '"diggest"', "the adapter ink lacks: digest"),
    ):
        assert old in text
        with pytest.raises(RequestError, match=message):
            Recipe.from_json(text.replace(old, new))
