"Reports, comparisons and cases: what they refuse, what they count, and that figures are those of scikit-learn."
import csv, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import pytest

from fsml_lab.core import Annotation, ClassTable, Figure, FsmlError, Lab, Predictions, trace
from fsml_lab.data.journal import Dataset, NewSample
from fsml_lab.data import version as _version  # noqa: F401 (adds commit and open)
from fsml_lab.evaluate import cases as C, compare as K, report as R

SAMPLES = Path(__file__).parent.parent/"data_samples"/"digits"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "<img src=x onerror=alert(1)>", "nine"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A lab with 60 test and 30 training digits, frozen; made once and copied for each test."
    home = tmp_path_factory.mktemp("made")/"lab"
    lab = Lab(home, durability="normal")
    rows = list(csv.DictReader(open(SAMPLES/"labels.csv")))
    rows = rows[:30] + rows[1300:1360]
    ds = Dataset(lab, "digits", NAMES)
    ds.add((NewSample(SAMPLES/r["file"], r["file"][:5], split=r["split"], group=r["group"]) for r in rows), progress=False)
    ds.annotate(Annotation(f"l{r['file'][:5]}", r["file"][:5], "label", class_id=int(r["label"]), author="uci") for r in rows)
    ds.commit("start")
    lab.engine.dispose()
    return home


@pytest.fixture
def world(made, tmp_path):
    shutil.copytree(made, tmp_path/"lab")
    lab = Lab(tmp_path/"lab", durability="normal")
    yield lab, Dataset(lab, "digits"), lab.open("digits@v1")
    lab.engine.dispose()


def predict(frozen, split="test", wrong=.2, seed=0, probs=True, run="run-a", ids=None):
    "Predictions of which about `wrong` are wrong, seeded."
    r, t = np.random.default_rng(seed), frozen.labels(split)
    if ids is not None: t = t[t["sample_id"].isin(ids)]
    y = t["class_id"].to_numpy()
    p = np.where(r.random(len(y)) < wrong, (y + r.integers(1, 10, len(y))) % 10, y)
    q = r.random((len(y), 10)) * .05
    q[np.arange(len(y)), p] += 1 + r.random(len(y))
    q /= q.sum(1, keepdims=True)
    cols = dict(sample_id=t["sample_id"].tolist(), kind=["label"] * len(y), class_id=p, score=q.max(1))
    return Predictions.of(cols | (dict(probs=q.astype("f4")) if probs else {}), data_root=frozen.version.root, run_id=run, classes_sha=frozen.classes.sha256)


def rows(ids, classes, **more): return Predictions.of(dict(sample_id=ids, kind=["label"] * len(ids), class_id=classes) | more, run_id="r")


def test_import_is_light():
    code = "import sys, fsml_lab.evaluate.report, fsml_lab.evaluate.compare, fsml_lab.evaluate.cases; print([m for m in ('torch', 'matplotlib', 'ipywidgets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- report

def test_figures_as_sklearn(world):
    from sklearn import metrics as S
    lab, _, v1 = world
    p = predict(v1)
    r = R.evaluate(lab, p, v1, "test")
    y, q = v1.labels("test")["class_id"], p.to_pandas()["class_id"]
    assert r["accuracy"].value == pytest.approx(S.accuracy_score(y, q))
    assert r["macro_f1"].value == pytest.approx(S.f1_score(y, q, average="macro"))
    for i, v in enumerate(S.recall_score(y, q, average=None, labels=range(10), zero_division=np.nan)):
        if not np.isnan(v): assert r[f"recall@class={NAMES[i]}"].value == pytest.approx(v)
    assert all(f.lo is not None and f.n > 0 and f.method and f.stage == "evaluate" for f in r.figures)


def test_order_of_predictions_does_not_matter(world):
    lab, _, v1 = world
    p = predict(v1)
    mixed = Predictions(p.rows.take(np.random.default_rng(0).permutation(len(p))), **p.meta())
    assert R.evaluate(lab, p, v1, "test").figures == R.evaluate(lab, mixed, v1, "test").figures


