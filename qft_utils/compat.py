"""Imported first: makes a CPU-only torch work beside a torchvision that was built for CUDA.

Where torchvision is only to be had as a CUDA build (some package mirrors), its compiled operators cannot be
loaded beside a CPU torch, and `import torchvision` stops with "operator torchvision::nms does not exist"; so do
`from transformers import Trainer` and `import peft`, which import it. The two operators that torchvision looks up
while it is being imported are declared here, without an implementation. Where the builds match, nothing is done.
"""

import importlib.util
import logging
import os
from pathlib import Path

import torch

_SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip
_keep_alive: list[torch.library.Library] = []  # a Library that is garbage-collected takes its operators with it


def torchvision_ops_load() -> bool:
    """True where torchvision is absent or its compiled operators load beside this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    for library in sorted(Path(spec.origin).parent.glob("_C*.*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:  # a CUDA library that is not there, or a symbol of another torch
            return False
    return True


def declare_missing_torchvision_ops() -> bool:
    """Declares torchvision's `nms` and `qnms` where they cannot be loaded; returns whether that was needed."""
    if _keep_alive or torchvision_ops_load():
        return bool(_keep_alive)
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _keep_alive.append(library)
    return True


def hush(logger: str, notice: str) -> None:
    """Drops the log records of `logger` that hold `notice`, and no others."""
    logging.getLogger(logger).addFilter(lambda record: notice not in record.getMessage())


declare_missing_torchvision_ops()
# What one library says to another at import time, and no reader can act on.
hush("torchao", "Skipping import of cpp extensions")
hush("torch.utils._pytree", "Calling register_constant() on Enum subclasses")
if not torch.cuda.is_available():
    # torchao warns at every import that its compiled files, which a CPU does not need here, were not loaded.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
