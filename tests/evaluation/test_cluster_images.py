"""`maect-fast cluster`: the table, the scores, and the gallery in a browser."""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import csv, parquet
from sklearn.datasets import make_blobs
from sklearn.metrics import silhouette_score

from maect_fast.cli import main
from maect_fast.config import ConfigError, DataConfig, EncoderConfig
from maect_fast.convert import export_timm
from maect_fast.data import TensorSource, build_source
from maect_fast.evaluation import Features, cluster_gallery
from maect_fast.evaluation.cluster_gallery import choose_shown
from maect_fast.evaluation.cluster_images import cluster_features
from maect_fast.evaluation.clustering import score_clusters, score_numbers
from maect_fast.evaluation.encoders import open_encoder
from maect_fast.evaluation.runs import split_features
from maect_fast.models.encoder import Encoder

COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 40), "red": (230, 30, 20)}
PER_CLASS = 20
SETTINGS = ["device=cpu", "data.workers=0", "encoder.num_heads=2", "head.pooling=mean_patch"]


class Made(NamedTuple):
    out: Path
    printed: str
    rows: list[dict[str, Any]]
    features: Features


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with an encoder of random weights, which sees colours."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24}
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.save({"model": export_timm(Encoder(EncoderConfig(num_heads=2, **sizes)))}, path)
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours in class folders, of which one file is damaged; names that are markup."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(PER_CLASS):
            noise = rng.normal(0, 12, (20, 24, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"<b>{i:02d}&amp;.png")
    (folder / "green" / "damaged.png").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def made(weights: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The command's files, and the features that it should have used."""
    out = tmp_path_factory.mktemp("out") / "clusters"
    root = f"data.root={images}"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["cluster", weights, "--out", str(out), "--k", "3", root, *SETTINGS]) == 0
    opened = open_encoder(weights, [root, *SETTINGS])
    features = split_features(opened.config, "train", opened.encoder).features
    rows = csv.read_csv(out / "clusters.csv").to_pylist()
    return Made(out, printed.getvalue(), rows, features)


def test_the_table_has_a_row_per_image_that_was_asked_for(made: Made, images: Path) -> None:
    assert list(made.rows[0]) == ["path", "id", "label", "class", "cluster", "distance", "missing"]
    assert len(made.rows) == 3 * PER_CLASS + 1
    paths = sorted(str(path) for path in images.glob("*/*.png"))
    assert [row["path"] for row in made.rows] == paths
    assert [row["id"] for row in made.rows] == list(range(len(paths)))
    for row in made.rows:
        assert row["class"] == Path(row["path"]).parent.name == sorted(COLOURS)[row["label"]]
    missing = [row for row in made.rows if row["missing"]]
    assert [Path(row["path"]).name for row in missing] == ["damaged.png"]
    assert missing[0]["cluster"] is None
    assert missing[0]["distance"] is None


def test_distances_are_those_of_the_clusters_means(made: Made) -> None:
    rows = [row for row in made.rows if not row["missing"]]
    cluster = np.array([row["cluster"] for row in rows])
    x = made.features.x.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for i in range(3):
        centre = x[cluster == i].mean(axis=0)
        cosine = x[cluster == i] @ centre / np.linalg.norm(centre)
        found = [row["distance"] for row in rows if row["cluster"] == i]
        np.testing.assert_allclose(found, 1 - cosine, atol=1e-6)


def test_sizes_and_scores_are_printed(made: Made) -> None:
    assert "60 images of " in made.printed
    assert "1 could not be read" in made.printed
    assert "sizes of the 3 clusters: 20 20 20" in made.printed
    assert "purity 1.000, NMI 1.000, ARI 1.000, ACC 1.000 (60 images of 3 classes)" in made.printed
    cluster = np.array([row["cluster"] for row in made.rows if not row["missing"]])
    score = silhouette_score(made.features.x.numpy(), cluster, metric="cosine")
    assert f"silhouette {score:.3f} (cosine" in made.printed


def test_unlabelled_images_as_parquet(
    weights: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` finds the three colours."""
    root = tmp_path / "images"
    root.mkdir()
    for name in COLOURS:
        for path in (images / name).glob("*0*.png"):
            shutil.copy(path, root / f"{name}{path.name}")
    out = tmp_path / "out"
    command = ["cluster", weights, "--out", str(out), "--format", "parquet", f"data.root={root}"]
    assert main([*command, *SETTINGS]) == 0
    printed = capsys.readouterr().out
    assert "3 clusters have the largest silhouette of those tried (2: 0." in printed
    assert "no labels: the images lie in no class folders" in printed
    rows = parquet.read_table(out / "clusters.parquet").to_pylist()
    colours = [{Path(r["path"]).name[:3] for r in rows if r["cluster"] == i} for i in range(3)]
    assert sorted(map(len, colours)) == [1, 1, 1]
    assert {row["label"] for row in rows} == {row["class"] for row in rows} == {None}


def test_more_clusters_than_images(
    weights: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cluster", weights, *SETTINGS, f"data.root={images}", "--out", str(tmp_path)]
    assert main([*command, "--k", "99"]) == 2
    told = "--k: expected at most as many clusters as images (60), got 99"
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_largest_cluster_is_the_first() -> None:
    x = torch.cat([torch.eye(3)[i].repeat(n, 1) for i, n in enumerate((2, 5, 3))])
    x += 0.01 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    found = cluster_features(Features(x=x, label=torch.full((10,), -1)), number=3)
    assert found.sizes == [5, 3, 2]
    assert found.cluster.tolist() == [2, 2, 0, 0, 0, 0, 0, 1, 1, 1]
    assert found.scores is None


def test_the_number_of_clusters_is_that_of_the_blobs() -> None:
    centres = F.normalize(torch.randn(7, 12, generator=torch.Generator().manual_seed(1)), dim=1)
    x, _ = make_blobs(105, centers=centres.numpy(), cluster_std=0.06, random_state=0)
    features = Features(x=torch.from_numpy(x).float(), label=torch.full((105,), -1))
    scores = score_numbers(features)
    assert list(scores) == list(range(2, 31))
    assert max(scores, key=scores.__getitem__) == 7


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_equal_images_say_no_number() -> None:
    same = Features(x=torch.ones(12, 4), label=torch.full((12,), -1))
    with pytest.raises(ConfigError, match=r"--k: 12 images, all alike or fewer than 4"):
        cluster_features(same, number="auto")
    # The three that were asked for are one.
    assert cluster_features(same, number=3).sizes == [12]


def test_purity_by_hand() -> None:
    label, cluster = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    scores = score_clusters(label, cluster)
    assert scores.purity == pytest.approx(4 / 6)
    assert score_clusters(label, torch.arange(6)).purity == 1
    assert scores.acc == pytest.approx(4 / 6)


def test_shown_images_are_the_nearest_and_the_farthest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_gallery, "MAX_SHOWN", 32)
    generator = torch.Generator().manual_seed(0)
    cluster = (torch.arange(300) >= 200).long()
    distance = torch.rand(300, generator=generator)
    shown = choose_shown(cluster, distance)
    for i, rows in enumerate((range(200), range(200, 300))):
        ranked = sorted(rows, key=distance.__getitem__)
        assert shown.central[i] == ranked[:12]
        assert shown.farthest[i] == ranked[:-5:-1]
    assert shown.outliers == torch.argsort(distance, descending=True)[:24].tolist()
    assert len(set(shown.rows)) == len(shown.rows)
    # Few images are all there.
    few = choose_shown(torch.tensor([0, 0, 1]), torch.rand(3))
    assert sorted(few.rows) == [0, 1, 2]


def test_small_grey_images_in_memory(tmp_path: Path) -> None:
    """Scikit-learn's digits: enlarged to thumbnails, without files."""
    sizes = EncoderConfig(img_size=8, in_chans=1, patch_size=4, depth=1, embed_dim=24, num_heads=2)
    torch.save({"model": export_timm(Encoder(sizes))}, tmp_path / "grey.pth")
    own = ["data.source=digits", "augment.mean=[0.3]", "augment.std=[0.4]"]
    command = ["cluster", str(tmp_path / "grey.pth"), "--out", str(tmp_path / "out"), "--k", "2"]
    assert main([*command, *SETTINGS, *own]) == 0
    text = (tmp_path / "out" / "gallery.html").read_text()
    shown = json.loads(text.partition('id="page">')[2].partition("</script>")[0])
    assert shown["numImages"] == 1437
    assert sum(cluster["size"] for cluster in shown["clusters"]) == 1437
    images = shown["images"]
    digits = build_source(DataConfig(source="digits"), sizes, split="train")
    assert isinstance(digits, TensorSource)
    for i in (0, 700):
        content = base64.b64decode(images["thumbnail"][i])
        thumbnail = np.asarray(Image.open(io.BytesIO(content))).astype(int)
        index = int(images["name"][i].removeprefix("image "))
        enlarged = digits.images[index, 0].numpy().astype(int).repeat(12, 0).repeat(12, 1)
        assert thumbnail.shape == (96, 96)
        # A JPEG blurs edges.
        assert np.abs(thumbnail - enlarged).mean() < 10


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, made: Made) -> Iterator[Any]:
    """The gallery, which may say nothing in the console and load nothing."""
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    url = (made.out / "gallery.html").as_uri()
    page.goto(url)
    yield page
    # Pictures are in the page itself.
    assert [line for line in said if not line.startswith("data:image/jpeg")] == [url]
    page.close()


def names(tiles: Any) -> list[str]:
    """File names of the tiles, from what a screen reader is told."""
    labels = [tile.get_attribute("aria-label") for tile in tiles.all()]
    return [label.split(",")[0].split("/")[1] for label in labels]


def test_the_page_shows_the_clusters(page: Any, made: Made) -> None:
    assert page.locator("h1").inner_text() == "60 images in 3 clusters"
    assert page.locator("section[id^=cluster-]").count() == 3
    assert "purity 1.000" in page.locator(".notes").inner_text()
    rows = [row for row in made.rows if not row["missing"]]
    for i in range(3):
        own = sorted((row for row in rows if row["cluster"] == i), key=lambda r: r["distance"])
        expected = [Path(row["path"]).name for row in own]
        tiles = page.locator(f"#cluster-{i} .tile")
        assert names(tiles) == [*expected[:-5], *expected[:-6:-1]]
        text = page.locator(f"#cluster-{i} header").inner_text()
        assert "20 images, 33 %" in text
        assert f"{own[0]['class']} 20" in text
    assert page.locator(".tile.odd").count() == 0
    farthest = sorted(rows, key=lambda row: -row["distance"])[:24]
    found = names(page.locator("#outliers .tile"))
    assert found == [Path(row["path"]).name for row in farthest]
    drawn = page.locator("#cluster-0 img").first
    assert drawn.evaluate("image => image.decode().then(() => image.naturalWidth)") == 96


def test_a_click_shows_the_nearest_neighbours(page: Any, made: Made) -> None:
    rows = [row for row in made.rows if not row["missing"]]
    x = made.features.x.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -2)
    paths = [row["path"].split("/")[-2:] for row in rows]
    for nth in (0, 7):
        tile = page.locator("#cluster-1 .tile").nth(nth)
        label = tile.get_attribute("aria-label")
        tile.click()
        row = paths.index(label.split(",")[0].split("/"))
        expected = np.argsort(-cosine[row])[:12]
        found = page.locator("aside .tile")
        assert names(found) == [paths[j][1] for j in expected]
        captions = [float(text) for text in page.locator("aside figcaption").all_inner_texts()]
        np.testing.assert_allclose(captions, cosine[row][expected], atol=6e-4)
        assert page.locator("aside h2").inner_text() == "/".join(paths[row])
        assert tile.get_attribute("aria-pressed") == "true"
    # From neighbour to neighbour.
    page.locator("aside .tile").first.click()
    assert page.locator("aside h2").inner_text() == "/".join(paths[expected[0]])


def test_the_keyboard_is_enough(page: Any) -> None:
    tiles = page.locator("#cluster-0 .tile")
    tiles.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    third = tiles.nth(2).get_attribute("data-image")
    assert page.locator("aside").get_attribute("data-image") == third
    page.keyboard.press("Escape")
    assert page.locator("aside").get_attribute("data-image") is None
    focused = "document.activeElement.dataset.image"
    assert page.evaluate(focused) == third
    page.keyboard.press("Home")
    assert page.evaluate(focused) == tiles.first.get_attribute("data-image")
    # One stop for each grid.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.grid').ariaLabel") == (
        "Cluster 0, images farthest from its centre"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_is_not_wider_than_it_is(page: Any, scheme: str) -> None:
    page.set_viewport_size({"width": 340, "height": 600})
    page.emulate_media(color_scheme=scheme)
    page.locator("#cluster-0 .tile").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 340
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 400) == (scheme == "light")
