"""The state of a training run, and its file: weights, their moving average, the optimisers and the number of steps.

A run is a function of its seed: what is random in a step is drawn from a generator made for that step alone, so the
state needs no generators and a resumed run gives the bits of one that was never stopped. The file is safetensors,
replaced as a whole or not at all. Knows which optimiser a parameter has by its name; knows no losses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import CheckpointError, RequestError
from ..files.atomic import write_atomically
from ..models.precision import Float32Math, choose_dtype
from .config import Stage

STATE = "state.safetensors"


def step_generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """The generator of what one step draws for `purpose`."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def rate_factor(stage: Stage, step: int) -> float:
    """What the learning rates are multiplied with in step 0, 1, …: linear warm-up, constant, linear decay to 0."""
    falling = max(1.0, stage.decay * stage.steps)
    return min(1.0, (step + 1) / max(1, stage.warmup), max(0.0, stage.steps - step) / falling)


def ema_decay(stage: Stage, step: int) -> float:
    """What is kept of the average in step 0, 1, …"""
    return min(stage.ema_decay, (1 + step) / (10 + step))


@dataclass
class TrainingState:
    """A model in training; `average` has the names and shapes of its parameters, in float32."""

    model: nn.Module
    average: dict[str, Tensor]
    optimisers: list[torch.optim.Optimizer]
    step: int = 0

    @classmethod
    def start(cls, model: nn.Module, stage: Stage) -> TrainingState:
        """Step 0. Vectors (norms, biases) and embeddings are not decayed."""
        named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        kinds: dict[str, list[nn.Parameter]] = {"inner": [], "decayed": [], "plain": []}
        for name, weight in named.items():
            kinds[_kind(name, weight, stage)].append(weight)
        groups: list[dict[str, Any]] = [
            {"params": kinds["decayed"], "weight_decay": stage.weight_decay},
            {"params": kinds["plain"], "weight_decay": 0.0},
        ]
        optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, fused=True)
        ]
        if kinds["inner"]:
            optimisers.append(_muon(kinds["inner"], stage))
        for group in _groups(optimisers):
            group["initial_lr"] = group["lr"]
        return cls(model, {name: weight.detach().clone() for name, weight in named.items()}, optimisers)

    def update(self, stage: Stage) -> float:
        """Take the step whose gradients are there; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), stage.clip)
        for group in _groups(self.optimisers):
            group["lr"] = group["initial_lr"] * rate_factor(stage, self.step)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        native = choose_dtype("auto", weights[0].device) == torch.bfloat16
        with nullcontext() if native else Float32Math():  # Muon multiplies in bfloat16
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
        kept = ema_decay(stage, self.step)
        torch._foreach_lerp_(list(self.average.values()), [weight.detach() for weight in weights], 1.0 - kept)
        self.step += 1
        return float(norm)

    def save(self, folder: Path, stage: Stage, seed: int) -> None:
        """Write `state.safetensors` into `folder`; until it is whole the earlier one stays."""
        tensors = {f"model.{name}": weight.detach() for name, weight in self.model.named_parameters()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.items()}
        for number, optimiser in enumerate(self.optimisers):
            for index, values in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{number}.{index}.{key}": value for key, value in values.items()}
        described = {"step": str(self.step), "seed": str(seed), "stage": json.dumps(asdict(stage))}
        written = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=described)
        write_atomically(folder / STATE, lambda file: file.write(written), overwrite=True)

    def load(self, folder: Path, stage: Stage, seed: int) -> None:
        """Go on from the state in `folder`; `CheckpointError` if its seed or its way of training is another.

        The number of steps may be changed, and how often something is written.
        """
        tensors, described = read_state(folder)
        was = json.loads(described["stage"]) | {"seed": int(described["seed"])}
        now = json.loads(json.dumps(asdict(stage))) | {"seed": seed}
        for free in ("steps", "log_every", "save_every"):
            was.pop(free, None), now.pop(free, None)
        changed = [f"{key} was {was.get(key)} and is {now[key]}" for key in now if was.get(key) != now[key]]
        if changed:
            raise CheckpointError(f"{folder / STATE} is of another run: {'; '.join(changed)}")
        fill(self.model, _under("model.", tensors), str(folder / STATE))
        for name, tensor in _under("average.", tensors).items():
            self.average[name].copy_(tensor)
        for number, optimiser in enumerate(self.optimisers):
            states: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _under(f"optimiser.{number}.", tensors).items():
                index, key = name.split(".")
                states.setdefault(int(index), {})[key] = tensor
            optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
        self.step = int(described["step"])


def read_state(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors and the description in a folder's state; `CheckpointError` if there is none."""
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; run that stage first, or without --resume")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def average_of(folder: Path) -> dict[str, Tensor]:
    """The averaged weights in a folder's state."""
    return _under("average.", read_state(folder)[0])


def between(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights half way from one model to another that was trained on from it (arXiv 2109.01903): what training
    changed for the better mostly stays, and less of what it had learned is lost."""
    if first.keys() != second.keys():
        raise CheckpointError("the two models have other parts: " + ", ".join(sorted(first.keys() ^ second.keys())[:5]))
    return {name: torch.lerp(one.float(), second[name].float(), 0.5) for name, one in first.items()}


def fill(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Give `model` the weights that come from `origin`; `CheckpointError` if they are of another one."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{origin} has other parts or sizes than the model to train: {error}") from error


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _groups(optimisers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimiser in optimisers for group in optimiser.param_groups]


def _muon(weights: list[nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise RequestError(f"this training needs torch 2.9 or newer, for its Muon, and this is {torch.__version__}")
    return torch.optim.Muon(
        weights, lr=stage.matrix_rate, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def _kind(name: str, weight: Tensor, stage: Stage) -> str:
    """Which way of training a parameter has."""
    if weight.ndim <= 1 or "embed_tokens" in name or name.endswith("pad_token"):
        return "plain"
    is_inner = weight.ndim == 2 and "embedder" not in name and "final_layer" not in name
    return "inner" if stage.matrix_rate and is_inner else "decayed"
