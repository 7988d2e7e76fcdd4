"""The lab under strain: settings from everywhere, many processes at once, kills, full disks, random lineages."""
import json, os, pickle, resource, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
import sqlalchemy as sa
from hypothesis import given, settings as hyp, strategies as st

from fsml_lab import core
from fsml_lab.core import (SCHEMA, Annotation, ClassTable, Edge, Figure, FsmlError, Lab, Lease, Predictions, Preprocess, Report, Run, Sample, Store, Verdict, Version, arrow_schema, atomic_write, ensure,
                           find_settings, from_table, link, load_settings, nfc, predictions_bytes, predictions_from_bytes, sha256, to_table, trace)
from servers import postgresql


@pytest.fixture(params=["sqlite", "postgresql"])
def lab(request, tmp_path):
    lab = Lab(tmp_path/"lab", database=postgresql.database() if request.param == "postgresql" else None)
    yield lab
    lab.engine.dispose()


def python(code: str, *args, **kw) -> subprocess.Popen: return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


# ---- settings ----

def test_the_nearest_settings_file_of_ours_counts(tmp_path, monkeypatch):
    (tmp_path/"settings.ini").write_text("[fsml]\nhome = ours\n")
    deep = tmp_path/"a"/"b"
    deep.mkdir(parents=True)
    (tmp_path/"a"/"settings.ini").write_text("[DEFAULT]\nlib_name = somebody_elses\n")  # nbdev 2's
    monkeypatch.chdir(deep)
    assert find_settings() == (tmp_path/"settings.ini").resolve()
    assert load_settings().home == tmp_path.resolve()/"ours"  # relative to the file, not to where we stand
    monkeypatch.setenv("FSML_HOME", "here")
    assert load_settings().home == deep.resolve()/"here"
    assert load_settings(home=tmp_path/"there").home == tmp_path.resolve()/"there"


@pytest.mark.parametrize("text, message", [("threads = 0", "whole number"), ("threads = two", "whole number"), ("durability = maybe", "full or normal"), ("datbase = x", "Did you mean 'database'"), ("colour = red", "Known keys"),
                                           ("home", "cannot be read")])
def test_bad_settings_name_the_key_and_the_file(tmp_path, text, message):
    f = tmp_path/"settings.ini"
    f.write_text(f"[fsml]\n{text}\n")
    with pytest.raises(FsmlError, match=message) as e: load_settings(f)
    assert str(f) in str(e.value) and e.value.remedy


def test_a_mistyped_variable_is_named(monkeypatch):
    monkeypatch.setenv("FSML_THREDS", "2")
    with pytest.raises(FsmlError, match="Did you mean 'threads'") as e: load_settings()
    assert "environment variable FSML_THREDS" in e.value.where


def test_a_missing_settings_file_and_one_without_our_section(tmp_path):
    with pytest.raises(FsmlError, match="no such settings file"): load_settings(tmp_path/"none.ini")
    (tmp_path/"settings.ini").write_text("[other]\n")
    with pytest.raises(FsmlError, match=r"no \[fsml\] section"): load_settings(tmp_path/"settings.ini")


# ---- the home ----

def test_a_home_that_cannot_be_used_is_refused_and_left_alone(tmp_path):
    with pytest.raises(FsmlError, match="not writable"): Lab("/proc/fsml_lab_home")
    (tmp_path/"file").write_text("x")
    with pytest.raises(FsmlError, match="is a file"): Lab(tmp_path/"file")
    assert (tmp_path/"file").read_text() == "x"


def test_a_home_of_a_newer_version_is_refused_before_anything_is_written(tmp_path):
    home = tmp_path/"lab"
    home.mkdir()
    (home/"lab.toml").write_text(f"schema = {SCHEMA + 1}\n")
    with pytest.raises(FsmlError, match="newer fsml_lab"): Lab(home)
    assert [p.name for p in home.iterdir()] == ["lab.toml"]
    (home/"lab.toml").write_text("what is this")
    with pytest.raises(FsmlError, match="cannot be read"): Lab(home)


def test_a_database_of_a_newer_version_is_refused(lab):
    ensure(lab, sa.MetaData())
    with lab.write() as c: c.execute(sa.text(f"UPDATE fsml_meta SET value = '{SCHEMA + 1}'"))
    with pytest.raises(FsmlError, match="database was made by a newer"): ensure(lab, sa.MetaData())


