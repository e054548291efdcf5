"""`Relay`: the base model composes a picture, with guidance and a negative prompt, and Turbo finishes it.

Both models draw in the latents of one VAE from the features of one text encoder, so the latents go over as they are, at
a noise level that is chosen. The steps are those of the two pipelines; how a picture is divided is in `legs`, how the
models come to fit together in `pairing`. Nothing is computed here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .callbacks import StepCallback, StepHook, check_cancel
from .calls import PICTURE_OPTIONS, Call, CancelToken, Leg, progress_bar, read_given, resolve_call, result_of, tokenize
from .controlled import Chosen
from .denoiser import Preparation
from .errors import RequestError
from .files.png import Picture, read_recipe
from .files.recipe import Recipe
from .legs import HANDOVER, RelayCall, RelayOutput, RelayRequest, check_handover, finish_of, with_steps
from .memory.plan import Plan
from .models.text_encoder import Tokens
from .output import Replay, Step, ZImageOutput, check_output_type, check_stackable
from .pairing import Together, check_pair, check_place, load_pair
from .parts import warn_of_weights
from .pipeline import ZImagePipeline
from .recorded import compared
from .request import AnyRequest, ResolvedRequest
from .sampling.samplers import SamplerStep

if TYPE_CHECKING:
    from typing import Self

BothChosen = tuple[Chosen, Chosen]
"""What acts beside each model, base and Turbo."""
_SAYS_ALL = "a RelayRequest says all there is; leave handover, turbo_steps and the options of a picture out"


class Relay(Together):
    """Pictures that the base model begins and Turbo finishes.

    Args:
        base, turbo: the two pipelines, on one device and in one dtype, with the same text encoder and VAE; they may be
            used by themselves as well. What is set on one of them, adapters for example, acts in its part.

    `RequestError` if they do not fit together.
    """

    def __init__(self, base: ZImagePipeline, turbo: ZImagePipeline) -> None:
        check_pair(base, turbo)
        self.base, self.turbo = base, turbo
        self._plan: Plan | None = None

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str] = "base",
        turbo: str | os.PathLike[str] = "turbo",
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        memory: str | int = "auto",
        weight_dtype: str | None = None,
        quantize_activations: bool = False,
        attention_backend: str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load two models with one text encoder, one tokenizer and one VAE, under one plan for `memory`.

        Arguments are those of `ZImagePipeline.from_pretrained`. Where not all of it fits, the text encoder and as many
        blocks of both transformers as must pass through the device layer by layer; see `plan`. Raises
        `CheckpointError` for what cannot be found or read and for models with other text encoders or VAEs,
        `NotEnoughMemory` before loading for what cannot fit, `RequestError` for wrong arguments.
        """
        pair = load_pair(
            base,
            turbo,
            dtype=dtype,
            device=device,
            memory=memory,
            weight_dtype=weight_dtype,
            quantize_activations=quantize_activations,
            attention_backend=attention_backend,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        if weight_dtype is None:
            warn_of_weights(pair.plan)
        made = cls(pair.base, pair.turbo)
        made._plan = pair.plan
        return made

    @property
    def plan(self) -> Plan | None:
        """The plan that both were loaded for, with the transformers' blocks in pairs; `None` for pipelines that were
        handed in. `base.plan` and `turbo.plan` say what is so now."""
        return self._plan

    def resolve(
        self,
        request: AnyRequest | RelayRequest | str,
        *,
        handover: float | None = None,
        turbo_steps: int | None = None,
    ) -> RelayRequest:
        """`request`, the base model's, with nothing left open for either model; `RequestError` if it cannot work."""
        if isinstance(request, RelayRequest):
            if handover is not None or turbo_steps is not None:
                raise RequestError(_SAYS_ALL)
            resolved = replace(request, base=self.base.resolve(request.base), turbo=self.turbo.resolve(request.turbo))
        else:
            asked = self._resolve_base(request)
            level = HANDOVER if handover is None else check_handover(handover)
            resolved = RelayRequest(asked, self.turbo.resolve(finish_of(asked, turbo_steps)), level)
        _ = resolved.levels  # each model must have a step
        return resolved

    def __call__(
        self,
        prompt: str | Sequence[str] | AnyRequest | RelayRequest | Sequence[AnyRequest | RelayRequest] | None = None,
        *,
        handover: float | None = None,
        turbo_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cancel: CancelToken | None = None,
        progress: bool = True,
        embed_recipe: bool = True,
        **options: Any,
    ) -> RelayOutput | ZImageOutput | tuple[Any]:
        """Make pictures. What is not named here is a picture's option of the base model: see `GenerationRequest`.

        Args:
            prompt: as for a pipeline; or requests of an earlier output.
            handover: the noise level where Turbo takes over, 0 to 1, 0.75 if not given. 1 is Turbo alone and 0 the base
                model alone: the same as a call of that pipeline with all other options, of which it refuses what it
                cannot use.
            num_inference_steps: of the base model's whole schedule, of which those above `handover` are taken; 25 if
                not given.
            turbo_steps: steps of Turbo's whole schedule, of which those below `handover` are taken; 8 if not given.
            callback_on_step_end: called with the pipeline that is at work; steps are counted through. Caption features
                that it changes stay so until the handover, or from then on to the end.

        The rest is as for a pipeline. An image to start from is refused. Raises what a pipeline does.
        """
        if unknown := options.keys() - PICTURE_OPTIONS:
            raise RequestError(f"a relay has no option {', '.join(sorted(unknown))}; see Relay and GenerationRequest")
        options = {name: value for name, value in options.items() if value is not None}
        check_output_type(output_type)
        check_cancel(cancel)
        StepHook.of(self.base, callback_on_step_end, callback_on_step_end_tensor_inputs)
        alone = self._alone(handover, turbo_steps)
        if alone is not None:
            given: Any = prompt
            if any(isinstance(one, RelayRequest) for one in (given if isinstance(given, list | tuple) else [given])):
                raise RequestError(_SAYS_ALL)
            return alone(
                given,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                output_type=output_type,
                return_dict=return_dict,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                cancel=cancel,
                progress=progress,
                embed_recipe=embed_recipe,
                **options,
            )
        make = partial(self.resolve, handover=handover, turbo_steps=turbo_steps)
        requests = self._requests(prompt, options, num_images_per_prompt, generator, make)
        check_stackable([request.base for request in requests], output_type)
        for request in requests:
            self._fit(request)
        tokens, before = tokenize([request.base for request in requests], self.base.text_encoder), self._rungs()
        bar_options = {"total": sum(request.steps for request in requests), **self.base._bar_options}
        with progress_bar([], bar_options if progress else {"disable": True}) as bar:
            shared = self._shared(tokens, cancel, bar, callback_on_step_end, callback_on_step_end_tensor_inputs)
            images = []
            for request in requests:
                chosen = self._choose(request)
                latents = result_of(self._denoise(request, chosen, shared))
                shared.base.check_cancelled()
                images.append(self._finish(request, chosen, latents, shared, output_type, embed_recipe))
        collected = self.turbo._collected(images, output_type, requests[-1].turbo)
        said = tuple(one for were, are in zip(before, self._rungs(), strict=True) for one in are[len(were) :])
        return RelayOutput(collected, tuple(requests), said) if return_dict else (collected,)

    def stream(
        self,
        request: AnyRequest | RelayRequest | str,
        *,
        handover: float | None = None,
        turbo_steps: int | None = None,
        cancel: CancelToken | None = None,
        embed_recipe: bool = True,
    ) -> Generator[Step, None, None]:
        """Make one picture a denoising step at a time, those of both models counted through; a step's `request` is that
        of the model at work, and the last `Step` carries the image. `close()` cancels. Raises as a pipeline's does."""
        alone = self._alone(handover, turbo_steps)
        if alone is not None:
            if isinstance(request, RelayRequest):
                raise RequestError(_SAYS_ALL)
            return alone.stream(request, cancel=cancel, embed_recipe=embed_recipe)
        resolved = self.resolve(request, handover=handover, turbo_steps=turbo_steps)
        self._fit(resolved)
        tokens = tokenize([resolved.base], self.base.text_encoder)
        return self._stream(resolved, self._shared(tokens, cancel), embed_recipe)

    def replay(
        self,
        picture: str | os.PathLike[str] | bytes | Recipe,
        *,
        control_image: Any = None,
        cancel: CancelToken | None = None,
        progress: bool = False,
    ) -> Replay:
        """Make the picture of a PNG, of what is in one, or of a recipe again, and say whether its pixels are the same;
        the result's `request` is the base model's. Raises what a pipeline does, and `RequestError` for a picture of one
        model."""
        recipe = picture if isinstance(picture, Recipe) else read_recipe(picture)
        if recipe.turbo is None:
            raise RequestError(
                f"the picture was made by {recipe.request.variant} alone; relay.{recipe.request.variant}.replay makes "
                "it again"
            )
        recipe.require_whole()
        self.base._require_adapters(recipe)
        self.turbo._require_adapters(recipe.turbo)
        steered = recipe.with_images(**read_given(control_image=control_image))
        request = RelayRequest(steered, recipe.turbo.request, recipe.handover)
        output = self(request, cancel=cancel, progress=progress)
        return compared(recipe, output[0][0], recipe.request)

    def _alone(self, handover: float | None, turbo_steps: int | None) -> ZImagePipeline | None:
        """The one model that makes all of a picture, if the handover says so."""
        if handover is None or check_handover(handover) not in (0, 1):
            return None
        if turbo_steps is not None:
            raise RequestError(
                f"with handover={handover:g} there is one model, whose steps are num_inference_steps; leave "
                "turbo_steps out"
            )
        return self.turbo if handover else self.base

    def _requests(
        self, prompt: Any, options: Mapping[str, Any], number: int, generator: Any, make: Callable[..., RelayRequest]
    ) -> list[RelayRequest]:
        """One request per picture of a call."""
        given = [prompt] if isinstance(prompt, RelayRequest) else prompt
        if isinstance(given, list | tuple) and any(isinstance(one, RelayRequest) for one in given):
            if options or generator is not None or number != 1:
                raise RequestError(_SAYS_ALL)
            return [make(one) for one in given]
        resolve, shape = self._resolve_base, self.base._latent_shape
        return [
            make(one) for one in resolve_call(prompt, options, number, generator, resolve=resolve, latent_shape=shape)
        ]

    def _resolve_base(self, request: AnyRequest | str) -> ResolvedRequest:
        return self.base.resolve(with_steps(request))

    def _fit(self, request: RelayRequest) -> None:
        check_place(self.base, self.turbo)
        self.base._fit(request.base)
        self.turbo._fit(request.turbo)

    def _rungs(self) -> tuple[tuple[str, ...], ...]:
        return self.base._rungs(), self.turbo._rungs()

    def _shared(
        self,
        tokens: Mapping[tuple[str, int], Tokens],
        cancel: CancelToken | None,
        bar: Any = None,
        callback: StepCallback | None = None,
        names: Sequence[str] = (),
    ) -> RelayCall:
        """What the pictures of a call share. Turbo gets its captions as features, so it has no tokens."""
        base = Call(Preparation(self.base.transformer), tokens, cancel, bar=bar)
        turbo = replace(base, preparation=Preparation(self.turbo.transformer), tokens={})
        return RelayCall(base, turbo, callback, tuple(names))

    def _choose(self, request: RelayRequest) -> BothChosen:
        """What acts in each part, before the first is begun."""
        return self.base._choose(request.base), self.turbo._choose(request.turbo)

    def _denoise(
        self, request: RelayRequest, chosen: BothChosen, shared: RelayCall
    ) -> Generator[SamplerStep, None, Tensor]:
        """The base model's steps, then Turbo's from where that ended; returns the final latents (1, C, H, W)."""
        levels = request.levels
        begins = replace(shared.base, leg=Leg(levels.base), hook=shared.hook(self.base, 0))
        latents = yield from self.base._denoise(request.base, chosen[0], begins)
        with self.base._computing():
            attempt = self.base._attempt("prompt", request.base)
            features = attempt(partial(self.base._condition, request.base, begins)).positive
        finish = replace(request.turbo, tensors={"prompt_embeds": features})
        taken = len(levels.base) - 1
        ends = replace(shared.turbo, leg=Leg(levels.turbo, latents), hook=shared.hook(self.turbo, taken))
        return (yield from self.turbo._denoise(finish, chosen[1], ends))

    def _finish(
        self, request: RelayRequest, chosen: BothChosen, latents: Tensor, shared: RelayCall, kind: str, recipe: bool
    ) -> Any:
        """As output of this `kind`, decoded by Turbo's pipeline, if that is a picture with the `recipe` of both."""
        made = self.turbo._finish(request.turbo, chosen[1], latents, kind, recipe)
        if not isinstance(made, Picture) or made.recipe is None:
            return made
        base = self.base._recipe(request.base, chosen[0], made, strip_levels=0, changed=shared.base.take_changed())
        return Picture.of(made, replace(base, handover=request.handover, turbo=made.recipe))

    def _stream(self, request: RelayRequest, shared: RelayCall, embed_recipe: bool) -> Generator[Step, None, None]:
        begun, total, chosen = len(request.levels.base) - 1, request.steps, self._choose(request)
        for index, step in enumerate(self._denoise(request, chosen, shared)):
            last = index + 1 == total
            yield Step(
                index=index,
                total=total,
                sigma=step.sigma,
                sigma_next=step.sigma_next,
                latents=step.latents,
                denoised=step.denoised,
                request=request.base if index < begun else request.turbo,
                previewer=self.turbo.preview,
                image=self._finish(request, chosen, step.latents, shared, "pil", embed_recipe) if last else None,
            )