def test_stored_linked_and_drawn_again(world):
    lab, _, v1 = world
    class Spec: sha256 = "5" * 64
    p = predict(v1)
    r = R.evaluate(lab, p, v1, "test", spec=Spec())
    assert R.load_report(lab, r.sha256) == r and r.spec_sha == "5" * 64 and r.data_root == v1.version.root
    again = R.load_predictions(lab, r)
    assert again.rows.equals(p.rows) and again.meta() == p.meta()
    assert {("predictions", r.predictions_sha), ("run", "run-a"), ("version", v1.version.root)} <= trace(lab, "report", r.sha256).nodes
    assert list(R.reports(lab)["report_id"]) == [r.sha256]
    assert "looked at 1 time" in r._repr_html_()
    assert R.show_confusion(again, v1, "test").png[:4] == b"\x89PNG"
    with pytest.raises(FsmlError, match="0 reports"): R.load_report(lab, "ffff_")
    with pytest.raises(FsmlError, match="reports whose id"): R.load_report(lab, "%")


def test_missing_answers_are_wrong_and_said(world):
    lab, _, v1 = world
    ids = v1.sample_ids("test")
    half = predict(v1, wrong=0., ids=ids[:30])
    r = R.evaluate(lab, half, v1, "test")
    assert r["accuracy"].value == .5 == r["answered"].value and r["accuracy"].n == 60
    nothing = Predictions.of(dict(sample_id=ids, kind=["label"] * 30 + ["none"] * 30, class_id=[*v1.labels("test")["class_id"][:30], *[None] * 30]))
    assert R.evaluate(lab, nothing, v1, "test")["answered"].value == .5
    empty = Predictions.of(dict(sample_id=[], kind=[]))
    assert R.evaluate(lab, empty, v1, "test")["accuracy"].value == 0
    c = K.compare(half, predict(v1, wrong=0.), v1, "test")
    assert len(c.fixed) == 30 and any("30 samples without an answer" in x for x in c.limits)


def test_predictions_of_all_splits_are_fine(world):
    lab, _, v1 = world
    a, b = predict(v1, "test"), predict(v1, "train")
    import pyarrow as pa
    both = Predictions(pa.concat_tables([a.rows, b.rows]).combine_chunks(), **a.meta())
    assert R.evaluate(lab, both, v1, "test").figures == R.evaluate(lab, a, v1, "test").figures


def test_looks_follow_the_images(world):
    lab, ds, v1 = world
    assert [R.evaluate(lab, predict(v1, seed=s), v1, "test").looks for s in range(3)] == [1, 2, 3]
    ds.annotate([Annotation("l00000", "00000", "label", class_id=3, author="x")])
    ds.commit("a training label changed")
    v2 = lab.open("digits@v2")
    assert R.evaluate(lab, predict(v1), v2, "test").looks == 4     # another version, the same test images; and predictions made on v1 serve
    assert R.evaluate(lab, predict(v2, "train"), v2, "train").looks == 1
    ds.remove(["01300"])
    ds.commit("a test image removed")
    assert R.evaluate(lab, predict(lab.open("digits@v3")), lab.open("digits@v3"), "test").looks == 1  # other images


def test_looks_counted_once_each_under_competition(world):
    lab, _, v1 = world
    R.evaluate(lab, predict(v1), v1, "test")
    with ThreadPoolExecutor(4) as pool: n = list(pool.map(lambda s: R.evaluate(lab, predict(v1, seed=s), v1, "test").looks, range(12)))
    assert sorted(n) == list(range(2, 14))


def test_groups_widen_the_interval(tmp_path):
    "Twenty images of each of four writers, one writer never read: four writers tell less than eighty images."
    lab = Lab(tmp_path, durability="normal")
    names = sorted(SAMPLES.glob("*.png"))[:80]
    for ds, group in ((Dataset(lab, "grouped", ["a", "b"]), lambda i: f"w{i // 20}"), (Dataset(lab, "plain", ["a", "b"]), lambda i: "")):
        ds.add((NewSample(f, f.stem, split="test", group=group(i)) for i, f in enumerate(names)), progress=False)
        ds.annotate(Annotation(f.stem, f.stem, "label", class_id=0) for f in names)
        ds.commit("x")
    p = lambda f: rows([x.stem for x in names], [int(i < 20) for i in range(80)])
    g, q = (R.evaluate(lab, p(f), f, "test")["accuracy"] for f in (lab.open("grouped@v1"), lab.open("plain@v1")))
    assert g.value == q.value == .75 and (g.hi - g.lo) > 2 * (q.hi - q.lo)
    lab.engine.dispose()


