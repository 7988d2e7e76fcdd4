"The sheet that opens a project and the gate that closes it."
import subprocess, sys
from datetime import date, timedelta
import pytest
from hypothesis import example, given, settings, strategies as st
from fsml_lab.core import Figure, FsmlError, Verdict
from fsml_lab.problem import METRICS, TASKS, Gate, ProblemSpec, Target, Waiver, images_needed, metric

TODAY = date(2026, 12, 1)
def spec(**kw): return ProblemSpec(**{**dict(name="digits", task="classify", classes=("a", "b", "c"), targets=[Target(metric="accuracy", at_least=.9)]), **kw})
def acc(value, lo, hi, **kw): return Figure("accuracy", value, lo, hi, n=100, **kw)
def refused(says, remedy="", **kw):
    with pytest.raises(FsmlError) as e: spec(**kw)
    assert says in e.value.what and remedy in e.value.remedy and e.value.where and e.value.remedy, e.value
    return e.value

# ---------------------------------------------------------------- the sheet

@pytest.mark.parametrize("says, remedy, kw", [
    ("8 models of 2500 MB need 20000 MB", "6 models, for at most 1875 MB", dict(models_per_gpu=8, memory_mb=2500., gpu_memory_mb=15_000.)),
    ("1 models of 20000 MB", "less than 15000", dict(memory_mb=20_000., gpu_memory_mb=15_000.)),
    ("'a' is listed twice", "once", dict(classes=("a", "b", "a"))),
    ("single class", "everything else", dict(classes=("a",))),
    ("95 of 100 calls", "correct", dict(latency_p50_ms=10., latency_p95_ms=9.9)),
    ("no alphabet", "classes", dict(alphabet="abc")),
    ("has no classes", "alphabet", dict(task="read", targets=())),
    ("multi_label belongs to classify", "out", dict(task="detect", multi_label=True, targets=())),
    ("no SPDX identifier", "CC-BY-4.0", dict(licences=("whatever I find",))),
    ("goes backwards", "order", dict(schedule={"trained": date(2027, 2, 1), "labelled": date(2027, 1, 1)})),
    ("Unknown key 'latency_p95'", "latency_p95_ms", dict(latency_p95=3.)),
    ("two targets for accuracy", "Keep", dict(targets=[Target(metric="accuracy", at_least=.9), Target(metric="Accuracy", at_least=.95)])),
    ("two targets for latency_p95", "Keep", dict(targets=[Target(metric="latency_p95_ms", at_most=3.)], latency_p95_ms=4.)),
    ("cer does not measure the task 'classify'", "accuracy", dict(targets=[Target(metric="CER", at_most=.1)])),
    ("a class that the sheet does not list", "a, b, c", dict(targets=[Target(metric="recall", at_least=.9, slice="class=d")])),
    ("is no line of the sheet", "accuracy", dict(waivers=[Waiver(target="memory", who="x", why="y", until=TODAY)])),
    ("is no line of the sheet", "accuracy", dict(prod_waivers=("models_per_gpu",))),
    ("True is no text", "quotes", dict(classes=(True, False))),
    ("latency_p95_ms is -1.0", "Correct", dict(latency_p95_ms=-1.)),
    ("latency_p95_ms is '3'", "Correct", dict(latency_p95_ms="3")),
    ("memory_mb is nan", "Correct", dict(memory_mb=float("nan"))),
    ("models_per_gpu is 2.5", "Correct", dict(models_per_gpu=2.5)),
    ("task is 'segment'", "Correct", dict(task="segment")),
    ("name is ''", "Correct", dict(name="")),
])
def test_impossible_and_wrong_sheets_are_refused_when_made(says, remedy, kw): refused(says, remedy, **kw)

@pytest.mark.parametrize("says, kw", [
    ("95 is outside", dict(metric="accuracy", at_least=95)), ("-0.1 is outside", dict(metric="accuracy", at_least=-.1)), ("no finite test", dict(metric="recall", at_least=1.)), ("no finite test", dict(metric="cer", at_most=0.)),
    ("exactly one bound", dict(metric="accuracy")), ("exactly one bound", dict(metric="accuracy", at_least=.5, at_most=.6)), ("no bound at_most", dict(metric="accuracy", at_most=.9)),
    ("no bound at_least", dict(metric="latency_p50", at_least=9.)), ("not in 's'", dict(metric="latency_p50", at_most=.009, unit="s")), ("cannot be", dict(metric="size", at_most=0.)),
    ("no metric that this library measures", dict(metric="acuracy", at_least=.9)), ("no metric that this library measures", dict(metric="beauty", at_least=.9)), ("stage is 'deploy'", dict(metric="accuracy", at_least=.9, stage="deploy")),
    ("metric is missing", dict(at_least=.9)), ("True", dict(metric="accuracy", at_least=True)), ("inf", dict(metric="latency_p50", at_most=float("inf"))),
])
def test_targets_that_can_never_be_met_or_judged(says, kw):
    with pytest.raises(FsmlError) as e: Target(**kw)
    assert says in e.value.what and e.value.remedy

