"""Single files of a repository on the Hugging Face hub, through huggingface_hub, its cache and its settings.

What can go wrong on the way is turned into one `CheckpointError` each: what was wanted, what came, what to do. Knows
nothing of what the files are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError
from .reading import reason

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def named_on_hub(source: object, pattern: re.Pattern[str]) -> re.Match[str] | None:
    """What `pattern` makes of a text that names a repository, group 1, and perhaps a file in it.

    `None` for a path that leads nowhere here: a file of weights where a repository's name would be ("loras/ink.gguf"),
    or in what is a folder here.
    """
    found = pattern.fullmatch(source) if isinstance(source, str) else None
    if found is None or Path(found[1]).suffix.lower() in _WEIGHTS or Path(found[1]).is_dir():
        return None
    return found


@contextmanager
def or_here(source: str) -> Iterator[None]:
    """Within it an error says that there is no such path here either, where `source` begins with a folder that is."""
    try:
        yield
    except CheckpointError as error:
        if not Path(source.partition("/")[0]).is_dir():
            raise
        raise CheckpointError(f"{error}. There is no {source} on this machine either") from error


class Repository:
    """One repository at one revision. Once the hub was out of reach it is asked no more, and the cache has to do."""

    def __init__(
        self,
        hub_id: str,
        *,
        revision: str | None,
        cache_dir: str | os.PathLike[str] | None,
        token: str | bool | None,
        local_files_only: bool,
    ) -> None:
        self.hub_id = hub_id
        self.revision = revision
        self._cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._token = token
        self._offline = local_files_only or bool(constants.HF_HUB_OFFLINE)
        self._unreachable: LocalEntryNotFoundError | None = None

    def fetch(self, name: str) -> Path | None:
        """The file called `name`; None where the repository has none, or without a connection the cache."""
        local_only = self._offline or self._unreachable is not None
        if local_only or _COMMIT.fullmatch(self.revision or ""):
            cached = self._look_up(name)
            if cached is not None or local_only:
                return Path(cached) if isinstance(cached, str) else None
        try:
            path = hf_hub_download(
                self.hub_id,
                name,
                revision=self.revision,
                cache_dir=self._cache_dir,
                token=self._token,
                library_name="zimage",
            )
        except LocalEntryNotFoundError as error:
            self._unreachable = error
            return self.fetch(name)
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise CheckpointError(self._explain(error, name)) from error
        return Path(path)

    def cached(self, name: str) -> Path | None:
        """The file called `name` if the cache has it; the hub is not asked."""
        found = self._look_up(name)
        return Path(found) if isinstance(found, str) else None

    def require(
        self, name: str, otherwise: str = "so it is no Z-Image checkpoint in diffusers' layout; check the id"
    ) -> Path:
        """The file called `name`, which must be there; `otherwise` is what the error says of a repository without."""
        path = self.fetch(name)
        if path is not None:
            return path
        if self._offline or self._unreachable is not None:
            raise CheckpointError(self._explain_absence(name)) from self._unreachable
        raise CheckpointError(f"{self._named()} has no {name}, {otherwise}")

    def _look_up(self, name: str) -> object:
        """The path of the file in the cache, something that is no text where it is known not to exist, or None."""
        try:
            return try_to_load_from_cache(self.hub_id, name, cache_dir=self._cache_dir, revision=self.revision)
        except HFValidationError as error:
            raise CheckpointError(self._explain(error, name)) from error

    def _named(self) -> str:
        return f"{self.hub_id} at {self.revision}" if self.revision else self.hub_id

    def _explain(self, error: Exception, name: str) -> str:
        log_in = "log in with `hf auth login`, set HF_TOKEN, or give token="
        if isinstance(error, GatedRepoError):
            return (
                f"{self.hub_id} is gated and the hub did not hand out {name}: accept its terms at "
                f"{constants.ENDPOINT}/{self.hub_id}, then {log_in}"
            )
        if isinstance(error, LocalTokenNotFoundError):
            return f"token=True was given for {self.hub_id} and no token is stored; {log_in}"
        if isinstance(error, RevisionNotFoundError):
            return f"{self.hub_id} has no revision {self.revision!r}; give a branch, tag or commit that it has, or none"
        if isinstance(error, HFValidationError):
            return f"{self.hub_id!r} is no id on the hub: {reason(error)}; ids look like 'Tongyi-MAI/Z-Image-Turbo'"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            return (
                f"{self.hub_id} was not found on {constants.ENDPOINT}, or it is private and you may not see it: check "
                f"the id; if it is private, {log_in}"
            )
        if status is not None:
            return f"{constants.ENDPOINT} answered {status} for {name} of {self._named()}; try again later"
        if isinstance(error, OSError) and error.strerror:
            return f"{name} of {self._named()} cannot be stored in the cache ({self._cache()}): {reason(error)}"
        return f"{name} of {self._named()} cannot be downloaded: {type(error).__name__}: {reason(error)}; try again"

    def _explain_absence(self, name: str) -> str:
        wanted = f"{name} of {self._named()} is not in the cache ({self._cache()})"
        if self._offline:
            return (
                f"{wanted} and downloads are off (local_files_only or HF_HUB_OFFLINE); allow them once, "
                "or give the cache_dir that has it"
            )
        answer = self._unreachable.__cause__ if self._unreachable else None
        if isinstance(answer, HfHubHTTPError):
            return self._explain(answer, name)
        return (
            f"{wanted} and {constants.ENDPOINT} cannot be reached; check the connection, the proxy settings and "
            "HF_ENDPOINT, then try again: what was downloaded is kept"
        )

    def _cache(self) -> str:
        return str(self._cache_dir or constants.HF_HUB_CACHE)
