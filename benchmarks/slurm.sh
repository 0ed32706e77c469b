#!/bin/bash
# A search on the GPUs of several nodes: one process per GPU. See docs/pods.md.
#   sbatch --nodes=2 --ntasks-per-node=8 benchmarks/slurm.sh RUN.yaml OUT
#SBATCH --job-name=enmp
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
set -euo pipefail
run=$1 out=$2

export OPENBLAS_NUM_THREADS=1
resume=()
# a job that was requeued goes on where it stopped
if [ -e "$out/config.yaml" ]; then resume=(--resume); fi
srun enmp search "$run" --out "$out" "${resume[@]}"
