"The one door for image bytes: what comes in, in which form, and what stays out."
import io, itertools, os, struct, subprocess, sys, threading, time, warnings, zlib
from pathlib import Path
import numpy as np, pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps, features
from fsml_lab.core import FsmlError, sha256
from fsml_lab.data.images import FORMATS, Admitted, admit, decode, encode_png, hamming, phash, stroke, thumbnail

SAMPLES = Path(__file__).parent.parent/"data_samples"

def save(im, format="PNG", **kw):
    f = io.BytesIO()
    im.save(f, format, **kw)
    return f.getvalue()

def photo(h=48, w=64, seed=0):
    "Smooth colours, which lossy formats keep well."
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return small.resize((w, h), Image.Resampling.BICUBIC)

def valid(fmt, im=None, **kw): return save(im or photo(), fmt, **{**(dict(quality=90) if fmt in ("JPEG", "AVIF") else dict(lossless=True) if fmt == "WEBP" else {}), **kw})

def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
PNG = b"\x89PNG\r\n\x1a\n"
def png(w, h, depth, colour, rows, *extra): return PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

# ---------------------------------------------------------------- the door as such

@pytest.mark.parametrize("fmt", FORMATS)
def test_each_format_comes_in(fmt):
    im = photo()
    data = valid(fmt, im.quantize(256) if fmt == "GIF" else im)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        a = admit(data, name=f"x.{fmt.lower()}")
    assert not caught and (a.format, a.width, a.height, a.frames, a.exif_orientation, a.notes) == (fmt, 64, 48, 1, 1, ()) and a.sha256 == sha256(data)
    assert a.pixels.shape == (48, 64, 3) and a.pixels.dtype == np.uint8 and not a.pixels.flags.writeable
    assert np.abs(a.pixels.astype(int) - np.asarray(im)).mean() < (8 if fmt == "GIF" else 4)
    assert (decode(data) == a.pixels).all() and decode(data).flags.writeable and decode(data, "grey").shape == (48, 64, 1)
    assert "data:image" in a._repr_html_()

def test_the_list_of_formats_is_the_whole_list():
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"} | ({"AVIF"} if features.check("avif") else set())
    for other in ("PPM", "TGA", "ICO", "PCX", "JPEG2000", "SGI", "PDF"):
        with pytest.raises(FsmlError, match="no image that can be read"): admit(save(photo(32, 32), other))

@pytest.mark.parametrize("data, says", [(b"", "empty"), (b"\0"*100, "no image"), (b"GIF89a", "cannot be decoded"), (b"<html>", "a web page"), (b"%PDF-1.7", "a PDF"), (b"\0\0\0\x18ftypheic", "HEIC"),
                                        ("text", "as bytes, not as str"), (Path("x.png"), "Path"), (None, "NoneType")])
def test_refusals_say_what_where_and_what_to_do(data, says):
    with pytest.raises(FsmlError, match=says) as e: admit(data, name="inbox/7")
    assert e.value.what and e.value.where.startswith("inbox/7") and e.value.remedy

def test_the_bytes_tell_the_format_and_not_the_name():
    a = admit(valid("JPEG"), name="photo.PNG")
    assert a.format == "JPEG" and a.notes == ("the name says PNG, the bytes say JPEG",)
    assert admit(valid("JPEG"), name="https://example.org/a.jpg?x=1").notes == ()

def test_this_room_loads_no_torch():
    code = "import sys, fsml_lab.data.images; print([m for m in ('torch', 'pandas', 'scipy', 'sqlalchemy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

# ---------------------------------------------------------------- upright

def corners(h, w, b=8):
    "Grey with a red, green, blue and black block, clockwise from the top left; blocks that lossy formats keep."
    a = np.full((h, w, 3), 128, np.uint8)
    a[:b, :b], a[:b, -b:], a[-b:, -b:], a[-b:, :b] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
    return a

# EXIF 2.32 (JEITA CP-3451), tag 274: which visual side the stored row 0 and the stored column 0 are
SIDES = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"), 5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}
def stored(a, o):
    row0, col0 = SIDES[o]
    a = a.swapaxes(0, 1) if row0 in ("left", "right") else a
    return np.ascontiguousarray(a[::-1 if row0 in ("bottom", "right") else 1, ::-1 if col0 in ("bottom", "right") else 1])

