#!/bin/bash
# Measure prudent on a GPU machine that is lent for 15 minutes and has no network, in two calls.
#
#   bench/gpu.sh carry              before, with a network: packages that the machine may lack, into build/gpu/site
#   bench/gpu.sh goals OUT [MIN]    the first call: the goals' cases, the forward with norm first (5 minutes)
#   bench/gpu.sh rest OUT [MIN]     the second call: determinism, graphs, tests, the PPO loop, all other cases (6 minutes)
#   bench/gpu.sh dry OUT            both calls on a CPU: interpreted, tiny sizes, no GPU numbers
#   bench/gpu.sh readme             after: fill the README's tables of GPU goals from the reports in bench/results
#
# The machine needs torch >= 2.10, triton and transformers; the first call needs nothing else. Copy the checkout with
# build/gpu/site to it, and run the two calls one right after the other: they build nothing. Give each its own OUT, whose
# files are rewritten after every case, so a call that is ended early keeps what it had. Then keep the first
# gpu_check.json as bench/results/gpu_goals.json, the second as gpu_rest.json and ppo_gpu.json as gpu_ppo.json, and run
# `readme`. PYTHON names the interpreter (python3), GPU_PYTHON the version of the machine's Python for `carry` (3.12).
#
# The carried packages take 24 MB: pydantic for the PPO loop, TRL 1.12 with what it imports, and the peers of
# linear_logprob, without the rest of their requirements. QuACK is not among them, because its compiler is a wheel of
# 92 MB; with room for it, add quack-kernels, nvidia-cutlass-dsl, nvidia-cutlass-dsl-libs-base and -libs-cu13,
# apache-tvm-ffi and torch-c-dlpack-ext to CARRIED.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SITE=$PWD/build/gpu/site
CARRIED=${CARRIED:-"trl==1.12.0 datasets dill multiprocess liger-kernel cut-cross-entropy verl"}

check() { "$PYTHON" bench/gpu_check.py "$@"; }

case "${1:-}" in
carry)
    options=(--quiet --no-compile --only-binary=:all: --implementation cp --python-version "${GPU_PYTHON:-3.12}")
    for glibc in manylinux_2_28 manylinux_2_17 manylinux2014; do options+=(--platform "${glibc}_x86_64"); done
    rm -rf "$SITE"
    "$PYTHON" -m pip install "${options[@]}" --target "$SITE" pydantic  # which asks for one version of pydantic-core
    # shellcheck disable=SC2086  # one word a package
    "$PYTHON" -m pip install "${options[@]}" --no-deps --target "$SITE" $CARRIED
    rm -rf "$SITE"/verl/{trainer,workers,experimental,models} "$SITE"/{tests,scripts,bin}  # unused
    git rev-parse HEAD >"$SITE/COMMIT"  # the copy may be without its history
    du -sh "$SITE"
    ;;
goals | rest)
    out=${2:?"usage: bench/gpu.sh $1 OUT [MINUTES]"}
    export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
    [ ! -f "$SITE/COMMIT" ] || export PRUDENT_COMMIT=${PRUDENT_COMMIT:-$(<"$SITE/COMMIT")}
    if [ "$1" = goals ]; then
        check --goals-only --out "$out" --minutes "${3:-5}"
    else
        check --stages determinism graphs tests ppo timing --out "$out" --minutes "${3:-6}"
    fi
    ;;
dry)
    out=${2:?"usage: bench/gpu.sh dry OUT"}
    failed=0
    check --dry --goals-only --out "$out/goals" || failed=1
    check --dry --stages determinism graphs tests ppo timing --out "$out/rest" || failed=1
    exit $failed
    ;;
readme)
    check --readme
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