@pytest.mark.parametrize("url, message", [("mysql://host/db", "SQLite or PostgreSQL"), ("no url", "no database URL"), ("postgresql://nobody@127.0.0.1:1/none", "does not answer")])
def test_a_database_that_cannot_be_used(tmp_path, url, message):
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed: pip install 'fsml_lab[postgres]'")
    with pytest.raises(FsmlError, match=message): Lab(tmp_path/"lab", database=url).engine


def test_a_lab_crosses_to_another_process(tmp_path):
    lab = pickle.loads(pickle.dumps(Lab(tmp_path/"lab", threads=3)))
    assert lab.home == tmp_path/"lab" and lab.settings.threads == 3


# ---- the database ----

_MANY = """
import sys, sqlalchemy as sa
from fsml_lab.core import Lab, ensure
lab = Lab(sys.argv[1], database=sys.argv[2] or None)
t = sa.Table("tally", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
ensure(lab, t.metadata)
for i in range(int(sys.argv[3])):
    with lab.write() as c:
        row = c.execute(sa.select(t.c.n).where(t.c.id == 1).with_for_update()).first()
        if row is None:
            if c.dialect.name == "postgresql": c.execute(sa.text("LOCK TABLE tally IN EXCLUSIVE MODE")); row = c.execute(sa.select(t.c.n).where(t.c.id == 1)).first()
        c.execute(t.insert().values(id=1, n=1)) if row is None else c.execute(t.update().where(t.c.id == 1).values(n=row.n + 1))
"""


def test_four_processes_open_a_new_lab_at_once_and_no_write_is_lost(lab):
    procs = [python(_MANY, lab.home, lab.settings.database, 40) for _ in range(4)]
    errors = [p.communicate(timeout=120)[1] for p in procs]
    assert [p.returncode for p in procs] == [0]*4, errors
    with lab.read() as c: assert c.scalar(sa.text("SELECT n FROM tally")) == 160


def test_a_transaction_that_raises_leaves_nothing(lab):
    ensure(lab, core._edges().metadata)
    with pytest.raises(ZeroDivisionError), lab.write() as c:
        c.execute(core._edges().insert().values(child_kind="a", child_id="1", parent_kind="b", parent_id="2", role=""))
        1/0
    assert not trace(lab, "a", "1").edges
    link(lab, Edge("a", "1", "b", "2"))  # and the lab is usable


def test_threads_share_a_lab(lab):
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda i: link(lab, Edge("run", str(i), "version", "v1")), range(40)))
    assert len(trace(lab, "version", "v1", down=True).nodes) == 40


# ---- files ----

