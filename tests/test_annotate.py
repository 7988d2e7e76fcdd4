"""Labelling: the queue on both databases, and both widgets driven from Python."""
import base64, csv, io, os, subprocess, sys
from collections import Counter
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from fsml_lab.annotate.label import Labeller, label, picture
from fsml_lab.annotate.queue import LabelQueue
from fsml_lab.core import FsmlError, Lab
from fsml_lab.data.journal import Dataset, NewSample
from servers import postgresql

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT/"data_samples"/"digits"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
with open(DIGITS/"labels.csv", newline="") as f: TRUTH = {r["file"]: int(r["label"]) for r, _ in zip(csv.DictReader(f), range(12))}


def dataset(lab, names=NAMES):
    ds = Dataset(lab, "digits", classes=names)
    ds.add([NewSample(DIGITS/f, sample_id=f, split="train") for f in TRUTH], progress=False)
    return ds


@pytest.fixture(params=["sqlite", "postgresql"])
def ds(request, tmp_path):
    lab = Lab(tmp_path/"lab", durability="normal", database=postgresql.database() if request.param == "postgresql" else None)
    yield dataset(lab)
    lab.engine.dispose()


@pytest.fixture
def local(tmp_path):
    lab = Lab(tmp_path/"lab", durability="normal")
    yield dataset(lab)
    lab.engine.dispose()


def said(ds): return dict(zip(ds.labels().sample_id, ds.labels().class_id))


# ---- the queue ----

def test_a_label_and_the_end_of_its_lease_are_one(ds, monkeypatch):
    q = LabelQueue(ds)
    q.add(TRUTH)
    t = q.claim("ada")[0]
    with pytest.raises(FsmlError, match="no class"): q.submit(t, class_id=10)
    def broken(*a, **k): raise RuntimeError("the disk is full")
    with monkeypatch.context() as m:
        m.setattr(ds, "annotate", broken)
        with pytest.raises(RuntimeError): q.submit(t, class_id=1)
    assert [x.lease for x in q.held("ada")] == [t.lease] and len(ds.annotations(history=True)) == 0
    assert q.progress()["done"] == 0 and len(q.progress().authors) == 0
    assert q.submit(t, class_id=1, active_s=2.5) and not q.submit(t, class_id=2)
    a = ds.annotations(history=True).iloc[0]
    assert (len(ds.annotations(history=True)), a.class_id, a.author, a.active_s, a.sample_id) == (1, 1, "ada", 2.5, t.sample.sample_id)


def test_a_label_that_comes_too_late_is_not_written(ds):
    q, now = LabelQueue(ds, lease_s=60), [10**15]
    q.leases.clock = lambda: now[0]
    q.add(list(TRUTH)[:2])
    a, b = q.claim("ada", 2)
    now[0] += 61 * 10**6
    ben = q.claim("ben")[0]
    assert ben.sample.sample_id == a.sample.sample_id
    assert not q.submit(a, class_id=0) and len(ds.labels()) == 0
    assert q.submit(b, class_id=1)  # nobody has taken it: her work counts
    assert q.submit(ben, class_id=2) and said(ds) == {ben.sample.sample_id: 2, b.sample.sample_id: 1}


def test_votes_come_from_different_people(ds):
    q = LabelQueue(ds, votes=2)
    q.add(TRUTH)
    for author, wrong in (("ada", 0), ("ben", 1), ("cy", 0)):
        for t in q.claim(author, 99): assert q.submit(t, class_id=(TRUTH[t.sample.sample_id] + wrong) % 10)
    said = ds.annotations(history=True)
    assert Counter(said.sample_id) == {k: 2 for k in TRUTH} and set(said.author) == {"ada", "ben"}
    assert q.progress()["done"] == 12


