# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""mjlab's own training of a task, by rsl_rl, on the CPU; for test_mjlab.py.

``python mjlab_train.py ours|theirs FOLDER WORLDS ITERATIONS`` prints, as JSON, which class
normalises, what it has seen, and the reward of each step that was taken.
"""

import contextlib
import json
import sys
from pathlib import Path

import mjlab.tasks  # noqa: F401 (registers them)
import rsl_rl.modules
from mjlab.scripts.train import TrainConfig, run_train
from rsl_rl.runners import OnPolicyRunner

from torchrl_vecnorm.interop import rsl_rl as ours

TASK = "Mjlab-Cartpole-Balance"


def main(which: str, folder: str, worlds: str, iterations: str) -> dict:
    if which == "ours":
        ours.install()
    config = TrainConfig.from_task(TASK)
    config.env.scene.num_envs = int(worlds)
    config.agent.max_iterations = int(iterations)
    config.agent.logger = "tensorboard"
    for model in (config.agent.actor, config.agent.critic):
        model.obs_normalization = True
    rewards, found = [], {}
    learn = OnPolicyRunner.learn

    def watched(self, *args, **kwargs):
        step = self.env.step

        def seen(actions):
            result = step(actions)
            rewards.append(result[1].double().mean().item())
            return result

        self.env.step = seen
        learn(self, *args, **kwargs)
        for name in ("actor", "critic"):
            for module in getattr(self.alg, name).modules():
                if isinstance(module, rsl_rl.modules.EmpiricalNormalization):
                    found[name] = {
                        "class": type(module).__module__,
                        "count": module.count.item(),
                        "mean": module.mean.flatten().tolist(),
                        "std": module.std.flatten().tolist(),
                    }

    OnPolicyRunner.learn = watched
    with contextlib.redirect_stdout(sys.stderr):
        run_train(TASK, config, Path(folder))
    return {"normalisers": found, "rewards": rewards}


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    print(json.dumps(found))
