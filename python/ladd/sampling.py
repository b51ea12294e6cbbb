"""Samplers and their time lists. A method runs on any list; the list ends in 0; noise comes from one seed an image.

The flow: x = (1 - sigma) x0 + sigma noise, the model gives the velocity v = noise - x0, so x0 is estimated as x - sigma v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from . import _core, _purposes
from . import device as devices
from .arrays import Array, as_float32, as_mask, seeds_for

Model = Callable[..., Array]  # (latents, sigma, context, pooled, skip_layers=()) -> velocity
METHODS = ("euler", "renoise")
SCHEDULES = ("uniform", "diffusers")


class State(TypedDict):
    """What a sampler shows after each step, to the callback and to whoever iterates. The keys are always these."""

    step: int  # from 0
    steps: int  # how many there are
    sigma: float  # where the step began
    sigma_next: float  # where it ended
    latents: Array  # [B,C,H,W] at sigma_next; changing them in place steers what follows
    denoised: Array  # [B,C,H,W] the estimate of x0


# ---- time lists ---------------------------------------------------------------------------------------------------


def sigmas(steps: int, *, schedule: str = "uniform", shift: float = 1.0) -> Array:
    """Descending times [steps + 1] from 1 to 0, float32.

    "uniform": 1, 1 - 1/n, ..., 0, shifted once by s(x) = shift x / (1 + (shift - 1) x). "diffusers": the list of its
    FlowMatchEulerDiscreteScheduler, whose ends are shifted first and everything again after, so that the last step starts near 0.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= 100_000:
        raise ValueError(f"steps must be an integer in [1, 100000], got {steps!r}")
    if not isinstance(shift, (int, float)) or isinstance(shift, bool) or not 0 < shift < 1e6:
        raise ValueError(f"shift must be a number above 0, got {shift!r}")
    if schedule == "uniform":
        grid = np.linspace(1.0, 0.0, int(steps) + 1)
        return _shifted(grid, shift).astype(np.float32)
    if schedule == "diffusers":
        # The scheduler keeps its ends in float32 and works in double between them.
        ends = np.array([1000, 1], dtype=np.float32) / np.float32(1000)
        high, low = (float(x) for x in np.float32(shift) * ends / (1 + np.float32(shift - 1) * ends))
        grid = np.linspace(1000 * high, 1000 * low, int(steps)) / 1000
        return np.append(_shifted(grid, shift), 0.0).astype(np.float32)
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def _shifted(grid: NDArray[Any], shift: float) -> NDArray[Any]:
    return shift * grid / (1 + (shift - 1) * grid)


def check_sigmas(values: Any) -> Array:
    """A given list of times: descending, in [0, 1], ending in 0."""
    array = as_float32(values, "sigmas", ("steps + 1",), finite=True)
    if array.size < 2 or array[-1] != 0 or array[0] > 1 or not (np.diff(array) < 0).all():
        raise ValueError(f"sigmas must descend from at most 1 to 0, at least two numbers, got {array.tolist()}")
    return array


def _times(given: Any, steps: int | None) -> Array:
    if (given is None) == (steps is None):
        raise ValueError(f"give either sigmas or steps, got sigmas={given!r} and steps={steps!r}")
    return sigmas(steps) if steps is not None else check_sigmas(given)


