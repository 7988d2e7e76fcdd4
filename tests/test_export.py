"""Export: the file is the model, INT8 is what the arithmetic says, and linter, referee and type checker judge alike."""
import ast, csv, importlib.util, json, shutil, subprocess, sys, warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from torch import nn
from torch.nn import functional as F

from fsml_lab.core import ClassTable, Figure, FsmlError, Lab, Preprocess
from fsml_lab.export import onnx as ex, quantize as qu, tensorrt as rt
from fsml_lab.papers.resnet import ResNet

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT/"data_samples"/"digits"
TYPINGS = ROOT.parent/"shared"/"typings"   # stubs of TensorRT 10 and 11; not part of this project


def digits(split):
    with open(DIGITS/"labels.csv", newline="") as f: rows = [r for r in csv.DictReader(f) if r["split"] == split]
    return np.stack([np.asarray(Image.open(DIGITS/r["file"]))[..., None] for r in rows]), np.array([int(r["label"]) for r in rows])


@pytest.fixture(scope="module")
def train(): return digits("train")


@pytest.fixture(scope="module")
def test(): return digits("test")


@pytest.fixture(scope="module")
def deployable(train):
    "A small ResNet after two epochs: weights and statistics of a real training."
    x, y = train
    pre = Preprocess((8, 8), mean=(float(x.mean()/255),), std=(float(x.std()/255),), colour="grey")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNet(1, 10, width=8)
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    x, y = (torch.from_numpy(x).permute(0, 3, 1, 2)/255 - pre.mean[0])/pre.std[0], torch.from_numpy(y)
    for i in torch.cat([torch.randperm(len(x)) for _ in range(2)]).view(-1, 50):
        opt.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        opt.step()
    return ex.Deployable(model.eval(), pre, ClassTable.of(f"digit {i}" for i in range(10)), meta=dict(run_id="r1"))


@pytest.fixture(scope="module")
def fp32(deployable): return ex.export_onnx(deployable)


@pytest.fixture(scope="module")
def int8(deployable, train): return qu.quantize(deployable, qu.Calibration(train[0][::4]))


def tiny(**kw):
    "A one-layer classifier of 4x4 grey images, quick to export."
    torch.manual_seed(1)
    args = dict(model=nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), pre=Preprocess((4, 4), (.5,), (.25,), "grey"), classes=ClassTable.of(["a", "b"]))
    return ex.Deployable(**{**args, **kw})


def noise(n, size=4): return np.random.default_rng(0).integers(0, 256, (n, size, size, 1), dtype=np.uint8)


# --- the file

def test_parity_with_torch_and_with_the_reference_evaluator(deployable, fp32, test):
    assert ex.parity(deployable, fp32, test[0]).value <= 1e-5
    peer = ReferenceEvaluator(fp32.proto).run(None, {"image": test[0][:32]})
    for name, got in ex.run_onnx(fp32, test[0][:32]).items(): np.testing.assert_allclose(got, peer[fp32.outputs.index(name)], rtol=1e-4, atol=1e-5)


def test_the_file_carries_what_is_needed_and_nothing_of_this_machine(deployable, fp32, tmp_path):
    path = tmp_path/"m.onnx"
    path.write_bytes(fp32.data)
    e = ex.read_onnx(path)
    assert (e.pre, e.classes, e.lineage, e.meta("task"), e.opset) == (deployable.pre, deployable.classes, {"run_id": "r1"}, "classify", 20)
    dims = [d.dim_param or d.dim_value for d in e.proto.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 8, 8, 1] and e.proto.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert str(ROOT).encode() not in fp32.data and b".py" not in fp32.data
    order = [n.op_type for n in e.proto.graph.node]
    assert order.index("Cast") < order.index("Transpose")


def test_a_wrong_normalisation_is_caught(deployable, fp32, test):
    wrong = ex.Deployable(deployable.model, Preprocess((8, 8), (deployable.pre.mean[0] + 1/255,), deployable.pre.std, "grey"), deployable.classes)
    with pytest.raises(FsmlError, match="differs from torch"): ex.parity(wrong, fp32, test[0][:64])


def test_export_leaves_the_model_as_it_was_and_gives_the_same_bytes():
    d = tiny()
    d.model.train()
    assert ex.export_onnx(d).data == ex.export_onnx(d).data
    assert d.model.training


