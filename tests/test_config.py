"""Configurations: defaults of diffusers, checks that say name, allowed and given, TOML with overrides, unknown keys."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from ladd import AdamWConfig, AutoencoderKLConfig, DiscriminatorConfig, LADDConfig, MMDiTConfig, config, load_toml

HEADS: dict[str, Any] = {"feature_dim": 64, "taps": (0, 1), "pooled_dim": 8}


def test_the_json_of_released_models() -> None:
    large = MMDiTConfig.from_dict(
        {
            "_class_name": "SD3Transformer2DModel",
            "_diffusers_version": "0.30.3",
            "attention_head_dim": 64,
            "caption_projection_dim": 2432,
            "in_channels": 16,
            "joint_attention_dim": 4096,
            "num_attention_heads": 38,
            "num_layers": 38,
            "out_channels": 16,
            "patch_size": 2,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
            "sample_size": 128,
        }
    )
    assert (large.inner_dim, large.dual_attention_layers, large.qk_norm) == (2432, (), "rms_norm")
    medium = MMDiTConfig.from_dict({**large.to_dict(), "dual_attention_layers": [2, 0, 1]})
    assert medium.dual_attention_layers == (0, 1, 2)
    assert MMDiTConfig.from_dict({**large.to_dict(), "in_channels": 33, "out_channels": None}).out_channels == 33
    vae = AutoencoderKLConfig.from_dict(
        {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "force_upcast": True,
            "in_channels": 3,
            "latent_channels": 16,
            "latents_mean": None,
            "latents_std": None,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "out_channels": 3,
            "sample_size": 1024,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        }
    )
    assert vae.spatial_factor == 8 and vae.mid_block_add_attention


def test_defaults_are_those_of_diffusers() -> None:
    c = MMDiTConfig()
    assert (c.sample_size, c.num_layers, c.num_attention_heads, c.caption_projection_dim, c.pos_embed_max_size) == (128, 18, 18, 1152, 96)
    v = AutoencoderKLConfig()
    assert (v.block_out_channels, v.latent_channels, v.scaling_factor, v.shift_factor, v.use_quant_conv) == ((64,), 4, 0.18215, None, True)


@pytest.mark.parametrize(
    "value", [MMDiTConfig(), AutoencoderKLConfig(), DiscriminatorConfig(**HEADS), LADDConfig(warmup_iterations=3), AdamWConfig()]
)
def test_round_trip(value: Any) -> None:
    table = config.to_dict(value)
    assert all(not isinstance(v, tuple) for v in table.values())
    assert config.from_dict(type(value), table) == value


BAD: list[tuple[type, dict[str, Any], str]] = [
    (MMDiTConfig, {"num_layers": 0}, r"num_layers must be in \[1, 128\], got 0"),
    (MMDiTConfig, {"num_layers": 2.0}, "num_layers must be an integer, got float 2.0"),
    (MMDiTConfig, {"patch_size": True}, "patch_size must be an integer, got bool"),
    (MMDiTConfig, {"caption_projection_dim": 100}, "caption_projection_dim must be .* = 1152, got 100"),
    (MMDiTConfig, {"qk_norm": "layer_norm"}, "qk_norm must be one of None, 'rms_norm', got 'layer_norm'"),
    (MMDiTConfig, {"dual_attention_layers": (18,)}, r"dual_attention_layers must be block indices below num_layers = 18, got \(18,\)"),
    (MMDiTConfig, {"dual_attention_layers": "01"}, "dual_attention_layers must be a sequence"),
    (MMDiTConfig, {"num_attention_heads": 1, "attention_head_dim": 6, "caption_projection_dim": 6}, "multiple of 4"),
    (MMDiTConfig, {"pos_embed_max_size": 1 << 40}, "pos_embed_max_size must be"),
    (MMDiTConfig, {"sample_size": 1}, "sample_size must be at least patch_size = 2, got 1"),
    (AutoencoderKLConfig, {"block_out_channels": (48,)}, "multiples of norm_num_groups = 32"),
    (AutoencoderKLConfig, {"block_out_channels": ()}, "1 to 8 widths"),
    (AutoencoderKLConfig, {"act_fn": "relu"}, "act_fn must be one of 'silu', got 'relu'"),
    (AutoencoderKLConfig, {"scaling_factor": 0.0}, r"scaling_factor must be a finite number in \(0, inf\), got 0.0"),
    (AutoencoderKLConfig, {"shift_factor": math.nan}, "shift_factor must be a finite number"),
    (AutoencoderKLConfig, {"latents_mean": (0.0,)}, "latents_mean must be null"),
    (AutoencoderKLConfig, {"down_block_types": ("AttnDownEncoderBlock2D",)}, "down_block_types must be 'DownEncoderBlock2D' 1 times"),
    (AutoencoderKLConfig, {"use_quant_conv": 1}, "use_quant_conv must be true or false, got int"),
    (DiscriminatorConfig, {**HEADS, "taps": ()}, "taps must be"),
    (DiscriminatorConfig, {**HEADS, "taps": (1, 0)}, r"ascending order, each once, got \(1, 0\)"),
    (DiscriminatorConfig, {**HEADS, "kernel_size": 4}, "kernel_size must be odd, got 4"),
    (DiscriminatorConfig, {**HEADS, "norm": "batch"}, "norm must be one of 'group', 'none', got 'batch'"),
    (DiscriminatorConfig, {**HEADS, "num_groups": 7}, "num_groups must be a divisor of width = 64, got 7"),
    (DiscriminatorConfig, {**HEADS, "pooled_dim": 0}, "pooled_dim must be the width"),
    (AdamWConfig, {"lr": -1.0}, r"lr must be a finite number in \[0, inf\), got -1.0"),
    (AdamWConfig, {"beta2": 1}, r"beta2 must be a finite number in \[0, 1\), got 1"),
    (AdamWConfig, {"lr": "fast"}, "lr must be a number, got str 'fast'"),
    (LADDConfig, {"loss": "wgan"}, "loss must be one of 'hinge', .* got 'wgan'"),
    (LADDConfig, {"student_times": (1.0, 0.0), "student_probabilities": (0.5, 0.5)}, r"each in \(0, 1\]"),
    (LADDConfig, {"student_times": (1.0, 1.0), "student_probabilities": (0.5, 0.5)}, "differ"),
    (LADDConfig, {"student_probabilities": (1.0,)}, "student_probabilities must be 4 numbers"),
    (LADDConfig, {"student_probabilities": (0.7, 0.1, 0.1, 0.2)}, "whose sum is 1"),
    (LADDConfig, {"seed": -1}, "seed must be"),
    (LADDConfig, {"ema_decay": 1.0}, "ema_decay must be"),
    (LADDConfig, {"d_steps": 0}, "d_steps must be at least 1, got 0"),
    (LADDConfig, {"student": {"lr": 1.0}}, "student must be an AdamWConfig, got dict"),
]


@pytest.mark.parametrize(("kind", "values", "message"), BAD, ids=lambda v: v.__name__ if isinstance(v, type) else None)
def test_bad_values(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kind(**values)


def test_configurations_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MMDiTConfig().num_layers = 3  # type: ignore[misc]


def test_unknown_keys() -> None:
    with pytest.raises(ValueError, match="unknown key 'num_layer'; did you mean 'num_layers'"):
        MMDiTConfig.from_dict({"num_layer": 3})
    with pytest.raises(ValueError, match="unknown key 'zzz'; known keys: beta1, beta2"):
        config.from_dict(AdamWConfig, {"zzz": 3})
    with pytest.raises(ValueError, match=r"LADDConfig\.student: unknown key 'learning_rate'"):
        config.from_dict(LADDConfig, {"student": {"learning_rate": 3}})
    with pytest.raises(ValueError, match="missing feature_dim, taps"):
        DiscriminatorConfig.from_dict({"width": 64})
    with pytest.raises(TypeError, match="must be a table"):
        MMDiTConfig.from_dict([1])  # type: ignore[arg-type]


def test_a_nested_table_keeps_its_owners_defaults() -> None:
    given = config.from_dict(LADDConfig, {"discriminator": {"beta1": 0.5}})
    assert given.discriminator == dataclasses.replace(LADDConfig().discriminator, beta1=0.5)
    assert given.discriminator.lr != AdamWConfig().lr


def test_warm_up_of_the_rate() -> None:
    optimizer = AdamWConfig(lr=2.0, warmup_steps=4)
    assert [optimizer.rate(step) for step in (1, 2, 4, 5, 100)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert AdamWConfig(lr=2.0).rate(1) == 2.0


TOML = """
stage = "distill"
[ladd]
loss = "logistic"
student_times = [1, 0.5]
student_probabilities = [0.5, 0.5]
[ladd.student]
lr = 1e-5
[heads]
feature_dim = 64
taps = [0, 3]
pooled_dim = 8
"""


def write(folder: Path, text: str = TOML) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_toml_with_sections(tmp_path: Path) -> None:
    sections = {"stage": dict, "ladd": LADDConfig, "heads": DiscriminatorConfig}
    parts = load_toml(write(tmp_path), ["ladd.student.beta1=0.5", "ladd.loss=hinge", "heads.taps = [1, 2]", "ladd.seed=7"], sections)
    assert parts["stage"] == "distill"
    assert parts["ladd"].student == AdamWConfig(lr=1e-5, beta1=0.5)
    assert (parts["ladd"].loss, parts["ladd"].student_times, parts["ladd"].seed) == ("hinge", (1.0, 0.5), 7)
    assert parts["heads"].taps == (1, 2)


def test_overrides_make_sections_and_read_toml_values(tmp_path: Path) -> None:
    table = load_toml(write(tmp_path, ""), ["a.b.c=1", "a.b.d=[1, 2]", "a.text=two words", 'a.quoted="1"', "a.flag=true", "x=1e-3"])
    assert table == {"a": {"b": {"c": 1, "d": [1, 2]}, "text": "two words", "quoted": "1", "flag": True}, "x": 1e-3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ladd.loss", "must look like section.key=value, got 'ladd.loss'"),
        ("=1", "must look like"),
        ("ladd..x=1", "must look like"),
        ("stage.x=1", r"stage is a value \('distill'\), not a section"),
        ("ladd=1", "ladd is a section; set one of its keys: loss"),
    ],
)
def test_bad_overrides(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_toml(write(tmp_path), [override])


def test_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not valid TOML"):
        load_toml(write(tmp_path, "[a\nb"))
    with pytest.raises(ValueError, match="unknown key 'lad'; did you mean 'ladd'"):
        load_toml(write(tmp_path, "[lad]\n"), sections={"ladd": LADDConfig})
    with pytest.raises(ValueError, match=r"\[ladd\]: LADDConfig.loss must be one of"):
        load_toml(write(tmp_path, '[ladd]\nloss = "x"'), sections={"ladd": LADDConfig})
    with pytest.raises(ValueError, match=r"run\.toml is not valid TOML"):
        load_toml(write(tmp_path, "a = " + "1" * 5000))
    with pytest.raises(FileNotFoundError):
        load_toml(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_toml(tmp_path / "binary.toml")


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    bad = ("{", "[" * 100_000, '{"a": ' + "1" * 5000 + "}")
    for text, message in (("[1]", "must hold a JSON object, got list"), *((text, r"x\.json is not valid JSON") for text in bad)):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            config.load_json(path)
