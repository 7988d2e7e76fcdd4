"Metrics against their peers (scikit-learn, pycocotools, jiwer, statsmodels), and intervals against simulation."
import contextlib, io, subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fsml_lab.core import FsmlError
from fsml_lab import metrics as M


def test_import_is_light():
    code = "import sys, fsml_lab.metrics; print([m for m in ('torch', 'hotcoco', 'rapidfuzz', 'pandas', 'sqlalchemy', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- proportions and pairs

def test_wilson_as_statsmodels():
    from statsmodels.stats.proportion import proportion_confint
    for n in (1, 7, 360):
        k = np.arange(n + 1)
        for level in (.9, .95, .99):
            lo, hi = M.wilson(k, n, level)
            want = proportion_confint(k, n, 1 - level, "wilson")
            assert np.allclose(lo, want[0], atol=1e-9) and np.allclose(hi, want[1], atol=1e-9)


def _pairs(e, f, g, h):
    "Answers (A, B) with e both right, f only B, g only A, h none."
    return np.repeat([1, 0, 1, 0], [e, f, g, h]), np.repeat([1, 1, 0, 0], [e, f, g, h])


def test_newcombe_published():
    # Bentur et al. 2009 and Cavo et al. 2012 as worked in Fagerland, Lydersen & Laake, Statistical Analysis of Contingency Tables (2017), chapter 8
    for (e, f, g, h), d, lo, hi in (((1, 7, 1, 12), .2857, .026, .507), ((59, 16, 6, 80), .0621, .0046, .1186)):
        fig = M.paired_difference(*_pairs(e, f, g, h))
        assert np.allclose((fig.value, fig.lo, fig.hi), (d, lo, hi), atol=6e-4 if e == 1 else 6e-5)


def test_newcombe_is_antisymmetric_and_wide_enough_without_discordance():
    a, b = _pairs(300, 9, 4, 40)
    x, y = M.paired_difference(a, b), M.paired_difference(b, a)
    assert np.allclose((x.value, x.lo, x.hi), (-y.value, -y.hi, -y.lo))
    same = M.paired_difference(np.ones(100), np.ones(100))
    assert same.value == 0 and same.lo < -.01 and same.hi > .01


def test_newcombe_coverage():
    rng = np.random.default_rng(3)
    for cells in ((.90, .05, .03, .02), (.96, .02, .01, .01)):  # both, only B, only A, none
        hits, rounds = 0, 600
        for e, f, g, h in rng.multinomial(360, cells, rounds):
            lo, hi = M._newcombe(e, f, g, h, .95)
            hits += lo <= cells[1] - cells[2] <= hi
        assert .925 <= hits / rounds <= .985  # 3.5 standard errors of a simulation of 600 around 0.95, and a little above


def test_mcnemar_and_holm_as_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests
    for e, f, g, h in ((50, 3, 12, 9), (10, 0, 0, 5), (1, 7, 1, 12), (0, 5, 5, 0)):
        assert M.mcnemar(*_pairs(e, f, g, h)) == pytest.approx(mcnemar([[e, f], [g, h]], exact=True).pvalue)
    for seed in range(20):
        p = np.random.default_rng(seed).random(seed + 1)**3
        assert np.allclose(M.holm(p), multipletests(p, method="holm")[1])


def test_grouped_proportion_covers():
    "40 documents of 10 items whose accuracy differs between documents: by item too narrow, by group right."
    rng, hit, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        x = rng.random((40, 10)) < rng.beta(9, 1, 40)[:, None]  # mean 0.9
        x = np.where(rng.random((40, 1)) < .5, x[:, :1], x)      # half of the documents are all alike
        f = M.proportion(x.ravel(), name="x", groups=np.repeat(np.arange(40), 10))
        g = M.proportion(x.ravel(), name="x")
        hit += f.lo <= .9 <= f.hi
        naive += g.lo <= .9 <= g.hi
    assert hit / 400 >= .915 and naive / 400 < .85


