"""What is told of each patch agrees with the picture, and is read from the middle layer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from zimage.training.alignment import FEATURES, Reader, patch_facts
from zimage.training.config import ModelSize
from zimage.training.models import Painter, outputs_of
from zimage.training.scenes import PALETTE, draw_scene, render
from zimage.training.world import CANVASES, COLOURS, Scene, SceneObject

UNIT = math.sqrt(160 * 96)
STAR = SceneObject(shape="star", colour="cyan", size="large", extent=0.4, x=0.25, y=0.5, rotation=6.0)
RING = SceneObject(shape="ring", colour="red", size="small", extent=0.2, x=0.75, y=0.5)
SCENE = Scene(width=160, height=96, background="grey", objects=(STAR, RING))


def test_a_patch_knows_its_object() -> None:
    (facts,) = patch_facts([SCENE], 6, 10)
    assert facts.shape == (60, FEATURES)
    (patch,) = facts.view(6, 10, FEATURES)[2:3, 1]  # its centre is at (24, 40), in the star's square around (40, 48)
    shapes, colours, grounds, extent, rotation, way = patch.split([5, 8, 3, 1, 1, 2])
    assert shapes.tolist() == [0, 0, 0, 1, 0]
    assert colours.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert grounds.tolist() == [0, 1, 0]
    assert extent.item() == pytest.approx(0.4)
    assert rotation.item() == pytest.approx(0.5)
    assert way.tolist() == pytest.approx([2 * 16 / UNIT, 2 * 8 / UNIT])


def test_a_patch_of_the_background_belongs_to_the_nearest_object() -> None:
    (facts,) = patch_facts([SCENE], 6, 10)
    is_ring = facts.view(6, 10, FEATURES)[:, :, 4] == 1
    assert is_ring[:, 6:].all()
    assert not is_ring[:, :5].any()


def test_what_is_inside_owns_its_patches() -> None:
    content = replace(RING, x=0.25, extent=0.3)
    (facts,) = patch_facts([replace(SCENE, objects=(content, replace(STAR, extent=0.62)))], 6, 10)
    is_content = facts.view(6, 10, FEATURES)[:, :, 4] == 1
    assert is_content.nonzero().tolist() == [[row, column] for row in (2, 3) for column in (1, 2, 3)]


@pytest.mark.parametrize("canvas", CANVASES)
def test_patches_have_the_colour_of_their_pixels(canvas: tuple[int, int]) -> None:
    width, height = canvas
    rng = np.random.default_rng(0)
    drawn = [draw_scene(rng, canvas=canvas) for _ in range(150)]
    scenes = [scene for scene in drawn if not any(relation == "inside" for _, relation, _ in scene.relations)]
    facts = patch_facts(scenes, height // 16, width // 16)
    seen = {colour: 0 for colour in COLOURS}
    for scene, rows in zip(scenes, facts, strict=True):
        pixels = render(scene)[8::16, 8::16].reshape(-1, 3)
        for pixel, row in zip(pixels.tolist(), rows, strict=True):
            for colour in COLOURS:
                if tuple(pixel) == PALETTE[colour]:
                    seen[colour] += 1
                    assert COLOURS[int(row[5:13].argmax())] == colour
    assert min(seen.values()) > 40


def test_scenes_in_a_batch_do_not_change_each_other() -> None:
    rng = np.random.default_rng(1)
    scenes = [draw_scene(rng, objects=1 + number % 3) for number in range(6)]
    together = patch_facts(scenes, 8, 8)
    for scene, facts in zip(scenes, together, strict=True):
        assert torch.equal(patch_facts([scene], 8, 8)[0], facts)


def test_the_middle_layer_is_read(size: ModelSize) -> None:
    torch.manual_seed(0)
    painter = Painter(replace(size, n_layers=3))
    for name, weight in painter.transformer.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(weight, std=0.2)
    inputs = torch.randn(2, 16, 12, 20), torch.randint(9, (2, 32)), [4, 32], torch.tensor([0.3, 0.6])
    with torch.no_grad():
        before = painter.velocity_and_facts(*inputs)[1]
        assert before.shape == (2, 60, FEATURES)
        for number, is_read in ((2, False), (1, True)):
            painter.transformer.layers[number].feed_forward.w2.weight.normal_()
            assert torch.equal(painter.velocity_and_facts(*inputs)[1], before) is not is_read
    assert "_run_block" not in vars(painter.transformer)


def test_blocks_run_as_before_after_an_error(size: ModelSize) -> None:
    transformer = Painter(size).transformer
    for own in (None, transformer.denoise):  # as it is, and as if it were compiled
        if own:
            transformer._run_block = own
        with pytest.raises(ZeroDivisionError), outputs_of(transformer, transformer.layers[0]):
            1 / 0  # noqa: B018
        assert vars(transformer).get("_run_block") == own


def test_a_reader_learns_what_features_hold() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(2)
    facts = patch_facts([draw_scene(rng) for _ in range(30)], 8, 8).flatten(0, 1)
    features = facts @ torch.randn(FEATURES, 48)
    reader = Reader(48)
    optimiser = torch.optim.Adam(reader.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        losses.append((reader(features) - facts).square().mean())
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.1 * losses[0]
