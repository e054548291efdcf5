"""Checkpoints in other layouts: the same bits there and back, readable by others, and nothing left of what fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage import CheckpointError, RequestError, ZImagePipeline, convert_checkpoint
from zimage.checkpoint import writing
from zimage.checkpoint.inspect import inspect_checkpoint
from zimage.checkpoint.names import other_name, own_name
from zimage.cli import main
from zimage.models import ggml
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES, vae_config
from zimage.testing.weights import tensor_shapes

from .writers import Weights, float8, ldm, llama, published, weights_of, widened, write_gguf

PARTS = ("transformer", "text_encoder", "vae")


def same(found: Weights, expected: Weights) -> bool:
    """To the bit, and by name."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, as on the hub in shards, its transformer in float32."""
    return build_checkpoint(
        tmp_path_factory.mktemp("narrow") / "model", dtype="bfloat16", transformer_dtype="float32",
        max_shard_size="300KB",
    )  # fmt: skip


def test_there_and_back_gives_the_same_bits(narrow: Path, tmp_path: Path) -> None:
    files = {part: convert_checkpoint(narrow, tmp_path / f"{part}.safetensors", part=part) for part in PARTS}
    assert same(load_file(files["transformer"]), published(weights_of(narrow)))
    assert same(load_file(files["text_encoder"]), weights_of(narrow, "text_encoder"))
    assert same(load_file(files["vae"]), ldm(weights_of(narrow, "vae")))
    folder = convert_checkpoint(narrow, tmp_path / "back", **files, max_shard_size="200KB")  # type: ignore[arg-type]
    assert folder == tmp_path / "back"
    for part in PARTS:
        assert same(weights_of(folder, part), weights_of(narrow, part))
        assert (len(list((folder / part).glob("*.safetensors"))) > 1) == (folder / part / index(part)).exists()
    assert (folder / "transformer" / index("transformer")).exists()
    assert inspect_checkpoint(folder).problems == ()
    for name in ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json", "tokenizer/tokenizer.json"):
        assert (folder / name).read_bytes() == (narrow / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back",
        *(f"{part}.safetensors" for part in sorted(PARTS)),
    ]


def index(part: str) -> str:
    return f"{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors.index.json"


def test_files_of_others_become_a_folder_that_diffusers_loads(tiny: Path, tmp_path: Path) -> None:
    from diffusers import ZImagePipeline as DiffusersPipeline

    mine = {part: {name: one + 0.25 for name, one in weights_of(tiny, part).items()} for part in PARTS}
    save_file(published(mine["transformer"], "model.diffusion_model."), tmp_path / "z.safetensors")
    write_gguf(tmp_path / "qwen.gguf", llama(mine["text_encoder"]), architecture="qwen3")
    save_file(ldm(mine["vae"], "vae."), tmp_path / "ae.safetensors")
    folder = convert_checkpoint(
        tiny, tmp_path / "folder", transformer=tmp_path / "z.safetensors", text_encoder=tmp_path / "qwen.gguf",
        vae=tmp_path / "ae.safetensors",
    )  # fmt: skip
    theirs = DiffusersPipeline.from_pretrained(folder, local_files_only=True)
    for part in PARTS:
        state = getattr(theirs, part).state_dict()
        assert same(state, {name.removeprefix("model."): one for name, one in mine[part].items()})
    pipe = ZImagePipeline.from_pretrained(folder, device="cpu", dtype="float32")
    assert same(pipe.transformer.state_dict(), mine["transformer"])


