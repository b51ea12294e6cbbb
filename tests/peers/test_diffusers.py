"""Live comparison with the installed diffusers: values and gradients in float64, folders both ways, single files, schedules."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import make_reference
import numpy as np
import pytest
import support
import torch
from oracle import mmdit as mmdit_oracle
from safetensors.numpy import save_file
from support import MMDIT_CASES, VAE_CASES, same_bits

import ladd
from ladd import _core, single_file

pytestmark = pytest.mark.peers
Array = np.ndarray


def load_from(model: Any, state: dict[str, Any]) -> None:
    support.load(model, {name: value.numpy().astype(np.float32) for name, value in state.items()})


def check_gradients(model: Any, references: dict[str, Array], floor: float) -> None:
    gradients = model.gradients()
    for name, reference in references.items():
        support.assert_close(gradients[name], reference, support.BACKWARD, f"gradient of {name}", floor)
    for name in set(gradients) - set(references):
        assert not gradients[name].any(), f"{name} has a gradient here and none in diffusers"


@pytest.mark.parametrize("name", MMDIT_CASES)
def test_mmdit_values_and_every_gradient(name: str) -> None:
    config, *_, skip = MMDIT_CASES[name]
    peer = make_reference.mmdit(name)
    model = _core.MMDiT(config)
    position = model.tensors()["pos_embed.pos_embed"].copy()
    load_from(model, peer.state_dict())
    assert same_bits(position, model.tensors()["pos_embed.pos_embed"]), "the computed position table differs"
    inputs = support.mmdit_inputs(name)
    reference = make_reference.run_mmdit(name)
    velocity, saved = model.forward(*(inputs[k] for k in ("latents", "sigma", "context", "pooled")), skip_layers=skip, keep=True)
    support.assert_close(velocity, reference["velocity"], support.FORWARD, "velocity")
    for key, value in zip(("dlatents", "dcontext", "dpooled"), saved.backward(inputs["cotangent"]), strict=True):
        support.assert_close(value, reference[key], support.BACKWARD, key)
    floor = 1e-4 * max(np.abs(g).max() for g in reference["parameters"].values())
    check_gradients(model, reference["parameters"], floor)


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 0.25, 0.999, 1.0])
def test_mmdit_at_the_ends_of_time(sigma: float) -> None:
    """Near 1000 a last-place difference of a frequency moves the features by 6e-5; the velocity must stay within the bound."""
    name = "head_dim_64"
    peer = make_reference.mmdit(name)
    model = _core.MMDiT(MMDIT_CASES[name][0])
    load_from(model, peer.state_dict())
    inputs = support.mmdit_inputs(name)
    given = [inputs[key] for key in ("latents", "context", "pooled")]
    with torch.no_grad():
        wanted = peer(*(torch.from_numpy(x).double() for x in given), torch.tensor([np.float32(sigma) * np.float32(1000)])).sample
    velocity, _ = model.forward(given[0], np.float32([sigma]), *given[1:])
    support.assert_close(velocity, wanted.numpy(), support.FORWARD, "velocity")


@pytest.mark.parametrize("name", VAE_CASES)
def test_autoencoder_values_and_every_gradient(name: str) -> None:
    model = _core.AutoencoderKL(VAE_CASES[name][0])
    load_from(model, make_reference.vae(name).state_dict())
    inputs, reference = support.vae_inputs(name), make_reference.run_vae(name)
    moments, saved = model.encode(inputs["images"], keep=True)
    support.assert_close(moments, reference["moments"], support.FORWARD, "moments")
    support.assert_close(saved.backward(inputs["dmoments"]), reference["dimages"], support.BACKWARD, "dimages")
    decoded, saved = model.decode(inputs["z"], keep=True)
    support.assert_close(decoded, reference["decoded"], support.FORWARD, "decoded")
    support.assert_close(saved.backward(inputs["dimages"]), reference["dz"], support.BACKWARD, "dz")
    floor = 1e-3 * max(np.abs(g).max() for g in reference["parameters"].values())
    check_gradients(model, reference["parameters"], floor)


@pytest.mark.parametrize("path", sorted(make_reference.DATA.glob("*.npz")), ids=lambda path: path.stem)
def test_stored_values_are_what_diffusers_computes(path: Path) -> None:
    """The lean tests compare with files; these are what the installed diffusers and PyTorch say."""
    kind, _, name = path.stem.partition("_")
    if kind == "schedule":
        live = make_reference.run_schedule()
    else:
        live = make_reference.flatten((make_reference.run_mmdit if kind == "mmdit" else make_reference.run_vae)(name))
    with np.load(path) as stored:
        assert set(stored) == set(live)
        for key, value in stored.items():
            if value.dtype.kind == "U":
                assert list(value) == list(live[key])
            else:
                np.testing.assert_allclose(live[key], value, rtol=1e-6, atol=1e-9 * np.abs(value).max())


def inputs_of(name: str) -> tuple[Array, ...]:
    """Latents may end in the middle of a patch: both leave the rest out."""
    inputs = support.mmdit_inputs(name)
    return inputs["latents"], inputs["sigma"], inputs["context"], inputs["pooled"]


def peer_velocity(peer: Any, values: tuple[Array, ...]) -> Array:
    latents, context, pooled = (torch.from_numpy(values[i]).double() for i in (0, 2, 3))
    with torch.no_grad():
        out: Array = peer.double()(latents, context, pooled, torch.from_numpy(values[1] * np.float32(1000))).sample.numpy()
    return out


@pytest.mark.parametrize("name", ["sd3", "sd35_medium", "inpainting", "patch_1"])
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_ladd_reads_a_folder_that_diffusers_saved(name: str, shard: str | None, tmp_path: Path) -> None:
    peer = make_reference.mmdit(name).float()
    options = {"max_shard_size": shard} if shard else {}
    peer.save_pretrained(tmp_path / "pipeline" / "transformer", **options)
    if shard:
        assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    values = inputs_of(name)
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        model = ladd.MMDiT.from_pretrained(place)
        assert {key: value.shape for key, value in model.state_dict().items()} == {
            key: tuple(value.shape) for key, value in peer.state_dict().items()
        }
        support.assert_close(model(*values), peer_velocity(peer, values), support.FORWARD, "velocity")
        peer = peer.float()


@pytest.mark.parametrize("name", ["sd3", "sd35_medium", "inpainting", "patch_1"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_diffusers_reads_a_folder_that_ladd_saved(name: str, dtype: str, tmp_path: Path) -> None:
    model = ladd.MMDiT(MMDIT_CASES[name][0])
    weights = support.seeded_weights(mmdit_oracle.parameter_shapes(MMDIT_CASES[name][0]), 4)
    model.load_state_dict({**model.state_dict(), **weights})
    model.save_pretrained(tmp_path, dtype=dtype)
    peer, info = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path, output_loading_info=True, torch_dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = ladd.MMDiT.from_pretrained(tmp_path)
    values = inputs_of(name)
    support.assert_close(again(*values), peer_velocity(peer, values), support.FORWARD, "velocity")
    if dtype == "float32":
        assert all(same_bits(value.numpy(), model.state_dict()[key]) for key, value in peer.float().state_dict().items())


@pytest.mark.parametrize("name", ["two_levels", "quant_convs"])
def test_autoencoder_folders_in_both_directions(name: str, tmp_path: Path) -> None:
    peer = make_reference.vae(name).float()
    peer.save_pretrained(tmp_path / "theirs" / "vae")
    model = ladd.AutoencoderKL.from_pretrained(tmp_path / "theirs")
    images = support.vae_inputs(name)["images"].clip(-1, 1)
    with torch.no_grad():
        wanted = peer.double().encode(torch.from_numpy(images).double()).latent_dist.mode().numpy() * peer.config.scaling_factor
    latents = model.encode(images)
    support.assert_close(latents, wanted, support.FORWARD, "latents")
    model.save_pretrained(tmp_path / "ours")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").double()
    with torch.no_grad():
        decoded = back.decode(torch.from_numpy(latents).double() / back.config.scaling_factor).sample.numpy()
    support.assert_close(model.decode(latents), decoded, support.FORWARD, "decoded")


@pytest.mark.parametrize("name", ["sd3", "sd35_medium"])
def test_single_files_are_read_as_diffusers_reads_them(name: str, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    config = {
        **MMDIT_CASES[name][0],
        "attention_head_dim": 64,
        "num_attention_heads": 3,
        "num_layers": 3,
        "caption_projection_dim": 192,
    }
    model = ladd.MMDiT(config)
    model.load_state_dict({**model.state_dict(), **support.seeded_weights(mmdit_oracle.parameter_shapes(config), 5)})
    original = single_file.mmdit_to_single(model.state_dict(), model.config)
    assert all(key.startswith("model.diffusion_model.") for key in original)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers({key: torch.from_numpy(value) for key, value in original.items()})
    ours = model.state_dict()
    assert set(theirs) == set(ours)
    assert all(same_bits(value.numpy(), ours[key]) for key, value in theirs.items())
    save_file(original, tmp_path / "model.safetensors")
    again = ladd.MMDiT.from_pretrained(tmp_path / "model.safetensors", config=model.config)
    assert all(same_bits(value, again.state_dict()[key]) for key, value in ours.items())


def original_vae(state: dict[str, Array], levels: int) -> dict[str, Array]:
    """An autoencoder's tensors as in Stability's single files, where the attention's matrices are 1x1 convolutions."""
    out = {}
    for name, value in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        for theirs, ours in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            new = new.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        matrix = "attn_1" in new and value.ndim == 2
        out["first_stage_model." + new] = value[:, :, None, None].copy() if matrix else value
    return out


