#!/usr/bin/env bash
# All tests, in the environment that is active or else in uv's:  ./test.sh [arguments of pytest in place of tests/ -v]
set -euo pipefail
cd "$(dirname "$0")"
if [ $# -eq 0 ]; then set -- tests/ -v; fi
if python -c "import nested_learning, pytest" 2>/dev/null; then
    exec python -m pytest "$@"
fi
exec uv run pytest "$@"
