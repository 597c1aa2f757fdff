#!/usr/bin/env bash
# The stores of the bundled model, made in the current folder of NAFNET_DATA's photos and frames: a minute.
#   NAFNET_DATA=~/data bash benchmarks/mobile_v1/data.sh
set -euo pipefail

photos=$NAFNET_DATA/sharp frames=$NAFNET_DATA/frames240
raw=(--format lmdb --codec raw)

# Sharp photos, blurred anew for each sample: as they are, and at half the size, which is sharper by the pixel.
nafnet synth "$photos/unsplash" --max-side 960 --out pairs/unsplash960
nafnet prepare "$photos/unsplash" --sharp --out stores/unsplash --crop 0 "${raw[@]}"
nafnet prepare pairs/unsplash960/sharp --sharp --out stores/unsplash960 --crop 0 "${raw[@]}"
nafnet prepare "$photos/bsds500/train" --sharp --out stores/bsds --crop 0 "${raw[@]}"

# Real motion: averaged frames, half of the pairs as encoded, as GoPro's `blur`.
average=(--encoded-share 0.5 --average)
nafnet synth "$frames" --out pairs/frames "${average[@]}" 7:15 --window-stride 1
nafnet synth "$frames" --out pairs/frames960 "${average[@]}" 9:21 --window-stride 2 --max-side 960 --seed 3
nafnet prepare pairs/frames --out stores/frames --crop 512 --stride 256 "${raw[@]}"
nafnet prepare pairs/frames960 --out stores/frames960 --crop 384 --stride 192 "${raw[@]}"

# The first 50 photos of bsds500/val are to choose by; nothing here reads the last 50.
mkdir -p val-photos
find "$photos/bsds500/val" -name '*.jpg' | sort | head -50 | xargs cp -t val-photos
nafnet synth val-photos --out pairs/val --kind shake --kind varying --kind defocus \
  --min-size 2 --max-size 20 --encoded-share 0.5 --seed 11
nafnet prepare pairs/val --out stores/val --crop 0 --split test