def test_single_file_autoencoder_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    peer = make_reference.vae("two_levels").float()
    state = {key: value.numpy() for key, value in peer.state_dict().items()}
    original = original_vae(state, 2)
    theirs = convert_ldm_vae_checkpoint({key: torch.from_numpy(value) for key, value in original.items()}, dict(peer.config))
    assert set(theirs) == set(state)
    save_file(original, tmp_path / "vae.safetensors")
    config = ladd.AutoencoderKL(VAE_CASES["two_levels"][0]).config
    model = ladd.AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors", config=config)
    assert all(same_bits(model.state_dict()[key], value.numpy()) for key, value in theirs.items())


@pytest.mark.parametrize(
    ("cls", "config"),
    [(diffusers.SD3Transformer2DModel, ladd.MMDiTConfig()), (diffusers.AutoencoderKL, ladd.AutoencoderKLConfig())],
    ids=["transformer", "autoencoder"],
)
def test_defaults_agree(cls: type, config: Any) -> None:
    parameters = inspect.signature(cls.__init__).parameters
    ours = json.loads(json.dumps(config.to_dict()))
    assert set(ours) <= set(parameters)
    for key, value in ours.items():
        if parameters[key].default is not None:  # None: follows from other settings
            assert value == json.loads(json.dumps(parameters[key].default)), key


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_schedule_and_euler_steps(steps: int, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = np.asarray(ladd.sigmas(steps, schedule="diffusers", shift=shift), dtype=np.float32)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=0, atol=6e-8)
    x = support.normal(1, 2, 4, 6, 6)
    ours, theirs = x.copy(), torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps):
        v = support.normal(2 + i, 2, 4, 6, 6)
        theirs = scheduler.step(torch.from_numpy(v), t, theirs).prev_sample
        ours = _core.euler_step(ours, v, float(sigmas[i]), float(sigmas[i + 1]))
    support.assert_close(ours, theirs.numpy(), 1e-6, "latents")