def check_strength(value: Any) -> float:
    """A share of the steps."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"strength must be a number in [0, 1], got {value!r}")
    return float(value)


def check_guidance(value: Any, batch: int) -> Array:
    """Guidance scales [batch], at least 1: 0 is off as 1 is, the velocity with text."""
    scale = np.asarray(value)
    if scale.dtype.kind not in "iuf" or not ((scale == 0) | ((scale >= 1) & (scale < 1e6))).all():
        raise ValueError(f"guidance_scale must be 0 or 1 (off) or a number above 1, got {value!r}")
    if scale.ndim and scale.shape != (batch,):
        raise ValueError(f"guidance_scale must be one number, or one an image, shape [{batch}], got {list(scale.shape)}")
    return np.broadcast_to(np.maximum(scale, 1).astype(np.float32), (batch,))


def first_step(steps: int, strength: float) -> int:
    """The step from which `strength` of `steps` are run, rounded as diffusers does."""
    return int(max(steps - min(steps * strength, steps), 0))


# ---- noise --------------------------------------------------------------------------------------------------------


def noise(shape: Sequence[int], seeds: Any) -> Array:
    """The noise [B,C,H,W] that sampling with these seeds starts from: one seed an image, or n for n, n + 1, ..."""
    batch, *rest = shape
    return PhiloxNoise(seeds_for(seeds, batch)).start(rest)


class PhiloxNoise:
    """The core's counter-based numbers: image i's noise depends on seeds[i], the use and the step, and on nothing else."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)

    def start(self, shape: Sequence[int]) -> Array:
        """The noise that sampling starts from, [B, *shape]."""
        return self._draw(shape, _purposes.NOISE, 0)

    def fresh(self, shape: Sequence[int], step: int) -> Array:
        """New noise of one step, [B, *shape]."""
        return self._draw(shape, _purposes.SAMPLER, step)

    def _draw(self, shape: Sequence[int], purpose: int, step: int) -> Array:
        from .models import normal_by_seed

        return normal_by_seed(self.seeds, shape, purpose, step)


class TorchNoise:
    """What torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) gives: a generator an image, drawn in order."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.streams = [_TorchNormal(seed) for seed in seeds]

    def start(self, shape: Sequence[int]) -> Array:
        return np.stack([stream.draw(shape) for stream in self.streams])

    def fresh(self, shape: Sequence[int], step: int) -> Array:
        return self.start(shape)


class _TorchNormal:
    """PyTorch's CPU normal numbers: Box-Muller on a Mersenne twister, in blocks of 16; fewer than 16 one by one in double."""

    def __init__(self, seed: int) -> None:
        self.twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self.kept: float | None = None  # the second number of a pair, only for short draws

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self.twister.randint(0, 1 << 32, size=count, dtype=np.uint32)

    def _uniform24(self, count: int) -> NDArray[Any]:
        return (self._words(count) & 0xFFFFFF) * 2.0**-24

    def draw(self, shape: Sequence[int]) -> Array:
        count = int(np.prod(shape))
        if count < 16:
            return np.array([self._one() for _ in range(count)], dtype=np.float32).reshape(shape)
        u = self._uniform24(count)
        whole = count - count % 16
        out = np.empty(count)
        out[:whole] = _box_muller(u[:whole].reshape(-1, 2, 8)).reshape(-1)
        if count % 16:  # the last 16 are drawn anew, over what is there
            out[-16:] = _box_muller(self._uniform24(16).reshape(1, 2, 8)).reshape(-1)
        return out.astype(np.float32).reshape(shape)

    def _one(self) -> float:
        if self.kept is not None:
            value, self.kept = self.kept, None
            return value
        words = [int(w) for w in self._words(4)]
        u1, u2 = ((high << 32 | low) & (1 << 53) - 1 for high, low in (words[:2], words[2:]))
        radius = np.sqrt(-2 * np.log1p(-u2 * 2.0**-53))
        angle = 2 * np.pi * u1 * 2.0**-53
        self.kept = float(radius * np.sin(angle))
        return float(radius * np.cos(angle))


def _box_muller(u: NDArray[Any]) -> NDArray[Any]:
    """Uniform [blocks, 2, 8] -> normal of the same shape."""
    radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), 2 * np.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


# ---- sampling -----------------------------------------------------------------------------------------------------


