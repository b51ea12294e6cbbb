"""The project's own feature network: a small convolutional network that reads off a 64x64 picture what the OpenMoji views vary.

    python -m ladd.evaluation.classifier --out python/ladd/pretrained/openmoji/classifier        # a few minutes on two cores

From one feature vector it predicts the words of the caption (a softmax over the vocabulary, trained on the caption's content
words with equal shares), the background class, and the drawing's centre and scale. So it serves three measurements: FID and KID
in its features, prompt recall by its words, diversity within a prompt by its background, place and scale.

**The FID and KID taken in these features compare with nothing else.** They depend on this network's weights, not on Inception's:
they rank models that were measured with the same weights on the same data, and are on no other scale.

The network is a forward and a backward in plain sight on the kernels of the core. Its weights ship in 16 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _core, _purposes
from ..arrays import Array, named_views
from ..config import from_dict, load_json
from ..weights import check_names, read_folder, save_model

if TYPE_CHECKING:
    from ..data.openmoji import Record, View

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "pretrained" / "openmoji" / "classifier"
_CLASS_NAME, _STEM = "FeatureNetwork", "model"
STOP_WORDS = frozenset("a an and at by for from in of off on or s the to with without".split())
PLACE_UNIT = 0.1  # the network's outputs for centre and scale are in these units, so that they are of order 1
SCALE_MIDDLE, SCALE_UNIT = 0.85, 0.1
_CONV_STRIDES = (2, 2, 1, 2, 1, 2)  # size/16 pixels a side remain; strides instead of a global mean keep the place readable
_PADDING = (1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class FeatureNetworkConfig:
    """What the network looks at and what it names."""

    words: tuple[str, ...]
    backgrounds: tuple[str, ...]
    size: int = 64
    channels: tuple[int, ...] = (32, 64, 64, 128, 128, 128)
    groups: int = 8
    features: int = 128
    feature_scale: float = 1.0  # predict() multiplies features by it; training sets it so that real features have variance 1

    def __post_init__(self) -> None:
        for name in ("words", "backgrounds", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        if not self.words or not self.backgrounds:
            raise ValueError("words and backgrounds must not be empty")
        if self.size < 16 or self.size % 16:
            raise ValueError(f"size must be a multiple of 16, got {self.size}")
        if len(self.channels) != len(_CONV_STRIDES):
            raise ValueError(f"channels must have {len(_CONV_STRIDES)} entries, got {len(self.channels)}")
        if not 0 < self.feature_scale < math.inf:
            raise ValueError(f"feature_scale must be positive and finite, got {self.feature_scale}")
        if self.groups < 1 or self.features < 1 or any(c < 1 or c % self.groups for c in self.channels):
            raise ValueError(f"channels must be multiples of groups and features positive, got {self}")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the network reads off N pictures."""

    features: Array  # [N,F], after the last activation, in units in which those of real pictures have variance 1 on average
    words: Array  # [N,W] scores, higher is likelier
    background: NDArray[np.int64]  # [N] number of the likeliest class
    place: Array  # [N,2] centre (x, y) of the drawing as a share of the picture, 0 is the middle
    scale: Array  # [N]


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the network should say about B pictures."""

    words: Array  # [B,W], rows sum to 1 (or are 0: a caption without a known word teaches no words)
    background: NDArray[np.int64]  # [B]
    geometry: Array  # [B,3]: centre x, y and scale in the network's units


def content_words(name: str) -> list[str]:
    """The words of a record's name that say what is to be seen, each once, in order; a compound ("medium-dark") counts as its parts."""
    return list(dict.fromkeys(word for word in name.replace("-", " ").split() if word not in STOP_WORDS))


