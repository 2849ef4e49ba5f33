#!/usr/bin/env bash
# torchrl 0.14.1: buffers of a network in the target network that a loss keeps of it.
#
# Guess: SoftUpdate and HardUpdate take the target after its network, parameters and buffers
# by the same rule, as a loss keeps both in one `target_..._params`.
#
# Seen: what requires a gradient is followed, nothing else. Buffers are copied once, when the
# updater is made, and stay: after a HardUpdate the weight of the target is the network's, its
# running mean is not. In eval mode, where nothing learns by itself, a target with a running
# normaliser in it (BatchNorm here) goes on as nothing had been seen. Nothing is warned about.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 torchrl==0.14.1 numpy
cat >"$work/targets.py" <<'PY'
import torch
from torch import nn
from torchrl.modules import Actor, ValueOperator
from torchrl.objectives import DDPGLoss, HardUpdate, SoftUpdate


class Value(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, observation, action):
        return self.layer(torch.cat([observation, action], -1))


for updater, options in [
    (SoftUpdate, {"eps": 0.5}),
    (HardUpdate, {"value_network_update_interval": 1}),
]:
    policy = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    loss = DDPGLoss(
        Actor(policy, in_keys=["observation"]),
        ValueOperator(Value(), in_keys=["observation", "action"]),
        delay_actor=True,
    ).eval()
    follow = updater(loss, **options)
    with torch.no_grad():
        policy[0].running_mean.fill_(8)
        policy[1].weight += 8
    before = loss.target_actor_network_params["module", "1", "weight"].clone()
    for _ in range(20):
        follow.step()
    target = loss.target_actor_network_params["module"]
    moved = (target["1", "weight"] - before).mean().item()
    print(updater.__name__, f"weight by {moved:.1f},", "mean", *target["0", "running_mean"].tolist())
PY
RL_LOGGING_LEVEL=ERROR timeout 300 "$work/venv/bin/python" -W ignore "$work/targets.py" \
	>"$work/seen" 2>"$work/errors" || { cat "$work/errors"; exit 1; }
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
SoftUpdate weight by 8.0, mean 0.0 0.0
HardUpdate weight by 8.0, mean 0.0 0.0
EXPECTED
