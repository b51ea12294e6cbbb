"""The command line: `ladd demo | sample | train | generate | distill | evaluate | export | info`.

A failure is one line on stderr and exit status 2; --traceback shows where it came from. What a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# command -> stages of a configuration that it runs, each a module of ladd.training with run(config, *, out, resume, dry_run, device, dtype)
_TRAINED_BY = {"train": ("autoencoder", "teacher"), "generate": ("generate",), "distill": ("distill",)}
_ERRORS = (ValueError, TypeError, OSError, MemoryError, RuntimeError, ArithmeticError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        with _warnings_on_one_line():
            if options.threads is not None:
                from . import _core

                _core.set_num_threads(options.threads)
            options.call(options)
    except KeyboardInterrupt:
        print("ladd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has gone; say nothing
        return 0
    except _ERRORS as error:
        if options.traceback:
            raise
        text = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        text = " ".join(text.split())
        print(f"ladd: error: {text}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        print(f"ladd: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


# ---- arguments -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from . import __version__

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: the cores this process may use)")
    common.add_argument("--traceback", action="store_true", help="show where an error came from")

    top = argparse.ArgumentParser(prog="ladd", description="Latent adversarial diffusion distillation on a C core.")
    top.add_argument("--version", action="version", version=f"ladd {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, call: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(call=call)
        return sub

    _add_demo(command("demo", _demo, "distil a fresh one-step student from the shipped teacher and write a report"))
    _add_sample(command("sample", _sample, "make pictures from prompts"))
    for name, text in (
        ("train", "train an autoencoder or a teacher from a configuration"),
        ("generate", "write synthetic latents, sampled from a teacher"),
        ("distill", "distil a teacher into a few-step student"),
    ):
        _add_run(command(name, _run, text))
    _add_evaluate(command("evaluate", _evaluate, "measure the quality of a model's teacher and student"))
    _add_export(command("export", _export, "write a model in another precision or layout"))
    info = command("info", _info, "describe this installation, or a model")
    info.add_argument("path", nargs="?", help="a pipeline, a model's folder, or a .safetensors file")
    return top


def _add_demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    sub.add_argument("--minutes", type=float, default=5.0, metavar="N", help="of distillation (default: 5)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the distillation (default: float32)")


def _add_sample(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("prompt", nargs="+", help="one picture, or --num pictures, each")
    sub.add_argument("--model", default="openmoji", metavar="PATH", help='a pipeline folder, or "openmoji" (default)')
    sub.add_argument("--which", metavar="NAME", help='"student" or "teacher" (default: the folder\'s own)')
    sub.add_argument("--image", type=Path, metavar="PATH", help="a picture to start from")
    sub.add_argument("--strength", type=float, metavar="S", help="with --image: how far from it, 0 to 1 (default: 0.6; 1 with --mask)")
    sub.add_argument("--mask", type=Path, metavar="PATH", help="with --image: a picture that is white where it is painted anew")
    sub.add_argument("--steps", type=int, help="default: the model's own (at least 4 with --image)")
    sub.add_argument("--guidance-scale", type=float, metavar="G", help="default: the model's own; 1 is off")
    sub.add_argument("--negative-prompt", default="", metavar="TEXT")
    sub.add_argument("--method", metavar="NAME", help="euler or renoise (default: the model's own)")
    sub.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up (default: 0)")
    sub.add_argument("--num", type=int, default=1, metavar="N", help="pictures a prompt (default: 1)")
    _add_device(sub)
    sub.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels (default: the model's own)")
    sub.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures computed at once (default: 16)")
    sub.add_argument(
        "--out", type=Path, default=Path("samples.png"), metavar="PATH",
        help="a .png for all pictures on one sheet, or a folder for one file each (default: samples.png)",
    )  # fmt: skip


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="cpu", metavar="NAME", help='"cpu" (default), "cuda" or "cuda:1"')
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="what is computed in (default: bfloat16 on a GPU, else float32)"
    )


def _place(options: argparse.Namespace) -> dict[str, str]:
    return {"device": options.device, "dtype": options.dtype or ("float32" if options.device == "cpu" else "bfloat16")}


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", type=Path, help="a TOML file")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the run keeps its files")
    sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="changes one setting; may be repeated")
    sub.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in --out")
    sub.add_argument("--dry-run", action="store_true", help="check everything, print the memory plan, and stop")
    _add_device(sub)


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", nargs="?", default="openmoji", help='a pipeline folder, or "openmoji" (default)')
    sub.add_argument("--out", type=Path, metavar="DIR", help="where evaluation.json and evaluation.md go (default: the table is only printed)")
    sub.add_argument("--pictures", type=int, metavar="N", help="for each row and seed (default: 1024)")
    sub.add_argument("--held-out-pictures", type=int, metavar="N", help="the same for held-out prompts (default: 256)")
    sub.add_argument("--seeds", type=int, nargs="+", metavar="N", help="each is a repetition (default: 0 1 2)")
    sub.add_argument("--splits", nargs="+", metavar="NAME", help="groups of prompts: train, base, combination (default: all)")
    sub.add_argument("--guidance-scale", type=float, metavar="G", help="of the guided rows (default: the teacher's own)")
    sub.add_argument("--batch", type=int, metavar="N", help="pictures computed at once (default: 32)")
    sub.add_argument("--classifier", type=Path, metavar="DIR", help="the feature network (default: the shipped one)")
    _add_device(sub)


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", help='"openmoji", a pipeline folder, a model\'s folder, or a .safetensors file')
    sub.add_argument("target", type=Path, help="the folder to write, or the file for --layout single-file")
    sub.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights (default: float32)")
    sub.add_argument(
        "--layout", choices=("diffusers", "single-file"), default="diffusers",
        help="single-file: Stability's names, the transformer alone (default: diffusers)",
    )  # fmt: skip
    sub.add_argument("--which", metavar="NAME", help="only this transformer of a pipeline, such as student")


# ---- commands --------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    demo.run(_folder(options.out), options.minutes, dtype=options.dtype)


def _sample(options: argparse.Namespace) -> None:
    from .pipeline import Pipeline, grid

    # A name that ends in another picture type would become a folder without a word.
    if options.out.suffix not in ("", ".png"):
        raise ValueError(f"--out must be a .png file or a folder, got {options.out}")
    if options.out.suffix == "":
        _folder(options.out)
    for name in ("strength", "mask"):
        if getattr(options, name) is not None and options.image is None:
            raise ValueError(f"--{name} needs --image, the picture to change")
    image, mask = (None if path is None else _open_picture(path) for path in (options.image, options.mask))
    pipe = Pipeline.from_pretrained(options.model, model=options.which, **_place(options))
    result = pipe(
        options.prompt,
        image=image,
        strength=options.strength,
        mask=mask,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        negative_prompt=options.negative_prompt,
        num_images_per_prompt=options.num,
        size=None if options.size is None else tuple(options.size),
        method=options.method,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )
    if options.out.suffix == ".png":
        options.out.parent.mkdir(parents=True, exist_ok=True)
        grid(result.images).save(options.out)
        print(options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(result.images):
        path = options.out / f"{i:05d}-seed{result.seeds[i]}.png"
        image.save(path)
        print(path)


def _folder(path: Path) -> Path:
    """--out, before work begins that a file in its place would waste."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out must be a folder, got the file {path}")
    return path


