#!/usr/bin/env bash
# The runs behind results/online/README.md. Needs an installed clbench and CLBENCH_DATA (cifar100). Runs that are done are
# shown, unfinished ones go on: start the same line again, or several at the same time with other METHODS.
#   bash results/online/run.sh cpu|validate|gpu   [RUNS folder] [METHODS] [SEEDS]
set -euo pipefail
what=$1
out=${2:-results/runs}
clbench="${PYTHON:-python} -m clbench"

case $what in
  cpu) # family A, 100 training images per class: 1,000 steps; 30 test images per class
    for method in ${3:-finetune er erace derpp uer pcr hpcr scr}; do
      $clbench run --method "$method" --scenario online-split-cifar100 --seeds "${4:-0-2}" \
        --scenario-set per_class=100 --scenario-set test_per_class=30 --eval-every 20 --eval-per-group 100 \
        --threads 1 --device cpu --out "$out"
    done
    ;;
  validate) # class orders of their own, scored on validation rows: UER's switches, DER++'s rate
    small=(--scenario online-split-cifar100 --scenario-set per_class=50 --scenario-set val_share=0.2
      --scenario-set score=validation --eval-every 0 --threads 1 --device cpu --out "$out")
    for inputs in raw both; do for scale in 11.111111111111111 1; do for bias in false true; do
      $clbench run --method uer "${small[@]}" --seeds 1000-1002 --set inputs=$inputs --set cosine_scale=$scale --set bias=$bias
    done; done; done
    for lr in 0.1 0.03 0.01; do
      $clbench run --method derpp "${small[@]}" --seeds 1000 --scenario-set first_tasks=4 --set lr=$lr
    done
    ;;
  gpu) # full training and test sets, five seeds side by side; family B (20 tasks, 20/50/100 per class); OnPro in family C
    for method in ${3:-finetune er erace derpp uer pcr hpcr scr}; do
      $clbench run --method "$method" --scenario online-split-cifar100 --seeds "${4:-0-4}" --side-by-side 5 --device cuda --out "$out"
    done
    for capacity in 2000 5000 10000; do for method in er erace; do
      $clbench run --method "$method" --scenario online-split-cifar100-b --seeds "${4:-0-4}" --side-by-side 5 --device cuda \
        --set capacity=$capacity --out "$out"
    done; done
    $clbench run --method onpro --scenario online-split-cifar100-c --seeds 0 --set capacity=1000 --precision bf16 --device cuda --out "$out"
    ;;
  *)
    echo "run.sh cpu|validate|gpu [RUNS folder] [METHODS] [SEEDS]" >&2
    exit 2
    ;;
esac