_WRITER = """
import sys
from fsml_lab.core import atomic_write
i = 0
while True:
    atomic_write(sys.argv[1], bytes([i % 256])*300_000); i += 1
    if i == 1: print("on", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    f = tmp_path/"f"
    for k in range(5):
        p = python(_WRITER, f)
        assert p.stdout.readline() == "on\n"
        time.sleep(.003*k)
        p.send_signal(signal.SIGKILL)
        p.wait()
        data = f.read_bytes()
        assert len(data) == 300_000 and len(set(data)) == 1


def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path):
    f = atomic_write(tmp_path/"f", b"old")
    code = "import sys, signal; from fsml_lab.core import *; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\ntry: atomic_write(sys.argv[1], b'n'*5_000_000)\nexcept FsmlError as e: print(e.what)"
    p = python(code, f, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)))  # a quota: writing beyond it fails as on a full disk
    out, err = p.communicate(timeout=60)
    assert "cannot be written" in out, err
    assert f.read_bytes() == b"old" and [x.name for x in tmp_path.iterdir()] == ["f"]


def test_many_threads_write_and_the_umask_stays(tmp_path):
    old = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool: files = list(pool.map(lambda i: atomic_write(tmp_path/str(i), b"x"), range(200)))
        assert {f.stat().st_mode & 0o777 for f in files} == {0o640} and os.umask(0o027) == 0o027
    finally: os.umask(old)


def test_the_store_keeps_once_and_notices_damage(tmp_path):
    s = Store(tmp_path/"blobs")
    sha = s.put(b"x"*1000)
    assert sha == sha256(b"x"*1000) == s.put(b"x"*1000) and s.has(sha) and s.get(sha) == b"x"*1000
    with pytest.raises(FsmlError, match="no object"): s.get(sha256(b"other"))
    m = Store("memory://fsml-test")  # another fsspec file system
    assert m.get(m.put(b"y")) == b"y"
    with pytest.raises(FsmlError, match="cannot be opened"): Store("nosuch://x")


# ---- the types ----

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).map(nfc)
name = text.filter(bool)
px = st.floats(0, 5000, width=32)
sha = st.text("0123456789abcdef", min_size=64, max_size=64)
plain = st.dictionaries(text, st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text, max_size=3)
when = st.integers(0, 4_000_000_000_000_000)


@st.composite
def annotations(draw):
    kind = draw(st.sampled_from(["label", "box", "polygon", "text"]))
    x, y = sorted(draw(st.lists(px, min_size=2, max_size=2, unique=True))), sorted(draw(st.lists(px, min_size=2, max_size=2, unique=True)))
    geometry = dict(label=dict(class_id=draw(st.integers(0, 2**31 - 1))), box=dict(xyxy=(x[0], y[0], x[1], y[1])), polygon=dict(points=draw(st.lists(st.tuples(px, px), min_size=3, max_size=5))), text=dict(text=draw(text)))
    return Annotation(draw(name), draw(name), kind, **geometry[kind], attrs=draw(plain), score=draw(st.none() | st.floats(0, 1, width=32)), author=draw(text), guide_version=draw(st.integers(0, 99)), at=draw(when), active_s=draw(st.floats(0, 1000, width=32)))


@st.composite
def figures(draw):
    lo, v, hi = sorted(draw(st.lists(st.floats(-1e9, 1e9), min_size=3, max_size=3)))
    ci = draw(st.booleans())
    return Figure(draw(name), v, lo if ci else None, hi if ci else None, n=draw(st.integers(0, 10**9)), unit=draw(st.sampled_from(["", "ms"])), better=draw(st.sampled_from(["higher", "lower"])), slice=draw(text), method=draw(text), stage=draw(text))


shared = st.one_of(
    annotations(), figures(),
    st.lists(name, unique=True, max_size=5).map(ClassTable.of),
    st.builds(Sample, name, sha, st.integers(1, 10**6), st.integers(1, 10**6), text, st.sampled_from(["train", "valid", "test", ""]), text, text, text, plain),
    st.builds(Version, name, st.integers(1, 10**6), sha, message=text, author=text, at=when),
    st.builds(Preprocess, st.tuples(st.integers(1, 4096), st.integers(1, 4096))),
    st.builds(Run, name, name, plain, seed=st.integers(0, 2**32 - 1), dirty=st.booleans()),
    st.builds(Report, st.lists(figures(), max_size=3).map(tuple), looks=st.integers(0, 9)),
    st.builds(Verdict, name, st.sampled_from(["PASS", "FAIL", "MISSING", "WAIVED"]), text, st.none() | figures()),
    st.builds(Lease, name, name, name, name, when), st.builds(Edge, name, name, name, name, text))


@hyp(max_examples=150, deadline=None)
@given(shared)
def test_json_round_trip_and_schema(x):
    again = type(x).from_json(x.to_json())
    assert again == x and again.sha256 == x.sha256
    jsonschema.validate(json.loads(x.to_json()), type(x).json_schema())  # a reader of the schema accepts what we write


@hyp(max_examples=60, deadline=None)
@given(st.lists(annotations(), max_size=6))
def test_arrow_round_trip(anns): assert from_table(to_table(anns, Annotation), Annotation) == anns


def test_arrow_schema_carries_kind_and_version():
    assert arrow_schema(Sample).metadata == {b"fsml": b"Sample", b"schema": b"1"}
    assert str(arrow_schema(Annotation).field("xyxy").type).startswith("fixed_size_list<") and str(arrow_schema(Annotation).field("at").type) == "timestamp[us, tz=UTC]"


@pytest.mark.parametrize("make, message", [
    (lambda: Sample("", "0"*64, 1, 1), "not empty"), (lambda: Sample("a", "xyz", 1, 1), "sha256"), (lambda: Sample("a", "0"*64, 0, 1), "positive"), (lambda: Sample("a", "0"*64, 1.5, 1), "int"),
    (lambda: Sample("a", "0"*64, 1, 1, split="holdout"), "split"), (lambda: Annotation("a", "s", "circle"), "kind"), (lambda: Annotation("a", "s", "box", xyxy=(0, 0, float("nan"), 1)), "finite"),
    (lambda: Annotation("a", "s", "box", xyxy=(0, 0, 0, 1)), "x0 < x1"), (lambda: Annotation("a", "s", "text", text="e\u0301"), "NFC"), (lambda: Annotation("a", "s", "label", class_id=1, score=1.2), "between 0 and 1"),
    (lambda: ClassTable((1, 0), ("a", "b")), "ascending"), (lambda: ClassTable.of(["a", "a"]), "unique"), (lambda: Version("v", 0, "0"*64), "1 or more"), (lambda: Figure("x", 1., 2., 3.), "below value"),
    (lambda: Verdict("t", "MAYBE", ""), "state"), (lambda: Preprocess((0, 8)), "positive"), (lambda: Run("r", "train", config=[1]), "dict")])
def test_wrong_values_are_named(make, message):
    with pytest.raises(FsmlError, match=message): make()


def test_a_newer_schema_and_an_unknown_field_are_refused():
    d = Version("v", 1, "0"*64).to_dict()
    with pytest.raises(FsmlError, match="schema 2, newer"): Version.from_dict({**d, "schema": 2})
    with pytest.raises(FsmlError, match="Unknown field 'colour'"): Version.from_dict({**d, "colour": 1})
    with pytest.raises(FsmlError, match="lacks a field"): Version.from_dict({"name": "v"})


@pytest.mark.parametrize("columns, message", [
    (dict(sample_id=[None], kind=["none"]), "no sample"), (dict(sample_id=["a"], kind=["cat"]), "Unknown kind"), (dict(sample_id=["a"], kind=["label"], score=[1.5]), "outside 0 to 1"), (dict(sample_id=["a"], colour=["red"]), "no column 'colour'"),
    (dict(sample_id=["a"], kind=["box"], xyxy=[[0, 0, float("inf"), 1]]), "not xyxy"), (dict(sample_id=["a"], kind=["label"], class_id=["three"]), "does not fit")])
def test_wrong_predictions_name_row_and_sample(columns, message):
    with pytest.raises(FsmlError, match=message): Predictions.of(columns)


def test_predictions_bytes_are_checked():
    p = Predictions.of(dict(sample_id=["a"], kind=["label"], class_id=[1], score=[.5], probs=[[.5, .5]]), run_id="r")
    assert predictions_from_bytes(predictions_bytes(p)).rows.equals(p.rows)
    with pytest.raises(FsmlError, match="no Arrow file"): predictions_from_bytes(b"junk")
    with pytest.raises(FsmlError, match="no Arrow file"): predictions_from_bytes(predictions_bytes(p)[:-20])


# ---- lineage ----

@hyp(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25))
def test_trace_finds_what_a_search_finds(tmp_path_factory, pairs):
    lab = Lab(tmp_path_factory.mktemp("lab"), durability="normal")
    parents = {}
    for a, b in pairs:  # the child has the larger number, so no circle can arise
        if a != b:
            parents.setdefault(max(a, b), set()).add(min(a, b))
            link(lab, Edge("n", str(max(a, b)), "n", str(min(a, b))))
    for start in range(10):
        seen, todo = set(), [start]
        while todo: todo += [p for p in parents.get(todo.pop(), ()) if p not in seen and not seen.add(p)]
        assert {int(i) for _, i in trace(lab, "n", str(start)).nodes} == seen
    lab.engine.dispose()


def test_a_circle_is_refused_and_an_edge_is_kept_once(lab):
    link(lab, Edge("b", "1", "a", "1"), Edge("c", "1", "b", "1"))
    link(lab, Edge("b", "1", "a", "1"))
    assert len(trace(lab, "c", "1").edges) == 2
    for e in (Edge("a", "1", "c", "1"), Edge("a", "1", "a", "1")):
        with pytest.raises(FsmlError, match="own ancestor"): link(lab, e)
    assert str(trace(lab, "c", "1")) == "c 1\n└─ b 1\n   └─ a 1"
