"""Configurations: dataclasses that check themselves, and their TOML and JSON files.

A wrong value says its name, what is allowed and what was given. An unknown key is an error that names the nearest known one: a
key without effect is the silent bug of most trainers.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

LOSSES = ("hinge", "logistic", "lsgan", "bce")


# ---- checks -------------------------------------------------------------------------------------------------------


def _fail(owner: object, name: str, allowed: str, given: object) -> typing.NoReturn:
    raise ValueError(f"{type(owner).__name__}.{name} must be {allowed}, got {given!r}")


def _int(owner: object, name: str, low: int, high: int = 2**31 - 1) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{type(owner).__name__}.{name} must be an integer, got {type(value).__name__} {value!r}")
    if not low <= value <= high:
        _fail(owner, name, f"at least {low}" if high == 2**31 - 1 and value < low else f"in [{low}, {high}]", value)


def _float(owner: object, name: str, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(owner).__name__}.{name} must be a number, got {type(value).__name__} {value!r}")
    value = float(value)
    object.__setattr__(owner, name, value)
    ok = math.isfinite(value) and (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
    if not ok:
        ends = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == math.inf else ']'}"
        _fail(owner, name, f"a finite number in {ends}", value)


def _bool(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise TypeError(f"{type(owner).__name__}.{name} must be true or false, got {type(value).__name__} {value!r}")


def _choice(owner: object, name: str, allowed: Sequence[object]) -> None:
    value = getattr(owner, name)
    if value not in allowed:
        _fail(owner, name, "one of " + ", ".join(map(repr, allowed)), value)


def _int_tuple(owner: object, name: str, low: int) -> None:
    value = getattr(owner, name)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{type(owner).__name__}.{name} must be a sequence of integers, got {value!r}")
    items = tuple(value)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or item < low:
            _fail(owner, name, f"integers of at least {low}", items)
    object.__setattr__(owner, name, items)


def _times(owner: object, times: str, probabilities: str) -> None:
    """A set of times in (0, 1] and their probabilities."""
    for name in (times, probabilities):
        value = getattr(owner, name)
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise TypeError(f"{type(owner).__name__}.{name} must be a sequence of numbers, got {value!r}")
        items = tuple(value)
        if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in items):
            raise TypeError(f"{type(owner).__name__}.{name} must hold numbers, got {items!r}")
        object.__setattr__(owner, name, tuple(float(item) for item in items))
    t, p = getattr(owner, times), getattr(owner, probabilities)
    if not t or not all(0 < x <= 1 for x in t):
        _fail(owner, times, "at least one time, each in (0, 1]", t)
    if len(set(t)) != len(t):
        _fail(owner, times, "times that differ from each other", t)
    if len(p) != len(t):
        _fail(owner, probabilities, f"{len(t)} numbers, one for each of {times}", p)
    if not all(0 <= x <= 1 for x in p) or abs(sum(p) - 1) > 1e-6:
        _fail(owner, probabilities, "numbers in [0, 1] whose sum is 1", p)


# ---- from and to plain dictionaries -------------------------------------------------------------------------------


def unknown_key(where: str, key: str, known: Iterable[str]) -> ValueError:
    """The error for a key that nothing reads."""
    known = sorted(known)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
    return ValueError(f"{where}: unknown key {key!r}{hint}")


def check_keys(where: str, table: Mapping[str, object], known: Iterable[str]) -> None:
    """Raises if `table` has a key that is not in `known`."""
    known = list(known)
    for key in table:
        if key not in known:
            raise unknown_key(where, key, known)


def from_dict(cls: type[T], table: Mapping[str, Any], where: str | None = None) -> T:
    """The dataclass `cls` from a plain table, nested ones from nested tables. Unknown keys are errors."""
    where = where or cls.__name__
    if not isinstance(table, Mapping):
        raise TypeError(f"{where} must be a table of keys and values, got {type(table).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    check_keys(where, table, fields)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        kind = hints[key]
        if isinstance(kind, types.UnionType):
            kind = next((k for k in typing.get_args(kind) if dataclasses.is_dataclass(k)), kind)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
            # Missing keys of a nested table keep the default of its owner, not that of its class.
            default = getattr(_defaults(cls), key, None)
            base = dataclasses.asdict(default) if dataclasses.is_dataclass(default) and not isinstance(default, type) else {}
            check_keys(f"{where}.{key}", value, [f.name for f in dataclasses.fields(kind)])
            value = from_dict(kind, {**base, **value}, f"{where}.{key}")
        elif kind in _PLAIN and value is not None:  # a null of JSON is for the class to judge
            _check_plain(f"{where}.{key}", value, kind)
        values[key] = value
    missing = [f.name for f in fields.values() if f.name not in values and _required(f)]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        if where == cls.__name__:
            raise
        raise type(error)(f"{where}: {error}") from None


_PLAIN: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("a string", (str,)),
    bool: ("true or false", (bool,)),
}


def _check_plain(name: str, value: object, kind: Any) -> None:
    """Raises unless a value of a file is of the plain type that its field has. A file's true is no 1."""
    expected, types_ = _PLAIN[kind]
    if not isinstance(value, types_) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__} {value!r}")


