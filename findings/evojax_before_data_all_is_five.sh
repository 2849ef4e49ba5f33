#!/usr/bin/env bash
# evojax 0.2.17: what its ObsNormalizer makes of observations before it has seen any, and what
# its `std_min_value` bounds.
#
# Guess: without data values are left as they are, as with a mean of 0 and a deviation of 1;
# `std_min_value=1e-6` (said to be the minimum standard deviation) is the least deviation that is
# divided by, as in the normaliser of brax, whose names these are.
#
# Seen: the first parameters are zeros, and the bound is one of the variance: all is divided by a
# deviation of 1e-3 until statistics are there, and clipped. A simulation updates them when its
# episodes have ended, so that in the first generation every policy acts on observations of 5,
# -5 and 0. Later a feature with a deviation of 5e-4 comes out with one of 0.5, where the name
# has 1.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	evojax==0.2.17 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy
cat >"$work/first.py" <<'PY'
import jax.numpy as jnp
import numpy as np
from evojax import ObsNormalizer

norm = ObsNormalizer((3,))
first = norm.get_init_params()
print("before data:", norm.normalize_obs(jnp.array([0.02, -0.3, 0.0]), first).tolist())
values = np.random.default_rng(0).normal(1, 5e-4, (1000, 8, 3))
values = jnp.asarray(values, dtype=jnp.float32)
seen = norm.update_normalization_params(values, jnp.ones((1000, 8)), first)
std = norm.normalize_obs(values, seen).std(axis=(0, 1))
print("deviation 5e-4 comes out as", *(f"{s:.1f}" for s in std.tolist()))
PY
JAX_PLATFORMS=cpu timeout 300 "$work/venv/bin/python" -W ignore "$work/first.py" \
	>"$work/seen" 2>"$work/errors" || { cat "$work/errors"; exit 1; }
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
before data: [5.0, -5.0, 0.0]
deviation 5e-4 comes out as 0.5 0.5 0.5
EXPECTED
