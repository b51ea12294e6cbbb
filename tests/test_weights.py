"""Weights on disk: hostile and cut files, number formats, folders, shards, single files, strict loading, atomic writing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import mmdit_config, same_bits, vae_config

import ladd
from ladd import files, weights
from ladd.single_file import mmdit_to_single

Array = np.ndarray
# Two last-block rules (context norm of two chunks, no context output) and both qk norms appear in every variant with two blocks or more.
VARIANTS = {
    "sd3": mmdit_config(num_layers=3, attention_head_dim=64, in_channels=16, out_channels=16, pos_embed_max_size=8),
    "sd35_medium": mmdit_config(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0, 1), pos_embed_max_size=8),
    "sd35_large": mmdit_config(num_layers=2, qk_norm="rms_norm", in_channels=33, out_channels=16, pos_embed_max_size=8),
}


def random_model(config: Mapping[str, Any], seed: int = 3) -> ladd.MMDiT:
    """A model no tensor of which is zero or equal to another."""
    model = ladd.MMDiT(config)
    rng = np.random.default_rng(seed)
    model.load_state_dict({n: rng.standard_normal(t.shape).astype(np.float32) for n, t in model.state_dict().items()})
    return model


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {"dtype": dtype, "shape": plain(shape), "data_offsets": plain(offsets)}


# ---- one file --------------------------------------------------------------------------------------------------------------------

HOSTILE = {
    "empty file": (b"", "complete safetensors"),
    "seven bytes": (b"\0" * 7, "complete safetensors"),
    "header longer than the file": (raw_file({}, length=1 << 40), "complete safetensors"),
    "header of 2^64 - 1 bytes": (raw_file({}, length=(1 << 64) - 1), "complete safetensors"),
    "not JSON": (raw_file(b"{]"), "not valid JSON"),
    "not UTF-8": (raw_file(b"\xff\xfe\xfd"), "not valid JSON"),
    "deep nesting": (raw_file(b"[" * 200_000), "not valid JSON"),
    "a list": (raw_file([]), "must be an object"),
    "entry is a number": (raw_file({"a": 1}), "must be an object"),
    "no dtype": (raw_file({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "dtype must be one of"),
    "unknown dtype": (raw_file({"a": entry("C64")}, b"\0" * 8), "dtype must be one of"),
    "dtype is a list": (raw_file({"a": entry(["F32"])}, b"\0" * 8), "dtype must be one of"),
    "negative size": (raw_file({"a": entry(shape=(-2,))}, b"\0" * 8), "bad shape"),
    "fractional size": (raw_file({"a": entry(shape=(2.0,))}, b"\0" * 8), "bad shape"),
    "shape is a word": (raw_file({"a": entry(shape="2")}, b"\0" * 8), "bad shape"),
    "size overflows 64 bits": (raw_file({"a": entry(shape=(1 << 40, 1 << 40))}, b"\0" * 8), "needs"),
    "one offset": (raw_file({"a": entry(offsets=(0,))}, b"\0" * 8), "data_offsets"),
    "offsets reversed": (raw_file({"a": entry(offsets=(8, 0))}, b"\0" * 8), "needs 8 bytes"),
    "offsets past the end": (raw_file({"a": entry(offsets=(8, 16))}, b"\0" * 8), "needs 8 bytes"),
    "offsets too short": (raw_file({"a": entry(offsets=(0, 4))}, b"\0" * 8), "needs 8 bytes"),
    "overlap": (raw_file({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "overlap"),
    "gap": (raw_file({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "gap"),
    "data left over": (raw_file({"a": entry()}, b"\0" * 12), "8 bytes of data, the file has 12"),
    "cut data": (raw_file({"a": entry()}, b"\0" * 7), "needs 8 bytes"),
    "the same name twice": (raw_file(b'{"a": 1, "a": 2}'), "appears twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_value_errors(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        weights.read_safetensors(path)


def test_every_cut_of_a_file_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weights.write_safetensors(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(1, np.float32)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            weights.read_safetensors(path)


def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weights.write_safetensors(path, {"a": np.ones(1000, np.float32)})
    tensor = weights.read_safetensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is cut"):
        tensor.read()


def test_number_formats_become_float32(tmp_path: Path) -> None:
    bf16 = np.array([0x3F80, 0xC000, 0x0001, 0x7F7F], dtype="<u2")  # 1, -2, the smallest subnormal, the largest
    e4m3 = np.array([0x38, 0xB8, 0x01, 0x7E, 0x08], dtype="u1")  # 1, -1, the smallest subnormal, 448, the smallest normal
    e5m2 = np.array([0x3C, 0xC0, 0x01, 0x7B], dtype="u1")  # 1, -2, the smallest subnormal, 57344
    f16 = np.array([1.5, -65504, 6e-8], dtype="<f2")
    f64 = np.array([1 / 3, -2.0], dtype="<f8")
    parts = {"BF16": bf16, "F8_E4M3": e4m3, "F8_E5M2": e5m2, "F16": f16, "F64": f64, "I64": np.array([-7], "<i8")}
    header, data = {}, b""
    for name, array in parts.items():
        header[name] = entry(name, array.shape, (len(data), len(data) + array.nbytes))
        data += array.tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(header, data))
    read = {name: np.asarray(tensor) for name, tensor in weights.read_safetensors(path).items()}
    assert all(array.dtype == np.float32 for array in read.values())
    assert read["BF16"].tolist() == [1.0, -2.0, 2.0**-133, (2 - 2.0**-7) * 2.0**127]
    assert read["F8_E4M3"].tolist() == [1.0, -1.0, 2.0**-9, 448.0, 2.0**-6]
    assert read["F8_E5M2"].tolist() == [1.0, -2.0, 2.0**-16, 57344.0]
    assert same_bits(read["F16"], f16.astype(np.float32))
    assert same_bits(read["F64"], f64.astype(np.float32))
    assert read["I64"].tolist() == [-7.0]


def test_bfloat16_rounds_to_nearest_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000], dtype=np.uint32)
    assert [hex(x) for x in weights.to_bfloat16(bits.view(np.float32))] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0xbf82"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_files_are_what_the_library_reads(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in {"b": (3, 5), "a": (), "c": (0, 4), "é": (7,)}.items()}
    path = tmp_path / "x.safetensors"
    weights.write_safetensors(path, tensors, dtype=dtype)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()} == {n: t.shape for n, t in tensors.items()}
    if dtype != "bfloat16":  # which NumPy lacks
        read = load_file(path)
        assert all(same_bits(read[n], t.astype(dtype)) for n, t in tensors.items())
    ours = {n: np.asarray(t) for n, t in weights.read_safetensors(path).items()}
    bound = {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for name, tensor in tensors.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=bound, atol=0)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16"), (7e4, "float16"), (3.4e38, "bfloat16")])
def test_what_a_format_cannot_hold_is_not_written(value: float, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"x.safetensors: a has"):
        weights.write_safetensors(path, {"ok": np.ones(3, np.float32), "a": np.array([1, value], np.float32)}, dtype=dtype)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# ---- a model's folder ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_give_the_same_bits(variant: str, tmp_path: Path) -> None:
    model = random_model(VARIANTS[variant])
    model.save_pretrained(tmp_path / "transformer")
    for path in (tmp_path, tmp_path / "transformer"):
        again = ladd.MMDiT.from_pretrained(path)
        assert again.config == model.config
        assert same_bits(again.flat, model.flat)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_weights_survive_a_second_round(dtype: str, tmp_path: Path) -> None:
    random_model(VARIANTS["sd35_medium"]).save_pretrained(tmp_path / "a", dtype=dtype)
    once = ladd.MMDiT.from_pretrained(tmp_path / "a")
    once.save_pretrained(tmp_path / "b", dtype=dtype)
    assert same_bits(ladd.MMDiT.from_pretrained(tmp_path / "b").flat, once.flat)


def test_autoencoder_and_heads_come_back(tmp_path: Path) -> None:
    vae = ladd.AutoencoderKL({**vae_config(use_quant_conv=True), "scaling_factor": 0.7, "shift_factor": -0.2}, seed=5)
    vae.save_pretrained(tmp_path / "vae")
    again = ladd.AutoencoderKL.from_pretrained(tmp_path)
    assert again.config == vae.config and same_bits(again.flat, vae.flat)
    heads = ladd.Discriminator(ladd.DiscriminatorConfig(feature_dim=16, taps=(0, 2), pooled_dim=6, width=8), seed=5)
    heads.save_pretrained(tmp_path / "heads")
    back = ladd.Discriminator.from_pretrained(tmp_path / "heads")
    assert back.config == heads.config and same_bits(back.flat, heads.flat)


def split_in_shards(folder: Path, count: int, tag: str = "") -> dict[str, str]:
    """Cuts the folder's single file into shards as diffusers names them; returns the weight map."""
    single = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    table = {}
    for i in range(count):
        file = f"diffusion_pytorch_model{tag}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::count]}
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": single.stat().st_size}, "weight_map": table}
    (folder / f"diffusion_pytorch_model.safetensors.index{tag}.json").write_text(json.dumps(index))
    single.unlink()
    return table