def test_diffusers_reads_the_single_file(tiny: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, ZImageTransformer2DModel

    for part, kind in (("transformer", ZImageTransformer2DModel), ("vae", AutoencoderKL)):
        file = convert_checkpoint(tiny, tmp_path / f"{part}.safetensors", part=part)
        theirs = kind.from_single_file(str(file), config=str(tiny), subfolder=part, local_files_only=True)
        assert same(theirs.state_dict(), weights_of(tiny, part))


def test_names_of_a_vae_are_those_that_diffusers_converts(tmp_path: Path) -> None:
    """For all of the released VAE's names, with a number for each tensor that tells which it is."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = vae_config(SIZES["real"], "0.36.0")
    names = list(tensor_shapes("vae", config))
    numbered = {other_name("vae", name): torch.tensor(float(number)) for number, name in enumerate(names)}
    assert len(numbered) == len(names) == 244
    converted = convert_ldm_vae_checkpoint(numbered, config)
    assert {name: int(one) for name, one in converted.items()} == {name: number for number, name in enumerate(names)}
    assert [own_name("vae", name) for name in numbered] == names
    assert [own_name("vae", name) for name in names] == names  # ours stay


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_type_is_that_of_torch(dtype: str, tiny: Path, narrow: Path, tmp_path: Path) -> None:
    wanted = getattr(torch, dtype)
    file = convert_checkpoint(tiny, tmp_path / "z.safetensors", dtype=dtype)
    assert same(load_file(file), {name: one.to(wanted) for name, one in published(weights_of(tiny)).items()})
    folder = convert_checkpoint(narrow, tmp_path / "folder", dtype=dtype)
    for part in PARTS:
        assert same(weights_of(folder, part), {name: one.to(wanted) for name, one in weights_of(narrow, part).items()})


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_float8_is_what_its_scales_say(part: str, tiny: Path, tmp_path: Path) -> None:
    file = convert_checkpoint(tiny, tmp_path / "fp8.safetensors", part=part, dtype="float8")
    found, plain = load_file(file), weights_of(tiny, part)
    plain = published(plain) if part == "transformer" else plain
    marker = found.pop("scaled_fp8")
    assert (marker.shape, marker.dtype) == ((2,), torch.float8_e4m3fn)

    def narrowed(name: str) -> bool:
        bare = name.removeprefix("model.")
        return bare.startswith(("layers", "noise_refiner", "context_refiner")) and "adaLN" not in name

    expected = float8(plain, narrowed)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        wanted = one.bfloat16() if name in plain and one.dtype == torch.float32 else one
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name].float(), wanted.float()), name
    pipe = ZImagePipeline.from_pretrained(tiny, **{part: file}, device="cpu", dtype="float32")  # type: ignore[arg-type]
    assert pipe.weights == "fp8"
    again = convert_checkpoint(tiny, tmp_path / "back", **{part: file}, dtype="float32")  # type: ignore[arg-type]
    back = weights_of(again, part)
    values = widened(found)
    assert same(published(back) if part == "transformer" else back, values)
    worst = max(float((values[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in plain)
    assert 0.01 < worst < 1 / 28  # a half of the last of three bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_gguf_in_full(dtype: str | None, narrow: Path, tmp_path: Path) -> None:
    file = convert_checkpoint(narrow, tmp_path / "model.gguf", dtype=dtype)
    reader, expected = GGUFReader(file), published(weights_of(narrow))
    kind = {"bfloat16": "BF16", "float16": "F16"}.get(dtype or "", "F32")
    assert str(reader.fields["general.architecture"].contents()) == "lumina2"
    assert [one.name for one in reader.tensors] == list(expected)
    for one in reader.tensors:
        matrix = expected[one.name].ndim == 2 and "pad_token" not in one.name
        assert one.tensor_type.name == (kind if matrix else "F32")
        assert tuple(reversed(one.shape.tolist())) == tuple(expected[one.name].shape)
        wanted = expected[one.name].to(getattr(torch, dtype or "float32") if matrix else torch.float32).float()
        assert torch.equal(torch.from_numpy(np.array(dequantize(one.data, one.tensor_type))).view(wanted.shape), wanted)
    assert reader.data_offset % 32 == 0
    pipe = ZImagePipeline.from_pretrained(narrow, transformer=file, device="cpu", dtype="float32")
    assert pipe.weights is None


def test_gguf_in_eight_bits_is_what_the_package_writes(tiny: Path, tmp_path: Path) -> None:
    file = convert_checkpoint(tiny, tmp_path / "model.gguf", dtype="q8_0")
    expected = published(weights_of(tiny))
    kinds = set()
    for one in GGUFReader(file).tensors:
        kinds.add(one.tensor_type.name)
        if one.tensor_type.name == "Q8_0":
            assert one.name.startswith(("layers", "noise_refiner", "context_refiner"))
            packed = quantize(expected[one.name].numpy(), GGMLQuantizationType.Q8_0)
            assert np.array_equal(one.data, packed)
        elif expected[one.name].ndim == 2 and "pad" not in one.name:
            assert one.tensor_type.name == "BF16"
    assert kinds == {"Q8_0", "BF16", "F32"}
    pipe = ZImagePipeline.from_pretrained(tiny, transformer=file, device="cpu", dtype="float32")
    assert pipe.weights == "gguf"
    back = weights_of(convert_checkpoint(tiny, tmp_path / "back", transformer=file))
    name = "layers.1.attention.to_k.weight"
    wide = ggml.widen(ggml.pack_q8_0(weights_of(tiny)[name]), "Q8_0", torch.bfloat16)
    assert torch.equal(back[name], wide)
    assert not torch.equal(back[name], weights_of(tiny)[name].bfloat16())


def test_halves_are_rounded_as_ggml_does() -> None:
    rows = torch.zeros(2, 64)
    rows[0, :6] = torch.tensor([127.0, 0.5, -0.5, 1.5, 2.5, -3.5])
    stored = ggml.pack_q8_0(rows)
    assert np.array_equal(stored.numpy(), quantize(rows.numpy(), GGMLQuantizationType.Q8_0))
    assert ggml.widen(stored, "Q8_0", torch.float32)[0, :6].tolist() == [127, 1, -1, 2, 3, -4]


def test_only_what_is_asked_for_is_needed(narrow: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(narrow, tmp_path / "bare"))
    for part in ("text_encoder", "vae"):
        for file in (bare / part).glob("*.safetensors*"):
            file.unlink()
    shutil.rmtree(bare / "tokenizer")
    convert_checkpoint(bare, tmp_path / "z.safetensors")
    with pytest.raises(CheckpointError, match="vae should have diffusion_pytorch_model"):
        convert_checkpoint(bare, tmp_path / "ae.safetensors", part="vae")


def test_one_tensor_is_in_memory_at_a_time(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    read, held, most = writing._values, list[Any](), 0

    def noted(*arguments: Any) -> Tensor:
        nonlocal most
        made = read(*arguments)
        held.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in held))
        return made

    monkeypatch.setattr(writing, "_values", noted)
    convert_checkpoint(tiny, tmp_path / "z.safetensors", dtype="float8")
    convert_checkpoint(tiny, tmp_path / "z.gguf", dtype="q8_0")
    convert_checkpoint(tiny, tmp_path / "folder")
    assert len(held) > 300
    assert most == 1


def put(name: str, value: Tensor) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        save_file({**load_file(file), name: value}, file)

    return change


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (put("layers.1.attention.to_q.weight", torch.full((64, 64), torch.nan)), "values that are NaN or infinite"),
    "too large for the type": (put("x_pad_token", torch.full((1, 64), 1e6)), "beyond the range of float16"),
    "cut short": (cut, "not a whole safetensors file"),
    "of another shape": (put("x_pad_token", torch.ones(1, 32)), r"misshapen: 'x_pad_token' \[1, 32\] for \[1, 64\]"),
}


@pytest.mark.parametrize("target", ["z.safetensors", "z.gguf", "folder"])
@pytest.mark.parametrize("name", BROKEN)
def test_nothing_is_left_of_what_fails(name: str, target: str, copy: Path, tmp_path: Path) -> None:
    spoil, message = BROKEN[name]
    spoil(copy / "transformer" / "diffusion_pytorch_model.safetensors")
    if target == "z.gguf" and "large" in name:
        return  # what is no matrix is in float32 there
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(copy, tmp_path / target, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("target", ["z.safetensors", "z.gguf", "folder"])
def test_what_is_there_stays_unless_it_may_be_replaced(target: str, tiny: Path, copy: Path, tmp_path: Path) -> None:
    path = convert_checkpoint(tiny, tmp_path / target)
    before = content(path)
    with pytest.raises(RequestError, match=r"exists .*overwrite=True replaces it"):
        convert_checkpoint(tiny, path, dtype="bfloat16")
    put("layers.0.attention.to_q.weight", torch.full((64, 64), torch.inf))(
        copy / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        convert_checkpoint(copy, path, overwrite=True)
    assert content(path) == before
    assert convert_checkpoint(tiny, path, dtype="bfloat16", overwrite=True) == path
    assert content(path) != before
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["copy", target])
    if target == "folder":
        assert {one.dtype for one in weights_of(path).values()} == {torch.bfloat16}
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").write_text("dear")
        with pytest.raises(RequestError, match="is no checkpoint folder, so it is not replaced"):
            convert_checkpoint(tiny, tmp_path / "mine", overwrite=True)
        assert content(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_of_a_mount_point_it_is_not_said_that_it_could_be_replaced(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: path == str(copy))
    with pytest.raises(RequestError, match=r"copy is a mount point, .*such as .*/model$"):
        convert_checkpoint(copy, copy)


@pytest.mark.parametrize("full", [False, True])
def test_of_a_disk_that_takes_no_tokenizer_the_source_is_not_blamed(
    full: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its private copy goes to the folder for temporary files, which may also be gone."""

    def write(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place = tmp_path if full else tmp_path / "gone"
    monkeypatch.setattr("tempfile.tempdir", str(place))
    if full:
        monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(CheckpointError) as raised:
        convert_checkpoint(tiny, tmp_path / "folder")
    said = "No space left on device" if full else "No such file or directory"
    assert str(raised.value) == (
        f"a copy of the tokenizer cannot be written to {place}: {said}; "
        "make room there, or name another folder in TMPDIR"
    )
    assert list(tmp_path.iterdir()) == []


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return {one.name: one.read_bytes() for one in files}


def test_a_model_is_replaced_by_itself(copy: Path) -> None:
    expected = {part: {name: one.bfloat16() for name, one in weights_of(copy, part).items()} for part in PARTS}
    convert_checkpoint(copy, copy, dtype="bfloat16", overwrite=True)
    for part in PARTS:
        assert same(weights_of(copy, part), expected[part])


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("x.safetensors", {"dtype": "int8"}, "dtype must be bfloat16, float16, float32, float8, q8_0, or left out"),
        ("x.safetensors", {"dtype": "q8_0"}, "cannot be written to a .safetensors file in q8_0"),
        ("x.safetensors", {"dtype": "float8", "part": "vae"}, "the vae cannot be .* in float8"),
        ("x.safetensors", {"part": "tokenizer"}, "part must be text_encoder, transformer, vae, got 'tokenizer'"),
        (
            "x.safetensors",
            {"vae": "ae.safetensors"},
            "a file for the vae has no effect on one of the transformer; leave it out, or ask for part='vae'",
        ),
        ("x.gguf", {"dtype": "float8"}, "a .gguf file has no float8"),
        ("x.gguf", {"part": "text_encoder"}, "only the transformer is written to GGUF files"),
        ("x", {"part": "vae"}, "part is for a .safetensors or .gguf file"),
        ("x", {"dtype": "float8"}, "for fewer bits write a .safetensors or .gguf file"),
        ("x", {"max_shard_size": "many"}, "max_shard_size must be bytes"),
        ("x.ckpt", {}, "would be a pickle"),
        ("no/x.safetensors", {}, "there is no folder"),
    ],
)
def test_what_cannot_be_asked_for(
    target: str, options: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        convert_checkpoint(tiny, tmp_path / target, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_target_is_a_path(tiny: Path) -> None:
    for write in (
        partial(convert_checkpoint, tiny),
        ZImagePipeline.from_pretrained(tiny, device="cpu").save_pretrained,
    ):
        for wrong in (None, 5):
            with pytest.raises(RequestError, match=f"what is written needs a path, got {wrong}"):
                write(wrong)  # type: ignore[operator]


def test_a_file_as_the_model_needs_a_variant(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = convert_checkpoint(tiny, tmp_path / "z.safetensors")
    for call in (ZImagePipeline.from_pretrained, lambda model: convert_checkpoint(model, tmp_path / "z.gguf")):
        with pytest.raises(CheckpointError, match=r"does not say which model it is: give variant='base' or variant='t"):
            call(file)
    with pytest.raises(CheckpointError, match=r"the model is a file, .* and another is given as its tr"):
        ZImagePipeline.from_pretrained(file, transformer=file, variant="turbo")
    asked: list[str] = []

    def found(source: str, *_: Any) -> Any:
        from zimage.checkpoint.locate import Location

        asked.append(source)
        return Location(folder=tiny, hub_id=source, revision="0" * 40)

    monkeypatch.setattr("zimage.checkpoint.locate._locate_folder", found)
    pipe = ZImagePipeline.from_pretrained(file, variant="turbo", device="cpu", dtype="float32")
    assert asked == ["Tongyi-MAI/Z-Image-Turbo"]
    assert pipe.model["transformer"] == str(file)
    assert same(pipe.transformer.state_dict(), weights_of(tiny))


def test_the_command(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["convert", *map(str, arguments)])
        return int(ended.value.code or 0), *capfd.readouterr()

    code, out, error = run(tiny, tmp_path / "z.safetensors", "--dtype", "float8")
    assert (code, out) == (0, f"{tmp_path / 'z.safetensors'}\n")
    assert error == f"zimage: transformer: {len(published(weights_of(tiny)))} tensors in BF16, F8_E4M3\n"
    code, out, error = run(tiny, tmp_path / "z.safetensors")
    assert (code, out) == (2, "")
    assert "exists already" in error
    assert "--force" in error
    assert run(tiny, tmp_path / "z.safetensors", "--force", "--quiet") == (0, f"{tmp_path / 'z.safetensors'}\n", "")
    assert same(load_file(tmp_path / "z.safetensors"), published(weights_of(tiny)))
    code, out, _ = run(tiny, tmp_path / "ae.safetensors", "--part", "vae", "--quiet")
    assert code == 0
    code, out, error = run(
        tiny, tmp_path / "folder", "--transformer", tmp_path / "z.safetensors", "--vae", tmp_path / "ae.safetensors",
        "--max-shard-size", "1MB",
    )  # fmt: skip
    assert (code, error.count("\n")) == (0, 3)
    assert json.loads((tmp_path / "folder" / "model_index.json").read_text())["_class_name"] == "ZImagePipeline"
    code, _, error = run(tmp_path / "z.safetensors", tmp_path / "z.gguf")
    assert code == 1
    assert "give --variant base or --variant turbo" in error
    code, _, error = run(tiny, tmp_path / "x.gguf", "--part", "vae")
    assert code == 2
