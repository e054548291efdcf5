import inspect
from typing import Any

import pytest
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageControlNetModel, ZImageTransformer2DModel
from transformers import Qwen3Config

from zimage.testing import checkpoint_parameters
from zimage.testing.configs import (
    DIFFUSERS_VERSION,
    SIZES,
    controlnet_config,
    scheduler_config,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from zimage.variants import VARIANTS


def test_real_has_the_published_parameter_counts() -> None:
    assert checkpoint_parameters("real") == {
        "text_encoder": 4_022_468_096,
        "transformer": 6_154_908_736,
        "vae": 83_819_683,
    }


def test_small_has_about_150_million_parameters_and_tiny_about_one() -> None:
    assert 120e6 < sum(checkpoint_parameters("small").values()) < 180e6
    assert sum(checkpoint_parameters("tiny").values()) == 1_139_699


def test_wide_has_every_width_of_real() -> None:
    wide, real = vars(SIZES["wide"]), vars(SIZES["real"])
    assert {name for name in wide if wide[name] != real[name]} == {"n_layers", "text_layers", "shard_parameters"}


@pytest.mark.parametrize("name", SIZES)
def test_heads_and_rope_axes_fit_the_widths(name: str) -> None:
    size = SIZES[name]
    assert sum(size.axes_dims) * size.n_heads == size.dim
    assert all(axis % 2 == 0 for axis in size.axes_dims)
    assert all(channels % size.vae_groups == 0 for channels in size.vae_channels)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be one of 'tiny', 'small', 'wide', 'real', got 'huge'"):
        checkpoint_parameters("huge")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "config", "left_out"),
    [
        (ZImageTransformer2DModel, transformer_config(SIZES["real"], "0"), {"siglip_feat_dim"}),
        (AutoencoderKL, vae_config(SIZES["real"], "0"), set()),
        (ZImageControlNetModel, controlnet_config(SIZES["real"], "2.1"), set()),
    ],
)
def test_configs_have_the_keys_of_the_models(model: Any, config: dict[str, Any], left_out: set[str]) -> None:
    arguments = set(inspect.signature(model.__init__).parameters) - {"self"}
    assert set(config) - {"_class_name", "_diffusers_version"} == arguments - left_out
    assert config["_class_name"] == model.__name__


def test_real_configs_have_the_hubs_values() -> None:
    transformer = transformer_config(SIZES["real"], "0")
    expected = {
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
    }
    assert expected.items() <= transformer.items()
    assert (transformer["axes_dims"], transformer["axes_lens"]) == ([32, 48, 48], [1536, 512, 512])
    vae = vae_config(SIZES["real"], "0")
    assert vae["block_out_channels"] == [128, 256, 512, 512]
    assert (vae["scaling_factor"], vae["shift_factor"], vae["norm_num_groups"]) == (0.3611, 0.1159, 32)


def test_the_text_encoder_is_qwen3_4b() -> None:
    raw = text_encoder_config(SIZES["real"], "bfloat16", bos_token_id=1, eos_token_id=2)
    config = Qwen3Config(**raw)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (2560, 36, 9728)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert config.to_dict()["rope_parameters"]["rope_theta"] == 1_000_000
    assert config.layer_types == ["full_attention"] * 36


@pytest.mark.parametrize("name", VARIANTS)
def test_the_scheduler_shifts_statically(name: str) -> None:
    scheduler_class: Any = FlowMatchEulerDiscreteScheduler
    scheduler = scheduler_class.from_config(scheduler_config(DIFFUSERS_VERSION[name], VARIANTS[name].shift))
    assert (scheduler.config.shift, scheduler.config.use_dynamic_shifting) == (VARIANTS[name].shift, False)
    assert scheduler.config.num_train_timesteps == 1000


def test_controlnets_have_the_published_shapes() -> None:
    """Of `hlky/Z-Image-Turbo-Fun-Controlnet-Union`, `-2.0` and `-2.1`, which diffusers loads published files with."""
    one, two, three = (controlnet_config(SIZES["real"], version) for version in ("1.0", "2.0", "2.1"))
    assert (one["control_layers_places"], one["control_in_dim"]) == ([0, 5, 10, 15, 20, 25], 16)
    for config in (two, three):
        assert (config["control_layers_places"], config["control_in_dim"]) == (list(range(0, 30, 2)), 33)
        assert config["control_refiner_layers_places"] == [0, 1]
    kinds = [config["add_control_noise_refiner"] for config in (one, two, three)]
    assert kinds == [None, "control_layers", "control_noise_refiner"]
