#!/usr/bin/env bash
# The workers of one machine, in the foreground: one of the pool cpu, and of the pool gpu one for each GPU, which sees that GPU only.
#   PREFECT_API_URL=http://server:4200/api BMFM_WORKSPACE=s3://bmfm/workspace deployments/workers.sh
# GPUS="0 2" names the GPUs (default: those in CUDA_VISIBLE_DEVICES, else all; GPUS= for none, GPUS=-1 for a worker of the pool gpu on a
# machine without one); CPU_RUNS is how many runs the cpu worker
# carries out at the same time (default 2; 0 starts no cpu worker). SIGTERM and Ctrl-C end all of them; so does the end of any.
set -euo pipefail

: "${PREFECT_API_URL:?name the Prefect server, e.g. http://127.0.0.1:4200/api}"
: "${BMFM_WORKSPACE:?name the workspace that all workers share: a folder, or s3://bucket/prefix}"

if [ -z "${GPUS+set}" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    GPUS=${CUDA_VISIBLE_DEVICES//,/ }
  else
    GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | tr '\n' ' ' || true)
  fi
fi

workers=()
start() {
  # A shell lets what it starts in the background ignore SIGINT, with which a worker that is told to end stops itself.
  env --default-signal=INT prefect --no-prompt worker start --no-create-pool-if-not-found "$@" &
  workers+=("$!")
}
stop() {
  trap - EXIT
  trap '' TERM INT
  kill "${workers[@]}" 2>/dev/null || true
  wait "${workers[@]}" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

host=$(hostname)
if [ "${CPU_RUNS:-2}" -gt 0 ]; then
  CUDA_VISIBLE_DEVICES='' start --pool cpu --name "$host-cpu" --limit "${CPU_RUNS:-2}"
fi
for gpu in $GPUS; do
  CUDA_VISIBLE_DEVICES=$gpu start --pool gpu --name "$host-gpu-$gpu" --limit 1
done
if [ "${#workers[@]}" = 0 ]; then
  echo "workers.sh: nothing to start: no GPU was found or named, and CPU_RUNS is 0" >&2
  exit 2
fi
code=0
wait -n || code=$?
echo "workers.sh: a worker ended with code $code; the others are stopped" >&2
exit "$((code > 0 ? code : 1))"