def check_run(run: Any) -> None:
    """The checks of what the [run] sections of all trainers have."""
    for name, low in (
        ("seed", 0),
        ("steps", 1),
        ("batch", 1),
        ("checkpoint_every", 0),
        ("sample_every", 0),
        ("validation_views", 0),
        ("keep", 1),
    ):
        if hasattr(run, name):
            _int(run, name, low)
    _float(run, "max_minutes", 0.0)
    _float(run, "decay_share", 0.0, 1.0)


def check_floats(owner: Any, **ranges: tuple[float, float]) -> None:
    """Numbers of a dataclass, each in [low, high]."""
    for name, (low, high) in ranges.items():
        _float(owner, name, low, high)


def check_ints(owner: Any, **least: int) -> None:
    """Integers of a dataclass, each with its least value."""
    for name, low in least.items():
        _int(owner, name, low)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _defaults(cls: type) -> types.SimpleNamespace:
    values = types.SimpleNamespace()
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            setattr(values, field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            setattr(values, field.name, field.default_factory())
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values for JSON: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


class _ModelConfig:
    """What the three model configurations share."""

    @classmethod
    def from_dict(cls: type[T], table: Mapping[str, Any], where: str | None = None) -> T:
        """From a config.json's table. Keys that start with `_` (class name, version) are not settings and are passed over."""
        if not isinstance(table, Mapping):
            raise TypeError(f"{where or cls.__name__} must be a table of keys and values, got {type(table).__name__}")
        return from_dict(cls, {k: v for k, v in table.items() if not str(k).startswith("_")}, where)

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)


