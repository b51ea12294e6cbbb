"""What all trainers share: optimizer, EMA and schedule over flat buffers, metrics, grids, and checkpoints that survive a kill.

A checkpoint is a folder `step-XXXXXXXX` with every array that the next step depends on (weights, moments, EMA) and a few
counters. It is written aside, synced and renamed, so a folder of that name is complete. Random numbers are keyed by (seed,
purpose, step), so they have no state to save.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import _core, _purposes, files
from .. import config as configs
from .. import device as devices
from .resident import Status, Tally

Array = NDArray[Any]
State = tuple[dict[str, Array], dict[str, Any]]  # arrays and counters

WEIGHTS, COUNTERS = "state.safetensors", "state.json"  # a checkpoint's files

# Keys of [run] that steer a run without changing what a step computes: they may differ when a run is resumed.
CONTROL = ("steps", "max_minutes", "checkpoint_every", "sample_every", "validation_views", "keep", "log_every", "cuda_graph")


# ---- optimizer, EMA, schedule -----------------------------------------------------------------------------------------


class AdamW:
    """AdamW over several flat (values, gradients) buffers, with one clip of the norm over all of them.

    With beta1 = 0 the first moment would be nothing but the last gradient: then there is none, here and in checkpoints.
    """

    def __init__(
        self,
        buffers: Sequence[tuple[Array, Array]],
        config: configs.AdamWConfig,
        name: str,
        *,
        seed: int = 0,
        purpose: int = _purposes.ROUNDING,
    ) -> None:
        """seed and purpose: of the random numbers with which weights are rounded, if the configuration says so."""
        self.buffers = list(buffers)
        self.config = config
        self.name = name
        self._seed, self._purpose = seed, purpose
        self.m = [devices.zeros_like(p) if config.beta1 else None for p, _ in self.buffers]
        self.v = [devices.zeros_like(p) for p, _ in self.buffers]
        self.updates = 0

    def zero_grad(self) -> None:
        """At the head of a step: an interrupted step may have left a part of its gradients."""
        for _, g in self.buffers:
            _core.zero(g)

    def update(self, scale: float = 1.0, key: int | None = None) -> float:
        """One update from the accumulated gradients; `scale` multiplies the rate. Returns the norm before clipping.

        key: of stochastic rounding's numbers, another one at each update; default: the update's number.
        """
        norm = math.sqrt(sum(_core.sum_squares(g) for _, g in self.buffers))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient of {self.name} is {norm} at update {self.updates + 1}; nothing was updated")
        c = self.config
        clip = min(1.0, c.clip_norm / norm) if c.clip_norm and norm > 0 else 1.0
        self.updates += 1
        rate = c.rate(self.updates) * scale
        key = self.updates if key is None else key
        for i, ((p, g), m, v) in enumerate(zip(self.buffers, self.m, self.v, strict=True)):
            _core.adamw(p, m, v, g, rate, c.beta1, c.beta2, c.eps, c.weight_decay, self.updates, clip, rounding=self._rounding(i, key))
        return norm

    def _rounding(self, buffer: int, key: Any) -> tuple[int, int, Any] | None:
        return (self._seed, self._purpose + buffer, key) if self.config.stochastic_rounding else None

    def control(self, scale: float, ahead: int = 0) -> Array:
        """What `queue` needs of the next update (or of the one `ahead` of it): AdamW's numbers of this step, and room for the clip."""
        c, step = self.config, self.updates + 1 + ahead
        return np.array([*_core.adamw_control(c.rate(step) * scale, c.weight_decay, c.beta1, c.beta2, step), 1.0], np.float32)

    def queue(self, control: Any, tally: Tally, start: int, name: str, status: Status, who: int, key: Any) -> None:
        """The same update on a device, which decides by itself: nothing is waited for.

        control [4] is there; so are the step's numbers, of which those from `start` on must be finite as the norm must; `name` is the
        norm's metric. `who` becomes the status where not all are finite: then nothing is updated. `updates` is for the caller to count.
        """
        c = self.config
        checked = tally.memory(start, tally.used) if tally.used > start else None
        place, squares = tally.take(len(self.buffers))
        for i, (_, g) in enumerate(self.buffers):
            _core.sum_squares(g, out=tally.memory(place + i, place + i + 1))
        _core.clip_factor(control[3:], tally.number(name), status.failed, status.done[who - 1], squares, checked, c.clip_norm, who)
        for i, ((p, g), m, v) in enumerate(zip(self.buffers, self.m, self.v, strict=True)):
            _core.adamw(p, m, v, g, 0.0, c.beta1, c.beta2, c.eps, 0.0, 1, control=control, rounding=self._rounding(i, key))

    def state(self) -> State:
        return self._moments(), {"updates": self.updates}

    def _moments(self) -> dict[str, Array]:
        return {f"{kind}{i}": a for kind, group in (("m", self.m), ("v", self.v)) for i, a in enumerate(group) if a is not None}

    def load_state(self, arrays: Mapping[str, Array], counters: Mapping[str, Any]) -> None:
        for name, a in self._moments().items():
            a[:] = arrays[name]
        self.updates = int(counters["updates"])


