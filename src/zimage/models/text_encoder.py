"""Prompts to caption features with Qwen3, without padding and without the layer that nobody reads.

The features are the hidden states before the last layer, so that layer and the final norm are not there. The model is
causal: a prompt encoded alone and unpadded gives what padding to 512 and a mask would. Features are cached by their
tokens, a bounded number of prompts. Knows nothing of images or of guidance.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..errors import RequestError
from . import qwen
from .graphs import CUDARecorder, Record, Recordings
from .precision import finite

TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
"""What Qwen3's chat template gives for one user turn with a generation prompt and thinking enabled."""

CACHED_PROMPTS = 64
"""Each is at most 512 tokens of 2560 numbers: 2.6 MB in bfloat16."""

_PROMPT_START = TEMPLATE.index("{prompt}")


@dataclass(frozen=True)
class Tokens:
    """A templated prompt as token ids: those kept, how many there were, and the text of the prompt that is cut."""

    ids: tuple[int, ...]
    total: int
    cut: str = ""


class TextEncoder:
    """Owns the language model, its tokenizer and the cache of features."""

    def __init__(
        self, model: Qwen3Model, tokenizer: PreTrainedTokenizerBase, device: torch.device | None = None
    ) -> None:
        """`model` as `without_last_layer` returns it; `device` is where its layers compute, if not where it is."""
        self.model = model
        self.device = device
        self.tokenizer = tokenizer
        self._features: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._guard = threading.Lock()
        self._recordings: Recordings | None = None

    def tokenize(self, prompt: str, max_sequence_length: int) -> Tokens:
        """The ids of the templated prompt, cut on the right at `max_sequence_length`."""
        text = TEMPLATE.replace("{prompt}", prompt)
        encoded = self.tokenizer(text, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        ids = encoded["input_ids"]
        if len(ids) <= max_sequence_length:
            return Tokens(tuple(ids), len(ids))
        cut_at = max(encoded["offset_mapping"][max_sequence_length][0], _PROMPT_START)
        return Tokens(tuple(ids[:max_sequence_length]), len(ids), text[cut_at : _PROMPT_START + len(prompt)])

    @torch.no_grad()
    def encode(self, tokens: Tokens) -> Tensor:
        """Caption features (tokens, hidden size) of one prompt, on the model's device and in its type, from the cache
        if they are there. Raises `NonFiniteError` if they are not finite in float32 either."""
        with self._guard:
            known = self._features.get(tokens.ids)
            if known is not None:
                self._features.move_to_end(tokens.ids)
                return known
        features = finite(lambda: self._hidden_states(tokens.ids), "the text encoder")
        with self._guard:
            self._features[tokens.ids] = features
            while len(self._features) > CACHED_PROMPTS:
                self._features.popitem(last=False)
        return features

    def forget(self) -> None:
        """Empty the cache, after a change of weights, type or device."""
        with self._guard:
            self._features.clear()

    def use_graphs(self, record: Record | None = None, device_type: str = "cuda") -> None:
        """Let what fused kernels compute on devices of a type be recorded, by a `CUDARecorder` if no `record` is given,
        once for each 32 tokens; done once, it is done."""
        if self._recordings is None:
            parts = self.model.layers, self.model.rotary_emb
            self._recordings = Recordings(self.model, parts, record or CUDARecorder(), device_type)

    def drop_graphs(self) -> None:
        """The inverse of `use_graphs`; recordings are let go of."""
        self._recordings = None

    def forget_graphs(self) -> None:
        """Let go of the recordings, for memory that is short or weights that move; others are made when needed."""
        if self._recordings is not None:
            self._recordings.forget()

    def _hidden_states(self, ids: tuple[int, ...]) -> Tensor:
        batch = torch.tensor([ids], device=self.model.device)  # (1, tokens)
        embedded = self.model.embed_tokens(batch)
        embedded = embedded if self.device is None else embedded.to(self.device)
        recordings, states = self._recordings, None
        if qwen.is_plain(self.model):
            how = () if recordings is None else (partial(recordings.compute, "prompt"),)
            states = qwen.hidden_states(self.model, embedded, *how)
        if states is None:
            states = self.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return states[0]


def without_last_layer(model: Any) -> Qwen3Model:
    """A Qwen3 model, or the one inside a causal LM, less its last layer and final norm; the weights are shared.

    A model that this function gave is returned as it is; one of `with_last_layer` computes as before that.
    """
    inner = getattr(model, "model", model)
    if isinstance(inner.norm, nn.Identity):
        if hasattr(vars(inner).get("forward"), "records"):
            inner = copy.copy(inner)
            del inner.forward, inner.save_pretrained
        return inner
    layers = list(inner.layers)[:-1]
    shared = copy.copy(inner)
    shared.config = copy.deepcopy(inner.config)
    shared.config.num_hidden_layers = len(layers)
    shared.config.layer_types = inner.config.layer_types[: len(layers)]
    shared._modules = {**inner._modules, "layers": nn.ModuleList(layers), "norm": nn.Identity()}
    return shared


def with_last_layer(model: Qwen3Model) -> Qwen3Model:
    """The inverse for code that reads `hidden_states[-2]`, as diffusers does: the last two are all it records.

    transformers records with hooks that a model leaves on its layers; on shared layers one would record for another.
    """
    shared = copy.copy(model)

    def forward(*args: Any, output_hidden_states: bool = False, **kwargs: Any) -> Any:
        output = type(model).forward(shared, *args, **kwargs)
        if output_hidden_states:
            output["hidden_states"] = (output.last_hidden_state,) * 2
        return output

    forward.records = True  # type: ignore[attr-defined]
    shared.forward, shared.save_pretrained = forward, refuse_saving
    return shared


def refuse_saving(*_args: Any, **_kwargs: Any) -> None:
    """In place of `save_pretrained` where that would write a text encoder without its last layer, of which whoever
    loads it would leave out the one before; raises `RequestError`."""
    raise RequestError(
        "the text encoder's last layer is not loaded, and without it the files would draw other pictures; save the "
        "model by zimage: ZImagePipeline.save_pretrained, of a diffusers pipeline "
        "ZImagePipeline.from_diffusers(pipeline).save_pretrained(folder)"
    )
