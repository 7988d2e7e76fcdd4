"""Data under fire: the journal against a plain model, versions that never move, processes that write and die together, tensors that are the same every time."""
import csv, dataclasses, hashlib, itertools, json, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sqlalchemy as sa
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from scipy.ndimage import map_coordinates

import fsml_lab.data.journal as journal
import fsml_lab.data.load as load
import fsml_lab.data.version as version
from fsml_lab.core import Annotation, ClassTable, FsmlError, Lab, Preprocess, trace
from fsml_lab.data.journal import Dataset, NewSample
from fsml_lab.data.load import Loader, augment_affine, epoch_order, normalise, preprocess_pixels
from fsml_lab.data.version import verify
from data_worker import encode, label, new, pixels
from servers import postgresql

SAMPLES = Path(__file__).resolve().parent.parent/"data_samples"
NAMES = ["cat", "dog", "bird"]


@pytest.fixture(params=["sqlite", "postgresql"])
def lab(request, tmp_path):
    lab = Lab(tmp_path/"lab", durability="normal", database=postgresql.database() if request.param == "postgresql" else None)
    yield lab
    lab.engine.dispose()


@pytest.fixture
def ds(lab): return Dataset(lab, "pets", NAMES)


# ---- the journal ----

def test_an_import_is_idempotent_by_content(ds):
    first = ds.add([new(1), new(2), new(1)], progress=False)
    assert (first.added, first.known, first.refused, first.ids) == (2, 1, (), ("s001", "s002", "s001"))
    again = ds.add([NewSample(encode(pixels(2))), new(3)], progress=False)
    assert (again.added, again.known, again.ids, again.notes) == (1, 1, ("s002", "s003"), ())
    nameless = ds.add([encode(pixels(4))], progress=False).ids[0]
    assert nameless == hashlib.sha256(encode(pixels(4))).hexdigest()[:16]
    assert ds.samples()["sample_id"].tolist() == sorted(["s001", "s002", "s003", nameless])
    for i in (1, 2, 3): assert (ds.pixels(f"s{i:03d}") == pixels(i)).all()


