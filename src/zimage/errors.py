"""Every error and warning that zimage raises on purpose. Knows no other module, and no torch.

    ZImageError
    ├── RequestError (also a ValueError)   what was asked cannot work; nothing was computed
    ├── CheckpointError                    a checkpoint is missing, damaged, foreign or hostile
    ├── NotEnoughMemory                    no plan fits the device
    ├── AdapterError                       a LoRA or ControlNet does not fit
    ├── NonFiniteError                     a computation gave NaN or infinity, in the safest precision too
    ├── Cancelled                          the caller stopped a picture between two steps
    └── MissingExtra                       an optional dependency is not installed

Each message says what was wanted, what came and what to do.
"""


class ZImageError(Exception):
    """Base class of all errors of this package."""


class RequestError(ZImageError, ValueError):
    """The request cannot work as it stands; the message says what to change."""


class CheckpointError(ZImageError):
    """A checkpoint cannot be found, read or trusted."""


class NotEnoughMemory(ZImageError):
    """No placement of the model fits the memory there is."""


class AdapterError(ZImageError):
    """An adapter (LoRA, ControlNet) does not fit the model it should attach to."""


class NonFiniteError(ZImageError):
    """A computation gave NaN or infinity and did so again in the safest precision."""


class Cancelled(ZImageError):
    """The picture was cancelled between two denoising steps. Nothing was written; the pipeline is as it was."""


class MissingExtra(ZImageError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


class ZImageWarning(UserWarning):
    """Something will work, but perhaps not as meant: a prompt that is cut, a schedule that was overruled."""
