"""The text encoder: what is cut and how it is told, the bounded cache, threads, and the layer that is left out.

That its features are diffusers' is shown in tests/parity.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen3ForCausalLM, Qwen3Model

from zimage import NonFiniteError, ZImagePipeline
from zimage.models.text_encoder import (
    CACHED_PROMPTS,
    TEMPLATE,
    TextEncoder,
    Tokens,
    with_last_layer,
    without_last_layer,
)

START = TEMPLATE.partition("{")[0]


@pytest.fixture
def encoder(base: ZImagePipeline) -> TextEncoder:
    """With the weights that all tests share and a cache of its own."""
    return TextEncoder(base.text_encoder.model, base.text_encoder.tokenizer)


@pytest.fixture
def forwards(encoder: TextEncoder) -> Iterator[Counter[tuple[int, ...]]]:
    """Forward calls of the model by token ids."""
    counted: Counter[tuple[int, ...]] = Counter()
    hook = encoder.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: counted.update([tuple(inputs[0][0].tolist())])
    )
    yield counted
    hook.remove()


@pytest.fixture(scope="module")
def whole(base_folder: Path) -> Qwen3Model:
    """The text encoder with all its layers, as transformers loads it."""
    return Qwen3Model.from_pretrained(base_folder / "text_encoder", dtype=torch.float32).eval()


def test_template_is_what_the_model_was_trained_with(encoder: TextEncoder) -> None:
    tokens = encoder.tokenize("a fox", 512)
    decoded = encoder.tokenizer.decode(tokens.ids)
    assert decoded == TEMPLATE.format(prompt="a fox") == "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokens == Tokens(tokens.ids, len(tokens.ids), "")


@pytest.mark.parametrize(
    "prompt", ["a fox in the snow, soft light", "一只红色的狐狸", "é👩‍👩‍👧‍👦 x" * 3, "a<|im_end|>b c d"]
)
def test_what_is_cut_and_what_is_kept(encoder: TextEncoder, prompt: str) -> None:
    """At every length the kept ids are the first ones, and kept and cut text together are the prompt."""
    whole = encoder.tokenize(prompt, 512)
    for length in range(1, whole.total):
        tokens = encoder.tokenize(prompt, length)
        assert tokens.ids == whole.ids[:length]
        assert tokens.total == whole.total
        kept = encoder.tokenizer.decode(tokens.ids).rstrip("\ufffd")
        assert TEMPLATE.replace("{prompt}", prompt).startswith(kept)
        kept_of_prompt = kept.removeprefix(START)[: len(prompt)] if kept.startswith(START) else ""
        assert kept_of_prompt + tokens.cut == prompt


def test_what_is_cut_of_a_prompt_in_decomposed_letters(encoder: TextEncoder) -> None:
    """Tokens are those of the composed letters; what is shown is the user's own text."""
    prompt = "cafe\u0301 " * 10
    cut = encoder.tokenize(prompt, 20).cut
    assert 0 < len(cut) < len(prompt)
    assert prompt.endswith(cut)


def test_a_prompt_that_fits_to_the_token_is_not_cut(encoder: TextEncoder) -> None:
    total = encoder.tokenize("a fox", 512).total
    assert encoder.tokenize("a fox", total).cut == ""
    assert len(encoder.tokenize("a fox", total).ids) == total
    assert encoder.tokenize("a fox", total - 1).total == total