def _another_class_table(v):
    p = predict(v)
    return Predictions(p.rows, **{**p.meta(), "classes_sha": ClassTable.of(["a"]).sha256})


BAD = {
    "unknown sample": ("does not have", lambda v: rows(["nope"], [1])),
    "twice": ("predicted twice", lambda v: rows(["01300", "01300"], [1, 1])),
    "unknown class": ("name a class", lambda v: rows(["01300"], [10])),
    "no class": ("name a class", lambda v: rows(["01300"], [None])),
    "boxes": ("no classes", lambda v: Predictions.of(dict(sample_id=["01300"], kind=["box"], class_id=[1], xyxy=[[0, 0, 1, 1]]))),
    "too few probs": ("not 10 of them", lambda v: rows(["01300"], [1], probs=[[.5, .5]])),
    "some without probs": ("not 10 of them", lambda v: rows(["01300", "01301"], [1, 1], probs=[[.1] * 10, None])),
    "logits": ("sum to 1", lambda v: rows(["01300"], [1], probs=[[3.] * 10])),
    "NaN": ("NaN", lambda v: rows(["01300"], [1], probs=[[float("nan")] + [.1] * 9])),
    "other class table": ("another class table", _another_class_table),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(world, case):
    lab, _, v1 = world
    text, make = BAD[case]
    for use in (lambda p: R.evaluate(lab, p, v1, "test"), lambda p: K.compare(p, p, v1, "test"), lambda p: C.cases(p, v1, "test"), lambda p: C.suspects(p, v1, "test")):
        with pytest.raises(FsmlError, match=text) as e: use(make(v1))
        assert e.value.where and e.value.remedy
    assert R.looks(v1, "test").counts == {} and len(R.reports(lab)) == 0  # a refused evaluation leaves nothing behind


def test_refused_split_and_version(world):
    lab, ds, v1 = world
    with pytest.raises(FsmlError, match="no split"): R.evaluate(lab, predict(v1), v1, "valid")
    ds.remove(["01300"])
    ds.add([NewSample(SAMPLES/"00500.png", "01999", split="test")], progress=False)
    ds.annotate([Annotation("l01999", "01999", "label", class_id=0)])
    ds.commit("other images")
    v2 = lab.open("digits@v2")
    with pytest.raises(FsmlError, match="whose images of this split differ"): R.evaluate(lab, predict(v1, ids=v1.sample_ids("test")[5:]), v2, "test")


# --- compare

def test_comparison_adds_up(world):
    lab, _, v1 = world
    for s in range(4):
        a, b = predict(v1, wrong=.3, seed=s), predict(v1, wrong=.1, seed=s + 50, run="run-b")
        c = K.compare(a, b, v1, "test")
        right = (c.table["change"] == "right").sum()
        assert len(c.fixed) + len(c.broken) + len(c.still_wrong) + right == 60
        assert c.difference.value == pytest.approx((len(c.fixed) - len(c.broken)) / 60) == pytest.approx(c.accuracy_b.value - c.accuracy_a.value)
        assert (c.difference.lo > 0) == c.words.startswith("B is better") and (c.difference.hi < 0) == c.words.startswith("B is worse")
        back = K.compare(b, a, v1, "test")
        assert set(back.fixed) == set(c.broken) and back.p_mcnemar == c.p_mcnemar and back.difference.lo == pytest.approx(-c.difference.hi)
    assert R.looks(v1, "test").counts["compare"] == 8


@pytest.mark.parametrize("lo, hi, word", [(.01, .04, "B is better"), (-.04, -.01, "B is worse"), (-.02, .03, "No difference shown"), (0., .03, "No difference shown")])
def test_words(lo, hi, word):
    w = K._words(Figure("d", (lo + hi) / 2, lo, hi, n=100), .04, 5, 2)
    assert w.startswith(word) and f"{100 * lo:+.1f} to {100 * hi:+.1f}" in w
    if word.startswith("No"): assert f"loss of {100 * max(-lo, 0):.1f} points" in w and f"gain of {100 * hi:.1f}" in w


def test_comparison_draws_itself_escaped(world):
    lab, _, v1 = world
    c = K.compare(predict(v1, wrong=.5), predict(v1, wrong=.1, seed=9, run="<script>"), v1, "test")
    html = c._repr_html_()
    assert "<script>" not in html and "<img src=x" not in html and "http" not in html
    assert c.strip("still wrong").count("<figure") == min(len(c.still_wrong), 12)
    with pytest.raises(FsmlError, match="cases"): c.strip("better")


# --- cases

def test_cases_are_sorted_and_complete(world):
    lab, _, v1 = world
    p = predict(v1, wrong=.4, ids=v1.sample_ids("test")[4:])
    c = C.cases(p, v1, "test")
    assert set(c.ids[:4]) == set(v1.sample_ids("test")[:4]) and (c.table["pred"][:4] == -1).all()  # without an answer: first
    loss = c.table["loss"][4:]
    assert loss.is_monotonic_decreasing and set(c.ids) == set(R.join(p, v1, "test").query("not correct")["sample_id"])
    plain = C.cases(predict(v1, wrong=.4, probs=False), v1, "test")
    assert plain.table["score"].is_monotonic_decreasing and plain.table["loss"].isna().all()  # without probabilities: the most confident first
    assert len(C.cases(predict(v1, wrong=0.), v1, "test")) == 0


def test_page_stands_alone(world, tmp_path):
    lab, _, v1 = world
    page = C.cases(predict(v1, wrong=.6), v1, "test").to_html(tmp_path/"out"/"cases.html").read_text()
    assert "http" not in page and "<script" not in page and "<img src=x" not in page and "&lt;img src=x" in page
    assert page.count("data:image/webp;base64,") == page.count("<figure") > 20
    assert "looked at in 0 reports, 0 comparisons and 1 gallery." in page


class Queue:
    def __init__(self): self.got = []
    def send_back(self, sample_ids, why): self.got.append((list(sample_ids), why))


def test_to_queue(world):
    lab, _, v1 = world
    q, train, test = Queue(), C.cases(predict(v1, "train", wrong=.5), v1, "train"), C.cases(predict(v1, wrong=.5), v1, "test")
    assert train.to_queue(q, n=3, why="look again") == 3 and q.got == [(train.ids[:3], "look again")]
    with pytest.raises(FsmlError, match="test cases"): test.to_queue(q)
    assert len(q.got) == 1 and "untouched" not in str(R.looks(v1, "test"))
    assert test.to_queue(q, test=True) == len(test) and "no untouched test set" in str(R.looks(v1, "test"))
    c = K.compare(predict(v1), predict(v1, seed=3), v1, "test")
    assert any("no untouched test set" in x for x in c.limits)
    assert C.cases(predict(v1, "train", wrong=0.), v1, "train").to_queue(q) == 0 and len(q.got) == 2
    with pytest.raises(FsmlError, match="no labelling queue"): train.to_queue(None)


def test_the_way_back(world):
    "Wrong cases of train go through a real queue, are labelled anew, and the next version has the new labels."
    from fsml_lab.annotate.queue import LabelQueue
    lab, ds, v1 = world
    c, q = C.cases(predict(v1, "train", wrong=.3), v1, "train"), LabelQueue(ds, "again")
    assert c.to_queue(q, why="second look") == len(c) > 3
    for t in q.claim("bo", len(c)):
        assert t.why == "second look" and q.submit(t, class_id=4)
    ds.commit("looked again")
    new = lab.open("digits@v2").labels("train").set_index("sample_id")["class_id"]
    assert (new[c.ids] == 4).all() and v1.labels("train").set_index("sample_id")["class_id"].drop(c.ids).equals(new.drop(c.ids))


def test_suspects_rank_planted_errors_first(world):
    lab, ds, v1 = world
    ids, y = v1.sample_ids("test"), v1.labels("test")["class_id"].to_numpy()
    planted = set(ids[::10])
    ds.annotate(Annotation(f"l{i}", i, "label", class_id=int((c + 3) % 10), author="sloppy") for i, c in zip(ids, y) if i in planted)
    ds.commit("six wrong labels")
    v2, p = lab.open("digits@v2"), predict(v1, wrong=0.)   # predictions that know the true class
    assert set(C.suspects(p, v2, "test").ids) == planted
    first = C.suspects(p, v2, "test", n=8)
    assert len(first) == 8 and set(first.ids[:6]) == planted and first.table["loss"].is_monotonic_decreasing
    with pytest.raises(FsmlError, match="probabilities"): C.suspects(predict(v1, probs=False), v2, "test")
    with pytest.raises(FsmlError, match="cannot be listed"): C.suspects(p, v2, "test", n=-1)
