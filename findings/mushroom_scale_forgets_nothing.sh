#!/usr/bin/env bash
# mushroom-rl 1.10.2: RunningStandardization with a minimum learning rate, `alpha`.
#
# Guess: alpha bounds the rate of both estimates: as its mean, so its standard deviation
# follows the last 1 / alpha values or so.
#
# Seen: the mean does. The standard deviation is that of all values there ever were, around
# the means that there were at their times: after 1,000 values of scale 100, 4,000 of scale 1
# leave a mean of 0.0 and a deviation of 43.7. With StandardizationPreprocessor's own alpha,
# 1e-32, nothing forgets, and the 0 and the deviation of 1 that it begins with count as one
# value: of 1,000 values at 1,000 with a deviation of 1 the deviation comes out as 31.6.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.3.5 scikit-learn==1.8.0 opencv-python-headless==4.13.0.90 \
	joblib==1.5.3 tqdm==4.67.1 pygame==2.6.1 matplotlib==3.10.8
"${pip[@]}" --no-deps mushroom-rl==1.10.2 # which asks for versions of 2023
cat >"$work/forgets.py" <<'PY'
import numpy as np
from mushroom_rl.utils.running_stats import RunningStandardization


def after(norm, values):
    for value in values:
        norm.update_stats(value)
    return f"mean {norm.mean.item():.1f}, deviation {norm.std.item():.1f}"


if __name__ == "__main__":
    draw = np.random.default_rng(0).normal
    follows = RunningStandardization((1,), alpha=0.01)
    print("at 50, scale 100:", after(follows, draw(50, 100, (1000, 1))))
    print("then at 0, scale 1:", after(follows, draw(0, 1, (4000, 1))))
    keeps = RunningStandardization((1,))
    print("at 1000, scale 1:", after(keeps, draw(1000, 1, (1000, 1))))
PY
"$work/venv/bin/python" -W ignore "$work/forgets.py" >"$work/seen"
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
at 50, scale 100: mean 31.3, deviation 97.4
then at 0, scale 1: mean 0.0, deviation 43.7
at 1000, scale 1: mean 999.0, deviation 31.6
EXPECTED