def test_groups_of_one_are_plain():
    x = np.random.default_rng(0).random(200) < .9
    assert M.accuracy(x.astype(int), np.ones(200, int), groups=np.arange(200)).lo == pytest.approx(M.wilson(x.sum(), 200)[0])


# --- bootstrap

def test_weights_keep_multiplicity():
    w = np.concatenate(list(M.resample_weights(200, 400, seed=1)))
    assert (w.sum(1) == 200).all() and w.max() >= 4
    assert abs((w == 0).mean() - np.exp(-1)) < .01  # (1 - 1/n)^n
    groups = np.repeat(np.arange(20), 10)
    for scheme in ("multinomial", "poisson"):
        for chunk in M.resample_weights(200, 50, groups=groups, scheme=scheme):
            assert (chunk.reshape(-1, 20, 10) == chunk.reshape(-1, 20, 10)[..., :1]).all()


def test_bootstrap_standard_error():
    "Of a mean it is known: sd / sqrt(n). Without multiplicity it would come out at about 0.76 of that."
    x = np.random.default_rng(0).normal(size=400)
    for scheme in ("multinomial", "poisson"):
        draws = np.concatenate([M.weighted_mean(x)(w) for w in M.resample_weights(400, 4000, seed=2, scheme=scheme)])
        assert draws.std() / (x.std() / 20) == pytest.approx(1, abs=.05)
    as_set = np.concatenate([M.weighted_mean(x)(np.minimum(w, 1)) for w in M.resample_weights(400, 4000, seed=2)])
    assert as_set.std() / (x.std() / 20) < .85


def test_cer_interval_covers():
    "300 simulated sets of 60 documents with 4 lines each, error rate different from document to document."
    rng, hits = np.random.default_rng(5), 0
    n_chars, groups = np.full(240, 20), np.repeat(np.arange(60), 4)
    for s in range(300):
        rate = np.repeat(rng.beta(2, 38, 60), 4)  # mean 0.05
        edits = rng.binomial(n_chars, rate)
        f = M.bootstrap(M.weighted_mean(edits, n_chars), 240, groups=groups, rounds=400, seed=s)
        hits += f.lo <= .05 <= f.hi
    assert .905 <= hits / 300 <= .985