def iterate(
    model: Model,
    context: Any,
    pooled: Any,
    *,
    size: tuple[int, int] | None = None,
    sigmas: Any = None,
    steps: int | None = None,
    method: str = "euler",
    guidance_scale: Any = 1.0,
    negative: tuple[Any, Any] | None = None,
    seeds: Any = 0,
    latents: Any = None,
    strength: float | None = None,
    mask: Any = None,
    masked_latents: Any = None,
    rng: Literal["philox", "torch"] = "philox",
) -> Iterator[State]:
    """Samples step by step. All arguments are checked before the first step; each step yields a State.

    model            an ladd.MMDiT, or a function (latents[B,C,H,W], sigma[B], context, pooled) -> velocity[B,C,H,W]
    context, pooled  [B,T,J] and [B,P]
    size             (H, W) in latent pixels; not needed with `latents`
    sigmas, steps    a list that descends to 0, or a number of uniform steps
    method           "euler" follows the flow; "renoise" goes to the estimate of x0 and back to sigma_next with fresh noise
    guidance_scale   above 1: v = v_neg + scale (v - v_neg), one batch of [negative; positive]; 0 or 1: off; or [B], one an image
    negative         (context, pooled) for guidance, of batch B or 1
    seeds            one integer an image, or one integer n for n, n + 1, ...
    latents          the noise to start from; with `strength` or `mask` a picture's clean latents (scaled as the model sees them)
    strength         in [0, 1]: share of the steps that are run, on the picture noised to where they begin
    mask             [H,W] or broadcast to [B,1,H,W], 1 where the picture is painted anew; elsewhere it is kept
    masked_latents   [B,C,H,W] or batch 1, only for an inpainting transformer (2 C + 1 channels in, C out): the latents of the picture
                     whose masked part is grey. It is fed [x, mask, masked_latents] and keeps the rest by itself: then `latents` are a
                     picture's with strength only
    rng              "philox", or "torch" for the numbers that PyTorch's CPU generator would give
    """
    return _Run(**locals()).states()


def sample(
    model: Model,
    context: Any,
    pooled: Any,
    *,
    size: tuple[int, int] | None = None,
    sigmas: Any = None,
    steps: int | None = None,
    method: str = "euler",
    guidance_scale: Any = 1.0,
    negative: tuple[Any, Any] | None = None,
    seeds: Any = 0,
    latents: Any = None,
    strength: float | None = None,
    mask: Any = None,
    masked_latents: Any = None,
    rng: Literal["philox", "torch"] = "philox",
    callback: Callable[[State], object] | None = None,
) -> Array:
    """Latents [B,C,H,W] at the end of `iterate`, which explains the arguments. callback is called with each State."""
    run = _Run(**{name: value for name, value in locals().items() if name != "callback"})
    for state in run.states():
        if callback is not None:
            callback(state)
    return run.result()  # type: ignore[no-any-return]