def test_another_opset_than_asked_for_is_refused(fp32):
    m = onnx.load_model_from_string(fp32.data)
    ex._check_export(m, 20)
    with pytest.raises(FsmlError, match="opset 20, not 18"): ex._check_export(m, 18)
    m.opset_import.append(helper.make_opsetid("com.example", 1))
    m.graph.node[0].domain = "com.example"
    with pytest.raises(FsmlError, match="com.example"): ex._check_export(m, 20)
    fixed = onnx.load_model_from_string(fp32.data)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(FsmlError, match="one batch size"): ex._check_export(fixed, 20)


def test_raw_heads_of_a_detector(tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        def forward(self, x): return self.a(x), self.b(x)
    torch.manual_seed(0)
    d = ex.Deployable(Heads(), Preprocess((6, 5)), ClassTable.of(["a", "b"]), "detect", outputs=("heat", "box"))
    e = ex.export_onnx(d, tmp_path/"d.onnx")
    x = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    assert e.outputs == ("heat", "box") and ex.run_onnx(e, x)["box"].shape == (3, 4, 6, 5)
    assert ex.parity(d, e, x).value <= 1e-5


class _Loop(nn.Module):
    "Its output depends on its data in a way that no graph can follow."
    def forward(self, x): return x.flatten(1)[:, :2]*(1. if float(x.sum()) > 0 else 2.)


@pytest.mark.parametrize("model, match", [(_Loop(), "does not export"), (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), "one logit a class")])
def test_models_that_do_not_export(model, match):
    with pytest.raises(FsmlError, match=match): ex.export_onnx(tiny(model=model))


def test_a_model_that_diverged(deployable):
    d = tiny()
    e = ex.export_onnx(d)
    with torch.no_grad(): d.model[0].weight[0] = float("nan")
    with pytest.raises(FsmlError, match="NaN"): ex.parity(d, e, noise(4))
    with pytest.raises(FsmlError, match="NaN"): qu.quantize(d, qu.Calibration(noise(64)))


def test_files_from_elsewhere(tmp_path):
    for data in (b"", b"not an onnx", b"\x00"*200):
        with pytest.raises(FsmlError): ex.read_onnx(data)
    t = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    t.external_data.add(key="location", value="../../secret")
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    outside = helper.make_model(helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", io[:1], io[1:], [t]))
    with pytest.raises(FsmlError, match="other files"): ex.read_onnx(outside.SerializeToString())
    with pytest.raises(FsmlError, match="cannot be read"): ex.read_onnx(tmp_path/"missing.onnx")


def test_a_cut_file_is_refused(fp32):
    for k in (100, len(fp32.data)//2, len(fp32.data) - 1):
        with pytest.raises(FsmlError): ex.session(fp32.data[:k])


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 1)), np.zeros((8, 8, 1), np.uint8), np.zeros((1, 8, 8, 3), np.uint8), np.zeros((0, 8, 8, 1), np.uint8), None])
def test_images_that_do_not_fit(fp32, images):
    with pytest.raises(FsmlError, match="images"): ex.run_onnx(fp32, images)


# --- latency

def test_latency_grows_with_the_batch_and_has_intervals(fp32, test):
    one, many = (ex.latency(fp32, test[0][:b], n=100, warmup=10) for b in (1, 256))
    assert many[0].lo > 5*one[0].hi and many[0].slice == "batch=256" and one[0].slice == ""
    assert [f.name for f in one] == ["latency_p50", "latency_p95"] and one[0].n == 100


def test_a_model_that_does_not_run_is_no_figure(fp32, test):
    m = onnx.load_model_from_string(fp32.data)
    m.graph.node[4].op_type = "NoSuchOperator"
    with pytest.raises(FsmlError, match="measuring process failed"): ex.latency(m.SerializeToString(), test[0][:1], n=100)


@pytest.mark.parametrize("q", [.5, .95])
def test_quantile_ranks_against_conover(q):
    "Ranks of the interval for n = 100, level 95 %: tables of the binomial distribution."
    lo, hi = {.5: (40, 61), .95: (90, 100)}[q]
    f = ex.quantile_figure(np.arange(1., 101.), q, "t")
    assert (f.lo, f.hi) == (lo, hi)