def _open_picture(path: Path) -> Any:
    from PIL import Image

    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture {path}") from None
    except Exception as error:  # Pillow's readers raise all kinds of errors on damaged files
        raise ValueError(f"{path} is not a readable picture: {error}") from None
    return picture


def _run(options: argparse.Namespace) -> None:
    from .config import load_toml

    config = load_toml(options.config, options.set)
    stage = config.pop("stage", None)
    allowed = _TRAINED_BY[options.command]
    if stage not in allowed:
        raise ValueError(f"{options.config}: stage must be {' or '.join(map(repr, allowed))} for `ladd {options.command}`, got {stage!r}")
    module = importlib.import_module(f".training.{stage}", __package__)
    result = module.run(config, out=_folder(options.out), resume=options.resume, dry_run=options.dry_run, **_place(options))
    if result is not None:
        print(result)


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation import evaluate

    names = ("pictures", "held_out_pictures", "seeds", "splits", "guidance_scale", "batch", "classifier")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given |= _place(options)
    out = None if options.out is None else _folder(options.out)
    result = evaluate.run(options.model, out, progress=sys.stderr.isatty(), **given)
    print(evaluate.markdown(result))


def _export(options: argparse.Namespace) -> None:
    from .models import MMDiT
    from .pipeline import Pipeline, model_names, pipeline_folder, save_pipeline

    source = pipeline_folder(options.source)
    if options.target.exists() and (options.target.is_file() or any(options.target.iterdir())):
        raise FileExistsError(f"{options.target} exists already; export writes a new file or folder")
    if (source / "ladd.json").is_file() and options.which is None and options.layout == "diffusers":
        pipes = {name: Pipeline.from_pretrained(source, model=name) for name in model_names(source)}
        first = next(iter(pipes.values()))
        models = {name: pipe.model for name, pipe in pipes.items()}
        settings = {name: pipe.settings for name, pipe in pipes.items()}
        save_pipeline(options.target, models, first.vae, first.text, settings, dtype=options.dtype)
    else:
        model, save_as = _one_model(source, options.which)
        if options.layout == "diffusers":
            model.save_pretrained(options.target, dtype=options.dtype)
        elif isinstance(model, MMDiT) and options.target.suffix == ".safetensors":
            _write_single_file(model, options.target, options.dtype)
        else:
            raise ValueError(f"--layout single-file writes a transformer to a .safetensors file, got {save_as} and {options.target}")
    print(options.target)