@pytest.mark.parametrize("tag", ["", ".fp16"])
def test_shards(tag: str, tmp_path: Path) -> None:
    model = random_model(VARIANTS["sd3"])
    model.save_pretrained(tmp_path)
    split_in_shards(tmp_path, 3, tag)
    assert same_bits(ladd.MMDiT.from_pretrained(tmp_path).flat, model.flat)


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


BAD_INDEX: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = {
    "no map": (lambda x: x.pop("weight_map"), ValueError, "weight_map must be"),
    "map of numbers": (lambda x: x["weight_map"].update(a=1), ValueError, "weight_map must be"),
    "a missing shard": (lambda x: x["weight_map"].update(a="none.safetensors"), FileNotFoundError, "none.safetensors"),
    "a path": (lambda x: x["weight_map"].update(a="../up.safetensors"), ValueError, "same folder"),
    "a tensor that its shard lacks": (
        lambda x: x["weight_map"].update(a=x["weight_map"]["proj_out.bias"]),
        ValueError,
        "does not have it",
    ),
    "a tensor left out": (lambda x: x["weight_map"].pop("proj_out.bias"), ValueError, "does not list .*proj_out.bias"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_bad_index(name: str, tmp_path: Path) -> None:
    change, kind, message = BAD_INDEX[name]
    random_model(VARIANTS["sd3"]).save_pretrained(tmp_path)
    split_in_shards(tmp_path, 2)
    change_index(tmp_path, change)
    with pytest.raises(kind, match=message):
        ladd.MMDiT.from_pretrained(tmp_path)


def test_variants(tmp_path: Path) -> None:
    model = random_model(VARIANTS["sd3"])
    model.save_pretrained(tmp_path, dtype="float16")
    plain = tmp_path / "diffusion_pytorch_model.safetensors"
    half = plain.rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    weights_of_half = ladd.MMDiT.from_pretrained(tmp_path).flat  # the only one there is
    assert same_bits(weights_of_half, model.flat.astype(np.float16).astype(np.float32))
    weights.write_safetensors(plain, model.state_dict())
    assert same_bits(ladd.MMDiT.from_pretrained(tmp_path).flat, model.flat)
    assert same_bits(ladd.MMDiT.from_pretrained(tmp_path, variant="fp16").flat, weights_of_half)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.bf16\.safetensors"):
        ladd.MMDiT.from_pretrained(tmp_path, variant="bf16")
    plain.unlink()
    half.with_name("diffusion_pytorch_model.bf16.safetensors").write_bytes(half.read_bytes())
    with pytest.raises(ValueError, match="bf16, fp16"):
        ladd.MMDiT.from_pretrained(tmp_path)


def test_folders_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        ladd.MMDiT.from_pretrained("stabilityai/stable-diffusion-3-medium")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        ladd.MMDiT.from_pretrained(tmp_path)
    ladd.AutoencoderKL(vae_config()).save_pretrained(tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match=r"neither itself nor in transformer/; one of its folders may be meant: vae"):
        ladd.MMDiT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a AutoencoderKL, expected SD3Transformer2DModel"):
        ladd.MMDiT.from_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle"):
        ladd.AutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ladd.AutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_chanels": 4}')
    with pytest.raises(ValueError, match=r"latent_chanels.*did you mean 'latent_channels'"):
        ladd.AutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"must be a .safetensors file"):
        ladd.MMDiT.from_pretrained(tmp_path / "weights.pt")


def test_a_folder_with_shards_is_not_written_over(tmp_path: Path) -> None:
    model = random_model(VARIANTS["sd3"])
    model.save_pretrained(tmp_path)
    split_in_shards(tmp_path, 2)
    with pytest.raises(FileExistsError, match="another form"):
        model.save_pretrained(tmp_path)


# ---- strict loading --------------------------------------------------------------------------------------------------------------

NAME, OTHER = "transformer_blocks.0.attn.to_q.weight", "proj_out.bias"
BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda s: s.pop(NAME), rf"1 missing: {NAME}"),
    "unexpected": (lambda s: s.update(extra=np.zeros(2, np.float32)), "1 unexpected: extra"),
    "misshapen": (lambda s: s.update({OTHER: np.zeros(3, np.float32)}), rf"1 misshapen: {OTHER} \(expected \[16\], got \[3\]\)"),
    "all three": (
        lambda s: (s.pop(NAME), s.update({"extra": np.zeros(2), OTHER: np.zeros((4, 4))})),
        "1 missing: .*1 unexpected: extra; 1 misshapen",
    ),
    "transposed": (lambda s: s.update({"context_embedder.weight": s["context_embedder.weight"].T}), "misshapen: context_embedder"),
    "NaN": (lambda s: s[NAME].__setitem__((0, 0), np.nan), f"must be finite, {NAME} has 1 NaN"),
    "words": (lambda s: s.update({OTHER: np.array(["a"] * 16)}), f"{OTHER} must hold real numbers"),
    "complex numbers": (lambda s: s.update({OTHER: np.zeros(16, np.complex64)}), f"{OTHER} must hold real numbers"),
    "nothing": (lambda s: s.update({OTHER: None}), f"{OTHER} must be an array"),
}


