"""From prompts to pictures: a folder with a transformer, an autoencoder and a text encoder, and how it wants to be sampled.

Layout: model_index.json, one folder a transformer (student/, teacher/ or transformer/), vae/, text_encoder/, scheduler/, and ladd.json:
{"default": "student", "models": {"student": {folder, steps, method, guidance_scale, schedule, shift, sigmas}, ...}}.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import device as devices
from . import pictures, sampling
from .arrays import Array, seeds_for
from .config import check_keys, from_dict, load_json, to_dict
from .files import atomic_folder, write_json
from .models import AutoencoderKL, MMDiT
from .text import WordEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

PRETRAINED = Path(__file__).parent / "pretrained"
TRANSFORMER_CLASS = "SD3Transformer2DModel"
IMAGE_STRENGTH, IMAGE_STEPS = 0.6, 4  # with image=: the default, and the least number of steps that are chosen unasked


@dataclass(frozen=True)
class SamplerSettings:
    """How a transformer of a pipeline is sampled unless the caller says otherwise."""

    folder: str = "transformer"
    steps: int = 28
    method: str = "euler"
    guidance_scale: float = 1.0
    schedule: str = "uniform"
    shift: float = 1.0
    # For these numbers of steps the list that the model was trained on, in place of schedule and shift; JSON's keys are strings.
    sigmas: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str) or not self.folder or Path(self.folder).name != self.folder:
            raise ValueError(f"SamplerSettings.folder must be the name of a folder beside ladd.json, got {self.folder!r}")
        if self.method not in sampling.METHODS:
            raise ValueError(f"SamplerSettings.method must be one of {', '.join(sampling.METHODS)}, got {self.method!r}")
        sampling.sigmas(self.steps, schedule=self.schedule, shift=self.shift)
        if isinstance(self.guidance_scale, bool) or not isinstance(self.guidance_scale, (int, float)) or self.guidance_scale < 0:
            raise ValueError(f"SamplerSettings.guidance_scale must be a number of at least 0, got {self.guidance_scale!r}")
        if not isinstance(self.sigmas, dict):
            raise TypeError(f"SamplerSettings.sigmas must be a table of lists, got {type(self.sigmas).__name__}")
        for steps, values in self.sigmas.items():
            if str(len(sampling.check_sigmas(values)) - 1) != steps:
                raise ValueError(f"SamplerSettings.sigmas[{steps!r}] must have {steps} steps, got {len(values) - 1}")

    def list_for(self, steps: int) -> Array:
        """The times of `steps` steps."""
        if str(steps) in self.sigmas:
            return sampling.check_sigmas(self.sigmas[str(steps)])
        return sampling.sigmas(steps, schedule=self.schedule, shift=self.shift)


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures, and what made each of them."""

    images: list[Image]
    latents: Array  # [B,C,H,W], scaled as the transformer sees them
    prompts: list[str]
    seeds: list[int]
    sigmas: Array

    def __repr__(self) -> str:
        width, height = self.images[0].size
        return f"<ladd.PipelineOutput, {_count(len(self.images), 'picture')} of {width}x{height}, {_count(len(self.sigmas) - 1, 'step')}>"

    def _repr_png_(self) -> bytes:
        """All pictures in one, for notebooks."""
        import io

        buffer = io.BytesIO()
        grid(self.images).save(buffer, "PNG")
        return buffer.getvalue()


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


def to_images(array: Array) -> list[Image]:
    """PIL pictures of [B,3,H,W] in [-1, 1]; values are cut to the range and rounded to the nearest of 256."""
    from PIL import Image

    pixels = np.rint(np.clip(array * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)).astype(np.uint8)
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels.transpose(0, 2, 3, 1)]


def grid(images: Sequence[Image], columns: int | None = None) -> Image:
    """Pictures of one size on one sheet, row by row."""
    from PIL import Image

    if not images:
        raise ValueError("a grid needs at least one picture, got none")
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


