"""A pipeline's ControlNet: loaded beside the models, held on the device, and let go of again.

It changes nothing of the transformer: pictures without a control image are the same bits with and without it. Its
files are `adapters`' business, what it computes `models.control`'s, and where the models sit `placed`'s.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from torch import nn

from . import runtime
from .adapted import Adapted
from .adapters.attaching import Picked
from .adapters.controlnet import ControlNet, find_controlnet
from .errors import AdapterError, NotEnoughMemory, RequestError
from .files.png import brief
from .files.recipe import Recipe
from .memory.ladder import is_out_of_memory
from .models.precision import cast
from .request import ResolvedRequest


class Chosen(NamedTuple):
    """What acts in one picture beside the models: chosen when it is begun, for all of its passes and its recipe."""

    adapters: Picked
    controlnet: ControlNet | None
    attention: str
    """What attention runs with as the picture begins; with another from some step on, the recipe names both."""

    @property
    def described(self) -> dict[str, Any]:
        """Where they are from, as a recipe names it."""
        net = self.controlnet
        return {
            "adapters": {
                one.name: {"source": one.adapter.source, "digest": one.adapter.digest} for one, _ in self.adapters
            },
            "controlnet": {} if net is None else {"source": net.source, "digest": net.digest},
        }


class Controlled(Adapted):
    """The models of a pipeline with their adapters and a ControlNet."""

    _controlnet: ControlNet | None = None
    _control_blocks = 0
    _control_bytes = 0

    @property
    def controlnet(self) -> ControlNet | None:
        """The ControlNet that is loaded: its `net`, which is diffusers' class, its `source` and `digest`."""
        return self._controlnet

    def load_controlnet(
        self,
        source: str | os.PathLike[str] | nn.Module,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> ControlNet:
        """Load a ControlNet, which acts in pictures that have a `control_image` and in no others.

        Args:
            source: a folder or hub id in diffusers' layout, a safetensors file as Z-Image's are published, here or
                on the hub ("owner/name/file.safetensors"), or diffusers' `ZImageControlNetModel`, which is shared.
            weight_name: the file in a folder or repository that has several.
            revision, cache_dir, token, local_files_only: as for `from_pretrained`.

        It is held on the device in the pipeline's dtype, and the plan counts it: where it does not fit, more of the
        models passes through. Raises `AdapterError` for a file that is damaged or made for another architecture or
        size, and where one is loaded already; `NotEnoughMemory`. Then all is as before.
        """
        options: dict[str, Any] = {"weight_name": weight_name, "revision": revision, "cache_dir": cache_dir}
        options |= {"token": token, "local_files_only": local_files_only}
        found = find_controlnet(source, self.transformer.config, **options)
        remembered = found.name
        if found.place is not None and not found.place.hub:
            remembered = runtime.portable_path(found.place.path)
        with self._turn:
            if self._controlnet is not None:
                raise AdapterError(
                    f"a ControlNet is loaded already ({self._controlnet.source}); unload_controlnet() first"
                )
            beside = found.beside(str(self.dtype).removeprefix("torch."))
            self._control_bytes, self._control_blocks = beside["adapters"], beside["control_blocks"]
            try:
                self._make_room(f"the ControlNet {found.name}")
                self._controlnet = found.load(self.dtype, self.device, remembered)
            except BaseException as error:
                self._let_go()
                if isinstance(error, Exception) and is_out_of_memory(error):
                    raise NotEnoughMemory(f"memory ran out while the ControlNet {found.name} was loaded") from error
                raise
            return self._controlnet

    def unload_controlnet(self) -> None:
        """Let go of the ControlNet; without one nothing happens.

        A picture that has been begun keeps it, and its memory, until it is done.
        """
        with self._turn:
            self._let_go()

    def close(self) -> None:
        """Let go of the ControlNet, take all adapters off and let go of the models, as `Adapted.close` does."""
        with self._turn:
            self._controlnet, self._control_blocks, self._control_bytes = None, 0, 0
            super().close()

    def _let_go(self) -> None:
        self._controlnet, self._control_blocks, self._control_bytes = None, 0, 0
        self._account()

    def _choose(self, request: ResolvedRequest) -> Chosen:
        """What acts in a picture that is begun now; `AdapterError` for an adapter that is not loaded, `RequestError`
        where a ControlNet is missing."""
        loaded = None if request.control_image is None else self._controlnet
        if request.control_image is not None and loaded is None:
            raise RequestError(
                "control_image needs a ControlNet and none is loaded; load one with pipe.load_controlnet(...), or "
                "leave control_image out"
            )
        return Chosen(self._attachments.pick(request.adapters), loaded, self.attention_backend)

    def _require_adapters(self, recipe: Recipe) -> None:
        """Raises `AdapterError` where a recipe's adapters or its ControlNet are not loaded, or are others."""
        super()._require_adapters(recipe)
        said, known = recipe.controlnet, None if self._controlnet is None else self._controlnet.digest
        if said and known != said["digest"]:
            found = "none is loaded" if known is None else f"another is loaded here ({known[:12]}...)"
            raise AdapterError(
                f"the picture was made with the ControlNet {brief(said['source'])!r} ({said['digest'][:12]}...), and "
                f"{found}; load that with load_controlnet"
            )

    @property
    def _attached_bytes(self) -> int:
        return super()._attached_bytes + self._control_bytes

    @property
    def _beside(self) -> dict[str, int]:
        return {**super()._beside, "control_blocks": self._control_blocks}

    def _refresh(self) -> None:
        super()._refresh()
        if self._controlnet is not None:
            cast(self._controlnet.net, dtype=self.dtype, device=self.device)
            self._control_bytes = self._controlnet.bytes
