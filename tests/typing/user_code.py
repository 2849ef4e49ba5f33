# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What users write, for the type checker of ``make lint``: nothing here is run.

What has to be refused is a line with an ``ignore``; one that is not needed is an error.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import Compose, GymEnv, ObservationNorm, TransformedEnv
from typing_extensions import assert_type

from torchrl_vecnorm import Moments, ReturnNorm, VecNorm, VecNormReturn, VecNormV2
from torchrl_vecnorm import functional as F

# ------------------------------------------------------------------------ construction

transform = VecNorm()
assert_type(transform, VecNorm)
assert_type(VecNorm(["observation", ("agents", "reward")], decay=0.99), VecNorm)
assert_type(VecNorm("observation", shapes=[torch.Size([3])], new_api=False), VecNorm)
assert_type(VecNorm(["observation"], new_api=True), VecNormV2)
assert_type(VecNorm(["observation"], reduce_batch_dims=True, new_api=True), VecNormV2)


def either(new_api: bool) -> VecNorm | VecNormV2:
    return VecNorm(["observation"], new_api=new_api)


VecNorm(decay="0.99")  # pyright: ignore[reportArgumentType]
VecNorm(in_keys=[3])  # pyright: ignore[reportArgumentType]
VecNorm(decai=0.99)  # pyright: ignore[reportCallIssue]
VecNorm(["observation"], stateful=False)  # pyright: ignore[reportCallIssue]
VecNorm(["observation"], shapes=[], new_api=True)  # pyright: ignore[reportArgumentType]


class Clipped(VecNorm):
    """A subclass has parameters of its own."""

    def __init__(self, limit: float, in_keys: list[str]) -> None:
        super().__init__(in_keys)
        self.limit = limit


assert_type(Clipped(3.0, ["observation"]), Clipped)
Clipped("3", ["observation"])  # pyright: ignore[reportArgumentType]

# ------------------------------------------------------------------------ the transform

env = TransformedEnv(GymEnv("Pendulum-v1"), transform)
evaluation = GymEnv("Pendulum-v1").append_transform(transform.frozen_copy())
assert_type(transform.forward(TensorDict()), TensorDictBase)
assert_type(transform.loc, TensorDict)
assert_type(transform.scale, TensorDict)
assert_type(transform.nonfinite, TensorDict)
assert_type(transform.freeze().unfreeze(), VecNorm)
assert_type(transform.frozen_copy().eval(), VecNorm)
assert_type(transform.to("cpu"), VecNorm)
assert_type(transform.denorm(TensorDict()), TensorDictBase)
assert_type(transform.to_observation_norm(), Compose | ObservationNorm)
assert_type(transform.consistent_state_dict(), dict[str, Tensor] | None)
transform.set_extra_state(transform.get_extra_state())

shared = VecNorm.build_td_for_shared_vecnorm(env, ["next"], memmap="statistics")
assert_type(VecNorm(shared_td=shared), VecNorm)
VecNorm.build_td_for_shared_vecnorm(env, memmap=3)  # pyright: ignore[reportArgumentType]

# -------------------------------------------------------------------------- the tensors

x = torch.randn(8, 3)
state = F.Moments.zeros([3])
assert_type(state, Moments)
assert_type(state.sum, Tensor)
assert_type(state.nonfinite, Tensor | None)

assert_type(F.update_(x, state, decay=0.99, mask=torch.ones(8) > 0, out=x), Tensor)
assert_type(F.normalize(x, state, eps=1e-3, out=x), Tensor)
assert_type(F.denormalize(x, state), Tensor)
assert_type(F.moments(x, mask=torch.ones(8) > 0), Moments)
assert_type(F.loc_scale(state), tuple[Tensor, Tensor])
F.merge_(state, F.moments(x), decay=0.99)

assert_type(F.update_([x, x], [state, state], mask=[None, x > 0]), list[Tensor])
assert_type(F.update_((x,), (state,), out=(x,)), list[Tensor])
assert_type(F.normalize([x], [state], out=[x]), list[Tensor])
assert_type(F.denormalize([x], [state]), list[Tensor])
assert_type(F.moments([x], mask=[None]), list[Moments])
F.merge_([state], F.moments([x]))

F.update_(x, state, decay="0.99")  # pyright: ignore[reportArgumentType, reportCallIssue]
F.update_(3.0, state)  # pyright: ignore[reportArgumentType, reportCallIssue]
F.update_([x], state)  # pyright: ignore[reportArgumentType, reportCallIssue]
F.merge_([state], F.moments(x))  # pyright: ignore[reportArgumentType, reportCallIssue]

# ------------------------------------------------------------------------------ returns

returns = VecNormReturn(["reward"], gamma=0.9, clear="before", clip=None)
assert_type(returns.frozen_copy(), VecNormReturn)
assert_type(returns.scale, TensorDict)
VecNormReturn(clear="never")  # pyright: ignore[reportArgumentType]
VecNormReturn(gama=0.9)  # pyright: ignore[reportCallIssue]

rewards, ends = torch.ones(3), torch.zeros(3, dtype=torch.bool)
module = ReturnNorm((3,), shape=(), gamma=0.9)
assert_type(module.forward(rewards, ends), Tensor)
assert_type(module.scale, Tensor)
so_far = torch.zeros(3, dtype=torch.float64)
assert_type(F.scale_returns_(rewards, ends, so_far, Moments.zeros(())), Tensor)
F.scale_returns_(rewards, ends, so_far)  # pyright: ignore[reportCallIssue]
