from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from zimage.checkpoint.load import load_components
from zimage.checkpoint.locate import Location, locate
from zimage.errors import CheckpointError
from zimage.testing import build_checkpoint

if TYPE_CHECKING:
    from conftest import Hub, Locator

CONFIGS = [
    *("model_index.json", "scheduler/scheduler_config.json"),
    *("text_encoder/config.json", "transformer/config.json", "vae/config.json"),
]
TOKENIZER = [f"tokenizer/{name}" for name in ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")]
WEIGHTS = [
    *("text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"),
    "vae/diffusion_pytorch_model.safetensors",
]


def plant(folder: Path) -> None:
    """What real repositories have beside a checkpoint, and what hostile ones may."""
    for name in (
        *("README.md", "assets/fox.png", "handler.py", "transformer/modeling.py", "pipeline.py"),
        *("text_encoder/pytorch_model.bin", "transformer/diffusion_pytorch_model.fp16.safetensors"),
        *("text_encoder/generation_config.json", "z_image.safetensors", "vae/diffusion_pytorch_model.bin"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"planted")


def test_a_folder_is_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(tiny) == locate(str(tiny)) == Location(folder=tiny, hub_id=None, revision=None)
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert locate(f"~/{tiny.name}").folder == tiny
    monkeypatch.chdir(tiny.parent)
    assert locate(tiny.name).folder == Path(tiny.name)
    assert locate(f"./{tiny.name}").folder == Path(tiny.name)


def test_an_alias_means_the_hub_even_where_a_folder_has_its_name(
    tiny: Path, locate_anew: Locator, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / "turbo")
    monkeypatch.chdir(tmp_path)
    outcome = locate_anew("turbo")
    assert outcome.error is not None
    assert "Tongyi-MAI/Z-Image-Turbo was not found" in outcome.error
    assert "Tongyi-MAI/Z-Image was not found" in str(locate_anew("base").error)
    assert locate(Path("turbo")).folder == Path("turbo")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./nowhere", "there is no folder nowhere"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("~/nowhere-at-all", "there is no folder"),
        ("a/b/c", "there is no folder a/b/c"),
        (Path("nowhere"), "there is no folder nowhere"),
        ("model.safetensors", "a transformer in one .safetensors or .gguf file; there is no file model.safetensors"),
        ("org/model.gguf", "there is no file org/model.gguf"),
        ("weights/old.ckpt", "there is no file weights/old.ckpt"),
        ("turbo2", "give 'base', 'turbo', 'demo', 'demo-turbo', a folder, or a hub id"),
        ("", "give 'base', 'turbo', 'demo', 'demo-turbo', a folder, or a hub id"),
        ("org/mo del", "it is no hub id"),
        ("../org", "there is no folder ../org"),
        ("org/..", "is no id on the hub"),
        ("a\0b", "a\\x00b"),
        (7, "got 7"),
    ],
)
def test_what_is_no_model(source: str | Path, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(source, local_files_only=True)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_existing_file_is_no_checkpoint(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"in one .safetensors or .gguf file; got the file .*model_index.json"):
        locate(tiny / "model_index.json")


def test_a_revision_of_a_folder_is_refused(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="revision='main' has no meaning for the folder"):
        locate(tiny, revision="main")


def test_only_needed_files_are_downloaded_and_only_once(copy: Path, hub: Hub, locate_anew: Locator) -> None:
    plant(copy)
    hub.files = copy
    first = locate_anew()
    assert first.error is None
    assert (first.hub_id, first.revision, first.torch_was_loaded) == ("org/model", hub.commit, False)
    assert sorted(set(hub.asked("GET"))) == sorted(CONFIGS + TOKENIZER + WEIGHTS)
    probed = set(hub.asked()) - set(hub.asked("GET"))
    assert all(
        name.endswith((".index.json", "added_tokens.json", "special_tokens_map.json", ".jinja")) for name in probed
    )
    assert first.folder is not None
    assert (first.folder / "vae" / "config.json").is_symlink()

    hub.requests.clear()
    second = locate_anew()
    assert second == first
    assert hub.requests == [("HEAD", "model_index.json")]

    hub.requests.clear()
    assert locate_anew(revision=hub.commit) == first
    assert locate_anew(env={"HF_HUB_OFFLINE": "1"}) == first
    assert locate_anew(local_files_only=True) == first
    assert hub.requests == []


def test_a_transformer_of_its_own_is_downloaded_instead(copy: Path, hub: Hub, locate_anew: Locator) -> None:
    (copy / "more").mkdir()
    (copy / "more" / "model-Q4_0.gguf").write_bytes(b"GGUF, small")
    hub.files = copy
    found = locate_anew(transformer="org/model/more/model-Q4_0.gguf")
    assert found.error is None
    assert found.transformer_name == "org/model/more/model-Q4_0.gguf"
    assert Path(found.transformer or "").read_bytes() == b"GGUF, small"
    assert not found.torch_was_loaded
    weights = {name for name in hub.asked("GET") if name.endswith((".safetensors", ".gguf"))}
    assert weights == {"more/model-Q4_0.gguf", *WEIGHTS} - {"transformer/diffusion_pytorch_model.safetensors"}
    assert locate_anew(transformer="org/model/more/model-Q4_0.gguf", local_files_only=True) == found
    here = locate_anew(transformer=str(copy / "more" / "model-Q4_0.gguf"))
    assert (here.transformer, here.transformer_name) == (str(copy / "more" / "model-Q4_0.gguf"), None)
    lacking = locate_anew(transformer="org/model/more/model-Q8_0.gguf").error
    assert lacking == "org/model has no more/model-Q8_0.gguf, see which files it has on its page"


def test_what_the_repository_lacks_is_asked_for_once(copy: Path, hub: Hub, locate_anew: Locator) -> None:
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}).replace("chat_t", "t"))
    hub.files = copy
    assert locate_anew().error is None
    assert ("HEAD", "tokenizer/chat_template.jinja") in hub.requests
    hub.requests.clear()
    assert locate_anew().error is None
    assert hub.requests == [("HEAD", "model_index.json")]


