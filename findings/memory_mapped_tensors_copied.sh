#!/usr/bin/env bash
# tensordict 0.14.3, torch 2.13.0: what becomes of a tensor of a memory-mapped tensordict
# that is copied or saved in the usual ways.
#
# Guess: `memmap_()` changes where the values lie, not what can be done with them; the
# kind with a folder is the one that may need its files.
#
# Seen: the kind without a folder can be neither saved nor pickled (its mmap object goes
# along); the kind with one is pickled as the name of its file, which torch.load refuses
# by default; copy.deepcopy of such a tensor fails with both kinds, though a deepcopy of
# the tensordict that holds it works. So a state_dict that holds one cannot be kept.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 tensordict==0.14.3 numpy
"$work/venv/bin/python" -W ignore - "$work" >"$work/seen" <<'PY'
import copy
import io
import pickle
import sys

import torch
from tensordict import TensorDict


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


for folder in (None, f"{sys.argv[1]}/map"):
    td = TensorDict({"a": torch.arange(3.0)}).memmap_(folder)
    for name, call, value in (
        ("torch.save, torch.load", saved, td["a"]),
        ("pickle", lambda v: pickle.loads(pickle.dumps(v)), td["a"]),
        ("deepcopy", copy.deepcopy, td["a"]),
        ("deepcopy of the tensordict", copy.deepcopy, td),
    ):
        try:
            what = type(call(value)).__name__
        except Exception as error:
            what = type(error).__name__
        print(f"{'a folder' if folder else 'no folder'}: {name}: {what}")
PY
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
no folder: torch.save, torch.load: TypeError
no folder: pickle: TypeError
no folder: deepcopy: RuntimeError
no folder: deepcopy of the tensordict: TensorDict
a folder: torch.save, torch.load: UnpicklingError
a folder: pickle: MemoryMappedTensor
a folder: deepcopy: RuntimeError
a folder: deepcopy of the tensordict: TensorDict
EXPECTED