@pytest.mark.parametrize("fmt, kw", [("PNG", {}), ("JPEG", dict(quality=95, subsampling=0)), ("WEBP", dict(lossless=True)), ("TIFF", {}), ("TIFF", dict(compression="tiff_lzw")), ("AVIF", dict(quality=95))])
@pytest.mark.parametrize("o", range(1, 9))
def test_orientation(fmt, kw, o):
    if fmt not in FORMATS: pytest.skip("this Pillow has no AVIF")
    up = corners(48, 64)
    exif = Image.Exif()
    exif[0x0112] = o
    data = save(Image.fromarray(stored(up, o)), fmt, exif=exif, **kw)
    a = admit(data)
    assert a.exif_orientation == o and (a.width, a.height) == (64, 48)
    for y, x, want in ((3, 3, (255, 0, 0)), (3, -4, (0, 255, 0)), (-4, -4, (0, 0, 255)), (-4, 3, (0, 0, 0)), (24, 32, (128, 128, 128))):
        assert np.abs(a.pixels[y, x].astype(int) - want).max() < 12
    assert (a.pixels == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).all()
    assert (decode(data) == a.pixels).all()
    if fmt not in ("JPEG", "AVIF"): assert (a.pixels == up).all()

@pytest.mark.parametrize("value", [0, 9, 77])
def test_impossible_orientation_is_noted(value):
    exif = Image.Exif()
    exif[0x0112] = value
    a = admit(valid("JPEG", exif=exif))
    assert a.exif_orientation == 1 and any("taken as upright" in n for n in a.notes) and a.width == 64

def test_broken_exif_is_a_note_in_every_thread_and_no_warning():
    data, good = valid("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0\xff\xff\0\0\xff\xff"), valid("JPEG")
    results, before = [], list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        ts = [threading.Thread(target=lambda: results.extend((admit(data).notes, admit(good).notes) for _ in range(30))) for _ in range(4)]
        for t in ts: t.start()
        for t in ts: t.join()
        assert warnings.filters == inside
    assert not caught and len(results) == 120 and warnings.filters == before
    assert all(len(bad) == 1 and "EXIF" in bad[0] and fine == () for bad, fine in results)

def test_warnings_of_others_are_passed_on():
    from fsml_lab.data.images import _noted
    notes = []
    with pytest.warns(UserWarning, match="mine"):
        with _noted(notes): warnings.warn("mine")
    assert notes == []

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_decode_while_others_do():
    code = """
import os, threading, fsml_lab.data.images as I, numpy as np
data = I.encode_png(np.zeros((8, 8), np.uint8)); stop = threading.Event()
def busy():
    while not stop.is_set(): I.decode(data)
ts = [threading.Thread(target=busy) for _ in range(3)]; [t.start() for t in ts]
for _ in range(15):
    if (pid := os.fork()) == 0: I.decode(data); os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
stop.set(); print("fine")"""
    r = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert r.stdout == "fine\n", r.stderr

# ---------------------------------------------------------------- modes

def over_white(rgb, alpha): return rgb*(alpha/255) + 255*(1 - alpha/255)

@pytest.mark.parametrize("mode, fmt", [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("RGBA", "AVIF")])
def test_transparency_is_shown_on_white(mode, fmt):
    if fmt not in FORMATS: pytest.skip("this Pillow has no AVIF")
    im = photo().convert(mode)
    alpha = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)*2
    im.putalpha(Image.fromarray(alpha))
    a = admit(valid(fmt, im))
    px = np.asarray(im, float)
    want = over_white(px[..., :3], alpha[..., None]) if mode == "RGBA" else over_white(px[..., 0], alpha)
    assert a.mode == mode and a.pixels.shape == want.shape and "transparent parts are shown on white" in a.notes
    assert np.abs(a.pixels - want).max() <= (1.01 if fmt != "AVIF" else 25)
    opaque = photo().convert(mode)
    opaque.putalpha(255)
    assert "transparent parts are shown on white" not in admit(valid(fmt, opaque)).notes

