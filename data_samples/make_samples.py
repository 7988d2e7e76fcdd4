"""Make every file of data_samples: UCI handwritten digits, and forms composed of them. Seeded; see README.md beside this file.

    uv run python data_samples/make_samples.py            # write them here
    uv run python data_samples/make_samples.py --check    # make them again elsewhere and compare
"""
import argparse, csv, hashlib, io, json, sys, tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent
SEED = 1998                                             # the year the digits were published
DIGITS = {"train": 1100, "valid": 200, "test": 497}     # by file order, which keeps writers together (README)
FORMS = {"train": 400, "valid": 60, "test": 150}
W, H, S = 256, 192, 2                                   # a form in px; it is drawn S times larger, then reduced
MARGIN, TOP, FOOT, ROWS = 16, 74, 30, 4                 # in drawn px: paper edge, below the title, below the rows; rows a form
WORDS = "Total Amount Tax Fee Paid Balance Subtotal Deposit Discount Rent".split()
TITLES = ["INVOICE", "RECEIPT", "CLAIM FORM", "ORDER", "TRANSFER", "EXPENSES"]
PRINTS = [(70, 70, 80), (40, 80, 140), (150, 60, 60), (50, 110, 80)]
INKS = [(25, 35, 120), (20, 20, 30), (40, 60, 150), (60, 30, 40)]
DOI, LICENCE = "10.24432/C50P49", "CC-BY-4.0"


# --- the digits ---------------------------------------------------------------------------------------------------------------

def digits():
    "All 1797 digits of scikit-learn in file order: uint8 (n, 8, 8) with 0 paper and 255 ink, labels (n,), splits (n,)."
    cells, labels = load_digits(return_X_y=True)
    grey = np.round(np.reshape(cells, (-1, 8, 8)) * 255 / 16).astype(np.uint8)      # 0..16 -> 0..255; np.round(grey / 255 * 16) is the way back
    return grey, np.asarray(labels), np.repeat(list(DIGITS), list(DIGITS.values()))


def duplicates(
    grey,       # uint8 (n, 8, 8)
) -> list:      # lists of the indices that share identical pixels
    "Clusters of identical digits: each must lie in one split."
    clusters = {}
    for i, image in enumerate(grey): clusters.setdefault(image.tobytes(), []).append(i)
    return [c for c in clusters.values() if len(c) > 1]


def group(i): return f"digit-{i:05d}"


def write_digits(out):
    "Writes digits/*.png and digits/labels.csv."
    grey, labels, splits = digits()
    crossing = [c for c in duplicates(grey) if len(set(splits[c])) > 1]
    if crossing: raise SystemExit(f"Identical digits lie in two splits: {crossing}. Move each cluster into one split.")
    rows = [("file", "label", "split", "group", "sha256")]
    for i, image in enumerate(grey):
        sha = save(out/"digits"/f"{i:05d}.png", encode(Image.fromarray(image), "PNG", optimize=True))
        rows.append((f"{i:05d}.png", labels[i], splits[i], group(i), sha))
    with open(out/"digits"/"labels.csv", "w", newline="") as f: csv.writer(f, lineterminator="\n").writerows(rows)


# --- handwriting --------------------------------------------------------------------------------------------------------------

def stroke(
    grey8x8,    # (8, 8), 0 paper to 255 ink
    height,     # of the mask, px
    rng=None,   # numpy Generator: varies the width by -15 to +10 %; None: as written
):              # float32 (height, width), 0 paper to 1 ink, cut tight
    "A digit of 8x8 grey cells as a smooth pen stroke: enlarged 12 times, and the ink's edge drawn where the grey passes a third."
    grey = np.pad(np.asarray(grey8x8, np.float32) / 255, 1)
    big = np.asarray(Image.fromarray(grey).resize((120, 120), Image.Resampling.BICUBIC))
    t = np.clip((big - .36) / .28, 0, 1)
    ink = t * t * (3 - 2 * t)                                       # smoothstep: a soft edge
    ys, xs = np.where(ink > .2)
    ink = ink[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
    ratio = ink.shape[1] / ink.shape[0] * (rng.uniform(.85, 1.1) if rng else 1)
    width = max(4, round(height * min(ratio, .95)))
    return np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.LANCZOS)).clip(0, 1)


def crop(ink, level=.2):
    "The part of a mask that holds ink."
    ys, xs = np.where(ink > level)
    return ink[ys.min():ys.max() + 1, xs.min():xs.max() + 1]


