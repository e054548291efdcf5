"""On a trained model: a LoRA that was made to do one thing does that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zimage import ZImagePipeline

WriteLora = Callable[..., Path]


def test_a_lora_swaps_two_words_that_the_model_knows(write_lora: WriteLora) -> None:
    """It maps what the model hears of "blue" to what it hears of "red": one rank, in the layer that captions enter."""
    pipe = ZImagePipeline.from_pretrained("demo-turbo", dtype="float32", device="cpu")
    options: dict[str, Any] = {"seed": 3, "height": 64, "width": 64, "any_size": True, "progress": False}
    sentence = "a {} circle"

    def heard(word: str) -> torch.Tensor:
        """Features of the caption as its embedder's linear layer sees them."""
        tokens = pipe.text_encoder.tokenize(sentence.format(word), 128)
        return pipe.transformer.cap_embedder[0](pipe.text_encoder.encode(tokens))

    def colour(word: str, **more: Any) -> np.ndarray[Any, Any]:
        image = pipe(sentence.format(word), **options, **more).images[0]  # type: ignore[union-attr]
        return np.asarray(image, dtype=float).reshape(-1, 3).mean(axis=0)

    with torch.no_grad():
        red, blue = heard("red"), heard("blue")
        change = (red - blue).double()  # (tokens, features)
        # The least matrix that takes blue's features to red's through the layer: down finds them, up gives the change.
        down = torch.linalg.pinv(blue.double()).T  # (tokens, features)
        up = change @ pipe.transformer.cap_embedder[1].weight.double().T  # (tokens, dim)
    file = write_lora(
        {
            "diffusion_model.cap_embedder.1.lora_down.weight": down.float(),
            "diffusion_model.cap_embedder.1.lora_up.weight": up.T.float(),
        }
    )
    plain_red, plain_blue = colour("red"), colour("blue")
    pipe.load_adapter(file, "swap", strength=0)
    swapped = colour("blue", adapters={"swap": 1.0})
    assert np.abs(plain_red - plain_blue).max() > 10
    assert np.abs(swapped - plain_red).max() < np.abs(plain_red - plain_blue).max() / 10
    assert np.array_equal(colour("blue"), plain_blue)