def test_several_errors_are_counted_and_placed():
    e = refused("(2 more: ", **{"targets": [dict(metric="accuracy", atleast=.9)], "gpus": 3, "latency_p50_ms": 0.})
    assert "'digits' at " in e.where
    with pytest.raises(FsmlError) as e: ProblemSpec.from_dict(dict(name="x", task="classify", targets=[dict(metric="accuracy", at_least=.9), dict(metric="accuracy", at_least=95, slice="s")]))
    assert e.value.where == "ProblemSpec 'x' at targets[1]" and e.value.remedy == "Write 0.95 for 95 %."

def test_a_metric_of_your_own_says_who_measures_it():
    t = Target(metric="battery", at_most=3., unit="mW", stage="export", measured_by="the hardware lab")
    s = spec(targets=[t])
    f = Figure("battery", 2., 1.9, 2.1, unit="mW", better="lower", stage="export")
    assert s.gate([f]).state == "PASS" and s.gate([]).state == "MISSING" and ("battery at most 3 mW", "measured by the hardware lab") in s.formulate().decided

def test_sheets_are_frozen_and_named_by_their_hash():
    s = spec()
    with pytest.raises(Exception): s.task = "read"
    assert s.sha256 == spec().sha256 and len(s.sha256) == 64
    assert len({spec(targets=[Target(metric="accuracy", at_least=v)]).sha256 for v in (.9, .95)} | {spec(classes=("a", "c", "b")).sha256, spec(max_drop=.01).sha256}) == 4
    assert s.class_table.names == ("a", "b", "c")

FULL = """
name: invoices
task: detect
requirement: |
  Find the stamps.
  Größe egal.
classes: [stamp, signature]
inputs: {image: "a scan, 300 dpi"}
targets:
  - metric: AP50
    at_least: 0.8
  - {metric: ap, at_least: 0.5, slice: scanner=old, stage: export}
latency_p50_ms: 10
latency_p95_ms: 20
throughput_per_s: 100
models_per_gpu: 4
memory_mb: 900.5
gpu_memory_mb: 8000
max_drop: 0.01
licences: [CC0-1.0]
schedule: {labelled: 2027-01-01}
waivers: [{target: MODELS_PER_GPU, who: Eve, why: no card, until: 2027-01-31}]
"""

def test_yaml_and_dictionary_round_trips(tmp_path):
    s = ProblemSpec.from_yaml(FULL)
    assert s == ProblemSpec.from_dict(s.to_dict()) == ProblemSpec.from_yaml(s.to_yaml()) and s.sha256 == ProblemSpec.from_yaml(s.to_yaml()).sha256
    (tmp_path/"s.yaml").write_text(FULL, encoding="utf-8")
    assert ProblemSpec.from_yaml(tmp_path/"s.yaml") == ProblemSpec.from_yaml(str(tmp_path/"s.yaml")) == s
    assert s.waivers[0].target == "models_per_gpu" and s.schedule == {"labelled": date(2027, 1, 1)} and "Größe" in s.requirement
    assert [(t.name, t.stage) for t in s.lines] == [("AP50", "evaluate"), ("AP@scanner=old", "export"), ("latency_p50", "export"), ("latency_p95", "export"), ("throughput", "export"), ("memory", "export"), ("models_per_gpu", "export"), ("drop", "export")]
    assert "properties" in ProblemSpec.model_json_schema()

@pytest.mark.parametrize("text, says, where", [
    ("name: x\ntask: classify\nname: y", "the key 'name' stands twice", "line 3"), ("name: x\n  task: : {", "no YAML", "line 2"), ("- a\n- b", "keys and values", "YAML text"), ("\n", "keys and values", "YAML text"),
    ("name: x\ntask: classify\nschema: 2", "newer than the 1", "YAML text"), ("1: x\nname: y", "keys and values", "YAML text"), ("a: &a [x]\nb: *a", "anchors", "line 2"), ("name: !!python/object/apply:os.system [ls]\ntask: read", "no YAML", "line 1"),
    ("name: x\ntask: classify\ninputs: {image: grey, 8 px}", "None is no text", "inputs"), ("name: x\ntask: classify\nclasses: [no, 1]", "False is no text", "classes[0]"), ("name: x", "task is missing", "at task"),
])
def test_yaml_that_is_wrong(text, says, where):
    with pytest.raises(FsmlError) as e: ProblemSpec.from_yaml(text)
    assert says in e.value.what and where in e.value.where and e.value.remedy