def _one_model(source: Path, which: str | None) -> tuple[Any, str]:
    """The transformer or autoencoder of a folder or file, and its class's name."""
    from .config import load_json
    from .models import AutoencoderKL, MMDiT
    from .pipeline import read_settings

    if (source / "ladd.json").is_file():
        return MMDiT.from_pretrained(source / read_settings(source, which).folder), "MMDiT"
    if which is not None:
        raise ValueError(f"--which names a transformer of a pipeline folder; {source} has no ladd.json")
    path = source / "config.json"
    if path.is_file() and load_json(path).get("_class_name") == "AutoencoderKL":
        return AutoencoderKL.from_pretrained(source), "AutoencoderKL"
    return MMDiT.from_pretrained(source), "MMDiT"


def _write_single_file(model: Any, target: Path, dtype: str) -> None:
    from .single_file import mmdit_to_single
    from .weights import write_safetensors

    target.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(target, mmdit_to_single(model.state_dict(), model.config), dtype=dtype)


def _info(options: argparse.Namespace) -> None:
    table = _describe_installation() if options.path is None else _describe_path(options.path)
    print(json.dumps(table, indent=2, ensure_ascii=False))


def _describe_installation() -> dict[str, Any]:
    from . import __version__, _core
    from .pipeline import PRETRAINED

    shipped = sorted(p.parent.name for p in PRETRAINED.glob("*/ladd.json"))
    return {
        "version": __version__,
        "instruction set": _core.backend_name(),
        "threads": _core.get_num_threads(),
        "openblas": _core.openblas_config(),
        "cuda": _describe_gpu(),
        "pretrained": shipped,
    }


def _describe_gpu() -> dict[str, Any] | str:
    """What the first GPU is, or why there is none."""
    from . import device

    try:
        opened = device.get("cuda")
        assert opened is not None
        return opened.info()
    except RuntimeError as error:
        return str(error)


def _describe_path(given: str) -> dict[str, Any]:
    """What a pipeline, folder or file holds, from headers and configurations alone."""
    from .config import load_json, to_dict
    from .pipeline import model_names, pipeline_folder, read_settings
    from .weights import load_autoencoder, load_mmdit

    path = pipeline_folder(given)
    if (path / "ladd.json").is_file():
        parts = {}
        for name in model_names(path):
            settings = read_settings(path, name)
            parts[name] = {**_describe_path(str(path / settings.folder)), "sampling": to_dict(settings)}
        return {"default": model_names(path)[0], "models": parts, "vae": _describe_path(str(path / "vae"))}
    if path.is_dir() and (path / "config.json").is_file() and load_json(path / "config.json").get("_class_name") == "AutoencoderKL":
        name, (config, tensors) = "AutoencoderKL", load_autoencoder(path)
        described = to_dict(config)
    else:
        name, (mmdit, tensors) = "MMDiT", load_mmdit(path)
        described = to_dict(mmdit)
    elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return {"class": name, "tensors": len(tensors), "elements": elements, "config": described}
