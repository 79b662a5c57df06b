#!/usr/bin/env bash
# One GPU in MINUTES (8) minutes, into OUTPUT (outputs/gpu): every kernel against its token loop, speed, memory, a
# profile, then two training runs side by side for PILOT_MINUTES (2.5) of them. Interrupted or out of time, run it
# again: it goes on. Options are those of `nl bench gpu`, such as --models self_mod, --again or --smoke.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUN-uv run}
OUTPUT=${OUTPUT:-outputs/gpu}
lost=3     # the card refuses a process after a fault; another process can go on
attempts=4 # processes that a stage may take
end=$(awk -v now="$(date +%s)" -v minutes="${MINUTES:-8}" 'BEGIN { printf "%d", now + 60 * minutes }')
worst=0
options=()
for option in "$@"; do # once for all stages
    if [ "$option" = --again ]; then rm -f "$OUTPUT/gpu.json"; else options+=("$option"); fi
done

for stage in kernels speed pilot counts; do
    for ((attempt = 1; attempt <= attempts; attempt++)); do
        left=$(awk -v now="$(date +%s)" -v end="$end" 'BEGIN { printf "%.2f", (end > now ? (end - now) / 60 : 0) }')
        status=0
        $RUN python -m nested_learning.commands.nl bench gpu --stages "$stage" --minutes "$left" \
            --pilot-minutes "${PILOT_MINUTES:-2.5}" --output "$OUTPUT" "${options[@]}" >/dev/null || status=$?
        if [ "$status" -eq 130 ]; then exit 130; fi                           # Ctrl-C
        if [ "$status" -ne "$lost" ] && [ "$status" -le 128 ]; then break; fi # above 128: killed by a signal
    done
    if [ "$status" -eq 2 ]; then exit 2; fi
    if [ "$status" -ne 0 ]; then worst=1; fi
done
cat "$OUTPUT/gpu.md"
exit "$worst"
