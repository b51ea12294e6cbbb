"""The models: MMDiT, Discriminator and AutoencoderKL over the C core: weights in and out, gradients, vector-Jacobian products.

Letters: B batch, C latent channels, H W latent size, h w token grid, N image tokens, T text tokens, D width, J context width,
P pooled width.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np

from . import _core as native
from . import _purposes
from . import device as devices
from .arrays import Array, as_float32, per_sample, seeds_for
from .config import AutoencoderKLConfig, DiscriminatorConfig, MMDiTConfig, to_dict
from .weights import TensorRef, check_names, finite_weights, load_autoencoder, load_mmdit, load_plain, save_model

C = TypeVar("C", MMDiTConfig, AutoencoderKLConfig, DiscriminatorConfig)

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # the posterior's log variance is cut to this range
_FAR = 16.0  # images beyond it are bytes that were not scaled; up to it they may be noisy ones


class _Model(abc.ABC, Generic[C]):
    """What all models share: one flat buffer of weights, one of gradients, and names for their parts.

    dtype: what is computed in. On the CPU "float32" or "bfloat16"; the latter rounds the factors of products and convolutions only and is
    an error on a processor without AVX512_BF16. On a device "float32", "bfloat16" or "float16". Weights are float32 in all of them.
    """

    config: C
    device: str
    dtype: str
    _core: native.Model
    _device: devices.Device | None
    _config_class: ClassVar[type]
    _class_name: ClassVar[str]

    def __init__(self, config: C | Mapping[str, Any], *, device: str = "cpu", dtype: str = "float32", seed: int | None = 0) -> None:
        self._device = devices.get(device)
        devices.check_dtype(self._device, dtype)
        if isinstance(config, Mapping):
            config = cast(C, self._config_class.from_dict(config))  # type: ignore[attr-defined]
        if not isinstance(config, self._config_class):
            raise TypeError(f"config must be a {self._config_class.__name__} or a dict, got {type(config).__name__}")
        self.config, self.device, self.dtype = config, str(self._device or "cpu"), dtype
        self._core = self._make_core(config)
        if seed is not None:  # None: the weights are about to be loaded
            self._core.init(seed)

    @abc.abstractmethod
    def _make_core(self, config: C) -> native.Model: ...

    def __repr__(self) -> str:
        return f"<ladd.{type(self).__name__}, {self.num_parameters:,} parameters, {self.dtype} on {self.device}>"

    def _array(self, value: Any, name: str, shape: Sequence[int | str | None], *, finite: bool = False) -> Any:
        """`value` on this model's device, in the type it computes in."""
        return devices.as_array(value, name, shape, device=self._device, dtype=self.dtype, finite=finite)

    # ---- weights ----

    @property
    def num_parameters(self) -> int:
        """Elements that train (without buffers such as the position table)."""
        return int(self._core.flat_trainable.size)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all tensors by their diffusers names, float32."""
        return {name: t.numpy() if isinstance(t, devices.DeviceArray) else t.copy() for name, t in self._core.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Takes weights by name. Everything is checked first: on an error nothing has changed.

        strict: missing and unexpected names are errors too; otherwise they are passed over.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must map names to arrays, got {type(state).__name__}")
        tensors = self._core.tensors()
        given = {n: v if isinstance(v, TensorRef) else as_float32(v, n) for n, v in state.items() if strict or n in tensors}
        check_names(
            {n: t.shape for n, t in tensors.items()},
            {n: v.shape for n, v in given.items()},
            f"this {type(self).__name__}",
            strict,
        )
        arrays = {n: finite_weights(n, v) for n, v in given.items()}
        for name, array in arrays.items():
            tensors[name][...] = array

    @classmethod
    def _from_tensors(cls, config: C, tensors: Mapping[str, TensorRef], where: str, **options: Any) -> Self:
        """A new model, filled tensor by tensor, so that the weights are in memory only once."""
        model = cls(config, seed=None, **options)
        targets = model._core.tensors()
        check_names({n: t.shape for n, t in targets.items()}, {n: t.shape for n, t in tensors.items()}, where)
        for name, tensor in tensors.items():
            targets[name][...] = finite_weights(name, tensor)
        return model

    def save_pretrained(self, path: str | Path, *, dtype: str = "float32") -> None:
        """A diffusers folder: config.json and diffusion_pytorch_model.safetensors, in float32, float16 or bfloat16."""
        tensors = {name: devices.to_host(tensor) for name, tensor in self._core.tensors().items()}
        save_model(path, self._class_name, to_dict(self.config), tensors, dtype=dtype)

    def copy(self) -> Self:
        """The same weights with gradients of its own; trainable."""
        twin = type(self)(self.config, device=self.device, dtype=self.dtype, seed=None)
        twin._core.flat[:] = self._core.flat
        return twin

    # ---- gradients ----

    def gradients(self) -> dict[str, Array]:
        """The accumulated gradient of every trainable parameter: views, zero at first."""
        return self._core.gradients()

    def zero_grad(self) -> None:
        self._core.flat_grad[:] = 0

    @property
    def flat(self) -> Array:
        """All weights, 1-D, trainable ones first: a view."""
        return self._core.flat

    @property
    def flat_trainable(self) -> Array:
        """The weights that train, 1-D: a view."""
        return self._core.flat_trainable

    @property
    def flat_grad(self) -> Array:
        """Their gradients in the same order, 1-D: a view."""
        return self._core.flat_grad


# ---- MMDiT --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MMDiTGradients:
    """Gradients of the inputs; None where they were not asked for."""

    latents: Array | None  # [B,C,H,W]
    context: Array | None  # [B,T,J]
    pooled: Array | None  # [B,P]


class MMDiT(_Model[MMDiTConfig]):
    """The transformer of Stable Diffusion 3 and 3.5: velocity of a rectified flow from noisy latents, time and text."""

    _core: native.MMDiT
    _config_class = MMDiTConfig
    _class_name = "SD3Transformer2DModel"

    def _make_core(self, config: MMDiTConfig) -> native.MMDiT:
        return native.MMDiT({**to_dict(config), "dual_attention_layers": config.dual_attention_layers}, self._device, self.dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        config: MMDiTConfig | None = None,
        variant: str | None = None,
    ) -> Self:
        """From a diffusers folder (with or without transformer/) or a single .safetensors file of either layout.

        config: for single files whose shapes do not tell everything. variant: such as "fp16", where a folder has several.
        """
        config, tensors = load_mmdit(path, config=config, variant=variant)
        return cls._from_tensors(config, tensors, f"the configuration of {path}", device=device, dtype=dtype)

    def _inputs(self, latents: Any, sigma: Any, context: Any, pooled: Any) -> tuple[Array, Array, Array, Array]:
        c = self.config
        x = self._array(latents, "latents", ("B", c.in_channels, "H", "W"), finite=True)
        batch, _, height, width = x.shape
        p = c.patch_size
        if batch == 0 or height < p or width < p:
            raise ValueError(f"latents must have B >= 1 and H and W of at least patch_size = {p}, got shape {list(x.shape)}")
        if max(height, width) // p > c.pos_embed_max_size:
            raise ValueError(
                f"latents must have at most pos_embed_max_size * patch_size = {c.pos_embed_max_size * p} pixels a side, got {height} x {width}"
            )
        y = self._array(context, "context", (batch, "T", c.joint_attention_dim), finite=True)
        if y.shape[1] == 0:
            raise ValueError(f"context must have at least one token, got shape {list(y.shape)}")
        return x, per_sample(sigma, "sigma", batch), y, self._array(pooled, "pooled", (batch, c.pooled_projection_dim), finite=True)

    def _blocks(self, blocks: Sequence[int], name: str) -> tuple[int, ...]:
        if isinstance(blocks, (str, bytes)) or not isinstance(blocks, Iterable):
            raise TypeError(f"{name} must be a sequence of block indices, got {blocks!r}")
        values = tuple(blocks)
        for block in values:
            if isinstance(block, bool) or not isinstance(block, (int, np.integer)) or not 0 <= block < self.config.num_layers:
                raise ValueError(f"{name} must be block indices in [0, {self.config.num_layers}), got {list(values)}")
        if list(values) != sorted(set(values)):
            raise ValueError(f"{name} must be in ascending order, each once, got {list(values)}")
        return tuple(int(block) for block in values)

    def __call__(self, latents: Any, sigma: Any, context: Any, pooled: Any, *, skip_layers: Sequence[int] = ()) -> Array:
        """Velocity [B,C_out,H,W] of latents [B,C,H,W] at time sigma ([B] or a number) with context [B,T,J] and pooled [B,P].

        As in diffusers, rows and columns that do not fill a patch are left out: the result's H and W are multiples of patch_size.
        """
        return self._core.forward(*self._inputs(latents, sigma, context, pooled), self._blocks(skip_layers, "skip_layers"))[0]

    def features(self, latents: Any, sigma: Any, context: Any, pooled: Any, *, taps: Sequence[int]) -> list[Array]:
        """Image tokens [B,N,D] after each tapped block; blocks behind the deepest tap are not computed."""
        return self._core.forward(*self._inputs(latents, sigma, context, pooled), taps=self._taps(taps))[0]

    def _taps(self, taps: Sequence[int]) -> tuple[int, ...]:
        values = self._blocks(taps, "taps")
        if not values:
            raise ValueError("taps must name at least one block, got none")
        return values

    def vjp(
        self,
        latents: Any,
        sigma: Any,
        context: Any,
        pooled: Any,
        *,
        taps: Sequence[int] | None = None,
        skip_layers: Sequence[int] = (),
    ) -> tuple[Any, Callable[..., MMDiTGradients]]:
        """(out, pullback): out is the velocity, or the features when `taps` is given.

        pullback(cotangent, *, params=True, latents=True, context=True, pooled=True) -> gradients of the inputs; with `params` it
        adds the parameters' gradients to gradients(). It uses up what forward kept: once only.
        """
        inputs = self._inputs(latents, sigma, context, pooled)
        chosen = None if taps is None else self._taps(taps)
        out: Any
        out, saved = self._core.forward(*inputs, self._blocks(skip_layers, "skip_layers"), taps=chosen, keep=True)
        assert saved is not None

        def pullback(cotangent: Any, *, params: bool = True, latents: bool = True, context: bool = True, pooled: bool = True) -> MMDiTGradients:
            shaped = _like(cotangent, out, "cotangent")
            return MMDiTGradients(*saved.backward(shaped, params=params, latents=latents, context=context, pooled=pooled))

        return out, pullback

    def plan(
        self,
        batch: int,
        height: int,
        width: int,
        text_tokens: int,
        *,
        taps: Sequence[int] | None = None,
        keep: bool = False,
        params: bool = True,
    ) -> int:
        """Bytes of activations of one forward; with `keep` of one that a backward follows, as a frozen model's without `params`."""
        chosen = None if taps is None else self._taps(taps)
        return self._core.plan(batch, height, width, text_tokens, taps=chosen, keep=keep, params=params)