def slanted(ink, slant, tilt):
    "A mask sheared: `slant` px to the right for a px up, `tilt` px up for a px to the right."
    h, w = ink.shape
    px, py = int(.4 * h), 6
    co = (1, slant, -px - slant * (h / 2 + py), tilt, 1, -py - tilt * (w / 2 + px))
    image = Image.fromarray(np.ascontiguousarray(ink)).transform((w + 2 * px, h + 2 * py), Image.Transform.AFFINE, co, Image.Resampling.BICUBIC)
    return crop(np.asarray(image).clip(0, 1))


def amount(rng, style, pool, grey, room):
    "3 to 6 digits of the pool written side by side in at most `room` px: mask (h, w) and the indices of its digits in reading order."
    ids, h = rng.choice(pool, rng.integers(3, 7), replace=False).tolist(), style.height
    masks = [slanted(stroke(grey[i], round(h * rng.uniform(.94, 1.04)), rng), style.slant + rng.uniform(-.06, .06),
                     rng.uniform(-.05, .05)) for i in ids]
    gaps = rng.integers(2, 10, len(ids))
    while sum(m.shape[1] for m in masks) + gaps[:len(masks)].sum() > room: masks.pop()
    line, x = np.zeros((max(m.shape[0] for m in masks) + 6, room), np.float32), 0
    for m, gap in zip(masks, gaps):
        y = rng.integers(0, line.shape[0] - m.shape[0] + 1)
        line[y:y + m.shape[0], x:x + m.shape[1]] = m
        x += m.shape[1] + gap
    return crop(line, 0), ids[:len(masks)]


# --- the printed form ---------------------------------------------------------------------------------------------------------

@dataclass
class Style:
    "What one form has throughout: colours (RGB 0..255), typeface, kind of rule, and the hand."
    paper: np.ndarray
    tint: tuple     # of the print
    ink: tuple      # of the pen
    face: str
    rule: int       # 0 a box, 1 a line under the amount, 2 a line across the form
    slant: float
    height: float   # of a digit, drawn px

    @classmethod
    def draw(cls, rng):
        "A random style."
        paper = rng.uniform(225, 252) - np.array([0, rng.uniform(0, 6), rng.uniform(0, 22)])     # white to cream
        return cls(paper, PRINTS[rng.integers(4)], INKS[rng.integers(4)], ["DejaVuSans.ttf", "DejaVuSerif.ttf"][rng.integers(2)],
                   int(rng.integers(3)), rng.uniform(-.05, .25), S * rng.uniform(21.3, 26))

    @property
    def line(self): return tuple(int(v) for v in (np.array(self.tint) + self.paper) / 2)


def font(name, size): return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", name), size)


def print_head(rng, pen, style):
    "The frame, the title and a printed number."
    right = W * S - MARGIN
    pen.rectangle([MARGIN, MARGIN, right, H * S - MARGIN], outline=style.line, width=2)
    pen.text((MARGIN + 14, MARGIN + 8), TITLES[rng.integers(len(TITLES))], font=font("DejaVuSans-Bold.ttf", 26), fill=style.tint)
    pen.text((right - 150, MARGIN + 14), f"No {rng.integers(10000, 99999)}", font=font("DejaVuSansMono.ttf", 18), fill=style.tint)
    pen.line([MARGIN, MARGIN + 48, right, MARGIN + 48], fill=style.line, width=2)