def test_macro_f1_covers_near_one():
    "Three balanced classes, 360 items, 1 % errors: macro F1's interval holds, where the percentile bootstrap is too narrow."
    rng, k, n, p = np.random.default_rng(7), 3, 360, .99
    truth = np.eye(k) * p / k + (1 - np.eye(k)) * (1 - p) / k / (k - 1)
    true_f1 = float(M._macro(np.diag(truth), truth.sum(1), truth.sum(0)))
    hits = boot = 0
    for s in range(300):
        cell = rng.choice(k * k, n, p=truth.ravel())
        f = M.macro_f1(cell % k, cell // k, k, rounds=400, seed=s)
        g = M.macro_f1(cell % k, cell // k, k, groups=np.arange(n), rounds=400, seed=s)
        hits += f.lo <= true_f1 <= f.hi
        boot += g.lo <= true_f1 <= g.hi
    assert hits / 300 >= .91 and boot < hits - 4


def test_paired_bootstrap_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    a = rng.random(500) < .8
    b = a ^ (rng.random(500) < .02)
    d = M.paired_bootstrap(M.weighted_mean(a), M.weighted_mean(b), 500)
    single = M.bootstrap(M.weighted_mean(a), 500)
    assert d.value == pytest.approx(b.mean() - a.mean())
    assert d.hi - d.lo < .5 * (single.hi - single.lo)
    assert abs((d.hi - d.lo) / (2 * 1.96 * (b.astype(float) - a).std() / 500**.5) - 1) < .15  # the paired standard error


# --- classes

@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_classes_as_sklearn(k, n, seed):
    from sklearn import metrics as S
    rng = np.random.default_rng(seed)
    t, p = rng.integers(0, k, n), rng.integers(0, k, n)
    assert M.accuracy(p, t).value == pytest.approx(S.accuracy_score(t, p))
    cm = M.confusion(p, t, k)
    assert (cm == S.confusion_matrix(t, p, labels=range(k))).all()
    assert M.macro_f1(p, t, k, rounds=50).value == pytest.approx(S.f1_score(t, p, average="macro"))
    figs = M.per_class(cm)
    pr, re, f1, _ = S.precision_recall_fscore_support(t, p, labels=range(k), zero_division=np.nan)
    for name, want in (("precision", pr), ("recall", re), ("f1", f1)):
        got = {f.slice: f.value for f in figs if f.name == name}
        assert got == pytest.approx({f"class={c}": v for c, v in enumerate(want) if not np.isnan(v)})


def test_missing_predictions_count_as_wrong():
    t, p = np.array([0, 0, 1, 1, 2]), np.array([0, -1, 1, -1, 2])
    assert M.accuracy(p, t).value == pytest.approx(3 / 5)
    cm = M.confusion(p, t, 3, missing=True)
    assert cm.shape == (3, 4) and cm[:, 3].tolist() == [1, 1, 0]
    figs = M.per_class(cm, ["a", "b", "c"])
    assert figs["recall@class=a"].value == .5 and figs["precision@class=a"].value == 1


# --- boxes

def _scene(seed, images=40, classes=3, per=5, ties=False):
    "Random truth with crowds, and detections around it, with some of the wrong class and some on nothing."
    r = np.random.default_rng(seed)
    n = images * per
    img, cls = r.integers(0, images - 2, n), r.integers(0, classes, n)  # the last two images stay empty
    wh, xy = np.exp(r.normal(4, 1, (n, 2))), r.random((n, 2)) * 300
    true = np.c_[xy, xy + wh]
    crowd = r.random(n) < .06
    keep = r.random(n) < .85
    det = (true + r.normal(0, .08, true.shape) * np.c_[wh, wh])[keep]
    det[:, 2:] = np.maximum(det[:, 2:], det[:, :2] + 1)
    dimg, dcls = img[keep], np.where(r.random(keep.sum()) < .1, r.integers(0, classes, keep.sum()), cls[keep])
    fxy = r.random((n // 2, 2)) * 300
    det = np.r_[det, np.c_[fxy, fxy + np.exp(r.normal(4, 1, (n // 2, 2)))]]
    dimg, dcls = np.r_[dimg, r.integers(0, images, n // 2)], np.r_[dcls, r.integers(0, classes, n // 2)]
    score = r.random(len(det))
    if ties: score = np.round(score, 1)
    return M.Boxes(dimg, det, dcls, score=score), M.Boxes(img, true, cls, crowd=crowd), list(range(images)), list(range(classes))


def _pycocotools(pred, true, images, classes):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    xywh = lambda b: np.c_[b[:, :2], b[:, 2:] - b[:, :2]]
    t, p = xywh(true.xyxy), xywh(pred.xyxy)
    crowd = np.zeros(len(t), int) if true.crowd is None else np.asarray(true.crowd, int)
    area = t[:, 2] * t[:, 3] if true.area is None else true.area
    num = {i: n + 1 for n, i in enumerate(sorted(images, key=str))}  # of equal scores the first image goes first: the same order as ours
    with contextlib.redirect_stdout(io.StringIO()):
        g = COCO()
        g.dataset = dict(info={}, images=[dict(id=num[i]) for i in images], categories=[dict(id=c + 1, name=str(c)) for c in classes],
                         annotations=[dict(id=i + 1, image_id=num[true.image[i]], category_id=int(true.class_id[i]) + 1, bbox=t[i].tolist(), area=float(area[i]), iscrowd=int(crowd[i])) for i in range(len(t))])
        g.createIndex()
        d = g.loadRes([dict(image_id=num[pred.image[i]], category_id=int(pred.class_id[i]) + 1, bbox=p[i].tolist(), score=float(pred.score[i])) for i in range(len(p))])
        e = COCOeval(g, d, "bbox")
        e.evaluate(); e.accumulate(); e.summarize()
    return e


KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@pytest.mark.parametrize("seed", range(6))
def test_ap_as_pycocotools(seed):
    pred, true, images, classes = _scene(seed, ties=seed % 2 == 1)
    if seed >= 4: true = M.Boxes(true.image, true.xyxy, true.class_id, crowd=true.crowd, area=np.prod(true.xyxy[:, 2:] - true.xyxy[:, :2], 1) * .6)  # areas of masks
    want = dict(zip(KEYS, _pycocotools(pred, true, images, classes).stats))
    e = M.BoxEval(pred, true, images, classes)
    one = np.ones((1, len(images)), np.float32)
    for k in KEYS:
        assert e.value(k) == pytest.approx(want[k], abs=1e-6)
        assert e.statistic(k)(one)[0] == pytest.approx(want[k], abs=1e-9)


def test_weighted_ap_is_ap_of_copied_images():
    "A resample by weights equals pycocotools on a data set in which images really stand several times."
    pred, true, images, classes = _scene(11, images=25)
    e = M.BoxEval(pred, true, images, classes)
    at = {str(i): n for n, i in enumerate(e.images)}
    for w in next(M.resample_weights(25, 3, seed=4)):
        copies = [(i, c) for i in images for c in range(int(w[at[str(i)]]))]
        def copy(b, fields):
            rows = [np.flatnonzero(b.image == i) for i, _ in copies]
            ids = np.repeat([100 * i + c for i, c in copies], [len(r) for r in rows])
            r = np.concatenate(rows)
            return M.Boxes(ids, b.xyxy[r], b.class_id[r], **{f: np.asarray(getattr(b, f))[r] for f in fields})
        want = _pycocotools(copy(pred, ["score"]), copy(true, ["crowd"]), [100 * i + c for i, c in copies], classes).stats
        got = [e.statistic(k)(w[None])[0] for k in KEYS]
        assert np.allclose(got, want, atol=1e-9)


@pytest.mark.parametrize("thr", (.5, .75))
def test_match_boxes_as_pycocotools(thr):
    pred, true, images, classes = _scene(5)
    ref = _pycocotools(pred, true, images, classes)
    t = int(np.flatnonzero(np.isclose(ref.params.iouThrs, thr))[0])
    seen = crowded = 0
    for e in ref.evalImgs:
        if not e or e["aRng"] != [0, 1e10]: continue
        i, c = sorted(images, key=str)[e["image_id"] - 1], e["category_id"] - 1
        gi, di = np.flatnonzero((true.image == i) & (true.class_id == c)), np.flatnonzero((pred.image == i) & (pred.class_id == c))
        m = M.match_boxes(true.xyxy[gi], pred.xyxy[di], pred.score[di], crowd=true.crowd[gi], iou=thr)
        order = np.argsort(-pred.score[di], kind="stable")
        assert [0 if j < 0 else gi[j] + 1 for j in m.dt_gt[order]] == [int(x) for x in e["dtMatches"][t]]
        assert m.ignored[order].tolist() == [bool(x) for x in e["dtIgnore"][t]]
        seen, crowded = seen + len(di), crowded + int(m.ignored.sum())
    assert seen > 200 and crowded > 0


def test_match_boxes_by_class():
    gt, dt = [[0, 0, 10, 10]], [[0, 0, 10, 10], [0, 0, 10, 9]]
    m = M.match_boxes(gt, dt, [.9, .8], gt_class=[1], dt_class=[2, 1])
    assert m.dt_gt.tolist() == [-1, 0] and m.fp.tolist() == [True, False] and m.iou[0] == 1
    assert M.match_boxes(gt, dt, [.9, .8]).dt_gt.tolist() == [0, -1]
    empty = M.match_boxes([], [], [])
    assert len(empty.tp) == 0 and len(empty.missed) == 0
    assert M.match_boxes(gt, [], []).missed.tolist() == [True]


def test_box_iou_as_pycocotools():
    from pycocotools import mask
    pred, true, *_ = _scene(2)
    xywh = lambda b: np.c_[b[:, :2], b[:, 2:] - b[:, :2]]
    assert np.allclose(M.box_iou(pred.xyxy, true.xyxy, true.crowd), mask.iou(xywh(pred.xyxy), xywh(true.xyxy), true.crowd.astype(int).tolist()))


def test_no_predictions_and_no_range():
    _, true, images, _ = _scene(0)
    none = M.Boxes([], [], [], score=[])
    figs = M.average_precision(none, true, images=images, rounds=20)
    assert {f.value for f in figs} == {0.} and all(f.hi > 0 for f in figs)  # none seen is not none possible
    big = M.Boxes([0, 1], [[0, 0, 200, 200]] * 2, [0, 0])
    assert [f.name for f in M.average_precision(none, big, rounds=20)] == ["AP", "AP50", "AP75", "APl", "AR100"]  # nothing small or medium to find


def test_empty_images_count():
    "A false alarm on an image without any true box lowers AP."
    true = M.Boxes(["a", "b"], [[0, 0, 10, 10]] * 2, [0, 0])
    good = M.Boxes(["a", "b"], [[0, 0, 10, 10]] * 2, [0, 0], score=[.9, .8])
    alarm = M.Boxes(["a", "b", "c"], [[0, 0, 10, 10]] * 3, [0, 0, 0], score=[.9, .8, .95])
    ap = lambda p: M.average_precision(p, true, images="abc", rounds=50)["AP50"].value
    assert ap(good) == pytest.approx(1) and ap(alarm) == pytest.approx(2 / 3)


# --- text

WORDS = ["alpha", "beta", "gamma delta", "a b c", "Straße", "naïve café", "x", "12 345", "zwölf Boxkämpfer jagen", "日本語 テキスト"]


def test_text_as_jiwer():
    import jiwer
    r = np.random.default_rng(0)
    true = [str(r.choice(WORDS)) for _ in range(300)]
    def noisy(s):
        s = list(s)
        for _ in range(r.integers(0, 4)):
            i = r.integers(0, len(s)) if s else 0
            op = r.integers(3)
            if op == 0 and s: s[i] = "q"
            elif op == 1: s.insert(i, "z")
            elif s: del s[i]
        return " ".join("".join(s).split())  # jiwer strips and joins blanks by default
    pred = [noisy(s) for s in true]
    assert M.cer(pred, true, rounds=20).value == pytest.approx(jiwer.cer(true, pred))
    assert M.wer(pred, true, rounds=20).value == pytest.approx(jiwer.wer(true, pred))
    for words, ref in ((False, jiwer.process_characters(true, pred)), (True, jiwer.process_words(true, pred))):
        c = M.edit_counts(pred, true, words=words).sum(0)
        assert c[:3].sum() == ref.substitutions + ref.insertions + ref.deletions
        assert c[3] == ref.hits + ref.substitutions + ref.deletions
        assert c[1] - c[2] == ref.insertions - ref.deletions
    assert M.exact_match(pred, true).value == pytest.approx(np.mean([p == t for p, t in zip(pred, true)]))


@given(st.lists(st.tuples(st.text("abé\u0301", max_size=6), st.text("abé\u0301", max_size=6)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_text_invariants(pairs):
    import unicodedata
    pred, true = map(list, zip(*pairs))
    decomposed = [unicodedata.normalize("NFD", s) for s in pred]
    one = M.ned(pred, true, rounds=20)
    assert 0 <= one.value <= 1 and one.value == pytest.approx(M.ned(true, pred, rounds=20).value)
    assert one.value == pytest.approx(M.ned(decomposed, true, rounds=20).value)  # NFC makes the spelling of accents irrelevant
    assert M.exact_match(true, true).value == 1 and M.ned(true, true, rounds=20).value == 1


def test_normalisation_is_recorded():
    for norm, text in (("NFC", "NFC"), ("NFKC", "NFKC"), (None, "not normalised")):
        for f in (M.cer, M.wer, M.ned, M.exact_match): assert f(["a b"], ["a b"], norm=norm).method.startswith(text)
    assert M.cer(["ﬁn"], ["fin"], norm="NFKC").value == 0 and M.cer(["ﬁn"], ["fin"]).value == pytest.approx(2 / 3)


def test_empty_reading_and_empty_reference():
    assert M.cer(["", "ab"], ["abc", "ab"], rounds=20).value == pytest.approx(3 / 5)
    assert M.cer(["xy", "ab"], ["", "ab"], rounds=20).value == pytest.approx(2 / 2)  # what is read where nothing stands counts
    f = M.cer(["ab"] * 30, ["ab"] * 30)
    assert f.value == 0 and f.hi == pytest.approx(M.wilson(0, 30)[1])


# --- bad input: each is refused in plain words

BAD = {
    "lengths differ": lambda: M.accuracy([0, 1], [0]),
    "no items": lambda: M.accuracy([], []),
    "class unknown": lambda: M.confusion([0, 3], [0, 1], 3),
    "negative truth": lambda: M.accuracy([0], [-1]),
    "missing not allowed": lambda: M.confusion([-1], [0], 2),
    "scores for classes": lambda: M.confusion([.2, .7], [0, 1], 2),
    "NaN class": lambda: M.accuracy([np.nan], [0]),
    "one group": lambda: M.accuracy([0, 1], [0, 1], groups=["a", "a"]),
    "groups differ": lambda: M.accuracy([0, 1], [0, 1], groups=["a"]),
    "wilson n 0": lambda: M.wilson(0, 0),
    "wilson k > n": lambda: M.wilson(3, 2),
    "level": lambda: M.wilson(1, 2, 95),
    "pairs differ": lambda: M.paired_difference([1], [1, 0]),
    "pairs not bool": lambda: M.mcnemar([.3], [1]),
    "pairs empty": lambda: M.paired_difference([], []),
    "holm NaN": lambda: M.holm([.1, np.nan]),
    "statistic NaN": lambda: M.bootstrap(lambda w: np.full(len(w), np.nan), 3),
    "bootstrap empty": lambda: M.bootstrap(lambda w: w.sum(1), 0),
    "scheme": lambda: next(M.resample_weights(3, scheme="jackknife")),
    "NaN score": lambda: M.match_boxes([[0, 0, 1, 1]], [[0, 0, 1, 1]], [np.nan]),
    "scores differ": lambda: M.match_boxes([], [[0, 0, 1, 1]], [.5, .6]),
    "xywh": lambda: M.Boxes([0], [[10, 10, 5, 5]], [0]),
    "NaN box": lambda: M.Boxes([0], [[0, 0, np.nan, 5]], [0]),
    "five numbers": lambda: M.Boxes([0], [[0, 0, 1, 1, 1]], [0]),
    "no score": lambda: M.average_precision(M.Boxes([0], [[0, 0, 1, 1]], [0]), M.Boxes([0], [[0, 0, 1, 1]], [0])),
    "no truth": lambda: M.average_precision(M.Boxes([0], [[0, 0, 1, 1]], [0], score=[1]), M.Boxes([], [], [])),
    "only crowd": lambda: M.average_precision(M.Boxes([0], [[0, 0, 1, 1]], [0], score=[1]), M.Boxes([0], [[0, 0, 1, 1]], [0], crowd=[True])),
    "image unknown": lambda: M.average_precision(M.Boxes([7], [[0, 0, 1, 1]], [0], score=[1]), M.Boxes([0], [[0, 0, 1, 1]], [0]), images=[0]),
    "box class unknown": lambda: M.average_precision(M.Boxes([0], [[0, 0, 1, 1]], [5], score=[1]), M.Boxes([0], [[0, 0, 1, 1]], [0]), classes={0: "a"}),
    "figure unknown": lambda: M.average_precision(M.Boxes([0], [[0, 0, 1, 1]], [0], score=[1]), M.Boxes([0], [[0, 0, 1, 1]], [0]), names=["AP51"]),
    "texts differ": lambda: M.cer(["a"], ["a", "b"]),
    "no text": lambda: M.cer([None], ["a"]),
    "no texts": lambda: M.cer([], []),
    "norm": lambda: M.cer(["a"], ["a"], norm="nfc"),
    "no characters": lambda: M.cer(["a"], [""]),
    "figures key": lambda: M.per_class(np.eye(2, dtype=int))["recal"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    with pytest.raises(FsmlError) as e: BAD[case]()
    assert e.value.what and e.value.where and e.value.remedy