def test_files_that_are_wrong(tmp_path):
    with pytest.raises(FsmlError, match="cannot be read"): ProblemSpec.from_yaml(tmp_path/"none.yaml")
    (tmp_path/"b.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(FsmlError, match="not UTF-8"): ProblemSpec.from_yaml(tmp_path/"b.yaml")
    (tmp_path/"c.yaml").write_text("name: x\ntask: sing")
    with pytest.raises(FsmlError) as e: ProblemSpec.from_yaml(tmp_path/"c.yaml")
    assert "c.yaml" in e.value.where

@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(FULL.splitlines(keepends=True) + ["{", "]", ": ", "- ", "  x: 1\n", "\t", "'", "&a ", "*a ", "!!set\n", "? ", "\x00", "\ud800"]), max_size=30))
@example(FULL.splitlines(keepends=True))
def test_any_text_is_a_sheet_or_an_error_in_three_sentences(parts):
    try: s = ProblemSpec.from_yaml("".join(parts))
    except FsmlError as e: assert e.what and e.where and e.remedy
    else: assert ProblemSpec.from_dict(s.to_dict()) == s and s.formulate()._repr_html_() and s._repr_html_()

# ---------------------------------------------------------------- the gate

@pytest.mark.parametrize("f, state", [(acc(.95, .90, .98), "PASS"), (acc(.95, .8999, .98), "FAIL"), (acc(.85, .80, .95), "FAIL"), (acc(.95, None, None), "MISSING"), (None, "MISSING")])
def test_the_unfavourable_bound_decides(f, state):
    g = spec().gate([f] if f else [], today=TODAY)
    assert g.state == g["accuracy"].state == g[0].state == state and g.passed is (state == "PASS") and len(g) == 1 and isinstance(g[0], Verdict)

@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(.01, .99), st.booleans())
def test_verdict_agrees_with_the_interval(a, b, c, bound, lower):
    lo, value, hi = sorted((a, b, c))
    s = spec(task="read", classes=(), targets=[Target(metric="cer", at_most=bound) if lower else Target(metric="exact_match", at_least=bound)])
    v = s.gate([Figure("CER" if lower else "exact_match", value, lo, hi, n=50, better="lower" if lower else "higher")])[0]
    assert (v.state == "PASS") == (hi <= bound if lower else lo >= bound) and v.state in ("PASS", "FAIL")
    assert ("do not show it" in v.why) == (v.state == "FAIL" and (value <= bound if lower else value >= bound))

def test_luck_is_named():
    assert "100 items do not show it" in spec().gate([acc(.95, .88, .98)])[0].why
    assert "show" not in spec().gate([acc(.85, .80, .89)])[0].why

def test_limits_without_an_interval_are_taken_as_measured():
    s = spec(size_mb=2., memory_mb=100., throughput_per_s=50., models_per_gpu=4, targets=())
    fig = lambda n, v, unit, better: Figure(n, v, unit=unit, better=better, stage="export")
    g = s.gate([fig("size_MB", 2., "MB", "lower"), fig("memory", 100.1, "MB", "lower"), fig("throughput", 50., "1/s", "higher"), fig("models_per_gpu", 3., "models", "higher")])
    assert {v.target.split()[0]: v.state for v in g} == dict(size="PASS", memory="FAIL", throughput="PASS", models_per_gpu="FAIL")

@pytest.mark.parametrize("f, says", [
    (Figure("latency_p95", .004, .003, .005, unit="s", better="lower", stage="export"), "is in s, the target in ms"),
    (Figure("latency_p95", 4., 3., 5., unit="ms", stage="export"), "says that higher is better, the target says lower"),
    (Figure("latency_p95", 4., 3.9, 4.1, level=.5, unit="ms", better="lower", stage="export"), "level 0.5"),
])
def test_what_does_not_fit_is_not_judged(f, says):
    with pytest.raises(FsmlError) as e: spec(latency_p95_ms=6.).gate([f])
    assert says in e.value.what and e.value.where and e.value.remedy

def test_a_percentage_is_not_a_proportion():
    with pytest.raises(FsmlError, match="is in %"): spec().gate([Figure("accuracy", 95., 93., 97., unit="%")])