def _like(value: Any, out: Any, name: str) -> Any:
    """A cotangent of the shape, type and place of `out`, an array or a list."""
    if not isinstance(out, list):
        if isinstance(out, devices.DeviceArray):
            return devices.as_array(value, name, out.shape, device=out.device, dtype=out.dtype)
        return devices.as_array(value, name, out.shape, device=None)
    if not isinstance(value, (list, tuple)) or len(value) != len(out):
        given = f"{len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
        raise ValueError(f"{name} must be a list of {len(out)} arrays, one for each tap, got {given}")
    return [_like(v, o, f"{name}[{i}]") for i, (v, o) in enumerate(zip(value, out))]


# ---- Discriminator ------------------------------------------------------------------------------------------------


class Discriminator(_Model[DiscriminatorConfig]):
    """One head a tap: logits for every token of a frozen transformer's features."""

    _core: native.Discriminator
    _config_class = DiscriminatorConfig
    _class_name = "LADDDiscriminator"

    def _make_core(self, config: DiscriminatorConfig) -> native.Discriminator:
        return native.Discriminator({**to_dict(config), "taps": config.taps}, self._device, self.dtype)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Self:
        """From a folder that save_pretrained wrote."""
        config, tensors = load_plain(path, DiscriminatorConfig, cls._class_name)
        return cls._from_tensors(config, tensors, f"the configuration of {path}", device=device, dtype=dtype)

    def _inputs(
        self, features: Sequence[Any], sigma: Any, pooled: Any, grid: tuple[int, int]
    ) -> tuple[list[Array], Array, Array | None, tuple[int, int]]:
        c = self.config
        if not isinstance(features, (list, tuple)) or len(features) != len(c.taps):
            given = f"{len(features)}" if isinstance(features, (list, tuple)) else type(features).__name__
            raise ValueError(f"features must be a list of {len(c.taps)} arrays, one for each tap, got {given}")
        if not isinstance(grid, (tuple, list)) or len(grid) != 2 or any(not isinstance(n, (int, np.integer)) or n < 1 for n in grid):
            raise ValueError(f"grid must be (rows, columns) of tokens, each at least 1, got {grid!r}")
        height, width = (int(n) for n in grid)
        first = self._array(features[0], "features[0]", ("B", height * width, c.feature_dim))
        rest = [self._array(f, f"features[{i + 1}]", first.shape) for i, f in enumerate(features[1:])]
        batch = first.shape[0]
        text = None
        if c.condition_pooled:
            if pooled is None:
                raise ValueError(f"pooled must be given, shape [{batch}, {c.pooled_dim}]: these heads are conditioned on it")
            text = self._array(pooled, "pooled", (batch, c.pooled_dim))
        return [first, *rest], per_sample(sigma, "sigma", batch), text, (height, width)

    def __call__(self, features: Sequence[Any], sigma: Any, pooled: Any, *, grid: tuple[int, int]) -> list[Array]:
        """Logits [B,h,w], one array a tap, of features [B,h*w,D] at time sigma; pooled [B,P] counts with condition_pooled."""
        return self._core.forward(*self._inputs(features, sigma, pooled, grid))[0]

    def vjp(
        self, features: Sequence[Any], sigma: Any, pooled: Any, *, grid: tuple[int, int], update_u: bool = False
    ) -> tuple[list[Array], Callable[..., list[Array] | None]]:
        """(logits, pullback). update_u: one power iteration of every spectral norm first, as in a training step.

        pullback(dlogits, *, params=True, features=True) -> gradients of the features (None if not asked for). It may be called
        more than once.
        """
        logits, saved = self._core.forward(*self._inputs(features, sigma, pooled, grid), update_u=update_u, keep=True)
        assert saved is not None

        def pullback(dlogits: Sequence[Any], *, params: bool = True, features: bool = True) -> list[Array] | None:
            return saved.backward(_like(dlogits, logits, "dlogits"), params=params, features=features)

        return logits, pullback