def test_what_was_downloaded_loads_from_the_cache_of_links(tiny: Path, hub: Hub, locate_anew: Locator) -> None:
    folder = locate_anew().folder
    assert folder is not None
    cached = load_components(folder, dtype=torch.float32, device=torch.device("cpu"))
    direct = load_components(tiny, dtype=torch.float32, device=torch.device("cpu"))
    for part in ("transformer", "text_encoder", "vae"):
        expected = getattr(direct, part).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in getattr(cached, part).state_dict().items())


def test_exactly_the_shards_of_the_index_are_downloaded(tmp_path: Path, hub: Hub, locate_anew: Locator) -> None:
    hub.files = build_checkpoint(tmp_path / "sharded", max_shard_size="1MB")
    shards = {path.name for path in (hub.files / "transformer").glob("*.safetensors")}
    assert len(shards) > 1
    (hub.files / "transformer" / "diffusion_pytorch_model-00009-of-00009.safetensors").write_bytes(b"stray")
    assert locate_anew().error is None
    asked = {name.split("/")[1] for name in hub.asked("GET") if name.startswith("transformer/")}
    assert asked == shards | {"config.json", "diffusion_pytorch_model.safetensors.index.json"}


@pytest.mark.parametrize("place", ["HF_HUB_CACHE", "cache_dir"])
def test_the_place_of_the_cache_is_honoured(place: str, hub: Hub, locate_anew: Locator, tmp_path: Path) -> None:
    cache = str(tmp_path / "elsewhere")
    outcome = locate_anew(env={place: cache}) if place == "HF_HUB_CACHE" else locate_anew(cache_dir=cache)
    assert str(outcome.folder).startswith(f"{cache}/models--org--model/snapshots/{hub.commit}")
    refused = locate_anew(local_files_only=True)
    assert "model_index.json of org/model is not in the cache" in str(refused.error)
    assert str(tmp_path / "home" / "hub") in str(refused.error)


def test_tokens_are_sent(hub: Hub, locate_anew: Locator) -> None:
    locate_anew(env={"HF_TOKEN": "hf_environment"})
    assert hub.tokens == {"Bearer hf_environment"}
    hub.tokens.clear()
    locate_anew(env={"HF_TOKEN": "hf_environment"}, token="hf_given")
    assert hub.tokens == {"Bearer hf_given"}
    hub.tokens.clear()
    locate_anew(env={"HF_TOKEN": "hf_environment"}, token=False)
    assert hub.tokens == {None}
    assert "no token is stored; log in" in str(locate_anew(token=True).error)


