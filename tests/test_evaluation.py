"""The metrics against closed forms and plain loops; the feature network's gradients; the table on pipelines whose quality is
known."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support
import tiny

from ladd.data import openmoji
from ladd.evaluation import classifier, evaluate, metrics

# ---- metrics -----------------------------------------------------------------------------------------------------------


def with_moments(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """n points whose sample mean and covariance are exactly these."""
    points = np.random.default_rng(seed).standard_normal((n, len(mean)))
    points -= points.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False)))
    return points @ whiten.T @ np.linalg.cholesky(covariance).T + mean


def test_fid_of_diagonal_gaussians_is_the_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 4.0, 1.0])
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 2.0])
    wanted = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    x, y = with_moments(50, mean_a, np.diag(a), 0), with_moments(70, mean_b, np.diag(b), 1)
    assert metrics.frechet_distance(x, y) == pytest.approx(wanted, rel=1e-10)
    assert metrics.frechet_distance(y, x) == pytest.approx(wanted, rel=1e-10)
    assert metrics.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_fid_of_covariances_that_do_not_commute() -> None:
    rng = np.random.default_rng(3)
    first, second = (m @ m.T + 0.1 * np.eye(6) for m in rng.standard_normal((2, 6, 6)))
    eigenvalues = np.linalg.eigvals(first @ second)
    wanted = np.trace(first) + np.trace(second) - 2 * np.sqrt(eigenvalues.real).sum()
    x, y = with_moments(40, np.zeros(6), first, 4), with_moments(40, np.zeros(6), second, 5)
    assert metrics.frechet_distance(x, y) == pytest.approx(wanted, rel=1e-9)


def test_fid_with_fewer_pictures_than_features_is_finite() -> None:
    x, y = support.normal(6, 5, 20), support.normal(7, 8, 20)
    assert np.isfinite(metrics.frechet_distance(x, y))
    assert metrics.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)


def test_square_root_of_a_singular_matrix() -> None:
    vector = np.array([[1.0], [2.0], [-1.0]])
    root = metrics.sqrt_psd(vector @ vector.T)
    np.testing.assert_allclose(root @ root, vector @ vector.T, atol=1e-12)


def test_polynomial_mmd_is_the_unbiased_double_sum() -> None:
    x, y = (support.normal(seed, n, 4).astype(np.float64) for seed, n in ((8, 6), (9, 5)))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    within_x = np.mean([k(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert metrics.polynomial_mmd(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)
    # With every picture in the one subset there is nothing random left.
    mean, deviation = metrics.kernel_distance(x[:5], y, subsets=3, size=5)
    assert mean == pytest.approx(metrics.polynomial_mmd(x[:5], y), rel=1e-12)
    assert deviation == pytest.approx(0.0, abs=1e-12)


def test_kid_sees_a_shift_and_no_difference() -> None:
    x, y = support.normal(10, 400, 8), support.normal(11, 400, 8)
    same, deviation = metrics.kernel_distance(x, y, seed=1)
    shifted, _ = metrics.kernel_distance(x, y + 0.5, seed=1)
    assert abs(same) < 3 * deviation
    assert shifted > 10 * deviation
    assert metrics.kernel_distance(x, y, seed=1) == (same, deviation)


def test_word_recall_grants_as_many_words_as_the_caption_has() -> None:
    scores = np.array([[5, 4, 3, 2, 1], [5, 4, 3, 2, 1], [5, 4, 3, 2, 1]], np.float32)
    words = [np.array([0, 1]), np.array([0, 4, 3]), np.array([], int)]
    recall = metrics.word_recall(scores, words)
    assert recall[0] == 1.0
    assert recall[1] == pytest.approx(1 / 3)
    assert np.isnan(recall[2])
    assert metrics.mean_recall(scores, words) == pytest.approx(2 / 3)
    assert np.isnan(metrics.mean_recall(scores, [np.array([], int)] * 3))


def test_spread_within_prompts_against_plain_loops() -> None:
    rng = np.random.default_rng(12)
    group = np.array([2, 0, 0, 1, 2, 0, 3, 2])  # group 1 and 3 have one picture: they say nothing
    background = np.array([1, 0, 0, 5, 2, 1, 6, 1])
    free = np.array([True, False, False, True, True, False, True, True])  # only group 2 leaves its background open
    place, scale, features = rng.standard_normal((8, 2)), rng.standard_normal(8), rng.standard_normal((8, 3))
    got = metrics.within_prompt_spread(group, background=background, free=free, place=place, scale=scale, features=features)
    members = [np.flatnonzero(group == g) for g in (0, 2)]
    assert got.background == pytest.approx(2 / 3)  # pairs (1,2), (1,1), (2,1)
    assert got.place == pytest.approx(np.sqrt(np.mean([place[m].var(axis=0, ddof=1).mean() for m in members])))
    assert got.scale == pytest.approx(np.sqrt(np.mean([scale[m].var(ddof=1) for m in members])))
    distances = [[np.linalg.norm(features[i] - features[j]) for i in m for j in m if i < j] for m in members]
    assert got.features == pytest.approx(np.mean([np.mean(d) for d in distances]))


def test_relative_diversity_does_not_let_too_much_hide_too_little() -> None:
    real = metrics.Spread(background=0.5, place=0.1, scale=0.1, features=2.0)
    half = metrics.Spread(background=1.0, place=0.05, scale=0.1, features=1.0)
    ratios = metrics.relative_diversity(half, real)
    assert ratios == pytest.approx({"background": 2.0, "place": 0.5, "scale": 1.0, "features": 0.5, "overall": 2.5 / 3})


def test_nearest_distance_is_that_of_a_plain_search() -> None:
    x, bank = support.normal(13, 30, 5), support.normal(14, 40, 5)
    bank[7] = x[3]
    wanted = [min(np.linalg.norm(a.astype(np.float64) - b) for b in bank) for a in x]
    np.testing.assert_allclose(metrics.nearest_distance(x, bank, chunk=7), wanted, rtol=1e-6, atol=1e-12)
    assert metrics.nearest_distance(x, bank)[3] == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.frechet_distance(np.zeros((4, 3)), np.zeros((4, 2))), "3 and 2"),
        (lambda: metrics.frechet_distance(np.zeros((1, 3)), np.zeros((4, 3))), "N >= 2"),
        (lambda: metrics.frechet_distance(np.full((4, 3), np.nan), np.zeros((4, 3))), "NaN"),
        (lambda: metrics.kernel_distance(np.zeros((8, 3)), np.zeros((6, 3)), size=7), "smaller set's 6, got 7"),
        (lambda: metrics.word_recall(np.zeros((2, 3)), [np.array([0])]), "1 captions"),
        (lambda: metrics.nearest_distance(np.zeros((2, 3)), np.zeros((0, 3))), "must not be empty"),
    ],
)
def test_metrics_refuse_what_they_cannot_measure(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- the feature network -----------------------------------------------------------------------------------------------

TINY = {"size": 16, "channels": (8, 8, 16, 16, 16, 16), "groups": 4, "features": 8}


def tiny_network(seed: int = 1) -> classifier.FeatureNetwork:
    return classifier.FeatureNetwork(classifier.FeatureNetworkConfig(("red", "heart", "cat", "dog"), ("white", "pink"), **TINY), seed=seed)


def test_content_words() -> None:
    assert classifier.content_words("man with a hat and a cat in the hat") == ["man", "hat", "cat"]


def test_gradients_of_the_feature_network() -> None:
    """Directional derivatives of the loss, one direction a tensor."""
    network, rng = tiny_network(), np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    words = np.array([[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    targets = classifier.Targets(words, np.array([0, 1, 1]), support.normal(1, 3, 3))

    def loss() -> float:
        return sum(network.loss(network.forward(images)[1], targets)[0].values())

    _, outputs, saved = network.forward(images, keep=True)
    network.backward(network.loss(outputs, targets)[1], saved)
    for name, value in network.tensors.items():
        gradient, before = network.gradients[name], value.copy()
        direction = gradient / np.linalg.norm(gradient)
        step = np.float32(4e-3)
        value[...] = before + step * direction
        above = loss()
        value[...] = before - step * direction
        below = loss()
        value[...] = before
        assert (above - below) / (2 * step) == pytest.approx(np.linalg.norm(gradient), rel=1e-2), name


def test_feature_network_survives_its_file(tmp_path: Any) -> None:
    network = tiny_network()
    images = np.random.default_rng(0).uniform(-1, 1, (5, 3, 16, 16)).astype(np.float32)
    network.save(tmp_path / "a", {"steps": 3})
    first = classifier.FeatureNetwork.from_pretrained(tmp_path / "a")
    for name, value in network.tensors.items():
        assert support.same_bits(first.tensors[name], value.astype(np.float16).astype(np.float32)), name
    first.save(tmp_path / "b")
    second = classifier.FeatureNetwork.from_pretrained(tmp_path / "b")
    assert support.same_bits(first.predict(images, batch=2).features, second.predict(images, batch=2).features)
    assert (tmp_path / "a" / "model.safetensors").stat().st_size < 2.2 * network.flat.size + 4096


def test_feature_network_refuses_other_files(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m ladd\.evaluation\.classifier"):
        classifier.FeatureNetwork.from_pretrained(tmp_path)
    tiny_network().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "features": 9}))
    with pytest.raises(ValueError, match="misshapen"):
        classifier.FeatureNetwork.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "groups": 3}))
    with pytest.raises(ValueError, match="multiples of groups"):
        classifier.FeatureNetwork.from_pretrained(tmp_path)


def test_feature_network_checks_the_pictures() -> None:
    with pytest.raises(ValueError, match=r"\[B,3,16,16\], got \(2, 3, 8, 8\)"):
        tiny_network().forward(np.zeros((2, 3, 8, 8), np.float32))


def test_targets_say_what_a_view_shows() -> None:
    record = openmoji.Record(0, "X", "red cat of unicorns", "X", "", "", "", "train")
    views = [openmoji.View(record, "pink", 0.8, (0.0, 1.0), "red cat of unicorns")]
    targets = tiny_network().targets(views)
    np.testing.assert_array_equal(targets.words, [[0.5, 0, 0.5, 0]])
    np.testing.assert_array_equal(targets.background, [1])
    np.testing.assert_allclose(targets.geometry, [[-1.0, 1.0, -0.5]], atol=1e-6)  # a free room of 0.2, wholly to the right and above


def test_training_lowers_the_loss() -> None:
    records = openmoji.train_records()[:6]
    settings = {
        "steps": 120,
        "batch": 16,
        "lr": 1e-2,
        "warmup_steps": 5,
        "channels": (8, 8, 16, 16, 16, 16),
        "features": 16,
        "progress": False,
    }
    network, history = classifier.train(records, **settings)
    for name, share in (("words", 0.9), ("background", 0.9), ("geometry", 0.3)):
        assert np.mean([row[name] for row in history[-5:]]) < share * np.mean([row[name] for row in history[:5]]), name
    again, repeated = classifier.train(records, **settings)
    assert repeated == history
    assert support.same_bits(again.flat, network.flat)


# ---- the table ---------------------------------------------------------------------------------------------------------


def test_pictures_of_a_prompt_share_what_it_says_and_vary_in_the_rest() -> None:
    prompts = evaluate.prompt_set(openmoji.train_records(), 1200, 2, seed=5)
    pairs = list(zip(prompts.views[::2], prompts.views[1::2], strict=True))
    assert len(pairs) == 600
    assert all(a.record == b.record and a.text == b.text for a, b in pairs)
    assert all(a.scale != b.scale and a.place != b.place for a, b in pairs)
    named = [(a, b) for a, b in pairs if a.text != a.record.name]
    assert 0.2 < len(named) / len(pairs) < 0.3  # half are white, a quarter coloured and named
    assert all(a.background == b.background != "white" for a, b in named)
    open_ = [b.background == "white" for a, b in pairs if a.text == a.record.name]
    assert 0.6 < np.mean(open_) < 0.73  # two thirds, given that no colour is named


class Drawings:
    """A pipeline that draws a real view for every prompt, or the same grey square."""

    guidance_scale = 3.0
    model = SimpleNamespace(dtype="float32", device="cpu")

    def __init__(self, perfect: bool) -> None:
        self.perfect = perfect
        self.records = {record.name: record for record in openmoji.train_records() + openmoji.heldout_records("combination")}
        self.vae = SimpleNamespace(encode=lambda images: images, decode=lambda latents: latents)
        self.calls: list[tuple[int, float, int]] = []
        self.seeds: set[int] = set()

    def __call__(self, prompts: list[str], *, steps: int, guidance_scale: float, seed: list[int], batch_size: int) -> Any:
        from PIL import Image

        self.calls.append((steps, guidance_scale, len(prompts)))
        self.seeds.update(seed)
        images = []
        for prompt, number in zip(prompts, seed, strict=True):
            pixels = np.full((64, 64, 3), 128, np.uint8)
            if self.perfect:
                name, _, background = prompt.partition(" on a ")
                drawn = np.random.default_rng(number).random(4)
                open_ = "white" if drawn[0] < 2 / 3 else list(openmoji.PALETTE)[int(drawn[0] * 23) % 8]
                view = openmoji.render(
                    self.records[name],
                    0.7 + 0.3 * drawn[1],
                    (drawn[2], drawn[3]),
                    background.removesuffix(" background") or open_,
                )
                pixels = evaluate.to_bytes(view).transpose(1, 2, 0)
            images.append(Image.fromarray(pixels))
        return SimpleNamespace(images=images)


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory: Any) -> Any:
    """A feature network with random weights: enough to tell drawings from grey squares."""
    folder = tmp_path_factory.mktemp("classifier")
    vocabulary = sorted({word for record in openmoji.train_records() for word in classifier.content_words(record.name)})
    config = classifier.FeatureNetworkConfig(tuple(vocabulary), openmoji.BACKGROUNDS, channels=(8, 8, 16, 16, 16, 16), features=16)
    network = classifier.FeatureNetwork(config, seed=2)
    network.save(folder)
    return folder


def test_table_of_a_perfect_and_a_useless_model(network_folder: Any, tmp_path: Any) -> None:
    teacher, student = Drawings(perfect=True), Drawings(perfect=False)
    result = evaluate.run(
        "drawings",
        tmp_path,
        pictures=96,
        held_out_pictures=48,
        seeds=(0, 1),
        reference_pictures=256,
        splits=("train", "combination"),
        classifier=network_folder,
        pipelines={"teacher": teacher, "student": student},
        progress=False,
    )
    table = result["splits"]["train"]
    assert set(table) == {row.name for row in evaluate.default_rows()}
    for row in table.values():
        assert set(row) >= {"fid", "kid", "recall", "diversity_overall", "nearest_features", "nearest_pixels"}
    real, perfect, useless = (table[name] for name in ("real pictures", "teacher, 4 steps", "student, 1 step"))
    assert real["diversity_overall"]["mean"] == 1.0
    assert table["autoencoder"]["fid"]["mean"] == pytest.approx(real["fid"]["mean"])  # the stub's autoencoder changes nothing
    assert perfect["fid"]["mean"] < 0.2 * useless["fid"]["mean"]
    assert perfect["kid"]["mean"] < 0.2 * useless["kid"]["mean"]
    assert perfect["diversity_features"]["mean"] == pytest.approx(1.0, abs=0.2)
    assert useless["diversity_features"]["mean"] < 1e-4  # the same square in another place of a batch: rounding only
    assert perfect["nearest_pixels"]["mean"] < useless["nearest_pixels"]["mean"]
    # 50, 4 guided and 4, 2, 1 unguided steps, in batches of 32, for both seeds and both splits.
    assert teacher.calls[:3] == [(50, 3.0, 32)] * 3
    assert sorted({call[:2] for call in teacher.calls}) == [(1, 1.0), (2, 1.0), (4, 1.0), (4, 3.0), (50, 3.0)]
    assert result["bar"]["met"] is False
    # Every row has the same seeds, each evaluation seed its own, and none is a seed of `ladd generate` (run.seed << 32, upwards).
    assert teacher.seeds == student.seeds and len(teacher.seeds) == 2 * 96 and min(teacher.seeds) >= 1 << 62
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["seeds"]["train"]["1"]["student, 1 step"]["fid"] == result["seeds"]["train"]["1"]["student, 1 step"]["fid"]
    page = (tmp_path / "evaluation.md").read_text()
    assert "the row of real pictures shows by how much" in page
    result["bar"]["four_steps"]["fid_ratio_above_real"] = 1.5
    assert "(at most 1.2; x1.50 of what lies above real pictures), recall" in evaluate.markdown(result)
    assert "they compare with nothing" in page
    assert page.count("| student, 1 step |") == 2
    assert "**not met**" in page


def summary(**fid: float) -> dict[str, Any]:
    names = {
        "one": "student, 1 step",
        "four": "student, 4 steps",
        "plain": "teacher, 4 steps",
        "guided": "teacher, 4 steps, guided",
    }
    names["fifty"] = "teacher, 50 steps, guided"
    numbers = ("recall", "diversity_overall")
    return {names[key]: {"fid": {"mean": value, "std": 0.0}, **{n: {"mean": 0.8, "std": 0.0} for n in numbers}} for key, value in fid.items()}


def test_the_bar() -> None:
    good = summary(one=3.0, four=2.4, plain=9.0, guided=3.1, fifty=2.0)
    assert evaluate.bar(good)["met"] is True
    assert np.isnan(evaluate.bar(good)["four_steps"]["fid_ratio_above_real"])
    good["real pictures"] = {"fid": {"mean": 1.5, "std": 0.0}}
    assert evaluate.bar(good)["four_steps"]["fid_ratio_above_real"] == pytest.approx(0.9 / 0.5)
    assert evaluate.bar(summary(one=3.2, four=2.4, plain=9.0, guided=3.1, fifty=2.0))["one_step"]["met"] is False
    assert evaluate.bar(summary(one=3.0, four=2.5, plain=9.0, guided=3.1, fifty=2.0))["four_steps"]["met"] is False
    good["student, 4 steps"]["recall"]["mean"] = 0.7
    assert evaluate.bar(good)["four_steps"]["met"] is False
    del good["teacher, 4 steps"]
    assert evaluate.bar(good) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ("train", "test")}, r"base, combination, got \['train', 'test'\]"),
        ({"seeds": ()}, "seeds must be different"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"rows": [evaluate.Row("x", "other", 1)]}, "rows need the pipelines other"),
        ({"views": 1}, "views must be at least 2"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_evaluation_refuses_impossible_settings(network_folder: Any, changes: dict[str, Any], message: str) -> None:
    settings = {
        "pictures": 8,
        "reference_pictures": 8,
        "classifier": network_folder,
        "pipelines": {"student": Drawings(False)},
        "rows": [],
        "progress": False,
    }
    with pytest.raises(ValueError, match=message):
        evaluate.run("drawings", **{**settings, **changes})


def test_pictures_of_another_size_are_resized() -> None:
    from PIL import Image

    assert evaluate.as_array([Image.new("L", (16, 16), 255), Image.new("RGB", (64, 64))], 64).shape == (2, 3, 64, 64)
    small = np.zeros((1, 3, 4, 4), np.uint8)
    np.testing.assert_allclose(np.linalg.norm(evaluate._small(small) - evaluate._small(small + 255)), 2.0)  # the whole range


# ---- a real pipeline ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: Any) -> Any:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def test_evaluation_of_a_pipeline_folder(tiny_folder: Any, network_folder: Any) -> None:
    """Random weights make no pictures, but every row is sampled, and again to the same numbers."""
    rows = [row for row in evaluate.default_rows() if row.steps <= 4]
    settings = {"pictures": 8, "seeds": (0,), "reference_pictures": 64, "splits": ("train",), "rows": rows, "progress": False}
    first, second = (evaluate.run(tiny_folder, classifier=network_folder, batch=b, **settings) for b in (8, 3))
    assert first["settings"]["guidance_scale"] == 2.5  # the teacher's own
    for row in rows:
        numbers = first["splits"]["train"][row.name]
        assert np.isfinite(numbers["fid"]["mean"])
        assert numbers["fid"]["mean"] == pytest.approx(second["splits"]["train"][row.name]["fid"]["mean"], rel=1e-3), row.name
    assert first["bar"] is None  # the teacher's fifty steps were left out


def test_a_model_without_a_teacher_is_measured_without_it(tiny_folder: Any, network_folder: Any, tmp_path: Any) -> None:
    shutil.copytree(tiny_folder, tmp_path / "half")
    table = json.loads((tmp_path / "half" / "ladd.json").read_text())
    del table["models"]["teacher"]
    (tmp_path / "half" / "ladd.json").write_text(json.dumps(table))
    settings = {"pictures": 8, "held_out_pictures": 8, "seeds": (3,), "reference_pictures": 64, "splits": ("base",), "progress": False}
    result = evaluate.run(tmp_path / "half", classifier=network_folder, **settings)
    sources = {row["source"] for row in result["settings"]["rows"]}
    assert sources == {"real", "vae", "student"}
    assert result["bar"] is None
    table["models"] = {"other": table["models"]["student"]}
    (tmp_path / "half" / "ladd.json").write_text(json.dumps({**table, "default": "other"}))
    with pytest.raises(ValueError, match='must hold a "teacher" or a "student", got other'):
        evaluate.load_pipelines(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        evaluate.load_pipelines(tmp_path / "none")