def test_skip_flag_and_send_back(ds):
    q = LabelQueue(ds)
    q.add(TRUTH, why="first pass")
    a, b = q.claim("ada", 2)
    assert q.skip(a, "dark") and q.flag(b, "  <b>which?</b> ") and not q.flag(b, "again?")
    with pytest.raises(FsmlError, match="needs a question"): q.flag(q.claim("ada")[0], " ")
    assert not {a.sample.sample_id, b.sample.sample_id} & {t.sample.sample_id for t in q.claim("ada", 99)}
    assert [t.sample.sample_id for t in q.claim("ben", 99)] == [a.sample.sample_id, b.sample.sample_id]
    assert q.flags()[["sample_id", "question", "author"]].values.tolist() == [[b.sample.sample_id, "<b>which?</b>", "ada"]]
    for x in q.held("ada") + q.held("ben"): q.submit(x, class_id=0)
    assert q.progress()["done"] == 12
    last = list(TRUTH)[-2:]
    assert q.send_back(last, "the model doubts") == 2
    again = q.claim("ada", 9)
    assert [(t.sample.sample_id, t.why) for t in again] == [(k, "the model doubts") for k in last]
    assert q.submit(again[0], class_id=7) and said(ds)[last[0]] == 7
    assert len(ds.annotations(history=True).query("sample_id == @last[0]")) == 2  # what was said before is still there


def test_only_samples_that_are_there(ds):
    q = LabelQueue(ds)
    with pytest.raises(FsmlError, match="are no samples"): q.add([*TRUTH, "no such thing"])
    assert q.progress()["open"] == 0
    q.add(TRUTH)
    ds.remove([list(TRUTH)[0]])
    assert len(q.claim("ada", 99)) == 11 and list(q.leases.set_aside()) == [list(TRUTH)[0]]
    with pytest.raises(FsmlError, match="cannot collect"): LabelQueue(ds, kind="box")


def test_names_are_text_where_they_are_shown(local):
    evil = "<img src=x onerror=alert(1)>"
    q = LabelQueue(local, evil)
    q.add(TRUTH, why=evil)
    q.submit(q.claim(evil)[0], class_id=0)
    assert "<img" not in q.progress()._repr_html_() and "&lt;img" in q.progress()._repr_html_()
    w = label(q, evil)
    assert "<img" not in w.head.value and "&lt;img" in w.head.value
    w._say(evil)
    assert "<img" not in w.message.value


# ---- the widgets ----

def press(w: Labeller, name: str):
    if hasattr(w.front, "labeller"): w.front.labeller.control_elements.buttons[name].button.click()
    else: w.front.buttons[name].click()


def key(w: Labeller, k: str):
    if hasattr(w.front, "labeller"): w.front.labeller._handle_keystroke({"type": "keyup", "key": k})  # what its watcher calls
    else: w.front.key({"type": "keyup", "key": k})


def skip(w: Labeller):
    button = (w.front.labeller if hasattr(w.front, "labeller") else w.front).skip_button
    assert button.layout.display != "none"
    button.click()


@pytest.fixture(params=["ipyannotations", "ipywidgets"])
def open_(request):
    def f(queue, author="ada", reaction_s=0., **more):
        w = label(queue, author, widget=request.param, **more)
        w.reaction_s = reaction_s
        return w
    return f


def test_what_is_clicked_is_what_is_stored(local, open_):
    q = LabelQueue(local, guide_version=3)
    q.add(TRUTH)
    w = open_(q)
    skipped = list(TRUTH)[4]
    while w.session.task:
        k = w.session.task.sample.sample_id
        if k == skipped: skip(w)
        elif TRUTH[k] % 2: press(w, NAMES[TRUTH[k]])
        else: key(w, "1234567890"[TRUTH[k]])
        assert (k in said(local)) == (k != skipped)  # at once
    assert said(local) == {k: v for k, v in TRUTH.items() if k != skipped}
    assert set(local.annotations().author) == {"ada"} and set(local.annotations().guide_version) == {3} and (local.annotations().active_s > 0).all()
    assert "11 of 12 done" in w.head.value and q.progress()["skipped"] == 1
    assert w.ask_button.disabled
    q.send_back([skipped])
    w.again_button.click()
    press(w, NAMES[TRUTH[skipped]])
    assert said(local) == TRUTH