def moments_bytes(config: configs.AdamWConfig, parameters: int) -> int:
    """What an AdamW of so many parameters keeps of them."""
    return 4 * parameters * (2 if config.beta1 else 1)


class EMA:
    """Exponential moving average of flat buffers. Early on the average is over what there is: decay = min(decay, (1 + n) / (10 + n))."""

    def __init__(self, buffers: Sequence[Array], decay: float) -> None:
        self.buffers = list(buffers)
        self.decay = decay
        self.values = [p.copy() for p in self.buffers]
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        for e, p in zip(self.values, self.buffers, strict=True):
            _core.ema(e, p, self._decay(self.updates))

    def _decay(self, update: int) -> float:
        return min(self.decay, (1 + update) / (10 + update))

    def control(self) -> Array:
        """What `queue` needs of the next update: its decay, and room for whether to make it."""
        return np.array([self._decay(self.updates + 1), 1.0], np.float32)

    def queue(self, control: Any, optimizer: Any) -> None:
        """The same on a device, unless the optimizer with that control made no update. `updates` is for the caller to count."""
        control[1:][...] = optimizer[3:]
        for e, p in zip(self.values, self.buffers, strict=True):
            _core.ema(e, p, 0.0, control=control)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the models hold the averaged weights."""
        kept = [p.copy() for p in self.buffers]
        try:
            for p, e in zip(self.buffers, self.values, strict=True):
                p[:] = e
            yield
        finally:
            for p, k in zip(self.buffers, kept, strict=True):
                p[:] = k

    def state(self) -> State:
        return {f"ema{i}": e for i, e in enumerate(self.values)}, {"updates": self.updates}

    def load_state(self, arrays: Mapping[str, Array], counters: Mapping[str, Any]) -> None:
        for i, e in enumerate(self.values):
            e[:] = arrays[f"ema{i}"]
        self.updates = int(counters["updates"])


def cosine_tail(step: int, steps: int, tail: float) -> float:
    """Factor of the learning rate: 1, then a half cosine down to 0 over the last `tail` (a share) of the steps."""
    start = steps * (1 - tail)
    return 1.0 if step <= start or tail == 0 else 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / (steps - start))))


def join_states(**parts: State) -> State:
    """One state from named ones: keys become "part.key"."""
    arrays = {f"{part}.{key}": a for part, (group, _) in parts.items() for key, a in group.items()}
    return arrays, {part: counters for part, (_, counters) in parts.items()}


def part_of(state: State, part: str) -> State:
    """The inverse of join_states for one part."""
    arrays, counters = state
    prefix = part + "."
    return {k[len(prefix) :]: a for k, a in arrays.items() if k.startswith(prefix)}, counters[part]


def check_state(given: State, expected: State, what: str) -> None:
    """Raises unless a stored state has the counters, and arrays of the names, shapes and dtypes, of the object that is to take it."""
    have, want = given[0], expected[0]
    for name in sorted(want.keys() - have.keys()) + sorted(have.keys() - want.keys()):
        raise ValueError(f"{what}: array {name!r} is {'missing' if name in want else 'not known to this configuration'}")
    for name, a in want.items():
        if have[name].shape != a.shape or have[name].dtype != a.dtype:
            given_as = f"{have[name].dtype}{list(have[name].shape)}"
            raise ValueError(f"{what}: {name!r} must be {a.dtype}{list(a.shape)}, got {given_as}: another model was saved here")
    for part, counters in expected[1].items():
        found = given[1].get(part)
        if not isinstance(found, dict) or found.keys() != counters.keys() or not all(isinstance(n, int) for n in found.values()):
            raise ValueError(f"{what}: the counters of {part!r} must be integers {sorted(counters)}, got {found!r}")


# ---- files ------------------------------------------------------------------------------------------------------------


def config_hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def save_state(path: Path, state: State, **header: Any) -> None:
    """A state as a folder: state.safetensors and state.json."""
    from safetensors.numpy import save_file

    arrays, counters = state
    with files.atomic_folder(path, (WEIGHTS, COUNTERS)) as folder:
        save_file({k: np.ascontiguousarray(devices.to_host(a)) for k, a in arrays.items()}, folder / WEIGHTS)
        (folder / COUNTERS).write_text(json.dumps({**header, "counters": counters}, indent=1))


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """The state in a folder, and the header it was saved with."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    old = path.parent / f".{path.name}.old"
    if old.exists() and not path.exists():  # killed between the two renames of files.atomic_folder
        os.rename(old, path)
    try:
        header = configs.load_json(path / COUNTERS)
        arrays = load_file(path / WEIGHTS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not a checkpoint: {error.filename or path / WEIGHTS} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
    counters = header.pop("counters", None)
    if not isinstance(counters, dict):
        raise ValueError(f"{path} is not a readable checkpoint: counters must be a table, got {counters!r}")
    return (arrays, counters), header


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def save_grid(path: Path, images: Array, columns: int) -> None:
    """Pictures [n,3,H,W] in [-1, 1] as one PNG, row by row."""
    import io

    from PIL import Image

    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    pixels = np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for i, picture in enumerate(pixels):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = picture
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, buffer.getvalue())


