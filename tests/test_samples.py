"""The sample images are what data_samples/README.md says: complete, unchanged, leak-free, and made by the script beside them."""
import csv, hashlib, importlib.util, io, json, re, shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from rapidfuzz.distance import Levenshtein
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

ROOT = Path(__file__).resolve().parent.parent/"data_samples"
README = (ROOT/"README.md").read_text()


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_samples", ROOT/"make_samples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def labels():
    with open(ROOT/"digits"/"labels.csv", newline="") as f: return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def forms(): return json.loads((ROOT/"forms"/"forms.json").read_text())


@pytest.fixture(scope="module")
def pixels(labels): return np.stack([np.asarray(Image.open(ROOT/"digits"/r["file"])) for r in labels])


def amounts(forms, image): return [a for a in forms["annotations"] if a["image_id"] == image["id"]]


def sha(path): return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the files ----------------------------------------------------------------------------------------------------------------

def test_every_file_is_listed_and_unchanged(labels, forms):
    sums = dict(reversed(line.split("  ")) for line in (ROOT/"SHA256SUMS").read_text().splitlines())
    there = {p.relative_to(ROOT).as_posix() for d in ("digits", "forms") for p in (ROOT/d).rglob("*") if p.is_file()}
    named = {f"digits/{r['file']}" for r in labels} | {f"forms/{i['file_name']}" for i in forms["images"]}
    assert set(sums) == there == named | {"digits/labels.csv", "forms/forms.json"}
    assert [n for n in sums if sha(ROOT/n) != sums[n]] == []
    assert all(sums[f"digits/{r['file']}"] == r["sha256"] for r in labels)
    assert all(sums[f"forms/{i['file_name']}"] == i["sha256"] for i in forms["images"])