# ---- AutoencoderKL ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconstruction:
    """What the autoencoder makes of images: decoded pictures, and the posterior whose sample (or mean) was decoded."""

    images: Array  # [B,C_out,H,W]
    mean: Array  # [B,C,h,w], neither scaled nor shifted
    logvar: Array  # [B,C,h,w], cut to [LOGVAR_MIN, LOGVAR_MAX]


class AutoencoderKL(_Model[AutoencoderKLConfig]):
    """Images to latents and back; latents of encode() and decode() are scaled and shifted as the transformer sees them."""

    _core: native.AutoencoderKL
    _config_class = AutoencoderKLConfig
    _class_name = "AutoencoderKL"
    # Settings of the class that do not change what is computed: the core does not know them.
    _BESIDE = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")

    def _make_core(self, config: AutoencoderKLConfig) -> native.AutoencoderKL:
        return native.AutoencoderKL({k: v for k, v in to_dict(config).items() if k not in self._BESIDE}, self._device, self.dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        config: AutoencoderKLConfig | None = None,
        variant: str | None = None,
    ) -> Self:
        """From a diffusers folder (with or without vae/) or a single .safetensors file of either layout; options as for MMDiT."""
        config, tensors = load_autoencoder(path, config=config, variant=variant)
        return cls._from_tensors(config, tensors, f"the configuration of {path}", device=device, dtype=dtype)

    def _images(self, images: Any) -> Any:
        c = self.config
        x = self._array(images, "images", ("B", c.in_channels, "H", "W"), finite=True)
        f = c.spatial_factor
        if 0 in x.shape or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"images must have B >= 1 and H and W that are multiples of {f}, got shape {list(x.shape)}")
        if isinstance(x, np.ndarray) and not -_FAR <= x.min() <= x.max() <= _FAR:
            raise ValueError(f"images must be in [-1, 1] (x / 127.5 - 1 of bytes), got values from {x.min():g} to {x.max():g}")
        return x

    def _scale(self, z: Array) -> Array:
        return (z - np.float32(self.config.shift_factor or 0.0)) * np.float32(self.config.scaling_factor)

    def _unscale(self, latents: Array) -> Array:
        return latents / np.float32(self.config.scaling_factor) + np.float32(self.config.shift_factor or 0.0)

    def _posterior(self, moments: Array) -> tuple[Array, Array]:
        """On the host: latents are small beside the pictures."""
        mean, logvar = np.split(moments, 2, axis=1)
        return np.ascontiguousarray(mean), np.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)

    def encode(self, images: Any, *, sample: bool = False, seed: int | Sequence[int] | None = None) -> Array:
        """Latents [B,C,h,w] (scaled, shifted) of images [B,3,H,W] in [-1, 1]: the posterior's mean, or with `sample` a draw.

        seed: one integer (image i draws by seed + i) or one an image.
        """
        if sample and seed is None:
            raise ValueError("sample=True needs a seed (an integer, or one an image)")
        x = self._images(images)
        mean, logvar = self._posterior(devices.to_host(self._core.encode(x)[0]))
        if sample:
            mean = mean + np.exp(0.5 * logvar) * normal_by_seed(seeds_for(seed, len(x)), mean.shape[1:], _purposes.VAE_POSTERIOR)
        latents = self._scale(mean)
        return self._array(latents, "latents", latents.shape)  # type: ignore[no-any-return]

    def decode(self, latents: Any) -> Array:
        """Images [B,3,H,W], about in [-1, 1], of latents [B,C,h,w]."""
        place = self._device if isinstance(latents, devices.DeviceArray) else None
        z = devices.as_array(latents, "latents", ("B", self.config.latent_channels, "h", "w"), device=place, finite=True)
        if 0 in z.shape:
            raise ValueError(f"latents must not be empty, got shape {list(z.shape)}")
        unscaled = self._unscale(devices.to_host(z))
        return self._core.decode(self._array(unscaled, "latents", unscaled.shape))[0]

    def vjp(
        self, images: Any, *, sample: bool = False, seed: int | Sequence[int] | None = None
    ) -> tuple[Reconstruction, Callable[..., Array | None]]:
        """(reconstruction, pullback) of encode, posterior and decode in one: for training the autoencoder.

        pullback(dimages, dmean=None, dlogvar=None, *, params=True, input=True) -> gradient of the images; it takes the loss's
        gradients with respect to the reconstruction's three arrays and adds the parameters' gradients to gradients(). Once only.
        """
        if sample and seed is None:
            raise ValueError("sample=True needs a seed (an integer, or one an image)")
        x = self._images(images)
        encoded, saved_encoder = self._core.encode(x, keep=True)
        moments = devices.to_host(encoded)
        mean, logvar = self._posterior(moments)
        inside = (moments[:, mean.shape[1] :] >= LOGVAR_MIN) & (moments[:, mean.shape[1] :] <= LOGVAR_MAX)
        noise = None
        z = mean
        if sample:
            noise = normal_by_seed(seeds_for(seed, len(x)), mean.shape[1:], _purposes.VAE_POSTERIOR) * np.exp(0.5 * logvar)
            z = mean + noise
        decoded, saved_decoder = self._core.decode(self._array(z, "z", z.shape), keep=True)
        assert saved_encoder is not None and saved_decoder is not None

        def pullback(dimages: Any, dmean: Any = None, dlogvar: Any = None, *, params: bool = True, input: bool = True) -> Array | None:
            dout = _like(dimages, decoded, "dimages")
            extra_mean = None if dmean is None else as_float32(dmean, "dmean", mean.shape)
            extra_logvar = None if dlogvar is None else as_float32(dlogvar, "dlogvar", mean.shape)
            dz = devices.to_host(saved_decoder.backward(dout, params=params))
            # z = mean + exp(logvar / 2) e
            dl = np.zeros_like(mean) if noise is None else dz * noise * np.float32(0.5)
            dl = np.where(inside, dl if extra_logvar is None else dl + extra_logvar, np.float32(0))
            dm = dz if extra_mean is None else dz + extra_mean
            return saved_encoder.backward(_like(np.concatenate([dm, dl], axis=1), encoded, "dmoments"), params=params, input=input)

        return Reconstruction(decoded, mean, logvar), pullback


def normal_by_seed(seeds: Sequence[int], shape: Sequence[int], purpose: int, step: int = 0) -> Array:
    """Standard normal numbers [len(seeds), *shape]; row i depends on seeds[i] alone, whatever else is in the batch."""
    out = np.empty((len(seeds), *shape), dtype=np.float32)
    first = np.zeros(1, dtype=np.int64)
    for i, seed in enumerate(seeds):
        native.normal((1, *shape), seed, purpose, step, first, out=out[i : i + 1])
    return out
