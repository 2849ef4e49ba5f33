#!/usr/bin/env bash
# torchrl 0.14.1: a policy that learns statistics, in the workers of a MultiSyncCollector.
#
# Guess: each worker has a copy of the policy, as it was when it was last sent: what the copy
# learns by itself, in train mode, stays there until the next update_policy_weights_() puts
# the trainer's in its place.
#
# Seen: on a CPU parameters and buffers are moved to memory that all processes share. All
# workers take in what they see at once, in one running mean, without a lock; the trainer's
# module has it without update_policy_weights_() ever being called. (Where two of them meet, one of
# two updates can be lost; that is left to chance, and not looked for here.) And each has
# called the policy once before its first step, so that its first observations count twice.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 torchrl==0.14.1 numpy
cat >"$work/workers.py" <<'PY'
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import MultiSyncCollector
from torchrl.envs import PendulumEnv, SerialEnv


def make_env():
    return SerialEnv(2, PendulumEnv)


if __name__ == "__main__":
    norm = nn.BatchNorm1d(2)
    policy = TensorDictModule(
        nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2), norm, nn.Linear(2, 1)),
        in_keys=["th"],
        out_keys=["action"],
    )
    collector = MultiSyncCollector([make_env] * 2, policy, frames_per_batch=40, total_frames=40)
    print("shared:", norm.running_mean.is_shared(), "batches before the first step:", norm.num_batches_tracked.item())
    for _ in collector:
        print("batches of the trainer's module: more than one worker's", norm.num_batches_tracked.item() > 12)
    collector.shutdown()
PY
cd "$work"
RL_LOGGING_LEVEL=ERROR timeout 300 "$work/venv/bin/python" -W ignore "$work/workers.py" \
	>"$work/seen" 2>"$work/errors" || { cat "$work/errors"; exit 1; }
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
shared: True batches before the first step: 2
batches of the trainer's module: more than one worker's True
EXPECTED
