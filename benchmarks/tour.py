"""The first turn of the loop, measured: how long it takes, how good the models are, and what 8-bit integers cost.

    uv run python benchmarks/tour.py --json FILE      (about five minutes; --fresh adds `make tour` in a new clone)

Keys: tour_s, tour_again_s; accuracy_v1, accuracy_v2 with _lo and _hi, gain_lower_bound (v2 minus v1, paired); and pooled over
five folds of all 1,797 digits, each predicted by a model that did not see it: fp32_accuracy, int8_accuracy, int8_drop_pt with
_lo and _hi (paired), int8_agreement, int8_n; with --fresh: fresh_make_tour_s, set-up included.
"""
from __future__ import annotations
import argparse, json, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd

ROOT = Path(__file__).resolve().parents[1]


def tour(home: Path) -> dict[str, float]:
    "Two runs of `fsml tour` in the same home."
    took = []
    for _ in range(2):
        t = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fsml_lab", "tour", "--home", str(home)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - t)
    s = json.loads((home/"tour"/"summary.json").read_text())
    lo, hi = s["accuracy_v2_interval"]
    return dict(tour_s=took[0], tour_again_s=took[1], accuracy_v1=s["accuracy_v1"], accuracy_v2=s["accuracy_v2"], accuracy_v2_lo=lo, accuracy_v2_hi=hi, gain_lower_bound=s["gain_lower_bound"])


def int8(home: Path, folds: int = 5) -> dict[str, float]:
    "What quantization costs, paired and pooled over folds: on one small test set a single flip is a fifth of a point."
    from fsml_lab import metrics
    from fsml_lab.core import Annotation, Lab, Preprocess
    from fsml_lab.data.journal import NewSample
    from fsml_lab.data.load import preprocess_pixels
    from fsml_lab.data.version import Dataset
    from fsml_lab.export.onnx import Deployable, run_onnx, run_torch
    from fsml_lab.export.quantize import Calibration, quantize
    from fsml_lab.papers.resnet import ResNet
    from fsml_lab.train import fit
    lab, folder = Lab(home), ROOT/"data_samples"/"digits"
    ds = Dataset(lab, "digits", map(str, range(10)))
    known = pd.read_csv(folder/"labels.csv")
    ds.add([NewSample(folder/r.file, sample_id=r.file[:-4], group=r.group) for r in known.itertuples()], progress=False)
    ds.annotate([Annotation(r.file, r.file[:-4], "label", class_id=r.label, author="uci") for r in known.itertuples()])
    ds.commit("all digits, labels of the source")
    data, pre = lab.open("digits@latest"), Preprocess((8, 8), mean=(.5,), std=(.5,), colour="grey")
    labels = data.labels().set_index("sample_id")["class_id"]
    ids = np.random.default_rng(0).permutation(labels.index.to_numpy())
    pixels = lambda some: np.stack([preprocess_pixels(data.pixels(i, "grey"), pre) for i in some])
    a, b, y = [], [], []
    for k in range(folds):
        held, rest = ids[k::folds].tolist(), np.concatenate([ids[j::folds] for j in range(folds) if j != k]).tolist()
        model = Deployable(fit(lab, lambda: ResNet(1, 10), data, pre, seed=k, train=rest, valid=held).model, pre, data.classes)
        small = quantize(model, Calibration(pixels(rest[:256]), data.version.root, tuple(rest[:256])))
        x = pixels(held)
        a.append(run_torch(model, x)["logits"].argmax(1))
        b.append(run_onnx(small.onnxruntime, x)["logits"].argmax(1))
        y.append(labels.loc[held].to_numpy())
    a, b, y = map(np.concatenate, (a, b, y))
    drop = metrics.paired_difference(b == y, a == y, name="drop")  # fp32 minus int8
    return dict(fp32_accuracy=float((a == y).mean()), int8_accuracy=float((b == y).mean()), int8_drop_pt=100*drop.value, int8_drop_pt_lo=100*drop.lo, int8_drop_pt_hi=100*drop.hi, int8_agreement=float((a == b).mean()), int8_n=len(y))


def fresh(folder: Path) -> dict[str, float]:
    "`make tour` in a new clone, set-up included."
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    t = time.perf_counter()
    subprocess.run(["make", "tour"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return dict(fresh_make_tour_s=time.perf_counter() - t)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--fresh", action="store_true", help="also time make tour in a new clone")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        figures = tour(Path(d)/"tour") | int8(Path(d)/"folds") | (fresh(Path(d)/"clone") if a.fresh else {})
    text = json.dumps({k: round(v, 5) for k, v in figures.items()}, indent=1)
    print(text)
    if a.json: a.json.write_text(text + "\n")


if __name__ == "__main__": main()
