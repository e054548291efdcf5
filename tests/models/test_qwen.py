"""Qwen3's layers between fused kernels: transformers' numbers, few operations, and when the model is called itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from zimage import ZImagePipeline
from zimage.kernels import switch
from zimage.kernels.switch import using
from zimage.models import qwen
from zimage.models.text_encoder import TextEncoder, without_last_layer

pytest.importorskip("triton")
WIDTHS: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 100, "rms_norm_eps": 1e-3, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def shared() -> Qwen3Model:
    """Grouped heads, norms that are no ones, three of its four layers."""
    generator = torch.Generator().manual_seed(0)
    model = Qwen3Model(Qwen3Config(**WIDTHS)).eval()
    for name, values in model.state_dict().items():
        drawn = torch.randn(values.shape, generator=generator)
        values.copy_(1.0 + 0.3 * drawn if "norm" in name else 0.2 * drawn)
    return without_last_layer(model)


@pytest.fixture
def model(shared: Qwen3Model) -> Qwen3Model:
    """One that a test may change."""
    return copy.deepcopy(shared)


def embedded(model: Qwen3Model, tokens: int = 13) -> Tensor:
    return model.embed_tokens(torch.arange(tokens)[None] * 7 % 100)


def own(model: Qwen3Model, hidden: Tensor) -> Tensor:
    """What transformers computes."""
    states: Tensor = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 13, 40])
def test_the_models_own_numbers(model: Qwen3Model, dtype: torch.dtype, tokens: int) -> None:
    model.to(dtype)
    hidden = embedded(model, tokens)
    before, expected = hidden.clone(), own(model, hidden)
    assert qwen.is_plain(model)
    with using("on"):
        states = qwen.hidden_states(model, hidden)
    assert states is not None
    assert (states.dtype, states.shape) == (dtype, expected.shape)
    difference = (states.double() - expected.double()).norm() / expected.double().norm()
    assert difference.item() <= (1e-6 if dtype == torch.float32 else 2e-3)
    assert torch.equal(hidden, before)


def test_few_kernels_and_products(model: Qwen3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each layer: two norms, one of them with what is added before it, a rotation and a gate."""
    names: list[str] = []
    run = switch.run

    def note(name: str, *args: Any) -> Any:
        names.append(name)
        return run(name, *args)

    monkeypatch.setattr(qwen, "run", note)
    with using("on"):
        assert qwen.hidden_states(model, embedded(model)) is not None
    assert names == ["normalize", "rotate_normalized", "add_then_normalize", "gate"] * 3


def test_a_prompt_goes_that_way(base: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(base.text_encoder.model, base.text_encoder.tokenizer)
    tokens = encoder.tokenize("a fox", 64)
    expected = encoder.encode(tokens)
    encoder.forget()
    with monkeypatch.context() as patch, using("on"):
        patch.setattr(type(encoder.model), "forward", None)
        features = encoder.encode(tokens)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_without_kernels_the_model_is_called(model: Qwen3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert qwen.hidden_states(model, embedded(model)) is None
    for refused in ("normalize", "add_then_normalize", "rotate_normalized", "gate"):
        with monkeypatch.context() as patch, using("on"):
            patch.setattr(qwen, "run", lambda name, *args, no=refused: None if name == no else switch.run(name, *args))
            assert qwen.hidden_states(model, embedded(model)) is None, refused


class Mover:
    """What brings layers to where they compute, as `memory.residency` does: by hooks, and by `hold`."""

    def __init__(self, model: Any) -> None:
        self.seen: list[str] = []
        for number, layer in enumerate(model.layers):
            layer.number = number
            layer.register_forward_pre_hook(self.enter)
            layer.register_forward_hook(self.leave)
        model.hold = self.hold

    def enter(self, layer: Any, _: Any) -> None:
        self.seen.append(f"enter {layer.number}")

    def leave(self, layer: Any, *_: Any) -> None:
        self.seen.append(f"leave {layer.number}")

    @contextmanager
    def hold(self, layer: Any) -> Iterator[None]:
        self.enter(layer, None)
        yield
        self.leave(layer)


def test_layers_that_are_moved_are_held(model: Qwen3Model) -> None:
    with using("on"):
        expected = qwen.hidden_states(model, embedded(model))
        mover = Mover(model)
        assert qwen.is_plain(model)
        states = qwen.hidden_states(model, embedded(model))
    assert expected is not None
    assert states is not None
    assert torch.equal(states, expected)
    assert mover.seen == [f"{what} {number}" for number in range(3) for what in ("enter", "leave")]
    model.layers[1].register_forward_hook(lambda *given: None)
    assert not qwen.is_plain(model)


def test_projections_are_called(model: Qwen3Model) -> None:
    """Whatever stands in their place, and with their hooks."""
    seen: list[int] = []
    model.layers[1].self_attn.v_proj.register_forward_hook(lambda *given: seen.append(1))
    model.layers[1].mlp.up_proj = nn.Sequential(model.layers[1].mlp.up_proj)
    expected = own(model, embedded(model))
    assert qwen.is_plain(model)
    with using("on"):
        states = qwen.hidden_states(model, embedded(model))
    assert states is not None
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert seen == [1, 1]


def other_class(model: Any) -> None:
    class Other(type(model.layers[1].mlp)):  # type: ignore[misc]
        pass

    model.layers[1].mlp.__class__ = Other


CHANGES = {
    "a hook": lambda model: model.layers[2].mlp.act_fn.register_forward_hook(lambda *given: None),
    "a norm's hook": lambda model: model.layers[2].self_attn.k_norm.register_forward_hook(lambda *given: None),
    "a layer's hook": lambda model: model.layers[0].register_forward_pre_hook(lambda *given: None),
    "a forward": lambda model: setattr(model.layers[0].self_attn, "forward", print),
    "a norm at the end": lambda model: setattr(model, "norm", nn.LayerNorm(48)),
    "another class": other_class,
    "another norm": lambda model: setattr(model.layers[1], "input_layernorm", nn.RMSNorm(48)),
    "another activation": lambda model: setattr(model.layers[0].mlp, "act_fn", nn.GELU()),
    "sliding windows": lambda model: setattr(model, "has_sliding_layers", True),
    "training": lambda model: model.train(),
    "no layers": lambda model: setattr(model, "layers", nn.ModuleList()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_is_not_plain_is_called(model: Qwen3Model, change: Any) -> None:
    change(model)
    assert not qwen.is_plain(model)


def test_what_transformers_leaves_on_layers_does_nothing(model: Qwen3Model) -> None:
    """Once it was asked for the states of layers, as diffusers asks."""
    model(inputs_embeds=embedded(model), use_cache=False, output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.layers)
    assert qwen.is_plain(model)
    model.layers[1].self_attn.register_forward_hook(lambda *given: None)
    assert not qwen.is_plain(model)


def test_a_pipeline_that_went_through_diffusers_is_plain(turbo_folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    theirs = pipe.to_diffusers()
    expected = theirs.encode_prompt("a fox", do_classifier_free_guidance=False, device="cpu")[0][0]
    again = ZImagePipeline.from_diffusers(theirs)
    for one in (pipe, again):
        assert qwen.is_plain(one.text_encoder.model)
        with using("on"):
            made = one.text_encoder.encode(one.text_encoder.tokenize("a fox", 512))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(theirs.encode_prompt("a fox", do_classifier_free_guidance=False, device="cpu")[0][0], expected)