def test_two_different_figures_for_a_line_are_refused_and_one_given_twice_is_not():
    a, b = acc(.95, .91, .97), acc(.99, .97, 1.)
    with pytest.raises(FsmlError, match="2 different figures for accuracy"): spec().gate([a, b])
    assert spec().gate([a, a]).passed

def test_stages():
    s = spec(targets=[Target(metric="accuracy", at_least=.9), Target(metric="accuracy", at_least=.8, stage="export")])
    ev, ex = acc(.95, .91, .97, stage="evaluate"), acc(.85, .81, .88, stage="export")
    assert [v.state for v in s.gate([ev, ex])] == ["PASS", "PASS"] and all(st in v.target for st, v in zip(("(evaluate)", "(export)"), s.gate([ev, ex])))
    assert [v.state for v in s.gate([ev])] == ["PASS", "MISSING"] and "measured at evaluate, not at export" in s.gate([ev])[1].why
    assert s.gate([ev], stage="evaluate").passed and len(s.gate([ev], stage="evaluate")) == 1 and not s.gate([ev], stage="export").passed
    assert s.gate([ev, ex])["accuracy"].figure == ex  # of two stages the later
    with pytest.raises(FsmlError, match="no stage 'deploy'"): s.gate([], stage="deploy")
    with pytest.raises(FsmlError, match="no target at stage export"): spec().gate([], stage="export")

def test_an_empty_sheet_passes_nothing():
    with pytest.raises(FsmlError, match="nothing to judge"): spec(targets=()).gate([])
    with pytest.raises(FsmlError, match="not float"): spec().gate([.95])

def waived(until=TODAY, **kw): return spec(models_per_gpu=8, waivers=[Waiver(target="models_per_gpu", who="Eve", why="no card here", until=until)], **kw)
GOOD = acc(.95, .91, .97)

def test_waivers_have_a_name_a_reason_and_an_end():
    v = waived().gate([GOOD], today=TODAY)["models_per_gpu"]
    assert v.state == "WAIVED" and all(w in v.why for w in ("Eve", "no card here", "2026-12-01", "not measured")) and not v.blocks
    g = waived().gate([GOOD], today=TODAY)
    assert g.passed and g.state == "WAIVED"
    late = waived().gate([GOOD], today=TODAY + timedelta(1))
    assert not late.passed and late.state == "MISSING" and "ended on 2026-12-01" in late["models_per_gpu"].why
    for field in ("who", "why"):
        with pytest.raises(FsmlError): Waiver(**{**dict(target="accuracy", who="Eve", why="x", until=TODAY), field: ""})
    with pytest.raises(FsmlError, match="until"): Waiver(target="accuracy", who="Eve", why="x", until="some day")

def test_a_waiver_covers_its_line_only_and_never_hides_a_pass():
    g = waived().gate([acc(.95, .80, .97)], today=TODAY)
    assert (g.state, g.passed, g["accuracy"].state, g["models_per_gpu"].state) == ("FAIL", False, "FAIL", "WAIVED")
    measured = Figure("models_per_gpu", 9., unit="models", stage="export")
    assert waived().gate([GOOD, measured], today=TODAY).state == "PASS"
    assert waived().gate([GOOD, Figure("models_per_gpu", 5., unit="models", stage="export")], today=TODAY)["models_per_gpu"].state == "WAIVED"

def test_prod_takes_no_waiver_unless_the_sheet_allows_it():
    assert waived().gate([GOOD], today=TODAY, channel="staging").passed
    g = waived().gate([GOOD], today=TODAY, channel="prod")
    assert not g.passed and "does not count on prod" in g["models_per_gpu"].why
    assert waived(prod_waivers=("models_per_gpu",)).gate([GOOD], today=TODAY, channel="prod").passed
    assert not waived(prod_waivers=("models_per_gpu",)).gate([GOOD], today=TODAY + timedelta(1), channel="prod").passed

def test_a_waiver_for_one_stage():
    s = spec(targets=[Target(metric="accuracy", at_least=.9), Target(metric="accuracy", at_least=.9, stage="export")], waivers=[Waiver(target="accuracy", who="Eve", why="later", until=TODAY, stage="export")])
    assert [v.state for v in s.gate([], today=TODAY)] == ["MISSING", "WAIVED"]