# --- INT8

def folded(conv, bn):
    "Weights of a convolution with its batch normalisation folded in (Jacob et al. 2018, equation 14)."
    return (conv.weight*(bn.weight/torch.sqrt(bn.running_var + bn.eps)).view(-1, 1, 1, 1)).detach().numpy()


def test_weights_are_int8_with_the_scales_that_the_arithmetic_wants(deployable, int8):
    g = qu._Graph(int8.tensorrt.proto.graph)
    got = {tuple(g.value(n.input[0]).shape): n for n in g.nodes if n.op_type == "DequantizeLinear" and n.input[0] in g.tensors}
    convs = [m for m in deployable.model.modules() if isinstance(m, nn.Sequential) and len(m) > 1 and isinstance(m[0], nn.Conv2d) and isinstance(m[1], nn.BatchNorm2d)]
    assert len(convs) == 9 and int8.layers == dict(conv=9, linear=1, add=3)
    weights = [(folded(*c[:2])) for c in convs] + [deployable.model.head.weight.detach().numpy()]
    stored = [(g.value(n.input[0]), g.value(n.input[1])) for n in g.nodes if n.op_type == "DequantizeLinear" and n.input[0] in g.tensors]
    for w in weights:
        scale = np.abs(w).reshape(len(w), -1).max(1)/127
        q = w/scale.reshape(-1, *[1]*(w.ndim - 1))
        same = [v for v, s in stored if v.shape == w.shape and np.allclose(s, scale, rtol=1e-4) and np.abs(v - q).max() <= .501]
        assert len(same) == 1 and same[0].dtype == np.int8
    assert got


def test_int8_against_the_reference_evaluator(int8, test):
    "Both dialects, computed by onnx's own evaluator: onnxruntime's integer kernels do what the file says."
    x = test[0][:24]
    for e in (int8.tensorrt, int8.onnxruntime):
        ref, got = ReferenceEvaluator(e.proto).run(["logits"], {"image": x})[0], ex.run_onnx(e, x)["logits"]
        assert np.linalg.norm(got - ref)/np.linalg.norm(ref) < .02, e.meta("form")   # a rounding of .5 either way is one step


def test_int8_agrees_with_fp32(fp32, int8, test):
    want = ex.run_onnx(fp32, test[0])["logits"].argmax(1)
    for e in (int8.tensorrt, int8.onnxruntime): assert (ex.run_onnx(e, test[0])["logits"].argmax(1) == want).mean() > .97
    assert len(int8.tensorrt.data) < .5*len(fp32.data)   # 20,000 weights only: nodes and scales weigh, too


