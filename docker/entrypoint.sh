#!/bin/sh
# First process of the images. Secrets that are mounted as files become environment variables of the files' names; then the first word
# is a role of compose.yaml, or a command:
#   worker POOL [options of prefect worker start] | prefect-server | mlflow-server | setup | COMMAND ...
set -eu

for file in "${BMFM_SECRETS:-/run/secrets}"/*; do
  name=${file##*/}
  case $name in *[!A-Z0-9_]* | [0-9]*) continue ;; esac
  if [ -f "$file" ]; then
    value=$(cat "$file") || { echo "entrypoint: $file cannot be read by user $(id -u)" >&2; exit 2; }
    export "$name=$value"
  fi
done

role=${1:-}
case $role in
  worker)
    [ $# -ge 2 ] || { echo "entrypoint: name a pool: worker cpu, or worker gpu" >&2; exit 2; }
    pool=$2
    shift 2
    export BMFM_WORKER="$(hostname)-$$"
    # A pool that is missing is a setup that did not run, not one to make up here. A worker stops itself by SIGINT, which what a shell
    # starts in the background would ignore.
    env --default-signal=INT \
      prefect --no-prompt worker start --pool "$pool" --with-healthcheck --no-create-pool-if-not-found "$@" &
    worker=$!
    trap 'kill -TERM "$worker" 2>/dev/null' TERM INT
    code=0
    wait "$worker" || code=$?
    while kill -0 "$worker" 2>/dev/null; do # a signal has ended the waiting, not the worker
      code=0
      wait "$worker" || code=$?
    done
    # The container ends with this process, and training that notices the end of its run has 20 s to save.
    seconds=0
    while [ "$seconds" -lt 40 ] && [ -n "$(env -u BMFM_WORKER grep -lzsx "BMFM_WORKER=$BMFM_WORKER" /proc/[0-9]*/environ)" ]; do
      sleep 1
      seconds=$((seconds + 1))
    done
    exit "$code"
    ;;
  prefect-server)
    shift
    exec prefect --no-prompt server start --host 0.0.0.0 "$@"
    ;;
  mlflow-server)
    shift
    # Its database, store and names come from MLFLOW_BACKEND_STORE_URI, MLFLOW_ARTIFACTS_DESTINATION, MLFLOW_SERVER_ALLOWED_HOSTS.
    exec mlflow server --host 0.0.0.0 "$@"
    ;;
  setup)
    exec python "$(dirname "$0")/prepare.py"
    ;;
esac
exec "$@"
