#!/usr/bin/env bash
# The runs behind results/vision_language/README.md: the MTIL table in small, on ten domains at 64 px that clip-small has
# never seen, 101 steps per domain in batches of 64. Needs an installed clbench and CLBENCH_DATA (the data of mtil-small and
# tiny-imagenet-subset). Runs that are done are shown, unfinished ones go on: start the same line again.
#   bash results/vision_language/run.sh tune|small [RUNS folder] [SEEDS]
set -euo pipefail
what=$1
out=${2:-results/runs}
clbench="${PYTHON:-python} -m clbench"
small=(--scenario mtil-small --eval-every 0 --threads 1 --device cpu --out "$out")

case $what in
  tune) # the rate: plain fine-tuning on the first three domains of another order, scored on validation rows
    for lr in 1e-4 3e-4 1e-3 3e-3; do
      $clbench run --method continualft "${small[@]}" --scenario-set order=seeded --order-seed 100 --scenario-set val_share=0.2 \
        --scenario-set score=validation --scenario-set first_tasks=3 --set lr=$lr
    done
    ;;
  small) # a seed is an order of the domains, too; one rate for all, as in the paper
    seeds=${3:-0-2}
    for seed in $(seq "${seeds%-*}" "${seeds#*-}"); do
      for method in zeroshot continualft zscl lwf wiseft; do
        $clbench run --method $method "${small[@]}" --scenario-set order=seeded --seeds "$seed"
      done
    done
    ;;
  *)
    echo "run.sh tune|small [RUNS folder] [SEEDS]" >&2
    exit 2
    ;;
esac