def test_scope_and_repetition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 2), nn.ReLU()), nn.Flatten(), nn.Linear(4, 2))
    d, cal = tiny(model=model), qu.Calibration(noise(64))
    part = qu.quantize(d, cal, skip=("0",))
    assert part.layers == dict(conv=1, linear=1)
    first = next(n for n in part.tensorrt.proto.graph.node if n.op_type == "Conv")
    assert first.input[1] in {t.name for t in part.tensorrt.proto.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert qu.quantize(d, cal, skip=("0",)).tensorrt.data == part.tensorrt.data
    with pytest.raises(FsmlError, match="no module"): qu.quantize(d, cal, scope=("backbone",))


def test_nothing_to_quantize():
    with pytest.raises(FsmlError, match="nothing|no convolution"): qu.quantize(tiny(model=nn.Sequential(nn.AvgPool2d(2, (2, 4)), nn.Flatten())), qu.Calibration(noise(64)))


def test_calibration_is_drawn_from_a_version_and_recorded(tmp_path, deployable):
    from fsml_lab.data.journal import Dataset, NewSample
    import fsml_lab.data.version  # noqa: F401  (adds commit and open)
    lab = Lab(tmp_path)
    ds = Dataset(lab, "digits", [f"digit {i}" for i in range(10)])
    ds.add((NewSample(DIGITS/f"{i:05}.png", sample_id=f"{i:05}", split="train" if i < 60 else "test") for i in range(80)), progress=False)
    v = ds.commit("80 digits")
    frozen = lab.open("digits@v1")
    a, b = (qu.calibration(frozen, deployable.pre, n=40) for _ in range(2))
    assert a.to_json() == b.to_json() and a.root == v.root and len(set(a.ids)) == 40 and max(a.ids) < "00060"
    assert json.loads(a.to_json())["count"] == 40
    assert qu.calibration(frozen, deployable.pre, n=40, seed=1).ids != a.ids
    with pytest.raises(FsmlError): qu.calibration(frozen, deployable.pre, split="valid")


@pytest.mark.parametrize("images, match", [
    (noise(8), "too few"), (np.full((64, 4, 4, 1), 7, np.uint8), "constant"), (np.repeat(noise(1), 64, 0), "same image"),
    (np.full((64, 4, 4, 1), np.nan), "NaN"), (np.zeros((64, 4, 4, 1), np.float32), "uint8"), (np.zeros((64, 16), np.uint8), "uint8")])
def test_calibration_images_that_say_nothing(images, match):
    with pytest.raises(FsmlError, match=match): qu.Calibration(images)


def form(name, p50, drop=None):
    lo, v, hi = p50
    figs = [Figure("latency_p50", v, lo, hi, unit="ms", better="lower")]
    if drop is not None: figs.append(Figure("drop", drop, better="lower"))
    return qu.Form(name, ex.Exported(b""), tuple(figs))


@pytest.mark.parametrize("p50, drop, ships", [
    ((.4, .5, .6), .0, "int8"), ((.4, .5, .6), .004, "int8"),
    ((.4, .5, .6), .02, "fp32"),            # fast, and wrong too often
    ((.7, .8, .95), .0, "fp32"),            # the intervals overlap: not proven faster
    ((1.4, 1.5, 1.6), -.01, "fp32")])       # slower, however good
def test_the_fastest_honest_form_ships(p50, drop, ships):
    c = qu._decide([form("fp32", (.9, 1., 1.1)), form("int8", p50, drop)], .005)
    assert c.name == ships and c["int8"].why.startswith("refused" if ships == "fp32" else "ships")


# --- legal or not: the linter and NVIDIA's parser

def edit(data, change):
    m = onnx.load_model_from_string(data)
    g, by = m.graph, {o: n for n in m.graph.node for o in n.output}
    conv = [n for n in g.node if n.op_type == "Conv"][1]
    dq = by[conv.input[0]]
    change(g, conv, [by[dq.input[0]], *(n for n in g.node if dq.input[0] in n.input)])
    return m.SerializeToString()


def const(g, value):
    g.initializer.append(numpy_helper.from_array(value, f"const{len(g.initializer)}"))
    return g.initializer[-1].name


def set_input(i, value):
    def change(g, conv, pair):
        name = const(g, value)
        for n in pair: n.input[i] = name
    return change


def bias(g, conv, pair):
    b = next(numpy_helper.to_array(t) for t in g.initializer if t.name == conv.input[2])
    parts = [const(g, np.round(b*1e4).astype(np.int32)), const(g, np.full(len(b), 1e-4, np.float32)), const(g, np.zeros(len(b), np.int32))]
    g.node.insert(0, helper.make_node("DequantizeLinear", parts, ["bias"], "bias_dq", axis=0))
    conv.input[2] = "bias"


def computed_scale(g, conv, pair):
    at = list(g.node).index(pair[0])
    g.node.insert(at, helper.make_node("ReduceMax", [pair[0].input[0]], ["largest"], "largest", keepdims=0))
    g.node.insert(at + 1, helper.make_node("Div", ["largest", const(g, np.array(127, np.float32))], ["computed"], "computed"))
    for n in pair: n.input[1] = "computed"


def dynamic(g, conv, pair):
    at = list(g.node).index(pair[0])
    g.node.insert(at, helper.make_node("DynamicQuantizeLinear", [pair[0].input[0]], ["dq", "ds", "dz"], "dynamic"))
    for n in pair[1:]: n.input[:] = ["dq", "ds", "dz"]
    g.node.remove(pair[0])


def operator_form(g, conv, pair):
    at, by = list(g.node).index(conv), {o: n for n in g.node for o in n.output}
    a, w = by[conv.input[0]], by[conv.input[1]]
    scale, zero = const(g, np.array(.05, np.float32)), const(g, np.array(0, np.int8))
    attrs = {x.name: helper.get_attribute_value(x) for x in conv.attribute if x.name != "auto_pad"}
    g.node.insert(at, helper.make_node("QLinearConv", [*a.input, *w.input, scale, zero], ["q"], "qlinear", **attrs))
    g.node.insert(at + 1, helper.make_node("DequantizeLinear", ["q", scale, zero], [conv.output[0]], "after"))
    g.node.remove(conv)


def unsigned_weight(g, conv, pair):
    dq = next(n for n in g.node if n.output[0] == conv.input[1])
    w = next(numpy_helper.to_array(t) for t in g.initializer if t.name == dq.input[0])
    dq.input[0], dq.input[2] = const(g, (w.astype(np.int16) + 128).astype(np.uint8)), const(g, np.full(len(w), 128, np.uint8))


def pair_before(op):
    def change(g, conv, pair):
        n = next(n for n in g.node if n.op_type == op)
        scale, zero, at = const(g, np.array(.03, np.float32)), const(g, np.array(0, np.int8)), list(g.node).index(n)
        g.node.insert(at, helper.make_node("QuantizeLinear", [n.input[0], scale, zero], ["q"], "q_new"))
        g.node.insert(at + 1, helper.make_node("DequantizeLinear", ["q", scale, zero], ["dq"], "dq_new"))
        n.input[0] = "dq"
    return change


def lstm(activations, weights):
    "An LSTM of which the activations, the weights or nothing is quantized."
    g = helper.make_graph([], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, "b", 4])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 1, "b", 3])])
    rng = np.random.default_rng(0)
    scale, zero, r = const(g, np.array(.02, np.float32)), const(g, np.array(0, np.int8)), const(g, rng.normal(size=(1, 12, 3)).astype(np.float32))
    w, x = const(g, (rng.integers(-127, 128, (1, 12, 4))).astype(np.int8 if weights else np.float32)), "x"
    if weights:
        g.node.append(helper.make_node("DequantizeLinear", [w, scale, zero], ["w"], "w_dq"))
        w = "w"
    if activations:
        g.node.extend([helper.make_node("QuantizeLinear", ["x", scale, zero], ["xq"], "x_q"), helper.make_node("DequantizeLinear", ["xq", scale, zero], ["xd"], "x_dq")])
        x = "xd"
    g.node.append(helper.make_node("LSTM", [x, w, r], ["y"], "lstm", hidden_size=3))
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


