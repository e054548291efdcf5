"""Pictures and their recipes: what a pipeline writes into one, and how it makes the picture of one again.

Knows models by what they say of themselves; how a picture is drawn is the pipeline's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import runtime
from .calls import CancelToken, read_given
from .controlled import Chosen
from .errors import RequestError
from .files.png import Picture, read_recipe
from .files.recipe import Recipe, differences, pixel_digest
from .files.relayed import require_one_model
from .output import Replay, ZImageOutput, collect
from .previews import Previewing
from .request import ResolvedRequest
from .rules import shown


class Recorded(Previewing):
    """A pipeline's models and previews, and the recipes of its pictures."""

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **options: Any) -> Any: ...

    def replay(
        self,
        picture: str | os.PathLike[str] | bytes | Recipe,
        *,
        image: Any = None,
        mask_image: Any = None,
        control_image: Any = None,
        cancel: CancelToken | None = None,
        progress: bool = False,
    ) -> Replay:
        """Make the picture of a PNG, of what is in one, or of a recipe again, and say whether its pixels are the same.

        A picture that was made from images needs them again, `image`, `mask_image` and `control_image` as they were
        given then. Raises `RequestError` for others, and if the file has no recipe, or one that this model cannot
        follow; `AdapterError` if it was made with adapters or a ControlNet that are not loaded from the same files.
        """
        recipe = picture if isinstance(picture, Recipe) else read_recipe(picture)
        require_one_model(recipe)
        recipe.require_whole()
        self._require_adapters(recipe)
        images = read_given(image=image, mask_image=mask_image, control_image=control_image)
        request = recipe.with_images(**images)
        output = self(request, cancel=cancel, progress=progress)
        assert isinstance(output, ZImageOutput)
        return compared(recipe, output.images[0], output.requests[0])

    def recipe(self, request: ResolvedRequest, image: Image.Image, strip_levels: int | None = None) -> Recipe:
        """All that is needed to make `image` again from `request`, with the adapters and the ControlNet loaded now.

        `strip_levels` of its decode were in strips, as many as would be now if not given. Raises `AdapterError` or
        `RequestError` where the request names an adapter, or needs a ControlNet, that is not loaded, or leaves
        something open.
        """
        if not isinstance(request, ResolvedRequest):
            raise RequestError(
                f"request must be a resolved one, from an output's `requests` or `resolve`, got {shown(request)}"
            )
        strip_levels = self._strip_levels(request) if strip_levels is None else strip_levels
        return self._recipe(request, self._choose(request), image, strip_levels)

    def _recipe(
        self,
        request: ResolvedRequest,
        chosen: Chosen,
        image: Image.Image,
        strip_levels: int,
        changed: Sequence[str] = (),
    ) -> Recipe:
        return Recipe(
            request=request,
            model={**self.model, "variant": self.variant.name},
            runtime=runtime.describe(
                self.device,
                self.dtype,
                strip_levels,
                self.weights,
                activations=self.activations,
                attention=", then ".join(dict.fromkeys((chosen.attention, self.attention_backend))),
                compiled=self.compiled,
            ),
            pixels=pixel_digest(image),
            given=tuple(changed),
            **chosen.described,
        )

    def _picture(
        self,
        request: ResolvedRequest,
        chosen: Chosen,
        strips: int,
        image: Image.Image,
        embed_recipe: bool,
        changed: Sequence[str],
    ) -> Picture:
        return Picture.of(image, self._recipe(request, chosen, image, strips, changed) if embed_recipe else None)

    def _collected(self, images: Sequence[Any], output_type: str, last: ResolvedRequest) -> Any:
        """The images of a call in the container of `output_type`; memory may run out for those that are stacked."""
        if output_type == "pil":
            return collect(images, output_type)
        with self._computing():
            return self._attempt("decoding", last)(partial(collect, images, output_type))


def compared(recipe: Recipe, made: Any, request: ResolvedRequest) -> Replay:
    """What came of a recipe: the picture that was `made` from it, and what was not as it was then."""
    now = made.recipe
    sentences = differences(recipe, now.model, now.runtime)
    if recipe.turbo is not None:
        sentences += [f"turbo's {one}" for one in differences(recipe.turbo, now.turbo.model, now.turbo.runtime)]
    return Replay(image=made, request=request, same_bits=now.pixels == recipe.pixels, differences=tuple(sentences))
