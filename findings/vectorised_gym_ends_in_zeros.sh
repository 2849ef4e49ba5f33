#!/usr/bin/env bash
# torchrl 0.14.1, gymnasium 1.4.0: what an episode's end looks like in an environment of
# gymnasium's that torchrl vectorises, `GymEnv(..., num_envs=)`.
#
# Guess: as in any environment of torchrl: ("next", "observation") is the last one of the
# episode, and the next step begins at the one that a reset gave.
#
# Seen: ("next", "observation") is zeros; the next step begins at the last observation of
# the episode that has ended, whatever its action, has reward 0, is not done, and leads to
# the first one of the next episode. So a running normaliser sees a vector of zeros for each
# episode and rewards of 0 that nobody gave, and a replay buffer holds a step that never
# was. One environment without num_envs, or several in a ParallelEnv, have none of it.
# Gymnasium resets in the step after the end (AutoresetMode.NEXT_STEP); torchrl looks for
# the last observation in the info dictionary, where earlier versions had it.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 torchrl==0.14.1 gymnasium==1.4.0 numpy
cat >"$work/ends.py" <<'PY'
import torch
from torchrl.envs import GymEnv


def ends(td):
    end = td["next", "done"].flatten().int().tolist().index(1)
    now, after = td[end], td[end + 1]
    last = now["next", "observation"]
    return {
        "the last observation is zeros": bool((last == 0).all()),
        "the next step begins at a reset": bool(after["observation"].abs().max() <= 0.05),
        "it leads to a reset": bool(after["next", "observation"].abs().max() <= 0.05),
        "its reward": after["next", "reward"].item(),
    }


if __name__ == "__main__":
    for name, more in (("one", {}), ("num_envs=2", {"num_envs": 2})):
        env = GymEnv("CartPole-v1", **more)
        env.set_seed(0)
        torch.manual_seed(0)
        td = env.rollout(80, break_when_any_done=False)
        env.close()
        print(name, ends(td[0] if more else td))
PY
RL_LOGGING_LEVEL=ERROR "$work/venv/bin/python" -W ignore "$work/ends.py" \
	>"$work/seen" 2>"$work/errors" || { cat "$work/errors"; exit 1; }
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
one {'the last observation is zeros': False, 'the next step begins at a reset': True, 'it leads to a reset': False, 'its reward': 1.0}
num_envs=2 {'the last observation is zeros': True, 'the next step begins at a reset': False, 'it leads to a reset': True, 'its reward': 0.0}
EXPECTED