def test_palette_and_its_transparent_colour():
    p = photo().quantize(16)
    a = admit(save(p))
    assert a.mode == "P" and (a.pixels == np.asarray(p.convert("RGB"))).all()
    clear = int(np.asarray(p)[0, 0])
    for data in (save(p, transparency=clear), save(p, "GIF", transparency=clear)):
        t = admit(data).pixels
        assert (t[np.asarray(p) == clear] == 255).all() and (t[np.asarray(p) != clear] == a.pixels[np.asarray(p) != clear]).all()

def test_transparent_colour_of_grey_and_rgb():
    g = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    a = admit(save(g, transparency=7)).pixels
    assert a.shape == (16, 16) and a[0, 7] == 255 and (np.delete(a.ravel(), 7) == np.delete(np.arange(256), 7)).all()
    rgb = Image.new("RGB", (4, 4), (10, 20, 30))
    assert (admit(save(rgb, transparency=(10, 20, 30))).pixels == 255).all() and (admit(save(rgb)).pixels == (10, 20, 30)).all()

def test_bilevel_and_grey():
    bw = Image.fromarray(np.eye(9, dtype=np.uint8)*255).convert("1")
    for fmt in ("PNG", "BMP", "TIFF", "GIF"): assert (decode(save(bw, fmt), "grey")[..., 0] == np.eye(9)*255).all()
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for fmt in ("PNG", "BMP", "TIFF", "GIF"):
        d = save(Image.fromarray(ramp), fmt)
        assert (decode(d, "grey")[..., 0] == ramp).all() and (decode(d) == ramp[..., None]).all()