class FeatureNetwork:
    """Six 3x3 convolutions with group norm and SiLU, one hidden linear layer with GELU (the features), one linear layer for all
    outputs."""

    def __init__(self, config: FeatureNetworkConfig, *, seed: int = 0) -> None:
        self.config = config
        side = config.size // 16
        outputs = len(config.words) + len(config.backgrounds) + 3
        shapes: dict[str, tuple[int, ...]] = {}
        previous = 3
        for i, width in enumerate(config.channels):
            shapes[f"conv.{i}.weight"] = (width, previous, 3, 3)
            shapes[f"conv.{i}.bias"] = shapes[f"norm.{i}.weight"] = shapes[f"norm.{i}.bias"] = (width,)
            previous = width
        shapes["hidden.weight"] = (config.features, previous * side * side)
        shapes["hidden.bias"] = (config.features,)
        shapes["output.weight"] = (outputs, config.features)
        shapes["output.bias"] = (outputs,)
        total = sum(math.prod(shape) for shape in shapes.values())
        self.flat = np.zeros(total, np.float32)
        self.flat_grad = np.zeros(total, np.float32)
        self.tensors = named_views(self.flat, shapes)
        self.gradients = named_views(self.flat_grad, shapes)
        self._number = {word: i for i, word in enumerate(config.words)}
        normals = _core.normal((1, total), seed, _purposes.INIT)[0]
        for name, value in named_views(normals, shapes).items():
            if name.startswith("norm.") and name.endswith(".weight"):
                self.tensors[name][...] = 1.0
            elif name.endswith(".weight"):
                gain = 0.1 if name == "output.weight" else 1.0  # small logits first: the first loss is that of knowing nothing
                self.tensors[name][...] = value * np.float32(gain * math.sqrt(2.0 / math.prod(value.shape[1:])))

    # ---- forward and backward ----

    def forward(self, images: Array, *, keep: bool = False) -> tuple[Array, Array, list[Any]]:
        """images [B,3,size,size] in [-1,1] -> features [B,F], outputs [B, words + backgrounds + 3], what backward needs (empty
        without keep)."""
        size = self.config.size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be [B,3,{size},{size}], got {images.shape}")
        t, x = self.tensors, np.ascontiguousarray(images, np.float32)
        saved: list[Any] = []
        for i, stride in enumerate(_CONV_STRIDES):
            h = _core.conv2d_forward(x, t[f"conv.{i}.weight"], t[f"conv.{i}.bias"], stride, _PADDING)
            flat = h.reshape(h.shape[0], h.shape[1], -1)
            y, mean, rstd = _core.group_norm_forward(flat, t[f"norm.{i}.weight"], t[f"norm.{i}.bias"], self.config.groups, silu=True)
            if keep:
                saved.append((x, h, mean, rstd))
            x = y.reshape(h.shape)
        x = x.reshape(x.shape[0], -1)
        features, h = _core.linear_gelu_forward(x, t["hidden.weight"], t["hidden.bias"])
        outputs = _core.linear_forward(features, t["output.weight"], t["output.bias"])
        if keep:
            saved.append((x, h, features))
        return features, outputs, saved

    def backward(self, doutputs: Array, saved: list[Any]) -> None:
        """Adds the gradients of all parameters to `gradients`. doutputs [B, words + backgrounds + 3]."""
        t = self.tensors
        dx: Any
        dw: Any  # the kernels return None for gradients that were not asked for; these all are
        db: Any
        x, h, features = saved[-1]
        dx, dw, db = _core.linear_backward(doutputs, features, t["output.weight"])
        self._add("output", dw, db)
        dx, dw, db = _core.linear_backward(_core.gelu_backward(dx, h), x, t["hidden.weight"])
        self._add("hidden", dw, db)
        for i in reversed(range(len(_CONV_STRIDES))):
            x, h, mean, rstd = saved[i]
            flat = h.shape[0], h.shape[1], h.shape[2] * h.shape[3]
            dh, dgamma, dbeta = _core.group_norm_backward(
                dx.reshape(flat), h.reshape(flat), mean, rstd, t[f"norm.{i}.weight"], t[f"norm.{i}.bias"], silu=True
            )
            self._add(f"norm.{i}", dgamma, dbeta)
            dx, dw, db = _core.conv2d_backward(dh.reshape(h.shape), x, t[f"conv.{i}.weight"], _CONV_STRIDES[i], _PADDING, input=i > 0)
            self._add(f"conv.{i}", dw, db)

    def _add(self, layer: str, weight: Array, bias: Array) -> None:
        self.gradients[f"{layer}.weight"] += weight
        self.gradients[f"{layer}.bias"] += bias

    def loss(self, outputs: Array, targets: Targets) -> tuple[dict[str, float], Array]:
        """Cross-entropy of words and of background, squared error of place and scale, averaged over pictures; and
        d(sum)/d(outputs)."""
        words, backgrounds, geometry = self._split(outputs)
        batch = np.float32(len(outputs))
        parts, doutputs = {}, np.empty_like(outputs)
        dwords, dbackgrounds, dgeometry = self._split(doutputs)
        one_hot = np.eye(len(self.config.backgrounds), dtype=np.float32)[targets.background]
        for name, logits, wanted, d in (
            ("words", words, targets.words, dwords),
            ("background", backgrounds, one_hot, dbackgrounds),
        ):
            log_p = logits - logits.max(axis=1, keepdims=True)
            log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
            parts[name] = float(-(wanted * log_p).sum(dtype=np.float64) / batch)
            d[...] = (np.exp(log_p) * wanted.sum(axis=1, keepdims=True) - wanted) / batch
        difference = geometry - targets.geometry
        parts["geometry"] = float(np.square(difference).sum(dtype=np.float64) / batch)
        dgeometry[...] = 2.0 * difference / batch
        return parts, doutputs

    def _split(self, outputs: Array) -> tuple[Array, Array, Array]:
        words, backgrounds = len(self.config.words), len(self.config.backgrounds)
        return outputs[:, :words], outputs[:, words : words + backgrounds], outputs[:, words + backgrounds :]

    # ---- use ----

    def predict(self, images: Array, *, batch: int = 128) -> Prediction:
        """Reads N pictures [N,3,size,size] in [-1,1]."""
        if not len(images):
            raise ValueError("images must not be empty")
        features, outputs = [], []
        for start in range(0, len(images), batch):
            f, o, _ = self.forward(images[start : start + batch])
            features.append(f)
            outputs.append(o)
        words, backgrounds, geometry = self._split(np.concatenate(outputs))
        return Prediction(
            features=np.concatenate(features) * np.float32(self.config.feature_scale),
            words=words,
            background=backgrounds.argmax(axis=1).astype(np.int64),
            place=geometry[:, :2] * np.float32(PLACE_UNIT),
            scale=geometry[:, 2] * np.float32(SCALE_UNIT) + np.float32(SCALE_MIDDLE),
        )

    def normalize_features(self, images: Array) -> None:
        """Sets feature_scale from real pictures: FID and KID are then on a scale that does not hang on the size of the weights."""
        self.config = dataclasses.replace(self.config, feature_scale=1.0)
        variance = float(self.predict(images).features.var(axis=0, dtype=np.float64).mean())
        if not variance > 0:
            raise ValueError("the features do not vary over these pictures")
        self.config = dataclasses.replace(self.config, feature_scale=1.0 / math.sqrt(variance))

    def word_numbers(self, name: str) -> NDArray[np.int64]:
        """Numbers of the content words of a name that the network knows."""
        return np.array([self._number[word] for word in content_words(name) if word in self._number], np.int64)

    def targets(self, views: Sequence[View]) -> Targets:
        """What the network should say about these views."""
        words = np.zeros((len(views), len(self.config.words)), np.float32)
        for row, view in enumerate(views):
            numbers = self.word_numbers(view.record.name)
            words[row, numbers] = 1.0 / max(numbers.size, 1)
        background = np.array([self.config.backgrounds.index(view.background) for view in views], np.int64)
        geometry = np.empty((len(views), 3), np.float32)
        geometry[:, :2] = true_place(views) / PLACE_UNIT
        geometry[:, 2] = (np.array([view.scale for view in views]) - SCALE_MIDDLE) / SCALE_UNIT
        return Targets(words, background, geometry)

    # ---- files ----

    def save(self, folder: str | Path, record: dict[str, Any] | None = None) -> None:
        """config.json (with `record`, how it was trained) and the weights in 16 bits."""
        config = {**dataclasses.asdict(self.config), "_training": record or {}}
        save_model(folder, _CLASS_NAME, config, self.tensors, dtype="float16", stem=_STEM)

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> FeatureNetwork:
        """Reads a folder that save() wrote; the shipped network by default."""
        folder = DEFAULT_FOLDER if folder is None else Path(folder)
        if not (folder / "config.json").is_file():
            command = f"python -m ladd.evaluation.classifier --out {folder}"
            raise FileNotFoundError(f"{folder} holds no feature network (config.json is missing); {command} trains one")
        config = from_dict(FeatureNetworkConfig, _public(load_json(folder / "config.json")), str(folder / "config.json"))
        network, given = cls(config), read_folder(folder, stem=_STEM)
        expected = {name: value.shape for name, value in network.tensors.items()}
        check_names(expected, {name: tensor.shape for name, tensor in given.items()}, f"the configuration in {folder}")
        for name, value in network.tensors.items():
            value[...] = given[name].read()
            if not np.isfinite(value).all():
                raise ValueError(f"{folder}: {name} contains NaN or infinity")
        return network