def test_the_picture_shown_is_the_sample_and_nothing_else(local, open_):
    q = LabelQueue(local)
    q.add(TRUTH)
    w = open_(q)
    for _ in range(3):
        k = w.session.task.sample.sample_id
        shown = np.asarray(Image.open(io.BytesIO(w.front.image.value)))
        assert (shown[::40, ::40] == local.pixels(k)).all() and (shown.reshape(8, 40, 8, 40, -1) == shown.reshape(8, 40, 8, 40, -1)[:, :1, :, :1]).all()
        press(w, "one")
    bundle = w._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == w.front.image.value and "application/vnd.jupyter.widget-view+json" in bundle


def test_the_next_pictures_are_ready_and_no_widget_is_left_behind(local, open_):
    q = LabelQueue(local)
    q.add(TRUTH)
    w = open_(q, batch=4)
    n = len(ipywidgets.Widget.widgets if not hasattr(ipywidgets.widgets.widget, "_instances") else ipywidgets.widgets.widget._instances)
    for _ in range(8):
        assert w.session.tasks[1].lease.token in w.session._png and 2 < len(w.session.tasks) <= 4
        press(w, "two")
    assert len(w.session._png) <= 2
    assert len(ipywidgets.widgets.widget._instances) == n


def test_a_double_click_is_one_label(local, open_):
    q = LabelQueue(local)
    q.add(TRUTH)
    w = open_(q, reaction_s=60)
    press(w, "one")
    assert len(local.labels()) == 0  # nobody answers that fast
    w.session.since -= 61
    press(w, "one")
    press(w, "one")
    assert len(local.labels()) == 1


def test_a_question_is_typed_and_not_labelled(local, open_):
    q = LabelQueue(local)
    q.add(TRUTH)
    w = open_(q)
    first = w.session.task.sample.sample_id
    w.ask_button.click()
    key(w, "1")
    assert len(local.labels()) == 0 and w.session.task.sample.sample_id == first
    w.question.value = "a 1 or a 7?"
    assert q.flags().question.tolist() == ["a 1 or a 7?"] and w.session.task.sample.sample_id != first and w.question.layout.display == "none"


def test_a_restart_goes_on_where_it_was_and_stop_gives_back(local, open_):
    q = LabelQueue(local)
    q.add(TRUTH)
    w = open_(q, batch=5)
    press(w, "one")
    again = open_(q, batch=5)
    assert [t.lease.token for t in again.session.tasks] == [t.lease.token for t in w.session.tasks]
    again.stop()
    assert q.progress()["leased"] == 0 and len(q.claim("ben", 99)) == 11


def test_three_people_at_once(local, open_):
    q = LabelQueue(local)
    q.add(TRUTH)
    ws = [open_(q, author, batch=3) for author in ("ada", "ben", "cy")]
    while any(w.session.task for w in ws):
        for w in ws:
            if w.session.task: press(w, NAMES[TRUTH[w.session.task.sample.sample_id]])
    history = local.annotations(history=True)
    assert Counter(history.sample_id) == {k: 1 for k in TRUTH} and said(local) == TRUTH and set(history.author) == {"ada", "ben", "cy"}


def test_trouble_keeps_the_task(local, open_, monkeypatch):
    q = LabelQueue(local)
    q.add(TRUTH)
    w = open_(q)
    first = w.session.task
    def gone(*a, **k): raise sa.exc.OperationalError("", {}, Exception("the server closed the connection"))
    with monkeypatch.context() as m:
        m.setattr(q.leases, "submit", gone)
        press(w, "three")
    assert "Not stored: the server closed the connection" in w.message.value and w.session.task == first and len(local.labels()) == 0
    press(w, "three")
    assert w.message.value == "" and said(local) == {first.sample.sample_id: 3}


