"""Everything public in one place, loaded when first asked for (PEP 562): `from fsml_lab.all import Lab, fit`."""
from __future__ import annotations
import importlib

ROOMS = ("core", "lease", "problem", "data.images", "data.journal", "data.version", "data.load", "metrics", "annotate.queue", "annotate.label", "train", "papers.resnet",
         "evaluate.report", "evaluate.compare", "evaluate.cases", "export.onnx", "export.quantize", "export.tensorrt")


def _public(room: str) -> list[str]:
    "The `__all__` of a room, read without importing it."
    import ast
    from pathlib import Path
    tree = ast.parse((Path(__file__).parent/(room.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    return next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])


_WHERE: dict[str, str] = {"Lab": "data.version", "Dataset": "data.version"}  # where the two are complete, with open(), commit() and diff()


def _where() -> dict[str, str]:
    if len(_WHERE) == 2:
        for room in ROOMS:
            for name in _public(room): _WHERE.setdefault(name, room)
    return _WHERE


def __getattr__(name: str):
    if name == "__all__": return sorted(_where())
    if (room := _where().get(name)) is None: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fsml_lab.{room}"), name)


def __dir__() -> list[str]: return sorted(_where())
