# What the server has to know, whichever number of workers there is. Run again, it changes nothing.
set -e
cd "$(dirname "$0")/../.."
prefect --no-prompt work-pool create nanogpt --type process --overwrite
prefect --no-prompt deploy --all
# 20 requests a second over all workers, and never more than 25 in one.
prefect gcl inspect nanogpt >/dev/null 2>&1 || prefect gcl create nanogpt --limit 10 --slot-decay-per-second 24
prefect automation inspect lost-worker >/dev/null 2>&1 ||
  prefect automation create --from-file examples/scale-out/lost-worker.yaml
