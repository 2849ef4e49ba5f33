#!/usr/bin/env bash
# torchrl 0.14.1: the running mean of VecNormV2 where it forgets slowly.
#
# Guess: decayed averages are divided by the weight they have, 1 - decay**count, so that the
# mean of values that are all 3 is 3 from the first call on, whatever the decay, to the last
# digits of the values' dtype.
#
# Seen: the weight is float32, also for float64 values, and 1 - exp(count * log(decay)) of it
# keeps few digits of a small weight: after one call the mean is 1 % off at a decay of
# 0.999999 and 16 % at 0.9999999; at 0.99999999 the weight is 0, the mean infinite, and what
# the call returns NaN. It gets better as calls add up: at 0.9999999 ten calls leave 1 %.
# Nothing is raised or warned about.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 torchrl==0.14.1 numpy
cat >"$work/weights.py" <<'PY'
import torch
from tensordict import TensorDict
from torchrl.envs import VecNormV2

for decay in (0.99, 0.999999, 0.9999999, 0.99999999):
    t = VecNormV2(["observation"], decay=decay)
    seen = []
    for call in range(1, 101):
        value = torch.tensor([3.0], dtype=torch.float64)
        td = t._step(TensorDict(), TensorDict(observation=value))
        if call in (1, 10, 100):
            returned = "NaN" if td["observation"].isnan().item() else "a number"
            seen.append(f"{t.loc['observation'].item():.3g} and {returned},")
    print(f"{decay:.8g}:", *seen)
PY
RL_LOGGING_LEVEL=ERROR timeout 300 "$work/venv/bin/python" -W ignore "$work/weights.py" \
	>"$work/seen" 2>"$work/errors" || { cat "$work/errors"; exit 1; }
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
0.99: 3 and a number, 3 and a number, 3 and a number,
0.999999: 2.96 and a number, 3 and a number, 3 and a number,
0.9999999: 2.52 and a number, 2.96 and a number, 3 and a number,
0.99999999: -inf and NaN, 2.52 and a number, 2.96 and a number,
EXPECTED
