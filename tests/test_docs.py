"""The documentation's Python runs as it is written, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ladd
from ladd import cli
from ladd.pipeline import PRETRAINED

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "guide.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_guide_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"guide.md, block {number}", "exec"), names)
    assert number == 5 and {p.name for p in tmp_path.iterdir()} == {"checkpoint", "student", "latents"}

    # The configuration in it, with the teacher where its comment says.
    for name in ("teacher_model", "vae"):
        names[name].save_pretrained("diffusers/" + {"teacher_model": "transformer"}.get(name, name))  # type: ignore[attr-defined]
    (toml,) = re.findall(r"^```\n# (ladd\.toml\n.*?)^```$", GUIDE.read_text(), re.M | re.S)
    Path("ladd.toml").write_text("#" + toml)
    assert cli.main(["distill", "ladd.toml", "--out", "run", "--dry-run", "--set", "data.teacher=diffusers"]) == 0
    assert not Path("run").exists()


def test_the_readme_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    teacher = ladd.Pipeline.from_pretrained("openmoji", model="teacher")
    context, pooled = teacher.text.encode(["red apple"])
    names = {"latents": teacher("red apple", steps=1).latents, "context": context, "pooled": pooled}
    folder = PRETRAINED / "openmoji" / "teacher"
    exec(compile(block.replace("path/to/transformer", str(folder)), "README.md", "exec"), names)
    assert Path("checkpoint").is_dir()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
