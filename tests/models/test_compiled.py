"""One program for all blocks, sizes and prompts, and eager computation wherever compiled code would not do.

But for one test torch's compiler stops before it makes machine code: what is compiled has the bits of the original.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zimage import RequestError, ZImagePipeline, denoiser
from zimage.models import compiled as compiled_blocks
from zimage.models.compiled import compile_blocks, is_compiled
from zimage.models.precision import Float32Math
from zimage.testing import build_diffusers

pytestmark = pytest.mark.no_cover  # nearly every line is counted in other tests; tracing slows torch's compiler most
CALL: dict[str, Any] = {"height": 64, "width": 64, "any_size": True, "num_inference_steps": 2, "seed": 1}
BLOCKS = 4
"""Modulated blocks of a tiny transformer."""


@dataclass
class Counting:
    """A backend of torch's compiler that runs the graphs as they are, and counts them and their runs."""

    graphs: int = 0
    runs: int = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def load(folder: Path, **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cpu", **{"dtype": "float32", **options})


def latents(pipe: ZImagePipeline, prompt: str = "a fox", **options: Any) -> Tensor:
    return pipe(prompt, progress=False, output_type="latent", **{**CALL, **options}).images[0]  # type: ignore[union-attr]


def compiled(pipe: ZImagePipeline) -> Counting:
    counting = Counting()
    compile_blocks(pipe.transformer, counting)
    return counting


@pytest.fixture(scope="module")
def shared(turbo_folder: Path) -> tuple[ZImagePipeline, Counting]:
    """A compiled pipeline that has made a picture; no test changes it for others."""
    pipe = load(turbo_folder)
    counting = compiled(pipe)
    latents(pipe)
    assert counting == Counting(graphs=1, runs=2 * BLOCKS)
    return pipe, counting


@pytest.fixture
def quiet(shared: tuple[ZImagePipeline, Counting]) -> Iterator[ZImagePipeline]:
    """The same pipeline; nothing may be compiled again."""
    pipe, counting = shared
    graphs = counting.graphs
    yield pipe
    assert counting.graphs == graphs


def test_a_hundred_prompts_of_every_length_at_several_sizes_compile_nothing(
    shared: tuple[ZImagePipeline, Counting],
) -> None:
    pipe, counting = shared
    runs, lengths = counting.runs, set()
    for number in range(100):
        prompt = "fox " * (5 * number // 2)  # of two tokens each
        lengths.add(-(-len(pipe.text_encoder.tokenize(prompt, 512).ids) // 32))
        side = (64, 96, 80)[number % 3]
        latents(pipe, prompt, height=side, num_inference_steps=1, max_sequence_length=512)
    assert lengths == set(range(1, 17))
    assert counting == Counting(graphs=1, runs=runs + 100 * BLOCKS)  # and none ran uncompiled
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiling_twice_is_compiling_once_and_there_is_a_way_back(turbo_folder: Path) -> None:
    pipe = load(turbo_folder)
    before = latents(pipe)
    assert not pipe.compiled
    assert pipe.compile() is pipe
    first = vars(pipe.transformer)["_run_block"]
    assert pipe.compile().compiled
    assert vars(pipe.transformer)["_run_block"] is first
    assert pipe.uncompile() is pipe.uncompile() is pipe
    assert not pipe.compiled
    assert "_run_block" not in vars(pipe.transformer)
    assert torch.equal(latents(pipe), before)


def test_recipes_tell_and_a_replay_names_the_difference(
    quiet: ZImagePipeline, turbo: ZImagePipeline, tmp_path: Path
) -> None:
    quiet("a fox", progress=False, **CALL).images[0].save(tmp_path / "fox.png")  # type: ignore[union-attr]
    again = quiet.replay(tmp_path / "fox.png")
    assert (again.same_bits, again.differences) == (True, ())
    assert "blocks was compiled, here it is eager" in turbo.replay(tmp_path / "fox.png").differences


def test_hooks_that_come_later_act(quiet: ZImagePipeline, turbo: ZImagePipeline) -> None:
    before, calls = latents(quiet), []

    def halve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(len(inputs))
        return output / 2

    handles = [one.transformer.layers[1].attention.to_v.register_forward_hook(halve) for one in (quiet, turbo)]
    hooked, expected = latents(quiet), latents(turbo)
    for handle in handles:
        handle.remove()
    assert len(calls) == 4  # two pipelines of two steps
    assert torch.equal(hooked, expected)
    assert not torch.equal(hooked, before)
    assert torch.equal(latents(quiet), before)


class Halved(nn.Module):
    """What an adapter does to a layer: it stands in its place."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) / 2


def test_layers_that_are_replaced_later_act_and_so_does_another_precision(turbo_folder: Path) -> None:
    pipe, plain = load(turbo_folder), load(turbo_folder)
    counting = compiled(pipe)
    before = latents(pipe)
    for one in (pipe, plain):
        attention = one.transformer.layers[1].attention
        attention.to_v = Halved(attention.to_v)
    assert torch.equal(latents(pipe), latents(plain))
    assert counting == Counting(graphs=2, runs=4 * BLOCKS)
    pipe.transformer.layers[1].attention.to_v = pipe.transformer.layers[1].attention.to_v.layer
    assert torch.equal(latents(pipe), before)
    assert counting.graphs == 2
    pipe.to(torch.float16)
    assert torch.equal(latents(pipe), latents(load(turbo_folder, dtype="float16")))
    assert counting == Counting(graphs=3, runs=8 * BLOCKS)


def overflow(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * torch.inf if output.dtype == torch.float16 else output


def test_a_second_try_in_float32_is_computed_as_it_stands(turbo_folder: Path) -> None:
    pipe, plain = (load(turbo_folder, dtype="float16") for _ in range(2))
    for one in (pipe, plain):
        one.transformer.layers[0].ffn_norm1.register_forward_hook(overflow)
    counting = compiled(pipe)
    assert torch.equal(latents(pipe), latents(plain))
    assert counting.runs == BLOCKS - 1  # of the first step, without the block that is hooked; then all is float32


def test_float32_around_it_reaches_every_operation(turbo_folder: Path) -> None:
    pipe, plain = (load(turbo_folder, dtype="bfloat16").transformer for _ in range(2))
    counting = Counting()
    compile_blocks(pipe, counting)
    with torch.no_grad(), Float32Math():
        assert torch.equal(evaluate(pipe), evaluate(plain))
    assert counting == Counting()


def evaluate(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise, features = (torch.randn(shape, generator=generator) for shape in ((1, 16, 8, 8), (20, 64)))
    caption = transformer.encode_caption(features)
    (modulation,) = transformer.modulations(torch.tensor([0.3]))
    return transformer.denoise(noise, caption, transformer.grid(8, 8, caption.length), modulation)


def test_gradients_are_computed_as_it_stands(turbo_folder: Path) -> None:
    transformer, counting = load(turbo_folder).transformer, Counting()
    compile_blocks(transformer, counting)
    transformer.requires_grad_(True)
    evaluate(transformer).square().sum().backward()
    weight = transformer.layers[0].attention.to_q.weight
    assert weight.grad.abs().sum() > 0
    assert counting == Counting()


def test_blocks_that_pass_through_share_the_program(turbo_folder: Path) -> None:
    pipe = load(turbo_folder)
    expected = latents(pipe)
    counting = compiled(pipe)
    assert torch.equal(latents(pipe), expected)
    pipe.enable_sequential_cpu_offload()
    for prompt in ("a fox", "two foxes", "a fox " * 40):
        latents(pipe, prompt)
    assert torch.equal(latents(pipe), expected)
    assert counting.graphs <= 2  # one more where what is resident was marked as trainable
    assert counting.runs == 5 * 2 * BLOCKS


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float16")])
def test_stored_weights_share_a_program_too(turbo_folder: Path, kind: str, dtype: str) -> None:
    pipe = load(turbo_folder, weight_dtype=kind, dtype=dtype)
    expected = latents(pipe)
    counting = compiled(pipe)
    assert torch.equal(latents(pipe), expected)
    latents(pipe, "a fox " * 40)
    assert counting == Counting(graphs=1, runs=4 * BLOCKS)


def test_threads_share_it(quiet: ZImagePipeline, turbo: ZImagePipeline) -> None:
    prompts = ["a fox", "a fox " * 20, "a fox " * 50]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda prompt: latents(quiet, prompt), prompts))
    for prompt, one in zip(prompts, made, strict=True):
        assert torch.equal(one, latents(turbo, prompt))


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """What stands in for a transformer whose block is soon compiled, and the arguments of a block."""

    def run_block(block: Any, tokens: Tensor, *_: Any) -> Tensor:
        return tokens * 2

    monkeypatch.setattr(compiled_blocks, "run_block", run_block)
    transformer = SimpleNamespace(compute_dtype=torch.float32, attend=None)
    with torch.no_grad():
        yield transformer, (nn.Identity(), torch.ones(1, 32, 4), torch.ones(1, 32, 2, dtype=torch.complex64), ())


def test_every_transformer_has_torchs_limit_to_itself(doubling: tuple[Any, Any]) -> None:
    transformer, inputs = doubling
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            counting = Counting()
            other = SimpleNamespace(**vars(transformer))
            compile_blocks(other, counting)  # type: ignore[arg-type]
            assert other._run_block(*inputs).sum() == 256
            assert counting == Counting(graphs=1, runs=1)


def test_what_runs_raises_its_own_errors(doubling: tuple[Any, Any]) -> None:
    def break_off(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            raise ValueError("not of the compiler")

        return run

    transformer, inputs = doubling
    compile_blocks(transformer, break_off)
    with pytest.raises(ValueError, match="not of the compiler"):
        transformer._run_block(*inputs)
    assert is_compiled(transformer)


def test_compiling_that_fails(run_python: Callable[..., str]) -> None:
    """In a process of its own (`failing_compilers`): torch stays between all calls of Python afterwards, where
    arguments live longer, and others measure memory."""
    run = "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    assert "3 passed" in run_python(run, Path(__file__).with_name("failing_compilers.py"))


def test_no_compiler_at_all_is_said(turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **options: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(RequestError, match=r"torch cannot compile here \(torch.compile is not .* 3.99\); leave pipe"):
        turbo.compile()
    assert not turbo.compiled


def test_closing_leaves_a_transformer_as_it_was_handed_in(turbo_folder: Path) -> None:
    first = load(turbo_folder)
    second = ZImagePipeline.from_diffusers(first.to_diffusers()).compile()
    assert first.compiled
    second.close()
    assert not first.compiled
    third = ZImagePipeline.from_diffusers(first.compile().to_diffusers()).compile()
    third.close()
    third.close()
    assert first.compiled


def test_what_diffusers_compiles_and_what_zimage_compiles_are_apart() -> None:
    theirs = build_diffusers(size="tiny", dtype="float32")
    pipe, apart = ZImagePipeline.from_diffusers(theirs), Counting()
    theirs.transformer.compile_repeated_blocks(fullgraph=True, backend=apart)
    latents(pipe)
    assert apart == Counting()
    ours = compiled(pipe)
    latents(pipe)
    assert (apart.runs, ours.runs) == (0, 2 * BLOCKS)
    assert "_run_block" not in vars(theirs.transformer)


def test_captions_are_encoded_as_it_stands(turbo_folder: Path) -> None:
    transformer, counting = load(turbo_folder).transformer, Counting()
    compile_blocks(transformer, counting)
    with torch.no_grad():
        transformer.encode_caption(torch.ones(20, 64))
    assert counting == Counting()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_machine_code_agrees_and_repeats(turbo_folder: Path) -> None:
    """Over two steps, so that what is compared is more than the rounding of one forward."""
    pipe = load(turbo_folder)
    eager = latents(pipe)
    pipe.compile()
    made, again = latents(pipe), latents(pipe)
    assert pipe.compiled
    assert torch.equal(made, again)
    assert torch.cosine_similarity(made.flatten(), eager.flatten(), dim=0) >= 0.9999
    assert not torch.equal(made, eager)  # or nothing was compiled


def test_guidance_is_compiled_one_branch_after_the_other(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels compute the blocks, and nothing compiled, both branches are computed together."""
    pipe, plain = load(base_folder), load(base_folder)
    counting = compiled(pipe)
    options: dict[str, Any] = {"negative_prompt": "blurry " * 30, "guidance_scale": 4.0}
    made = latents(pipe, **options)
    assert counting == Counting(graphs=1, runs=2 * 2 * BLOCKS)
    monkeypatch.setattr(denoiser, "TOGETHER", 0)
    assert torch.equal(made, latents(plain, **options))
    monkeypatch.undo()
    monkeypatch.setattr("zimage.models.compiled.used", lambda device: device == torch.device("cpu"))
    together = latents(plain, **options)
    assert torch.equal(latents(pipe, **options), together)
    assert counting.runs == 2 * 2 * BLOCKS
    torch.testing.assert_close(together, made, rtol=1e-4, atol=1e-4)


def test_kernels_go_on_where_there_are_any(turbo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices for which `used` says so, which on a card with Triton it does."""
    pipe = load(turbo_folder)
    counting = compiled(pipe)
    assert pipe.compiled
    monkeypatch.setattr("zimage.models.compiled.used", lambda device: device == torch.device("cpu"))
    latents(pipe)
    assert counting == Counting()
    assert not pipe.compiled
