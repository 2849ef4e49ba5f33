#!/usr/bin/env bash
# torchrl 0.14.1: what a ParallelEnv gives after its load_state_dict().
#
# Guess: what it gave before: resets and steps return what the workers have just made.
#
# Seen: from then on each reset and step returns at once, with what the one before it had
# made, for good: an episode begins at the last observation of the one before. Policies act
# on an observation that is a step old, and the statistics of a running normaliser around
# the environments see pairs that never were. Nothing is raised or warned about. Workers
# that were loaded say that they are done in two ways; the parent waits for one of them and
# finds the other when it next waits. (Mended in torchrl after this version, by
# pytorch/rl#4341. With use_buffers=False it does not happen.)
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 torchrl==0.14.1 numpy
cat >"$work/behind.py" <<'PY'
import time

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, ParallelEnv


class Counting(EnvBase):
    """Observes how many steps its episode has; a reset and a step take a while."""

    def __init__(self):
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded((1,)))
        self.action_spec = Bounded(-1, 1, (1,))
        self.reward_spec = Unbounded((1,))
        self.steps = 0

    def _now(self):
        time.sleep(0.1)
        done = torch.zeros(1, dtype=torch.bool)
        return TensorDict(observation=torch.tensor([float(self.steps)]), done=done)

    def _reset(self, td):
        self.steps = 0
        return self._now()

    def _step(self, td):
        self.steps += 1
        return self._now().set("reward", torch.zeros(1))

    def _set_seed(self, seed):
        pass


def seen(env):
    td = env.rollout(3)[0]
    return [*td["observation"].flatten().tolist(), td["next", "observation"][-1].item()]


if __name__ == "__main__":
    for buffers in (True, False):
        env = ParallelEnv(2, Counting, mp_start_method="spawn", use_buffers=buffers)
        env.rollout(3)
        print("buffers" if buffers else "no buffers")
        print(" before", seen(env))
        env.load_state_dict(env.state_dict())
        print(" after", seen(env))
        print(" and then", seen(env))
        env.close()
PY
RL_LOGGING_LEVEL=ERROR timeout 300 "$work/venv/bin/python" -W ignore "$work/behind.py" \
	>"$work/seen" 2>"$work/errors" || { cat "$work/errors"; exit 1; }
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
buffers
 before [0.0, 1.0, 2.0, 3.0]
 after [3.0, 3.0, 1.0, 2.0]
 and then [3.0, 3.0, 1.0, 2.0]
no buffers
 before [0.0, 1.0, 2.0, 3.0]
 after [0.0, 1.0, 2.0, 3.0]
 and then [0.0, 1.0, 2.0, 3.0]
EXPECTED