def test_cmyk_jpeg_is_not_inverted():
    "Adobe stores CMYK inverted; taken literally, white paper becomes black."
    paper = admit(save(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"))
    ink = admit(save(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG"))
    cyan = admit(save(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"))
    assert paper.mode == "CMYK" and paper.pixels.min() > 250 and ink.pixels.max() < 5
    assert (cyan.pixels == (0, 255, 255)).all() and any("CMYK" in n for n in cyan.notes)

@pytest.mark.parametrize("im, fmt", [(Image.fromarray(np.full((8, 8), 4095, np.uint16)), "PNG"), (Image.fromarray(np.full((8, 8), 4095, np.uint16)), "TIFF"), (Image.fromarray(np.full((8, 8), .5, np.float32)), "TIFF"),
                                     (Image.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF")])
def test_grey_of_unknown_window_is_refused(im, fmt):
    with pytest.raises(FsmlError, match="grey values, whose black and white are not known") as e: admit(save(im, fmt))
    assert "mode" in e.value.where
    with pytest.raises(FsmlError): decode(save(im, fmt))

def test_sixteen_bits_of_grey_with_alpha_are_refused_and_of_colour_reduced():
    with pytest.raises(FsmlError, match="grey values"): admit(png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 4000, 65535)))
    a = admit(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x1234, 0, 0)))
    assert (a.pixels == [[[0, 128, 255], [0x12, 0, 0]]]).all() and a.notes == ("16 bits a channel reduced to 8",)

def test_lab_is_refused():
    with pytest.raises(FsmlError, match="mode LAB"): admit(save(ImageCms.profileToProfile(photo(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"), "TIFF"))

# ---------------------------------------------------------------- colour profiles

def icc(primaries, gamma, name):
    "A matrix and gamma profile, ICC.1:2001-04: header, tag table, and the seven tags of a display."
    s15 = lambda v: struct.pack(">i", round(v*65536))
    xyz = lambda v: b"XYZ \0\0\0\0" + b"".join(map(s15, v))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma*256)) + b"\0\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + b"\0" + b"\0"*78
    tags = [(b"desc", desc + b"\0"*(-len(desc) % 4)), (b"wtpt", xyz((.9642, 1, .8249))), *((k, xyz(v)) for k, v in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T)), *((k, curve) for k in (b"rTRC", b"gTRC", b"bTRC"))]
    at, table, body = 128 + 4 + 12*len(tags), b"", b""
    for k, v in tags:
        table += k + struct.pack(">II", at + len(body), len(v))
        body += v
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + b"\0"*12 + b"acsp" + b"\0"*28 + b"".join(map(s15, (.9642, 1, .8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body

# colorants adapted to D50: Display P3 and sRGB as their published profiles have them (columns r, g, b; rows X, Y, Z)
P3 = np.array([[.51512, .29198, .15710], [.24120, .69225, .06657], [-.00105, .04189, .78407]])
SRGB = np.array([[.43607, .38515, .14307], [.22249, .71687, .06061], [.01392, .09708, .71410]])

def to_srgb(rgb, gamma):
    lin = np.clip(np.linalg.solve(SRGB, P3 @ (rgb/255.)**gamma), 0, 1)
    return 255*np.where(lin <= .0031308, 12.92*lin, 1.055*lin**(1/2.4) - .055)  # IEC 61966-2-1

@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
def test_wide_gamut_is_converted_by_its_profile(fmt):
    profile = icc(P3, 2.2, "Display P3")
    colours = np.array(list(itertools.product((30, 128, 220), repeat=3)), np.uint8)
    data = valid(fmt, Image.fromarray(colours[None]), icc_profile=profile)
    a = admit(data)
    want = np.stack([to_srgb(c, 2.2) for c in colours])
    assert a.notes == ("colours converted from Display P3 to sRGB",)
    assert np.abs(a.pixels[0] - want).max() <= 3 and np.abs(colours - want).max() > 20  # the conversion matters, and is the right one
    assert (decode(data) == a.pixels).all()

def test_srgb_profile_changes_nothing_and_others_are_noted():
    im, srgb = photo(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    a = admit(save(im, icc_profile=srgb))
    assert a.notes == () and (a.pixels == np.asarray(im)).all()
    b = admit(save(im, icc_profile=b"no profile at all"))
    assert (b.pixels == np.asarray(im)).all() and any("profile cannot be used" in n for n in b.notes)
    grey = admit(save(im.convert("L"), icc_profile=srgb))
    assert (grey.pixels == np.asarray(im.convert("L"))).all()

# ---------------------------------------------------------------- frames

@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_several_frames(fmt):
    if fmt not in FORMATS: pytest.skip("this Pillow has no AVIF")
    frames = [photo(seed=s).quantize(32) if fmt == "GIF" else photo(seed=s) for s in range(3)]
    data = valid(fmt, frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(FsmlError, match="several frames") as e: admit(data)
    assert "animated='first'" in e.value.remedy
    a = admit(data, animated="first")
    assert a.frames == (2 if fmt == "TIFF" else 3) and "the first of several frames or pages is used" in a.notes
    assert np.abs(a.pixels.astype(int) - np.asarray(frames[0].convert("RGB"))).mean() < 3 and (decode(data) == a.pixels).all()

def test_gif_frames_are_counted_as_pillow_does():
    rng = np.random.default_rng(1)
    for n in (1, 2, 5, 23):
        ims = [Image.fromarray(rng.integers(0, 256, (5, 7), np.uint8)) for _ in range(n)]
        data = save(ims[0], "GIF", save_all=True, append_images=ims[1:], comment=b"c"*700, loop=0)
        assert admit(data, animated="first").frames == Image.open(io.BytesIO(data)).n_frames == n

def test_a_phones_second_picture_is_no_second_frame():
    data = save(photo(), "MPO", save_all=True, append_images=[photo(seed=1)])
    a = admit(data)
    assert a.format == "JPEG" and a.frames == 1 and any("further pictures" in n for n in a.notes)
    assert np.abs(a.pixels.astype(int) - np.asarray(photo())).mean() < 4

def test_unknown_policy():
    with pytest.raises(FsmlError, match="animated is 'all'"): admit(valid("PNG"), animated="all")

# ---------------------------------------------------------------- damage

@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("share", [.2, .5, .8, .95])
def test_truncated(fmt, share):
    data = valid(fmt, photo(96, 128).quantize(64) if fmt == "GIF" else photo(96, 128))
    with pytest.raises(FsmlError): admit(data[:int(len(data)*share)], name="cut")

def test_a_switch_that_lets_half_images_pass_is_found(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(FsmlError, match="told to accept truncated"): admit(valid("PNG"))

@pytest.mark.parametrize("fmt", FORMATS)
def test_trailing_bytes_change_no_pixel(fmt):
    data = valid(fmt)
    tail = b"\xff\xd9<?php ?>" + bytes(100)
    if fmt == "AVIF": tail = b"\0\0\0\x10free12345678"  # a box, as ISO 14496-12 allows
    a, b = admit(data), admit(data + tail)
    assert (a.pixels == b.pixels).all() and a.sha256 != b.sha256
    if fmt in ("PNG", "JPEG", "WEBP"): assert any(n.startswith(f"{len(tail)} bytes behind the end") for n in b.notes) and a.notes == ()

def test_every_flipped_bit_of_a_png_is_found():
    data = bytearray((SAMPLES/"digits"/"00000.png").read_bytes())
    for bit in range(len(data)*8):
        data[bit//8] ^= 1 << bit % 8
        with pytest.raises(FsmlError): admit(bytes(data))
        data[bit//8] ^= 1 << bit % 8

# ---------------------------------------------------------------- bombs

def header(fmt, w, h):
    "A small valid file whose header claims w x h."
    data = bytearray(valid(fmt, Image.new("L" if fmt in ("PNG", "BMP", "TIFF") else "RGB", (16, 16)), **(dict(lossless=False) if fmt == "WEBP" else {})))
    if fmt == "PNG": return png(w, h, 8, 0, b"\0"*17)
    if fmt == "BMP": data[18:26] = struct.pack("<ii", w, h)
    if fmt == "GIF":
        data[6:10] = struct.pack("<HH", w, h)
    if fmt == "JPEG":
        i = data.index(b"\xff\xc0")
        data[i+5:i+9] = struct.pack(">HH", h, w)
    if fmt == "WEBP": data[26:30] = struct.pack("<HH", w, h)
    if fmt == "TIFF":
        n, at = struct.unpack_from("<H", data, o := struct.unpack_from("<I", data, 4)[0])[0], o + 2
        for k in range(n):
            tag, kind, count = struct.unpack_from("<HHI", data, at + 12*k)
            if tag in (256, 257, 278): struct.pack_into("<HHII", data, at + 12*k, tag, 4, 1, w if tag == 256 else h)
    return bytes(data)

@pytest.mark.parametrize("fmt, side", [("PNG", 30_000), ("BMP", 30_000), ("GIF", 30_000), ("JPEG", 30_000), ("TIFF", 30_000), ("WEBP", 16_383)])
def test_a_huge_header_is_refused_unread(fmt, side):
    t = time.perf_counter()
    with pytest.raises(FsmlError, match="megapixels|pixels"): admit(header(fmt, side, side))
    assert time.perf_counter() - t < .5
    a = admit(header(fmt, 16, 16)) if fmt != "PNG" else admit(png(16, 16, 8, 0, b"\0"*17*16))
    assert (a.width, a.height) == (16, 16)  # the same construction is a fine file when it tells the truth

def test_a_900_megapixel_png_costs_neither_time_nor_memory():
    "In a process of its own: the whole bomb is there, well-formed, and 900 MB when unpacked."
    code = """
import resource, time, zlib, fsml_lab.data.images as I
from fsml_lab.core import FsmlError
chunk = lambda k, b: len(b).to_bytes(4, "big") + k + b + zlib.crc32(k + b).to_bytes(4, "big")
def bomb(side):
    z, row = zlib.compressobj(1), bytes((side + 7)//8 + 1)
    body = b"".join(z.compress(row*100) for _ in range(side//100)) + z.flush()
    return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", side.to_bytes(4, "big")*2 + bytes([1, 0, 0, 0, 0])) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
assert I.admit(bomb(1000)).width == 1000
b = bomb(30_000)
before, t = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
try: I.admit(b, name="bomb")
except FsmlError as e: assert "900 megapixels" in e.what, e
else: raise SystemExit("let in")
print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    s, kb = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert s < .3 and kb < 20_000  # seconds and kB more than before; decoding takes 900,000 kB

@pytest.mark.parametrize("kind, body", [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"p\0\0")])
def test_bombs_in_the_text_of_a_png(kind, body):
    extra = chunk(kind, body + zlib.compress(bytes(80_000_000)))
    t = time.perf_counter()
    with pytest.raises(FsmlError): admit(png(1, 1, 8, 0, b"\0\0", extra))
    assert time.perf_counter() - t < 1 and len(extra) < 100_000
    assert admit(png(1, 1, 8, 0, b"\0\0")).width == 1

def test_bombs_of_many_parts():
    with pytest.raises(FsmlError, match="more than 100,000 parts"): admit(png(1, 1, 8, 0, b"\0\0", chunk(b"tEXt", b"a\0b")*100_001))
    jpeg = save(photo(), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    with pytest.raises(FsmlError, match="more than 100 scans"): admit(jpeg[:-2] + jpeg[last:-2]*200 + b"\xff\xd9")
    with pytest.raises(FsmlError, match="more than 100,000 parts"): admit(jpeg[:2] + b"\xff\xe5\0\2"*100_001 + jpeg[2:])
    gif = save(photo().quantize(8), "GIF")
    at = gif.rindex(b",\0\0\0\0")
    with pytest.raises(FsmlError, match="comment"): admit(gif[:at] + b"\x21\xfe" + b"\1a"*2**20 + b"\0" + gif[at:])
    assert admit(jpeg).width == admit(gif).width == 64

def test_caps_are_settable():
    data = valid("PNG")
    with pytest.raises(FsmlError, match="bytes, more than the 100 allowed"): admit(data, max_bytes=100)
    with pytest.raises(FsmlError, match="px, 0 megapixels"): admit(data, max_pixels=64*48 - 1)
    assert admit(data, max_pixels=64*48, max_bytes=len(data)).width == 64

# ---------------------------------------------------------------- anything else

SEEDS = [valid(f) for f in FORMATS] + [save(photo().quantize(8)), save(photo().convert("CMYK"), "JPEG"), save(photo(), "JPEG", progressive=True), save(photo(), "TIFF", compression="tiff_lzw"),
         save(photo(), "TIFF", compression="jpeg"), save(photo().convert("RGBA"), "WEBP", lossless=True), save(photo(), "WEBP", save_all=True, append_images=[photo(seed=2)]), save(photo(), "JPEG", exif=(lambda e: (e.__setitem__(274, 6), e)[1])(Image.Exif()))]

@st.composite
def mutated(draw):
    "A valid file with bytes changed, cut out, doubled or put in."
    d = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at, n = draw(st.integers(0, max(0, len(d) - 1))), draw(st.integers(1, 40))
        how = draw(st.integers(0, 4))
        if how == 0: d[at:at+1] = bytes([draw(st.integers(0, 255))])
        elif how == 1: del d[at:at+n]
        elif how == 2: d[at:at] = d[at:at+n]
        elif how == 3: d[at:at] = draw(st.binary(max_size=20))
        else: d[at:at+4] = draw(st.sampled_from([b"\xff"*4, b"\0"*4, b"\x7f\xff\xff\xff", b"\0\0\0\1"]))
    if d[:4] == b"\x89PNG" and draw(st.booleans()):  # mend the checksums, or no change would get behind the first check
        at = 8
        while at + 12 <= len(d) and at + 12 + (n := int.from_bytes(d[at:at+4], "big")) <= len(d):
            d[at+8+n:at+12+n] = zlib.crc32(d[at+4:at+8+n]).to_bytes(4, "big")
            at += 12 + n
    return bytes(d)

def let_in_or_refused(data):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try: a = admit(data, max_pixels=500_000, animated="first")
        except FsmlError as e: assert e.what and e.where and e.remedy
        else:
            assert isinstance(a, Admitted) and a.pixels.shape[:2] == (a.height, a.width) and a.pixels.dtype == np.uint8 and 0 <= a.phash < 2**64
            assert (decode(data) == (a.pixels if a.pixels.ndim == 3 else a.pixels[..., None])).all()
            a._repr_html_()
    assert not caught, [str(w.message) for w in caught]

@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_mutated_files(data): let_in_or_refused(data)

@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([b"", b"\xff\xd8\xff", PNG, b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBPVP8 ", b"\0\0\0 ftypavif"]), st.binary(max_size=300))
@example(b"RIFF", b"")
@example(PNG, chunk(b"IHDR", bytes(13)))
def test_arbitrary_bytes(head, tail): let_in_or_refused(head + tail)

# ---------------------------------------------------------------- perceptual hash

def forms(n): return [Image.open(p).convert("RGB") for p in sorted((SAMPLES/"forms").glob("*.webp"))[:n]]

def test_phash_is_the_one_of_imagehash():
    imagehash = pytest.importorskip("imagehash")
    ims = forms(40) + [photo(200, 300, s) for s in range(40)]
    ours, theirs = [phash(np.asarray(im)) for im in ims], [imagehash.phash(im) for im in ims]
    bits = [np.packbits(t.hash).tobytes() for t in theirs]
    same = np.mean([o == int.from_bytes(b, "big") for o, b in zip(ours, bits)])
    assert same > .97  # the same recipe; a coefficient at the median may fall to either side
    far = [(hamming(ours[i], ours[j]), theirs[i] - theirs[j]) for i, j in itertools.combinations(range(len(ims)), 2)]
    from scipy.stats import spearmanr
    assert spearmanr(*zip(*far)).statistic > .995

def test_phash_transform_is_the_dct():
    from scipy.fft import dctn
    from fsml_lab.data.images import _DCT
    g = np.random.default_rng(0).uniform(0, 255, (32, 32))
    assert np.allclose(4*(_DCT @ g @ _DCT.T), dctn(g)[:8, :8])

def test_phash_is_stable_under_encoding_and_size_and_honest_about_the_rest():
    ims = forms(30)
    base = np.array([phash(np.asarray(im)) for im in ims], np.uint64)
    dist = lambda change: hamming(base, np.array([phash(np.asarray(change(im))) for im in ims], np.uint64))
    for q in (90, 40): assert dist(lambda im: Image.fromarray(decode(save(im, "JPEG", quality=q)))).max() <= 10
    for k in (.5, 3): assert dist(lambda im: im.resize((round(im.width*k), round(im.height*k)))).max() <= 10
    assert np.median(dist(ImageOps.mirror)) > 20 and np.median(dist(lambda im: im.crop((13, 10, im.width - 13, im.height - 10)))) > 6  # these it misses

def test_phash_of_a_plain_surface_has_one_bit():
    assert {phash(np.full((h, w), v, np.uint8)) for h, w, v in ((8, 8, 1), (50, 31, 77), (200, 300, 255), (33, 1, 3))} == {1 << 63}
    assert phash(np.zeros((9, 9), np.uint8)) == 0

def test_hamming():
    assert hamming(0, 2**64 - 1) == 64 and hamming(5, 6) == 2 and isinstance(hamming(5, 6), int)
    assert (hamming(np.array([0, 1, 3], np.uint64), 2**63) == [1, 2, 3]).all() and hamming([0, 1], [1, 1]).tolist() == [1, 0]

# ---------------------------------------------------------------- back to bytes, and drawings

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (1,), (3,)]), st.integers(0, 2**31))
def test_png_round_trip(h, w, c, seed):
    px = np.random.default_rng(seed).integers(0, 256, (h, w, *c), np.uint8)
    back = decode(encode_png(px), "rgb" if c == (3,) else "grey")
    assert (back == px.reshape(h, w, -1)).all() and (admit(encode_png(px)).pixels == (px[..., 0] if c == (1,) else px)).all()

@pytest.mark.parametrize("px", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8)), np.zeros((0, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros(8, np.uint8), "pixels"])
def test_other_arrays_are_refused(px):
    for f in (encode_png, thumbnail, phash, stroke):
        with pytest.raises(FsmlError, match="uint8 of shape"): f(px)

def test_non_contiguous_pixels():
    px = np.asarray(photo())[::-1, ::-1]
    assert (decode(encode_png(px)) == px).all() and phash(px) == phash(px.copy())

def test_thumbnail_keeps_the_shape_and_never_enlarges():
    big = admit(thumbnail(np.asarray(photo(300, 900)), 160))
    assert (big.width, big.height) == (160, 53) and np.abs(big.pixels.mean((0, 1)) - np.asarray(photo(300, 900)).mean((0, 1))).max() < 2
    assert admit(thumbnail(np.asarray(photo(8, 8)))).width == 8
    with pytest.raises(FsmlError, match="0 px"): thumbnail(np.zeros((8, 8), np.uint8), 0)

def test_stroke_is_ink_where_ink_was():
    digits = [decode(p.read_bytes(), "grey") for p in sorted((SAMPLES/"digits").glob("*.png"))[:50]]
    for d in digits:
        s = stroke(d, 64)
        assert s.shape == (64, 64) and s.dtype == np.uint8 and s.min() < 30 and s.max() > 225
        cells = 255 - s.reshape(8, 8, 8, 8).mean((1, 3))
        assert np.corrcoef(cells.ravel(), d.ravel())[0, 1] > .9
    assert stroke(np.zeros((8, 16, 3), np.uint8), 40).shape == (40, 80)