def _public(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if not key.startswith("_")}


def true_place(views: Sequence[View]) -> NDArray[np.float64]:
    """Centres [n,2] of the drawings, (x, y), as a share of the picture; 0 is the middle. A view's place is its share of the
    free room."""
    place = np.array([view.place for view in views], np.float64)
    free = 1.0 - np.array([view.scale for view in views], np.float64)
    return (place - 0.5) * free[:, None]


# ---- training ----------------------------------------------------------------------------------------------------------


def agreement(network: FeatureNetwork, views: Sequence[View], images: Array) -> dict[str, float]:
    """How well the network reads real views: word recall, background accuracy, mean error of the place in pixels and of the
    scale."""
    from .metrics import mean_recall

    seen = network.predict(images)
    background = np.array([network.config.backgrounds.index(view.background) for view in views])
    scale = np.array([view.scale for view in views])
    return {
        "word_recall": mean_recall(seen.words, [network.word_numbers(view.record.name) for view in views]),
        "background_accuracy": float((seen.background == background).mean()),
        "place_error_pixels": float(np.abs(seen.place - true_place(views)).mean() * network.config.size),
        "scale_error": float(np.abs(seen.scale - scale).mean()),
    }


def train(
    records: Sequence[Record],
    *,
    steps: int = 2500,
    batch: int = 64,
    lr: float = 4e-3,
    weight_decay: float = 0.02,
    warmup_steps: int = 50,
    clip_norm: float = 1.0,
    seed: int = 0,
    channels: tuple[int, ...] = (32, 64, 64, 128, 128, 128),
    features: int = 128,
    progress: bool = True,
) -> tuple[FeatureNetwork, list[dict[str, float]]]:
    """Trains a network on random views of `records` with AdamW and a cosine rate. -> the network, one row of losses a step."""
    from tqdm.auto import tqdm

    from ..data.openmoji import BACKGROUNDS, SIZE, Views

    vocabulary = sorted({word for record in records for word in content_words(record.name)})
    config = FeatureNetworkConfig(tuple(vocabulary), tuple(BACKGROUNDS), size=SIZE, channels=channels, features=features)
    network = FeatureNetwork(config, seed=seed)
    first, second = np.zeros_like(network.flat), np.zeros_like(network.flat)
    source, history = Views(records, seed=seed), []
    bar = tqdm(range(1, steps + 1), desc="feature network", unit="step", disable=not progress)
    for step in bar:
        views = source.draw(step, batch)
        images = np.stack([view.render() for view in views])
        _, outputs, saved = network.forward(images, keep=True)
        parts, doutputs = network.loss(outputs, network.targets(views))
        network.flat_grad[...] = 0.0
        network.backward(doutputs, saved)
        norm = math.sqrt(_core.sum_squares(network.flat_grad))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {step}; a smaller lr than {lr:g} may help")
        rate = lr * min(1.0, step / max(warmup_steps, 1)) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        clip = min(1.0, clip_norm / norm) if norm > 0 else 1.0
        _core.adamw(network.flat, first, second, network.flat_grad, rate, 0.9, 0.99, 1e-8, weight_decay, step, clip)
        history.append({"step": step, **parts})
        if step % 10 == 0:
            bar.set_postfix({name: f"{np.mean([row[name] for row in history[-50:]]):.3f}" for name in parts})
    network.normalize_features(np.stack([view.render() for view in source.draw(0, 1024)]))
    return network, history


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the feature network on the training records and writes it with what it scores on fresh views."""
    parser = argparse.ArgumentParser(prog="python -m ladd.evaluation.classifier", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write config.json and model.safetensors to")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    from ..data.openmoji import Views, heldout_records, train_records

    settings = {"steps": given.steps, "batch": given.batch, "lr": given.lr, "seed": given.seed}
    records = train_records()
    network, history = train(records, **settings)
    network.save(given.out)
    network = FeatureNetwork.from_pretrained(given.out)  # measured as it will be used: with 16-bit weights
    measured = {}
    for split, chosen in (("train", records), ("combination", heldout_records("combination")), ("base", heldout_records("base"))):
        views = Views(chosen, seed=given.seed + 1).draw(0, 512)
        measured[split] = agreement(network, views, np.stack([view.render() for view in views]))
        print(f"{split:12s}", "  ".join(f"{name} {value:.3f}" for name, value in measured[split].items()))
    last = {name: float(np.mean([row[name] for row in history[-50:]])) for name in ("words", "background", "geometry")}
    network.save(given.out, {"settings": settings, "final_loss": last, "measured": measured})
    print(f"wrote {given.out}: {(given.out / f'{_STEM}.safetensors').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