def test_the_gate_draws_itself_and_goes_into_a_manifest():
    s = spec(name="<script>", models_per_gpu=8)
    g = s.gate([acc(.95, .80, .97)], today=TODAY, channel="prod")
    html = g._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and all(w in html for w in ("FAIL", "MISSING", "accuracy at least 90 %", "evaluate", "export"))
    assert "<script>" not in s._repr_html_() + s.formulate()._repr_html_()
    d = g.to_dict()
    assert (d["state"], d["passed"], d["channel"], d["today"]) == ("FAIL", False, "prod", "2026-12-01") and [Verdict.from_dict(v) for v in d["verdicts"]] == list(g)
    with pytest.raises(FsmlError, match="no line 'speed'"): g["speed"]
    assert isinstance(g, Gate) and "accuracy at least 90 % (evaluate)" in str(g)

def contrast(a, b):
    "WCAG 2.2, contrast ratio of two #rrggbb colours."
    def lum(c): return sum(k*(v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4) for k, v in zip((.2126, .7152, .0722), (int(c[i:i+2], 16)/255 for i in (1, 3, 5))))
    x, y = sorted((lum(a), lum(b)))
    return (y + .05)/(x + .05)

def test_badges_read_in_light_and_dark():
    from fsml_lab.problem import _COLOUR
    for c in _COLOUR.values(): assert contrast(c, "#ffffff") >= 4.5 and contrast(c, "#111111") >= 3  # text; badge against a dark page

# ---------------------------------------------------------------- formulate, metrics

@pytest.mark.parametrize("at_least", [.5, .8, .9, .95, .99, .999])
@pytest.mark.parametrize("level", [.9, .95, .99])
def test_images_needed_is_where_wilson_gets_there(at_least, level):
    from statsmodels.stats.proportion import proportion_confint
    n, lower = images_needed(at_least, level), lambda n: proportion_confint(n, n, 1 - level, "wilson")[0]
    assert lower(n) >= at_least - 1e-12 and (n == 1 or lower(n - 1) < at_least)

def test_no_number_of_images_shows_certainty():
    for v in (1., 1.5, -1.):
        with pytest.raises(FsmlError): images_needed(v)

def test_formulate_asks_for_what_is_open():
    bare = ProblemSpec(name="x", task="read").formulate()
    questions = " ".join(q for q, _ in bare.undecided)
    assert all(w in questions for w in ("characters", "good enough", "licences", "guide", "when", "memory", "customer say")) and bare.task == TASKS[2] and not bare.decided
    assert all("read" in m.tasks for m in bare.metrics) and METRICS["cer"] in bare.metrics and METRICS["AP"] not in bare.metrics
    assert any("memory have the card" in q for q, _ in ProblemSpec(name="x", task="classify", models_per_gpu=3).formulate().undecided)
    assert any("slices" in q for q, _ in spec().formulate().undecided) and not any("slices" in q for q, _ in spec(targets=[Target(metric="recall", at_least=.8, slice="class=a")]).formulate().undecided)
    assert ("accuracy at least 90 %", "at least 35 test images") in spec().formulate().decided
    assert "still undecided" in bare._repr_html_() and "questions open" in str(bare)

def test_metrics_are_named_once_and_found_by_any_name():
    names = [n.lower() for m in METRICS.values() for n in (m.name, *m.aliases)]
    assert len(names) == len(set(names))
    for m in METRICS.values():
        assert metric(m.name.upper()) is m and all(metric(a) is m for a in m.aliases) and m.better in ("higher", "lower")
        assert m.better == "lower" if m.unit in ("ms", "MB") else True

def test_the_names_are_those_that_the_other_rooms_give_their_figures():
    np = pytest.importorskip("numpy")
    from fsml_lab import metrics as M
    rng = np.random.default_rng(0)
    t = rng.integers(0, 3, 200)
    p = np.where(rng.random(200) < .9, t, 0)
    figs = [M.accuracy(p, t), M.macro_f1(p, t, 3), *M.per_class(M.confusion(p, t, 3), ["a", "b", "c"]), M.cer(["ab", "c"], ["ab", "d"]), M.wer(["ab", "c"], ["ab", "d"]), M.exact_match(["ab", "c"], ["ab", "d"]), M.ned(["ab", "c"], ["ab", "d"]),
            M.paired_difference(p == t, t == t, name="accuracy_drop", better="lower")]
    for f in figs:
        m = metric(f.name)
        assert m is not None and (m.unit, m.better) == (f.unit, f.better) and (f.lo is not None or not m.sampled), f
    s = spec(targets=[Target(metric="accuracy", at_least=.8), Target(metric="f1", at_least=.7, slice="class=b"), Target(metric="macro_f1", at_least=.7)])
    assert s.gate(figs).state == "PASS"

def test_this_room_is_light():
    code = "import sys, fsml_lab.problem; print([m for m in ('torch', 'pandas', 'numpy', 'sqlalchemy', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