@pytest.mark.parametrize(
    ("status", "code", "said", "cause"),
    [
        (404, "RepoNotFound", "org/model was not found on http", "RepositoryNotFoundError"),
        (401, "RepoNotFound", "if it is private, log in with `hf auth login`", "RepositoryNotFoundError"),
        (401, "", "if it is private, log in with `hf auth login`", "HfHubHTTPError"),
        (
            403,
            "GatedRepo",
            "is gated and the hub did not hand out model_index.json: accept its terms",
            "GatedRepoError",
        ),
        (404, "RevisionNotFound", "org/model has no revision 'new'", "RevisionNotFoundError"),
        (403, "", "may not see it", "LocalEntryNotFoundError"),
        (418, "", "answered 418 for model_index.json of org/model at new; try again later", "LocalEntryNotFoundError"),
    ],
)
def test_refusals_of_the_hub(status: int, code: str, said: str, cause: str, hub: Hub, locate_anew: Locator) -> None:
    hub.error = (status, code)
    outcome = locate_anew(revision="new")
    assert said in str(outcome.error)
    assert outcome.cause == cause
    assert "\n" not in str(outcome.error)


def test_without_network(hub: Hub, locate_anew: Locator) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    refused = locate_anew(env={"HF_ENDPOINT": nowhere}, patient=False)
    assert "model_index.json of org/model is not in the cache" in str(refused.error)
    assert f"{nowhere} cannot be reached; check the connection" in str(refused.error)
    first = locate_anew()
    assert locate_anew(env={"HF_ENDPOINT": nowhere}) == first


def test_a_broken_download_names_the_file_and_goes_on_later(hub: Hub, locate_anew: Locator) -> None:
    hub.fail_after = 14
    broken = locate_anew(patient=False)
    assert broken.error is not None
    offline = locate_anew(env={"HF_HUB_OFFLINE": "1"})
    assert "downloads are off (local_files_only or HF_HUB_OFFLINE)" in str(offline.error)
    assert any(name in str(offline.error) for name in CONFIGS + WEIGHTS)
    assert hub.asked("GET")
    hub.fail_after = None
    done = set(hub.asked("GET"))
    hub.requests.clear()
    assert locate_anew().error is None
    assert hub.asked("GET")
    assert "model_index.json" in done
    assert "model_index.json" not in hub.asked("GET")


def test_offline_with_nothing_in_the_cache(hub: Hub, locate_anew: Locator) -> None:
    telemetry = {"HF_HUB_DISABLE_TELEMETRY": "0"}
    for outcome in (
        locate_anew(env={"HF_HUB_OFFLINE": "1"} | telemetry),
        locate_anew(env=telemetry, local_files_only=True),
    ):
        assert "model_index.json of org/model is not in the cache" in str(outcome.error)
        assert "downloads are off" in str(outcome.error)
    assert hub.requests == []


def test_of_a_foreign_repository_only_the_first_file_is_fetched(copy: Path, hub: Hub, locate_anew: Locator) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = "FluxPipeline"
    (copy / "model_index.json").write_text(json.dumps(index))
    hub.files = copy
    assert "must be 'ZImagePipeline', got 'FluxPipeline'" in str(locate_anew().error)
    assert set(hub.asked()) == {"model_index.json"}


def test_no_weights_are_fetched_for_a_config_that_is_refused(copy: Path, hub: Hub, locate_anew: Locator) -> None:
    (copy / "transformer" / "config.json").write_text("{}")
    hub.files = copy
    assert "dim is missing" in str(locate_anew().error)
    assert not [name for name in hub.asked() if "safetensors" in name]


@pytest.mark.parametrize(
    "name", ["../../evil.safetensors", "/etc/evil.safetensors", "evil.bin", "sub/evil.safetensors"]
)
def test_a_shard_name_that_leads_elsewhere_is_never_requested(
    name: str, copy: Path, hub: Hub, locate_anew: Locator
) -> None:
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x_pad_token": name}}))
    hub.files = copy
    outcome = locate_anew()
    assert "only plain file names are followed" in str(outcome.error)
    assert index.name in str(outcome.error)
    assert not [asked for asked in hub.asked() if "evil" in asked]


def test_a_repository_without_weights_says_which_file_it_lacks(copy: Path, hub: Hub, locate_anew: Locator) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    hub.files = copy
    outcome = locate_anew()
    assert "has no vae/diffusion_pytorch_model.safetensors" in str(outcome.error)
    assert str(outcome.error).startswith(f"org/model at {hub.commit}")
