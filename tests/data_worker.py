"""A process that adds, annotates and commits, as test_data starts it beside others: python data_worker.py HOME DATABASE K ROUNDS"""
import io, sys

import numpy as np
from PIL import Image

from fsml_lab.core import Annotation, Lab
from fsml_lab.data.journal import Dataset, NewSample
import fsml_lab.data.version  # noqa: F401, adds commit


def encode(pixels, kind="PNG", **kw):
    f = io.BytesIO()
    Image.fromarray(pixels).save(f, kind, **kw)
    return f.getvalue()


def pixels(i, size=(5, 7)): return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
def new(i, **kw): return NewSample(encode(pixels(i)), f"s{i:03d}", **kw)
def label(ann_id, sample_id, class_id, author="ada", **kw): return Annotation(ann_id, sample_id, "label", class_id, author=author, **kw)


def work(home, database, k, rounds):
    ds = Dataset(Lab(home, database=database or None, durability="normal"), "pets")
    print("ready", flush=True)
    sys.stdin.readline()   # all start together
    for r in range(rounds):
        ds.add([new(i) for i in (r, 100 + 50*k + r)], progress=False)   # one that all add, one of its own
        ds.annotate([label(f"w{k}-{r}", f"s{r:03d}", k % 3, f"w{k}"), label(f"own{k}-{r}", f"s{100 + 50*k + r:03d}", k % 3, f"w{k}")])
        ds.commit(f"w{k} {r}")


if __name__ == "__main__": work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
