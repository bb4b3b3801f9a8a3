#!/usr/bin/env bash
# The runs behind results/vision_language/README.md: the MTIL table in small, on ten domains at 64 px that clip-small has
# never seen, 101 steps per domain in batches of 64. Needs an installed clbench and CLBENCH_DATA (the data of mtil-small and
# tiny-imagenet-subset).
#   bash results/vision_language/run.sh tune|small [RUNS folder] [SEEDS]
set -euo pipefail
what=$1
out=${2:-results/runs}
seeds=${3:-0-2}
clbench="${PYTHON:-python} -m clbench"
cpu=(--backbone clip-small --eval-every 0 --threads 1 --out "$out")
recipe=(--set iterations=100 --set warmup=10 --set fast_tasks=)

case $what in
  tune) # the rate: plain fine-tuning on the first three domains of another order, scored on validation rows
    for lr in 1e-4 3e-4 1e-3 3e-3; do
      $clbench run --method continualft --scenario mtil-small --scenario-set order=seeded --order-seed 100 \
        --scenario-set val_share=0.2 --scenario-set score=validation --scenario-set first_tasks=3 \
        "${cpu[@]}" "${recipe[@]}" --set lr=$lr
    done
    ;;
  small) # a seed is an order of the domains, too; one rate for all, as in the paper
    for seed in $(seq "${seeds%-*}" "${seeds#*-}"); do
      run=("${cpu[@]}" --scenario mtil-small --scenario-set order=seeded --seeds "$seed")
      $clbench run --method zeroshot "${run[@]}"
      $clbench run --method continualft "${run[@]}" "${recipe[@]}" --set lr=LR
      $clbench run --method zscl "${run[@]}" "${recipe[@]}" --set lr=LR --set average_every=10
      $clbench run --method lwf "${run[@]}" "${recipe[@]}" --set lr=LR
      $clbench run --method wiseft "${run[@]}" "${recipe[@]}" --set lr=LR
    done
    ;;
  *)
    echo "unknown part $what" >&2
    exit 2
    ;;
esac