def test_an_import_goes_on_after_broken_images(ds, tmp_path):
    good = encode(pixels(1))
    jpeg = encode(pixels(2, (40, 40)), "JPEG")
    (tmp_path/"empty.png").write_bytes(b"")
    (tmp_path/"good.png").write_bytes(encode(pixels(3)))
    bad = [NewSample(good[:len(good)//2], source="cut.png"), NewSample(jpeg[:len(jpeg)//2], source="cut.jpg"), NewSample(tmp_path/"empty.png"), NewSample(tmp_path/"missing.png"), NewSample(b"<html>", source="page.jpg"),
           NewSample(good, source="split.png", split="dev"), NewSample(encode(pixels(7)), source="meta.png", meta=dict(x=float("nan"))), NewSample(encode(pixels(8)), source="nul.png", group="a\0b"), NewSample(3.5, source="number")]
    items = [x for b in bad for x in (b, NewSample(encode(pixels(100 + bad.index(b)))))]
    r = ds.add([*items, tmp_path/"good.png", pixels(4)], progress=False)
    assert r.added == len(bad) + 2 and r.known == 0
    where = ["cut.png", "cut.jpg", str(tmp_path/"empty.png"), str(tmp_path/"missing.png"), "page.jpg", "split.png", "meta.png", "nul.png", "number"]
    assert sorted(w for w, _, _ in r.refused) == sorted(where) and all(what and remedy for _, what, remedy in r.refused)
    assert [not i for i in r.ids] == [True, False] * len(bad) + [False, False]
    assert len(ds.samples()) == r.added and (ds.pixels(r.ids[-1]) == pixels(4)).all()
    assert all(w in r._repr_html_() for w in where)


def test_one_id_for_one_image(ds):
    ds.add([new(1, split="train", group="g")], progress=False)
    r = ds.add([NewSample(encode(pixels(2)), "s001", source="other"), NewSample(encode(pixels(1)), "again", split="test", source="twin")], progress=False)
    assert (r.added, r.known, [x[0] for x in r.refused], [x[0] for x in r.notes]) == (0, 1, ["other"], ["twin"])
    assert "split" in r.notes[0][1] and "sample_id" in r.notes[0][1] and ds.sample("s001").split == "train"
    r = ds.add([NewSample(encode(pixels(3)), "x", source="first"), NewSample(encode(pixels(4)), "x", source="second")], progress=False)
    assert (r.added, [x[0] for x in r.refused]) == (1, ["second"])
    other = Dataset(ds.lab, "others", NAMES)
    assert other.add([new(1)], progress=False).added == 1   # known is meant within a data set


def test_imports_are_cut_into_batches(ds):
    items = [NewSample(encode(pixels(i % 40))) for i in range(60)]
    seen = []
    sizes = [len(b) for b in journal._batches(items, None, most=25)]
    assert sizes == [25, 25, 10] and [len(b) for b in journal._batches(items[:3], None, most_bytes=1)] == [1, 1, 1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(journal._batches, "__defaults__", (7, 64_000_000))
        seen = ds.add(iter(items), progress=False)
    assert (seen.added, seen.known, len(seen.ids)) == (40, 20, 60) and len(ds.samples()) == 40


def test_what_counts_is_the_newest_statement(ds):
    ds.add([new(1), new(2)], progress=False)
    ds.annotate([label("a", "s001", 0), label("b", "s001", 1, "ben"), label("c", "s002", 2)])
    now = lambda: dict(ds.labels()[["sample_id", "class_id"]].itertuples(index=False, name=None))
    assert now() == {"s001": 1, "s002": 2}
    assert ds.retract(["b"], author="ben") == 1 and ds.retract("b") == 0 and now() == {"s001": 0, "s002": 2}
    ds.annotate([label("b", "s001", 2, "ben")])   # said again under the same id
    assert now() == {"s001": 2, "s002": 2}
    assert ds.retract(["a", "b"]) == 2 and now() == {"s002": 2}
    ds.annotate([Annotation("box", "s001", "box", 0, (0, 0, 2, 2)), Annotation("box2", "s001", "box", 1, (0, 0, 7, 5)), Annotation("box", "s001", "box", 0, (.1, 0, 3, 3))])
    a = ds.annotations()
    boxes = a[a["kind"] == "box"]
    assert boxes["ann_id"].tolist() == ["box", "box2"] and np.array_equal(boxes["xyxy"].iloc[0], np.array([.1, 0, 3, 3], "f4"))
    assert len(ds.annotations(history=True)) == 10 and ds.annotations(history=True)["seq"].is_monotonic_increasing


MISFITS = [
    (label("x", "s001", 7), "no class with id 7"), (label("x", "nobody", 1), "no sample 'nobody'"), (label("x", "s001", 2), "retired"), (label("x", "gone", 1), "no sample 'gone'"),
    (Annotation("x", "s001", "box", 0, (0, 0, 7.5, 5)), "outside its image"), (Annotation("x", "s001", "polygon", 0, points=((0, 0), (7, 0), (0, 5.1))), "outside its image"),
    (label("x", "s001", 1, "a\0b"), "cannot be stored"), (label("x", "s001", 1, attrs={"x": float("inf")}), "cannot be stored"), (label("x", "s001", 1, "\ud800"), "cannot be stored"),
    (label("x", "s001", 1, active_s=float("nan")), "not finite"), (label("taken", "s002", 1), "belongs to a label of sample s001"), (Annotation("taken", "s001", "box", 0, (0, 0, 1, 1)), "belongs to a label"),
    (label("fine", "s001", 1), "belongs to a label of sample s002")]


def test_what_does_not_fit_is_refused_and_nothing_is_written(ds):
    ds.add([new(1), new(2), NewSample(encode(pixels(9)), "gone")], progress=False)
    ds.annotate([label("taken", "s001", 0)])
    ds.remove("gone")
    ds.change_classes(ds.classes.retire("bird"))
    before = ds.annotations(history=True)
    for bad, message in MISFITS:
        with pytest.raises(FsmlError, match=message) as e: ds.annotate([label("fine", "s002", 1), bad])
        assert e.value.where and e.value.remedy
    pd.testing.assert_frame_equal(ds.annotations(history=True), before)


def test_annotations_join_the_callers_transaction(ds):
    ds.add([new(1)], progress=False)
    with pytest.raises(ZeroDivisionError):
        with ds.lab.write() as conn:
            ds.annotate([label("a", "s001", 0)], conn=conn)
            1/0
    assert len(ds.annotations(history=True)) == 0
    with ds.lab.write() as conn: ds.annotate([label("a", "s001", 0)], conn=conn)
    assert len(ds.labels()) == 1


def test_data_sets_are_opened_made_and_told_apart(lab):
    with pytest.raises(FsmlError, match="no data set 'pets'"): Dataset(lab, "pets")
    ds = Dataset(lab, "pets", NAMES, "detect")
    assert Dataset(lab, "pets").classes.names == tuple(NAMES) and Dataset(lab, "pets").task == "detect" and Dataset(lab, "pets", NAMES, "detect").classes == ds.classes
    for args in (("pets", ["cat"], "detect"), ("pets", NAMES, "read"), ("a@b", NAMES), ("x", NAMES, "guess"), ("", NAMES)):
        with pytest.raises(FsmlError): Dataset(lab, *args)
    with pytest.raises(FsmlError, match="lacks the id 2"): ds.change_classes(ClassTable.of(NAMES[:2]))
    assert Dataset(lab, "forms", (), "read").classes.names == () and len(Dataset(lab, "forms").samples()) == 0


def test_removed_samples_stay_away_until_restored(ds):
    ds.add([new(1), new(2)], progress=False)
    ds.annotate([label("a", "s001", 0), label("b", "s002", 1)])
    assert ds.remove(["s001"], author="ada") == 1 and ds.remove(["s001"]) == 0
    with pytest.raises(FsmlError, match="no sample 'nobody'"): ds.remove(["s002", "nobody"])
    r = ds.add([new(1)], progress=False)
    assert (r.added, r.known, len(r.refused)) == (0, 0, 1) and ds.labels()["sample_id"].tolist() == ds.samples()["sample_id"].tolist() == ["s002"]
    with pytest.raises(FsmlError, match="was removed"): ds.sample("s001")
    assert ds.restore(["s001"]) == 1 and len(ds.labels()) == 2


# ---- versions ----

EDIT = st.one_of(st.tuples(st.just("add"), st.integers(0, 7), st.sampled_from(["train", "test", ""])),
                 st.tuples(st.just("label"), st.integers(0, 7), st.integers(0, 2)), st.tuples(st.just("box"), st.integers(0, 7), st.integers(0, 2)),
                 st.tuples(st.just("retract"), st.integers(0, 30), st.none()), st.tuples(st.just("remove"), st.integers(0, 7), st.none()), st.tuples(st.just("restore"), st.integers(0, 7), st.none()),
                 st.tuples(st.just("commit"), st.none(), st.none()))


class Model:
    "The rules in words, on a dictionary and a list."
    def __init__(self): self.split, self.gone, self.said, self.back = {}, set(), [], set()
    def apply(self, ds, n, what, i, x):
        s = f"s{i:03d}" if isinstance(i, int) else ""
        if what == "add":
            r = ds.add([new(i, split=x)], progress=False)
            if s not in self.split: self.split[s] = x
            assert bool(r.refused) == (s in self.gone)
        elif what in ("label", "box") and s in self.split and s not in self.gone:
            ds.annotate([label(f"n{n}", s, x) if what == "label" else Annotation(f"n{n}", s, "box", x, (0, 0, n/100 + 1, 1.1))])
            self.said.append((f"n{n}", s, what, x, (0., 0., n/100 + 1, 1.1) if what == "box" else None))
        elif what == "retract" and i < len(self.said):
            ds.retract([self.said[i][0]], author="ben")
            self.back.add(self.said[i][0])
        elif what == "remove" and s in self.split: self.gone |= {s} if ds.remove([s]) else set()
        elif what == "restore" and s in self.split: self.gone -= {s} if ds.restore([s]) else set()
    def state(self):
        here = {s: v for s, v in self.split.items() if s not in self.gone}
        live = [a for a in self.said if a[0] not in self.back and a[1] in here]
        labels = {a[1]: a[3] for a in live if a[2] == "label"}   # the newest wins
        return here, labels, {a[0]: (a[1], a[3], a[4]) for a in live if a[2] == "box"}


def frozen_state(f):
    boxes = f.annotations[f.annotations["kind"] == "box"]
    return (dict(zip(f.samples["sample_id"], f.samples["split"])), dict(zip(f.labels()["sample_id"], f.labels()["class_id"])),
            {r.ann_id: (r.sample_id, r.class_id, tuple(r.xyxy)) for r in boxes.itertuples()})


def same_state(a, b):
    assert a[:2] == b[:2] and a[2].keys() == b[2].keys()
    for k in a[2]: assert a[2][k][:2] == b[2][k][:2] and np.allclose(a[2][k][2], b[2][k][2], rtol=1e-7)   # boxes are float32


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(EDIT, min_size=5, max_size=30))
def test_old_versions_are_what_was_committed(edits, tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    ds, model, was = Dataset(Lab(home, durability="normal"), "pets", NAMES), Model(), {}
    for n, (what, i, x) in enumerate([*edits, ("commit", None, None)]):
        if what == "commit":
            v = ds.commit(f"after {n}")
            was[v.n] = (v.root, model.state())
        else: model.apply(ds, n, what, i, x)
    lab = Lab(home)   # as another process would open it
    assert sorted(was) == [v.n for v in Dataset(lab, "pets").versions()]
    for n, (root, state) in was.items():
        f = lab.open(f"pets@v{n}")
        same_state(frozen_state(f), state)
        assert f.version.root == root and verify(lab, f"pets@v{n}").ok
    roots = [was[n][0] for n in sorted(was)]
    assert all(a != b for a, b in itertools.pairwise(roots))   # a new version only when something changed
    for a, b in itertools.pairwise(sorted(was)): assert len(Dataset(lab, "pets").diff(a, b)) > 0
    lab.engine.dispose()
    ds.lab.engine.dispose()


def few(ds, n=6):
    ds.add([new(i, split="train" if i % 2 else "test") for i in range(n)], progress=False)
    ds.annotate([label(f"a{i}", f"s{i:03d}", i % 3) for i in range(n)])


def test_equal_content_equal_root(ds, tmp_path):
    few(ds)
    v1 = ds.commit("one")
    assert ds.commit("another message", author="somebody") == v1
    ds.remove(["s001"])
    v2 = ds.commit("two")
    ds.restore(["s001"])
    v3 = ds.commit("as it was")
    assert v1.root == v3.root != v2.root and [v.n for v in ds.versions()] == [1, 2, 3] and ds.lab.open(v1.root).version == v3
    assert {i for _, i in trace(ds.lab, "version", v2.root).nodes} == {v1.root} and trace(ds.lab, "version", v3.root).nodes == set()
    copy = Dataset(Lab(tmp_path/"copy"), "other", NAMES)   # the same rows, written backwards into another database
    for t in (journal.sample_t, journal.annotation_t):
        with ds.lab.read() as conn: rows = [dict(r._mapping) for r in conn.execute(sa.select(t))]
        with copy.lab.write() as conn: conn.execute(t.insert(), [{k: v for k, v in r.items() if k != "seq"} | dict(dataset=copy.name) for r in rows[::-1]])
    assert copy.commit("copied").root == v1.root
    copy.lab.engine.dispose()


def test_the_root_is_the_published_formula(ds):
    few(ds)
    ds.annotate([Annotation("box", "s001", "box", 1, (0, .1, 3, 3), attrs={"b": 1, "a": "ü"}, score=.3, at=5)])
    v = ds.commit("one", guide_version=4)
    f, hashes = ds.lab.open("pets@v1"), []
    for kind, table in (("sample", f._samples), ("annotation", f._annotations)):
        for r in table.set_column(table.schema.get_field_index("at"), "at", table["at"].cast("int64")).to_pylist():
            salt = r.pop("salt")
            text = json.dumps({**{k: x for k, x in r.items() if x is not None}, "row": kind}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            hashes.append(hashlib.sha256(salt + text.encode()).digest())
    header = json.dumps(dict(classes=ClassTable.of(NAMES).sha256, guide_version=4, salt="", schema=1, split_rule="", task="classify"), sort_keys=True, separators=(",", ":"))
    leaves = b"".join(hashlib.sha256(b"".join(sorted(h for h in hashes if h[0] == i))).digest() for i in range(256))
    assert v.root == hashlib.sha256(hashlib.sha256(header.encode()).digest() + leaves).hexdigest()
    with ds.lab.read() as conn: salts = [*conn.scalars(sa.select(journal.sample_t.c.salt)), *conn.scalars(sa.select(journal.annotation_t.c.salt))]
    assert len(set(salts)) == len(salts) == len(hashes) and {len(s) for s in salts} == {16}


def test_one_changed_label_is_one_line_of_the_diff(ds):
    few(ds)
    v1 = ds.commit("one")
    ds.annotate([label("new", "s002", 0, "ben", at=1_700_000_000_000_000)])
    assert ds.commit("two").root != v1.root
    d = ds.diff(1)
    assert d.rows.drop(columns="at").values.tolist() == [["s002", "s002", "label", "bird", "cat", "ben"]] and d.rows["at"][0] == pd.Timestamp("2023-11-14 22:13:20", tz="UTC")
    assert ds.diff("v2", "v1").rows[["old", "new"]].values.tolist() == [["cat", "bird"]] and len(ds.diff("v1", "pets@v1")) == 0
    ds.remove("s004", author="cy")
    ds.commit("three")
    gone = ds.diff("v2", "v3")
    assert gone.rows[["row", "field", "old", "new", "author"]].values.tolist() == [["s004", "sample", "7 x 5 px", None, "cy"], ["s004", "label", "dog", None, "cy"]] and "2 removed" in str(gone)
    assert "2 added" in str(ds.diff("v3", "v2")) and "no change" in str(ds.diff(1, 1)) and "<i>none</i>" in gone._repr_html_()
    assert "s002" in d._repr_html_() and "data:image/png" in d._repr_html_()


def test_a_diff_says_who_took_what_away(ds):
    few(ds)
    ds.annotate([Annotation("box", "s001", "box", 1, (0, 0, 3, 3)), label("again", "s003", 1, "ben"), label("again", "s003", 0, "ben")])
    ds.commit("one")
    ds.retract(["a0"], author="cy")
    ds.remove(["s002"], author="dan")
    ds.annotate([Annotation("box", "s001", "box", 1, (0, 0, 3, 4), author="eve"), label("same", "s005", 2, "flo")])
    ds.retract(["again"], author="gus")
    ds.add([new(9)], progress=False)
    ds.change_classes(dataclasses.replace(ds.classes, names=("cat", "hound", "bird")).add("fish"))
    ds.commit("two")
    rows = {(r.row, r.field): (r.old, r.new, r.author) for r in ds.diff(1).rows.itertuples()}
    assert rows == {("s000", "label"): ("cat", None, "cy"), ("s002", "label"): ("bird", None, "dan"), ("s002", "sample"): ("7 x 5 px", None, "dan"), ("box", "xyxy"): ([0, 0, 3, 3], [0, 0, 3, 4], "eve"),
                    ("s005", "restated"): ("ada", "flo", "flo"), ("s003", "restated"): ("ben", "ada", "ada"), ("s009", "sample"): (None, "7 x 5 px", ""),
                    ("classes", "name of 1"): ("dog", "hound", ""), ("classes", "name of 3"): (None, "fish", "")}
    assert (ds.diff(1).rows["at"].isna() == (ds.diff(1).rows["row"] == "classes")).all()


def test_what_is_opened_cannot_be_changed(ds):
    few(ds)
    ds.commit("one")
    f = ds.lab.open("pets@latest")
    s, a, l = f.samples, f.annotations, f.labels()
    s["split"], a["class_id"], l["class_id"] = "stolen", 9, 9
    s.iloc[0, 0] = "stolen"
    assert set(f.samples["split"]) == {"train", "test"} and f.labels("train")["sample_id"].tolist() == ["s001", "s003", "s005"] and f.labels()["class_id"].max() == 2
    assert (f.pixels("s004") == pixels(4)).all() and f.sample("s004") == ds.sample("s004") and f.bytes("s004") == encode(pixels(4))
    assert f is ds.lab.open(f.version.root) and f.version == ds.version(1)
    for ref in ("pets@v2", "pets@v0", "pets", "dogs@latest", "pets@vx", "0" * 64, f.version.root[:7], "%", ""):
        with pytest.raises(FsmlError, match="pets@v1"): ds.lab.open(ref)
    with pytest.raises(FsmlError, match="no split"): f.labels("dev")
    with pytest.raises(FsmlError, match="no sample"): f.pixels("nobody")
    with pytest.raises(FsmlError, match="ds.commit"): Lab(ds.lab.home.parent/"empty").open("x@v1")


@pytest.mark.parametrize("what", ["samples", "annotations", "classes", "record", "blob"])
def test_verify_names_what_is_damaged_or_missing(lab, what):
    ds = Dataset(lab, "pets", NAMES)
    few(ds)
    ds.commit("one")
    f = lab.open("pets@v1")
    sha = {"record": version._find(lab, "pets@v1").record, "blob": f.sample("s003").blob}.get(what) or f._objects[what]
    path = lab.home/"blobs"/sha[:2]/sha[2:]
    data, rng = path.read_bytes(), np.random.default_rng(0)
    assert verify(lab, "pets@v1").ok and (verify(lab, "pets@v1").rows, verify(lab, "pets@v1").images) == (12, 6)
    for at in [0, len(data) - 1, *rng.integers(0, len(data), 5)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1:])
        v = verify(lab, "pets@v1")
        assert [p[0] for p in v.problems] == [{"record": "the version's record", "blob": "image of sample s003"}.get(what, f"the {what}")] and "damaged" in v.problems[0][1]
    path.unlink()
    assert "no object" in verify(lab, "pets@v1").problems[0][1]
    path.write_bytes(data)
    assert verify(lab, "pets@v1").ok


def test_verify_finds_a_forged_row(lab):
    "Objects whose own hashes are right, but which are not what the root says."
    ds = Dataset(lab, "pets", NAMES)
    few(ds)
    ds.commit("one")
    f = lab.open("pets@v1")
    forged = f._annotations.set_column(3, f._annotations.schema.field(3), pa.array([1] * 6, pa.int32()))
    r = dict(fsml="version", schema=1, version=f.version.to_dict(), task=f.task, objects=f._objects | dict(annotations=lab.store().put(version._to_ipc(forged))))
    with lab.write() as conn: conn.execute(version.version_t.update().values(record=lab.store().put(json.dumps(r).encode())))
    assert [p[0] for p in verify(lab, "pets@v1").problems] == ["the root"]


# ---- together ----

def start(lab, *ks, rounds):
    "Processes that write to the data set, all ready and let loose together."
    ps = [subprocess.Popen([sys.executable, Path(__file__).with_name("data_worker.py"), lab.home, lab.settings.database, str(k), str(rounds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for k in ks]
    assert [p.stdout.readline() for p in ps] == ["ready\n"] * len(ps)
    for p in ps:
        p.stdin.write("go\n")
        p.stdin.flush()
    return ps


def test_two_processes_add_annotate_and_commit_at_once(lab):
    ds, rounds = Dataset(lab, "pets", NAMES), 12
    for p in start(lab, 0, 1, rounds=rounds): assert p.wait(120) == 0
    ds.commit("the end")
    vs = ds.versions()
    assert [v.n for v in vs] == list(range(1, len(vs) + 1)) and all(b.parent == a.root for a, b in itertools.pairwise(vs)) and len({v.root for v in vs}) == len(vs)
    assert len(ds.samples()) == 3 * rounds and len(ds.annotations(history=True)) == 4 * rounds   # nothing lost, nothing double
    own = dict(lab.open("pets@latest").labels()[["sample_id", "class_id"]].itertuples(index=False, name=None))
    assert all(own[f"s{100 + 50*k + r:03d}"] == k for k in (0, 1) for r in range(rounds))
    seen = [set(lab.open(str(v)).samples["sample_id"]) for v in vs]
    assert all(a <= b for a, b in itertools.pairwise(seen)) and {v.message.split()[0] for v in vs} >= {"w0", "w1"}
    assert verify(lab, "pets@latest").ok


def test_a_commit_that_was_overtaken_reads_again(ds, monkeypatch):
    few(ds)
    real, once = version._store_objects, []
    def overtaken(lab, s):
        if not once:
            once.append(1)
            ds.annotate([label("faster", "s000", 2, "ben")])
            ds.commit("faster")
        return real(lab, s)
    monkeypatch.setattr(version, "_store_objects", overtaken)
    v = ds.commit("slower")
    assert [x.message for x in ds.versions()] == ["faster"] and v.message == "faster"   # nothing was left to freeze
    once.clear()
    ds.annotate([label("x", "s001", 0, at=1)])
    monkeypatch.setattr(version, "_try_commit", lambda *a: None)
    with pytest.raises(FsmlError, match="nothing is lost"): ds.commit("never")


def test_killed_in_the_middle_nothing_is_half(lab):
    ds = Dataset(lab, "pets", NAMES)
    p, end = start(lab, 0, rounds=1000)[0], time.monotonic() + 60
    while len(ds.versions()) < 3 and time.monotonic() < end: time.sleep(.002)
    time.sleep(.0371)
    p.kill()
    assert p.wait() == -9   # it was still at work
    vs = ds.versions()
    assert len(vs) >= 3 and [v.n for v in vs] == list(range(1, len(vs) + 1)) and all(verify(lab, str(v)).ok for v in vs)
    assert all(ds.pixels(s).shape == (5, 7, 3) for s in ds.samples()["sample_id"])
    ds.commit("after the kill")
    assert lab.open("pets@latest").labels()["sample_id"].tolist() == ds.labels()["sample_id"].tolist()


# ---- the loader ----

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    ds = Dataset(Lab(tmp_path_factory.mktemp("digits"), durability="normal"), "digits", [str(i) for i in range(10)])
    rows = list(csv.DictReader(open(SAMPLES/"digits"/"labels.csv")))[::12]
    ds.add([NewSample(SAMPLES/"digits"/r["file"], r["file"][:5], r["group"], r["split"]) for r in rows], progress=False)
    ds.annotate([label(r["file"], r["file"][:5], int(r["label"])) for r in rows[:-2]])
    ds.commit("digits")
    return ds.lab.open("digits@v1"), {r["file"][:5]: (int(r["label"]), np.asarray(Image.open(SAMPLES/"digits"/r["file"]))) for r in rows}


GREY = Preprocess(size=(8, 8), mean=(.2,), std=(.5,), colour="grey")


def drain(loader): return [(b.sample_ids, b.image.numpy().tobytes(), b.image.shape, b.labels.tolist(), b.original_size.tolist()) for b in loader]


def test_batches_are_right(digits):
    data, true = digits
    got = list(Loader(data, None, GREY, 16))
    assert [len(b) for b in got] == [16] * (len(true) // 16) + [len(true) % 16] and len(Loader(data, None, GREY, 16, drop_last=True)) == len(true) // 16
    for b in got:
        assert b.image.dtype == torch.uint8 and b.image.shape[1:] == (1, 8, 8) and b.image.is_contiguous(memory_format=torch.channels_last) and b.labels.dtype == torch.int64
        for s, x, y, size in zip(b.sample_ids, b.image, b.labels, b.original_size):
            assert np.array_equal(x[0], true[s][1]) and int(y) == (true[s][0] if s in set(data.labels()["sample_id"]) else -1) and size.tolist() == [8, 8]
    assert [s for b in got for s in b.sample_ids] == sorted(true)
    rgb = next(iter(Loader(data, sorted(true)[5:8][::-1], Preprocess(size=(11, 6)), 2)))
    assert rgb.sample_ids == tuple(sorted(true)[6:8][::-1]) and rgb.image.shape == (2, 3, 11, 6) and torch.equal(rgb.image[:, 0], rgb.image[:, 2])
    assert next(iter(Loader(data, sorted(true)[:2], GREY, labels={sorted(true)[1]: 4}))).labels.tolist() == [-1, 4]
    assert list(Loader(data, [], GREY)) == [] and list(Loader(data, [], GREY, threads=2)) == []


@pytest.mark.parametrize("kw", [dict(threads=0), dict(threads=2), dict(threads=3), dict(cache_bytes=0), dict(cache_bytes=64 * 50), dict(cache_bytes=64 * 50, threads=3)])
def test_the_same_tensors_however_they_are_made(digits, kw):
    data, _ = digits
    base = dict(shuffle=True, seed=5)
    plain, other = Loader(data, None, GREY, 16, **base), Loader(data, None, GREY, 16, **base, **kw)
    for epoch in (0, 1, 0, 7):
        plain.set_epoch(epoch)
        other.set_epoch(epoch)
        assert drain(plain) == drain(other) == drain(Loader(data, None, GREY, 16, **base, epoch=epoch))


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {(s, e): tuple(epoch_order(200, s, e)) for s in range(4) for e in range(4)}
    assert len(set(orders.values())) == 16 and all(sorted(o) == list(range(200)) for o in orders.values())
    first = [epoch_order(10, 0, e)[0] for e in range(2000)]
    assert max(abs(np.bincount(first, minlength=10) - 200)) < 5 * np.sqrt(200 * .9)   # 5 sigma of a binomial: uniform


def test_a_loop_that_is_left_early_ends_cleanly(digits):
    data, _ = digits
    loader = Loader(data, None, GREY, 8, threads=3, cache_bytes=0)
    want = drain(loader)
    for k in (1, 2):
        for n, b in enumerate(loader):
            if n == k: break
        assert drain(loader) == want


def test_a_damaged_image_stops_the_loader_with_its_name(tmp_path):
    ds = Dataset(Lab(tmp_path, durability="normal"), "pets", NAMES)
    few(ds)
    ds.commit("one")
    f = ds.lab.open("pets@v1")
    sha = f.sample("s004").blob
    (tmp_path/"blobs"/sha[:2]/sha[2:]).write_bytes(b"rot")
    for threads in (1, 3):
        with pytest.raises(FsmlError, match=sha[:12]): list(Loader(f, None, Preprocess(size=(4, 4)), 2, threads=threads))
    for kw, message in ((dict(batch_size=0), "batches of 0"), (dict(threads=-1), "-1 threads"), (dict(labels={"s000": 8}), "no class with id 8")):
        with pytest.raises(FsmlError, match=message): Loader(f, None, Preprocess(size=(4, 4)), **kw)
    with pytest.raises(FsmlError, match="cannot decode 'fast'"): Loader(f, None, Preprocess(size=(4, 4), decode="fast"))
    with pytest.raises(FsmlError, match="no sample 'x'"): Loader(f, ["x"], Preprocess(size=(4, 4)))


def test_class_indices_are_positions_in_the_class_table(tmp_path):
    ds = Dataset(Lab(tmp_path, durability="normal"), "pets", ClassTable((3, 7, 20), tuple(NAMES)))
    ds.add([new(i) for i in range(3)], progress=False)
    ds.annotate([label(f"a{i}", f"s{i:03d}", c) for i, c in enumerate((20, 3, 7))])
    ds.commit("one")
    assert next(iter(Loader(ds.lab.open("pets@v1"), None, Preprocess(size=(5, 7))))).labels.tolist() == [2, 0, 1]


def test_boxes_follow_the_resize_and_texts_come_along(tmp_path):
    lab = Lab(tmp_path, durability="normal")
    det, read = Dataset(lab, "det", NAMES, "detect"), Dataset(lab, "read", (), "read")
    for ds in (det, read): ds.add([new(0), new(1)], progress=False)
    det.annotate([Annotation("b1", "s001", "box", 0, (0, 0, 7, 5)), Annotation("b2", "s001", "box", 1, (3.5, 1, 7, 2))])
    read.annotate([Annotation("t", "s001", "text", text="naïve")])
    for ds in (det, read): ds.commit("one")
    b = next(iter(Loader(lab.open("det@v1"), None, Preprocess(size=(10, 28)))))
    assert [x.shape for x in b.boxes] == [(0, 4), (2, 4)] and b.boxes[0].dtype == b.boxes[1].dtype == torch.float32 and b.original_size.tolist() == [[5, 7]] * 2
    assert b.boxes[1].tolist() == [[0, 0, 28, 10], [14, 2, 28, 4]] and [x.tolist() for x in b.labels] == [[], [0, 1]]
    assert next(iter(Loader(lab.open("read@v1"), None, Preprocess(size=(10, 28))))).text == ("", "naïve")
    read.annotate([Annotation("t2", "s001", "text", text="again")])
    read.commit("two")
    with pytest.raises(FsmlError, match="more than one text"): Loader(lab.open("read@v2"), None, Preprocess(size=(10, 28)))


@settings(max_examples=150, deadline=None)
@given(source=st.tuples(st.integers(1, 90), st.integers(1, 90)), target=st.tuples(st.integers(1, 60), st.integers(1, 60)), grey=st.booleans(), seed=st.integers(0, 2**31))
def test_resize_is_pillows_within_one_grey_level(source, target, grey, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*source, 1 if grey else 3), np.uint8) if seed % 2 else rng.choice(np.array([0, 255], np.uint8), (*source, 1 if grey else 3))
    got = preprocess_pixels(image, Preprocess(size=target, colour="grey", mean=(0,), std=(1,)) if grey else Preprocess(size=target))
    want = np.asarray(Image.fromarray(image[..., 0] if grey else image).resize(target[::-1], Image.Resampling.BILINEAR)).reshape(got.shape)
    assert got.dtype == np.uint8 and got.flags.c_contiguous and np.abs(got.astype(int) - want).max() <= 1
    if source == target: assert np.array_equal(got, image)


def test_pixels_that_do_not_fit_are_refused():
    pre = Preprocess(size=(4, 4))
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(FsmlError, match="uint8|These pixels"): preprocess_pixels(bad, pre)
    frozen = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    frozen.setflags(write=False)
    assert np.array_equal(preprocess_pixels(frozen, pre), frozen) and preprocess_pixels(frozen, Preprocess(size=(2, 2))).shape == (2, 2, 3)
    x = torch.from_numpy(pixels(0)).permute(2, 0, 1)[None]
    p = Preprocess(size=(5, 7), mean=(.1, .2, .3), std=(.5, 1, 2))
    assert np.allclose(normalise(x, p)[0].permute(1, 2, 0), (pixels(0)/255 - [.1, .2, .3]) / [.5, 1, 2], atol=1e-6)
    with pytest.raises(FsmlError, match="normalise once"): normalise(x.float(), p)


# ---- the augmentation ----

def test_a_sample_gets_its_transform_in_any_company():
    x = torch.rand(23, 3, 9, 14, generator=torch.Generator().manual_seed(0))
    ids = [f"s{i}" for i in range(23)]
    whole = augment_affine(x, ids, 1, 2)
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 23):
        for memory in (torch.contiguous_format, torch.channels_last):
            perm = rng.permutation(23)
            got = torch.empty_like(whole)
            for k in range(0, 23, size):
                i = perm[k:k + size]
                got[i] = augment_affine(x[i].to(memory_format=memory), [ids[j] for j in i], 1, 2)
            assert torch.equal(got, whole)
    assert not any(torch.equal(a, b) for a, b in zip(whole, augment_affine(x, ids, 1, 3))) and not any(torch.equal(a, b) for a, b in zip(whole, augment_affine(x, ids, 2, 2)))
    for bad in ((x[0], ids), (x, ids[:2]), ((x * 255).to(torch.uint8), ids)):
        with pytest.raises(FsmlError, match="cannot be augmented"): augment_affine(*bad, 0, 0)


def test_augmentation_against_scipy():
    "Turned about the centre in pixels, scaled, shifted: scipy's interpolation at coordinates computed the school way."
    h, w, ids = 20, 31, ["a", "b", "c"]
    x = torch.rand(3, 1, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = augment_affine(x, ids, 3, 4, degrees=40, scale=(.5, 2), translate=.2)
    for k, s in enumerate(ids):
        u = load._uniform(("affine", 3, 4, s), 4)
        a, z = np.deg2rad((2*u[0] - 1) * 40), .5 * 4**u[1]
        shift = (2*np.array(u[2:]) - 1) * .2 * (w, h)
        turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) / z
        yy, xx = np.mgrid[:h, :w]
        out = np.stack([xx + .5 - w/2, yy + .5 - h/2], -1) - shift           # px from the centre
        src = out @ turn.T + [w/2 - .5, h/2 - .5]
        want = map_coordinates(x[k, 0].numpy(), [src[..., 1].clip(0, h - 1), src[..., 0].clip(0, w - 1)], order=1)
        assert np.allclose(got[k, 0], want, atol=1e-9)


def test_augmentation_draws_evenly():
    u = np.array([load._uniform((0, 0, i), 4) for i in range(4000)])
    assert (0 <= u).all() and (u < 1).all() and np.abs(u.mean(0) - .5).max() < 5 * np.sqrt(1/12/4000)       # 5 sigma
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 5 / np.sqrt(4000)
