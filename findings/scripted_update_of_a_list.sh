#!/usr/bin/env bash
# torch 2.13.0: torch.jit.script and an operator whose schema says that it writes to the
# tensors of a list, `Tensor(a!)[]`.
#
# Guess: as with an operator that writes to a tensor, `Tensor(a!)`: scripted code does what
# eager code does, or says that it cannot.
#
# Seen: where the list is written in the call, `add_one_to_all([x])`, the call is taken for
# one without an effect and is left out, without a word: x stays what it was. Where a list
# is handed over from outside, and in torch.compile, it is there.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 numpy
cat >"$work/lists.py" <<'PY'
import torch


def add_one(x):
    x.add_(1)


def add_one_to_all(xs):
    for x in xs:
        x.add_(1)


library = torch.library.Library("demo", "DEF")
library.define("add_one(Tensor(a!) x) -> ()")
library.define("add_one_to_all(Tensor(a!)[] xs) -> ()")
library.impl("add_one", add_one, "CPU")
library.impl("add_one_to_all", add_one_to_all, "CPU")


def of_a_tensor(x: torch.Tensor) -> torch.Tensor:
    torch.ops.demo.add_one(x)
    return x


def of_a_new_list(x: torch.Tensor) -> torch.Tensor:
    torch.ops.demo.add_one_to_all([x])
    return x


def of_a_given_list(xs: list[torch.Tensor]) -> torch.Tensor:
    torch.ops.demo.add_one_to_all(xs)
    return xs[0]


for function, argument in (
    (of_a_tensor, lambda: torch.zeros(())),
    (of_a_new_list, lambda: torch.zeros(())),
    (of_a_given_list, lambda: [torch.zeros(())]),
):
    scripted = torch.jit.script(function)
    print(
        f"{function.__name__}: eager {function(argument()).item():.0f},",
        f"scripted {scripted(argument()).item():.0f},",
        f"calls in its graph {str(scripted.graph).count('demo::')}",
    )
compiled = torch.compile(of_a_new_list, backend="eager", fullgraph=True)
print(f"of_a_new_list, compiled: {compiled(torch.zeros(())).item():.0f}")
PY
"$work/venv/bin/python" -W ignore "$work/lists.py" >"$work/seen"
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
of_a_tensor: eager 1, scripted 1, calls in its graph 1
of_a_new_list: eager 1, scripted 0, calls in its graph 0
of_a_given_list: eager 1, scripted 1, calls in its graph 1
of_a_new_list, compiled: 1
EXPECTED
