"""LoRAs written in every naming from one reference, which all of them must be read as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage import ZImagePipeline
from zimage.models.transformer import ZImageTransformer

RANK, SCALE = 4, 0.5
Reference = dict[str, tuple[Tensor, Tensor]]
"""By module: down (rank, in) and up (out, rank); what is added is `SCALE * up @ down`."""


@dataclass(frozen=True)
class Written:
    """A file as some trainer writes it, and PEFT's config beside it."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def shapes_of(transformer: ZImageTransformer) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in transformer.named_modules()
        if hasattr(layer, "out_features")
    }


@pytest.fixture(scope="session")
def layers(turbo: ZImagePipeline) -> dict[str, tuple[int, int]]:
    return shapes_of(turbo.transformer)


def make_reference(layers: Mapping[str, tuple[int, int]], strength: float = 0.3, seed: int = 0) -> Reference:
    """Of every layer; queries, keys and values share `down`, as they do where they are fused. bfloat16 holds it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * strength).bfloat16().float()

    reference: Reference = {}
    for name, (out, features) in layers.items():
        shared = name.rpartition(".")[0] + ".to_q"
        down = reference[shared][0] if name.endswith((".to_k", ".to_v")) else draw(RANK, features)
        reference[name] = (down, draw(out, RANK))
    return reference


@pytest.fixture(scope="session")
def reference(layers: dict[str, tuple[int, int]]) -> Reference:
    return make_reference(layers)


def named(
    reference: Reference,
    rename: Callable[[str], str],
    halves: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"),
    alpha: bool = False,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """The reference under other names; with `alpha`, or else `scale` in `up`."""
    tensors = {}
    for module, (down, up) in reference.items():
        tensors[rename(module) + halves[0]] = down.clone()
        tensors[rename(module) + halves[1]] = up * scale
        if alpha:
            tensors[f"{rename(module)}.alpha"] = torch.tensor(SCALE * RANK)
    return tensors


def fused(reference: Reference) -> Reference:
    """With queries, keys and values as one layer."""
    together = {}
    for module, (down, up) in reference.items():
        owner, _, leaf = module.rpartition(".")
        if leaf == "to_q":
            ups = [reference[f"{owner}.{part}"][1] for part in ("to_q", "to_k", "to_v")]
            together[f"{owner}.qkv"] = (down, torch.cat(ups))
        elif leaf not in ("to_k", "to_v"):
            together[module] = (down, up)
    return together


def published(module: str) -> str:
    for own, name in (
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
        ("attention.to_out.0", "attention.out"),
    ):
        module = module.replace(own, name)
    return module


def with_prefix(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + module


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


DOTS = (".lora.down.weight", ".lora.up.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK}


def peft(reference: Reference) -> Written:
    return Written(named(reference, with_prefix("base_model.model.")), config=CONFIG)


def peft_patterns(reference: Reference) -> Written:
    """The alpha of some layers by the ends of their names, the first of which counts; ^ stands for the whole name."""
    own = {"^to_q": 3.0, "attention.to_q$": SCALE * RANK, **dict.fromkeys(reference, SCALE * RANK)}
    config = {**CONFIG, "lora_alpha": 64.0, "alpha_pattern": own | {"layers.0.attention.to_q": 5.0}}
    return Written(named(reference, with_prefix("base_model.model.")), config=config)


def peft_root(reference: Reference) -> Written:
    config = {**CONFIG, "lora_alpha": SCALE * RANK**0.5, "use_rslora": True}
    return Written(named(reference, with_prefix("base_model.model.")), config=config)


def peft_default(reference: Reference) -> Written:
    halves = (".lora_A.default.weight", ".lora_B.default.weight")
    return Written(named(reference, with_prefix("base_model.model."), halves, scale=SCALE))


def diffusers(reference: Reference) -> Written:
    packed = json.dumps({f"transformer.{key}": value for key, value in CONFIG.items()})
    return Written(named(reference, with_prefix("transformer.")), {"format": "pt", "lora_adapter_metadata": packed})


def as_type(written: Written, dtype: torch.dtype) -> Written:
    return replace(written, tensors={name: one.to(dtype) for name, one in written.tensors.items()})


FORMATS: dict[str, Callable[[Reference], Written]] = {
    "peft": peft,
    "peft-patterns": peft_patterns,
    "peft-root": peft_root,
    "peft-default": peft_default,
    "diffusers": diffusers,
    "diffusers-dots": lambda given: Written(named(given, with_prefix("transformer."), DOTS, scale=SCALE)),
    "bare": lambda given: Written(named(given, with_prefix(""), KOHYA, alpha=True)),
    "default-before": lambda given: Written(named(given, with_prefix("default."), KOHYA, alpha=True)),
    "kohya": lambda given: Written(named(given, kohya, KOHYA, alpha=True)),
    "kohya-fused": lambda given: Written(
        named(fused(given), lambda module: kohya(published(module)), KOHYA, alpha=True)
    ),
    "ai-toolkit": lambda given: Written(named(given, with_prefix("diffusion_model."), scale=SCALE)),
    "comfyui-fused": lambda given: Written(
        named(fused(given), lambda module: f"diffusion_model.{published(module)}", KOHYA, alpha=True)
    ),
    "lycoris": lambda given: Written(named(given, lambda name: f"lycoris_{name.replace('.', '_')}", KOHYA, alpha=True)),
    "split-words": lambda given: Written(
        named(given, lambda name: name.replace("to_", "to.").replace("feed_", "feed."), DOTS, alpha=True)
    ),
    "convolutions": lambda given: Written(
        {name: one[:, :, None, None] if one.ndim == 2 else one.reshape(1) for name, one in
         named(given, kohya, KOHYA, alpha=True).items()}
    ),
    "bfloat16": lambda given: as_type(diffusers(given), torch.bfloat16),
    "float16": lambda given: as_type(Written(named(given, kohya, KOHYA, alpha=True)), torch.float16),
    "float64": lambda given: as_type(Written(named(given, kohya, KOHYA, alpha=True)), torch.float64),
}  # fmt: skip


def write(folder: Path, written: Written, name: str | None = None) -> Path:
    """The file, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name or ("lora.safetensors" if written.config is None else "adapter_model.safetensors"))
    own = {key: tensor.clone().contiguous() for key, tensor in written.tensors.items()}
    save_file(own, file, dict(written.metadata) or None)
    if written.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(written.config), encoding="utf-8")
    return file