def test_a_state_that_is_no_table() -> None:
    with pytest.raises(TypeError, match="state must map names to arrays, got list"):
        random_model(VARIANTS["sd35_medium"]).load_state_dict([1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_bad_state_changes_nothing(name: str) -> None:
    change, message = BAD_STATES[name]
    model = random_model(VARIANTS["sd35_medium"])
    before = model.flat.copy()
    state = random_model(VARIANTS["sd35_medium"], seed=9).state_dict()
    change(state)
    with pytest.raises((ValueError, TypeError), match=message):
        model.load_state_dict(state)
    assert same_bits(model.flat, before)


def test_not_strict_takes_what_fits() -> None:
    model, other = random_model(VARIANTS["sd3"]), random_model(VARIANTS["sd3"], seed=9)
    before = model.state_dict()
    model.load_state_dict({NAME: other.state_dict()[NAME], "extra": "ignored"}, strict=False)
    after = model.state_dict()
    assert same_bits(after[NAME], other.state_dict()[NAME])
    assert all(same_bits(after[n], before[n]) for n in before if n != NAME)
    with pytest.raises(ValueError, match="misshapen"):
        model.load_state_dict({NAME: np.zeros(3, np.float32)}, strict=False)


def test_state_and_copies_are_independent() -> None:
    model = random_model(VARIANTS["sd3"])
    before = model.flat.copy()
    model.state_dict()[NAME][:] = 0
    twin = model.copy()
    twin.flat[:] = 0
    twin.gradients()[NAME][:] = 1
    assert same_bits(model.flat, before)
    assert not model.gradients()[NAME].any()


def test_a_bad_file_gives_no_model(tmp_path: Path) -> None:
    model = random_model(VARIANTS["sd3"])
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    state.pop(NAME)
    state["extra"] = np.zeros(1, np.float32)
    weights.write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state)
    with pytest.raises(ValueError, match=rf"1 missing: {NAME}; 1 unexpected: extra"):
        ladd.MMDiT.from_pretrained(tmp_path)


# ---- Stability's single files ----------------------------------------------------------------------------------------------------

PREFIX = "model.diffusion_model."


def original_layout(state: Mapping[str, Array], depth: int) -> dict[str, Array]:
    """The original names, written down tensor by tensor and apart from the package's own tables."""
    width = state["proj_out.weight"].shape[1]
    result = {"pos_embed": state["pos_embed.pos_embed"]}

    def put(new: str, old: str, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in state:
                value = state[f"{old}.{kind}"]
                result[f"{new}.{kind}"] = np.concatenate([value[width:], value[:width]]) if swap else value

    def stack(new: str, olds: tuple[str, str, str]) -> None:
        for kind in ("weight", "bias"):
            if f"{olds[0]}.{kind}" in state:
                result[f"{new}.{kind}"] = np.concatenate([state[f"{old}.{kind}"] for old in olds], axis=0)

    put("x_embedder.proj", "pos_embed.proj")
    put("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1")
    put("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2")
    put("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1")
    put("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2")
    put("context_embedder", "context_embedder")
    put("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    put("final_layer.linear", "proj_out")
    for i in range(depth):
        old, x, c = f"transformer_blocks.{i}.", f"joint_blocks.{i}.x_block.", f"joint_blocks.{i}.context_block."
        put(x + "adaLN_modulation.1", old + "norm1.linear")
        put(c + "adaLN_modulation.1", old + "norm1_context.linear", swap=i == depth - 1)
        stack(x + "attn.qkv", (old + "attn.to_q", old + "attn.to_k", old + "attn.to_v"))
        stack(c + "attn.qkv", (old + "attn.add_q_proj", old + "attn.add_k_proj", old + "attn.add_v_proj"))
        stack(x + "attn2.qkv", (old + "attn2.to_q", old + "attn2.to_k", old + "attn2.to_v"))
        put(x + "attn.proj", old + "attn.to_out.0")
        put(c + "attn.proj", old + "attn.to_add_out")
        put(x + "attn2.proj", old + "attn2.to_out.0")
        for new, inner in ((x + "attn.", "attn.norm_"), (c + "attn.", "attn.norm_added_"), (x + "attn2.", "attn2.norm_")):
            put(new + "ln_q", old + inner + "q")
            put(new + "ln_k", old + inner + "k")
        put(x + "mlp.fc1", old + "ff.net.0.proj")
        put(x + "mlp.fc2", old + "ff.net.2")
        put(c + "mlp.fc1", old + "ff_context.net.0.proj")
        put(c + "mlp.fc2", old + "ff_context.net.2")
    return result


def original_vae(state: Mapping[str, Array], levels: int) -> dict[str, Array]:
    result = {}
    for name, value in state.items():
        part, rest = name.split(".", 1)
        fields = rest.split(".")
        if fields[0] in ("down_blocks", "up_blocks"):
            level = int(fields[1]) if fields[0] == "down_blocks" else levels - 1 - int(fields[1])
            side = "down" if fields[0] == "down_blocks" else "up"
            if fields[2] == "resnets":
                rest = ".".join([side, str(level), "block", *fields[3:]])
            else:
                rest = ".".join([side, str(level), {"down": "downsample", "up": "upsample"}[side], *fields[4:]])
        elif fields[:2] == ["mid_block", "resnets"]:
            rest = ".".join(["mid", f"block_{int(fields[2]) + 1}", *fields[3:]])
        elif fields[:2] == ["mid_block", "attentions"]:
            inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[fields[3]]
            rest = f"mid.attn_1.{inner}.{fields[-1]}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        result[f"{part}.{rest}"] = value
    return result


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("variant", VARIANTS)
def test_single_file_gives_the_same_model(variant: str, prefix: str, tmp_path: Path) -> None:
    model = random_model(VARIANTS[variant])
    original = original_layout(model.state_dict(), model.config.num_layers)
    path = tmp_path / "model.safetensors"
    save_file({prefix + n: t for n, t in original.items()}, path)
    again = ladd.MMDiT.from_pretrained(path)
    assert again.config == ladd.MMDiTConfig.from_dict({**model.config.to_dict(), "sample_size": again.config.sample_size})
    assert same_bits(again.flat, model.flat)
    written = mmdit_to_single(model.state_dict(), model.config, prefix)
    assert written.keys() == {prefix + n for n in original}
    assert all(same_bits(written[prefix + n], t) for n, t in original.items())


def test_single_file_with_autoencoder_and_text_encoders(tmp_path: Path) -> None:
    model = random_model(VARIANTS["sd35_medium"])
    config = ladd.AutoencoderKLConfig.from_dict(
        {**vae_config(block_out_channels=(32, 64, 64), latent_channels=16, norm_num_groups=32, layers_per_block=2)}
    )
    vae = ladd.AutoencoderKL(config, seed=4)
    content = {PREFIX + n: t for n, t in original_layout(model.state_dict(), model.config.num_layers).items()}
    content |= {"first_stage_model." + n: t for n, t in original_vae(vae.state_dict(), 3).items()}
    content["text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"] = np.ones(3, np.float32)
    path = tmp_path / "model.safetensors"
    save_file({n: np.ascontiguousarray(t) for n, t in content.items()}, path)
    assert same_bits(ladd.MMDiT.from_pretrained(path).flat, model.flat)
    again = ladd.AutoencoderKL.from_pretrained(path)
    assert same_bits(again.flat, vae.flat)
    c = again.config
    assert (c.block_out_channels, c.layers_per_block, c.latent_channels) == ((32, 64, 64), 2, 16)
    assert (c.scaling_factor, c.shift_factor, c.use_quant_conv, c.mid_block_add_attention) == (1.5305, 0.0609, False, True)


def test_single_file_with_the_names_of_diffusers(tmp_path: Path) -> None:
    model = random_model(VARIANTS["sd35_medium"])
    weights.write_safetensors(tmp_path / "x.safetensors", model.state_dict())
    assert same_bits(ladd.MMDiT.from_pretrained(tmp_path / "x.safetensors").flat, model.flat)


def test_single_file_errors(tmp_path: Path) -> None:
    model = random_model(VARIANTS["sd35_medium"])
    original = original_layout(model.state_dict(), model.config.num_layers)
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, path)
    with pytest.raises(ValueError, match="holds no MMDiT"):
        ladd.MMDiT.from_pretrained(path)
    with pytest.raises(ValueError, match="holds no autoencoder"):
        ladd.AutoencoderKL.from_pretrained(path)
    for change, message in (
        ({"x_embedder.proj.weight": None}, "expected pos_embed.proj.weight with 4 dimensions, got no such tensor"),
        ({"joint_blocks.0.x_block.attn.qkv.weight": None}, "3 missing: .*to_q.weight"),
        ({"joint_blocks.1.x_block.mlp.fc9.weight": np.zeros(2, np.float32)}, "1 unexpected: joint_blocks.1.x_block.mlp.fc9.weight"),
        ({"joint_blocks.0.x_block.attn.qkv.bias": np.zeros(45, np.float32)}, r"3 misshapen: .*expected \[16\], got \[15\]"),
    ):
        save_file({n: t for n, t in {**original, **change}.items() if t is not None}, path)
        with pytest.raises(ValueError, match=message):
            ladd.MMDiT.from_pretrained(path)


def test_legacy_names_of_the_middle_attention(tmp_path: Path) -> None:
    vae = ladd.AutoencoderKL(vae_config(), seed=2)
    vae.save_pretrained(tmp_path)
    state = vae.state_dict()
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {n.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for n, t in state.items()}
    weights.write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state)
    assert same_bits(ladd.AutoencoderKL.from_pretrained(tmp_path).flat, vae.flat)


# ---- writing ---------------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="stop"), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_folders_with_other_things_are_not_replaced(tmp_path: Path) -> None:
    """A checkpoint or pipeline saved to the wrong place must not cost what lies there."""

    def write(path: Path, text: str) -> None:
        with files.atomic_folder(path, ("a", "b")) as folder:
            (folder / "a").write_text(text)

    mine = tmp_path / "mine"
    write(mine, "first")
    write(mine, "second")
    assert (mine / "a").read_text() == "second"
    (mine / "photos").mkdir()
    with pytest.raises(FileExistsError, match=r"mine holds 'photos', which would be lost; save to a new folder"):
        write(mine, "third")
    assert (mine / "a").read_text() == "second" and [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(NotADirectoryError, match="must be a folder, it is a file"):
        write(mine / "a", "fourth")
    assert (mine / "a").read_text() == "second"
