#!/usr/bin/env bash
# The studies behind results/protocol/README.md. Needs an installed clbench and CLBENCH_DATA (cifar100, omniglot); for cifar100 also
# WEIGHTS (mobilenetv2_100.safetensors, ImageNet-1k). A study that was stopped goes on: run the same line again.
#   bash results/protocol/run.sh digits|cifar100|omniglot   [STUDIES folder]
set -euo pipefail
what=$1
out=${2:-results/studies}
protocol="${PYTHON:-python} -m clbench protocol run --out $out --threads 1 --conventional"

case $what in
  digits) # minutes: a small network trained on 8x8 digits
    $protocol --method er,finetune,joint,nmc --untuned --tune split-digits-a --eval split-digits-b \
      --trials 8 --tune-seeds 3 --seeds 5
    ;;
  cifar100) # frozen MobileNetV2 at 64 px, features extracted once per half; heads are trained
    $protocol --method nmc,slca,er,derpp,finetune,joint --untuned --tune split-cifar100-a --eval split-cifar100-b \
      --trials 8 --tune-seeds 2 --seeds 3 --scenario-set per_class=100 \
      --backbone mobilenetv2_100 --backbone-set pad_type=same --backbone-set bn_eps=1e-3 --weights "${WEIGHTS:-}" \
      --train-view "resize(64,bicubic) normalize(0.5,0.5)" --test-view "resize(64,bicubic) normalize(0.5,0.5)" \
      --set slca.backbone_scale=0 --set slca.milestone=0 --set er.train=head --set derpp.train=head --set finetune.train=head --set joint.train=head \
      --space "er.lr=log(1e-3,0.3)" --space "derpp.lr=log(1e-3,0.3)" --space "finetune.lr=log(1e-3,0.3)" --space "joint.lr=log(1e-3,0.3)" \
      --space "er.batch_size=16,32,64" --space "derpp.batch_size=16,32,64" --space "finetune.batch_size=16,32,64" --space "joint.batch_size=16,32,64" \
      --space "er.epochs=1,2,5" --space "derpp.epochs=1,2,5" --space "finetune.epochs=1,2,5" --space "joint.epochs=1,2,5" \
      --space "slca.epochs=1,2,5" --space "slca.batch_size=32,64,128" --eval-every 50 --eval-per-group 50
    ;;
  omniglot) # methods that train a network
    $protocol --method er,derpp,finetune --tune split-omniglot-a --eval split-omniglot-b \
      --trials 8 --tune-seeds 2 --seeds 3 --space "epochs=1,2,4" --eval-every 50 --eval-per-group 20
    ;;
  *)
    echo "run.sh digits|cifar100|omniglot [STUDIES folder]" >&2
    exit 2
    ;;
esac
