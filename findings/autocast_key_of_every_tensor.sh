#!/usr/bin/env bash
# torch 2.13.0: which dispatch keys a tensor carries itself, where autocast was never used.
#
# Guess: a plain CPU tensor has CPU and what autograd needs; autocast is a matter of the
# thread, and shows in a key where it is switched on, on floating-point tensors at most.
#
# Seen: every CPU tensor carries AutocastCPU, integers and inference tensors too, whether
# autocast was ever on or not; one on the meta device has no such key. So code in C++ that
# takes a short way for "the CPU key and nothing but autograd's" never takes it.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 numpy
"$work/venv/bin/python" -W ignore - >"$work/seen" <<'PY'
import torch

keys = torch._C._dispatch_keys
print("float32:", keys(torch.ones(2)))
print("int32:", keys(torch.ones(2, dtype=torch.int32)))
with torch.inference_mode():
    print("inference:", keys(torch.ones(2)))
with torch.autocast("cpu"):
    print("under autocast:", keys(torch.ones(2)))
print("meta:", keys(torch.ones(2, device="meta")))
PY
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
float32: DispatchKeySet(CPU, ADInplaceOrView, AutogradCPU, AutocastCPU)
int32: DispatchKeySet(CPU, ADInplaceOrView, AutogradCPU, AutocastCPU)
inference: DispatchKeySet(CPU, AutocastCPU)
under autocast: DispatchKeySet(CPU, ADInplaceOrView, AutogradCPU, AutocastCPU)
meta: DispatchKeySet(Meta, ADInplaceOrView, AutogradMeta)
EXPECTED
