#!/usr/bin/env bash
# The runs behind results/foundation/README.md. Needs an installed clbench; for CIFAR-100 also CLBENCH_DATA (a folder with
# cifar100 in Parquet form or torchvision's files) and WEIGHTS (mobilenetv2_100.safetensors, ImageNet-1k).
#   bash results/foundation/run.sh digits|cifar100|slow-learner   [RUNS folder]
set -euo pipefail
what=$1
out=${2:-results/runs}
clbench="${PYTHON:-python} -m clbench"
cifar=(--scenario split-cifar100 --order-seed 1993 --threads 1 --out "$out"
  --backbone mobilenetv2_100 --backbone-set pad_type=same --backbone-set bn_eps=1e-3 --weights "${WEIGHTS:-}"
  --train-view "resize(128,bicubic) normalize(0.5,0.5)" --test-view "resize(128,bicubic) normalize(0.5,0.5)")

case $what in
  digits)
    for method in nmc er finetune joint; do
      $clbench run --method $method --scenario split-digits --seeds 0-2 --threads 1 --out "$out"
    done
    ;;
  cifar100) # frozen backbone, batch norm in eval mode, features extracted once
    cifar+=(--scenario-set per_class=100)
    $clbench run --method nmc "${cifar[@]}"
    $clbench run --method slca "${cifar[@]}" --set backbone_scale=0 --set align=false
    $clbench run --method slca "${cifar[@]}" --set backbone_scale=0
    ;;
  slow-learner) # short CPU recipe, not the paper's schedule: 50 images per class, 1 epoch per task, no augmentation
    $clbench run --method slca "${cifar[@]}" --scenario-set per_class=50 --epochs 1 --set milestone=0 --batch-size 32 \
      --eval-every 100 --eval-per-group 50
    ;;
esac