def print_row(rng, pen, style, word, y, h):
    "A row's printed word and its field: the x at which the field begins."
    x, right = 190 + int(rng.integers(-20, 30)), W * S - MARGIN
    pen.text((MARGIN + 14, y + h // 2 - 12), word, font=font(style.face, (18, 22)[rng.integers(2)]), fill=style.tint)
    if style.rule == 0: pen.rectangle([x, y + 4, right - 14, y + h - 4], outline=style.line, width=2)
    elif style.rule == 1: pen.line([x, y + h - 8, right - 14, y + h - 8], fill=style.line, width=2)
    else: pen.line([MARGIN, y + h, right, y + h], fill=style.line, width=1)
    return x


def print_other(rng, pen, style, x, y, h):
    "What stands in a field that holds no amount: print (a date or a number), a pen's line, print crossed out by a pen, or nothing."
    kind, mid = rng.random(), y + h // 2
    date = f"{rng.integers(1, 28):02d}.{rng.integers(1, 13):02d}.20{rng.integers(10, 30)}"
    price = f"{rng.integers(10, 999)}.{rng.integers(100):02d}"
    if kind < .55: pen.text((x + 20, mid - 12), date if kind < .3 else price, font=font(style.face, 22), fill=style.tint)
    if .45 < kind < .8:
        ends = [x + 16, mid + rng.integers(-6, 7), x + rng.integers(100, 170), mid + rng.integers(-6, 7)]
        pen.line(ends, fill=style.ink, width=int(rng.integers(3, 7)))


# --- the scan -----------------------------------------------------------------------------------------------------------------

def camera(rng):
    "A slightly turned, scaled and shifted view: PIL's six affine coefficients, from a scanned px to a drawn px."
    a, scale, shift = np.deg2rad(rng.uniform(-3, 3)), rng.uniform(.94, 1.04), rng.uniform(-8, 8, 2)
    A = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) / scale
    centre = np.array([W, H]) * S / 2
    off = centre - A @ (centre + shift)
    return (*A[0], off[0], *A[1], off[1])


def warp(image, view, fill: float | tuple = 0):
    "The image as the camera sees it; `fill` is what lies beyond the paper."
    return image.transform(image.size, Image.Transform.AFFINE, view, Image.Resampling.BILINEAR, fillcolor=fill)


def box(ink, view):
    "Tight xyxy of a drawn mask after the scan, px of the form, continuous edges."
    ys, xs = np.where(np.asarray(warp(Image.fromarray(ink), view)) > .3)
    return [float(v) / S for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]


def scan(rng, image):
    "Uneven light, the sensor's noise, and in 3 of 10 a soft focus."
    x, y = np.arange(W) / W - .5, np.arange(H)[:, None] / H - .5
    light = rng.uniform(-14, 14) * x + rng.uniform(-14, 14) * y + rng.normal(0, rng.uniform(1, 5), (H, W))
    image = Image.fromarray((np.asarray(image, np.float32) + light[..., None]).clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(.2, .6))) if rng.random() < .3 else image


# --- a form -------------------------------------------------------------------------------------------------------------------

def write_amount(rng, style, pool, grey, x, y, h):
    "An amount written into the field at (x, y) of height h: its ink on the whole drawn form, and its digits."
    room = W * S - MARGIN - 4 - (x + 8)
    line, ids = amount(rng, style, pool, grey, room)
    x += 8 + int(rng.integers(0, min(30, room - line.shape[1]) + 1))
    y += (h - line.shape[0]) // 2 + int(rng.integers(-3, 4))
    ink = np.zeros((H * S, W * S), np.float32)
    ink[y:y + line.shape[0], x:x + line.shape[1]] = line
    return ink, ids


def draw_form(rng, style, pool, grey):
    "The print as an image, and for each amount its ink mask and its digits."
    image = Image.new("RGB", (W * S, H * S), tuple(int(v) for v in style.paper))
    pen, h, amounts = ImageDraw.Draw(image), (H * S - MARGIN - TOP - FOOT) // ROWS, []
    print_head(rng, pen, style)
    filled = rng.choice(ROWS, rng.integers(1, 4), replace=False)
    for row, word in enumerate(rng.choice(WORDS, ROWS, replace=False)):
        y = TOP + row * h
        x = print_row(rng, pen, style, str(word), y, h)
        if row in filled: amounts.append(write_amount(rng, style, pool, grey, x, y, h))
        else: print_other(rng, pen, style, x, y, h)
    return image, amounts


def form(
    i,      # number of the form: it alone decides the form, with SEED
    pool,   # indices of the digits it may use
    grey,   # uint8 (n, 8, 8)
):
    "Form number i: the RGB image, and a list of (xyxy px, digit indices in reading order), one an amount."
    rng = np.random.default_rng([SEED, i])
    style = Style.draw(rng)
    image, amounts = draw_form(rng, style, pool, grey)
    ink = .88 * np.max([mask for mask, _ in amounts], axis=0)[..., None]          # a marker lets a little paper through
    image = Image.fromarray((np.asarray(image) * (1 - ink) + np.array(style.ink) * ink).astype(np.uint8))
    view = camera(rng)
    desk = tuple(int(v * .55) for v in style.paper)
    return scan(rng, warp(image, view, desk).reduce(S)), [(box(mask, view), ids) for mask, ids in amounts]


def form_splits(): return np.repeat(list(FORMS), list(FORMS.values()))


def annotation(ann_id, image_id, xyxy, text):
    "One amount as COCO has it (bbox is x, y, width, height), with its transcription."
    x0, y0, x1, y1 = xyxy
    return dict(id=ann_id, image_id=image_id, category_id=1, bbox=[x0, y0, x1 - x0, y1 - y0], area=(x1 - x0) * (y1 - y0), iscrowd=0,
                segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]], text=text)


