#!/usr/bin/env bash
# torchrl 0.14.1: the mode of the networks in a loss that is put in eval mode.
#
# Guess: a loss is a module of torch, made of networks; loss.eval() puts them in eval mode, as
# eval() of any module does with what is in it. (The documentation of the PPO losses says to
# keep the model in eval mode.)
#
# Seen: of its networks a loss registers the parameters alone, so that eval() and train() reach
# the loss and none of them. A BatchNorm goes on to normalise with the batch and to learn from
# it, a Dropout drops. The loss calls the very module that it was made of, whose own eval()
# counts, before the loss is made or after; loss.train() does not undo that either. Nothing is
# warned about.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 torchrl==0.14.1 numpy
cat >"$work/modes.py" <<'PY'
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss

end = torch.zeros(16, 1, dtype=torch.bool)
following = {"observation": torch.ones(16, 3), "reward": torch.ones(16, 1)}
following |= {"done": end, "terminated": end}
root = {"observation": torch.ones(16, 3), "action": torch.zeros(16, dtype=torch.long)}
batch = TensorDict({**root, "next": following}, [16])

for delay_value in (False, True):
    network = nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2))
    actor = QValueActor(network, in_keys=["observation"], action_space="categorical")
    loss = DQNLoss(actor, action_space="categorical", delay_value=delay_value)
    for name, module in [("loss", loss), ("network", network)]:
        module.eval()
        before = loss.value_network_params["module", "0", "module", "0", "running_mean"].clone()
        loss(batch)
        after = loss.value_network_params["module", "0", "module", "0", "running_mean"]
        learnt = "has learnt" if (after != before).any() else "is as it was"
        print(f"{name}.eval(): the network trains: {network.training}, its mean {learnt}")
    loss.train()
    print(f"loss.train(): the network trains: {network.training}")
PY
RL_LOGGING_LEVEL=ERROR timeout 300 "$work/venv/bin/python" -W ignore "$work/modes.py" \
	>"$work/seen" 2>"$work/errors" || { cat "$work/errors"; exit 1; }
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
loss.eval(): the network trains: True, its mean has learnt
network.eval(): the network trains: False, its mean is as it was
loss.train(): the network trains: False
loss.eval(): the network trains: True, its mean has learnt
network.eval(): the network trains: False, its mean is as it was
loss.train(): the network trains: False
EXPECTED
