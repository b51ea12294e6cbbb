"""Distillation of a diffusers folder from latents and text of the user's own: no pipeline, no text encoder of this project."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ByArray, same_bits, seeded_weights

import ladd
from ladd.cli import main
from ladd.data import LatentShards, ShardWriter, identity

MMDIT = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
         "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8}  # fmt: skip
VAE = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}

CONFIG = """
stage = "distill"
[data]
teacher = "{teacher}"
latents = "{latents}"
[discriminator]
width = 8
num_groups = 2
[run]
steps = 4
batch = 4
sample_every = 2
checkpoint_every = 2
"""


def smooth(seed: int) -> Any:
    """Latents [5,4,16,16] whose neighbours are alike, as those of pictures are."""
    steps = np.random.default_rng(seed).standard_normal((5, 4, 16, 16))
    return (steps.cumsum(2).cumsum(3) / 8).astype(np.float32)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder, shards made with it, and a configuration."""
    root = tmp_path_factory.mktemp("own")
    teacher, vae = ladd.MMDiT(MMDIT), ladd.AutoencoderKL(VAE, seed=2)
    state = teacher.state_dict()
    teacher.load_state_dict({**state, **seeded_weights({n: t.shape for n, t in state.items() if n != "pos_embed.pos_embed"}, 5)})
    teacher.save_pretrained(root / "sd" / "transformer")
    vae.save_pretrained(root / "sd" / "vae")
    writer = ShardWriter(root / "latents", identity(teacher, vae))
    rng = np.random.default_rng(0)
    for i in range(3):
        context, pooled = rng.standard_normal((5, 7, 12)), rng.standard_normal((5, 10)).astype(np.float16)
        writer.write({"latents": ByArray(smooth(i)), "context": ByArray(context), "pooled": pooled})
    (root / "ladd.toml").write_text(CONFIG.format(teacher=root / "sd", latents=root / "latents"))
    return root


def test_shards_hold_what_was_given(given: Path) -> None:
    shards = LatentShards(given / "latents")
    batch = shards.batch([0, 14, 7])
    assert len(shards) == 15 and shards.arrays == ["context", "latents", "pooled"]
    assert same_bits(batch.latents[1], smooth(2)[4]) and batch.context.shape[1:] == (7, 12) and batch.pooled.dtype == np.float32


def test_a_run_writes_a_diffusers_folder_and_resumes(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", str(given / "ladd.toml"), "--out", str(tmp_path / "run")]
    assert main([*command, "--dry-run"]) == 0
    assert "15 latents [4, 16, 16]; 4 steps of 4\nmemory on cpu: " in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'transformer'}\n"
    assert {p.name for p in (tmp_path / "run" / "samples").iterdir()} == {"real.png", "step-00000002.png", "step-00000004.png"}
    teacher, student = (ladd.MMDiT.from_pretrained(path) for path in (given / "sd", tmp_path / "run" / "transformer"))
    assert student.config == teacher.config and not same_bits(student.flat, teacher.flat)
    for name in ("transformer", "step-00000004"):  # as if killed in the fourth step
        shutil.rmtree(tmp_path / "run" / name)
    assert main([*command, "--resume"]) == 0
    assert same_bits(ladd.MMDiT.from_pretrained(tmp_path / "run" / "transformer").flat, student.flat)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ladd.pair_weight=1", "pair_weight needs the seeds of the latents' noise, but .* has no array 'seed'"),
        ("data.teacher=nowhere", "no folder 'nowhere'"),
        ("data.latents=nowhere", "nowhere holds no latent shards"),
    ],
)
def test_what_does_not_fit(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    assert main(["distill", str(given / "ladd.toml"), "--out", str(tmp_path / "out"), "--set", override]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_latents_of_another_teacher(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(given / "sd", tmp_path / "sd")
    ladd.MMDiT(MMDIT, seed=9).save_pretrained(tmp_path / "sd" / "transformer")
    assert main(["distill", str(given / "ladd.toml"), "--out", str(tmp_path / "out"), "--set", f"data.teacher={tmp_path / 'sd'}"]) == 2
    assert "latents does not fit this run (teacher: " in capsys.readouterr().err