def coco() -> dict:
    "The COCO document without its images and annotations."
    return dict(info=dict(description="fsml_lab forms: amounts of UCI handwritten digits on drawn forms", version="1", year=1998,
                          contributor="digits: E. Alpaydin, C. Kaynak; forms: the fsml_lab authors", url=f"https://doi.org/{DOI}"),
                licenses=[dict(id=1, name=LICENCE, url="https://creativecommons.org/licenses/by/4.0/")],
                categories=[dict(id=1, name="amount", supercategory="text")], images=[], annotations=[])


def write_forms(out):
    "Writes forms/*.webp and forms/forms.json."
    (grey, labels, splits), doc = digits(), coco()
    for i, split in enumerate(form_splits()):
        image, amounts = form(i, np.flatnonzero(splits == split), grey)
        sha = save(out/"forms"/f"{i:05d}.webp", encode(image, "WEBP", quality=80, method=6))
        doc["images"].append(dict(id=i + 1, file_name=f"{i:05d}.webp", width=W, height=H, license=1, split=str(split), sha256=sha,
                                  groups=[group(k) for _, ids in amounts for k in ids]))
        for xyxy, ids in amounts:
            text = "".join(str(labels[k]) for k in ids)
            doc["annotations"].append(annotation(len(doc["annotations"]) + 1, i + 1, xyxy, text))
    save(out/"forms"/"forms.json", lines(doc).encode())


# --- files --------------------------------------------------------------------------------------------------------------------

def encode(image, kind, **options):
    "An image as file bytes."
    f = io.BytesIO()
    image.save(f, kind, **options)
    return f.getvalue()


def save(path, data):
    "Writes the bytes, gives back their sha256."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def lines(doc):
    "JSON with one record a line, so that a change shows in a diff."
    rows = lambda v: "[\n" + ",\n".join(json.dumps(r) for r in v) + "\n]" if isinstance(v, list) else json.dumps(v)
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {rows(v)}" for k, v in doc.items()) + "\n}\n"


def data_files(out): return sorted(p for d in ("digits", "forms") for p in (out/d).glob("*"))


def make(out):
    "Writes everything under `out`, and SHA256SUMS over it."
    write_digits(out)
    write_forms(out)
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(out).as_posix()}\n" for p in data_files(out)]
    (out/"SHA256SUMS").write_text("".join(sums))


def labels_of(path):
    "What a labels file says, without the hashes of the image files (a codec's bytes differ between versions)."
    if path.suffix == ".csv": return [r[:-1] for r in csv.reader(path.read_text().splitlines())]
    doc = json.loads(path.read_text())
    for image in doc["images"]: del image["sha256"]
    return doc


def same_pixels(a, b, tolerance=1.5):
    "Whether two image files show the same: PNG exactly, WebP within a mean of `tolerance` grey levels (its codec is lossy)."
    x, y = (np.asarray(Image.open(p), np.float32) for p in (a, b))
    return x.shape == y.shape and np.abs(x - y).mean() <= (0 if a.suffix == ".png" else tolerance)


def differences(a, b):
    "The data files by name that are missing on one side, cannot be read, or differ in labels or pixels."
    names = [{p.relative_to(d).as_posix() for p in data_files(d)} for d in (a, b)]
    def same(n):
        try: return same_pixels(a/n, b/n) if n.endswith((".png", ".webp")) else labels_of(a/n) == labels_of(b/n)
        except (OSError, ValueError, KeyError): return False        # a broken file is a difference
    return sorted(names[0] ^ names[1]) + [n for n in sorted(names[0] & names[1]) if not same(n)]


def check(out):
    "Makes everything again in a temporary folder: exit status 1 and the names when `out` differs."
    with tempfile.TemporaryDirectory() as tmp:
        make(Path(tmp))
        wrong = differences(out, Path(tmp))
    for name in wrong: print("differs:", name)
    print(f"{len(data_files(out))} files compared, {len(wrong)} differ")
    return int(bool(wrong))


def main():
    parser = argparse.ArgumentParser(description="Make the sample images, or check those that are there.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to or to check (default: this script's)")
    parser.add_argument("--check", action="store_true", help="make them again elsewhere and compare; exit 1 on a difference")
    args = parser.parse_args()
    return check(args.out) if args.check else make(args.out)


if __name__ == "__main__": sys.exit(main())
