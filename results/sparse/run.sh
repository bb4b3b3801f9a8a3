#!/usr/bin/env bash
# The runs behind results/sparse/README.md. Needs an installed clbench and CLBENCH_DATA; `clr` also WEIGHTS
# (mobilenetv2_100.safetensors, ImageNet-1k); `gpu-*` the full data sets and a CUDA device.
#   bash results/sparse/run.sh sharp|masks-mnist|masks-cifar100|clr|gpu-sharp|gpu-masks|gpu-clr   [RUNS folder]
set -euo pipefail
what=$1
out=${2:-results/runs}
clbench="${PYTHON:-python} -m clbench"
cpu=(--threads 1 --out "$out")
mnist=(--scenario split-mnist --scenario-set dataset=mnist-subset --scenario-set per_class=1000)
# short CPU recipe, not the paper's: 5 tasks, 50 images per class, 3 epochs of each phase, batches of 16
cifar=(--scenario split-cifar100 --scenario-set tasks=5 --scenario-set per_class=50 --scenario-set setting=task
  --scenario-set order=natural --eval-every 0 --batch-size 16)
domains=(--scenario mtil-small --scenario-set per_class=20 --scenario-set test_per_class=20
  --scenario-set dataset=clothing,dtd,flowers5,grocery-store,gtsrb,mnist-subset,rsscn7,sign-digits
  --backbone mobilenetv2_100 --weights "${WEIGHTS:-}" --backbone-set pad_type=same --backbone-set bn_eps=1e-3
  --eval-every 0)

case $what in
  sharp) # the published configuration, on 1,000 images per digit
    $clbench run --method sharp "${mnist[@]}" --scenario-set val_share=0.01 --eval-every 10 --seeds 0-2 "${cpu[@]}"
    ;;
  masks-mnist) # 784-300-100, density 0.1, 5 + 5 epochs
    for method in supsup ssnet exssnet; do
      $clbench run --method $method "${mnist[@]}" --scenario-set setting=task --seeds 0-2 "${cpu[@]}"
    done
    ;;
  masks-cifar100) # the same rate for all masks, 0.001, and as many epochs in all; SupSup at its own rate too
    $clbench run --method supsup "${cifar[@]}" --epochs 6 --set mask_lr=0.001 "${cpu[@]}"
    $clbench run --method supsup "${cifar[@]}" --epochs 6 "${cpu[@]}"
    $clbench run --method ssnet "${cifar[@]}" --epochs 3 "${cpu[@]}"
    $clbench run --method exssnet "${cifar[@]}" --epochs 3 "${cpu[@]}"
    ;;
  clr)
    $clbench run --method clr "${domains[@]}" --seeds 1-2 "${cpu[@]}"
    $clbench run --method clr "${domains[@]}" --seeds 1-2 --set variant=linear --epochs 60 "${cpu[@]}"
    ;;
  gpu-sharp)
    $clbench run --method sharp --scenario split-cifar10 --scenario-set val_share=0.01 --seeds 0-4 --device cuda --out "$out"
    $clbench run --method sharp --scenario split-cifar100 --scenario-set order=natural --scenario-set val_share=0.01 \
      --seeds 0-4 --device cuda --out "$out"
    ;;
  gpu-masks) # 20 tasks, 50 + 50 epochs
    for method in supsup ssnet exssnet; do
      $clbench run --method $method --scenario split-cifar100-20 --scenario-set setting=task \
        --scenario-set order=natural --seeds 0-4 --device cuda --out "$out"
    done
    ;;
  gpu-clr) # 224 px, the paper's backbone and schedule
    $clbench run --method clr --scenario mtil-small --scenario-set size=224 --scenario-set val_share=0.1 \
      --backbone resnet50.tv_in1k --epochs 60 --set batch_norm=train --train-view "normalize(imagenet)" \
      --test-view "normalize(imagenet)" --device cuda --out "$out"
    ;;
  *)
    echo "unknown part $what" >&2
    exit 2
    ;;
esac