@pytest.fixture(scope="module")
def files(fp32, int8):
    "name -> (ONNX file, the linter's illegal rule or None)."
    s8 = int8.tensorrt.data
    width = next(t.dims[0] for t in int8.tensorrt.proto.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 4)
    return {
        "fp32": (fp32.data, None), "int8": (s8, None), "lstm": (lstm(0, 0), None), "lstm weights": (lstm(0, 1), None),
        "pair before relu": (edit(s8, pair_before("Relu")), None), "pair before softmax": (edit(s8, pair_before("Softmax")), None),
        "per-channel activation": (edit(s8, lambda g, conv, pair: (set_input(1, np.full(width, .02, np.float32))(g, conv, pair), set_input(2, np.zeros(width, np.int8))(g, conv, pair))), None),
        "one zero-point for many scales": (edit(s8, set_input(1, np.full(width, .02, np.float32))), "zero-point and scale of different length"),
        "onnxruntime's dialect": (int8.onnxruntime.data, "uint8 is not int8"), "uint8 with zero-point 0": (edit(s8, set_input(2, np.array(0, np.uint8))), "uint8 is not int8"),
        "zero-point 5": (edit(s8, set_input(2, np.array(5, np.int8))), "zero-point is not 0"), "16 bits": (edit(s8, set_input(2, np.array(0, np.int16))), "int16 is not int8"),
        "uint8 weights": (edit(s8, unsigned_weight), "uint8 is not int8"), "int32 bias": (edit(s8, bias), "int32 is not int8"),
        "scale 0": (edit(s8, set_input(1, np.array(0, np.float32))), "scale is not positive"), "scale NaN": (edit(s8, set_input(1, np.array(np.nan, np.float32))), "scale is not positive"),
        "computed scale": (edit(s8, computed_scale), "scale is not a constant"), "dynamic": (edit(s8, dynamic), "operator form DynamicQuantizeLinear"),
        "operator form": (edit(s8, operator_form), "operator form QLinearConv"), "lstm activations": (lstm(1, 0), "quantized activation of a recurrent layer")}