class _Run:
    """One sampling run: checked inputs (the arguments of `iterate`), the current latents, and the loop."""

    def __init__(
        self,
        *,
        model: Model,
        context: Any,
        pooled: Any,
        size: Any,
        sigmas: Any,
        steps: Any,
        method: str,
        guidance_scale: Any,
        negative: Any,
        seeds: Any,
        latents: Any,
        strength: Any,
        mask: Any,
        masked_latents: Any,
        rng: str,
    ) -> None:
        self.model = model
        self.device: devices.Device | None = getattr(model, "_device", None)
        self.context = self._on_host(context, "context", ("B", "T", "J"))
        batch = self.context.shape[0]
        if batch == 0:
            raise ValueError(f"context must have B >= 1, got shape {list(self.context.shape)}")
        self.pooled = self._on_host(pooled, "pooled", (batch, "P"))
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if rng not in ("philox", "torch"):
            raise ValueError(f"rng must be philox or torch, got {rng!r}")
        self.method = method
        self.sigmas = _times(sigmas, steps)
        self._guidance(guidance_scale, negative)
        self.text: tuple[Any, Any] = (self.context, self.pooled)
        if self.device is not None:  # sent once, not at every step
            put = self.model._array  # type: ignore[attr-defined]
            self.text = put(self.context, "context", self.context.shape), put(self.pooled, "pooled", self.pooled.shape)
        self.noise = (PhiloxNoise if rng == "philox" else TorchNoise)(seeds_for(seeds, batch))
        shape = self._shape(size, latents, masked_latents, batch)
        self._start(latents, strength, mask, masked_latents, shape)

    def _on_host(self, value: Any, name: str, shape: Sequence[int | str | None] | None = None, *, finite: bool = False) -> Array:
        """The sampler works on the host in float32: latents are small beside what the model does with them."""
        if value is not None and self.device is not None and not isinstance(value, np.ndarray):
            value = devices.to_host(devices.as_array(value, name, device=self.device))
        return as_float32(value, name, shape, finite=finite)

    def result(self) -> Any:
        """The latents where the model is."""
        return devices.as_array(self.x, "latents", device=self.device)

    def _guidance(self, given: Any, negative: tuple[Any, Any] | None) -> None:
        self.scale = check_guidance(given, len(self.pooled)).reshape(-1, 1, 1, 1)
        self.guided = bool((self.scale > 1).any())
        if not self.guided:
            return
        if negative is None:
            raise ValueError(f"guidance_scale = {given} needs negative=(context, pooled)")
        if not isinstance(negative, (list, tuple)) or len(negative) != 2:
            raise TypeError(f"negative must be (context, pooled), got {type(negative).__name__}")
        joined = []
        for value, like, name in zip(negative, (self.context, self.pooled), ("negative context", "negative pooled")):
            array = self._on_host(value, name)
            if array.ndim == like.ndim and array.shape[0] in (1, like.shape[0]) and array.shape[1:] == like.shape[1:]:
                joined.append(np.concatenate([np.broadcast_to(array, like.shape), like]))
            else:
                raise ValueError(f"{name} must have shape {[f'1 or {like.shape[0]}', *like.shape[1:]]}, got {list(array.shape)}")
        self.context, self.pooled = joined

    def _shape(self, size: tuple[int, int] | None, latents: Any, masked_latents: Any, batch: int) -> tuple[int, int, int]:
        """C, H, W of what is sampled, from the model's configuration and the arrays that are given."""
        config = getattr(self.model, "config", None)
        channels = getattr(config, "out_channels", None)
        taken = getattr(config, "in_channels", None)
        if channels is not None and masked_latents is None and taken != channels:
            raise ValueError(
                f"to be sampled from, a model must give as many channels as it takes, got {channels} from {taken}"
                + ("; an inpainting transformer needs mask and masked_latents" if taken == 2 * channels + 1 else "")
            )
        if channels is not None and masked_latents is not None and taken != 2 * channels + 1:
            raise ValueError(
                f"masked_latents are for an inpainting transformer, which takes 2 C + 1 channels and gives C; "
                f"this model takes {taken} and gives {channels}: leave them out, mask works with any model"
            )
        found: tuple[int, ...] | None = None
        for value, name in ((latents, "latents"), (masked_latents, "masked_latents")):
            if value is None:
                continue
            shape = self._on_host(value, name, ("B", "C" if channels is None else channels, "H", "W"), finite=True).shape
            if shape[0] not in (1, batch):
                raise ValueError(f"{name} must have batch 1 or {batch} like context, got {shape[0]}")
            if size is not None and tuple(size) != shape[2:]:
                raise ValueError(f"size must be that of {name}, {shape[2:]}, got {tuple(size)}")
            if found is not None and found != shape[1:]:
                raise ValueError(f"masked_latents must have the shape of latents, [B, {', '.join(map(str, found))}], got {list(shape)}")
            found = shape[1:]
        if found is None:
            if size is None or channels is None:
                raise ValueError("size=(H, W) must be given" if channels is not None else "latents must be given for a model without a config")
            if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in size):
                raise ValueError(f"size must be (H, W), two integers of at least 1, got {size!r}")
            found = (channels, int(size[0]), int(size[1]))
        patch = getattr(config, "patch_size", 1)
        if found[1] % patch or found[2] % patch:
            raise ValueError(f"size must be multiples of the model's patch_size = {patch}, got {found[1]} x {found[2]}")
        return found[0], found[1], found[2]

    def _start(self, latents: Any, strength: float | None, mask: Any, masked_latents: Any, shape: tuple[int, int, int]) -> None:
        """Sets the first latents, the times that are left, and what a mask needs."""
        batch = len(self.context) // (2 if self.guided else 1)
        given = None
        if latents is not None:
            given = np.broadcast_to(self._on_host(latents, "latents"), (batch, *shape))
        self.mask: Array | None = None
        self.picture: Array | None = None  # the clean latents that a mask keeps
        self.first_noise: Array | None = None
        self.beside: Array | None = None  # channels [mask, masked latents] that an inpainting transformer takes beside x
        if masked_latents is not None:
            if mask is None:
                raise ValueError("masked_latents need mask: an inpainting transformer takes both")
            masked = np.broadcast_to(self._on_host(masked_latents, "masked_latents"), (batch, *shape))
            self.beside = np.concatenate([self._mask(mask, (batch, 1, *shape[1:])), masked], axis=1)
        blended = mask is not None and self.beside is None
        if strength is None and not blended:
            if given is None and self.sigmas[0] < 0.99:
                raise ValueError(f"sigmas must start at 1 when there are no latents to start from, got {self.sigmas[0]:g}")
            self.x = self.noise.start(shape) if given is None else given.copy()
            return
        if given is None:
            raise ValueError(f"{'mask' if blended else 'strength'} needs latents, those of the picture to change")
        begin = 0 if strength is None else first_step(len(self.sigmas) - 1, check_strength(strength))
        self.sigmas = self.sigmas[begin:]
        noise = self.noise.start(shape)
        self.x = _core.interpolate(np.ascontiguousarray(given), noise, np.full(batch, self.sigmas[0], np.float32))
        if blended:
            self.mask = self._mask(mask, (batch, 1, *shape[1:]))
            self.picture, self.first_noise = np.ascontiguousarray(given), noise

    @staticmethod
    def _mask(mask: Any, shape: tuple[int, ...]) -> Array:
        array = as_mask(mask)
        try:
            return np.broadcast_to(array, shape)
        except ValueError:
            raise ValueError(f"mask must broadcast to {list(shape)}, got shape {list(array.shape)}") from None

    def _velocity(self, sigma: float) -> Array:
        batch = len(self.x)
        x = self.x if self.beside is None else np.concatenate([self.x, self.beside], axis=1)
        if not self.guided:
            v = self.model(x, np.full(batch, sigma, np.float32), *self.text)
        else:
            both = devices.to_host(self.model(np.concatenate([x, x]), np.full(2 * batch, sigma, np.float32), *self.text))
            with_text = both[batch:]
            # Not v_neg + 1 (v - v_neg) where the scale is 1: that rounds, and a picture is the same alone and beside guided ones.
            v = np.where(self.scale > 1, both[:batch] + self.scale * (with_text - both[:batch]), with_text)
        return as_float32(devices.to_host(v), "the model's velocity", self.x.shape)

    def states(self) -> Iterator[State]:
        steps = len(self.sigmas) - 1
        for i in range(steps):
            sigma, sigma_next = float(self.sigmas[i]), float(self.sigmas[i + 1])
            batch = len(self.x)
            v = self._velocity(sigma)
            denoised = _core.predict_x0(self.x, v, np.full(batch, sigma, np.float32))
            if not np.isfinite(_core.sum_squares(denoised.reshape(-1))):
                raise FloatingPointError(f"the model gave NaN or infinite values in step {i + 1} of {steps} (sigma {sigma:g})")
            noise = self.first_noise
            if self.method == "euler":
                self.x = _core.euler_step(self.x, v, sigma, sigma_next)
            elif sigma_next > 0:
                noise = self.noise.fresh(self.x.shape[1:], i)
                self.x = _core.interpolate(denoised, noise, np.full(batch, sigma_next, np.float32))
            else:
                self.x = denoised.copy()
            if self.mask is not None:
                assert self.picture is not None and noise is not None
                kept = _core.interpolate(self.picture, noise, np.full(batch, sigma_next, np.float32))
                self.x = kept + self.mask * (self.x - kept)
            yield {"step": i, "steps": steps, "sigma": sigma, "sigma_next": sigma_next, "latents": self.x, "denoised": denoised}