# ---- a run ------------------------------------------------------------------------------------------------------------


class Trainer(Protocol):
    """What a run saves and restores."""

    def state(self) -> State: ...
    def load_state(self, state: State) -> None: ...


def sections(config: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Each section of a configuration as an object of its dataclass; missing sections take their defaults, unknown ones are errors."""
    configs.check_keys("configuration", config, kinds)
    out = {}
    for name, kind in kinds.items():
        value = config.get(name, {})
        out[name] = value if isinstance(value, kind) else configs.from_dict(kind, value, f"[{name}]")
    return out


def warn_unused(config: Mapping[str, Any], section: str, keys: Sequence[str], why: str) -> None:
    """A warning for those of `keys` that the user has set although nothing reads them."""
    table = config.get(section)
    given = [f"{section}.{key}" for key in keys if isinstance(table, Mapping) and key in table]
    if given:
        warnings.warn(f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect: {why}", UserWarning, stacklevel=3)


def memory_plan(model: Any, trained: int, frozen: int, averaged: int, moments: int, activations: int) -> str:
    """What a run takes where `model` is, in words: all of it stays allocated but the activations, which come and go with a step.

    trained, frozen, averaged: numbers of parameters; moments, activations: bytes.
    """
    copies = model.device != "cpu" and model.dtype != "float32"  # working copies beside the masters
    parts = {"float32 masters" if copies else "weights": 4 * (trained + frozen)}
    if copies:
        parts[f"{model.dtype} weights"] = 2 * (trained + frozen)
    parts |= {"gradients": 4 * trained, "moments": moments, "average": 4 * averaged, "activations": activations}
    listed = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in parts.items())
    return f"memory on {model.device}: {listed}; together {sum(parts.values()) / 2**20:.0f} MiB"


class Run:
    """One training run in a folder: which step is next, metrics.jsonl, checkpoints, the progress bar and the time budget.

    Ctrl-C lets the step end, saves a checkpoint and says so; a second one stops at once, between two layers.

    With max_minutes the number of steps is planned once, from the time of the first steps; the plan is part of the checkpoint,
    so that a resumed run follows the same schedule as an uninterrupted one (a changed max_minutes makes a new plan).
    """

    PROBE = 12  # steps that are timed before the plan is made; the first two are not counted

    def __init__(self, out: str | Path, config: Mapping[str, Any], settings: Any, *, resume: bool, shown: Sequence[str]) -> None:
        self.out = Path(out)
        self.settings = settings
        self.shown = tuple(shown)
        self.steps: int = settings.steps
        self.first = 1
        self.config = {k: configs.to_dict(v) if not isinstance(v, dict) else v for k, v in config.items()}
        fixed = {k: {n: x for n, x in v.items() if n not in CONTROL} for k, v in self.config.items()}
        self.hash = config_hash(fixed)
        self._fixed = fixed
        self._planned = not settings.max_minutes
        found = checkpoints(self.out)
        if found and not resume:
            raise FileExistsError(f"{self.out} already holds a run (up to {found[-1].name}); resume it, or choose another folder")
        self._from = found[-1] if found else None
        self._stop = False  # Ctrl-C came

    def restore(self, trainer: Trainer) -> None:
        """Continues from the last complete checkpoint, if there is one, and opens the metrics."""
        self.out.mkdir(parents=True, exist_ok=True)
        for stale in [*self.out.glob(".step-*.tmp"), *self.out.glob(".step-*.old")]:
            shutil.rmtree(stale, ignore_errors=True)
        if self._from is not None:
            state, header = read_state(self._from)
            self._check_header(header)
            self._same_config(header["config"])
            check_state(state, trainer.state(), str(self._from))
            trainer.load_state(state)
            self.first = header["step"] + 1
            if header["steps"] and header["max_minutes"] == self.settings.max_minutes and not self._planned:
                self.steps, self._planned = min(self.steps, header["steps"]), True
        else:
            files.write_json(self.out / "config.json", {"hash": self.hash, **self.config})
        self._open_metrics()

    def _check_header(self, header: Mapping[str, Any]) -> None:
        for key, kind in (("config", dict), ("step", int), ("steps", int), ("max_minutes", (int, float))):
            if not isinstance(header.get(key), kind):
                raise ValueError(f"{self._from} is not the checkpoint of a run: {key} is {header.get(key)!r}")
        if not all(isinstance(section, dict) for section in header["config"].values()):
            raise ValueError(f"{self._from} is not the checkpoint of a run: its config must hold tables")

    def _same_config(self, saved: Mapping[str, Any]) -> None:
        changed = [
            f"{section}.{key}: {saved.get(section, {}).get(key)!r} -> {value!r}"
            for section, table in self._fixed.items()
            for key, value in table.items()
            if json.loads(json.dumps(value)) != saved.get(section, {}).get(key)
        ]
        if changed:
            what = "; ".join(changed)
            raise ValueError(f"{self._from} was made with other settings ({what}); only {', '.join(CONTROL)} may change on resume")

    def _open_metrics(self) -> None:
        """Drops what was logged after the checkpoint: those steps are made again."""
        path = self.out / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < self.first:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    continue  # the line during which the run was killed
        files.write_bytes(path, "".join(kept).encode())
        self._metrics = open(path, "a", encoding="utf-8")

    def __iter__(self) -> Iterator[int]:
        """Step numbers, counted from 1; stops at the planned end."""
        from tqdm.auto import tqdm

        self._bar = tqdm(total=self.steps, initial=self.first - 1, desc=self.out.name, unit="step", disable=None)
        self._began = self._last = time.perf_counter()
        try:
            with self._ctrl_c():
                step = self.first
                while step <= self.steps:
                    yield step
                    if self._stop:
                        raise KeyboardInterrupt
                    self._plan(step)
                    self._bar.update()
                    step += 1
        finally:
            self._bar.close()
            self._metrics.close()

    @contextlib.contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """Within the block a first Ctrl-C only asks for the end of the step, where what is there is a state to go on from."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
            yield  # another thread gets no signals, and another handler has its reasons
            return

        def ask(number: int, frame: Any) -> None:
            if self._stop:
                signal.default_int_handler(number, frame)
            self._stop = True
            tqdm_write("interrupted: this step ends and is saved; once more stops at once and loses what came after the last checkpoint")

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _plan(self, step: int) -> None:
        done = step - self.first + 1
        if done == 2:
            self._probe = time.perf_counter()
        if not self._planned and done == self.PROBE:
            seconds = (time.perf_counter() - self._probe) / (done - 2)
            left = self.settings.max_minutes * 60 - (time.perf_counter() - self._began)
            self.steps = min(self.steps, step + max(1, int(left / seconds)))
            self._planned = True
            self._bar.total = self.steps
            tqdm_write(f"{seconds:.3f} s a step: {self.steps} steps fit into {self.settings.max_minutes:g} minutes")

    def log_all(self, steps: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Several steps at once, such as a GPU made them while nobody looked; the first look at their metrics waits for them."""
        for _, metrics in steps:
            len(metrics)
        seconds = (time.perf_counter() - self._last) / max(1, len(steps))
        for step, metrics in steps:
            self.log(step, metrics, seconds)

    def log(self, step: int, metrics: Mapping[str, Any], seconds: float | None = None) -> None:
        """One line of metrics.jsonl, and the chosen ones and the speed beside the bar. seconds: since the last logged step, unless given."""
        now = time.perf_counter()
        seconds, self._last = now - self._last if seconds is None else seconds, now
        speed = self.settings.batch / max(seconds, 1e-9)
        line = {"step": step, **metrics, "samples_per_second": round(speed, 4), "seconds": round(seconds, 4)}
        self._metrics.write(json.dumps(line) + "\n")
        if step % 20 == 0:
            self._metrics.flush()
        shown = {k: f"{metrics[k]:.3g}" for k in self.shown if k in metrics}
        self._bar.set_postfix({**shown, "samples/s": f"{speed:.3g}"}, refresh=False)

    def due(self, step: int, every: int) -> bool:
        """Whether something done `every` so many steps (0: never) is due, as it always is at the end."""
        return every > 0 and (step % every == 0 or step == self.steps)

    def saves(self, step: int) -> bool:
        """Whether `checkpoint` will save: when due, and after Ctrl-C."""
        due = self.due(step, self.settings.checkpoint_every) and (self._planned or step == self.steps)
        return due or self._stop

    def checkpoint(self, step: int, trainer: Trainer) -> None:
        """Saves when due or after Ctrl-C, and removes all but the last ones."""
        if not self.saves(step):
            return
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        plan = {"step": step, "steps": self.steps if self._planned else 0, "max_minutes": self.settings.max_minutes}
        path = self.out / f"step-{step:08d}"
        save_state(path, trainer.state(), **plan, config=self._fixed, hash=self.hash)
        if self._stop:
            tqdm_write(f"step {step} of {self.steps} is saved in {path}: resume the run to go on from there")
        for old in checkpoints(self.out)[: -self.settings.keep]:
            shutil.rmtree(old)


def tqdm_write(text: str) -> None:
    """A line on stderr that does not break the progress bar."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)