# ---- models -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(_ModelConfig):
    """The transformer of Stable Diffusion 3 and 3.5; fields and defaults as in diffusers' transformer/config.json."""

    sample_size: int = 128  # latent pixels a side for which the position table is scaled
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096  # J, width of the text tokens
    caption_projection_dim: int = 1152  # must equal num_attention_heads * attention_head_dim
    pooled_projection_dim: int = 2048  # P
    out_channels: int = 16
    pos_embed_max_size: int = 96  # the position table has this many patches a side
    dual_attention_layers: tuple[int, ...] = ()  # blocks with a second, image-only attention
    qk_norm: str | None = None  # None or "rms_norm"

    def __post_init__(self) -> None:
        for name in ("sample_size", "patch_size", "in_channels", "num_attention_heads", "attention_head_dim"):
            _int(self, name, 1, 1 << 16)
        for name in ("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"):
            _int(self, name, 1, 1 << 16)
        _int(self, "pos_embed_max_size", 1, 4096)
        _int(self, "num_layers", 1, 128)
        channels: int | None = self.out_channels
        if channels is None:  # diffusers: null means "as many as come in"
            object.__setattr__(self, "out_channels", self.in_channels)
        _int(self, "out_channels", 1, 1 << 16)
        object.__setattr__(self, "dual_attention_layers", self.dual_attention_layers or ())
        _int_tuple(self, "dual_attention_layers", 0)
        layers = tuple(sorted(set(self.dual_attention_layers)))
        if layers and layers[-1] >= self.num_layers:
            _fail(self, "dual_attention_layers", f"block indices below num_layers = {self.num_layers}", self.dual_attention_layers)
        object.__setattr__(self, "dual_attention_layers", layers)
        _choice(self, "qk_norm", (None, "rms_norm"))
        if self.caption_projection_dim != self.inner_dim:
            _fail(
                self,
                "caption_projection_dim",
                f"num_attention_heads * attention_head_dim = {self.inner_dim}",
                self.caption_projection_dim,
            )
        if self.inner_dim % 4:
            _fail(
                self,
                "attention_head_dim",
                "such that num_attention_heads * attention_head_dim is a multiple of 4",
                self.attention_head_dim,
            )
        if self.sample_size < self.patch_size:
            _fail(self, "sample_size", f"at least patch_size = {self.patch_size}", self.sample_size)

    @property
    def inner_dim(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(_ModelConfig):
    """The autoencoder; fields and defaults as in diffusers' vae/config.json."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True  # everything is float32 here
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "sample_size"):
            _int(self, name, 1, 1 << 16)
        _int_tuple(self, "block_out_channels", 1)
        levels = len(self.block_out_channels)
        if not 1 <= levels <= 8:
            _fail(self, "block_out_channels", "1 to 8 widths", self.block_out_channels)
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                _fail(self, "block_out_channels", f"multiples of norm_num_groups = {self.norm_num_groups}", self.block_out_channels)
        for name, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            given = tuple(getattr(self, name))
            # The default names one level; with more levels it stands for as many blocks of the same kind.
            blocks = (only,) * levels if given == (only,) else given
            if blocks != (only,) * levels:
                _fail(self, name, f"{only!r} {levels} times, one for each of block_out_channels", given)
            object.__setattr__(self, name, blocks)
        _choice(self, "act_fn", ("silu",))
        _float(self, "scaling_factor", 0.0, open_low=True)
        if self.shift_factor is not None:
            _float(self, "shift_factor", -math.inf)
        for name in ("latents_mean", "latents_std"):
            if getattr(self, name) is not None:
                _fail(self, name, "null (scaling_factor and shift_factor are used)", getattr(self, name))
        for name in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
            _bool(self, name)

    @property
    def spatial_factor(self) -> int:
        """Image pixels a side of one latent pixel."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig(_ModelConfig):
    """Heads on the features of a frozen transformer, one a tap."""

    feature_dim: int  # D of the transformer whose features are judged
    taps: tuple[int, ...]  # blocks after which the image tokens are tapped
    pooled_dim: int = 0  # P; needed for condition_pooled
    width: int = 64  # channels after the 1x1 projection
    kernel_size: int = 3  # of the residual block, on the token grid
    norm: str = "group"  # "group" or "none"
    num_groups: int = 8
    spectral_norm: bool = True
    condition_sigma: bool = True
    condition_pooled: bool = True
    condition_dim: int = 64  # width of the space in which logits are projected on the condition

    def __post_init__(self) -> None:
        _int(self, "feature_dim", 1, 1 << 16)
        _int_tuple(self, "taps", 0)
        if not self.taps or len(self.taps) > 128 or list(self.taps) != sorted(set(self.taps)):
            _fail(self, "taps", "1 to 128 block indices in ascending order, each once", self.taps)
        _int(self, "pooled_dim", 0, 1 << 16)
        _int(self, "width", 1, 1 << 16)
        _int(self, "kernel_size", 1, 31)
        if self.kernel_size % 2 == 0:
            _fail(self, "kernel_size", "odd", self.kernel_size)
        _choice(self, "norm", ("group", "none"))
        _int(self, "num_groups", 1, 1 << 16)
        if self.norm == "group" and self.width % self.num_groups:
            _fail(self, "num_groups", f"a divisor of width = {self.width}", self.num_groups)
        for name in ("spectral_norm", "condition_sigma", "condition_pooled"):
            _bool(self, name)
        if self.condition_pooled and self.pooled_dim == 0:
            _fail(self, "pooled_dim", "the width of the pooled text, because condition_pooled is true", self.pooled_dim)
        _int(self, "condition_dim", 1, 1 << 16)


# ---- training -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """One AdamW optimizer with decoupled weight decay, gradient clipping and a linear warm-up of its rate."""

    lr: float = 1e-4
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # largest norm of the gradient; 0: not clipped
    warmup_steps: int = 0  # the rate rises from 0 over this many updates
    # Weights are rounded to bfloat16 after each update, up or down at random so that the mean is kept: what is trained is exactly what a
    # bfloat16 checkpoint holds. The same bits on CPU and GPU.
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        _float(self, "lr", 0.0)
        _float(self, "beta1", 0.0, 1.0, open_high=True)
        _float(self, "beta2", 0.0, 1.0, open_high=True)
        _float(self, "eps", 0.0, open_low=True)
        _float(self, "weight_decay", 0.0)
        _float(self, "clip_norm", 0.0)
        _int(self, "warmup_steps", 0)
        _bool(self, "stochastic_rounding")

    def rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 1."""
        return self.lr * min(1.0, step / self.warmup_steps) if self.warmup_steps else self.lr


@dataclasses.dataclass(frozen=True)
class LADDConfig:
    """The distillation step. The paper gives the student's times and the form of t_hat's distribution; the rest is a choice."""

    seed: int = 0
    loss: str = "hinge"
    # Times at which the student is trained, and how often each is drawn.
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    student_probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    # The first iterations may draw from other times: full noise first is unstable at high resolution.
    warmup_iterations: int = 0
    warmup_times: tuple[float, ...] = (0.5, 0.25)
    warmup_probabilities: tuple[float, ...] = (0.5, 0.5)
    # t_hat, at which the discriminator judges, is logit-normal: sigmoid(N(mean, std)).
    t_hat_mean: float = 1.0
    t_hat_std: float = 1.0
    share_t_hat: bool = True  # one t_hat for the real and the fake of a pair
    share_noise: bool = False  # one noise for the real and the fake of a pair
    # Optimizers.
    student: AdamWConfig = dataclasses.field(default_factory=lambda: AdamWConfig(lr=1e-4))
    discriminator: AdamWConfig = dataclasses.field(default_factory=lambda: AdamWConfig(lr=1e-3))
    d_steps: int = 1  # discriminator updates for one student update
    ema_decay: float = 0.995
    # Optional terms; a weight of 0 costs nothing.
    r1_weight: float = 0.0  # squared gradient norm at the heads' inputs, real pictures
    r1_interval: int = 1  # added every so many discriminator updates, multiplied by the interval
    # Step of the central difference that gives its gradient, relative to the size of the features. At 1e-4 the gradient's error is 3e-4 of its
    # length; smaller steps lose it to rounding, and above 1e-3 the error grows with the square of the step.
    r1_epsilon: float = 1e-4
    misaligned_weight: float = 0.0  # real pictures with another picture's text, judged as fakes
    distillation_weight: float = 0.0  # distance of the student's x0 to the teacher's x0 from the renoised student
    pair_weight: float = 0.0  # distance of the student's x0 to what the teacher made of the same noise
    pair_times: str = "start"  # "start": from full noise only; "all": every x_t is on the line between the teacher's picture and its noise
    micro_batch: int = 0  # pictures that pass through the models at once; 0: the whole batch

    def __post_init__(self) -> None:
        _int(self, "seed", 0, 2**63 - 1)
        _choice(self, "loss", LOSSES)
        _times(self, "student_times", "student_probabilities")
        _int(self, "warmup_iterations", 0)
        _times(self, "warmup_times", "warmup_probabilities")
        _float(self, "t_hat_mean", -20.0, 20.0)
        _float(self, "t_hat_std", 0.0, 20.0)
        _bool(self, "share_t_hat")
        _bool(self, "share_noise")
        for name in ("student", "discriminator"):
            if not isinstance(getattr(self, name), AdamWConfig):
                raise TypeError(f"LADDConfig.{name} must be an AdamWConfig, got {type(getattr(self, name)).__name__}")
        _int(self, "d_steps", 1)
        _float(self, "ema_decay", 0.0, 1.0, open_high=True)
        _float(self, "r1_weight", 0.0)
        _int(self, "r1_interval", 1)
        _float(self, "r1_epsilon", 1e-5, 1e-3)
        _float(self, "misaligned_weight", 0.0)
        _float(self, "distillation_weight", 0.0)
        _float(self, "pair_weight", 0.0)
        _choice(self, "pair_times", ("start", "all"))
        _int(self, "micro_batch", 0)


# ---- files --------------------------------------------------------------------------------------------------------


def load_json(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(table).__name__}")
    return table


def load_toml(path: str | Path, overrides: Iterable[str] = (), sections: Mapping[str, type] | None = None) -> dict[str, Any]:
    """A TOML file's tables, changed by `overrides` such as "train.steps=100" (the value is TOML; a bare word is a string).

    With `sections`, exactly those top-level tables are allowed and each becomes an object of the given dataclass (`dict` leaves
    it a table); a section that is absent from the file is absent from the result.
    """
    path = Path(path)
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(table, override)
    if sections is None:
        return table
    check_keys(str(path), table, sections)
    return {name: value if sections[name] is dict else from_dict(sections[name], value, f"[{name}]") for name, value in table.items()}


def apply_override(table: dict[str, Any], override: str) -> None:
    """Sets one dotted key of `table` in place, such as "student.lr=1e-4"."""
    key, equals, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise ValueError(f"an override must look like section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for i, name in enumerate(names[:-1]):
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(f"override {override!r}: {'.'.join(names[: i + 1])} is a value ({inner!r}), not a section")
        table = inner
    if isinstance(table.get(names[-1]), dict) and not isinstance(value, dict):
        raise ValueError(f"override {override!r}: {key.strip()} is a section; set one of its keys: {', '.join(table[names[-1]])}")
    table[names[-1]] = value
