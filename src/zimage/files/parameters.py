"""A recipe as the line of parameters that other tools read. Knows no files."""

from __future__ import annotations

import json
import unicodedata
from pathlib import PurePath

from ..variants import get_variant
from .recipe import Recipe

_SAMPLER_TITLES = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}


def parameters_text(recipe: Recipe) -> str:
    """The recipe in the text format of AUTOMATIC1111's web UI, which Civitai and most viewers read.

    Their "CFG scale" c is in `neg + c·(pos - neg)`, so c is the guidance scale here plus 1. Lines are what the format
    is read by, so each prompt is put on one.
    """
    request = recipe.request
    values = {
        "Steps": request.num_inference_steps,
        "Sampler": _SAMPLER_TITLES.get(request.sampler, request.sampler),
        "CFG scale": f"{request.guidance_scale + 1:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": _one_line(PurePath(recipe.model["source"]).name or get_variant(request.variant).title),
        "Version": f"zimage {_one_line(recipe.runtime.get('zimage', ''))}".strip(),
    }
    if recipe.turbo is not None:
        values["Handover to Turbo"] = f"{recipe.handover:g}"
    if request.image is not None:
        values["Denoising strength"] = f"{request.strength:g}"
    if request.hires is not None:
        values |= {"Hires upscale": f"{request.hires.scale:g}", "Hires upscaler": request.hires.upscale.capitalize()}
        values["Hires denoising strength"] = f"{request.hires.strength:g}"
    lines = [_one_line(request.prompt)]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {_one_line(request.negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items()))
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """The text with every run of white space, control characters and broken surrogates made one space."""
    kept = "".join(" " if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)
    return " ".join(kept.split())


def _quoted(value: str) -> str:
    """A value as the format has it: quoted where it holds what separates values."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value