class Pipeline:
    """Text, or text and a picture, to image. A result depends on its prompt, its own seed and the settings, not on what else is in its batch.

    The transformer takes C channels of the autoencoder's latents, or 2 C + 1 (an inpainting transformer: noisy latents, mask, masked picture).
    """

    def __init__(self, model: MMDiT, vae: AutoencoderKL, text: WordEncoder, settings: SamplerSettings | None = None) -> None:
        settings = settings or SamplerSettings()
        channels = vae.config.latent_channels
        self.inpainting = model.config.in_channels == 2 * channels + 1
        pairs = (
            ("latent channels", model.config.in_channels, 2 * channels + 1 if self.inpainting else channels),
            ("latent channels out", model.config.out_channels, channels),
            ("context width", model.config.joint_attention_dim, text.context_dim),
            ("pooled width", model.config.pooled_projection_dim, text.pooled_dim),
        )
        for what, expected, given in pairs:
            if expected != given:
                raise ValueError(f"the parts do not fit: the transformer's {what} is {expected}, the other part's {given}")
        self.model, self.vae, self.text, self.settings = model, vae, text, settings

    def __repr__(self) -> str:
        return f"<ladd.Pipeline of {self.model!r}, {_count(self.settings.steps, 'step')} of {self.settings.method}>"

    @property
    def guidance_scale(self) -> float:
        """The one that the model was published with."""
        return self.settings.guidance_scale

    @classmethod
    def from_pretrained(cls, path: str | Path = "openmoji", *, model: str | None = None, device: str = "cpu", dtype: str = "float32") -> Self:
        """A folder, or "openmoji" for the model that comes with the package. model: "student" or "teacher"; None: the folder's default.

        device: "cpu", "cuda" or "cuda:1"; dtype: "float32"; "bfloat16" (on the CPU: products and convolutions only, and an error
        where it has no AVX512_BF16); on a GPU also "float16". Text is encoded on the CPU.
        """
        folder = pipeline_folder(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r} with a pipeline (models are read from disk; nothing is downloaded)")
        settings = read_settings(folder, model)
        if not (folder / "vae").is_dir():
            raise FileNotFoundError(
                f"{folder} is no pipeline: vae/, text_encoder/ and a transformer's folder expected (ladd.MMDiT reads one alone)"
            )
        text = WordEncoder.from_pretrained(folder / "text_encoder")  # first: it is small, and with SD3's encoders the answer is no
        transformer = MMDiT.from_pretrained(folder / settings.folder, device=device, dtype=dtype)
        vae = AutoencoderKL.from_pretrained(folder / "vae", device=device, dtype=dtype)
        return cls(transformer, vae, text, settings)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        size: tuple[int, int] | None = None,
        method: str | None = None,
        sigmas: Any = None,
        batch_size: int = 16,
        progress: bool = False,
        callback: Callable[[sampling.State], object] | None = None,
    ) -> PipelineOutput:
        """Pictures of one or more prompts; those of one prompt follow each other.

        image     a picture to start from, for all or one an image: PIL (resized to `size`; what is transparent becomes white), uint8
                  [H,W,3], or float [3,H,W] in [-1, 1]; also a list of them, or one array with a batch in front
        strength  share of the steps that are run from the noised picture (default 0.6; 1: the picture is only a mask's surroundings)
        mask      PIL or [H,W] like image: 1 (white) where the picture is painted anew; the rest of the result is the picture itself. The
                  default strength is then 1
        steps, guidance_scale, method, sigmas: None takes the model's own (with an image at least 4 steps: one has no share to run).
        guidance_scale: one number (0 or 1: off), or one an image. negative_prompt: one for all, or one a prompt; only guidance uses it.
        seed: one an image, or an integer n for n, n + 1, ... size: (height, width) in pixels; None: that of an array, else the model's own.
        batch_size: pictures that are computed at once; the pictures do not depend on it.
        progress: a bar of the steps. callback: called with the sampler's State after each step of each batch; vae.decode(state["denoised"])
        is a preview, and an exception that it raises ends the call.
        """
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be an integer of at least 1, got {num_images_per_prompt!r}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        if not isinstance(prompt, (str, list, tuple)):
            raise TypeError(f"prompt must be a string or a list of strings, got {type(prompt).__name__}")
        given = [prompt] if isinstance(prompt, str) else list(prompt)
        if not given:
            raise ValueError("prompt must be a string or a list of at least one, got an empty list")
        prompts = [p for p in given for _ in range(num_images_per_prompt)]
        seeds = seeds_for(seed, len(prompts))
        if sigmas is not None and steps is not None:
            raise ValueError(f"give either steps or sigmas, got steps={steps!r} and sigmas={sigmas!r}")
        if steps is None:
            steps = self.settings.steps if image is None or self.inpainting else max(self.settings.steps, IMAGE_STEPS)
        times = self.settings.list_for(steps) if sigmas is None else sampling.check_sigmas(sigmas)
        scale = sampling.check_guidance(self.guidance_scale if guidance_scale is None else guidance_scale, len(prompts))
        context, pooled = self.text.encode(prompts)
        negative = self._negative(negative_prompt, len(given), num_images_per_prompt, guided=bool((scale > 1).any()))
        source = self._source(image, strength, mask, size, len(prompts), times)
        starts = range(0, len(prompts), batch_size)
        latents, images = [], []
        with _bar(progress, len(starts) * source.steps(times)) as bar:

            def after_step(state: sampling.State) -> None:
                bar.update()
                if callback is not None:
                    callback(state)

            for start in starts:
                part = slice(start, start + batch_size)
                x = sampling.sample(
                    self.model,
                    context[part],
                    pooled[part],
                    **source.arguments(part),
                    sigmas=times,
                    method=self.settings.method if method is None else method,
                    guidance_scale=scale[part],
                    negative=None if negative is None else (_rows(negative[0], part), _rows(negative[1], part)),
                    seeds=seeds[part],
                    callback=after_step,
                )
                latents.append(devices.to_host(x))
                images.extend(to_images(source.keep(devices.to_host(self.vae.decode(x)), part)))
        return PipelineOutput(images, np.concatenate(latents), prompts, seeds, times)

    def _negative(self, given: str | Sequence[str], count: int, repeats: int, *, guided: bool) -> tuple[Array, Array] | None:
        """Text to guide away from, of batch 1 or one row an image; None without guidance."""
        if not isinstance(given, (str, list, tuple)):
            raise TypeError(f"negative_prompt must be a string or a list of strings, got {type(given).__name__}")
        negative = [given] if isinstance(given, str) else [p for p in given for _ in range(repeats)]
        if not isinstance(given, str) and len(given) != count:
            raise ValueError(f"negative_prompt must be one for all, or one a prompt: expected {count}, got {len(given)}")
        if guided:
            return self.text.encode(negative)
        if any(negative):
            warnings.warn("negative_prompt has no effect: guidance is off (guidance_scale must be above 1)", UserWarning, stacklevel=3)
        return None

    def _source(self, image: Any, strength: float | None, mask: Any, size: Any, count: int, times: Array) -> _Source:
        """What sampling starts from: a size, or a picture, its mask and their latents."""
        if image is None:
            for name, value in (("strength", strength), ("mask", mask)):
                if value is not None:
                    raise ValueError(f"{name} needs image, the picture to change")
            if self.inpainting:
                raise ValueError("this pipeline has an inpainting transformer: it needs image and mask")
            return _Source(self._latent_size(size))
        if self.inpainting and mask is None:
            raise ValueError("this pipeline has an inpainting transformer: image needs mask")
        own = pictures.size_of(image)
        height, width = (f * self.vae.config.spatial_factor for f in self._latent_size(own if size is None else size))
        picture = pictures.load(image, (height, width), count)
        if strength is None:
            strength = IMAGE_STRENGTH if mask is None else 1.0
        strength = sampling.check_strength(strength)
        steps = len(times) - 1
        if mask is None and times[sampling.first_step(steps, strength)] == 1:
            warnings.warn(
                f"{steps} steps at strength {strength:g} start from pure noise: the picture has no influence (more steps, or a lower strength)",
                UserWarning, stacklevel=3,
            )  # fmt: skip
        return self._encoded(picture, None if mask is None else pictures.load_mask(mask, (height, width)), strength)

    def _encoded(self, picture: Array, mask: Array | None, strength: float) -> _Source:
        factor = self.vae.config.spatial_factor
        source = _Source((picture.shape[2] // factor, picture.shape[3] // factor), picture, mask, strength)
        if mask is not None:
            source.latent_mask = np.ascontiguousarray(mask[::factor, ::factor])  # the nearest pixel, as diffusers has it
            if not source.latent_mask.any():
                raise ValueError(f"mask must be 1 in at least one of the latents' pixels, every {factor}th of the picture, got none")
        if not self.inpainting or strength < 1:
            source.latents = devices.to_host(self.vae.encode(picture))
        else:
            source.strength = None
        if self.inpainting and mask is not None:
            source.masked_latents = devices.to_host(self.vae.encode(picture * (mask < 0.5)))
        return source

    def _latent_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        c, factor = self.model.config, self.vae.config.spatial_factor
        if size is None:
            return c.sample_size, c.sample_size
        multiple = factor * c.patch_size
        most = c.pos_embed_max_size * multiple
        if (
            not isinstance(size, (tuple, list))
            or len(size) != 2
            or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < multiple or n % multiple or n > most for n in size)
        ):
            raise ValueError(f"size must be (height, width), multiples of {multiple} up to {most} pixels, got {size!r}")
        return size[0] // factor, size[1] // factor


@dataclass
class _Source:
    """What one call samples from. Arrays have batch 1 or that of the call; only a size for text alone."""

    size: tuple[int, int]
    picture: Array | None = None  # [B,3,H,W] in [-1, 1]
    mask: Array | None = None  # [H,W], 1 where it is painted anew
    strength: float | None = None
    latents: Array | None = None
    latent_mask: Array | None = None
    masked_latents: Array | None = None

    def steps(self, times: Array) -> int:
        """How many of the steps are run."""
        steps = len(times) - 1
        return steps if self.strength is None else steps - sampling.first_step(steps, self.strength)

    def arguments(self, part: slice) -> dict[str, Any]:
        """Those of ladd.sample, for some rows of the call."""
        arrays = {"latents": self.latents, "masked_latents": self.masked_latents}
        rows = {name: None if a is None else _rows(a, part) for name, a in arrays.items()}
        return {"size": self.size, "strength": self.strength, "mask": self.latent_mask, **rows}

    def keep(self, images: Array, part: slice) -> Array:
        """The decoded images with the picture's own pixels where the mask is 0."""
        if self.mask is None or self.picture is None:
            return images
        return np.where(self.mask > 0, images, _rows(self.picture, part))


def _rows(array: Array, part: slice) -> Array:
    """Some rows of what is given for each picture, or the one row that serves all."""
    return array if len(array) == 1 else array[part]


def _bar(shown: bool, steps: int) -> Any:
    # tqdm.auto warns in notebooks without ipywidgets, also where no bar is shown.
    tqdm = importlib.import_module("tqdm.auto" if shown else "tqdm").tqdm
    return tqdm(total=steps, desc="sampling", unit="step", disable=not shown)


def pipeline_folder(path: str | Path) -> Path:
    """Where a pipeline lies. The string "openmoji" names the model in the package; a folder of that name here is ./openmoji, or a Path."""
    if path != "openmoji":
        return Path(path)
    if Path("openmoji", "ladd.json").exists():
        text = '"openmoji" is the model that comes with the package, not the folder of that name here; the folder is "./openmoji"'
        warnings.warn(text, UserWarning, stacklevel=3)
    return PRETRAINED / "openmoji"


def model_names(folder: str | Path) -> list[str]:
    """The names of a pipeline folder's transformers, the default first."""
    path = Path(folder) / "ladd.json"
    if not path.exists():
        return ["transformer"]
    table = load_json(path)
    check_keys(str(path), table, ("default", "models"))
    models, default = table.get("models"), table.get("default")
    if not isinstance(models, dict) or not models or default not in models:
        raise ValueError(f"{path} must hold models (a table) and default (one of their names), got {default!r}")
    return [default, *(name for name in models if name != default)]


def read_settings(folder: Path, model: str | None) -> SamplerSettings:
    """What ladd.json says of the chosen transformer; without the file, what a diffusers folder tells."""
    names = model_names(folder)
    name = names[0] if model is None else model
    if name not in names:
        without = "" if (folder / "ladd.json").exists() else ", which has no ladd.json"
        raise ValueError(f"model must be one of {', '.join(names)} in {folder}{without}, got {name!r}")
    path = folder / "ladd.json"
    if path.exists():
        return from_dict(SamplerSettings, load_json(path)["models"][name], f"{path}: {name}")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    shift = load_json(scheduler).get("shift", 1.0) if scheduler.exists() else 1.0
    return SamplerSettings(guidance_scale=7.0, schedule="diffusers", shift=shift)


def save_pipeline(
    path: str | Path,
    models: Mapping[str, MMDiT],
    vae: AutoencoderKL,
    text: WordEncoder,
    settings: Mapping[str, SamplerSettings],
    *,
    default: str | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a pipeline folder with one or more transformers, aside and renamed: whoever sees `path` sees all of it. It replaces a pipeline
    that is there; a folder that holds anything else is an error.

    models, settings: by name ("student", "teacher"); each goes to the folder its settings name. default: the first if not given.
    """
    if not models or set(models) != set(settings):
        raise ValueError(f"models and settings must have the same names, at least one, got {sorted(models)} and {sorted(settings)}")
    default = default or next(iter(models))
    folders = [s.folder for s in settings.values()]
    if default not in models or len(set(folders)) != len(folders) or {"vae", "text_encoder", "scheduler"} & set(folders):
        raise ValueError(f"default must be one of {', '.join(models)} and each model needs a folder of its own, got {default!r} and {folders}")
    for name, model in models.items():
        Pipeline(model, vae, text, settings[name])  # checks that they fit
    index: dict[str, Any] = {"_class_name": "LADDPipeline"}
    known = {"model_index.json", "ladd.json", "vae", "text_encoder", "scheduler", *folders}
    if Path(path, "ladd.json").is_file():  # the transformers of the pipeline that is replaced
        known |= {read_settings(Path(path), name).folder for name in model_names(path)}
    with atomic_folder(Path(path), known) as folder:
        for name, model in models.items():
            model.save_pretrained(folder / settings[name].folder, dtype=dtype)
            index[settings[name].folder] = ["diffusers", TRANSFORMER_CLASS]
        vae.save_pretrained(folder / "vae", dtype=dtype)
        text.save_pretrained(folder / "text_encoder", dtype=dtype)
        (folder / "scheduler").mkdir()
        scheduler = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": settings[default].shift,
        }
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        index |= {
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["ladd", "WordEncoder"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        }
        write_json(folder / "ladd.json", {"default": default, "models": {n: to_dict(s) for n, s in settings.items()}})
        write_json(folder / "model_index.json", index)