def test_an_image_that_vanished_or_is_damaged_is_set_aside(local, open_):
    q, store = LabelQueue(local), local.lab.store()
    q.add(TRUTH)
    lost, broken = list(TRUTH)[0], list(TRUTH)[2]
    Path(store._at(local.sample(lost).blob)).unlink()
    Path(store._at(local.sample(broken).blob)).write_bytes(b"no longer an image")
    w = open_(q)
    assert lost in w.message.value and "was set aside" in w.message.value
    while w.session.task: press(w, "one")
    assert set(q.leases.set_aside()) == {lost, broken} and len(local.labels()) == 10


def test_a_lease_that_went_to_another_while_it_waited(local, open_):
    q, now = LabelQueue(local, lease_s=60), [0]
    import time
    q.leases.clock = lambda: time.time_ns()//1000 + now[0]
    q.add(TRUTH)
    w = open_(q, batch=4)
    second = w.session.tasks[1].sample.sample_id
    now[0] = 61 * 10**6  # the whole batch ran out
    taken = q.claim("ben", 2)
    assert [t.sample.sample_id for t in taken] == list(TRUTH)[:2]
    press(w, "one")
    assert "went to somebody else" in w.message.value and len(local.labels()) == 0
    assert w.session.task.sample.sample_id not in (second, taken[0].sample.sample_id)
    press(w, "one")
    assert len(local.labels()) == 1


def test_what_a_model_suggests_is_marked(local, open_):
    q = LabelQueue(local)
    first, second = list(TRUTH)[:2]
    q.add(TRUTH, suggest={first: 7})
    w = open_(q)
    style = lambda n: (w.front.labeller.control_elements.buttons[n].button if hasattr(w.front, "labeller") else w.front.buttons[n]).button_style
    assert [n for n in NAMES if style(n)] == ["seven"]
    press(w, "zero")
    assert w.session.task.sample.sample_id == second and not any(map(style, NAMES))


def test_labels_with_html_in_them_and_more_classes_than_buttons(tmp_path, open_):
    lab = Lab(tmp_path/"many", durability="normal")
    names = ["<script>alert(1)</script>", *(f"class {i}" for i in range(40))]
    ds = dataset(lab, names)
    q = LabelQueue(ds)
    q.add(TRUTH)
    w = open_(q)
    choice, button = ((w.front.labeller.control_elements.dropdown, w.front.labeller.control_elements.button) if hasattr(w.front, "labeller") else (w.front.choice, w.front.choice_button))
    button.click()
    assert len(ds.labels()) == 0  # nothing was chosen
    choice.value = names[0]
    button.click()
    choice.value = names[40]
    button.click()
    assert ds.labels().class_id.tolist() == [0, 40]
    def values(x):
        yield x
        for c in getattr(x, "children", ()): yield from values(c)
    assert all("<script" not in x.value for x in values(w) if isinstance(x, ipywidgets.HTML))
    lab.engine.dispose()


def test_a_bad_render_is_told_when_the_widget_is_made(local, open_):
    q = LabelQueue(local)
    q.add(TRUTH)
    with pytest.raises(FsmlError, match="no picture"): open_(q, render=lambda x: x/255)


def test_large_pictures_are_reduced():
    big = np.zeros((2000, 1000, 3), np.uint8)
    assert Image.open(io.BytesIO(picture(big))).size == (450, 900)


def test_annotators_do_not_wait_for_torch(tmp_path):
    code = f"""
import sys
from fsml_lab.core import Lab
from fsml_lab.data.journal import Dataset, NewSample
from fsml_lab.annotate.queue import LabelQueue
from fsml_lab.annotate.label import label
ds = Dataset(Lab({str(tmp_path/'lab')!r}), 'd', classes=['a', 'b'])
ds.add([NewSample({str(DIGITS/'00000.png')!r}, sample_id='x')], progress=False)
q = LabelQueue(ds)
q.add(['x'])
for kind in ('ipyannotations', 'ipywidgets'):
    w = label(q, 'ada', widget=kind)
    w.reaction_s = 0
w.front.buttons['b'].click()
assert ds.labels().class_id.tolist() == [1]
print([m for m in ('torch', 'torchvision', 'onnxruntime', 'sklearn') if m in sys.modules])
"""
    p = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert p.stdout.strip() == "[]"