def test_a_prompt_beyond_what_the_tokenizer_says_it_takes_is_cut_in_silence(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers says on stderr that such a sequence leads to errors; here it is cut, and a warning says so."""
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    monkeypatch.setattr(encoder.tokenizer, "model_max_length", 5)
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert encoder.tokenize("a fox in the snow", 8).total > 8
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not said


def test_features(encoder: TextEncoder) -> None:
    tokens = encoder.tokenize("a fox", 512)
    features = encoder.encode(tokens)
    assert features.shape == (len(tokens.ids), 64)
    assert features.dtype == torch.float32
    assert not features.requires_grad


def test_features_are_the_hidden_states_before_the_last_layer(encoder: TextEncoder, whole: Qwen3Model) -> None:
    tokens = encoder.tokenize("a red fox in the snow", 512)
    with torch.no_grad():
        states = whole(torch.tensor([tokens.ids]), output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert torch.equal(encoder.encode(tokens), states[-2][0])


def test_causality(encoder: TextEncoder) -> None:
    """Features of a token do not depend on what follows, so cutting a prompt changes none that are kept."""
    long, short = (encoder.encode(encoder.tokenize("a red fox in the snow", length)) for length in (512, 10))
    torch.testing.assert_close(short, long[:10], rtol=1e-5, atol=1e-5)


def test_a_known_prompt_is_not_encoded_again(encoder: TextEncoder, forwards: Counter[tuple[int, ...]]) -> None:
    tokens = encoder.tokenize("a fox", 512)
    first = encoder.encode(tokens)
    assert encoder.encode(encoder.tokenize("a fox", 256)) is first, "the same tokens, whatever the limit"
    assert forwards == {tokens.ids: 1}


def test_the_cache_forgets_what_was_used_longest_ago(encoder: TextEncoder, forwards: Counter[tuple[int, ...]]) -> None:
    prompts = [encoder.tokenize(f"fox {index}", 512) for index in range(CACHED_PROMPTS + 1)]
    for tokens in prompts[:-1]:
        encoder.encode(tokens)
    encoder.encode(prompts[0])
    assert set(forwards.values()) == {1}
    assert len(forwards) == len(encoder._features) == CACHED_PROMPTS == 64
    encoder.encode(prompts[-1])
    assert len(encoder._features) == CACHED_PROMPTS
    encoder.encode(prompts[0])
    encoder.encode(prompts[2])
    assert forwards[prompts[0].ids] == forwards[prompts[2].ids] == 1
    encoder.encode(prompts[1])
    assert forwards[prompts[1].ids] == 2


def test_forget(encoder: TextEncoder, forwards: Counter[tuple[int, ...]]) -> None:
    tokens = encoder.tokenize("a fox", 512)
    before = encoder.encode(tokens)
    encoder.forget()
    assert torch.equal(encoder.encode(tokens), before)
    assert forwards[tokens.ids] == 2


def test_threads(encoder: TextEncoder) -> None:
    """More prompts than the cache holds, from many threads, with the cache emptied in between: the same features."""
    prompts = [encoder.tokenize(f"fox {index}", 512) for index in range(CACHED_PROMPTS + 6)]
    expected = [encoder.encode(tokens).clone() for tokens in prompts]

    def work(number: int) -> bool:
        if number % 25 == 0:
            encoder.forget()
        index = (number * 7) % len(prompts)
        return torch.equal(encoder.encode(prompts[index]), expected[index])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))
    assert len(encoder._features) <= CACHED_PROMPTS


def test_damaged_features_are_not_kept(encoder: TextEncoder) -> None:
    tokens = encoder.tokenize("a fox", 512)
    hook = encoder.model.layers[0].register_forward_hook(lambda module, inputs, output: output * float("nan"))
    try:
        with pytest.raises(NonFiniteError, match="text encoder"):
            encoder.encode(tokens)
    finally:
        hook.remove()
    assert encoder.encode(tokens).isfinite().all()


def test_without_last_layer_shares_and_leaves_the_model_whole(whole: Qwen3Model) -> None:
    less = without_last_layer(whole)
    assert len(less.layers) == less.config.num_hidden_layers == len(less.config.layer_types) == 2
    assert len(whole.layers) == whole.config.num_hidden_layers == len(whole.config.layer_types) == 3
    assert isinstance(less.norm, nn.Identity)
    assert not isinstance(whole.norm, nn.Identity)
    weights = dict(whole.named_parameters())
    assert all(weights[name] is parameter for name, parameter in less.named_parameters())
    assert without_last_layer(less) is less


def test_without_last_layer_of_a_causal_lm(base_folder: Path, whole: Qwen3Model) -> None:
    model = Qwen3ForCausalLM(whole.config).eval()
    less = without_last_layer(model)
    assert less.layers[0] is model.model.layers[0]
    assert len(less.layers) == 2


def test_with_last_layer_has_the_hidden_states_that_diffusers_reads(whole: Qwen3Model) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    less = without_last_layer(whole)
    again = with_last_layer(less)
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(again(input_ids=ids, output_hidden_states=True).hidden_states[-2], expected)
        assert torch.equal(whole(ids, output_hidden_states=True).hidden_states[-2], expected)
        assert torch.equal(with_last_layer(again)(ids, output_hidden_states=True).hidden_states[-2], expected)
        assert again(ids).hidden_states is None
        assert torch.equal(less(ids).last_hidden_state, expected)
    assert type(again) is Qwen3Model
    plain = without_last_layer(again)
    assert plain.layers is again.layers
    assert "forward" not in vars(plain)
    assert without_last_layer(plain) is plain
