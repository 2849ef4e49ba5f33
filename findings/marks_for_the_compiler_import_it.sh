#!/usr/bin/env bash
# torch 2.13.0: what the decorators of torch.compiler import, in programs that compile nothing.
#
# Guess: they set a mark on a function, which the compiler looks at when it comes by: a
# library may put them on its functions for nothing.
#
# Seen: assume_constant_result, disable, allow_in_graph and torch.compile itself import
# Dynamo, Inductor and sympy when they decorate, 800 to 1,400 modules beside those of torch:
# a library pays for that at each import which has one of them at the top of a file.
# torch.compiler.is_compiling and torch.library.register_fake import nothing.
#
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 numpy
cat >"$work/mark.py" <<'PY'
import sys

import torch


def function(x):
    return x


torch.library.define("demo::function", "(Tensor x) -> Tensor")
before = len(sys.modules)
{
    "nothing": lambda: None,
    "is_compiling": torch.compiler.is_compiling,
    "register_fake": lambda: torch.library.register_fake("demo::function", function),
    "assume_constant_result": lambda: torch.compiler.assume_constant_result(function),
    "disable": lambda: torch.compiler.disable(function),
    "allow_in_graph": lambda: torch.compiler.allow_in_graph(function),
    "compile": lambda: torch.compile(function),
}[sys.argv[1]]()
more = len(sys.modules) - before
print(f"{more} modules more", file=sys.stderr)
which = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
print(f"{sys.argv[1]}:", *which, "and hundreds more" if more > 500 else "")
PY
for mark in nothing is_compiling register_fake assume_constant_result disable allow_in_graph \
	compile; do
	"$work/venv/bin/python" -W ignore "$work/mark.py" "$mark" | sed 's/ *$//'
done >"$work/seen"
cat "$work/seen"
diff "$work/seen" - <<'EXPECTED'
nothing:
is_compiling:
register_fake:
assume_constant_result: torch._dynamo torch._inductor sympy and hundreds more
disable: torch._dynamo torch._inductor sympy and hundreds more
allow_in_graph: torch._dynamo torch._inductor sympy and hundreds more
compile: torch._dynamo torch._inductor sympy and hundreds more
EXPECTED