def test_linter_and_referee_agree(files):
    with ThreadPoolExecutor(2) as pool: said = dict(zip(files, pool.map(lambda f: rt.referee(f[0]), files.values())))
    for name, (data, rule) in files.items():
        illegal = {f.rule for f in qu.lint(data) if f.severity == "illegal"}
        assert (rule in illegal) if rule else not illegal, name
        assert said[name].ok is (rule is None), (name, said[name])
        assert rule is None or said[name].words and (said[name].messages or "crashed" in said[name].words), name


def test_findings_name_node_and_remedy(files):
    found = qu.lint(files["per-channel activation"][0])
    assert not found.legal and {(f.rule, f.severity) for f in found} == {("activation with a scale per channel", "unsafe")}
    slow = qu.lint(files["pair before relu"][0])
    assert slow.legal and {f.rule for f in slow} == {"pair before ReLU"} and {f.node for f in slow} == {"dq_new"}
    assert all(f.node and f.remedy.endswith(".") for f in qu.lint(files["onnxruntime's dialect"][0]))


def test_the_referee_names_the_node(files):
    r = rt.referee(files["int32 bias"][0])
    assert "bias_dq" in r.messages[0] and r.version


def test_without_a_referee_nothing_is_proven(int8, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(rt.importlib.util, "find_spec", lambda n: None if n == "tensorrt_rtx" else find(n))
    r = rt.referee(int8.tensorrt)
    assert r.ok is None and "not proven" in r.words


# --- TensorRT

def test_deploy_says_what_ran(deployable, fp32, int8, test):
    art = rt.deploy(int8.tensorrt, cpu=fp32)
    out = art.run(test[0][:70])
    assert art.verdict.ok and out["probs"].shape == (70, 10)
    if rt.missing():
        import onnxruntime
        assert art.backend == f"onnxruntime {'.'.join(onnxruntime.__version__.split('.')[:2])} (CPU)"
        assert "No TensorRT engine was built for a GPU or executed" in art.not_executed and art.onnx is fp32
        np.testing.assert_array_equal(out["logits"][:64], ex.run_onnx(fp32, test[0][:64])["logits"])
        with pytest.raises(FsmlError, match="not measured"): art.models_per_gpu(test[0][:1])
    with pytest.raises(FsmlError, match="uint8"): art.run(test[0]/255)


def test_the_cache_gives_back_only_what_was_put_there(tmp_path):
    cache, data = rt.EngineCache(tmp_path), bytes(range(256))*40
    cache.put("k", data, gpu="g")
    engine, card = tmp_path/"k.engine", tmp_path/"k.json"
    assert cache.get("k") == data and cache.get("other") is None
    good = card.read_bytes()
    for bad in (b"", b"{", b"[]", good.replace(b'"k"', b'"j"')):
        card.write_bytes(bad)
        assert cache.get("k") is None
    card.write_bytes(good)
    assert cache.get("k") == data
    for bad in (data[:-1], b"", data[:100] + b"\xff" + data[101:]):
        engine.write_bytes(bad)
        assert cache.get("k") is None
    engine.unlink()
    assert cache.get("k") is None


SOURCE = Path(rt.__file__)
HOLDS = dict(builder="Builder", network="INetworkDefinition", parser="OnnxParser", config="IBuilderConfig", profile="IOptimizationProfile", tensor="ITensor",
             engine="ICudaEngine", context="IExecutionContext", runtime="Runtime")   # what our variables hold


def names_used():
    "(owner, attribute) for each name of the bindings that our code uses."
    for n in ast.walk(ast.parse(SOURCE.read_text())):
        if not isinstance(n, ast.Attribute): continue
        v = n.value
        if isinstance(v, ast.Name) and v.id == "trt": yield "", n.attr
        elif isinstance(v, ast.Attribute) and isinstance(v.value, ast.Name) and v.value.id == "trt": yield v.attr, n.attr
        elif isinstance(v, ast.Name) and v.id in HOLDS: yield HOLDS[v.id], n.attr
        elif isinstance(v, ast.Attribute) and isinstance(v.value, ast.Name) and v.value.id == "self" and v.attr in HOLDS: yield HOLDS[v.attr], n.attr


def test_every_name_exists_in_the_bindings():
    import tensorrt_rtx
    used = set(names_used())
    assert ("", "Builder") in used and ("IExecutionContext", "execute_async_v3") in used and ("ICudaEngine", "device_memory_size_v2") in used and len(used) > 40
    lost = [(o, a) for o, a in used if not hasattr(getattr(tensorrt_rtx, o) if o else tensorrt_rtx, a)]
    assert not lost
    flags = {a for o, a in used if o in ("BuilderFlag", "NetworkDefinitionCreationFlag")}
    assert flags == {"STRONGLY_TYPED"} and not any("alibrat" in a for _, a in used)   # strongly typed: no precision flags, no calibrators


MUTATIONS = [("num_io_tensors", "num_bindings"), ("execute_async_v3(self.stream.cuda_stream)", "execute_async_v2([], self.stream.cuda_stream)"), ("if engine is None: raise FsmlError(f\"The builder", "if False: raise FsmlError(f\"The builder"),
             ("STRONGLY_TYPED)", "EXPLICIT)"), ("parser.parse(data)", "parser.parse(data, 1, 2, 3)"), ("config.set_memory_pool_limit(", "config.max_workspace_size("), ("device_memory_size_v2", "device_memory"), ("trt.DataType.INT64", "trt.DataType.INT65")]


def test_types_against_tensorrt_10_and_11(tmp_path):
    "pyright on our code and on mutations of it, against stubs of the real bindings."
    if not (TYPINGS/"tensorrt10").is_dir():
        warnings.warn(f"The stubs of TensorRT 10 and 11 are not at {TYPINGS}: names were held against tensorrt_rtx, types were not checked.", stacklevel=1)
        return
    source = SOURCE.read_text()
    envs = []
    for v in ("10", "11"):
        export = tmp_path/v/"fsml_lab"/"export"
        shutil.copytree(TYPINGS/f"tensorrt{v}", tmp_path/f"stubs{v}"/"tensorrt")
        shutil.copytree(SOURCE.parent.parent, tmp_path/v/"fsml_lab", ignore=shutil.ignore_patterns("__pycache__", "static"))
        for i, (old, new) in enumerate(MUTATIONS):
            assert source.count(old) >= 1, old
            (export/f"mutation_{i}.py").write_text(source.replace(old, new))
        (export/"tensorrt.py").rename(export/"checked.py")   # a module tensorrt.py beside it must not be taken for the library
        envs.append(dict(root=v, extraPaths=[f"stubs{v}"]))
    files = [f"{v}/fsml_lab/export/{f}.py" for v in ("10", "11") for f in ("checked", *(f"mutation_{i}" for i in range(len(MUTATIONS))))]
    (tmp_path/"pyrightconfig.json").write_text(json.dumps(dict(include=files, executionEnvironments=envs, pythonVersion="3.11", typeCheckingMode="standard", reportMissingModuleSource=False)))
    out = subprocess.run([sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)], capture_output=True, text=True)
    found = json.loads(out.stdout)
    assert found["summary"]["filesAnalyzed"] >= len(files)
    errors = Counter(str(Path(d["file"]).relative_to(tmp_path.resolve())) for d in found["generalDiagnostics"] if d["severity"] == "error")
    for f in files: assert (errors[f] == 0) == f.endswith("checked.py"), [d["message"] for d in found["generalDiagnostics"] if d["file"].endswith(f)]


@pytest.mark.gpu
def test_engine_on_the_gpu(deployable, int8, test, tmp_path):
    pytest.importorskip("tensorrt", reason="GPU: the package tensorrt is not installed")
    want = ex.run_torch(deployable, test[0])["logits"].argmax(1)
    for _ in range(2):   # built, then from the cache
        art = rt.deploy(int8.tensorrt, cache=tmp_path)
        assert art.backend.startswith("tensorrt") and not art.not_executed
        assert (art.run(test[0])["logits"].argmax(1) == want).mean() > .97
    assert len(list(tmp_path.glob("*.engine"))) == 1
    assert art.models_per_gpu(test[0][:8]).value >= 1 and art.latency(test[0][:1])[0].value > 0
    with pytest.raises(FsmlError, match="outside the engine's profile"): art.run(test[0][:200], batch_size=200)
