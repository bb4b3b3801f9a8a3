#!/usr/bin/env bash
# The runs behind results/scenarios/README.md: ER and NMC on every scenario family, on real images, small enough for two
# CPU cores. Needs an installed clbench, CLBENCH_DATA, and WEIGHTS (mobilenetv2_100.safetensors, ImageNet-1k).
#   bash results/scenarios/run.sh FAMILY|all [RUNS folder]
set -euo pipefail
what=$1
out=${2:-results/runs}
clbench="${PYTHON:-python} -m clbench"
common=(--seeds 0-2 --threads 1 --out "$out")
# frozen MobileNetV2 at 64 px, batch norm in eval mode; ER trains the head on kept features, as ER of Si-Blurry does
frozen=(--backbone mobilenetv2_100 --backbone-set pad_type=same --backbone-set bn_eps=1e-3 --weights "${WEIGHTS:-}"
  --train-view "resize(64,bicubic) normalize(0.5,0.5)" --test-view "resize(64,bicubic) normalize(0.5,0.5)")
head=(--set train=head --set optimizer=adam --set lr=0.005 --set train_classes=seen)

both() { # scenario and its options: NMC, and ER with a memory of 500
  $clbench run --method nmc --scenario "$@" "${common[@]}" "${frozen[@]}"
  $clbench run --method er --scenario "$@" "${common[@]}" "${frozen[@]}" "${head[@]}" --set capacity=500 \
    --set replay_batch_size=32
}

family() {
  local mnist=(--scenario power-law-mnist --scenario-set dataset=mnist-subset --scenario-set per_class=500
    --scenario-set tasks=5 --batch-size 32 --eval-every 10)
  case $1 in
    si-blurry) both si-blurry-cifar100 --scenario-set per_class=100 ;;
    hle)
      both hle-cifar100 --scenario-set per_class=50 --updates-per-batch 3
      both hle-groceries
      ;;
    power-law) # the same stream for a learner without memory, with and without rehearsal in it
      for shape in power uniform none; do
        $clbench run --method finetune "${mnist[@]}" --scenario-set shape=$shape "${common[@]}"
      done
      for method in er nmc; do $clbench run --method $method "${mnist[@]}" "${common[@]}"; done
      ;;
    mtil) both mtil-small --scenario-set per_class=20 --scenario-set test_per_class=10 --eval-every 20 ;;
    domain)
      both pacs
      for method in er nmc; do
        for scenario in permuted-digits rotated-digits; do
          $clbench run --method $method --scenario $scenario "${common[@]}"
        done
      done
      ;;
    task) both split-cifar100 --scenario-set per_class=20 --scenario-set setting=task ;;
    few-shot)
      for scenario in cfsl-omniglot cfsl-omniglot-instance; do
        $clbench run --method nmc --scenario $scenario "${common[@]}" --backbone flatten --eval-every 5
        $clbench run --method er --scenario $scenario "${common[@]}" --backbone mlp --eval-every 5 \
          --train-view "normalize(omniglot)" --test-view "normalize(omniglot)"
      done
      ;;
    all) for each in si-blurry hle power-law mtil domain task few-shot; do family $each; done ;;
    *) echo "unknown family $1" >&2; exit 2 ;;
  esac
}
family "$what"