def test_readme_tells_number_and_bytes_of_every_file():
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\d+) \|.*CC BY 4\.0 \|$", README, re.M)
    told = {p: (int(n), int(size)) for glob, n, size in rows for p in ROOT.glob(glob)}
    for glob, n, size in rows:
        found = list(ROOT.glob(glob))
        assert (len(found), sum(p.stat().st_size for p in found)) == (int(n), int(size)), glob
    data = {p for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert data - set(told) == {ROOT/"README.md", ROOT/"make_samples.py"}
    assert sum(p.stat().st_size for p in data) < 5e6


# --- the digits ---------------------------------------------------------------------------------------------------------------

def test_digits_are_those_of_scikit_learn(labels, pixels):
    source = load_digits()
    assert pixels.dtype == np.uint8 and pixels.shape == (1797, 8, 8)
    assert np.array_equal(np.round(pixels / 255 * 16), source.images)
    assert [int(r["label"]) for r in labels] == source.target.tolist()


def test_digit_splits_follow_file_order_and_share_nothing(labels, pixels):
    assert [r["split"] for r in labels] == ["train"] * 1100 + ["valid"] * 200 + ["test"] * 497
    assert [r["group"] for r in labels] == [f"digit-{i:05d}" for i in range(1797)]
    assert len({p.tobytes() for p in pixels}) == 1797       # no identical pixels anywhere, so none across splits


def test_train_and_test_share_no_sheet(labels, pixels):
    told = re.search(r"from rows ([\d,\sand]+)\. We call", README).group(1)
    starts = [int(n) for n in re.findall(r"\d+", told)]
    text = "".join(r["label"] for r in labels)
    sheets = [text[a:b] for a, b in zip(starts, starts[1:] + [len(text)])]
    assert len(sheets) == 14 and max(Levenshtein.distance(s, sheets[0]) for s in sheets) <= 8
    sheet = np.searchsorted(starts, np.arange(len(text)), "right")
    split = np.array([r["split"] for r in labels])
    assert not set(sheet[split == "train"]) & set(sheet[split == "test"])
    cells = np.round(pixels / 255 * 16).reshape(len(text), 64)
    nearest = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(cells).kneighbors(cells, return_distance=False)[:, 1]
    assert f"sheet in {np.mean(sheet[nearest] == sheet):.0%} of cases".replace("%", " %") in README


def test_identical_digits_across_splits_stop_the_script(maker, monkeypatch, tmp_path):
    grey, target, splits = maker.digits()
    assert maker.duplicates(grey) == []
    grey[1400] = grey[3]
    assert maker.duplicates(grey) == [[3, 1400]]
    monkeypatch.setattr(maker, "digits", lambda: (grey, target, splits))
    with pytest.raises(SystemExit, match=r"\[3, 1400\]"): maker.write_digits(tmp_path)
    assert not list(tmp_path.iterdir())


# --- the stroke renderer ------------------------------------------------------------------------------------------------------

def test_stroke_is_tight_and_scaled(maker, pixels):
    for digit in pixels[:50]:
        ink = maker.stroke(digit, 40)
        assert ink.shape[0] == 40 and 4 <= ink.shape[1] <= 38 and 0 <= ink.min() and ink.max() <= 1
        assert min(ink[:2].max(), ink[-2:].max(), ink[:, :2].max(), ink[:, -2:].max()) > .2
        assert np.array_equal(ink, maker.stroke(digit, 40))


def test_strokes_are_as_readable_as_the_cells(maker, labels, pixels):
    target, test = np.array([r["label"] for r in labels]), np.arange(1797) >= 1300
    def canvas(digit):
        ink, image = maker.stroke(digit, 24), Image.new("F", (24, 24))
        image.paste(Image.fromarray(ink), ((24 - ink.shape[1]) // 2, 0))
        return np.asarray(image).ravel()
    def accuracy(x): return KNeighborsClassifier(1).fit(x[~test], target[~test]).score(x[test], target[test])
    assert accuracy(np.stack([canvas(d) for d in pixels])) > accuracy(pixels.reshape(1797, 64) / 255) - .03


# --- the forms ----------------------------------------------------------------------------------------------------------------

def test_form_counts(forms):
    assert [i["split"] for i in forms["images"]] == ["train"] * 400 + ["valid"] * 60 + ["test"] * 150
    assert {len(amounts(forms, i)) for i in forms["images"]} == {1, 2, 3}
    assert {len(a["text"]) for a in forms["annotations"]} == {3, 4, 5, 6}
    split = {i["id"]: i["split"] for i in forms["images"]}
    n = Counter(split[a["image_id"]] for a in forms["annotations"])
    assert f"| amounts on the forms | {n['train']} | {n['valid']} | {n['test']} |" in README
    uses = Counter(g for i in forms["images"] for g in i["groups"])
    assert f"({max(uses.values())} at most)" in README


def test_no_source_digit_across_splits(labels, forms):
    split = {r["group"]: r["split"] for r in labels}
    assert all(split[g] == i["split"] for i in forms["images"] for g in i["groups"])


def test_texts_are_the_labels_of_the_source_digits(labels, forms):
    label = {r["group"]: r["label"] for r in labels}
    for image in forms["images"]:
        assert "".join(label[g] for g in image["groups"]) == "".join(a["text"] for a in amounts(forms, image))


def test_boxes_lie_inside_and_hold_ink(forms):
    for image in forms["images"]:
        grey = np.asarray(Image.open(ROOT/"forms"/image["file_name"]).convert("L"), np.float32)
        assert grey.shape == (192, 256) == (image["height"], image["width"])
        paper, outside = np.median(grey), np.ones_like(grey, bool)
        cuts = []
        for x, y, w, h in (a["bbox"] for a in amounts(forms, image)):
            assert 0 <= x and x + w <= 256 and 0 <= y and y + h <= 192 and w > h > 18
            cuts.append((slice(int(y), int(np.ceil(y + h))), slice(int(x), int(np.ceil(x + w)))))
            outside[cuts[-1]] = False
        for cut in cuts:        # and each edge of a box touches ink
            field = grey[cut]
            assert field.mean() < grey[outside].mean() - 15
            assert max(field[:3].min(), field[-3:].min(), field[:, :3].min(), field[:, -3:].min()) < paper - 35


def test_coco_reads_them(capsys):
    coco = COCO(str(ROOT/"forms"/"forms.json"))
    assert len(coco.getImgIds()) == 610 and coco.getCatIds(["amount"]) == [1]
    for ann in coco.loadAnns(coco.getAnnIds(imgIds=[1, 401, 610])):
        mask, (w, h) = coco.annToMask(ann), ann["bbox"][2:]
        assert mask.shape == (192, 256) and abs(mask.sum() - w * h) <= w + h


@pytest.mark.parametrize("i", [0, 123, 399, 400, 459, 460, 609])
def test_script_makes_the_committed_form(maker, labels, forms, i):
    image = forms["images"][i]
    pool = [k for k, r in enumerate(labels) if r["split"] == image["split"]]
    made, written = maker.form(i, pool, maker.digits()[0])
    again = Image.open(io.BytesIO(maker.encode(made, "WEBP", quality=80, method=6)))
    committed = Image.open(ROOT/"forms"/image["file_name"])
    assert committed.mode == "RGB"
    assert np.abs(np.asarray(again, np.float32) - np.asarray(committed, np.float32)).mean() < 1.5
    assert [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in amounts(forms, image))] == [xyxy for xyxy, _ in written]


@pytest.mark.parametrize("i", [5, 77, 200, 430, 500, 600])
def test_boxes_are_tight(maker, monkeypatch, i):
    # The same form in a white and in a black ink: where they differ there is ink, and nowhere else.
    grey, _, splits = maker.digits()
    pool = np.flatnonzero(splits == maker.form_splits()[i])
    monkeypatch.setattr(maker, "INKS", [(255, 255, 255)] * 4)
    white, written = maker.form(i, pool, grey)
    monkeypatch.setattr(maker, "INKS", [(0, 0, 0)] * 4)
    black, _ = maker.form(i, pool, grey)
    ink = np.abs(np.asarray(white, np.float32) - np.asarray(black)).max(2) > 60
    for (x0, y0, x1, y1), _ in written:
        near = np.zeros_like(ink)
        near[max(0, int(y0) - 2):int(np.ceil(y1)) + 2, max(0, int(x0) - 3):int(np.ceil(x1)) + 3] = True
        ys, xs = np.where(ink & near)
        assert np.allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [x0, y0, x1, y1], atol=1.01)


def test_check_finds_what_was_changed(maker, tmp_path):
    copy = tmp_path/"samples"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    digit = np.asarray(Image.open(copy/"digits"/"00007.png")).copy()
    digit[4, 4] ^= 16
    Image.fromarray(digit).save(copy/"digits"/"00007.png")
    (copy/"digits"/"00009.png").write_bytes((ROOT/"digits"/"00009.png").read_bytes()[:40])
    table = (copy/"digits"/"labels.csv").read_text().replace("00001.png,1,", "00001.png,2,")
    (copy/"digits"/"labels.csv").write_text(table)
    Image.open(ROOT/"forms"/"00002.webp").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(copy/"forms"/"00002.webp")
    (copy/"forms"/"00003.webp").unlink()
    # and nothing else: what is untouched compares equal
    assert maker.differences(copy, ROOT) == ["forms/00003.webp", "digits/00007.png", "digits/00009.png", "digits/labels.csv", "forms/00002.webp"]