@pytest.fixture(scope="session", params=FORMATS)
def in_format(request: pytest.FixtureRequest, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference in one of the formats."""
    folder = tmp_path_factory.mktemp("loras") / request.param
    return write(folder, FORMATS[request.param](reference))


@pytest.fixture(scope="session")
def ink(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference as diffusers writes it."""
    return write(tmp_path_factory.mktemp("ink"), diffusers(reference), "ink.safetensors")


@pytest.fixture(scope="session")
def _loaded(turbo_folder: Path) -> ZImagePipeline:
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(_loaded: ZImagePipeline) -> Iterator[ZImagePipeline]:
    """A pipeline that a test may put adapters on; they are taken off after it."""
    yield _loaded
    _loaded.unload_lora_weights()


@pytest.fixture(scope="session")
def checksum() -> Callable[[ZImagePipeline], str]:
    """Of all names and bytes in the transformer's state dict, and of which modules are where."""

    def compute(pipe: ZImagePipeline) -> str:
        digest = hashlib.sha256()
        for name, tensor in pipe.transformer.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, module in pipe.transformer.named_modules():
            digest.update(f"{name} {id(module)} {type(module)} {sorted(vars(module))}".encode())
        return digest.hexdigest()

    return compute


@pytest.fixture(scope="session")
def draw(small_picture: dict[str, Any]) -> Callable[..., Tensor]:
    """The latents of a small picture."""

    def drawing(pipe: ZImagePipeline, **options: Any) -> Tensor:
        output = pipe(**{"prompt": "a fox", "seed": 7, **small_picture, **options}, output_type="latent")
        assert not isinstance(output, tuple)
        return output.images

    return drawing


@pytest.fixture(scope="session")
def small_picture() -> dict[str, Any]:
    return {"height": 64, "width": 64, "any_size": True, "num_inference_steps": 2}


WriteLora = Callable[..., Path]


@pytest.fixture
def write_lora(tmp_path: Path) -> WriteLora:
    """Writes tensors to a new file."""

    def writing(
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        name: str = "lora.safetensors",
    ) -> Path:
        return write(tmp_path, Written(tensors, metadata or {}, config), name)

    return writing
